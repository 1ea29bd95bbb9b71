"""What the feed log costs in flushes, and that there is one before an append is answered."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest

from kachery_fast.protocol.names import subfeed_hash
from kachery_fast.store.feeds import Appended, FeedLog

MAIN, OTHER = subfeed_hash("main"), subfeed_hash("other")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[FeedLog]:
    with closing(FeedLog(tmp_path / "store", message_size_bytes_max=1000, clock=lambda: 1_700_000_000.0)) as log:
        yield log


class Held:
    """The writing thread of a log, held until ``go``, so that what is appended meanwhile waits.

    ``commits`` tells of each transaction how many of ``appends`` were answered when it was about to be made durable.
    """

    def __init__(self, log: FeedLog) -> None:
        self.appends: list[Future[Appended]] = []
        self.commits: list[int] = []
        self._entered, self._gate = threading.Event(), threading.Event()
        log._writer._monotonic = lambda: 0.0  # a transaction that takes long would be cut, on a busy machine
        log._database._writer.set_trace_callback(self._trace)
        log._writer.submit(self._wait)
        assert self._entered.wait(60)

    def _wait(self, _: sqlite3.Connection) -> None:
        self._entered.set()
        assert self._gate.wait(60)

    def _trace(self, statement: str) -> None:
        if statement == "COMMIT":
            self.commits.append(sum(append.done() for append in self.appends))

    def go(self) -> list[Appended]:
        """Let it go on, and wait for all appends."""
        self._gate.set()
        return [append.result(60) for append in self.appends]


def test_the_log_is_flushed_with_each_transaction(log: FeedLog) -> None:
    with log._database.writing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_appends_that_wait_share_one_flush_and_are_answered_after_it_in_their_order(log: FeedLog) -> None:
    feed_id, _ = log.create()
    held = Held(log)
    for number in range(60):
        held.appends.append(log.append(feed_id, (MAIN, OTHER)[number % 2], [{"number": number}, {"more": number}]))
    done = held.go()
    assert [append.first for append in done] == [2 * (number // 2) for number in range(60)]
    assert held.commits == [0, 0], "that of the job that held the thread, then one for them all"
    assert log.tail(feed_id, MAIN).count == log.tail(feed_id, OTHER).count == 60


def test_an_append_alone_has_a_flush_of_its_own(log: FeedLog) -> None:
    feed_id, _ = log.create()
    held = Held(log)
    held.go()
    for number in range(1, 4):
        assert log.append(feed_id, MAIN, [{"number": number}]).result(60).tail.count == number
        assert len(held.commits) == 1 + number
