"""What a task backend hears from its functions, and what it tells its node of them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import (
    ClientAuthRefused,
    InvalidArgument,
    KacheryError,
    NodeError,
    NodeNotRunning,
    Stalled,
    TaskUnknown,
)
from ..protocol.task_errors import error_report
from .connection import NodeConnection
from .running import Outcome, encoded

__all__ = ["Heard", "ProgressListener", "Reporter"]

_DATAGRAM_SIZE_BYTES_MAX = 16384
_END_SECONDS = 5.0
# After these the same report may be taken.
_PASSING = (ClientAuthRefused, NodeError, NodeNotRunning, Stalled)
_RETRY_SECONDS_MIN = 0.1
_RETRY_SECONDS_MAX = 5.0

logger = logging.getLogger("kachery_fast.client")


@dataclass
class Heard:
    """What was heard of a running function: when it began (monotonic), how far it is, and how often it spoke."""

    begun_at: float | None = None
    progress: float | None = None
    text: str = ""
    count: int = 0


class ProgressListener:
    """Hears on loopback what ``running.report_progress`` sends. Only the latest is kept, so a function that speaks too
    often costs nobody anything."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind(("127.0.0.1", 0))
        except OSError as error:
            self._socket.close()
            raise NodeError(what=f"this machine has no loopback for the progress of tasks ({error})") from error
        self.port = int(self._socket.getsockname()[1])
        self._lock = threading.Lock()
        self._heard: dict[str, Heard] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="kachery-fast-progress", daemon=True)
        self._thread.start()

    def watch(self, token: str) -> None:
        """Take what comes with this token, which only the function knows."""
        with self._lock:
            self._heard[token] = Heard()

    def forget(self, token: str) -> None:
        """Take nothing more."""
        with self._lock:
            self._heard.pop(token, None)

    def latest(self, token: str) -> Heard:
        """Return what was heard last."""
        with self._lock:
            found = self._heard.get(token, Heard())
            return Heard(found.begun_at, found.progress, found.text, found.count)

    def close(self) -> None:
        """Stop listening."""
        self._closed = True
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join(_END_SECONDS)
        self._socket.close()

    def _listen(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError):
                self._take(self._socket.recv(_DATAGRAM_SIZE_BYTES_MAX))

    def _take(self, data: bytes) -> None:
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            return
        token = message.get("token") if isinstance(message, dict) else None
        with self._lock:
            heard = self._heard.get(token) if isinstance(token, str) else None
            if heard is None:
                return
            heard.count += 1
            if heard.begun_at is None:
                heard.begun_at = time.monotonic()
            progress = message.get("progress")
            if isinstance(progress, int | float) and math.isfinite(progress):
                heard.progress, heard.text = float(progress), str(message.get("text", ""))


class _Report(NamedTuple):
    backend: str
    run: str
    function_id: str
    what: Outcome | Heard


class Reporter:
    """Tells the node how the functions do, one report after the other, in a thread of its own.

    How a run ended is told until the node has taken it, or knows of no such run: whoever asked for it waits for that.
    Told twice, it is taken once. How far a run is may be lost.
    """

    def __init__(self, connection: NodeConnection, size_bytes_max: int) -> None:
        self._connection = connection
        self._size_bytes_max = size_bytes_max
        self._reports: queue.SimpleQueue[_Report | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="kachery-fast-reports", daemon=True)
        self._thread.start()

    def report(self, backend: str, run: str, function_id: str, what: Outcome | Heard) -> None:
        """Tell how a run stands or ended; returns at once."""
        self._reports.put(_Report(backend, run, function_id, what))

    def close(self) -> None:
        """Tell what is still to be told, but not for long."""
        self._reports.put(None)
        self._thread.join(_END_SECONDS)

    def _work(self) -> None:
        left: list[_Report] = []
        pause_seconds, retry_at = _RETRY_SECONDS_MIN, math.inf
        closing = False
        while not closing:
            with contextlib.suppress(queue.Empty):
                report = self._reports.get(timeout=max(0.0, retry_at - time.monotonic()) if left else None)
                closing = report is None
                left += [] if report is None else self._told([report])
            if closing or time.monotonic() >= retry_at:
                left = self._told(left)
                pause_seconds = min(2 * pause_seconds, _RETRY_SECONDS_MAX)
                retry_at = time.monotonic() + pause_seconds
            if not left:
                pause_seconds, retry_at = _RETRY_SECONDS_MIN, math.inf
            elif retry_at == math.inf:
                retry_at = time.monotonic() + pause_seconds

    def _told(self, reports: list[_Report]) -> list[_Report]:
        """Tell the node; return what is to be told once more."""
        return [left for report in reports if (left := self._tell(report)) is not None]

    def _tell(self, report: _Report) -> _Report | None:
        what = report.what
        final = isinstance(what, Outcome)
        try:
            if isinstance(what, Heard):
                self._send(report, {"status": "running", "progress": what.progress, "text": what.text})
                return None
            if what.status == "returned":
                what = encoded(report.function_id, what.value, self._size_bytes_max)
                report = report._replace(what=what)
            self._send_outcome(report, what)
        except TaskUnknown as error:  # its node was started anew, or has taken the report before
            logger.info("the node waits for %s of %r no more: %s", report.run, report.function_id, error)
        except KacheryError as error:
            again = final and isinstance(error, _PASSING)
            logger.warning("the node was not told how %s of %r went%s: %s", report.run, report.function_id,
                           ", and will be" if again else "", error)
            return report if again else None
        except Exception:
            logger.exception("a report of %r failed", report.function_id)
        return None

    def _send_outcome(self, report: _Report, outcome: Outcome) -> None:
        try:
            self._send(report, {"status": outcome.status, "error": outcome.error, "result": outcome.result})
        except InvalidArgument as error:  # the node does not take it: too long, for one
            told = error_report(type(error).__name__, f"The node did not take the result: {error.message}")
            self._send(report, {"status": "error", "error": told})

    def _send(self, report: _Report, what: dict[str, Any]) -> None:
        given = {name: value for name, value in what.items() if value is not None}
        self._connection.call("/api/backend/report", {"backend": report.backend, "run": report.run, **given})
