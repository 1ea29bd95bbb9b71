"""Claims on tasks at a real hub: given once, kept, lapsed, finished, and not forgotten."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from kachery_fast.errors import (
    BadMessage,
    InvalidArgument,
    InvalidName,
    KacheryError,
    NotPermitted,
    RateLimited,
    SignatureInvalid,
    TooLarge,
)
from kachery_fast.hub import tasks
from kachery_fast.hub.registry import Registry
from kachery_fast.hub.tables import task_claims
from kachery_fast.hub.tasks import ACTION_KEPT_SECONDS, CALCULATION_KEPT_SECONDS, PRUNE_INTERVAL_SECONDS, Tasks
from kachery_fast.net.hub import HubClient, OwnerClient
from kachery_fast.protocol.hub_bodies import ClaimTask
from kachery_fast.protocol.tasks import check_receipt, sign_receipt

from ..network import LOOPS, run_on
from .support import CHANNEL, Clock, World, hub_process, hub_settings, node_id, node_key, running_world

pytestmark = pytest.mark.databases

TASK, OTHER = "7a" * 16, "8b" * 16
PURE = "5b" * 20
LEASE = 20.0


def receipt(name: str = "A", **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "channel": CHANNEL, "task": TASK, "function": "f", "kwargs": {}, "outcome": "finished", "error": None,
        "started_ms": 1, "finished_ms": 2, "key": node_key(name)}
    return sign_receipt(**{**fields, **changes})


async def refusal(work: Any) -> type[BaseException]:
    with pytest.raises(KacheryError) as caught:
        await work
    return type(caught.value)


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize(("kind", "task"), [("action", TASK), ("query", TASK), ("pure-calculation", PURE)])
def test_of_many_nodes_that_claim_at_once_one_is_told_yes(
    tmp_path: Path, loop_kind: str, kind: str, task: str
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            nodes = [await world.member(f"node {number}") for number in range(8)]
            answers = await asyncio.gather(
                *(node.claim_task(CHANNEL, task, kind, "f") for node in nodes for _ in range(3)))
            winners = {answer.node_id for answer in answers}
            assert len(winners) == 1
            assert all(answer.state == "claimed" for answer in answers)
            winner = next(n for n in range(8) if node_id(f"node {n}") in winners)
            granted = [number // 3 for number, answer in enumerate(answers) if answer.granted]
            # A calculation or query may be given to its own node again; an action not even that.
            assert set(granted) == {winner}
            assert len(granted) == (1 if kind == "action" else 3)

    run_on(loop_kind, scenario())


def test_hubs_that_share_a_registry_give_each_task_once(tmp_path: Path) -> None:
    """Two registries on one database, each with its own thread: rows decide, not a lock of one process."""
    ids = [f"{number:032x}" for number in range(40)]

    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A")
            await world.member("B")
            now_ms = int(world.clock() * 1000)
            registries = [world.registry() for _ in range(2)]
            for registry in registries:
                await registry.open()

            async def claim_all(registry: Registry, name: str) -> list[str]:
                given = []
                for task in ids:
                    asked = ClaimTask(channel=CHANNEL, time=now_ms, id="", task=task, kind="action", function="f",
                                      attempt=name * 32)
                    answer = await registry.call(tasks._claim, asked, node_id(name), now_ms, 20_000, full=False)
                    given += [task] if answer.granted else []
                return given

            given = await asyncio.gather(*(claim_all(*pair) for pair in zip(registries, "AB", strict=True)))
            assert sorted(given[0] + given[1]) == ids
            for registry in registries:
                await registry.close()

    run_on("asyncio-debug", scenario())


def test_a_row_that_has_changed_is_not_overwritten(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            await client.claim_task(CHANNEL, TASK, "action", "f")
            registry, now_ms = world.hub._registry, int(world.clock() * 1000)
            found, revision = await registry.call(tasks._load, CHANNEL, TASK)
            assert found is not None
            assert await registry.call(tasks._save, CHANNEL, found, revision, now_ms)
            assert not await registry.call(tasks._save, CHANNEL, found, revision, now_ms)
            assert not await registry.call(tasks._save, CHANNEL, found, 0, now_ms), "it is there already"
            other = replace(found, task=OTHER)
            assert await registry.call(tasks._save, CHANNEL, other, 0, now_ms), "it was not"

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_an_action_whose_node_fell_silent_is_unknown_and_starts_nowhere_else(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a, b = await world.member("A"), await world.member("B")
            assert (await b.find_task(CHANNEL, TASK)).state == "none"
            assert (await a.claim_task(CHANNEL, TASK, "action", "f")).granted
            world.clock.now += LEASE - 0.1
            assert (await b.find_task(CHANNEL, TASK)).state == "claimed"
            world.clock.now += 0.2
            assert (await b.find_task(CHANNEL, TASK)).state == "unknown"
            assert await a.keep_tasks(CHANNEL, [TASK]) == {TASK}, "what was told is not taken back"
            for client in (a, b):
                answer = await client.claim_task(CHANNEL, TASK, "action", "f")
                assert (answer.granted, answer.state) == (False, "unknown")
            told = await a.finish_task(CHANNEL, TASK, "finished", receipt())
            assert (told.state, (await b.find_task(CHANNEL, TASK)).receipt) == ("finished", receipt())

    run_on(loop_kind, scenario())


def test_what_may_be_repeated_goes_to_the_next_node_when_its_own_fell_silent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a, b = await world.member("A"), await world.member("B")
            for kind, task, idempotent in (("query", TASK, False), ("pure-calculation", PURE, False),
                                           ("action", OTHER, True)):
                await a.claim_task(CHANNEL, task, kind, "f", idempotent=idempotent)
                world.clock.now += LEASE + 1
                assert (await b.find_task(CHANNEL, task)).state == "released"
                assert (await b.claim_task(CHANNEL, task, kind, "f", idempotent=idempotent)).granted
                assert await a.keep_tasks(CHANNEL, [task]) == {task}
                assert await refusal(a.finish_task(CHANNEL, task, "finished")) is NotPermitted

    run_on("asyncio-debug", scenario())


def test_a_claim_lives_as_long_as_it_is_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a, b = await world.member("A"), await world.member("B")
            many = [f"{number:032x}" for number in range(1500)]
            now_ms = int(world.clock() * 1000)

            def claim_all(connection: Connection) -> None:  # past the rate of requests, which is tested below
                for task in [*many, TASK]:
                    asked = ClaimTask(
                        channel=CHANNEL, time=0, id="", task=task, kind="action", function="f", attempt="1")
                    tasks._claim(connection, asked, node_id("A"), now_ms, 20_000, full=False)

            await world.hub._registry.call(claim_all)
            for _ in range(4):
                world.clock.now += LEASE - 1
                assert await a.keep_tasks(CHANNEL, [TASK, *many]) == set()
                assert await b.keep_tasks(CHANNEL, [TASK]) == {TASK}
                assert await a.keep_tasks(CHANNEL, [OTHER]) == {OTHER}
                assert (await b.find_task(CHANNEL, TASK)).state == "claimed"
            assert await a.keep_tasks(CHANNEL, []) == set()

    run_on("asyncio-debug", scenario())


def test_an_answer_that_was_lost_is_given_again_to_the_same_attempt(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client, other = await world.member("A"), await world.member("B")
            for expected in (True, True):
                answer = await client.claim_task(CHANNEL, TASK, "action", "f", attempt="1" * 32)
                assert answer.granted == expected
            assert not (await client.claim_task(CHANNEL, TASK, "action", "f")).granted
            assert not (await other.claim_task(CHANNEL, TASK, "action", "f", attempt="1" * 32)).granted
            for attempt in ("short", "x" * 65, "é" * 32):
                assert await refusal(client.claim_task(CHANNEL, OTHER, "action", "f", attempt=attempt)) is not None
            assert (await client.find_task(CHANNEL, OTHER)).state == "none"

    run_on("asyncio-debug", scenario())


def test_a_released_task_is_free(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a, b = await world.member("A"), await world.member("B")
            assert (await a.claim_task(CHANNEL, TASK, "action", "f", attempt="1" * 32)).granted
            assert (await a.finish_task(CHANNEL, TASK, "released", attempt="2" * 32)).state == "claimed"
            assert (await a.finish_task(CHANNEL, TASK, "released")).state == "claimed"
            assert (await a.finish_task(CHANNEL, TASK, "released", attempt="1" * 32)).state == "released"
            assert (await b.claim_task(CHANNEL, TASK, "action", "f")).granted
            assert (await b.finish_task(CHANNEL, TASK, "unknown")).state == "unknown"
            assert not (await a.claim_task(CHANNEL, TASK, "action", "f")).granted

    run_on("asyncio-debug", scenario())


# --- receipts


FORGED: dict[str, tuple[Callable[[], Any], type[KacheryError]]] = {
    "none": (lambda: None, InvalidArgument),
    "empty": (dict, BadMessage),
    "of another task": (lambda: receipt(task=OTHER), BadMessage),
    "of another channel": (lambda: receipt(channel="other"), BadMessage),
    "of another node": (lambda: receipt("B"), InvalidArgument),
    "of another function": (lambda: receipt(function="g"), InvalidArgument),
    "of another outcome": (lambda: receipt(outcome="error", error={"type": "E", "message": "", "traceback": ""}),
                           InvalidArgument),
    "forged": (lambda: {**receipt(), "signature": receipt("B")["signature"]}, SignatureInvalid),
    "in another's name": (lambda: {"body": {**receipt("B")["body"], "node": node_id("A")},
                                   "signature": receipt("B")["signature"]}, SignatureInvalid),
    "endless": (lambda: receipt(outcome="error", error={"type": "E", "message": "x" * 70_000, "traceback": ""}),
                TooLarge),
    "with more": (lambda: {**receipt(), "more": 1}, BadMessage),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_receipt_that_does_not_hold_ends_nothing(tmp_path: Path, case: str) -> None:
    make, error = FORGED[case]

    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            await client.claim_task(CHANNEL, TASK, "action", "f")
            assert await refusal(client.finish_task(CHANNEL, TASK, "finished", make())) is error
            assert (await client.find_task(CHANNEL, TASK)).state == "claimed"
            told = await client.finish_task(CHANNEL, TASK, "finished", receipt())
            assert told.receipt is not None
            assert check_receipt(told.receipt, CHANNEL, TASK).node_id == node_id("A")

    run_on("asyncio-debug", scenario())


def test_nobody_ends_the_task_of_another(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a, b = await world.member("A"), await world.member("B")
            await a.claim_task(CHANNEL, TASK, "action", "f")
            for state in ("finished", "failed", "unknown", "released"):
                for proof in (None, receipt(), receipt("B")):
                    assert await refusal(b.finish_task(CHANNEL, TASK, state, proof)) is NotPermitted
                    assert await refusal(b.finish_task(CHANNEL, OTHER, state, proof)) is NotPermitted
            assert (await b.find_task(CHANNEL, TASK)).state == "claimed"
            assert await refusal(a.finish_task(CHANNEL, TASK, "claimed")) is BadMessage

    run_on("asyncio-debug", scenario())


def test_the_tasks_of_two_channels_are_two(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            await world.owner.call("createChannel", name="other")
            invitation = await world.owner.call("invite", channel="other", permissions=["all"])
            await client.join(invitation["code"])
            assert (await client.claim_task(CHANNEL, TASK, "action", "f")).granted
            assert (await client.find_task("other", TASK)).state == "none"
            assert (await client.claim_task("other", TASK, "action", "f")).granted
            # With its channel a claim is gone too.
            await world.owner.call("deleteChannel", channel=CHANNEL)
            await world.owner.call("createChannel", name=CHANNEL)
            await client.join(await world.invite())
            assert (await client.find_task(CHANNEL, TASK)).state == "none"
            assert (await client.find_task("other", TASK)).state == "claimed"

    run_on("asyncio-debug", scenario())


# --- what is no task


@pytest.mark.sqlite
@pytest.mark.parametrize(("task", "kind", "function"), [
    ("x" * 32, "action", "f"), (TASK.upper(), "action", "f"), (PURE, "action", "f"), (TASK, "pure-calculation", "f"),
    (TASK, "deed", "f"), (TASK, "action", ""), (TASK, "action", " f"), (TASK, "action", "f\n"),
    (TASK, "action", "f" * 201), ("", "action", "f"), (TASK + "\x00", "action", "f"),
])
def test_what_is_no_task_is_not_claimed(tmp_path: Path, task: str, kind: str, function: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            assert await refusal(client.claim_task(CHANNEL, task, kind, function)) in (BadMessage, InvalidName)
            for task_id in ("x", "../..", "\x00" * 32):
                assert await refusal(client.find_task(CHANNEL, task_id)) is InvalidName
                assert await refusal(client.keep_tasks(CHANNEL, [TASK, task_id])) is InvalidName

    run_on("asyncio-debug", scenario())


# --- limits


def test_requests_about_tasks_have_a_rate_for_each_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.member("A")
            service = Tasks(world.hub._registry, world.settings, world.clock)
            asked = ClaimTask(channel=CHANNEL, time=0, id="", task=TASK, kind="action", function="f", attempt="1" * 32)
            for _ in range(2000):
                service._rate.spend(node_id("A"), 1, world.clock(), who="", limit="")
            assert await refusal(service.answer(asked, node_id("A"))) is RateLimited
            assert await refusal(service.answer(asked, node_id("B"))) is NotPermitted, "B has a rate of its own"
            world.clock.now += 0.1
            await service.answer(asked, node_id("A"))

    run_on("asyncio-debug", scenario())


def test_a_node_that_runs_tasks_at_full_rate_is_not_taken_for_a_flood(tmp_path: Path) -> None:
    """As many requests as the rate allows, for as long as their ids are remembered."""
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            await client.find_task(CHANNEL, TASK)
            guard, now = world.hub._node_api._fresh[node_id("A")], world.clock()
            seconds = 2 * world.settings.message_age_seconds_max
            for number in range(int(seconds * tasks.REQUESTS_PER_SECOND_MAX)):
                guard.check(node_id("A"), f"request {number}", int(now * 1000), now)
            assert (await client.find_task(CHANNEL, TASK)).state == "none"

    run_on("asyncio-debug", scenario())


async def rows(world: World) -> set[str]:
    return await world.hub._registry.call(
        lambda connection: {row.task for row in connection.execute(sa.select(task_claims.c.task))})


def test_old_claims_are_forgotten_actions_last(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            await client.claim_task(CHANNEL, TASK, "action", "f")
            await client.finish_task(CHANNEL, TASK, "finished", receipt())
            await client.claim_task(CHANNEL, PURE, "pure-calculation", "f")
            await client.claim_task(CHANNEL, OTHER, "query", "f")
            for seconds, expected in (
                (CALCULATION_KEPT_SECONDS - 10, {TASK, PURE, OTHER}), (20, {TASK}),
                (ACTION_KEPT_SECONDS - CALCULATION_KEPT_SECONDS - 20, {TASK}), (20, set()),
            ):
                world.clock.now += seconds
                world.hub._node_api._tasks._pruned_at = world.clock() - PRUNE_INTERVAL_SECONDS
                assert await refusal(world.node("stranger").claim_task(CHANNEL, TASK, "action", "f")) is NotPermitted
                await client.claim_task(CHANNEL, "f" * 32, "query", "f")
                assert await rows(world) - {"f" * 32} == expected

    run_on("asyncio-debug", scenario())


def test_a_node_that_has_claimed_too_many_tasks_gets_no_new_ones_and_the_others_do(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            for name in ("A", "B"):
                await world.member(name)
            service = Tasks(world.hub._registry, world.settings, world.clock, claims_per_node_max=3)

            async def claim(number: int, name: str = "A") -> Any:
                return await service.answer(
                    ClaimTask(channel=CHANNEL, time=0, id="", task=f"{number:032x}", kind="query", function="f",
                              attempt="1" * 32), node_id(name))
            for number in range(3):
                assert (await claim(number)).granted
            world.clock.now += PRUNE_INTERVAL_SECONDS
            assert await refusal(claim(3)) is RateLimited
            assert (await claim(4, "B")).granted, "one node does not use up the room of the others"
            assert (await claim(0)).granted, "what is known may be claimed as ever"
            world.clock.now += CALCULATION_KEPT_SECONDS
            assert (await claim(3)).granted

    run_on("asyncio-debug", scenario())


# --- restart


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_restart_of_the_hub_forgets_no_claim(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world:
            a, b = await world.member("A"), await world.member("B")
            await a.claim_task(CHANNEL, TASK, "action", "f")
            await a.claim_task(CHANNEL, OTHER, "action", "f")
            await a.finish_task(CHANNEL, OTHER, "finished", receipt(task=OTHER))
        clock.now += 10 * LEASE  # nobody could keep anything
        async with running_world(tmp_path, clock, channel=False) as world:
            a, b = world.node("A"), world.node("B")
            assert (await b.find_task(CHANNEL, TASK)).state == "claimed", "its node gets the time to say so"
            assert not (await b.claim_task(CHANNEL, TASK, "action", "f")).granted
            assert (await b.find_task(CHANNEL, OTHER)).receipt == receipt(task=OTHER)
            clock.now += LEASE - 1
            assert await a.keep_tasks(CHANNEL, [TASK]) == set()
            clock.now += LEASE + 1
            assert (await b.find_task(CHANNEL, TASK)).state == "unknown"
        clock.now += 1
        async with running_world(tmp_path, clock, channel=False) as world:
            assert (await world.node("B").find_task(CHANNEL, TASK)).state == "unknown"
            told = await world.node("A").finish_task(CHANNEL, TASK, "finished", receipt())
            assert told.state == "finished", "a receipt may come late"

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_hub_that_is_killed_remembers_every_claim_that_it_gave(tmp_path: Path, loop_kind: str) -> None:
    directory, settings = tmp_path / "hub", hub_settings(tmp_path)
    ids = [f"{number:032x}" for number in range(400)]
    given: list[str] = []

    async def until_killed(process: subprocess.Popen[bytes], url: str) -> None:
        token = (directory / "owner-token").read_text().strip()
        async with OwnerClient(url, token, settings) as owner, HubClient(url, node_key("A"), settings) as client:
            await owner.call("createChannel", name=CHANNEL)
            invitation = await owner.call("invite", channel=CHANNEL, permissions=["all"])
            await client.join(invitation["code"])
            await client.claim_task(CHANNEL, TASK, "action", "f")
            await client.finish_task(CHANNEL, TASK, "finished", receipt())

            async def claim(task: str) -> None:
                if (await client.claim_task(CHANNEL, task, "action", "f")).granted:
                    given.append(task)
                if len(given) == 20:
                    process.kill()
            await asyncio.gather(*map(claim, ids), return_exceptions=True)

    async def afterwards(url: str) -> None:
        async with HubClient(url, node_key("A"), settings) as client:
            assert await client.keep_tasks(CHANNEL, given) == set()
            assert (await client.find_task(CHANNEL, TASK)).receipt == receipt()
            for task in given[:5]:
                assert not (await client.claim_task(CHANNEL, task, "action", "f")).granted

    with hub_process(directory) as (process, url):
        run_on(loop_kind, until_killed(process, url))
        assert 20 <= len(given) < len(ids)
        assert process.wait(20) == -signal.SIGKILL
    (directory / "address").unlink()  # the killed one's
    with hub_process(directory) as (_, url):
        run_on(loop_kind, afterwards(url))


def test_a_permission_that_is_taken_away_takes_the_claims_along(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a, b = await world.member("A"), await world.member("B")
            await a.claim_task(CHANNEL, TASK, "action", "f")
            await world.owner.call("revoke", channel=CHANNEL, node="A", permissions=["provideTasks"])
            assert await refusal(a.keep_tasks(CHANNEL, [TASK])) is NotPermitted
            assert await refusal(a.finish_task(CHANNEL, TASK, "finished", receipt())) is NotPermitted
            world.clock.now += LEASE
            assert (await b.find_task(CHANNEL, TASK)).state == "unknown"

    run_on("asyncio-debug", scenario())
