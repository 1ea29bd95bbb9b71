"""A task backend and its node: registering, running in any executor, taking back, losing each other, ending."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from tests.cli.commands import Program
from tests.client import task_functions
from tests.client.scripted_node import CLOSE, ScriptedNode
from tests.system.support import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripted(program: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedNode]:
    node = ScriptedNode(program.storage_dir)
    monkeypatch.setenv("KACHERY_DAEMON_PORT", str(node.port))
    program.env["KACHERY_DAEMON_PORT"] = str(node.port)
    yield node
    node.close()


@contextmanager
def serving(**arguments: Any) -> Iterator[threading.Event]:
    """Run a backend in a thread until the block ends; what it raises is raised."""
    stop = threading.Event()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            kf.run_task_backend(stop=stop, **arguments)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What the functions of ``task_functions`` wait for that run in threads; at the end of the test they do not."""
    task_functions.release.clear()
    yield task_functions.release
    task_functions.release.set()


# --- registering


def test_a_backend_offers_what_is_registered(scripted: ScriptedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_TASK_WORKERS", "3")
    ready: list[list[str]] = []
    with serving(channels=["lab"], task_function_ids=["test/hang", "test/act"], on_ready=ready.append):
        body = scripted.registered.get(timeout=30)
        wait_until(lambda: bool(ready), "it says that it is ready")
    assert (body["channels"], body["workers"]) == (["lab"], 3)
    assert body["functions"] == [
        {"id": "test/hang", "kind": "pure-calculation", "timeoutSeconds": 1.0, "idempotent": False},
        {"id": "test/act", "kind": "action", "timeoutSeconds": None, "idempotent": False}]
    assert ready == [["lab"]]
    assert scripted.gone.acquire(timeout=10), "the end of the backend closes the connection"


def test_as_many_workers_as_the_executor_has(scripted: ScriptedNode) -> None:
    with ThreadPoolExecutor(5) as threads, serving(executor=threads):
        assert scripted.registered.get(timeout=30)["workers"] == 5


def test_a_real_node_takes_a_backend_and_forgets_it(node: Program) -> None:
    ready = threading.Event()
    with serving(on_ready=lambda channels: ready.set()):
        assert ready.wait(30)


def test_what_cannot_begin_is_said_at_once(node: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"registered as 'nobody/knows'; there are: .*test/add"):
        kf.run_task_backend(task_function_ids=["test/add", "nobody/knows"])
    with pytest.raises(errors.InvalidName):
        kf.run_task_backend(channels=["no channel"])
    with pytest.raises(errors.ChannelUnknown, match="elsewhere"):
        kf.run_task_backend(channels="elsewhere")
    monkeypatch.setenv("KACHERY_DAEMON_PORT", "9")
    with pytest.raises(errors.NodeNotRunning, match="node start"):
        kf.run_task_backend()


# --- running


@pytest.fixture(params=["workers", "threads"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor | None]:
    if request.param == "workers":
        yield None
        return
    with ThreadPoolExecutor(2) as made:
        yield made


def test_functions_run_in_any_executor(scripted: ScriptedNode, executor: Executor | None) -> None:
    with serving(executor=executor):
        for x in range(20):
            scripted.run(str(x), "test/add", x=x)
        found = {report["run"]: report for report in (scripted.ended() for _ in range(20))}
        assert {run: report["result"] for run, report in found.items()} == {
            str(x): {"json": x + 1} for x in range(20)}
        assert {(report["backend"], report["status"]) for report in found.values()} == {("b0", "finished")}
        scripted.run("n", "test/identity", numpy="np.eye(3)")
        result = scripted.ended()["result"]
        assert result["format"] == "npy"
        assert kf.load_npy(result["file"]).sum() == 3
        scripted.run("p", "test/progress", steps=10)
        progress = scripted.reports.get(timeout=60)
        while progress.get("progress") != 1.0:
            assert progress["status"] == "running"
            progress = scripted.reports.get(timeout=60)
        assert progress["text"] == "done"
        assert scripted.ended()["result"] == {"json": 10}


def test_errors_come_back_from_any_executor(scripted: ScriptedNode, executor: Executor | None) -> None:
    with serving(executor=executor):
        scripted.run("1", "test/raise", text="oops")
        report = scripted.ended()
        error = report["error"]
        assert (report["status"], error["type"], error["message"]) == ("error", "ValueError", "oops")
        assert "in raising" in error["traceback"]
        scripted.run("2", "test/unserialisable")
        assert "['stream'] is of type function" in scripted.ended()["error"]["message"]
        scripted.run("3", "test/die", how="sys.exit")
        assert scripted.ended()["error"]["type"] == "SystemExit"
        scripted.run("4", "test/never")
        assert "does not offer 'test/never'" in scripted.ended()["error"]["message"]
        scripted.run("5", "test/add", x=1)
        assert scripted.ended()["result"] == {"json": 2}


def test_a_hanging_function_is_told_of_whoever_runs_it(scripted: ScriptedNode, tmp_path: Path,
                                                       executor: Executor | None) -> None:
    with serving(executor=executor):
        scripted.run("1", "test/hang", pid_file=str(tmp_path / "pids"), seconds=5)
        report = scripted.ended()
        assert (report["run"], report["status"]) == ("1", "hung")
        assert "within 1 s" in report["error"]["message"]
        scripted.run("2", "test/add", x=1)
        assert scripted.ended()["result"] == {"json": 2}


def test_an_action_that_cannot_be_broken_off_may_yet_succeed(
        scripted: ScriptedNode, release: threading.Event) -> None:
    with ThreadPoolExecutor(2) as threads, serving(executor=threads):
        for function, status in (("test/slow-action", "cancelled"), ("test/slow-idempotent", "hung")):
            scripted.run(function, function, kind="action")
            report = scripted.ended()
            assert (report["run"], report["status"]) == (function, status)
            assert "within 0.2 s; the executor may still be at it" in report["error"]["message"]
        release.set()


def test_what_has_ended_is_not_told_to_hang_however_late_the_backend_looks(
        scripted: ScriptedNode, release: threading.Event) -> None:
    busy, go_on = threading.Event(), threading.Event()
    offered: list[list[str]] = []

    def ready(channels: list[str]) -> None:
        offered.append(channels)
        if len(offered) == 2:
            busy.set()
            go_on.wait(60)

    with ThreadPoolExecutor(1) as threads, serving(executor=threads, on_ready=ready):
        scripted.run("1", "test/slow-idempotent", kind="action")
        scripted.tell({"type": "registered", "backend": "b0", "channels": ["lab"]})
        assert busy.wait(60)
        release.set()
        threads.submit(int).result(60)  # it has ended
        time.sleep(0.3)  # its time limit has passed since it began
        go_on.set()
        assert scripted.ended()["status"] == "finished"


def test_a_function_that_kills_its_process_is_told_of(scripted: ScriptedNode) -> None:
    with serving():
        for how in ("exit", "kill"):
            scripted.run("1", "test/die", how=how)
            assert scripted.ended()["status"] == "crashed"
        scripted.run("2", "test/add", x=1)
        assert scripted.ended()["result"] == {"json": 2}


IN_PROCESSES = f"""
import sys; sys.path[:] = {sys.path!r}
import kachery_fast as kf
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from tests.client import task_functions
with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
    kf.run_task_backend(executor=executor)
"""


def test_an_executor_that_breaks_is_told_of_each_time(scripted: ScriptedNode, program: Program) -> None:
    process = subprocess.Popen([sys.executable, "-c", IN_PROCESSES], env=program.env, cwd=ROOT)
    try:
        scripted.run("1", "test/add", x=1)
        assert scripted.ended()["result"] == {"json": 2}
        scripted.run("2", "test/raise", text="oops")
        assert scripted.ended()["error"]["message"] == "oops"
        for run in ("3", "4"):  # the standard library's pool is of no use any more once a process of it has died
            scripted.run(run, "test/die", how="kill")
            report = scripted.ended()
            assert (report["run"], report["status"]) == (run, "crashed")
            assert "BrokenProcessPool" in report["error"]["type"]
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_what_was_returned_elsewhere_is_stored_by_the_backend(scripted: ScriptedNode, tmp_path: Path) -> None:
    class Elsewhere(ThreadPoolExecutor):
        """Runs what it is given as another machine would, whose store is another."""

        def submit(self, function: Any, work: Any, /, *more: Any, **named: Any) -> Any:  # type: ignore[override]
            import dataclasses

            return super().submit(function, dataclasses.replace(work, host="another"))

    with Elsewhere(1) as pool, serving(executor=pool):
        scripted.run("1", "test/identity", numpy="np.arange(4)")
        assert list(kf.load_npy(scripted.ended()["result"]["file"])) == [0, 1, 2, 3]
        scripted.run("2", "test/unserialisable")
        assert "['stream'] is of type function" in scripted.ended()["error"]["message"]


def test_a_result_that_the_node_does_not_take_is_an_error(scripted: ScriptedNode) -> None:
    refused = errors.TooLarge(what="The result", size=9, limit=8, setting="x")
    scripted.refuse_report = lambda report: refused if report["status"] == "finished" else None
    with serving():
        scripted.run("1", "test/add", x=1)
        assert scripted.ended()["status"] == "finished"
        report = scripted.ended()
        assert report["status"] == "error"
        assert "The result is 9 bytes" in report["error"]["message"]


def test_the_end_of_a_run_is_told_until_the_node_has_it(scripted: ScriptedNode) -> None:
    troubles = {"finished": [errors.NodeError(what="a fault"), errors.Stalled(what="the node", seconds=1)],
                "error": [errors.NodeNotRunning(url="x", why="it ended"), errors.TaskUnknown(task="2")]}
    scripted.refuse_report = lambda report: (troubles[report["status"]].pop(0) if troubles.get(report["status"])
                                             else None)
    with serving():
        scripted.run("1", "test/add", x=1)
        assert [scripted.ended()["run"] for _ in range(3)] == ["1", "1", "1"]
        scripted.run("2", "test/raise", text="oops")
        assert [scripted.ended()["run"] for _ in range(2)] == ["2", "2"]
        scripted.run("3", "test/add", x=1)
        assert scripted.ended()["run"] == "3", "of what the node knows no more, nothing is told again"


def test_what_has_ended_is_told_before_the_backend_ends(scripted: ScriptedNode) -> None:
    gone: list[bool] = []
    with ThreadPoolExecutor(1) as threads, serving(executor=threads) as stop:
        def refuse(report: dict[str, Any]) -> errors.KacheryError:
            stop.set()
            gone.append(scripted.gone.acquire(timeout=0.3))
            return errors.NodeError(what="a fault")

        scripted.refuse_report = refuse
        scripted.run("1", "test/add", x=1)
        assert stop.wait(30)
    assert len(gone) > 1
    assert not any(gone)


# --- taking back


def test_what_nobody_needs_any_more_is_broken_off(scripted: ScriptedNode, tmp_path: Path) -> None:
    with serving():
        scripted.run("1", "test/pid", seconds=1000)
        scripted.reports.get(timeout=30)  # it runs
        scripted.tell({"type": "cancel", "run": "1"})
        assert scripted.ended()["status"] == "cancelled"
        scripted.tell({"type": "cancel", "run": "1"})
        scripted.run("2", "test/add", x=1)
        assert scripted.ended()["run"] == "2"


def test_what_cannot_be_broken_off_is_given_up(scripted: ScriptedNode, release: threading.Event) -> None:
    with ThreadPoolExecutor(1) as threads, serving(executor=threads):
        scripted.run("1", "test/until-released")
        scripted.run("2", "test/pid")
        scripted.reports.get(timeout=30)
        scripted.tell({"type": "cancel", "run": "2"})
        scripted.tell({"type": "cancel", "run": "1"})
        assert [scripted.ended()["run"], scripted.ended()["run"]] == ["2", "1"]
        release.set()
        scripted.run("3", "test/add", x=1)
        assert scripted.ended()["run"] == "3"


# --- the node goes


def test_a_backend_connects_again(scripted: ScriptedNode) -> None:
    with serving():
        for end in (CLOSE, b'{"type":"alive"', b"nonsense\n", {"type": "error", **errors.HubUnreachable().to_dict()}):
            scripted.registered.get(timeout=30)
            scripted.tell(end)
            if end is not CLOSE:
                scripted.tell(CLOSE)
        scripted.registered.get(timeout=30)
        scripted.refuse_backend = errors.ChannelUnknown(channel="lab", known="none")  # as one that has just started
        scripted.tell(CLOSE)
        scripted.registered.get(timeout=30)
        scripted.refuse_backend = None
        while not scripted.registered.get(timeout=30):
            pass
        scripted.run("9", "test/add", x=1)
        assert scripted.ended()["result"] == {"json": 2}


def test_calculations_end_with_the_connection_and_actions_do_not(scripted: ScriptedNode, tmp_path: Path) -> None:
    slow_act = tmp_path / "acted"
    with serving():
        scripted.registered.get(timeout=30)
        scripted.run("1", "test/hang-action", kind="action", path=str(slow_act))
        scripted.run("2", "test/endless", pid_file=str(tmp_path / "pids"))
        wait_until((tmp_path / "pids").exists, "both run")
        scripted.tell(CLOSE)
        scripted.registered.get(timeout=30)
        pid = int((tmp_path / "pids").read_text().split()[0])
        wait_until(lambda: not _lives(pid), "the calculation is gone")
        wait_until(slow_act.exists, "the action was done")
        scripted.run("3", "test/add", x=1)
        report = scripted.ended()
        assert (report["run"], report["result"]) == ("3", {"json": 2}), "nothing is told of runs of before"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_silent_node_is_given_up(scripted: ScriptedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_STALL_SECONDS", "0.5")
    with serving():
        scripted.registered.get(timeout=30)
        silence = threading.Event()
        monkeypatch.setattr(scripted._lines, "get", lambda timeout: silence.wait() and {"type": "alive"})
        scripted.registered.get(timeout=30)
        silence.set()


def test_a_backend_outlives_its_node(program: Program) -> None:
    ready: list[list[str]] = []
    with serving_after(program, ready), program.node():
        wait_until(lambda: len(ready) == 2, "it has connected to the new node")


@contextmanager
def serving_after(program: Program, ready: list[list[str]]) -> Iterator[None]:
    """A backend whose node has ended."""
    with program.node() as started:
        context = serving(on_ready=ready.append)
        context.__enter__()
        wait_until(lambda: len(ready) == 1, "it is ready")
        os.kill(started["pid"], signal.SIGKILL)
    try:
        yield
    finally:
        context.__exit__(None, None, None)


# --- the end


SCRIPT = f"""
import sys; sys.path[:] = {sys.path!r}
import kachery_fast as kf
from tests.client import task_functions
print("begun", flush=True)
kf.run_task_backend()
print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_backend_with_its_workers(scripted: ScriptedNode, program: Program, tmp_path: Path,
                                                  number: int) -> None:
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", SCRIPT], env=program.env, cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        scripted.registered.get(timeout=60)
        scripted.run("1", "test/hang", pid_file=str(tmp_path / "pids"))
        wait_until((tmp_path / "pids").exists, "it runs")
        begun = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - begun < 10
    assert (process.returncode, out, err) == (0, "begun\nended\n", "")
    for word in (tmp_path / "pids").read_text().split():
        wait_until(lambda pid=int(word): not _lives(pid), "nothing is left")  # type: ignore[misc]


def test_handlers_of_signals_are_put_back(scripted: ScriptedNode) -> None:
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    stop = threading.Event()

    def end() -> None:
        scripted.registered.get(timeout=30)
        stop.set()

    thread = threading.Thread(target=end)
    thread.start()
    kf.run_task_backend(stop=stop)
    thread.join()
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before
    assert task_functions.add(1) == 2, "a registered function can be called as before"
