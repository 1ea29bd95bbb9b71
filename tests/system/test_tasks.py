"""Tasks between nodes: asked for at one, run by a backend at another, in real processes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.cli.lab import Lab
from tests.system.support import QUICK, wait_until
from tests.system.task_backends import ALL, FUNCTIONS, Backend, backend, be, count

import numpy as np  # isort: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ={**QUICK, "KACHERY_TASK_LEASE_SECONDS": "6"}) as lab:
        lab.start_hub()
        lab.add_node("A", permissions=ALL)
        lab.add_node("B", permissions=ALL)
        yield lab


@pytest.fixture(scope="module")
def at_a(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The backend at A."""
    with backend(lab.nodes["A"], tmp_path_factory.mktemp("backend")) as running:
        yield running


@pytest.fixture
def b(lab: Lab, at_a: Backend, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The lab, for a test that is a client of B."""
    be(monkeypatch, lab.nodes["B"])
    return lab


def result(function: str, kwargs: dict[str, Any] | None = None, **more: Any) -> Any:
    task = kf.request_task(function, kwargs, **more)
    assert task.wait(90), task
    return task.result


# --- calculations


def test_a_calculation_runs_elsewhere_and_is_cached(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    kwargs = {"x": 12, "log": str(log)}
    reader = lab.add_node("reader", permissions=["requestFiles", "requestTasks"])
    runner = lab.add_node("runner", permissions=ALL)
    before = time.time()
    with backend(runner, tmp_path):
        be(monkeypatch, lab.nodes["B"])
        task = kf.request_task("lab/square", kwargs)
        assert task.wait(60)
        assert (task.status, task.cached, task.error_message) == ("finished", False, None)
        assert task.result == {"square": 144, "offset": 100}
        assert task.node == runner.connection.info()["nodeId"]
        assert task.node_label == "runner"
        assert task.result_time is not None
        assert before - 1 <= task.result_time.timestamp() <= time.time() + 1
        again = kf.request_task("lab/square", kwargs)
        assert (again.status, again.cached, again.result) == ("finished", True, task.result)
        runner.program.kill()
    be(monkeypatch, reader)  # who never asked before
    cached = kf.request_task("lab/square", kwargs)
    assert (cached.wait(30), cached.cached, cached.result) == (True, True, {"square": 144, "offset": 100})
    assert cached.node == task.node
    assert cached.result_time == task.result_time
    assert count(log) == 1
    other = kf.request_task("lab/square", {**kwargs, "x": 13})
    assert other.wait(60)
    with pytest.raises(errors.TaskNotTaken):
        _ = other.result
    reader.program.stop()


REQUESTERS = """
import json, sys, threading
import kachery_fast as kf
name, kind, kwargs, n, task_id = json.loads(sys.argv[1])
found = []
def ask():
    task = kf.request_task(name, kwargs, type=kind, task_id=task_id)
    task.wait(90)
    found.append([task.status, task.result])
threads = [threading.Thread(target=ask) for _ in range(n)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(found))
"""


def ask_at_once(lab: Lab, nodes: dict[str, int], name: str, kind: str, kwargs: dict[str, Any],
                task_id: str | None = None) -> list[list[Any]]:
    """Have clients of several nodes ask for one task at once, and return what each was told."""
    programs = [subprocess.Popen([sys.executable, "-c", REQUESTERS, json.dumps([name, kind, kwargs, n, task_id])],
                                 env=lab.nodes[node].environ, stdout=subprocess.PIPE) for node, n in nodes.items()]
    return [told for program in programs for told in json.loads(program.communicate(timeout=120)[0])]


def test_a_hundred_who_ask_at_once_cost_one_run(b: Lab, tmp_path: Path) -> None:
    log = tmp_path / "log"
    third = b.add_node("third", permissions=ALL)
    try:
        with backend(b.nodes["B"], tmp_path):  # so that two could run it
            found = ask_at_once(b, {"A": 30, "B": 30, "third": 40}, "lab/slow-square", "pure-calculation",
                                {"x": 9, "log": str(log)})
        assert found == [["finished", 81]] * 100
        assert count(log) == 1
    finally:
        third.program.stop()


def test_arrays_bytes_and_long_results_arrive_as_they_are(b: Lab) -> None:
    found = result("lab/array", {"n": 500_000})  # 4 MB: several chunks and a manifest
    assert found.shape == (250_000, 2)
    assert np.array_equal(found, np.arange(500_000.0).reshape(-1, 2))
    assert result("lab/bytes", {"n": 2_560_000}) == bytes(range(256)) * 10_000
    assert result("lab/list", {"n": 300_000}) == {"values": list(range(300_000))}  # 2 MB of JSON
    assert result("lab/text", {"n": 1_000_000}) == "é" * 1_000_000
    assert result("lab/text", {"n": 3}) == "ééé"


def test_a_result_that_is_a_file_needs_nobody_either(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = lab.add_node("array-runner", permissions=ALL)
    with backend(runner, tmp_path):
        be(monkeypatch, lab.nodes["B"])
        task = kf.request_task("lab/array", {"n": 100_002})
        assert task.wait(60)
        assert task.status == "finished"
        runner.program.kill()
    assert task.result.shape == (50_001, 2)
    assert np.array_equal(task.result.ravel(), np.arange(100_002.0))


def test_many_tasks_can_be_awaited(b: Lab, tmp_path: Path) -> None:
    async def ask() -> list[Any]:
        return list(await asyncio.gather(*(kf.request_task("lab/square", {"x": x, "log": str(tmp_path / "log")})
                                           for x in range(80))))

    assert [found["square"] for found in asyncio.run(ask())] == [x * x for x in range(80)]
    assert count(tmp_path / "log") == 80


def test_what_is_not_awaited_well_is_raised(b: Lab) -> None:
    async def ask() -> Any:
        return await kf.request_task("lab/fail", {"how": "raise"})

    with pytest.raises(errors.TaskFailed, match="no spikes in 7"):
        asyncio.run(ask())


# --- queries


def test_a_query_runs_each_time_and_the_last_result_stands_in(lab: Lab, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {"log": str(tmp_path / "log")}
    be(monkeypatch, lab.nodes["B"])
    with backend(lab.nodes["A"], tmp_path, functions=FUNCTIONS.replace("lab/", "query/")):
        first = kf.request_task("query/now", kwargs, type="query")
        assert first.wait(60)
        second = kf.request_task("query/now", kwargs, type="query")
        assert second.wait(60)
        assert (first.cached, second.cached) == (False, False)
        assert second.result != first.result
        assert second.result_time is not None
        assert first.result_time != second.result_time
        assert count(tmp_path / "log") == 2
    third = kf.request_task("query/now", kwargs, type="query")
    assert third.wait(60)
    assert (third.status, third.cached, third.result) == ("finished", True, second.result)
    assert third.result_time == second.result_time
    assert count(tmp_path / "log") == 2


# --- actions


def test_an_action_is_done_once_however_often_it_is_asked_for(b: Lab, tmp_path: Path) -> None:
    log = tmp_path / "log"
    task_id = os.urandom(16).hex()
    with backend(b.nodes["B"], tmp_path):
        found = ask_at_once(b, {"A": 20, "B": 20}, "lab/act", "action", {"log": str(log), "seconds": 0.5}, task_id)
    assert found == [["finished", None]] * 40
    assert count(log) == 1
    again = kf.request_task("lab/act", {"log": str(log), "seconds": 0.5}, type="action", task_id=task_id)
    assert again.wait(60)
    assert again.result is None
    assert count(log) == 1
    anew = kf.request_task("lab/act", {"log": str(log), "seconds": 0.5}, type="action")
    assert anew.wait(60)
    assert anew.result is None
    assert count(log) == 2


def test_an_action_that_fails_says_so_and_is_not_tried_again(b: Lab, tmp_path: Path) -> None:
    log = tmp_path / "log"
    task = kf.request_task("lab/act", {"log": str(log), "fail": True}, type="action")
    assert task.wait(60)
    assert task.status == "error"
    with pytest.raises(errors.TaskFailed, match="RuntimeError: the valve is stuck"):
        _ = task.result
    again = kf.request_task("lab/act", {"log": str(log), "fail": True}, type="action", task_id=task.task_id)
    assert again.wait(60)
    assert again.status == "error"
    assert count(log) == 1


def test_an_action_whose_backend_is_killed_is_unknown_for_ever(lab: Lab, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    kwargs = {"log": str(log), "seconds": 1000.0}
    be(monkeypatch, lab.nodes["B"])
    functions = FUNCTIONS.replace("lab/", "killed/")
    with backend(lab.nodes["A"], tmp_path, functions=functions) as running:
        task = kf.request_task("killed/act", kwargs, type="action")
        wait_until(lambda: count(log) == 1, "it has begun")
        pid = int(log.read_text())
        running.process.kill()
    assert task.wait(60)
    assert task.status == "unknown"
    with pytest.raises(errors.TaskOutcomeUnknown):
        _ = task.result
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the worker is gone")
    with backend(lab.nodes["A"], tmp_path, functions=functions):
        again = kf.request_task("killed/act", kwargs, type="action", task_id=task.task_id)
        assert again.wait(60)
        assert again.status == "unknown"
        assert count(log) == 1


# --- on the way


def test_progress_arrives_and_others_are_served_meanwhile(b: Lab, tmp_path: Path) -> None:
    started, end = tmp_path / "started", tmp_path / "end"
    long = kf.request_task("lab/wait", {"started": str(started), "end": str(end)})
    wait_until(started.exists, "it runs")
    wait_until(lambda: long.progress == 0.5 and long.text == "waiting for the end", "its progress is known")
    assert long.status == "running"
    with pytest.raises(errors.TaskPending, match="running"):
        _ = long.result
    assert not long.wait(0.1)
    begun = time.monotonic()
    for x in range(5):
        assert result("lab/square", {"x": x, "log": str(tmp_path / "log")})["square"] == x * x
    assert time.monotonic() - begun < 20
    assert long.status == "running"
    end.touch()
    assert long.wait(30)
    assert (long.result, long.status) == ("done", "finished")


def test_what_is_taken_back_is_broken_off(b: Lab, tmp_path: Path) -> None:
    started = tmp_path / "started"
    task = kf.request_task("lab/wait", {"started": str(started), "end": str(tmp_path / "end")})
    wait_until(lambda: started.exists() and started.read_text() != "", "it runs")
    task.cancel()
    assert task.status == "cancelled"
    with pytest.raises(errors.Cancelled):
        _ = task.result
    pid = int(started.read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the worker is gone")
    assert result("lab/text", {"n": 4}) == "éééé"


# --- what goes wrong


@pytest.mark.parametrize(("how", "kind", "pattern"), [
    ("raise", errors.TaskFailed, r"'lab/fail' raised ValueError: no spikes in 7"),
    ("unserialisable", errors.TaskFailed, r"\['a'\]\[0\] is of type function"),
    ("nan", errors.TaskFailed, r"nan, which JSON cannot hold"),
    ("exit", errors.TaskCrashed, r"exit code 3"),
    ("kill", errors.TaskCrashed, r"SIGKILL"),
    ("sys.exit", errors.TaskFailed, r"SystemExit: bye"),
])
def test_a_function_that_fails_is_told_of_and_the_backend_goes_on(
        b: Lab, at_a: Backend, how: str, kind: type[errors.KacheryError], pattern: str) -> None:
    task = kf.request_task("lab/fail", {"how": how})
    assert task.wait(60)
    assert task.status == "error"
    with pytest.raises(kind, match=pattern) as caught:
        _ = task.result
    assert type(caught.value) is kind
    assert task.error_message == caught.value.message
    if how == "raise":
        assert "in fail\n" in task.traceback
        assert task.traceback.rstrip().endswith("ValueError: no spikes in 7")
    assert at_a.process.poll() is None
    assert result("lab/text", {"n": 5}) == "ééééé"


def test_a_function_that_hangs_is_broken_off(b: Lab) -> None:
    task = kf.request_task("lab/hang")
    assert task.wait(60)
    with pytest.raises(errors.TaskHung, match=r"'lab/hang' hangs: it did not end within 1 s, and was broken off"):
        _ = task.result
    assert result("lab/text", {"n": 6}) == "éééééé"


def test_what_nobody_runs_is_refused_with_what_there_is(b: Lab) -> None:
    with pytest.raises(errors.TaskNotTaken, match="lab/never") as caught:
        result("lab/never")
    assert "lab/square" in str(caught.value)
    with pytest.raises(errors.TaskNotTaken, match=r"'lab/act'.*action"):
        result("lab/act", {"log": "x"})
    with pytest.raises(errors.TaskFailed, match="unexpected keyword argument 'y'"):
        result("lab/square", {"y": 1})


def test_what_is_wrong_with_a_call_is_said_before_anything_is_sent(b: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_DAEMON_PORT", "9")  # where nobody listens
    with pytest.raises(errors.InvalidArgument, match=r"kwargs\['x'\]\[1\] is of type set"):
        kf.request_task("lab/square", {"x": [1, {2}]})
    with pytest.raises(errors.InvalidArgument, match="nan"):
        kf.request_task("lab/square", {"x": float("nan")})
    with pytest.raises(errors.TooLarge, match="task_kwargs_size_bytes_max"):
        kf.request_task("lab/square", {"x": "y" * 40_000})
    with pytest.raises(errors.InvalidName):
        kf.request_task(" lab/square")
    with pytest.raises(errors.InvalidArgument, match="kinds are"):
        kf.request_task("lab/square", type="calculation")
    with pytest.raises(errors.InvalidArgument, match="task_id"):
        kf.request_task("lab/square", task_id="0" * 40)
    with pytest.raises(errors.InvalidName):
        kf.request_task("lab/act", type="action", task_id="mine")
    with pytest.raises(errors.InvalidName):
        kf.request_task("lab/square", channel="no channel")
    with pytest.raises(errors.InvalidArgument, match="not a registered function"):
        kf.request_task(len, {})
    with pytest.raises(errors.NodeNotRunning):
        kf.request_task("lab/square", {"x": 1})


# --- permissions


def test_who_may_not_request_tasks_is_told_so(b: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    outsider = b.add_node("outsider", permissions=["requestFiles", "provideFiles", "provideTasks"])
    try:
        be(monkeypatch, outsider)
        with pytest.raises(errors.NotPermitted, match=r"requestTasks.*channel grant demo"):
            kf.request_task("lab/text", {"n": 7})
    finally:
        outsider.program.stop()


def test_who_may_not_provide_tasks_is_told_so_and_never_asked(b: Lab, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    outsider = b.add_node("listener", permissions=["requestFiles", "provideFiles", "requestTasks"])
    try:
        be(monkeypatch, outsider)
        kf.taskfunction("outsider/add")(max)
        with pytest.raises(errors.NotPermitted, match=r"provideTasks.*channel grant demo"):
            kf.run_task_backend(channels=["demo"], task_function_ids=["outsider/add"])
        with backend(outsider, tmp_path, functions=FUNCTIONS.replace("lab/", "outsider/")):
            with pytest.raises(errors.TaskNotTaken):
                result("outsider/text", {"n": 1})
            be(monkeypatch, b.nodes["B"])
            with pytest.raises(errors.TaskNotTaken):
                result("outsider/text", {"n": 1})
            b.owner("grant", "demo", outsider.connection.info()["nodeId"], "provideTasks")
            # The backend needs not be started again; the node hears of it within channel_refresh_seconds.
            wait_until(lambda: _finishes(kf.request_task("outsider/text", {"n": 1})), "it is run there")
    finally:
        outsider.program.stop()


def _finishes(task: kf.Task) -> bool:
    return task.wait(60) and task.status == "finished"


# --- other executors, other ways to start


DASK = '''
from dask.distributed import Client, LocalCluster
import dask

@kf.taskfunction("dask/fall", type="action")
def fall(log):
    note(log)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    dask.config.set({{"temporary-directory": {directory!r}}})
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None,
                      local_directory={directory!r}) as cluster, Client(cluster) as client:
        kf.run_task_backend(executor=client.get_executor(),
                            on_ready=lambda channels: print("ready", flush=True))
'''


def test_functions_run_on_a_dask_cluster(b: Lab, tmp_path: Path) -> None:
    script = tmp_path / "on_dask.py"
    script.write_text(FUNCTIONS.replace("lab/", "dask/") + DASK.format(directory=str(tmp_path / "dask")))
    running = Backend(b.nodes["A"], [sys.executable, str(script)], tmp_path)
    try:
        running.wait_for("ready")
        log = str(tmp_path / "log")
        assert result("dask/square", {"x": 4, "log": log})["square"] == 16
        assert result("dask/array", {"n": 1000}).shape == (500, 2)
        started, end = tmp_path / "started", tmp_path / "end"
        long = kf.request_task("dask/wait", {"started": str(started), "end": str(end)})
        wait_until(lambda: long.progress == 0.5, "progress comes from there too")
        assert result("dask/square", {"x": 5, "log": log})["square"] == 25
        end.touch()
        assert long.wait(30)
        for how, kind in (("raise", errors.TaskFailed), ("unserialisable", errors.TaskFailed)):
            with pytest.raises(kind):
                result("dask/fail", {"how": how})
        assert result("dask/square", {"x": 6, "log": log})["square"] == 36
        kf.request_task("dask/act", {"log": str(tmp_path / "acts")}, type="action").wait(60)
        falling = kf.request_task("dask/fall", {"log": str(tmp_path / "acts")}, type="action")
        assert falling.wait(60)
        with pytest.raises(errors.TaskOutcomeUnknown, match="Dask lost the worker that had begun it"):
            _ = falling.result
        assert len((tmp_path / "acts").read_text().split()) == 2, "Dask called it again, and it did not begin again"
    finally:
        assert running.end() == 0


THREADS = '''
from concurrent.futures import ThreadPoolExecutor
kf.run_task_backend(executor=ThreadPoolExecutor(3), on_ready=lambda channels: print("ready", flush=True))
'''


def test_functions_run_in_threads(b: Lab, tmp_path: Path) -> None:
    script = tmp_path / "in_threads.py"
    script.write_text(FUNCTIONS.replace("lab/", "threads/") + THREADS)
    running = Backend(b.nodes["A"], [sys.executable, str(script)], tmp_path)
    try:
        running.wait_for("ready")
        log = tmp_path / "log"
        assert result("threads/square", {"x": 4, "log": str(log)})["square"] == 16
        assert log.read_text() == f"{running.process.pid}\n"
        with pytest.raises(errors.TaskFailed, match="SystemExit"):
            result("threads/fail", {"how": "sys.exit"})
        assert result("threads/square", {"x": 5, "log": str(log)})["square"] == 25
    finally:
        assert running.end() == 0


@pytest.mark.parametrize("way", ["file", "module"])
def test_a_backend_is_started_from_the_command_line(b: Lab, tmp_path: Path, way: str) -> None:
    (tmp_path / "spikes.py").write_text(FUNCTIONS.replace("lab/", f"{way}/"))
    command = [sys.executable, "-m", "kachery_fast", "task", "backend", "--channel", "demo", "--function",
               f"{way}/square", "spikes" if way == "module" else str(tmp_path / "spikes.py")]
    running = Backend(b.nodes["A"], command, tmp_path if way == "module" else Path("/"))
    try:
        assert running.wait_for("Offering") == f"Offering {way}/square on demo. Ctrl-C ends it."
        done = b.nodes["B"].json("task", "request", f"{way}/square", "x=7", f"log={tmp_path / 'log'}")
        assert done["result"] == {"json": {"square": 49, "offset": 100}}
        with pytest.raises(errors.TaskNotTaken):
            result(f"{way}/text", {"n": 1})
    finally:
        assert running.end() == 0


def test_a_backend_runs_in_an_interactive_session(b: Lab, tmp_path: Path) -> None:
    typed = """
import kachery_fast as kf
FACTOR = 3
@kf.taskfunction("session/times")
def times(x):
    return FACTOR * x

kf.run_task_backend(on_ready=lambda channels: print("ready", flush=True))
"""
    running = Backend(b.nodes["A"], [sys.executable, "-i", "-q"], tmp_path, stdin=typed)
    try:
        running.wait_for("ready")
        assert result("session/times", {"x": 5}) == 15
    finally:
        assert running.end() == 0


# --- the node of a backend


def test_a_backend_goes_on_when_its_node_comes_back(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = lab.add_node("restarted", permissions=ALL)
    be(monkeypatch, lab.nodes["B"])
    with backend(runner, tmp_path, functions=FUNCTIONS.replace("lab/", "again/")) as running:
        assert result("again/text", {"n": 1}) == "é"
        runner.program.kill()
        runner.start()
        running.wait_for("ready")
        assert result("again/text", {"n": 2}) == "éé"
    runner.program.stop()


def test_a_request_outlives_its_own_node(b: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asker = b.add_node("asker", permissions=ALL)
    log, end = tmp_path / "log", tmp_path / "end"
    try:
        be(monkeypatch, asker)
        acting = kf.request_task("lab/act", {"log": str(log), "seconds": 3.0}, type="action")
        waiting = kf.request_task("lab/wait", {"started": str(tmp_path / "started"), "end": str(end)})
        wait_until(lambda: count(log) == 1 and (tmp_path / "started").exists(), "both run")
        asker.program.kill()
        with pytest.raises(errors.NodeNotRunning):
            waiting.wait(10)
        asker.start()
        end.touch()
        assert waiting.wait(60)
        assert waiting.result == "done"
        assert acting.wait(60)
        assert acting.result is None
        assert count(log) == 1
    finally:
        asker.program.stop()


# --- the page


def test_the_examples_of_the_page_work(b: Lab, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text("utf-8")
    offering, asking = page.split("```python\n")[1:3]
    script = tmp_path / "rms.py"
    script.write_text(offering.partition("```")[0].replace("kf.run_task_backend()", (
        'kf.run_task_backend(on_ready=lambda channels: print("ready", flush=True))')))
    samples = np.random.default_rng(3).integers(-1000, 1000, (20_000, 384), np.int16)
    samples.tofile(tmp_path / "recording.dat")
    a = b.nodes["A"]
    uri = a.json("store", str(tmp_path / "recording.dat"))[0]["uri"]
    running = Backend(a, [sys.executable, "-W", "error", str(script)], tmp_path)
    try:
        running.wait_for("ready")
        space: dict[str, Any] = {}
        exec(asking.partition("```")[0].replace("sha1://…", uri).replace('"lab"', '"demo"'), space)
        assert np.allclose(space["rms"], np.sqrt((samples.astype(float) ** 2).mean(axis=0)))
        assert space["task"].status == "finished"
    finally:
        assert running.end() == 0
