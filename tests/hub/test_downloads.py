"""Leave to read from a private channel: who gets which URLs, what they open, and when strangers are shut out."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.embedded.bucket_reads import DownloadSigner, ReadGate
from kachery_fast.errors import (
    ChannelPrivate,
    DiskError,
    InvalidName,
    KacheryError,
    NotPermitted,
    RateLimited,
    TooLarge,
)
from kachery_fast.hub import open_channels
from kachery_fast.hub.open_channels import BELIEVED_SECONDS, OpenChannels
from kachery_fast.net.public import find_bucket_url
from kachery_fast.protocol.names import ObjectName, object_name

from ..network import LOOPS, run_on
from .support import CHANNEL, World, running_world

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)

FEED, SUBFEED = "4a" * 32, "0a" * 20
CONTENT = b"some bytes of a recording"
SHA1 = hashlib.sha1(CONTENT).hexdigest()
FILE = ObjectName(CHANNEL, "file", SHA1)
KINDS = [FILE, ObjectName(CHANNEL, "result", SHA1), ObjectName(CHANNEL, "index", SUBFEED, FEED),
         ObjectName(CHANNEL, "segment", SHA1, FEED, SUBFEED)]


async def status(world: World, url: str, method: str = "GET", **headers: str) -> int:
    async with world.session.request(method, url, headers=headers) as response:
        return response.status


async def make_private(world: World, private: bool = True) -> None:
    answer = await world.owner.call("changeChannel", channel=CHANNEL, private=private)
    assert answer["private"] is private


def put_all(world: World) -> None:
    for name in KINDS:
        path = world.settings.hub_dir / "bucket" / str(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)


async def refused(awaitable: Any) -> KacheryError:
    with pytest.raises(KacheryError) as error:
        await awaitable
    return error.value


def test_a_node_reads_a_private_channel_by_signed_urls_and_a_stranger_does_not(
    loop_kind: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            put_all(world)
            assert [info.private for info in (await client.node_config()).channels] == [False]
            await make_private(world)
            assert [info.private for info in (await client.node_config()).channels] == [True]
            assert (await client.join(await world.invite())).private is True
            for name in KINDS:
                plain = f"{world.url}/bucket/{name}"
                assert [await status(world, plain, method) for method in ("GET", "HEAD")] == [403, 403]
                for head in (False, True):
                    signed = await client.sign_downloads(name, [name.sha1], head=head)
                    (url,) = signed.urls
                    assert url.startswith(plain + "?")
                    assert signed.expires == int(world.clock.now + world.settings.url_life_seconds) * 1000
                    found = [await status(world, url, method) for method in ("GET", "HEAD")]
                    assert found == ([403, 200] if head else [200, 403])
            await make_private(world, False)
            assert await status(world, f"{world.url}/bucket/{FILE}") == 200

    run_on(loop_kind, scenario())


def test_a_url_for_reading_opens_one_object_for_its_life(loop_kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, url_life_seconds=60.0) as world:
            client = await world.member("A")
            put_all(world)
            await make_private(world)
            (url,) = (await client.sign_downloads(FILE, [SHA1])).urls
            assert await status(world, url, Range="bytes=0-3") == 206
            for other in KINDS[1:]:
                assert await status(world, url.replace(str(FILE), str(other))) == 403
            assert await status(world, url.replace(f"/{CHANNEL}/", "/other/")) == 403
            world.clock.now += 61
            assert await status(world, url) == 403

    run_on(loop_kind, scenario())


def test_who_loses_a_permission_gets_no_further_url(loop_kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            await make_private(world)
            await client.sign_downloads(FILE, [SHA1])
            await world.owner.call("revoke", channel=CHANNEL, node="A", permissions=["requestFiles"])
            assert isinstance(await refused(client.sign_downloads(FILE, [SHA1])), NotPermitted)
            # It may still provide files, and looks whether one is there before it uploads it.
            await client.sign_downloads(FILE, [SHA1], head=True)
            await world.owner.call("removeNode", channel=CHANNEL, node="A")
            for name in KINDS:
                for head in (False, True):
                    error = await refused(client.sign_downloads(name, [name.sha1], head=head))
                    assert isinstance(error, NotPermitted)

    run_on(loop_kind, scenario())


def test_urls_are_given_in_batches_and_within_a_rate(loop_kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, sign_batch_max=4, sign_rate_per_node_max=1.0) as world:
            client, other = await world.member("A"), await world.member("B")
            sha1s = [f"{number:040x}" for number in range(4)]
            signed = await client.sign_downloads(FILE, sha1s)
            assert [url.partition("?")[0] for url in signed.urls] == [
                f"{world.url}/bucket/{object_name(CHANNEL, sha1)}" for sha1 in sha1s]
            assert isinstance(await refused(client.sign_downloads(FILE, [*sha1s, SHA1])), TooLarge)
            for _ in range(24):
                await client.sign_downloads(FILE, sha1s)
            error = await refused(client.sign_downloads(FILE, sha1s))
            assert isinstance(error, RateLimited)
            assert "10 download URLs a second" in error.message
            await client.sign_uploads(CHANNEL, [(SHA1, 1)])
            await other.sign_downloads(FILE, sha1s)
            world.clock.now += 1
            await client.sign_downloads(FILE, sha1s)
            assert (await client.sign_downloads(FILE, [])).urls == []

    run_on(loop_kind, scenario())


def test_names_are_built_of_checked_parts_alone(loop_kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            for name in (ObjectName(CHANNEL, "segment", SHA1), ObjectName(CHANNEL, "segment", SHA1, FEED),
                         ObjectName(CHANNEL, "index", SHA1)):
                assert isinstance(await refused(client.sign_downloads(name, [SHA1])), InvalidName)

    run_on(loop_kind, scenario())


def test_who_asks_without_a_node_is_told_that_the_channel_is_private(loop_kind: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            assert (await find_bucket_url(world.url, CHANNEL, world.settings)).startswith(world.url)
            await make_private(world)
            error = await refused(find_bucket_url(world.url, CHANNEL, world.settings))
            assert isinstance(error, ChannelPrivate)
            assert "kachery-fast node join" in error.message
            # A client of 2022 that uploads through a node wants the address, and takes 403 for "not there yet".
            status, answer = await world.post("/api/getChannelBucketBaseUrl", b'{"channelName":"lab"}')
            assert (status, answer) == (200, {"url": f"{world.url}/bucket", "private": True})

    run_on(loop_kind, scenario())


def test_a_channel_is_closed_before_it_is_deleted_and_stays_so_after_a_restart(
    loop_kind: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            put_all(world)
            plain = f"{world.url}/bucket/{FILE}"
            assert await status(world, plain) == 200
            await make_private(world)
        async with running_world(tmp_path, channel=False) as world:
            plain = f"{world.url}/bucket/{FILE}"
            assert await status(world, plain) == 403
            await world.owner.call("deleteChannel", channel=CHANNEL)
            put_all(world)  # as if something had been left
            assert await status(world, plain) == 403
            await world.owner.call("createChannel", name=CHANNEL)
            assert await status(world, plain) == 200

    run_on(loop_kind, scenario())


class SharedRegistry:
    """As much of a registry as is looked at, with other hubs on it. ``public``: what it says, None: it fails."""

    shared = True

    def __init__(self) -> None:
        self.public: frozenset[str] | None = frozenset({"lab", "other"})
        self.looked = asyncio.Event()

    async def call(self, function: Any) -> frozenset[str]:
        self.looked.set()
        if self.public is None:
            raise DiskError(action="use", path="it", why="it is away")
        return self.public


def test_what_another_hub_has_closed_is_closed_here_soon_and_without_a_registry_all_is(
    loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_channels, "LOOK_SECONDS", 0.01)
    told: list[tuple[frozenset[str], float]] = []
    now = [1000.0]
    gate = ReadGate(DownloadSigner(b"0123456789abcdef"), clock=lambda: now[0])

    def tell(channels: frozenset[str], for_seconds: float) -> None:
        told.append((channels, for_seconds))
        gate.open(channels, for_seconds)

    async def looked_anew(registry: SharedRegistry) -> None:
        for _ in range(2):  # the first may have begun before
            registry.looked.clear()
            await asyncio.wait_for(registry.looked.wait(), 20)

    async def scenario() -> None:
        registry = SharedRegistry()
        watch = OpenChannels(registry, tell)  # type: ignore[arg-type]
        await watch.start()
        try:
            assert gate.check("GET", str(FILE), "") is False
            registry.public = frozenset({"other"})
            await looked_anew(registry)
            assert told[-1][0] == {"other"}
            with pytest.raises(NotPermitted):
                gate.check("GET", str(FILE), "")
            registry.public = frozenset({"lab"})
            await looked_anew(registry)
            registry.public = None
            await looked_anew(registry)
            assert gate.check("GET", str(FILE), "") is False, "a registry that is away for a moment closes nothing"
            assert 0 < told[-1][1] <= BELIEVED_SECONDS
            now[0] += BELIEVED_SECONDS
            with pytest.raises(NotPermitted):
                gate.check("GET", str(FILE), "")
            assert isinstance(await refused(watch.refresh()), DiskError)
            assert told[-1] == (frozenset(), 0.0), "a change that may not have been seen closes at once"
        finally:
            await watch.close()

    run_on(loop_kind, scenario())
