"""What is remembered of actions over crashes."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kachery_fast.errors import DatabaseUnusable
from kachery_fast.store.tasks import ActionEntry, TaskLedger

HUB, LAB = "http://hub", "lab"
TASK, OTHER = "ab" * 16, "cd" * 16
FIRST = "1" * 32
RECEIPT = {"body": {"outcome": "finished"}, "signature": "é"}


class Clock:
    """Time that moves only when told to."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def test_no_file_is_made_before_an_action_comes(tmp_path: Path) -> None:
    ledger = TaskLedger(tmp_path / "store")
    assert ledger.left(HUB, LAB) == []
    ledger.close()
    assert not (tmp_path / "store").exists()


def test_an_action_is_begun_once(tmp_path: Path) -> None:
    ledger = TaskLedger(tmp_path)
    assert ledger.begin(HUB, LAB, TASK, "mail.1", FIRST) is None
    assert ledger.begin(HUB, LAB, TASK, "mail.1", FIRST) == ActionEntry(TASK, "mail.1", "claiming", None, FIRST)
    ledger.set(HUB, LAB, TASK, "started")
    assert ledger.begin(HUB, LAB, TASK, "mail.1", FIRST) == ActionEntry(TASK, "mail.1", "started", None, FIRST)
    ledger.set(HUB, LAB, TASK, "finished", RECEIPT)
    assert ledger.begin(HUB, LAB, TASK, "other.1", FIRST) == ActionEntry(TASK, "mail.1", "finished", RECEIPT, FIRST)
    ledger.remove(HUB, LAB, TASK)
    assert ledger.begin(HUB, LAB, TASK, "mail.1", FIRST) is None
    ledger.close()


def test_channels_of_one_name_at_two_hubs_are_two(tmp_path: Path) -> None:
    ledger = TaskLedger(tmp_path)
    for hub, channel in ((HUB, LAB), ("http://other", LAB), (HUB, "other")):
        assert ledger.begin(hub, channel, TASK, "mail.1", FIRST) is None
    ledger.set(HUB, "other", TASK, "started")
    ledger.remove("http://other", LAB, TASK)
    assert ledger.left(HUB, LAB) == [ActionEntry(TASK, "mail.1", "claiming", None, FIRST)]
    assert ledger.left(HUB, "other") == [ActionEntry(TASK, "mail.1", "started", None, FIRST)]
    assert ledger.left("http://other", LAB) == []
    ledger.close()


def test_what_is_left_is_read_by_the_next_run_oldest_first(tmp_path: Path) -> None:
    clock = Clock()
    ledger = TaskLedger(tmp_path, clock=clock)
    ledger.begin(HUB, LAB, OTHER, "mail.1", FIRST)
    clock.now += 1
    ledger.begin(HUB, LAB, TASK, "mail.1", FIRST)
    ledger.close()
    later = TaskLedger(tmp_path, clock=clock)
    assert [entry.task for entry in later.left(HUB, LAB)] == [OTHER, TASK]
    later.close()


def test_what_nobody_took_for_months_is_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    ledger = TaskLedger(tmp_path, clock=clock)
    ledger.begin(HUB, LAB, TASK, "mail.1", FIRST)
    clock.now += 89 * 86400
    ledger.begin(HUB, LAB, OTHER, "mail.1", FIRST)
    ledger.close()
    clock.now += 2 * 86400
    later = TaskLedger(tmp_path, clock=clock)
    assert [entry.task for entry in later.left(HUB, LAB)] == [OTHER]
    later.close()


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    ledger = TaskLedger(tmp_path)
    ledger.begin(HUB, LAB, TASK, "mail.1", FIRST)
    ledger.close()
    assert stat.S_IMODE((tmp_path / "kachery-fast-tasks.db").stat().st_mode) == 0o600


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kachery-fast-tasks.db"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(DatabaseUnusable, match=r"kachery-fast-tasks\.db"):
        TaskLedger(tmp_path).left(HUB, LAB)


KILLED = """
import os, signal, sys
from pathlib import Path
from kachery_fast.store.tasks import TaskLedger
ledger = TaskLedger(Path(sys.argv[1]))
for state in sys.argv[2:]:
    if state == "claiming":
        ledger.begin("http://hub", "lab", "ab" * 16, "mail.1", "1" * 32)
    else:
        ledger.set("http://hub", "lab", "ab" * 16, state, {"n": 1} if state == "finished" else None)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("states", [["claiming"], ["claiming", "started"], ["claiming", "started", "finished"]])
def test_what_was_noted_outlives_a_kill(tmp_path: Path, states: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *states], check=False, timeout=60)
    assert done.returncode == -9
    ledger = TaskLedger(tmp_path)
    assert ledger.left(HUB, LAB) == [
        ActionEntry(TASK, "mail.1", states[-1], {"n": 1} if states[-1] == "finished" else None, FIRST)]
    ledger.close()
