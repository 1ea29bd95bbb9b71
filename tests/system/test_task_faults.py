"""Nodes and backends killed at each step of a task: an action never starts twice, and nobody waits for ever."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.errors import TaskOutcomeUnknown
from tests.system.support import QUICK, wait_until
from tests.system.task_backends import ALL, FUNCTIONS, backend, be, count

# Found by Python in the directory that PYTHONPATH names, before the program begins: it ends itself, once, as by
# kill -9, at the step that FAULT_AT names.
SITE = '''
import os, signal, sys

def die():
    if not os.path.exists(os.environ["FAULT_DONE"]):
        open(os.environ["FAULT_DONE"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

def before(kind, name, when=lambda *_: True):
    work = getattr(kind, name)
    def dying(self, *arguments, **named):
        if when(*arguments):
            die()
        return work(self, *arguments, **named)
    setattr(kind, name, dying)

def after(kind, name, when=lambda *_: True):
    work = getattr(kind, name)
    def dying(self, *arguments, **named):
        result = work(self, *arguments, **named)
        if when(*arguments):
            die()
        return result
    setattr(kind, name, dying)

def after_answer(kind, name):
    work = getattr(kind, name)
    async def dying(self, *arguments, **named):
        result = await work(self, *arguments, **named)
        die()
        return result
    setattr(kind, name, dying)

if sys.orig_argv[2:5] == ["kachery_fast", "node", "start"]:
    from kachery_fast.net.hub import HubClient
    from kachery_fast.node.task_backends import TaskBackends
    from kachery_fast.store.tasks import TaskLedger
    {
        "before the claim": lambda: before(HubClient, "claim_task"),
        "after the claim": lambda: after_answer(HubClient, "claim_task"),
        "after the start was noted": lambda: after(TaskLedger, "set", lambda *given: given[3] == "started"),
        "after the run": lambda: before(TaskBackends, "report", lambda _, report: report.status != "running"),
        "before the receipt is kept": lambda: before(TaskLedger, "set", lambda *given: given[3] == "finished"),
        "after the receipt was kept": lambda: after(TaskLedger, "set", lambda *given: given[3] == "finished"),
        "after the hub has it": lambda: after_answer(HubClient, "finish_task"),
        "": lambda: None,
    }[os.environ["FAULT_AT"]]()
'''

MORE_FUNCTIONS = FUNCTIONS + '''
@kf.taskfunction("lab/touch", type="action", idempotent=True)
def touch(log, end):
    note(log)
    while not Path(end).exists():
        time.sleep(0.02)

@kf.taskfunction("lab/hold", type="action")
def hold(log, end):
    touch(log, end)
    Path(end + "ed").touch()

@kf.taskfunction("lab/sum")
def long_sum(log, end):
    touch(log, end)
    return 3
'''


def lab_of(directory: Path, lease_seconds: float) -> Iterator[Lab]:
    with Lab(directory, environ={**QUICK, "KACHERY_TASK_LEASE_SECONDS": str(lease_seconds),
                                 "KACHERY_PATIENCE_SECONDS": "60"}) as lab:
        lab.start_hub()
        lab.add_node("B", permissions=["requestTasks", "requestFiles"])
        yield lab


@pytest.fixture(scope="module")
def patient_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Its hub waits for a node that was killed for longer than any takes to come back."""
    yield from lab_of(tmp_path_factory.mktemp("patient"), 120.0)


@pytest.fixture(scope="module")
def hasty_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Its hub soon gives up a node that has fallen silent."""
    yield from lab_of(tmp_path_factory.mktemp("hasty"), 5.0)


def used(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Be a client of B; nodes that run tasks are gone at the end."""
    be(monkeypatch, lab.nodes["B"])
    before = set(lab.nodes)
    yield lab
    for name in set(lab.nodes) - before:
        lab.nodes[name].program.kill()


