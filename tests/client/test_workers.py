"""Functions in worker processes: each outcome, and what a lost worker costs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import kachery_fast as kf
from kachery_fast.client.functions import TaskFunction, registered_functions
from kachery_fast.client.reports import ProgressListener
from kachery_fast.client.running import Job, Outcome, encode_result, run_job
from kachery_fast.client.workers import WorkerPool
from kachery_fast.config import load_settings
from kachery_fast.errors import InvalidArgument
from tests.cli.commands import Program
from tests.client import task_functions
from tests.system.support import wait_until

LIMIT_BYTES = 1000


@pytest.fixture
def pool(program: Program) -> Iterator[WorkerPool]:
    pool = WorkerPool(2, registered_functions())
    yield pool
    pool.close()


def job(function_id: str, *, port: int = 9, token: str = "", **kwargs: Any) -> Job:
    [function] = registered_functions([function_id])
    return Job(function.id, function.function, function.kind, kwargs, token or os.urandom(8).hex(),
               socket.gethostname(), port, str(load_settings().storage_dir), LIMIT_BYTES)


def run(pool: WorkerPool, function_id: str, **kwargs: Any) -> Outcome:
    return pool.submit(job(function_id, **kwargs), None).result(60)


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_worker_waits_for_the_first_job(program: Program) -> None:
    before = {child.pid for child in psutil.Process().children()}

    def started() -> set[int]:
        return {child.pid for child in psutil.Process().children()} - before

    pool = WorkerPool(2, registered_functions())
    try:
        wait_until(lambda: len(started()) == 1, "a worker was started")
        pids = {(run(pool, "test/pid").result or {})["json"] for _ in range(2)}
        assert pids == started()
    finally:
        pool.close()
    assert not started()


# --- results


def test_a_function_gets_its_arguments_and_returns_json(pool: WorkerPool) -> None:
    assert run(pool, "test/add", x=1, y=2).result == {"json": 3}
    assert run(pool, "test/add", x=[1], y=["a"]).result == {"json": [1, "a"]}
    value = {"a": [1, 2.5, None, True, "ü"]}
    assert run(pool, "test/identity", value=value).result == {"json": value}


def test_the_result_of_an_action_is_not_passed_on(pool: WorkerPool, tmp_path: Path) -> None:
    assert run(pool, "test/act", path=str(tmp_path / "log")) == Outcome("finished")
    assert (tmp_path / "log").read_text() == "done\n"


def test_arrays_bytes_and_what_is_long_become_files(pool: WorkerPool) -> None:
    import numpy as np

    found = run(pool, "test/identity", numpy="np.arange(6.0).reshape(2, 3)").result
    assert found is not None
    assert found["format"] == "npy"
    assert np.array_equal(kf.load_npy(found["file"]), np.arange(6.0).reshape(2, 3))
    found = run(pool, "test/bytes", length=1000).result
    assert found is not None
    assert found["format"] == "bytes"
    assert kf.load_bytes(found["file"]) == task_functions.some_bytes(1000)
    found = run(pool, "test/identity", value=list(range(LIMIT_BYTES))).result
    assert found is not None
    assert found["format"] == "json"
    assert kf.load_json(found["file"]) == list(range(LIMIT_BYTES))
    found = run(pool, "test/identity", value="é" * LIMIT_BYTES).result
    assert found is not None
    assert found["format"] == "text"
    assert kf.load_text(found["file"]) == "é" * LIMIT_BYTES


def test_a_result_is_a_file_from_one_byte_above_the_limit(program: Program) -> None:
    assert encode_result("x" * 98, 100) == {"json": "x" * 98}
    assert encode_result("x" * 99, 100)["format"] == "text"
    assert encode_result([1] * 49, 99) == {"json": [1] * 49}
    assert encode_result([1] * 49, 98)["format"] == "json"


def test_numbers_of_numpy_are_numbers(program: Program) -> None:
    import numpy as np

    found = encode_result({"n": np.int64(3), "x": [np.float32(0.5), np.bool_(True)], "f": (np.float64(1.5), 2)}, 1000)
    assert found == {"json": {"n": 3, "x": [0.5, True], "f": [1.5, 2]}}
    assert type(found["json"]["n"]) is int
    assert type(found["json"]["x"][1]) is bool


@pytest.mark.parametrize(("value", "where"), [
    ({"a": {1, 2}}, r"\['a'\]"), ([1, float("nan")], r"\[1\]"), ({1: 2}, "key"), (object(), "type object"),
    ([b"x"], "type bytes"), ("\ud800", "UTF-8")])
def test_what_json_cannot_hold_is_refused_with_its_place(program: Program, value: Any, where: str) -> None:
    with pytest.raises(InvalidArgument, match=where):
        encode_result(value, 1000)


def test_what_cannot_be_passed_on_is_an_error_of_the_task_alone(pool: WorkerPool) -> None:
    outcome = run(pool, "test/unserialisable")
    assert outcome.status == "error"
    assert outcome.error is not None
    assert outcome.error["type"] == "TypeError"
    assert "['stream'] is of type function" in outcome.error["message"]
    assert "store anything else as a file" in outcome.error["message"]
    outcome = run(pool, "test/identity", numpy="np.array([object()])")
    assert outcome.error is not None
    assert "Python objects" in outcome.error["message"]
    assert run(pool, "test/add", x=1).status == "finished"


# --- functions that fail


def test_what_a_function_raises_is_told_with_its_traceback(pool: WorkerPool) -> None:
    outcome = run(pool, "test/raise", text="no spikes")
    assert outcome.status == "error"
    assert outcome.error is not None
    assert (outcome.error["type"], outcome.error["message"]) == ("ValueError", "no spikes")
    lines = outcome.error["traceback"].splitlines()
    assert lines[0].startswith("Traceback")
    assert "task_functions.py" in lines[1], "it begins at the function"
    assert "in raising" in lines[1]
    assert lines[-1] == "ValueError: no spikes"


def test_wrong_arguments_are_told(pool: WorkerPool) -> None:
    outcome = run(pool, "test/add", z=1)
    assert outcome.error is not None
    assert outcome.error["type"] == "TypeError"
    assert "unexpected keyword argument 'z'" in outcome.error["message"]


def test_a_function_that_exits_ends_only_itself(pool: WorkerPool) -> None:
    before = run(pool, "test/pid").result
    outcome = run(pool, "test/die", how="sys.exit")
    assert (outcome.status, outcome.error and outcome.error["type"]) == ("error", "SystemExit")
    assert run(pool, "test/pid").result == before


@pytest.mark.parametrize(("how", "text"), [("exit", "exit code 3"), ("kill", "SIGKILL")])
def test_a_dead_worker_costs_one_call(pool: WorkerPool, how: str, text: str) -> None:
    other = pool.submit(job("test/pid", seconds=1.0), None)
    outcome = run(pool, "test/die", how=how)
    assert outcome.status == "crashed"
    assert outcome.error is not None
    assert text in outcome.error["message"]
    assert other.result(60).status == "finished"
    assert run(pool, "test/add", x=1).status == "finished"


def test_a_worker_that_dies_between_two_calls_costs_nothing(pool: WorkerPool) -> None:
    found = run(pool, "test/pid").result
    assert found is not None
    os.kill(found["json"], signal.SIGKILL)
    outcome = run(pool, "test/pid")
    assert outcome.status == "finished"
    assert outcome.result != found


def test_a_dead_worker_is_noticed_whatever_it_left_running(pool: WorkerPool) -> None:
    begun = time.monotonic()
    outcome = run(pool, "test/leave", how="fork")
    assert outcome.error is not None
    assert "exit code 4" in outcome.error["message"]
    assert time.monotonic() - begun < 30
    assert not [child for child in psutil.Process().children(recursive=True) if child.name() == "sleep"]


def test_a_function_that_hangs_is_ended_with_what_it_started(pool: WorkerPool, tmp_path: Path) -> None:
    pid_file = tmp_path / "pids"
    outcome = pool.submit(job("test/hang", pid_file=str(pid_file)), 1.0).result(60)
    assert outcome.status == "hung"
    assert outcome.error is not None
    assert "within 1 s" in outcome.error["message"]
    pids = [int(word) for word in pid_file.read_text().split()]
    wait_until(lambda: not any(map(lives, pids)), "the worker and its program are gone")
    assert run(pool, "test/add", x=1).status == "finished"


def test_the_time_limit_counts_from_the_call_of_the_function(program: Program) -> None:
    pool = WorkerPool(1, registered_functions())
    try:
        first = pool.submit(job("test/pid", seconds=1.0), None)
        second = pool.submit(job("test/pid", seconds=0.1), 0.9)  # waits for the first for longer than that
        assert [first.result(60).status, second.result(60).status] == ["finished", "finished"]
    finally:
        pool.close()


# --- taking back, and the end


def test_a_call_can_be_taken_back_before_and_while_it_runs(program: Program, tmp_path: Path) -> None:
    pool = WorkerPool(1, registered_functions())
    try:
        running = job("test/hang", pid_file=str(tmp_path / "pids"))
        waiting = job("test/act", path=str(tmp_path / "log"))
        futures = [pool.submit(running, None), pool.submit(waiting, None)]
        wait_until((tmp_path / "pids").exists, "it runs")
        pool.cancel(waiting.token)
        pool.cancel(running.token)
        assert [future.result(60).status for future in futures] == ["cancelled", "cancelled"]
        assert not (tmp_path / "log").exists()
        assert run(pool, "test/add", x=1).status == "finished"
        pool.cancel(running.token)  # too late, and harmless
        assert run(pool, "test/add", x=1).status == "finished"
    finally:
        pool.close()


def test_closing_ends_everything(program: Program, tmp_path: Path) -> None:
    pool = WorkerPool(2, registered_functions())
    future = pool.submit(job("test/hang", pid_file=str(tmp_path / "pids")), None)
    wait_until((tmp_path / "pids").exists, "it runs")
    pool.close()
    assert future.result(10).status == "cancelled"
    assert not any(lives(int(word)) for word in (tmp_path / "pids").read_text().split())


def test_workers_end_when_the_backend_is_killed(program: Program, tmp_path: Path) -> None:
    script = tmp_path / "backend.py"
    script.write_text(f"""
