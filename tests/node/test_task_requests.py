"""Asking for tasks: who joins what, what is believed, what is remembered; the running side is the real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import InvalidArgument, KacheryError, RateLimited, TaskUnknown, TooLarge
from kachery_fast.net.memory import MemoryBucket
from kachery_fast.node.ending import end_tasks
from kachery_fast.node.task_requests import TaskRequests
from kachery_fast.protocol.names import result_object_name
from kachery_fast.protocol.task_errors import error_report
from kachery_fast.protocol.task_events import FunctionInfo
from kachery_fast.protocol.tasks import result_id, sign_result, task_id
from tests.network import LOOPS, run_on
from tests.node.support import (
    CHANNEL,
    QUICK,
    Network,
    Peer,
    identity_of,
    network,
    nothing_left,
    other_tasks,
    until,
)
from tests.node.tasks import Runner

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
SUM = "sum.1"


class Asking:
    """A node's asking side."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.requests = TaskRequests(peer.settings)

    def ask(self, function: str = SUM, kind: str = "pure-calculation", task: str | None = None, **kwargs: Any) -> str:
        return self.requests.request(self.peer.link, function, kwargs, kind, task)

    async def end(self, request: str) -> dict[str, Any]:
        """How a request stands when it has ended."""
        state = await self.requests.wait_to_end(request, 20)
        json.dumps(state)
        assert state["status"] in ("finished", "error", "unknown", "cancelled"), state
        return state

    async def status(self, request: str, status: str) -> dict[str, Any]:
        """How a request stands once it has this status."""
        seen = 0
        while True:
            state = await self.requests.wait(request, seen, 20)
            if state["status"] == status:
                return state
            assert state["revision"] > seen, state
            seen = state["revision"]


class Played:
    """A backend that a test plays: ``perform`` gives the report of each run, ``{"status": …}``; None: it never ends."""

    def __init__(self, runner: Runner, perform: Callable[[dict[str, Any]], dict[str, Any] | None], workers: int,
                 functions: list[FunctionInfo] | None) -> None:
        self.runner, self.perform = runner, perform
        self.backend = runner.connect(workers, functions)
        self.runs: list[dict[str, Any]] = []
        self.task = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            line = await self.backend.next_line()
            if line["type"] == "run":
                self.runs.append(line)
                report = self.perform(line)
                if report is not None:
                    self.report(line, **report)

    def report(self, run: dict[str, Any], status: str, **fields: Any) -> None:
        self.runner.report(self.backend, run, status, **fields)

    def close(self) -> None:
        """The process of the backend ends."""
        self.task.cancel()
        self.backend.close()


class Stage(Runner):
    """A node's running side with the backends that a test plays."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self.played: list[Played] = []

    def play(self, perform: Callable[[dict[str, Any]], dict[str, Any] | None], *, workers: int = 1,
             functions: list[FunctionInfo] | None = None) -> Played:
        self.played.append(Played(self, perform, workers, functions))
        return self.played[-1]

    async def close(self) -> None:
        await end_tasks(played.task for played in self.played)
        await super().close()


@asynccontextmanager
async def channel(root: Path, *names: str, bucket: MemoryBucket | None = None, asker: list[str] | None = None,
                  **settings: Any) -> AsyncIterator[tuple[Network, Asking, list[Stage]]]:
    """A channel with ``b``, which asks, and nodes that run functions."""
    async with network(root, bucket) as net:
        asking = Asking(await net.peer("b", ["requestTasks"] if asker is None else asker, **settings))
        runners = [Stage(await net.peer(name)) for name in names]
        try:
            yield net, asking, runners
        finally:
            await asking.requests.close()
            for runner in runners:
                await runner.close()


async def vanish(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut a node off: what it says and keeps alive reaches nobody."""
    await runner.peer.link.close()
    monkeypatch.setattr(runner.providing, "perform", lambda _effect: None)


def adds(run: dict[str, Any]) -> dict[str, Any]:
    return {"status": "finished", "result": {"json": sum(run["kwargs"].values())}}


