"""What a channel's owner asks of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import (
    AlreadyExists,
    InvalidArgument,
    InvalidName,
    KacheryError,
    NotOnHub,
    NotPermitted,
    OwnerTokenRefused,
    RateLimited,
)
from kachery_fast.hub.owner_api import TOKEN_FAILURES_PER_MINUTE_MAX
from kachery_fast.net.hub import OwnerClient

from ..network import LOOPS, run_on
from .support import ALL, CHANNEL, OWNER, node_id, running_world

pytestmark = pytest.mark.databases


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_wrong_token_is_refused_and_guesses_are_slowed_down(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            body = b'{"type": "listChannels"}'
            wrong = ["x", world.token[:-1], world.token + "x", world.token.swapcase(), "Ümlaut"]
            for token in ["", *wrong]:  # none at all is no guess
                status, answer = await world.ask(body, token)
                assert (status, answer["error"]) == (401, "OwnerTokenRefused")
            status, answer = await world.post("/api/owner", body, Authorization=f"Basic {world.token}")
            assert status == 401
            assert (await world.ask(body))[0] == 200
            stranger = OwnerClient(world.url, "x" * 43, world.settings, session=world.session)
            for _ in range(TOKEN_FAILURES_PER_MINUTE_MAX - len(wrong)):
                with pytest.raises(OwnerTokenRefused):
                    await stranger.call("listChannels")
            with pytest.raises(RateLimited):
                await stranger.call("listChannels")
            world.clock.now += 60
            assert (await world.ask(body))[0] == 200

    run_on(loop_kind, scenario())


@pytest.mark.sqlite
@pytest.mark.parametrize("body", [
    b"", b"null", b"[]", b"{", b"\xff", b"{}", b'{"type":"dropTables"}', b'{"type":1}', b'{"type":"createChannel"}',
    b'{"type":"createChannel","name":1}', b'{"type":"createChannel","name":"x","more":1}',
    b'{"type":"revoke","channel":"lab","node":"A","permission":["all"]}', b"[" * 100_000,
    b'{"type":"invite","channel":"lab","uses":1.5}', b'{"type":"invite","channel":"lab","permissions":"all"}',
], ids=lambda body: repr(body[:60]))
def test_a_request_that_is_not_exactly_right_changes_nothing(tmp_path: Path, body: bytes) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A")
            before = await world.owner.call("showChannel", channel=CHANNEL)
            status, answer = await world.ask(body)
            assert (status, answer["error"]) == (400, "BadMessage")
            assert await world.owner.call("showChannel", channel=CHANNEL) == before

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize(("kind", "fields", "error"), [
    ("createChannel", {"name": "../etc"}, InvalidName),
    ("createChannel", {"name": ""}, InvalidName),
    ("createChannel", {"name": CHANNEL}, AlreadyExists),
    ("createChannel", {"name": CHANNEL.upper()}, AlreadyExists),
    ("showChannel", {"channel": "nope"}, NotOnHub),
    ("grant", {"channel": CHANNEL, "node": "nobody", "permissions": ["all"]}, NotOnHub),
    ("grant", {"channel": CHANNEL, "node": "A", "permissions": []}, InvalidArgument),
    ("revoke", {"channel": CHANNEL, "node": "A", "permissions": ["everything"]}, InvalidName),
    ("revoke", {"channel": CHANNEL, "node": "twin", "permissions": ["all"]}, InvalidArgument),
    ("removeNode", {"channel": CHANNEL, "node": node_id("A")[:5]}, NotOnHub),
    ("invite", {"channel": CHANNEL, "uses": 0}, InvalidArgument),
    ("invite", {"channel": CHANNEL, "days": -1}, InvalidArgument),
    ("invite", {"channel": CHANNEL, "days": 1e9}, InvalidArgument),
    ("invite", {"channel": CHANNEL, "permissions": ["x"]}, InvalidName),
    ("deleteChannel", {"channel": "nope"}, NotOnHub),
])
def test_what_cannot_be_done_is_refused_with_its_reason(
    tmp_path: Path, kind: str, fields: dict[str, Any], error: type[KacheryError]
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A")
            for name in ("B", "C"):
                await (await world.member(name)).node_config("twin")
            with pytest.raises(error):
                await world.owner.call(kind, **fields)

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_one_owner_cannot_touch_anothers_channel(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A")
            second = await world.person("second@lab.org")
            before = await world.owner.call("showChannel", channel=CHANNEL)
            for kind, fields in (
                ("showChannel", {}), ("invite", {}), ("closeInvitations", {}), ("deleteChannel", {}),
                ("grant", {"node": "A", "permissions": ["all"]}), ("revoke", {"node": "A", "permissions": ["all"]}),
                ("removeNode", {"node": "A"}),
            ):
                with pytest.raises(NotPermitted, match="another owner"):
                    await second.call(kind, channel=CHANNEL, **fields)
            assert (await second.call("listChannels"))["channels"] == []
            assert await world.owner.call("showChannel", channel=CHANNEL) == before

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_channel_is_made_shown_listed_and_deleted_with_its_objects(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            assert await world.owner.call("createChannel", name="other") == {"channel": "other", "owner": OWNER}
            client = await world.member("A", granted=["provideFiles"], requested=["provideFiles", "requestFiles"])
            assert await world.upload(client, b"content") == 200
            listed = await world.owner.call("listChannels")
            assert [(item["name"], item["members"]) for item in listed["channels"]] == [(CHANNEL, 1), ("other", 0)]
            (member,) = (await world.owner.call("showChannel", channel=CHANNEL))["members"]
            assert (member["node"], member["label"], member["owner"]) == (node_id("A"), "A", OWNER)
            assert member["requested"] == ["provideFiles", "requestFiles"]
            assert member["granted"] == member["permissions"] == ["provideFiles"]

            assert (await world.owner.call("deleteChannel", channel=CHANNEL))["objectsRemoved"] == 1
            assert (await client.node_config()).channels == []
            assert not [path for path in (world.settings.hub_dir / "bucket" / CHANNEL).rglob("*") if path.is_file()]
            await world.owner.call("createChannel", name=CHANNEL)
            with pytest.raises(NotPermitted):
                await client.pubsub_token(CHANNEL)

    run_on(loop_kind, scenario())


def test_a_node_is_named_by_label_id_or_the_beginning_of_its_id(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A", granted=[])
            for number, name in enumerate(("A", node_id("A"), node_id("A")[:6])):
                answer = await world.owner.call(
                    "grant", channel=CHANNEL, node=name, permissions=[ALL[number]])
                assert answer["node"] == node_id("A")
            assert answer["permissions"] == sorted(ALL[:3])

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_an_invitation_shows_while_it_can_be_used(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            answer = await world.owner.call("invite", channel=CHANNEL)
            assert answer["link"] == f"{world.url}/join/{answer['code']}"
            assert answer["permissions"] == ["provideFiles", "requestFiles"]
            shown = json.dumps(await world.owner.call("showChannel", channel=CHANNEL))
            assert '"usesLeft": 1' in shown
            assert answer["code"] not in shown
            await world.node("A").join(answer["code"])
            assert (await world.owner.call("showChannel", channel=CHANNEL))["invitations"] == []

    run_on(loop_kind, scenario())
