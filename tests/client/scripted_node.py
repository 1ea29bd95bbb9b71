"""A node by the book (node/backend_api.py), that says what a test wants said, also what a sound node never says."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kachery_fast.errors import KacheryError

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

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/api/backend":
                    node._serve(self, body)
                    return
                error = node.refuse_report(body)
                node.answer(self, {} if error is None else error.to_dict(), 200 if error is None else error.http_status)
                node.reports.put(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

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
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, content: dict[str, Any], status: int) -> None:
        data = json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        error = self.refuse_backend
        if error is not None:
            self.registered.put({})
            self.answer(handler, error.to_dict(), error.http_status)
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
