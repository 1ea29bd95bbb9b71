"""What the system tests of tasks share: a backend's script as a user writes it, and processes that run it."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kachery_fast.cli.lab import LabNode

ALL = ["requestFiles", "provideFiles", "requestTasks", "provideTasks"]

# All on the top level, without a guard: it is not read again in the worker processes.
FUNCTIONS = '''
import os, signal, sys, time
from pathlib import Path
import numpy as np
import kachery_fast as kf

OFFSET = 100

def note(log):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")

@kf.taskfunction("lab/square")
def square(x, log):
    note(log)
    return {"square": x * x, "offset": OFFSET}

@kf.taskfunction("lab/slow-square")
def slow_square(x, log):
    note(log)
    time.sleep(1.0)
    return x * x

@kf.taskfunction("lab/array")
def array(n):
    return np.arange(float(n)).reshape(-1, 2)

@kf.taskfunction("lab/bytes")
def some_bytes(n):
    return bytes(range(256)) * (n // 256)

@kf.taskfunction("lab/list")
def long_list(n):
    return {"values": list(range(n))}

@kf.taskfunction("lab/text")
def long_text(n):
    return "é" * n

@kf.taskfunction("lab/now", type="query")
def now(log):
    note(log)
    return time.time()

@kf.taskfunction("lab/act", type="action")
def act(log, seconds=0.0, fail=False):
    note(log)
    time.sleep(seconds)
    if fail:
        raise RuntimeError("the valve is stuck")

@kf.taskfunction("lab/wait")
def wait(started, end):
    Path(started).write_text(str(os.getpid()))
    for step in range(6000):
        kf.report_progress(min(step / 100, 0.5), "waiting for the end")
        if Path(end).exists():
            return "done"
        time.sleep(0.02)
    raise TimeoutError("nobody ended it")

@kf.taskfunction("lab/fail")
def fail(how):
    if how == "raise":
        raise ValueError("no spikes in 7")
    if how == "unserialisable":
        return {"a": [lambda: 1]}
    if how == "nan":
        return float("nan")
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit("bye")

@kf.taskfunction("lab/hang", timeout_seconds=1.0)
def hang():
    time.sleep(1000)
'''

RUN = '''
kf.run_task_backend(channels={channels!r}, on_ready=lambda channels: print("ready", *channels, flush=True), **{more})
print("ended", flush=True)
'''


class Backend:
    """A process that runs a backend at a node; ``lines`` is what it has printed."""

    def __init__(self, node: LabNode, command: list[str], directory: Path, stdin: str | None = None) -> None:
        self.process = subprocess.Popen(command, env=node.environ, cwd=directory, text=True, stdout=subprocess.PIPE,
                                        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE)
        if stdin is not None:
            assert self.process.stdin is not None
            self.process.stdin.write(stdin)
            self.process.stdin.flush()
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def wait_for(self, begin: str) -> str:
        """Wait for a line that begins so, and return it."""
        while not (line := self.lines.get(timeout=60)).startswith(begin):
            assert line, "it has ended"
        return line

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal, and return its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            self._thread.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.put(line.rstrip("\n"))
        self.lines.put("")


@contextmanager
def backend(node: LabNode, directory: Path, *, functions: str = FUNCTIONS, channels: list[str] | None = None,
            more: str = "{}") -> Iterator[Backend]:
    """Run a script with these functions until the block ends; then it must end well."""
    directory.mkdir(parents=True, exist_ok=True)
    script = directory / f"functions_at_{node.name}.py"
    script.write_text(functions + RUN.format(channels=channels, more=more))
    running = Backend(node, [sys.executable, "-W", "error", str(script)], directory)
    try:
        running.wait_for("ready")
        yield running
    except BaseException:
        running.end(signal.SIGKILL)
        raise
    assert running.end() in (0, -signal.SIGKILL)


def be(monkeypatch: pytest.MonkeyPatch, node: LabNode) -> None:
    """Make this process a client of ``node``."""
    for name, value in node.environ.items():
        if name.startswith("KACHERY_"):
            monkeypatch.setenv(name, value)


def count(log: Path) -> int:
    """How often a function has noted its call."""
    return len(log.read_text().splitlines()) if log.exists() else 0