def does(run: dict[str, Any]) -> dict[str, Any]:
    return {"status": "finished"}


def hangs(run: dict[str, Any]) -> None:
    return None


def put_result(net: Network, by: str, value: Any, function: str = SUM, kind: str = "pure-calculation",
               **kwargs: Any) -> str:
    """Put a result into the bucket, signed by a node; return the name of the object."""
    task = task_id(function, kwargs) if kind == "pure-calculation" else "ee" * 16
    name = result_object_name(CHANNEL, result_id(kind, function, kwargs))
    net.bucket.objects[name] = sign_result(
        channel=CHANNEL, task=task, function=function, kind=kind, kwargs=kwargs, result={"json": value},
        started_ms=1, finished_ms=2, key=identity_of(by).key)
    return name


# --- calculations


def test_a_hundred_requests_for_one_calculation_are_one_task(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUICK, "progress_interval_seconds", 20.0)  # what is said again and again is not counted

    async def work() -> None:
        async with channel(tmp_path, "a", "c") as (net, b, runners):
            played = [runner.play(hangs) for runner in runners]
            said = net.broker.published
            names = [b.ask(x=1.0, y=2) for _ in range(100)]
            assert len(set(names)) == 100
            await until(lambda: any(each.runs for each in played))
            [each] = [each for each in played if each.runs]
            each.report(each.runs[0], "finished", result={"json": 0.5})
            states = await asyncio.gather(*(b.end(name) for name in names))
            a = each.runner.peer
            for state in states:
                assert (state["status"], state["result"], state["cached"]) == ("finished", {"json": 0.5}, False)
                assert (state["node"], state["nodeLabel"]) == (a.identity.node_id, a.name)
                assert abs(state["resultTime"] - net.hub.now_ms()) < 20_000
            assert len(net.hub.granted) == 1
            assert net.broker.published - said < 12
            assert each.runs[0]["kwargs"] == {"x": 1, "y": 2}
            again = await b.end(b.ask(y=2.0, x=1))
            assert (again["cached"], again["task"], again["result"]) == (True, states[0]["task"], {"json": 0.5})
            assert sum(len(each.runs) for each in played) == 1
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_a_result_in_the_bucket_costs_one_look_and_nobody_else_is_needed(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path) as (net, b, _):
            net.members["gone"] = ["provideTasks"]
            b.peer.link.update(net.info("b"))
            name = put_result(net, "gone", [1.0, 2**70], x=3)
            said = net.broker.published
            state = await b.end(b.ask(x=3))
            assert (state["status"], state["cached"], state["result"]) == ("finished", True, {"json": [1.0, 2**70]})
            assert (state["nodeLabel"], state["resultTime"]) == ("gone", 2)
            await b.end(b.ask(x=3))
            assert net.bucket.gets == [name]  # remembered
            assert (net.broker.published, b.peer.refreshed) == (said, 0)
    run_on(loop_kind, work(), 60)


