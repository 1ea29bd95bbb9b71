"""Asking for tasks through the local API, over the real hub, broker and bucket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.node.ending import end_tasks
from kachery_fast.protocol.task_events import FunctionInfo, Report
from kachery_fast.protocol.tasks import task_id
from tests.hub.support import CHANNEL, World
from tests.network import LOOPS
from tests.node.running import Client, alone, together
from tests.node.support import until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
FUNCTIONS = [FunctionInfo("sum.1", "pure-calculation"), FunctionInfo("now.1", "query"),
             FunctionInfo("mail.1", "action")]
ASK = ["requestTasks"]
RUN = ["provideTasks"]

Perform = Callable[[dict[str, Any]], dict[str, Any] | None]


@asynccontextmanager
async def backend(client: Client, perform: Perform) -> Any:
    """A backend of a node that a test plays; gives the list of what it was told to run."""
    backends = client.node.task_backends
    connected = backends.register("test", FUNCTIONS, 1, None)
    runs: list[dict[str, Any]] = []

    async def serve() -> None:
        while True:
            line = await connected.next_line()
            if line["type"] == "run":
                runs.append(line)
                report = perform(line)
                if report is not None:
                    backends.report(connected.info.id, Report(line["run"], **report))

    task = asyncio.get_running_loop().create_task(serve())
    try:
        yield runs
    finally:
        await end_tasks([task])
        connected.close()


def adds(run: dict[str, Any]) -> dict[str, Any]:
    return {"status": "finished", "result": {"json": sum(run["kwargs"].values())}}


async def ask(client: Client, function: str = "sum.1", kind: str = "pure-calculation", *, wait_msec: float = 30_000,
              **more: Any) -> dict[str, Any]:
    """Ask for a task, and return its state."""
    kwargs = more.pop("kwargs", {"x": 1, "y": 2.5})
    status, state = await client.ask("POST", "/api/task/request", {
        "function": function, "kwargs": kwargs, "kind": kind, "waitMsec": wait_msec, **more})
    assert status == 200, state
    return dict(state)


async def refused(client: Client, path: str, body: dict[str, Any]) -> tuple[int, str]:
    status, error = await client.ask("POST", path, body)
    return status, error["error"]


def test_a_calculation_is_run_elsewhere_once_and_then_had_from_the_bucket(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client, c: Client) -> None:
        async with backend(a, lambda _: None) as runs:
            asked = [asyncio.ensure_future(ask(b)) for _ in range(20)]
            await until(lambda: runs and len(b.node.task_requests.list()) == 20)  # who came later would find it cached
            (told,) = a.node.task_backends._backends
            a.node.task_backends.report(told, Report(runs[0]["run"], **adds(runs[0])))
            states = await asyncio.gather(*asked)
            for state in states:
                assert (state["status"], state["result"], state["nodeLabel"]) == ("finished", {"json": 3.5}, "a")
                assert (state["task"], state["channel"]) == (task_id("sum.1", {"x": 1, "y": 2.5}), CHANNEL)
                assert not state["cached"]
            assert len({state["request"] for state in states}) == 20
            assert len(runs) == 1
        await a.end()
        late = await ask(c)  # nobody is alive who could run it
        assert (late["status"], late["cached"], late["result"]) == ("finished", True, {"json": 3.5})
        assert late["resultTime"] == states[0]["resultTime"]
    together(loop_kind, tmp_path, work, {"a": RUN, "b": ASK, "c": ASK})


def test_who_asks_for_many_waits_for_the_look_into_the_bucket_alone(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client, c: Client) -> None:
        async with backend(a, adds):
            await ask(b)
        async with backend(a, lambda _: None):  # which never ends
            found = await ask(c, waitFor="look")
            assert (found["status"], found["cached"]) == ("finished", True)
            for kind in ("pure-calculation", "query", "action"):
                state = await ask(c, {"query": "now.1", "action": "mail.1"}.get(kind, "sum.1"), kind, waitFor="look",
                                  kwargs={"x": 7, "y": 8})
                assert state["status"] in ("waiting", "queued", "running")
                assert state["text"] != "looking into the bucket"
    together(loop_kind, tmp_path, work, {"a": RUN, "b": ASK, "c": ASK})


def test_queries_and_actions_over_real_engines(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client, c: Client) -> None:
        numbers = iter(range(100))

        def perform(run: dict[str, Any]) -> dict[str, Any]:
            return {"status": "finished", "result": None if run["kind"] == "action" else {"json": next(numbers)}}

        async with backend(a, perform) as runs:
            assert [(await ask(b, "now.1", "query"))["result"] for _ in range(3)] == [{"json": n} for n in range(3)]
            done = await ask(b, "mail.1", "action", id="ab" * 16)
            assert (done["status"], done["result"], done["task"]) == ("finished", None, "ab" * 16)
            assert (await ask(b, "mail.1", "action", id="ab" * 16))["status"] == "finished"
            assert (await ask(c, "mail.1", "action", id="ab" * 16))["status"] == "finished"
            assert len(runs) == 4
        old = await ask(c, "now.1", "query")
        assert (old["result"], old["cached"]) == ({"json": 2}, True)
    together(loop_kind, tmp_path, work, {"a": RUN, "b": ASK, "c": ASK})


def test_an_action_is_not_begun_twice_when_its_node_is_gone(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client, c: Client) -> None:
        async with backend(a, lambda _: None) as runs:
            state = await ask(b, "mail.1", "action", id="cd" * 16, wait_msec=0)
            while state["status"] != "running":
                state = await wait(b, state)
            async with backend(c, lambda _: {"status": "finished"}) as others:
                await a.end()
                world.clock.now += 30  # its lease is over
                while state["status"] in ("waiting", "queued", "running"):
                    state = await wait(b, state)
                assert (state["status"], state["error"]["error"]) == ("unknown", "TaskOutcomeUnknown")
                again = await ask(b, "mail.1", "action", id="cd" * 16)
                assert again["status"] == "unknown"
                assert (len(runs), others) == (1, [])
    together(loop_kind, tmp_path, work, {"a": RUN, "b": ASK, "c": RUN})


async def wait(client: Client, state: dict[str, Any]) -> dict[str, Any]:
    """Wait for the next change."""
    status, after = await client.ask("POST", "/api/task/wait", {
        "request": state["request"], "seen": state["revision"], "waitMsec": 30_000})
    assert status == 200
    assert after["revision"] > state["revision"]
    return dict(after)


def test_permissions_are_needed_for_asking_and_for_being_believed(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client, c: Client) -> None:
        async with backend(a, adds):
            assert (await ask(b))["status"] == "finished"
            body = {"function": "sum.1", "kwargs": {}, "kind": "query"}
            assert await refused(c, "/api/task/request", body) == (403, "NotPermitted")
            _, error = await c.ask("POST", "/api/task/request", body)
            assert "channel grant lab" in error["message"]
            # Revoked: neither asked any more, nor believed, and what it made goes from the bucket.
            await world.owner.call("revoke", channel=CHANNEL, node=a.node.identity.node_id, permissions=RUN)
            for client in (a, b):
                await client.ask("POST", "/api/reload", {})
            state = await ask(b)
            assert (state["status"], state["error"]["error"]) == ("error", "TaskNotTaken")
            assert "no node there may provide tasks" in state["error"]["message"]
            assert "refused" in state["error"]["message"]
            await world.owner.call("grant", channel=CHANNEL, node=a.node.identity.node_id, permissions=RUN)
            for client in (a, b):
                await client.ask("POST", "/api/reload", {})
            await until(lambda: all(link.connected for link in a.node.links()))
            again = await ask(b)
            assert (again["status"], again["cached"]) == ("finished", False)
    together(loop_kind, tmp_path, work, {"a": RUN, "b": ASK, "c": ["requestFiles"]})


def test_waiting_withdrawing_and_listing(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        async with backend(a, lambda _: None):
            state = await ask(b, wait_msec=0)
            while state["status"] != "running":
                state = await wait(b, state)
            assert (await ask(b, wait_msec=20))["status"] == "running"
            _, listed = await b.ask("POST", "/api/task/list", {})
            assert [each["status"] for each in listed["tasks"]] == ["running", "running"]
            for each in listed["tasks"]:
                status, ended = await b.ask("POST", "/api/task/cancel", {"request": each["request"]})
                assert (status, ended["status"]) == (200, "cancelled")
    together(loop_kind, tmp_path, work, {"a": RUN, "b": ASK})


def test_what_is_wrong_is_said_at_once(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, b: Client) -> None:
        good = {"function": "sum.1", "kwargs": {}, "kind": "query"}
        path = "/api/task/request"
        for body, answer in (
                ({**good, "function": ""}, (400, "InvalidName")), ({**good, "kind": "pure"}, (400, "InvalidArgument")),
                ({**good, "kwargs": {"x": 2**60}}, (400, "InvalidArgument")),
                ({**good, "kwargs": {"x": "x" * 40_000}}, (413, "TooLarge")),
                ({**good, "kwargs": [1]}, (400, "BadMessage")), ({**good, "id": "x"}, (400, "InvalidName")),
                ({**good, "channel": "nowhere"}, (404, "ChannelUnknown")), ({**good, "else": 1}, (400, "BadMessage")),
                ({**good, "waitMsec": -1}, (400, "BadMessage"))):
            assert await refused(b, path, body) == answer, body
        for way in ("wait", "cancel"):
            assert await refused(b, f"/api/task/{way}", {"request": "nobody"}) == (404, "TaskUnknown")
        state = await ask(b)
        assert state["error"]["error"] == "TaskNotTaken"
    together(loop_kind, tmp_path, work, {"b": ASK})


def test_without_a_channel_to_ask_on_that_is_said(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        assert await refused(client, "/api/task/request", {"function": "sum.1"}) == (404, "NoChannel")
    alone(loop_kind, tmp_path, work)
