"""Killing whoever appends: what was acknowledged is there, and of no batch there is a part."""

from __future__ import annotations

import random
import time
from contextlib import closing
from pathlib import Path

import pytest

from kachery_fast.protocol import feeds as rules
from kachery_fast.store.feeds import FeedLog

from .feed_children import start_appender
from .test_feeds import MAIN, MANY, append, check_chain, open_log


def _acknowledged(output: str) -> int:
    """The highest end that a child printed; its last line may be cut off."""
    lines = output.split("\n")[:-1]
    return max((int(line) for line in lines if line != "ready"), default=0)


def _check(log: FeedLog, feed_id: str, batch: int, acknowledged: int) -> int:
    count = check_chain(log, feed_id)
    assert count >= acknowledged
    assert count % batch == 0
    found = [rules.payload(message) for message in log.read(feed_id, MAIN, 0, MANY, MANY)]
    seen: dict[int, int] = {}
    for start in range(0, count, batch):
        assert all(message == found[start] for message in found[start:start + batch])
        thread, number = found[start]["thread"], found[start]["batch"]
        assert number == seen.get(thread, 0)
        seen[thread] = number + 1
    return count


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (1, 25), (6, 7)])
def test_kill_at_any_moment_loses_no_acknowledged_message_and_leaves_no_half_batch(
        tmp_path: Path, threads: int, batch: int) -> None:
    chance = random.Random(f"{threads} {batch}")
    for number in range(5):
        root = tmp_path / str(number)
        with closing(open_log(root)) as log:
            feed_id, _ = log.create()
        with start_appender(root, feed_id, MAIN, threads=threads, batch=batch) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.stdin.write("go\n")
            child.stdin.flush()
            first = child.stdout.readline()
            # Real time on purpose: the moment of death is what is tried.
            time.sleep(chance.uniform(0.0, 0.05))
            child.kill()
            output = first + child.stdout.read()
        with closing(open_log(root)) as log:
            count = _check(log, feed_id, batch, _acknowledged(output))
            assert count > 0
            assert append(log, feed_id, {"n": "after"}).first == count
            assert check_chain(log, feed_id) == count + 1


def test_two_processes_that_append_at_once_make_one_chain(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        feed_id, _ = log.create()
        children = [start_appender(tmp_path, feed_id, MAIN, threads=2, batch=3, count=25) for _ in range(2)]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        ends: list[int] = []
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        own = [append(log, feed_id, {"thread": 9, "batch": number}).tail.count for number in range(25)]
        for child in children:
            output, _ = child.communicate(timeout=120)
            assert child.returncode == 0
            ends += map(int, output.split())
        assert len({*ends, *own}) == 125  # no number was given twice
        assert check_chain(log, feed_id) == max(*ends, *own) == 2 * 2 * 25 * 3 + 25


def test_another_process_that_is_killed_while_it_writes_holds_nobody_up(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        feed_id, _ = log.create()
        with start_appender(tmp_path, feed_id, MAIN, threads=3, batch=50) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.stdin.write("go\n")
            child.stdin.flush()
            lines = [child.stdout.readline() for _ in range(3)]
            own = [append(log, feed_id, {"n": number}).first for number in range(3)]
            child.kill()
            acknowledged = _acknowledged("".join(lines) + child.stdout.read())
        own += [append(log, feed_id, {"n": number}).first for number in range(3)]
        assert len(set(own)) == 6
        count = check_chain(log, feed_id)
        assert (count - 6) % 50 == 0
        assert count >= acknowledged
