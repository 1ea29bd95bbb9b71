"""Group commit: one thread that writes a database, and one flush for all that waited for it.

A flush costs the same for one row as for thousands. What arrives while one is under way goes into the next together,
in the order of its arrival, so the rate of durable writes grows with the number of those who write.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from ..errors import DiskError, DiskFull, KacheryError
from .database import Database
from .disk import display

__all__ = ["GroupWriter"]

T = TypeVar("T")

# Jobs that one transaction takes together: enough that flushes cost next to nothing.
_GROUP_JOBS_MAX = 256
# When its jobs have taken this long, a transaction ends, so that the first does not wait long for the others.
_GROUP_SECONDS_MAX = 0.05


class _Job(NamedTuple):
    work: Callable[[sqlite3.Connection], Any]
    future: Future[Any]


class GroupWriter:
    """Runs jobs on a database, in order, several in one transaction.

    A job takes the connection and returns the result of its future, which is done when it is on the disk. It raises a
    ``KacheryError`` before it has written anything, or not at all; then it alone fails. Any other exception takes the
    whole transaction back; its jobs are then run again, each in one of its own, so a job must do no harm when it is
    run twice.

    :param monotonic: seconds, from any origin.
    """

    def __init__(self, database: Database, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._monotonic = monotonic
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"writer of {database.path.name}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Have a job run after all those submitted before; the future may be cancelled as long as it has not begun.

        The future's error is the job's own, or the DiskError, DiskFull or DatabaseUnusable of its transaction.

        :raises DiskError: the database was closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closing:
                raise DiskError(action="the use", path=display(self._database.path), why="it was closed")
            self._jobs.put(_Job(work, future))
        return future

    def close(self) -> None:
        """Run what was submitted, then close the database; a second call does nothing."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._jobs.put(None)
        self._thread.join()
        self._database.close()

    def _run(self) -> None:
        ended = False
        while not ended:
            group: list[_Job] = []
            job = self._jobs.get()
            while job is not None:
                if job.future.set_running_or_notify_cancel():
                    group.append(job)
                if len(group) == _GROUP_JOBS_MAX:
                    break
                try:
                    job = self._jobs.get_nowait()
                except Empty:
                    break
            else:
                ended = True
            while group:
                group = group[self._commit(group):]

    def _commit(self, group: list[_Job]) -> int:
        """Run jobs in one transaction and answer them; return how many of them, from the first on, were run."""
        answers: list[tuple[Any, KacheryError | None]] = []
        ends = self._monotonic() + _GROUP_SECONDS_MAX
        try:
            with self._database.writing() as connection:
                for job in group:
                    try:
                        answers.append((job.work(connection), None))
                    except KacheryError as error:
                        answers.append((None, error))
                    if self._monotonic() >= ends:
                        break
        except Exception as error:
            if len(group) > 1 and (isinstance(error, DiskFull) or not isinstance(error, KacheryError)):
                for job in group:  # what one of them asks too much, or does wrong, is not the others' fault
                    self._commit([job])
            else:
                for job in group:
                    job.future.set_exception(error)
            return len(group)
        for job, (answer, refusal) in zip(group, answers, strict=False):
            if refusal is not None:
                job.future.set_exception(refusal)
            else:
                job.future.set_result(answer)
        return len(answers)
