"""A node becomes somebody's by a code, and by no other way that a stranger could take."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from kachery_fast.errors import ActionRefused, InvalidArgument, KacheryError, NotOnHub, NotPermitted, RateLimited
from kachery_fast.hub import approvals, tables
from kachery_fast.hub.performing import CODE_FAILURES_PER_MINUTE_MAX
from kachery_fast.net.hub import OwnerClient
from kachery_fast.protocol.hub_bodies import AskApproval
from kachery_fast.protocol.messages import encode_hub_request

from ..network import LOOPS, run_on
from .support import CHANNEL, OWNER, Clock, World, node_id, node_key, running_world

ANNA = "anna@lab.org"


async def rows_of(world: World, table: sa.Table) -> list[Any]:
    """What the registry holds, read from beside the hub."""
    registry = world.registry()

    def read(connection: Connection) -> list[Any]:
        return list(connection.execute(sa.select(table)))

    await registry.open()
    rows = await registry.call(read)
    await registry.close()
    return rows


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_node_is_somebodys_once_he_has_entered_its_code(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            anna, node = await world.person(ANNA), world.node("A")
            assert (await node.find_approval()).state == "expired"
            asked = await node.ask_approval("rig-2", "1.2.3")
            assert asked.link == f"{world.url}/approve?code={asked.code}"
            assert asked.expires == int(world.clock() * 1000) + 15 * 60 * 1000
            assert asked.interval > 0
            assert (await node.find_approval()).state == "waiting"
            with pytest.raises(NotPermitted, match="not registered"):
                await node.node_config()

            view = await anna.call("findApproval", code=asked.code)
            assert view == {
                "node": node_id("A"), "label": "rig-2", "version": "1.2.3", "asked": int(world.clock() * 1000),
                "expires": asked.expires, "address": "127.0.0.1", "owner": "", "channel": "", "permissions": []}
            assert (await node.find_approval()).state == "waiting", "looking at it decides nothing"
            answer = await anna.call("approveNode", code=asked.code)
            assert (answer["node"], answer["label"], answer["owner"]) == (node_id("A"), "rig-2", ANNA)
            assert (answer["membership"], answer["refused"]) == (None, "")

            found = await node.find_approval()
            assert (found.state, found.owner, found.standing) == ("approved", ANNA, "")
            config = await node.node_config("rig-2", "1.2.3")
            assert (config.owner, config.channels) == (ANNA, [])
            (line,) = (await anna.call("listNodes"))["nodes"]
            assert (line["node"], line["label"], line["version"], line["channels"]) == (
                node_id("A"), "rig-2", "1.2.3", 0)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_approving_asks_for_the_channel_in_the_owners_name_and_grants_nothing(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna, node = await world.person(ANNA), world.node("A")
            asked = await node.ask_approval("rig-2", "1", CHANNEL, ["request-files", "provideFiles"])
            view = await anna.call("findApproval", code=asked.code)
            assert (view["channel"], view["permissions"]) == (CHANNEL, ["provideFiles", "requestFiles"])
            shown = await world.owner.call("showChannel", channel=CHANNEL)
            assert shown["members"] == [], "not before somebody says so"

            membership = (await anna.call("approveNode", code=asked.code))["membership"]
            assert (membership["state"], membership["permissions"]) == ("asked", [])
            found = await node.find_approval(CHANNEL)
            assert (found.state, found.standing) == ("approved", "asked")
            with pytest.raises(NotPermitted, match="not a member"):
                await node.pubsub_token(CHANNEL)
            (member,) = (await world.owner.call("showChannel", channel=CHANNEL))["members"]
            assert (member["state"], member["owner"], member["label"]) == ("asked", ANNA, "rig-2")
            assert member["requested"] == ["provideFiles", "requestFiles"]

            await world.owner.call("grant", channel=CHANNEL, node="rig-2", permissions=["requestFiles", "requestTasks"])
            assert (await node.find_approval(CHANNEL)).standing == "member"
            (info,) = (await node.node_config()).channels
            assert info.permissions == ["requestFiles"]

    run_on(loop_kind, scenario())


def test_a_code_is_short_hard_to_guess_and_kept_as_a_hash(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            anna = await world.person(ANNA)
            asked = await world.node("A").ask_approval("A")
            assert re.fullmatch(r"[BCDFGHJKLMNPQRSTVWXZ]{5}-[BCDFGHJKLMNPQRSTVWXZ]{5}", asked.code)
            assert 10 * math.log2(20) >= 40
            (row,) = await rows_of(world, tables.approvals)
            assert asked.code.replace("-", "") not in repr(row)
            for entered in (asked.code.lower(), asked.code.replace("-", ""), f" {asked.code.replace('-', ' ')} "):
                assert (await anna.call("findApproval", code=entered))["node"] == node_id("A")

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_code_is_good_for_one_decision_within_a_quarter_of_an_hour(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            anna = await world.person(ANNA)

            async def void(code: str) -> None:
                for kind in ("findApproval", "approveNode", "denyNode"):
                    with pytest.raises(NotOnHub, match="no node that waits with the code"):
                        await anna.call(kind, code=code)
                world.clock.now += 60

            node = world.node("A")
            old, new = (await node.ask_approval("A")).code, (await node.ask_approval("A")).code
            await void(old)
            await anna.call("denyNode", code=new)
            assert (await node.find_approval()).state == "denied"
            await void(new)
            with pytest.raises(NotPermitted):
                await node.node_config()

            approved = (await node.ask_approval("A")).code
            assert (await node.find_approval()).state == "waiting"
            await anna.call("approveNode", code=approved)
            await void(approved)

            late = world.node("late")
            code = (await late.ask_approval("late")).code
            world.clock.now += 15 * 60 - 1
            assert (await anna.call("findApproval", code=code))["node"] == node_id("late")
            world.clock.now += 1
            assert (await late.find_approval()).state == "expired"
            await void(code)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_node_that_is_anothers_is_refused_and_one_of_ones_own_is_not(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna = await world.person(ANNA)
            node = await world.member("A")  # by an invitation of the channel's owner, so it is his
            asked = await node.ask_approval("A")
            assert (await anna.call("findApproval", code=asked.code))["owner"] == OWNER
            with pytest.raises(ActionRefused, match=f"belongs to {OWNER}, who would have to forget it first"):
                await anna.call("approveNode", code=asked.code)
            assert (await node.find_approval()).state == "waiting", "his owner may still say so"
            assert len((await node.node_config()).channels) == 1
            await world.owner.call("approveNode", code=asked.code)
            assert (await node.find_approval()).owner == OWNER
            assert len((await node.node_config()).channels) == 1

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_guesses_of_codes_are_slowed_down_for_who_makes_them(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            anna, guesser = await world.person(ANNA), await world.person("guesser@lab.org")
            code = (await world.node("A").ask_approval("A")).code
            kinds = ["findApproval", "approveNode", "denyNode"]
            for number in range(CODE_FAILURES_PER_MINUTE_MAX):
                with pytest.raises(NotOnHub):
                    await guesser.call(kinds[number % 3], code="BBBBB-BBBBB")
            for kind in kinds:
                with pytest.raises(RateLimited, match="wrong codes"):
                    await guesser.call(kind, code=code)
            for _ in range(2 * CODE_FAILURES_PER_MINUTE_MAX):
                await anna.call("findApproval", code=code)  # right ones cost nothing
            world.clock.now += 60
            assert (await guesser.call("findApproval", code=code))["node"] == node_id("A")

    run_on(loop_kind, scenario())


def test_strangers_cannot_fill_the_list_of_those_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(world: World, first: int, count: int) -> None:
        for number in range(first, first + count):
            await world.node(f"stranger {number}").ask_approval("x")

    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            await ask(world, 0, approvals.ASKS_PER_MINUTE_MAX)
            with pytest.raises(RateLimited, match="in a minute"):
                await world.node("stranger 0").ask_approval("x")
            for minute in range(1, 3):
                world.clock.now += 60
                await ask(world, minute * approvals.ASKS_PER_MINUTE_MAX, approvals.ASKS_PER_MINUTE_MAX)
            world.clock.now += 60
            await ask(world, 90, approvals.OPEN_PER_ADDRESS_MAX - 90)
            with pytest.raises(RateLimited, match=r"100 nodes may wait to be approved from 127\.0\.0\.1"):
                await world.node("late").ask_approval("x")
            assert (await world.node("stranger 99").ask_approval("x")).code, "who waits already takes no more room"
            monkeypatch.setattr(approvals, "OPEN_PER_ADDRESS_MAX", 1000)
            monkeypatch.setattr(approvals, "OPEN_MAX", 100)
            with pytest.raises(RateLimited, match="at this hub"):
                await world.node("late").ask_approval("x")
            world.clock.now += approvals.LIFE_SECONDS
            await world.node("late").ask_approval("x")
            assert len(await rows_of(world, tables.approvals)) == 1, "who waited in vain is gone"

    run_on("asyncio-debug", scenario())


def test_a_node_that_asks_how_it_stands_without_a_pause_is_slowed_down(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            node, other = world.node("A"), world.node("B")
            asked = await node.ask_approval("A")
            for _ in range(20):
                await node.find_approval()
            with pytest.raises(RateLimited, match="wait 2 s between"):
                await node.find_approval()
            assert (await other.find_approval()).state == "expired"
            for _ in range(50):
                world.clock.now += asked.interval
                await node.find_approval()

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize(("channel", "permissions", "error"), [
    ("nope", ["all"], NotOnHub), ("../lab", ["all"], KacheryError), (CHANNEL, [], InvalidArgument),
    ("", ["requestFiles"], InvalidArgument), (CHANNEL, ["everything"], InvalidArgument),
])
def test_what_makes_no_sense_is_refused_when_it_is_asked_for(
    tmp_path: Path, channel: str, permissions: list[str], error: type[KacheryError]
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            with pytest.raises(error):
                await world.node("A").ask_approval("A", "1", channel, permissions)
            assert await rows_of(world, tables.approvals) == []

    run_on("asyncio-debug", scenario())


def test_an_asking_that_was_overheard_cannot_be_repeated_for_another_code(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            anna = await world.person(ANNA)
            body = AskApproval(time=int(world.clock() * 1000), id="1" * 32, label="A")
            data = encode_hub_request(body, node_key("A"))
            status, asked = await world.post("/api/node", data)
            assert status == 200
            assert (await world.post("/api/node", data))[1]["error"] == "StaleMessage"
            await anna.call("approveNode", code=asked["code"])
            assert (await world.post("/api/node", data))[1]["error"] == "StaleMessage", "nor after it is registered"

    run_on("asyncio-debug", scenario())


def test_what_a_node_says_of_itself_cannot_play_tricks_on_who_reads_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            anna = await world.person(ANNA)
            asked = await world.node("A").ask_approval("rig\x1b[2J\u202e-2" + "x" * 500, "1\n2")
            view = await anna.call("findApproval", code=asked.code)
            assert view["label"] == ("rig[2J-2" + "x" * 500)[:100]
            assert view["version"] == "12"
            with pytest.raises(NotOnHub) as caught:
                await anna.call("findApproval", code="\x1b[2J" + "x" * 500)
            assert "\x1b" not in caught.value.message
            assert len(caught.value.message) < 300

    run_on("asyncio-debug", scenario())


def test_a_restart_of_the_hub_keeps_those_who_wait(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock, channel=False) as world:
            asked = await world.node("A").ask_approval("A")
        clock.now += 1
        async with running_world(tmp_path, clock, channel=False) as world:
            assert (await world.node("A").find_approval()).state == "waiting"
            await world.owner.call("approveNode", code=asked.code)
            assert (await world.node("A").find_approval()).owner == OWNER

    run_on("asyncio-debug", scenario())


def test_the_audit_log_names_the_node_and_not_the_code(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world:
            code = (await world.node("A").ask_approval("A")).code
            await world.owner.call("findApproval", code=code)
            await world.owner.call("approveNode", code=code)
            (entry,) = await rows_of(world, tables.audit)
            assert (entry.owner, entry.action, entry.node) == (OWNER, "approveNode", node_id("A"))
            assert code not in repr(entry)

    run_on("asyncio-debug", scenario())


def test_a_channel_that_went_away_keeps_nobody_from_approving_the_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            anna: OwnerClient = await world.person(ANNA)
            asked = await world.node("A").ask_approval("A", "1", CHANNEL, ["all"])
            await world.owner.call("deleteChannel", channel=CHANNEL)
            answer = await anna.call("approveNode", code=asked.code)
            assert answer["membership"] is None
            assert "no channel 'lab'" in answer["refused"]
            found = await world.node("A").find_approval(CHANNEL)
            assert (found.state, found.owner, found.standing) == ("approved", ANNA, "")

    run_on("asyncio-debug", scenario())
