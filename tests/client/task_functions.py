"""Functions for the tests of workers and backends, in a module that is quick to import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import kachery_fast as kf

calls: list[Any] = []
# What functions in threads of the test wait for; a function that outlives its test would hold these up.
release = threading.Event()
_RELEASE_SECONDS = 60.0


@kf.taskfunction("test/add")
def add(x: Any, y: Any = 1) -> Any:
    return x + y


@kf.taskfunction("test/identity")
def identity(value: Any = None, numpy: str | None = None) -> Any:
    if numpy is not None:
        import numpy as np

        return eval(numpy, {"np": np})
    return value


@kf.taskfunction("test/bytes")
def some_bytes(length: int) -> bytes:
    return bytes(range(256)) * (length // 256) + bytes(length % 256)


@kf.taskfunction("test/unserialisable")
def unserialisable() -> Any:
    return {"stream": lambda: 1}


@kf.taskfunction("test/raise")
def raising(text: str) -> None:
    raise ValueError(text)


@kf.taskfunction("test/die")
def die(how: str) -> None:
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(5)


@kf.taskfunction("test/hang", timeout_seconds=1.0)
def hang(pid_file: str, seconds: float = 1000.0) -> None:
    """Start a program and wait for it; both process ids are told."""
    child = subprocess.Popen(["sleep", str(seconds)])
    part = Path(pid_file + ".part")
    part.write_text(f"{os.getpid()} {child.pid}")
    part.rename(pid_file)
    child.wait()


@kf.taskfunction("test/leave")
def leave(how: str) -> int:
    """Leave a program behind that holds everything open that this process has."""
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(4)


@kf.taskfunction("test/progress")
def progressing(steps: int) -> int:
    for step in range(steps):
        kf.report_progress(step / steps, f"step {step}")
    kf.report_progress(1, "done")
    time.sleep(0.3)
    return steps


@kf.taskfunction("test/pid")
def pid(seconds: float = 0.0) -> int:
    time.sleep(seconds)
    return os.getpid()


@kf.taskfunction("test/act", type="action")
def act(path: str) -> object:
    with open(path, "a") as file:
        file.write("done\n")
    return object()  # which nobody wants


@kf.taskfunction("test/endless")
def endless(pid_file: str) -> None:
    """As ``hang``, without a time limit."""
    hang(pid_file)


@kf.taskfunction("test/until-released")
def until_released() -> None:
    release.wait(_RELEASE_SECONDS)


@kf.taskfunction("test/slow-action", type="action", timeout_seconds=0.2)
def slow_action() -> None:
    release.wait(_RELEASE_SECONDS)


@kf.taskfunction("test/slow-idempotent", type="action", timeout_seconds=0.2, idempotent=True)
def slow_idempotent() -> None:
    release.wait(_RELEASE_SECONDS)


@kf.taskfunction("test/hang-action", type="action")
def slow_act(path: str) -> None:
    time.sleep(2.0)
    Path(path).touch()