def test_the_result_of_a_node_that_may_not_provide_tasks_is_refused_and_computed_anew(
        loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (net, b, (a,)):
            net.members["revoked"] = ["requestTasks", "provideFiles"]
            put_result(net, "revoked", "forged", x=1)
            put_result(net, "stranger", "forged", x=2)
            put_result(net, "a", "forged", x=3)
            broken = put_result(net, "a", "forged", x=4)
            net.bucket.corrupt(broken, 200)
            a.play(adds)
            for x in (1, 2, 4):
                state = await b.end(b.ask(x=x))
                assert (state["result"], state["cached"]) == ({"json": x}, False)
            assert set(net.hub.bad_results) == {task_id(SUM, {"x": x}) for x in (1, 2, 4)}
            assert (await b.end(b.ask(x=3)))["result"] == {"json": "forged"}  # by one who may
    run_on(loop_kind, work(), 60)


def test_a_refused_result_is_told_when_nobody_computes_it_anew(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path) as (net, b, _):
            put_result(net, "stranger", "forged", x=1)
            net.hub.down = True  # it cannot be reported
            state = await b.end(b.ask(x=1))
            assert state["error"]["error"] == "TaskNotTaken"
            assert "may not provide tasks" in state["error"]["message"]
    run_on(loop_kind, work(), 60)


def test_the_result_of_a_node_that_joined_just_now_is_believed(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path) as (net, b, _):
            net.members["new"] = ["provideTasks"]  # of which b has not heard
            put_result(net, "new", 5, x=1)
            assert (await b.end(b.ask(x=1)))["result"] == {"json": 5}
            assert (b.peer.refreshed, net.hub.bad_results) == (1, [])
    run_on(loop_kind, work(), 60)


def test_who_is_revoked_is_not_believed_from_memory(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (net, b, (a,)):
            a.play(adds)
            assert (await b.end(b.ask(x=1)))["status"] == "finished"
            net.members["a"] = []
            b.peer.link.update(net.info("b"))
            assert (await b.end(b.ask(x=1)))["error"]["error"] == "TaskNotTaken"
    run_on(loop_kind, work(), 60)


def test_a_function_that_raises_is_told_to_all_and_run_again_when_asked_again(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (_, b, (a,)):
            reports = iter([{"status": "error", "error": error_report("ValueError", "bad", "Traceback …")},
                            {"status": "hung", "error": error_report("TimeoutError", "2.5 s")},
                            {"status": "crashed", "error": error_report("X", "signal 9")},
                            {"status": "finished", "result": {"json": 1}}])
            played = a.play(lambda _: next(reports))
            states = await asyncio.gather(*(b.end(b.ask(x=1)) for _ in range(3)))
            for state in states:
                assert (state["status"], state["error"]["error"]) == ("error", "TaskFailed")
                assert state["error"]["message"] == "'sum.1' raised ValueError: bad"
                assert state["error"]["details"]["traceback"] == "Traceback …"
                assert state["nodeLabel"] == "a"
            assert len(played.runs) == 1
            assert (await b.end(b.ask(x=1)))["error"]["error"] == "TaskHung"
            crashed = (await b.end(b.ask(x=1)))["error"]
            assert isinstance(KacheryError.from_dict(crashed), KacheryError)
            assert "signal 9" in crashed["message"]
            assert (await b.end(b.ask(x=1)))["result"] == {"json": 1}
    run_on(loop_kind, work(), 60)


def test_a_failure_names_who_was_asked_and_what_each_answered(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a", "c", "idle") as (net, b, (a, c, _)):
            a.play(adds, functions=[FunctionInfo("other.1", "query")])
            c.play(adds, functions=[FunctionInfo(SUM, "action")])
            state = await b.end(b.ask(x=1))
            message = state["error"]["message"]
            assert state["error"]["error"] == "TaskNotTaken"
            assert f"a ({a.peer.identity.node_id[:8]}): declines, unregistered: it runs other.1" in message
            assert f"c ({c.peer.identity.node_id[:8]}): declines, wrong-type: here it is of the type action" in message
            assert "no answer from idle" in message
            assert len(state["error"]["details"]["account"]["answers"]) == 2
            assert not net.hub.granted
    run_on(loop_kind, work(), 60)


def test_when_the_node_that_runs_it_dies_another_takes_over(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a", "c") as (net, b, (a, c)):
            net.hub.lease_seconds = 1.0
            a.play(hangs)
            name = b.ask(x=4)
            await b.status(name, "running")
            second = c.play(adds)
            await vanish(a, monkeypatch)
            state = await b.end(name)
            assert (state["result"], state["nodeLabel"], len(second.runs)) == ({"json": 4}, "c", 1)
    run_on(loop_kind, work(), 60)


def test_a_node_runs_what_it_asks_for_itself(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, asker=["requestTasks", "provideTasks"]) as (net, b, _):
            runner = Stage(b.peer)
            runner.play(adds)
            state = await b.end(b.ask(x=4, y=5))
            assert (state["result"], state["nodeLabel"]) == ({"json": 9}, "b")
            told = await b.end(b.ask("other.1"))
            assert "unregistered: it runs" in told["error"]["message"]
            net.members["b"] = ["provideTasks"]
            b.peer.link.update(net.info("b"))
            assert (await b.end(b.ask(x=6)))["status"] == "error"  # it may not request
            await runner.close()
    run_on(loop_kind, work(), 60)


# --- queries


def test_a_query_is_run_anew_and_without_anybody_the_last_result_is_given(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (_, b, (a,)):
            numbers = iter(range(10))
            played = a.play(lambda _: {"status": "finished", "result": {"json": next(numbers)}})
            assert (await b.end(b.ask("now.1", "query")))["result"] == {"json": 0}
            second = await b.end(b.ask("now.1", "query"))
            assert (second["result"], second["cached"]) == ({"json": 1}, False)
            same = await b.end(b.ask("now.1", "query", second["task"]))
            assert (same["result"], len(played.runs)) == ({"json": 1}, 2)
            played.close()
            old = await b.end(b.ask("now.1", "query"))
            assert (old["status"], old["result"], old["cached"]) == ("finished", {"json": 1}, True)
            assert old["resultTime"] == second["resultTime"]
    run_on(loop_kind, work(), 60)


# --- actions


def test_an_action_that_is_asked_for_again_is_the_same_task(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (net, b, (a,)):
            played = a.play(does)
            first = await b.end(b.ask("mail.1", "action", to="me"))
            assert (first["status"], first["result"], first["nodeLabel"]) == ("finished", None, "a")
            assert first["resultTime"] > 0
            again = await b.end(b.ask("mail.1", "action", first["task"], to="me"))
            assert (again["status"], again["request"] != first["request"], again["cached"]) == ("finished", True, False)
            other = Asking(await net.peer("d", ["requestTasks"]))  # also on another node
            assert (await other.end(other.ask("mail.1", "action", first["task"], to="me")))["status"] == "finished"
            played.close()
            await a.peer.link.close()
            late = Asking(await net.peer("e", ["requestTasks"]))  # nobody answers: the hub knows
            assert (await late.end(late.ask("mail.1", "action", first["task"], to="me")))["status"] == "finished"
            assert (len(played.runs), len(net.hub.granted)) == (1, 1)
            await other.requests.close()
            await late.requests.close()
    run_on(loop_kind, work(), 60)


def test_an_action_that_failed_says_how_and_is_not_done_again(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (_, b, (a,)):
            played = a.play(lambda _: {"status": "error", "error": error_report("OSError", "disk full", "tb")})
            state = await b.end(b.ask("mail.1", "action"))
            again = await b.end(b.ask("mail.1", "action", state["task"]))
            for each in (state, again):
                assert (each["status"], each["error"]["details"]["reason"]) == ("error", "disk full")
            assert len(played.runs) == 1
    run_on(loop_kind, work(), 60)


def test_an_action_whose_node_vanishes_is_unknown_and_a_late_receipt_is_found(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a", "c") as (net, b, (a, c)):
            net.hub.lease_seconds = 1.0
            first = a.play(hangs)
            name = b.ask("mail.1", "action")
            task = (await b.status(name, "running"))["task"]
            second = c.play(does)
            await vanish(a, monkeypatch)
            state = await b.end(name)
            assert (state["status"], state["error"]["error"]) == ("unknown", "TaskOutcomeUnknown")
            assert f"a ({a.peer.identity.node_id[:8]})" in state["error"]["message"]
            monkeypatch.undo()
            first.report(first.runs[0], "finished")  # it has done it after all
            await until(lambda: net.hub.claims[CHANNEL, task].state == "finished")
            assert (await b.end(b.ask("mail.1", "action", task)))["status"] == "finished"
            assert not second.runs
    run_on(loop_kind, work(), 60)


def test_an_id_belongs_to_one_task(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (net, b, (a,)):
            a.play(does)
            task = (await b.end(b.ask("mail.1", "action", to="me")))["task"]
            for function, kind, kwargs in (("mail.1", "action", {"to": "you"}), ("touch.1", "action", {"to": "me"}),
                                           ("mail.1", "query", {"to": "me"})):
                with pytest.raises(InvalidArgument, match="another task"):
                    b.ask(function, kind, task, **kwargs)
            with pytest.raises(InvalidArgument, match="Leave the id out"):
                b.ask(task="ab" * 20)
            other = Asking(await net.peer("d", ["requestTasks"]))
            state = await other.end(other.ask("touch.1", "action", task))
            assert state["error"]["error"] in ("InvalidArgument", "TaskNotTaken")
            assert state["status"] == "error"
            await other.requests.close()
            other = Asking(other.peer)
            state = await other.end(other.ask("mail.1", "action", task, to="you"))
            assert (state["status"], state["error"]["error"]) == ("error", "InvalidArgument"), "it was done for me"
            await other.requests.close()
    run_on(loop_kind, work(), 60)


# --- waiting, withdrawing, remembering


def test_waiting_shows_each_change(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (_, b, (a,)):
            played = a.play(hangs)
            name = b.ask(x=1)
            state = await b.requests.wait(name, 0, 20)
            assert state["status"] == "waiting"
            state = await b.requests.wait(name, state["revision"], 0)
            running = await b.status(name, "running")
            played.report(played.runs[0], "running", progress=0.25, text="a quarter")
            while running["progress"] is None:
                running = await b.requests.wait(name, running["revision"], 20)
            assert (running["progress"], running["text"], running["node"]) == (
                0.25, "a quarter", a.peer.identity.node_id)
            begun = asyncio.get_running_loop().time()
            assert (await b.requests.wait(name, running["revision"], 0.05))["revision"] == running["revision"]
            assert asyncio.get_running_loop().time() - begun >= 0.04
            played.report(played.runs[0], "finished", result={"json": None})
            assert (await b.end(name))["result"] == {"json": None}
            [listed] = b.requests.list()
            assert (listed["request"], listed["status"], listed["result"]) == (name, "finished", None)
    run_on(loop_kind, work(), 60)


def test_who_withdraws_leaves_the_others_waiting(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (_, b, (a,)):
            played = a.play(hangs)
            first, second = b.ask(x=1), b.ask(x=1)
            await b.status(first, "running")
            assert b.requests.cancel(first)["status"] == "cancelled"
            with pytest.raises(TaskUnknown):
                b.requests.cancel(first)
            assert (await b.requests.wait(second, 0, 0))["status"] == "running"
            queued = b.ask(x=2)
            await b.status(queued, "queued")
            assert b.requests.cancel(queued)["status"] == "cancelled"
            assert b.requests.cancel(queued)["status"] == "cancelled"
            played.report(played.runs[0], "finished", result={"json": 1})
            assert (await b.end(second))["status"] == "finished"
            await asyncio.sleep(0.05)
            assert len(played.runs) == 1  # what was withdrawn is not run
    run_on(loop_kind, work(), 60)


def test_what_is_wrong_with_a_request_is_said_before_anything_is_sent(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path) as (net, b, _):
            said = net.broker.published
            for kwargs in ([1], None, {"x": float("nan")}, {"x": 2**60}):
                with pytest.raises(InvalidArgument):
                    b.requests.request(b.peer.link, SUM, kwargs, "pure-calculation")
            with pytest.raises(TooLarge):
                b.ask(x="x" * b.peer.settings.task_kwargs_size_bytes_max)
            with pytest.raises(InvalidArgument):
                b.ask(function=" ")
            with pytest.raises(InvalidArgument):
                b.ask(kind="pure")
            with pytest.raises(InvalidArgument):
                b.ask(kind="action", task="ab" * 20)
            with pytest.raises(TaskUnknown):
                await b.requests.wait("nobody", 0, 0)
            assert (b.requests.list(), net.broker.published, net.bucket.gets) == ([], said, [])
    run_on(loop_kind, work(), 60)


def test_only_so_much_is_remembered(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a", task_requests_max=3) as (_, b, (a,)):
            a.play(adds, functions=[FunctionInfo(SUM, "pure-calculation")])
            ended = [b.ask(x=x) for x in range(3)]
            for name in ended:
                await b.end(name)
            waiting = [b.ask("mail.1", "action"), b.ask("mail.1", "action")]
            with pytest.raises(TaskUnknown):
                await b.requests.wait(ended[0], 0, 0)
            assert (await b.end(ended[2]))["result"] == {"json": 2}
            waiting.append(b.ask("mail.1", "action"))
            with pytest.raises(RateLimited, match="task_requests_max"):
                b.ask(x=9)
            for name in waiting:
                b.requests.cancel(name)
            assert (await b.end(b.ask(x=9)))["result"] == {"json": 9}
    run_on(loop_kind, work(), 60)


def test_what_ended_long_ago_is_forgotten(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a", task_keep_seconds=0.05) as (_, b, (a,)):
            a.play(adds)
            name = b.ask(x=1)
            await b.end(name)
            await asyncio.sleep(0.06)
            again = await b.end(b.ask(x=1))
            assert again["cached"]
            with pytest.raises(TaskUnknown):
                await b.requests.wait(name, 0, 0)
            assert len(b.requests.list()) == 1
    run_on(loop_kind, work(), 60)


def test_long_results_do_not_fill_the_memory(loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kachery_fast.node.task_requests._RESULTS_KEPT_BYTES", 100_000)

    async def work() -> None:
        async with channel(tmp_path) as (net, b, _):
            net.members["gone"] = ["provideTasks"]
            b.peer.link.update(net.info("b"))
            for x in range(10):
                put_result(net, "gone", "x" * 30_000, x=x)
                assert (await b.end(b.ask(x=x)))["status"] == "finished"
            assert len(b.requests.list()) == 4
    run_on(loop_kind, work(), 60)


def test_long_arguments_do_not_fill_the_memory(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kachery_fast.node.task_requests._ARGUMENTS_KEPT_BYTES", 50_000)

    async def work() -> None:
        async with channel(tmp_path, "a") as (_, b, (a,)):
            played = a.play(hangs)
            names = [b.ask(x="x" * 20_000, y=y) for y in range(2)]
            with pytest.raises(RateLimited, match="arguments"):
                b.ask(x="x" * 20_000, y=2)
            joined = b.ask(x="x" * 20_000, y=1)
            await b.status(names[0], "running")
            played.report(played.runs[0], "finished", result={"json": 1})
            await b.end(names[0])
            names.append(b.ask(x="x" * 20_000, y=2))
            assert (await b.requests.wait(joined, 0, 0))["status"] == "queued"
    run_on(loop_kind, work(), 60)


def test_a_result_longer_than_this_node_takes_is_told_by_its_limit(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, task_result_size_bytes_max=1000) as (net, b, _):
            net.members["gone"] = ["provideTasks"]
            b.peer.link.update(net.info("b"))
            put_result(net, "gone", "x" * 100_000, x=1)
            assert (await b.end(b.ask(x=1)))["error"]["error"] == "TooLarge"
    run_on(loop_kind, work(), 60)


def test_what_is_long_and_no_result_is_removed_and_computed_anew(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a", task_result_size_bytes_max=1000) as (net, b, (a,)):
            a.play(adds)
            net.bucket.objects[result_object_name(CHANNEL, task_id(SUM, {"x": 1}))] = b"x" * 200_000
            assert (await b.end(b.ask(x=1)))["result"] == {"json": 1}
    run_on(loop_kind, work(), 60)


def test_nothing_is_left_when_the_node_stops(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with channel(tmp_path, "a") as (_, b, (a,)):
            a.play(hangs, workers=5)
            before = len(b.peer.link.on_members), len(b.peer.link.on_restored)
            names = [b.ask(x=x) for x in range(5)]
            await b.status(names[0], "running")
            waiting = asyncio.ensure_future(b.requests.wait(names[1], 99, 20))
            await asyncio.sleep(0)
            tasks = len(other_tasks())
            await b.requests.close()
            assert (len(b.peer.link.on_members), len(b.peer.link.on_restored)) == before
            assert b.peer.link._listeners == {}
            assert len(other_tasks()) <= tasks
            waiting.cancel()
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)
