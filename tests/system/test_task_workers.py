"""Where functions run: workers that die or are all busy, an executor of one's own, functions for one channel alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.cli.lab import Lab
from tests.system.support import QUICK, wait_until
from tests.system.task_backends import ALL, FUNCTIONS, Backend, backend, be, count

FALLING = '''
@kf.taskfunction("lab/fall", type="action")
def fall(log):
    note(log)
    os.kill(os.getpid(), signal.SIGKILL)

@kf.taskfunction("lab/stick", type="action", timeout_seconds=1.0)
def stick(log):
    note(log)
    time.sleep(1000)
'''


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ=QUICK) as lab:
        lab.start_hub()
        lab.add_node("A", permissions=ALL, KACHERY_TASK_WORKERS="1")
        lab.add_node("B", permissions=["requestTasks", "requestFiles"])
        lab.add_node("C", permissions=["requestTasks", "requestFiles"])
        yield lab


@pytest.fixture
def b(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The lab, for a test that is a client of B."""
    be(monkeypatch, lab.nodes["B"])
    return lab


def ended(function: str, kwargs: dict[str, Any], **more: Any) -> kf.Task:
    task = kf.request_task(function, kwargs, **more)
    assert task.wait(60), task
    return task


@pytest.mark.parametrize(("function", "kind", "pattern"), [
    ("lab/fall", errors.TaskCrashed, r"process that ran 'lab/fall' died: .*SIGKILL"),
    ("lab/stick", errors.TaskHung, r"'lab/stick' hangs: it did not end within 1 s"),
])
def test_an_action_whose_worker_is_lost_has_failed_and_does_not_run_again(
        b: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, kind: type[errors.KacheryError],
        pattern: str) -> None:
    log = tmp_path / "log"

    def check(task: kf.Task) -> None:
        assert task.status == "error"
        with pytest.raises(kind, match=pattern) as caught:
            _ = task.result
        assert type(caught.value) is kind
        assert count(log) == 1

    with backend(b.nodes["A"], tmp_path, functions=FUNCTIONS + FALLING):
        task = ended(function, {"log": str(log)}, type="action")
        check(task)
        check(ended(function, {"log": str(log)}, type="action", task_id=task.task_id))
        assert ended("lab/text", {"n": 2}).result == "éé"
    be(monkeypatch, b.nodes["C"])  # who has heard nothing of it: the hub has the receipt, and the backend has gone
    check(ended(function, {"log": str(log)}, type="action", task_id=task.task_id))


def test_a_task_is_queued_while_all_workers_are_busy(b: Lab, tmp_path: Path) -> None:
    def waits(name: str) -> kf.Task:
        return kf.request_task("lab/wait", {"started": str(tmp_path / name), "end": str(tmp_path / f"end-{name}")})

    with backend(b.nodes["A"], tmp_path):
        first = waits("first")
        wait_until(lambda: first.status == "running", "the first runs")
        second = waits("second")
        wait_until(lambda: second.status == "queued", "the second is queued")
        assert first.status == "running"
        assert not (tmp_path / "second").exists()
        (tmp_path / "end-first").touch()
        assert first.wait(60)
        wait_until(lambda: second.status == "running", "its turn has come")
        (tmp_path / "end-second").touch()
        assert second.wait(60)
        assert (first.result, second.result) == ("done", "done")


PROCESSES = '''
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        kf.run_task_backend(executor=executor, on_ready=lambda channels: print("ready", flush=True))
'''


def test_functions_run_in_a_process_pool_of_the_standard_library(b: Lab, tmp_path: Path) -> None:
    script = tmp_path / "in_processes.py"
    script.write_text(FUNCTIONS.replace("lab/", "pool/") + PROCESSES)
    running = Backend(b.nodes["A"], [sys.executable, str(script)], tmp_path)
    try:
        running.wait_for("ready")
        log = tmp_path / "log"
        assert ended("pool/square", {"x": 4, "log": str(log)}).result == {"square": 16, "offset": 100}
        assert ended("pool/square", {"x": 5, "log": str(log)}).result["square"] == 25
        first, second = log.read_text().split()
        assert first == second != str(running.process.pid)
        assert ended("pool/array", {"n": 1000}).result.shape == (500, 2)
        started, end = tmp_path / "started", tmp_path / "end"
        long = kf.request_task("pool/wait", {"started": str(started), "end": str(end)})
        wait_until(lambda: long.progress == 0.5, "progress comes from there too")
        end.touch()
        assert long.wait(60)
        with pytest.raises(errors.TaskFailed, match="no spikes in 7"):
            _ = ended("pool/fail", {"how": "raise"}).result
        for number in range(2):  # such a pool is of no use any more, and says so
            with pytest.raises(errors.TaskCrashed, match="process"):
                _ = ended("pool/fail", {"how": "kill"} if number == 0 else {"how": "raise again"}).result
        assert running.process.poll() is None
    finally:
        assert running.end() == 0


def test_only_the_chosen_functions_are_offered_on_the_chosen_channel(b: Lab, tmp_path: Path) -> None:
    b.owner("create", "second")
    for name, permissions in (("A", ALL), ("B", ["requestTasks"])):
        link = b.owner("invite", "second", "--uses", "1", "--permissions", ",".join(permissions))["link"]
        b.nodes[name].join(link)
    log = str(tmp_path / "log")
    with backend(b.nodes["A"], tmp_path, functions=FUNCTIONS.replace("lab/", "chosen/"), channels=["second"],
                 more="{'task_function_ids': ['chosen/square']}") as running:
        wait_until(lambda: ended("chosen/square", {"x": 6, "log": log}, channel="second").status == "finished",
                   "both nodes are on the channel")
        assert count(Path(log)) == 1
        others: list[tuple[str, dict[str, Any], str]] = [
            ("chosen/text", {"n": 1}, "second"), ("chosen/text", {"n": 1}, "demo"),
            ("chosen/square", {"x": 6, "log": log}, "demo")]
        for function, channel, task in [(function, channel, kf.request_task(function, kwargs, channel=channel))
                                        for function, kwargs, channel in others]:
            assert task.wait(60), task
            with pytest.raises(errors.TaskNotTaken, match=f"on the channel '{channel}' runs '{function}'"):
                _ = task.result
        assert count(Path(log)) == 1
        assert running.process.poll() is None