@pytest.fixture
def patient(patient_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    yield from used(patient_lab, monkeypatch)


@pytest.fixture
def hasty(hasty_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    yield from used(hasty_lab, monkeypatch)


def add_dying(lab: Lab, directory: Path, name: str, step: str) -> LabNode:
    """Add a node that ends itself at a step."""
    site = directory / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    return lab.add_node(name, permissions=ALL, PYTHONPATH=str(site), FAULT_AT=step,
                        FAULT_DONE=str(directory / "done"))


def died(node: LabNode) -> bool:
    return bool(psutil.Process(node.program.pid).status() == psutil.STATUS_ZOMBIE)


def restart(node: LabNode) -> None:
    node.program.kill()
    node.start()


STEPS = [
    # killed at, how the action ends, how often it was carried out
    ("before the claim", "finished", 1),
    ("after the claim", "finished", 1),
    ("after the start was noted", "unknown", 0),
    ("after the run", "unknown", 1),
    ("before the receipt is kept", "unknown", 1),
    ("after the receipt was kept", "finished", 1),
    ("after the hub has it", "finished", 1),
]


@pytest.mark.parametrize(("step", "status", "times"), STEPS, ids=[step for step, _, _ in STEPS])
def test_an_action_starts_at_most_once_at_whatever_step_its_node_is_killed(
        patient: Lab, tmp_path: Path, step: str, status: str, times: int) -> None:
    log = tmp_path / "log"
    dying = add_dying(patient, tmp_path, f"dies-{step.replace(' ', '-')}", step)
    with backend(dying, tmp_path / "backend"):
        task = kf.request_task("lab/act", {"log": str(log)}, type="action")
        wait_until(lambda: died(dying), f"the node has died {step}", 60)
        assert count(log) == (0 if step in ("before the claim", "after the claim", "after the start was noted") else 1)
        restart(dying)  # its backend connects again, and could do it again
        assert task.wait(90), task
        assert (task.status, count(log)) == (status, times), task
        again = kf.request_task("lab/act", {"log": str(log)}, type="action", task_id=task.task_id)
        assert again.wait(60)
        assert (again.status, count(log)) == (status, times)
        if status == "unknown":
            with pytest.raises(TaskOutcomeUnknown):
                _ = again.result
        wait_until(lambda: dying.connection.info()["taskBackends"]["running"] == 0, "it has nothing left to do")


def test_a_node_that_stays_away_leaves_its_action_unknown_and_another_does_not_start_it(
        hasty: Lab, tmp_path: Path) -> None:
    log = tmp_path / "log"
    dying = add_dying(hasty, tmp_path, "stays-away", "after the run")
    with backend(dying, tmp_path / "first"):
        task = kf.request_task("lab/act", {"log": str(log)}, type="action")
        wait_until(lambda: died(dying), "the node has died", 60)
        with backend(hasty.add_node("other", permissions=ALL), tmp_path / "second"):
            assert task.wait(90), task
            assert (task.status, count(log)) == ("unknown", 1)
            again = kf.request_task("lab/act", {"log": str(log)}, type="action", task_id=task.task_id)
            assert again.wait(60)
            assert (again.status, count(log)) == ("unknown", 1)


def test_an_action_whose_node_is_killed_while_it_runs_is_unknown_for_ever(hasty: Lab, tmp_path: Path) -> None:
    log, end = tmp_path / "log", tmp_path / "end"
    kwargs = {"log": str(log), "end": str(end)}
    node = hasty.add_node("held", permissions=ALL)

    def status() -> str:
        again = kf.request_task("lab/hold", kwargs, type="action", task_id=task.task_id)
        assert again.wait(60), again
        return again.status

    with backend(node, tmp_path / "first", functions=MORE_FUNCTIONS) as running:
        task = kf.request_task("lab/hold", kwargs, type="action")
        wait_until(lambda: count(log) == 1, "it runs", 60)
        node.program.kill()
        with backend(hasty.add_node("free", permissions=ALL), tmp_path / "second", functions=MORE_FUNCTIONS):
            assert task.wait(60), task
            assert (task.status, count(log)) == ("unknown", 1)
            with pytest.raises(TaskOutcomeUnknown):
                _ = task.result
            assert status() == "unknown"
            node.start()
            running.wait_for("ready")
            assert status() == "unknown"
            end.touch()
            wait_until((tmp_path / "ended").exists, "the function has returned, to nobody", 60)
            assert status() == "unknown"
            assert count(log) == 1


def test_a_receipt_that_comes_late_turns_unknown_into_knowledge(hasty: Lab, tmp_path: Path) -> None:
    log = tmp_path / "log"
    dying = add_dying(hasty, tmp_path, "late", "after the receipt was kept")
    with backend(dying, tmp_path / "backend"):
        task = kf.request_task("lab/act", {"log": str(log)}, type="action")
        wait_until(lambda: died(dying), "the node has died", 60)
        assert task.wait(90), task
        assert task.status == "unknown"
        restart(dying)
        wait_until(lambda: status_of(task.task_id, log) == "finished", "the receipt has reached the hub", 60)
        assert count(log) == 1


def status_of(task_id: str, log: Path, **kwargs: float) -> str:
    task = kf.request_task("lab/act", {"log": str(log), **kwargs}, type="action", task_id=task_id)
    task.wait(30)
    return task.status


@pytest.mark.parametrize(("function", "kind", "value"), [
    ("lab/sum", "pure-calculation", 3), ("lab/touch", "action", None)])
def test_what_may_run_twice_is_taken_over_when_its_node_is_killed_in_the_midst(
        hasty: Lab, tmp_path: Path, function: str, kind: str, value: object) -> None:
    log, end = tmp_path / "log", tmp_path / "end"
    first = hasty.add_node(f"first-{kind}", permissions=ALL)
    with backend(first, tmp_path / "first", functions=MORE_FUNCTIONS):
        task = kf.request_task(function, {"log": str(log), "end": str(end)}, type=kind)
        wait_until(lambda: count(log) == 1, "it runs", 60)
        with backend(hasty.add_node(f"second-{kind}", permissions=ALL), tmp_path / "second", functions=MORE_FUNCTIONS):
            first.program.kill()
            wait_until(lambda: count(log) == 2, "it runs elsewhere", 60)
            end.touch()
            assert task.wait(60), task
            assert task.status == "finished"
            assert task.result == value
            assert task.node == hasty.nodes[f"second-{kind}"].connection.info()["nodeId"]
    assert count(log) == 2


def test_a_killed_backend_leaves_calculations_to_the_next_and_its_action_unknown(patient: Lab, tmp_path: Path) -> None:
    log, end, acted = tmp_path / "log", tmp_path / "end", tmp_path / "acted"
    node = patient.add_node("kills-backend", permissions=ALL)
    with backend(node, tmp_path / "first", functions=MORE_FUNCTIONS, more="{}") as first:
        calculation = kf.request_task("lab/sum", {"log": str(log), "end": str(end)})
        wait_until(lambda: count(log) == 1, "the calculation runs", 60)
        action = kf.request_task("lab/act", {"log": str(acted), "seconds": 1000.0}, type="action")
        wait_until(lambda: count(acted) == 1, "the action runs", 60)
        family = psutil.Process(first.process.pid).children(recursive=True)
        with backend(node, tmp_path / "second", functions=MORE_FUNCTIONS):
            first.process.send_signal(signal.SIGKILL)
            assert action.wait(60)
            assert action.status == "unknown"
            wait_until(lambda: count(log) == 2, "the calculation runs again", 60)
            end.touch()
            assert calculation.wait(60)
            assert calculation.result == 3
        assert count(acted) == 1
        psutil.wait_procs(family, timeout=20)
        assert not [process for process in family if process.is_running()], "workers end with their backend"


def test_a_backend_that_is_started_anew_takes_up_what_the_one_before_was_at(patient: Lab, tmp_path: Path) -> None:
    log, end = tmp_path / "log", tmp_path / "end"
    node = patient.add_node("restarts-backend", permissions=ALL)
    with backend(node, tmp_path / "first", functions=MORE_FUNCTIONS):
        task = kf.request_task("lab/sum", {"log": str(log), "end": str(end)})
        wait_until(lambda: count(log) == 1, "it runs", 60)
    wait_until(lambda: task.status == "waiting", "nobody has it", 60)
    with backend(node, tmp_path / "second", functions=MORE_FUNCTIONS):
        wait_until(lambda: count(log) == 2, "it runs again", 60)
        end.touch()
        assert task.wait(60), task
        assert task.result == 3


def test_a_result_waits_for_a_hub_that_is_away(patient: Lab, tmp_path: Path) -> None:
    log, end = tmp_path / "log", tmp_path / "end"
    node = patient.add_node("keeps-result", permissions=ALL)
    with backend(node, tmp_path / "backend", functions=MORE_FUNCTIONS):
        task = kf.request_task("lab/sum", {"log": str(log), "end": str(end)})
        wait_until(lambda: count(log) == 1, "it runs", 60)
        patient.hub.kill()
        end.touch()
        wait_until(lambda: node.connection.info()["taskBackends"]["backends"][0]["runs"] == 0, "it has ended", 60)
        patient.start_hub()
        assert task.wait(60), task
        assert task.result == 3
        assert count(log) == 1


def test_a_hub_that_is_killed_and_comes_back_forgets_no_claim(patient: Lab, tmp_path: Path) -> None:
    log = tmp_path / "log"
    node = patient.add_node("outlives-hub", permissions=ALL)
    with backend(node, tmp_path / "backend"):
        task = kf.request_task("lab/act", {"log": str(log), "seconds": 3.0}, type="action")
        wait_until(lambda: count(log) == 1, "it runs", 60)
        patient.hub.kill()
        patient.start_hub()
        assert task.wait(90), task
        assert (task.status, count(log)) == ("finished", 1)


def test_a_requester_that_is_killed_does_not_stop_the_action(patient: Lab, tmp_path: Path) -> None:
    log = tmp_path / "log"
    node = patient.add_node("loses-asker", permissions=ALL)
    with backend(node, tmp_path / "backend"):
        task = kf.request_task("lab/act", {"log": str(log), "seconds": 1.0}, type="action")
        wait_until(lambda: count(log) == 1, "it runs", 60)
        restart(patient.nodes["B"])
        wait_until(lambda: status_of(task.task_id, log, seconds=1.0) == "finished", "it has ended", 60)
        assert count(log) == 1
