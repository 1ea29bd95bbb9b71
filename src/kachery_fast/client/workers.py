"""The default executor of a task backend: worker processes that can be lost one by one.

Each worker is a process of its own, started with the same Python and without the user's main module, so it does not
matter whether a backend has threads, nor whether a function stands in a script, a module or a notebook: functions
travel by cloudpickle, as with Dask. One worker that dies, hangs or is killed costs the one call that it was at. A pool
of ``concurrent.futures`` is broken as a whole by that, and one of pebble when a worker dies between two calls.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection

from ..errors import InvalidArgument
from ..protocol.task_errors import error_report
from .functions import TaskFunction
from .running import Job, Outcome

__all__ = ["WorkerPool"]

_POLL_SECONDS = 0.25
_ATTEMPTS_MAX = 3
# What a function has started gets so long to end by itself.
_TERM_SECONDS = 0.5
_END_SECONDS = 5.0
_PROGRAM = "import sys; from kachery_fast.client.worker import main; main(int(sys.argv[1]), {path!r})"

logger = logging.getLogger("kachery_fast.client")


class WorkerPool:
    """Runs jobs in up to ``workers`` processes. The first is started at once, so that the first job does not wait for
    Python to start; others as they are needed.

    :param functions: those that will be run.
    :raises InvalidArgument: one of them cannot be sent to another process.
    """

    def __init__(self, workers: int, functions: Iterable[TaskFunction]) -> None:
        self._functions = {function.id: _pickled(function) for function in functions}
        self._threads = ThreadPoolExecutor(workers, "kachery-fast-worker")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: dict[str, _Worker] = {}
        self._unfinished: set[str] = set()
        self._withdrawn: set[str] = set()
        self._closed = False
        self._threads.submit(self._start_first)

    def submit(self, job: Job, timeout_seconds: float | None) -> Future[Outcome]:
        """Run a job as soon as a worker is free. The future raises nothing; what goes wrong is in the outcome.

        :param timeout_seconds: how long the function may run.
        """
        with self._lock:
            self._unfinished.add(job.token)
        return self._threads.submit(self._run, job, timeout_seconds)

    def cancel(self, token: str) -> None:
        """Break off the job of this token, if it runs, or do not begin it; its outcome is "cancelled"."""
        with self._lock:
            if token in self._unfinished:
                self._withdrawn.add(token)
            worker = self._busy.get(token)
        if worker is not None:
            worker.end()

    def close(self) -> None:
        """End all workers, with what they run."""
        with self._lock:
            self._closed = True
            workers = [*self._idle, *self._busy.values()]
            self._idle.clear()
        for worker in workers:
            worker.tell_to_end()
        for worker in workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)

    # --- in a thread of the pool

    def _start_first(self) -> None:
        with self._lock:
            if not (self._closed or self._idle or self._busy):
                self._idle.append(_Worker())

    def _run(self, job: Job, timeout_seconds: float | None) -> Outcome:
        try:
            return self._try(job, timeout_seconds)
        except Exception as error:  # no process could be started, for one
            logger.exception("a worker could not be used")
            return Outcome("crashed", error=error_report("NoWorker", f"no worker process could run it: {error}"))
        finally:
            with self._lock:
                self._unfinished.discard(job.token)
                self._withdrawn.discard(job.token)

    def _try(self, job: Job, timeout_seconds: float | None) -> Outcome:
        for _ in range(_ATTEMPTS_MAX):
            worker = self._begin(job)
            if worker is None:
                return Outcome("cancelled")
            outcome: Outcome | None = None
            try:
                outcome = worker.run(replace(job, function=_absent), self._functions[job.function_id], timeout_seconds)
            finally:
                withdrawn = self._end(job, worker, sound=outcome is not None and outcome.status in _SOUND)
            if withdrawn and (outcome is None or outcome.status == "crashed"):
                return Outcome("cancelled")
            if outcome is not None:
                return outcome
            # It was gone before it called the function, so it is safe to take another.
            died = worker.how_it_died()
        return Outcome("crashed", error=error_report("ProcessDied", f"{died}, each time before the function began"))

    def _begin(self, job: Job) -> _Worker | None:
        with self._lock:
            if self._closed or job.token in self._withdrawn:
                return None
            worker = self._idle.pop() if self._idle else _Worker()
            self._busy[job.token] = worker
        return worker

    def _end(self, job: Job, worker: _Worker, *, sound: bool) -> bool:
        """Put a sound worker back, end another, and return whether the job is not wanted any more."""
        with self._lock:
            self._busy.pop(job.token, None)
            kept = sound and not self._closed
            if kept:
                self._idle.append(worker)
            withdrawn = self._closed or job.token in self._withdrawn
        if not kept:
            worker.end()
        return withdrawn


_SOUND = ("finished", "error", "returned")


def _absent() -> None:
    """Stands for a function that the worker has already."""


class _Worker:
    """One process, with the thread that uses it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            # Not a fork of this process, which may have threads; nor does it read the user's main module again.
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                # -u: what a function prints is seen at once, and not lost when its process is ended.
                [sys.executable, "-u", "-c", _PROGRAM.format(path=[*map(str, sys.path)]), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
            self._connection = Connection(ours.detach())
        self._known: set[str] = set()
        self._ending = threading.Lock()

    def run(self, job: Job, function: bytes, timeout_seconds: float | None) -> Outcome | None:
        """Run a job to its end; None when the process was gone before the function was called."""
        begun_at: float | None = None
        try:
            if job.function_id not in self._known:
                self._connection.send(("function", job.function_id, function))
                self._known.add(job.function_id)
            self._connection.send(("job", job))
            while True:
                if self._connection.poll(_POLL_SECONDS):
                    message = self._connection.recv()
                    if isinstance(message, Outcome):
                        return message
                    begun_at = time.monotonic()
                elif _is_over(self._process.pid) and not self._connection.poll(0):
                    raise EOFError  # not told by the socket, which a process that it left behind may hold
                # What it has said meanwhile counts, however late this thread comes to look.
                if (timeout_seconds and begun_at is not None and time.monotonic() - begun_at > timeout_seconds
                        and not self._connection.poll(0)):
                    self.end()
                    return Outcome("hung", error=error_report(
                        "TimeoutError", f"it did not end within {timeout_seconds:g} s, and was broken off"))
        except (OSError, EOFError):
            self.end()
            if begun_at is None:
                return None
            return Outcome("crashed", error=error_report("ProcessDied", self.how_it_died()))

    def how_it_died(self) -> str:
        """Return with which exit code or signal the process ended."""
        code = self._process.returncode
        if code is None:
            return "its process does not end"
        if code >= 0:
            return f"its process ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"its process was ended by {name}{hint}"

    def tell_to_end(self) -> None:
        """Have the process and what it has started end, and wait for nothing."""
        if self._ending.acquire(blocking=False):
            self._signal(signal.SIGTERM)
            self._ending.release()

    def end(self) -> None:
        """End the process and what it has started; may be called by several threads, and again."""
        with self._ending:
            if self._process.returncode is None:
                self._signal(signal.SIGTERM)
                # Its id is its group's until it is waited for, and so is killed below before it is somebody else's.
                end = time.monotonic() + _TERM_SECONDS
                while time.monotonic() < end and not _is_over(self._process.pid):
                    time.sleep(0.005)
                self._signal(signal.SIGKILL)
                try:
                    self._process.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:  # in a system call of a broken disk, for one
                    logger.warning("the worker process %d does not end", self._process.pid)
            self._connection.close()

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def _is_over(pid: int) -> bool:
    """Whether a child has ended; it is left for its ``Popen`` to be waited for. Where the system has no such call,
    that is seen by the end of the socket alone."""
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _pickled(function: TaskFunction) -> bytes:
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(function.function))
    except Exception as error:  # whatever the objects that it uses raise
        raise InvalidArgument(what=f"The function {function.id!r} cannot be sent to a worker process ({error!r}), "
                                   "because of what it uses outside itself. Make that inside the function, or in a "
                                   "module that it imports, or pass executor=ThreadPoolExecutor().") from error
