"""Every action with every permission missing, and present: at the hub, at the broker, at the bucket."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import NotPermitted
from kachery_fast.net.hub import HubClient
from kachery_fast.protocol.names import ObjectName

from ..network import LOOPS, run_on
from .support import ALL, CHANNEL, Peer, World, node_id, running_world

pytestmark = pytest.mark.databases

# Written out, not taken from protocol/access.py: what each permission opens, after the original's documentation.
PUBLISH = {
    "requestFiles": {"requestFiles"}, "provideFiles": {"provideFiles"},
    "requestFeeds": {"requestFeeds"}, "provideFeeds": {"provideFeeds"},
    "requestTasks": {"requestTasks"}, "provideTasks": {"provideTasks"},
}
SUBSCRIBE = {
    "requestFiles": {"provideFiles"}, "provideFiles": {"requestFiles"},
    "requestFeeds": {"provideFeeds"}, "provideFeeds": {"requestFeeds"},
    "requestTasks": {"provideTasks"}, "provideTasks": {"requestTasks"},
}
# Any one of these permissions opens the request.
OPENED_BY = {
    "segment": {"provideFeeds"}, "index": {"provideFeeds"}, "report segment": {"requestFeeds"},
    "result": {"provideTasks"}, "replaced result": {"provideTasks"},
    "GET file": {"requestFiles"}, "HEAD file": {"requestFiles", "provideFiles"},
    "GET segment": {"requestFeeds"}, "HEAD segment": {"requestFeeds"},
    "GET index": {"requestFeeds", "provideFeeds"}, "HEAD index": {"requestFeeds", "provideFeeds"},
    "GET result": {"requestTasks", "provideTasks"}, "HEAD result": {"requestTasks", "provideTasks"},
    "report result": {"requestTasks", "provideTasks"}, "find": {"requestTasks", "provideTasks"},
    "claim": {"provideTasks"}, "claim query": {"provideTasks"}, "keep": {"provideTasks"}, "finish": {"provideTasks"},
}
FEED = "47" * 32
CONTENT = b"some bytes of a recording"
SHA1 = hashlib.sha1(CONTENT).hexdigest()


async def bands_that_work(world: World, client: HubClient, name: str) -> tuple[set[str], set[str]]:
    """Try all six bands in both directions with ``client``'s token; return what could be published, and received."""
    everybody = await world.member(f"full member beside {name}")
    full = await Peer.connect(world, (await everybody.pubsub_token(CHANNEL)).token)
    tried = await Peer.connect(world, (await client.pubsub_token(CHANNEL)).token)
    bands = {f"{CHANNEL}-{kind}": kind for kind in ALL}
    for band in bands:
        assert await full.attach(band)
        await tried.attach(band)
    for serial, band in enumerate(bands):
        assert await full.publish(band, serial)
    await tried.ping()
    published = {kind for serial, (band, kind) in enumerate(bands.items()) if await tried.publish(band, serial)}
    await full.ping()
    received = {bands[band] for band in tried.received} - published
    # What it published comes back to it where it may listen too; ask the others for those.
    received |= {kind for band, kind in bands.items() if tried.received.count(band) >= 1 and kind in published}
    assert {bands[band] for band in full.received} == set(ALL), "the full member hears itself on every band"
    assert all(full.received.count(band) == 1 + (bands[band] in published) for band in bands)
    await tried.close()
    await full.close()
    return published, received


async def tries(world: World, client: HubClient, name: str) -> dict[str, bool]:
    """Try every request about feeds and tasks, up to the bucket; return which of them were allowed."""
    other = await world.member(f"full provider beside {name}")
    number = hashlib.sha1(name.encode()).hexdigest()
    action, query = number[:32], number[8:]
    theirs = hashlib.sha1(number.encode()).hexdigest()[:32]
    await other.claim_task(CHANNEL, theirs, "action", "f")
    segment = await client_upload(world, client.sign_feed_uploads(CHANNEL, FEED, number, [(SHA1, len(CONTENT))], 3))
    reads = [ObjectName(CHANNEL, "file", SHA1), ObjectName(CHANNEL, "result", number),
             ObjectName(CHANNEL, "index", number, FEED), ObjectName(CHANNEL, "segment", SHA1, FEED, number)]
    return {
        **{f"{method} {name.kind}": await client_read(world, client, name, method)
           for name in reads for method in ("GET", "HEAD")},
        "segment": segment,
        "index": await client_upload(world, client.sign_feed_uploads(CHANNEL, FEED, number, [], len(CONTENT))),
        "report segment": await allowed(
            client.report_corrupt(CHANNEL, SHA1, "0" * 40, feed_id=FEED, subfeed=number)),
        "result": await client_upload(world, client.sign_task_result(CHANNEL, number, len(CONTENT))),
        "replaced result": await client_upload(
            world, client.sign_task_result(CHANNEL, number, len(CONTENT), replace=True)),
        "report result": await allowed(client.report_bad_result(CHANNEL, number)),
        "find": await allowed(client.find_task(CHANNEL, theirs)),
        "claim": await allowed(client.claim_task(CHANNEL, action, "action", "f")),
        "claim query": await allowed(client.claim_task(CHANNEL, query, "query", "f")),
        "keep": await allowed(client.keep_tasks(CHANNEL, [action])),
        # Where the claim was refused so is this, for the one reason or the other.
        "finish": await allowed(client.finish_task(CHANNEL, action, "released")),
    }


