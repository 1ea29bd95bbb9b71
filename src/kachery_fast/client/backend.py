"""Running tasks for others: a backend that offers registered functions through the node of this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config import Settings
from ..errors import KacheryError, NodeNotRunning
from ..protocol.names import check_channel_name
from ..protocol.task_errors import error_report
from .connection import NodeConnection
from .functions import TaskFunction, registered_functions
from .keeping import NoAnswer, Withdrawal
from .place import client_settings
from .reports import ProgressListener, Reporter
from .running import Job, Outcome, describe_error, leave_ticket, run_job
from .workers import WorkerPool

__all__ = ["run_task_backend"]

_TICK_SECONDS = 0.25
# A node says so often that it is alive.
_ALIVE_SECONDS = 5.0
# The node is on this machine, so it is looked for more often than a hub.
_RETRY_CAP_SECONDS = 2.0

logger = logging.getLogger("kachery_fast.client")


def run_task_backend(channels: Iterable[str] | None = None, task_function_ids: Iterable[str] | None = None,
                     executor: Executor | None = None, *, stop: threading.Event | None = None,
                     on_ready: Callable[[list[str]], None] | None = None) -> None:
    """Run registered functions for the nodes of the channels, until Ctrl-C, SIGTERM or ``stop``.

    It ends at once then, with its worker processes; calculations and queries that run go to another backend, and of an
    action that runs nobody knows whether it was done. When the node is started anew, the backend connects again.

    :param channels: the channels to run functions for; without it all on which this node may provide tasks.
    :param task_function_ids: the functions to offer; without it all that ``taskfunction`` has registered.
    :param executor: what runs them, such as a ``ThreadPoolExecutor`` or Dask's ``client.get_executor()``; it stays
        open. Without it ``task_workers`` processes, which alone can be ended when a function hangs: elsewhere the
        requester is told so, and the function runs on. Functions may be called at the same time in several workers.
    :param stop: end when this is set, from another thread.
    :param on_ready: called with the channels whenever the functions are offered.
    :raises InvalidArgument: there is nothing to offer, or a function cannot be sent to a worker process.
    :raises NodeNotRunning, ClientAuthRefused, ChannelUnknown, NotPermitted: it cannot begin.
    """
    settings = client_settings()
    functions = registered_functions(task_function_ids)
    chosen = None if channels is None else [check_channel_name(name) for name in
                                            ([channels] if isinstance(channels, str) else channels)]
    _Backend(settings, functions, chosen, executor, stop, on_ready).run()


@dataclass
class _Run:
    """One call of a function that was begun here."""

    session: _Session
    run: str
    function: TaskFunction
    future: Future[Outcome] | None = None
    told: int = 0
    ticket: Any = None


class _Session:
    """One registration at the node: a stream of what is to be run, read in a thread of its own."""

    def __init__(self, connection: NodeConnection, body: dict[str, Any], silence_seconds: float,
                 events: queue.SimpleQueue[Any]) -> None:
        self.backend = ""
        self._withdrawal = Withdrawal()
        self._thread = threading.Thread(target=self._read, args=(connection, body, silence_seconds, events),
                                        name="kachery-fast-backend", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Unregister, by closing the connection."""
        self._withdrawal.withdraw()
        self._thread.join(_RETRY_CAP_SECONDS)

    def _read(self, connection: NodeConnection, body: dict[str, Any], silence_seconds: float,
              events: queue.SimpleQueue[Any]) -> None:
        error: KacheryError = NodeNotRunning(url=connection.url, why="it ended")
        try:
            with connection.stream("/api/backend", body, silence_seconds, withdrawal=self._withdrawal) as answer:
                for event in answer.events():
                    events.put(_Said(self, event))
        except KacheryError as failed:
            error = failed
        except (NoAnswer, OSError, ValueError) as failed:  # taken back by another thread in the midst of a line
            logger.debug("the stream from the node broke off: %r", failed)
        events.put(_Lost(self, error))


class _Said(NamedTuple):
    session: _Session
    event: dict[str, Any]


class _Lost(NamedTuple):
    session: _Session
    error: KacheryError


class _Ended(NamedTuple):
    token: str
    future: Future[Outcome]