import sys; sys.path[:] = {sys.path!r}
from tests.client.test_workers import job
from kachery_fast.client.functions import registered_functions
from kachery_fast.client.workers import WorkerPool
pool = WorkerPool(1, registered_functions(["test/hang"]))
pool.submit(job("test/hang", pid_file={str(tmp_path / "pids")!r}), None).result()
""")
    process = subprocess.Popen([sys.executable, str(script)], env=program.env)
    wait_until((tmp_path / "pids").exists, "it runs")
    process.kill()
    process.wait()
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: not any(map(lives, pids)), "the worker and its program are gone")


def test_a_function_that_cannot_travel_is_refused_at_once(program: Program) -> None:
    lock = threading.Lock()
    with pytest.raises(InvalidArgument, match=r"'test/locked' cannot be sent.*executor=ThreadPoolExecutor"):
        WorkerPool(1, [TaskFunction("test/locked", "query", lambda: lock, None, False)])


def test_workers_bear_whatever_stands_in_the_path_of_modules(program: Program, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])  # Python itself passes over what is no text
    pool = WorkerPool(1, registered_functions())
    try:
        assert run(pool, "test/add", x=1).result == {"json": 2}
    finally:
        pool.close()


def test_a_function_whose_module_is_gone_is_an_error_of_the_task(program: Program, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passing_by.py").write_text("def f(): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import passing_by  # type: ignore[import-not-found]

    pool = WorkerPool(1, [TaskFunction("test/gone", "query", passing_by.f, None, False)])
    try:
        (tmp_path / "passing_by.py").unlink()
        work = Job("test/gone", passing_by.f, "query", {}, "t", socket.gethostname(), 9, "", 100)
        outcome = pool.submit(work, None).result(60)
        assert outcome.status == "error"
        assert outcome.error is not None
        assert outcome.error["type"] == "ModuleNotFoundError"
    finally:
        pool.close()
        del sys.modules["passing_by"]


# --- progress


def heard(function_id: str, submit: Any, **kwargs: Any) -> list[tuple[float | None, str]]:
    """Everything that is heard while a function runs."""
    listener = ProgressListener()
    try:
        work = job(function_id, port=listener.port, token="secret", **kwargs)
        listener.watch("secret")
        future = submit(work)
        found: list[tuple[float | None, str]] = []
        end = time.monotonic() + 60.0
        # What was said last may still be on its way when the function's result is there.
        while not future.done() or not found or found[-1][1] != "done":
            assert time.monotonic() < end
            latest = listener.latest("secret")
            if latest.begun_at is not None and (latest.progress, latest.text) not in found:
                found.append((latest.progress, latest.text))
            time.sleep(0.01)
        assert future.result().status == "finished"
        listener.forget("secret")
        assert listener.latest("secret").begun_at is None
        return found
    finally:
        listener.close()


def test_progress_comes_from_processes_and_threads(pool: WorkerPool) -> None:
    with ThreadPoolExecutor(1) as threads:
        for submit in (lambda work: pool.submit(work, None), lambda work: threads.submit(run_job, work)):
            # So few that the socket holds them all however busy the machine is: what is too much is lost.
            assert heard("test/progress", submit, steps=40)[-1] == (1.0, "done")


def test_progress_outside_a_task_goes_nowhere_and_must_be_a_number() -> None:
    kf.report_progress(0.5, "on my own")
    for wrong in ("much", None, float("nan")):
        with pytest.raises(InvalidArgument, match="0 to 1"):
            kf.report_progress(wrong)  # type: ignore[arg-type]


def test_progress_of_others_is_not_believed(program: Program) -> None:
    listener = ProgressListener()
    try:
        listener.watch("secret")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for data in (b"", b"nonsense", b"[]", b'{"token":"guess","progress":1}', b'{"token":["x"]}', b"\xff" * 9000,
                         b"[" * 9000, b'{"token":"secret","progress":"x","text":3}',
                         b'{"token":"secret","progress":0.5,"text":"true"}'):
                sender.sendto(data, ("127.0.0.1", listener.port))
        wait_until(lambda: listener.latest("secret").progress == 0.5, "the true one is heard")
        assert listener.latest("secret").count == 2
        assert listener.latest("guess").count == 0
    finally:
        listener.close()


# --- where what is returned is stored


def test_a_value_is_returned_as_it_is_where_the_store_is_another(program: Program) -> None:
    import dataclasses

    import numpy as np

    elsewhere = dataclasses.replace(job("test/identity", numpy="np.zeros(3)"), storage_dir="/elsewhere")
    outcome = run_job(elsewhere)
    assert outcome.status == "returned"
    assert np.array_equal(outcome.value, np.zeros(3))
    assert run_job(dataclasses.replace(elsewhere, host="another", storage_dir=job("test/pid").storage_dir)).status == (
        "returned")


def test_what_a_function_prints_is_seen_at_once(program: Program, tmp_path: Path) -> None:
    script = tmp_path / "backend.py"
    script.write_text(f"""
import os, sys; sys.path[:] = {sys.path!r}
from tests.client.test_workers import job
from kachery_fast.client.functions import TaskFunction
from kachery_fast.client.workers import WorkerPool
def speak(**ignored):
    print("from within")
    os._exit(1)
pool = WorkerPool(1, [TaskFunction("test/add", "query", speak, None, False)])
print(pool.submit(job("test/add"), None).result().status)
pool.close()
""")
    done = subprocess.run([sys.executable, str(script)], env=program.env, capture_output=True, text=True, timeout=60,
                          check=False)
    assert sorted(done.stdout.split("\n")) == ["", "crashed", "from within"]
