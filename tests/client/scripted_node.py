"""A node by the book (node/backend_api.py), that says what a test wants said, also what a sound node never says."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kachery_fast.errors import KacheryError
from tests.http_server import Handler, HttpServer

CODE = "c0de"
CLOSE = object()


class ScriptedNode:
    """Registers backends, tells them the lines of ``tell``, and keeps their reports."""

    def __init__(self, storage_dir: Path) -> None:
        storage_dir.mkdir(parents=True, exist_ok=True)
        (storage_dir / "client-auth").write_text(CODE)
        self.registered: queue.Queue[dict[str, Any]] = queue.Queue()
        self.reports: queue.Queue[dict[str, Any]] = queue.Queue()
        self.gone = threading.Semaphore(0)
        self.refuse_backend: KacheryError | None = None
        self.refuse_report: Callable[[dict[str, Any]], KacheryError | None] = lambda report: None
        self._lines: queue.Queue[Any] = queue.Queue()
        node = self

        class Requests(Handler):
            def post(self) -> None:
                body = self.body()
                if self.path == "/api/backend":
                    node._serve(self, body)
                    return
                error = node.refuse_report(body)
                self.answer({} if error is None else error.to_dict(), 200 if error is None else error.http_status)
                node.reports.put(body)

        self._server = HttpServer(Requests)
        self.port = self._server.port

    def tell(self, line: Any) -> None:
        """Send a line to the backend; ``CLOSE`` closes its connection."""
        self._lines.put(line)

    def run(self, run: str, function: str, kind: str = "pure-calculation", **kwargs: Any) -> None:
        """Have the backend call a function."""
        self.tell({"type": "run", "run": run, "task": "t" + run, "function": function, "kind": kind, "kwargs": kwargs,
                   "channel": "lab"})

    def ended(self, timeout_seconds: float = 60) -> dict[str, Any]:
        """The next report that is not of progress."""
        while True:
            report = self.reports.get(timeout=timeout_seconds)
            if report["status"] != "running":
                return report

    def close(self) -> None:
        self.tell(CLOSE)
        self._server.close()

    def _serve(self, handler: Handler, body: dict[str, Any]) -> None:
        error = self.refuse_backend
        if error is not None:
            self.registered.put({})
            handler.answer(error.to_dict(), error.http_status)
            return
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        line: Any = {"type": "registered", "backend": f"b{self.registered.unfinished_tasks}", "channels": ["lab"]}
        self.registered.put(body)
        try:
            while line is not CLOSE:
                handler.wfile.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
                handler.wfile.flush()
                try:
                    line = self._lines.get(timeout=0.05)
                except queue.Empty:
                    line = {"type": "alive"}
        except OSError:
            pass
        finally:
            self.gone.release()