async def client_upload(world: World, signing: Any) -> bool:
    """Whether URLs were signed; where they were, the bucket takes exactly what they are for."""
    try:
        signed = await signing
    except NotPermitted:
        return False
    first = signed[0] if isinstance(signed, list) else signed
    for body, status in ((CONTENT + b"!", 413), (CONTENT, 200)):
        async with world.session.put(first.url, data=body, headers=first.headers) as response:
            assert response.status == status
    return True


async def client_read(world: World, client: HubClient, name: ObjectName, method: str) -> bool:
    """Whether a URL was signed (``test_downloads.py`` tries what it opens)."""
    try:
        (url,) = (await client.sign_downloads(name, [name.sha1], head=method == "HEAD")).urls
    except NotPermitted:
        return False
    async with world.session.request(method, url) as response:
        assert response.status in (200, 404)
    return True


async def allowed(awaitable: Any) -> bool:
    try:
        await awaitable
    except NotPermitted:
        return False
    return True


async def check_everything(world: World, client: HubClient, name: str, effective: set[str]) -> None:
    """Try each request of the node API, each band and the bucket; compare with what ``effective`` shall open."""
    config = await client.node_config()
    (info,) = config.channels
    assert set(info.permissions) == effective
    seen = {member.node_id for member in info.members}
    assert (node_id(name) in seen) == bool(effective)

    assert await allowed(client.pubsub_token(CHANNEL)) == bool(effective)
    if effective:
        token = await client.pubsub_token(CHANNEL)
        expected: dict[str, set[str]] = {}
        for permission in effective:
            for operation, opened in (("publish", PUBLISH), ("subscribe", SUBSCRIBE)):
                for kind in opened[permission]:
                    expected.setdefault(f"{CHANNEL}-{kind}", set()).add(operation)
        assert {band: set(ops) for band, ops in json.loads(token.capability).items()} == expected
        published, received = await bands_that_work(world, client, name)
        assert published == {kind for permission in effective for kind in PUBLISH[permission]}
        assert received == {kind for permission in effective for kind in SUBSCRIBE[permission]}

    may_upload = "provideFiles" in effective
    content = f"{CONTENT!r} of {name}".encode()
    assert await allowed(world.upload(client, content)) == may_upload
    assert await world.download(hashlib.sha1(content).hexdigest()) == (content if may_upload else None)

    assert await allowed(client.report_corrupt(CHANNEL, SHA1, "0" * 40)) == ("requestFiles" in effective)
    found = await tries(world, client, name)
    assert found == {what: bool(OPENED_BY[what] & effective) for what in OPENED_BY}
    assert await allowed(client.leave(CHANNEL))
    assert not await allowed(client.pubsub_token(CHANNEL))
    assert not await allowed(client.sign_uploads(CHANNEL, [(SHA1, 1)]))
    assert not await allowed(client.report_corrupt(CHANNEL, SHA1, "0" * 40))
    assert not any((await tries(world, client, f"{name} that left")).values())


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("permission", ALL)
def test_one_permission_opens_its_bands_and_actions_and_no_others(
    tmp_path: Path, loop_kind: str, permission: str
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("one", granted=[permission])
            await check_everything(world, client, "one", {permission})

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("side", ["granted", "requested"])
@pytest.mark.parametrize("missing", ALL)
def test_a_permission_that_either_side_withholds_closes_what_it_opens(
    tmp_path: Path, loop_kind: str, missing: str, side: str
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            rest = [permission for permission in ALL if permission != missing]
            client = await world.member("most", **{side: rest})
            await check_everything(world, client, "most", set(rest))

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_member_without_any_permission_can_do_nothing_but_leave(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("none", granted=[])
            await check_everything(world, client, "none", set())
            disjoint = await world.member("disjoint", granted=["requestFiles"], requested=["provideFiles"])
            await check_everything(world, disjoint, "disjoint", set())

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_who_is_no_member_can_do_nothing(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.owner.call("createChannel", name="other")
            elsewhere, removed = world.node("elsewhere"), await world.member("removed")
            invitation = await world.owner.call("invite", channel="other", permissions=ALL)
            await elsewhere.join(invitation["code"])
            await world.owner.call("removeNode", channel=CHANNEL, node="removed")
            for client in (world.node("stranger"), elsewhere, removed):
                for request in (
                    client.pubsub_token(CHANNEL), client.sign_uploads(CHANNEL, [(SHA1, 1)]),
                    client.report_corrupt(CHANNEL, SHA1, "0" * 40), client.leave(CHANNEL),
                    client.sign_downloads(ObjectName("no-such-channel", "file", SHA1), [SHA1]),
                    client.pubsub_token("no-such-channel"), client.sign_uploads("no-such-channel", [(SHA1, 1)]),
                ):
                    assert not await allowed(request)
                assert not any((await tries(world, client, f"{id(client)}")).values())
                assert not await allowed(client.claim_task("no-such-channel", "7a" * 16, "action", "f"))
            assert not await allowed(world.node("stranger").node_config())
            assert [info.name for info in (await elsewhere.node_config()).channels] == ["other"]
            assert (await removed.node_config()).channels == []

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_url_signed_for_one_channel_or_object_opens_no_other(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            (signed,) = await client.sign_uploads(CHANNEL, [(SHA1, len(CONTENT))])
            assert signed.object == f"{CHANNEL}/sha1/{SHA1[:2]}/{SHA1[2:4]}/{SHA1[4:6]}/{SHA1}"
            other = "f" + SHA1[1:]
            other_object = f"{CHANNEL}/sha1/{other[:2]}/{other[2:4]}/{other[4:6]}/{other}"
            for wrong in (
                signed.url.replace(f"/bucket/{CHANNEL}/", "/bucket/other/"),
                signed.url.replace(signed.object, other_object),
                signed.url.replace(f"Size={len(CONTENT)}", f"Size={len(CONTENT) + 1}"),
            ):
                assert wrong != signed.url
                async with world.session.put(wrong, data=CONTENT, headers=signed.headers) as response:
                    assert response.status == 403
            assert await world.upload(client, CONTENT) == 200
            assert await world.upload(client, CONTENT) == 412

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_revoked_permission_is_gone_with_the_next_request_and_cuts_the_connection(
    tmp_path: Path, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            token = (await client.pubsub_token(CHANNEL)).token
            peer = await Peer.connect(world, token)
            assert await peer.attach(f"{CHANNEL}-provideFiles")
            assert await peer.publish(f"{CHANNEL}-provideFiles", 0)
            await world.owner.call("revoke", channel=CHANNEL, node="A", permissions=["provideFiles"])

            cut = await peer.closed_by_broker()
            assert cut["error"]["statusCode"] == 401
            await peer.close()
            url = world.url.replace("http", "ws", 1) + f"/?access_token={token}&v=5"
            async with world.session.ws_connect(url) as again:
                assert json.loads(await again.receive_str())["action"] != 4, "the old token must not work any more"
            assert not await allowed(client.sign_uploads(CHANNEL, [(SHA1, 1)]))
            before = await tries(world, client, "before")
            assert all(before.values()), "the other permissions are as they were"

            smaller = await Peer.connect(world, (await client.pubsub_token(CHANNEL)).token)
            assert not await smaller.publish(f"{CHANNEL}-provideFiles", 0)
            assert await smaller.publish(f"{CHANNEL}-requestFiles", 1)
            await smaller.close()
            await world.owner.call("grant", channel=CHANNEL, node="A", permissions=["provideFiles"])
            assert await allowed(client.sign_uploads(CHANNEL, [(SHA1, 1)]))
            for permission in ("requestFeeds", "provideFeeds", "requestTasks", "provideTasks"):
                await world.owner.call("revoke", channel=CHANNEL, node="A", permissions=[permission])
                left = set(ALL) - {permission}
                found = await tries(world, client, f"without {permission}")
                assert found == {what: bool(OPENED_BY[what] & left) for what in OPENED_BY}
                await world.owner.call("grant", channel=CHANNEL, node="A", permissions=[permission])

    run_on(loop_kind, scenario())
