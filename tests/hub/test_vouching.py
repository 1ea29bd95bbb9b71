"""Tokens for the bands from before the hub's start: good where they would be given now, and no further."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kachery_fast.embedded.broker_wire import Action

from ..network import LOOPS, run_on
from .support import CHANNEL, Clock, World, node_id, running_world

# "granted more" as well: whatever the channel's owner decides, the node comes for a new token.
CHANGED = ("granted more", "granted less", "removed", "removed and back", "granted anew", "left", "forgotten")


async def greeting(world: World, token: str) -> tuple[Action, int]:
    """What the broker says first to who comes with this token, and the code of its error."""
    async with world.session.ws_connect(world.url, params={"accessToken": token}) as websocket:
        said = await websocket.receive_json()
        return Action(said["action"]), said.get("error", {}).get("code", 0)


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_token_outlives_the_hub_only_where_nothing_was_decided_since(tmp_path: Path, loop_kind: str) -> None:
    clock = Clock()

    async def scenario() -> None:
        tokens: dict[str, str] = {}
        async with running_world(tmp_path, clock) as world:
            for name in ("stays", *CHANGED):
                granted = ["requestFiles"] if name == "granted more" else ["requestFiles", "provideFiles"]
                node = await world.member(name, granted)
                tokens[name] = (await node.pubsub_token(CHANNEL)).token
            clock.now += 1
            await change(world)
            clock.now += 1
        async with running_world(tmp_path, clock) as world:
            for name in tokens:
                expected = (Action.CONNECTED, 0) if name == "stays" else (Action.ERROR, 40142)
                assert await greeting(world, tokens[name]) == expected, name
            # Who is told so gets a new one, for what is granted now.
            token = await world.node("granted less").pubsub_token(CHANNEL)
            assert await greeting(world, token.token) == (Action.CONNECTED, 0)

    async def change(world: World) -> None:
        async def act(action: str, name: str, *permissions: str) -> None:
            fields = {"permissions": list(permissions)} if permissions else {}
            await world.owner.call(action, channel=CHANNEL, node=node_id(name), **fields)

        await act("grant", "granted more", "provideFiles")
        await act("revoke", "granted less", "provideFiles")
        await act("removeNode", "removed")
        await act("removeNode", "removed and back")
        clock.now += 1
        await world.member("removed and back", ["requestFiles", "provideFiles"])
        await act("revoke", "granted anew", "provideFiles")
        await act("grant", "granted anew", "provideFiles")
        await world.node("left").leave(CHANNEL)
        await world.owner.call("forgetNode", node=node_id("forgotten"))

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_what_is_revoked_after_the_restart_counts_for_tokens_from_before_it(tmp_path: Path, loop_kind: str) -> None:
    clock = Clock()

    async def scenario() -> None:
        async with running_world(tmp_path, clock) as world:
            token = (await (await world.member("node")).pubsub_token(CHANNEL)).token
            clock.now += 1
        async with (running_world(tmp_path, clock) as world,
                    world.session.ws_connect(world.url, params={"accessToken": token}) as websocket):
            assert (await websocket.receive_json())["action"] == Action.CONNECTED
            clock.now += 1
            await world.owner.call("revoke", channel=CHANNEL, node=node_id("node"), permissions=["provideFiles"])
            assert (await websocket.receive_json())["action"] == Action.DISCONNECTED
            assert (await greeting(world, token))[0] == Action.ERROR

    run_on(loop_kind, scenario())


def test_many_that_come_at_once_are_looked_up_together_and_each_for_itself(tmp_path: Path) -> None:
    clock = Clock()
    names = [f"node {number}" for number in range(30)]

    async def scenario() -> None:
        async with running_world(tmp_path, clock) as world:
            tokens = [(await (await world.member(name)).pubsub_token(CHANNEL)).token for name in names]
            clock.now += 1
            for name in names[::3]:
                await world.owner.call("removeNode", channel=CHANNEL, node=node_id(name))
        async with running_world(tmp_path, clock) as world:
            said = await asyncio.gather(*(greeting(world, token) for token in tokens))
            assert [action == Action.CONNECTED for action, _ in said] == [number % 3 > 0 for number in range(30)]

    run_on("uvloop", scenario())