class _Backend:
    """The state of a backend; all of it belongs to the thread that calls ``run``."""

    def __init__(self, settings: Settings, functions: list[TaskFunction], channels: list[str] | None,
                 executor: Executor | None, stop: threading.Event | None,
                 on_ready: Callable[[list[str]], None] | None) -> None:
        workers = _worker_count(settings, executor)
        self._settings = settings
        self._connection = NodeConnection(settings)
        self._functions = {function.id: function for function in functions}
        self._body = {"channels": channels, "functions": [function.to_dict() for function in functions],
                      "name": _name(), "workers": workers}
        self._foreign = executor
        self._dask = _dask_client(executor)
        self._pool = WorkerPool(workers, functions) if executor is None else None
        self._stop, self._on_ready = stop, on_ready
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._runs: dict[str, _Run] = {}
        self._size_bytes_max = min(settings.task_result_size_bytes_max, settings.api_body_size_bytes_max // 2)
        self._retry_at: float | None = None
        self._retry_seconds = settings.retry_base_seconds
        self._ever_ready = False

    def run(self) -> None:
        """Serve until told to stop.

        :raises KacheryError: the node did not take the functions at the first try.
        """
        with contextlib.ExitStack() as stack:
            if self._pool is not None:
                stack.callback(self._pool.close)
            self._listener = ProgressListener()
            stack.callback(self._listener.close)
            stack.enter_context(_signals(self._events))
            self._session = self._connect()
            stack.callback(lambda: self._session.close())
            # What has ended is told before the node hears that the backend has gone, and breaks its runs off.
            self._reporter = Reporter(self._connection, self._size_bytes_max)
            stack.callback(self._reporter.close)
            while True:
                event = self._next_event()
                if event is _STOP:
                    break
                self._handle(event)
                self._look_around()
        logger.info("the task backend has ended")

    def _next_event(self) -> Any:
        if self._stop is not None and self._stop.is_set():
            return _STOP
        seconds = None if self._stop is None and not self._runs and self._retry_at is None else _TICK_SECONDS
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return None

    def _handle(self, event: Any) -> None:
        if isinstance(event, _Ended):
            self._on_ended(event)
        elif isinstance(event, _Said) and event.session is self._session:
            self._on_said(event.event)
        elif isinstance(event, _Lost) and event.session is self._session:
            self._on_lost(event.error)

    # --- the node

    def _connect(self) -> _Session:
        silence_seconds = self._settings.stall_seconds + _ALIVE_SECONDS
        return _Session(self._connection, self._body, silence_seconds, self._events)

    def _on_said(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind == "registered":
            self._session.backend = str(event.get("backend"))
            self._ever_ready, self._retry_seconds = True, self._settings.retry_base_seconds
            channels = [str(name) for name in event.get("channels") or []]
            logger.info("offering %s on %s", ", ".join(self._functions), ", ".join(channels) or "no channel yet")
            if self._on_ready is not None:
                self._on_ready(channels)
        elif kind == "run":
            self._start(event)
        elif kind == "cancel":
            for token, run in list(self._runs.items()):
                if run.session is self._session and run.run == str(event.get("run")):
                    self._withdraw(token)
        elif kind == "error":
            self._on_lost(KacheryError.from_dict(event))

    def _on_lost(self, error: KacheryError) -> None:
        if not self._ever_ready:
            raise error
        logger.warning("the node is gone (%s); the backend connects again when it is back", error)
        for token, run in list(self._runs.items()):
            # An action is not stopped half-way: what it does may be worse half done. The others run elsewhere.
            if run.function.kind != "action":
                self._withdraw(token)
            self._forget(token)
        self._session.close()
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, _RETRY_CAP_SECONDS)

    # --- runs

    def _start(self, event: dict[str, Any]) -> None:
        function = self._functions.get(str(event.get("function")))
        if function is None:
            told = error_report("LookupError", f"this backend does not offer {event.get('function')!r}")
            self._reporter.report(self._session.backend, str(event.get("run")), "?", Outcome("error", error=told))
            return
        token = secrets.token_hex(16)
        run = self._runs[token] = _Run(self._session, str(event.get("run")), function)
        self._listener.watch(token)
        job = Job(function.id, function.function, function.kind, event.get("kwargs") or {}, token,
                  socket.gethostname(), self._listener.port, str(self._settings.storage_dir), self._size_bytes_max,
                  once=self._dask is not None and function.kind == "action" and not function.idempotent)
        try:
            if self._pool is not None:
                run.future = self._pool.submit(job, function.timeout_seconds)
            elif self._foreign is not None:
                if job.once:
                    run.ticket = leave_ticket(self._dask, token)
                run.future = self._foreign.submit(run_job, job)
        except Exception as error:  # an executor that is broken or shut down
            self._end(token, Outcome("crashed", error=describe_error(error)))
            return
        if run.future is not None:
            run.future.add_done_callback(lambda future: self._events.put(_Ended(token, future)))

    def _withdraw(self, token: str) -> None:
        run = self._runs[token]
        if self._pool is not None:
            self._pool.cancel(token)
        elif run.future is not None:
            # What runs in a foreign executor cannot be stopped; it is as good as gone for whoever asked.
            run.future.cancel()
            self._end(token, Outcome("cancelled"))

    def _on_ended(self, ended: _Ended) -> None:
        run = self._runs.get(ended.token)
        try:
            outcome = ended.future.result()
        except CancelledError:
            outcome = Outcome("cancelled")
        except BaseException as error:
            # Ours comes back as an outcome, so this is of the executor: a job that it could not send, a dead process.
            broken = isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker"
            outcome = Outcome("crashed" if broken else "error", error=describe_error(error))
        if run is None:
            logger.info("a function has ended (%s) that nobody waits for any more", outcome.status)
        else:
            self._end(ended.token, outcome)

    def _end(self, token: str, outcome: Outcome) -> None:
        run = self._runs.get(token)
        if run is not None:
            self._forget(token)
            self._reporter.report(run.session.backend, run.run, run.function.id, outcome)

    def _forget(self, token: str) -> None:
        run = self._runs.pop(token, None)
        if run is not None and run.ticket is not None:
            run.ticket.close()
        self._listener.forget(token)

    # --- what is due by time

    def _look_around(self) -> None:
        now = time.monotonic()
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_at = None
            self._session = self._connect()
        for token, run in list(self._runs.items()):
            if run.future is not None and run.future.done():
                continue  # in time or not, it has ended, and how is told in its turn
            heard = self._listener.latest(token)
            limit = run.function.timeout_seconds
            if self._pool is None and limit and heard.begun_at is not None and now - heard.begun_at > limit:
                # An action may yet succeed there, so it is not said to have failed.
                once = run.function.kind == "action" and not run.function.idempotent
                self._end(token, Outcome("cancelled" if once else "hung", error=error_report(
                    "TimeoutError", f"it did not end within {limit:g} s; the executor may still be at it")))
            elif heard.count > run.told:
                run.told = heard.count
                self._reporter.report(run.session.backend, run.run, run.function.id, heard)


_STOP = object()


@contextmanager
def _signals(events: queue.SimpleQueue[Any]) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM end the backend; a second Ctrl-C breaks off even that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    begun = False

    def end(number: int, frame: object) -> None:
        nonlocal begun
        if begun and number == signal.SIGINT:
            raise KeyboardInterrupt
        begun = True
        events.put(_STOP)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name() -> str:
    """What people see of this backend: the script, and its process."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    return f"{Path(main).stem if main else 'python'}-{os.getpid()}"


def _worker_count(settings: Settings, executor: Executor | None) -> int:
    """How many functions may run at once."""
    if settings.task_workers:
        return settings.task_workers
    count = getattr(executor, "_max_workers", None)
    if isinstance(count, int) and count > 0:
        return count
    client = _dask_client(executor)
    if client is not None:
        return max(1, sum(int(count) for count in client.nthreads().values()))
    return os.cpu_count() or 1


def _dask_client(executor: Executor | None) -> Any:
    """Return the client of Dask behind its executor; None of another one."""
    client = getattr(executor, "_client", None)
    return client if callable(getattr(client, "nthreads", None)) else None
