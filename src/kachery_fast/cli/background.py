"""Starting a program of ours in the background, and knowing that it runs."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DiskError, KacheryError, NodeError

__all__ = ["interruptions_held", "log_tail", "start_detached"]

_POLL_SECONDS = 0.05
_TAIL_SIZE_BYTES = 2000
# Who waits is told that often what goes on.
_TELL_SECONDS = 10.0


@contextmanager
def interruptions_held() -> Iterator[None]:
    """Hold Ctrl-C and the like until this has ended, for ``process = Popen(...)``: raised between the start of a
    process and the assignment, an interruption would leave a process that nobody knows of.

    Signals that are ignored or end this process are left alone, so that the new process inherits that.
    """
    held: list[int] = []

    def hold(number: int, frame: Any) -> None:
        held.append(number)

    former: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():  # where handlers run, and may be set
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if callable(handler := signal.getsignal(number)):
                    former[number] = handler
                    signal.signal(number, hold)
        yield
    finally:
        for changed, handler in former.items():
            signal.signal(changed, handler)
    for came in held:
        signal.raise_signal(came)


def start_detached(argv: Sequence[str], log_path: Path, ready: Callable[[], bool], timeout_seconds: float = 30.0,
                   *, environ: dict[str, str] | None = None, progress: str = "",
                   tell: Callable[[str], None] = lambda text: None,
                   failed: Callable[[str], KacheryError] = lambda why: NodeError(what=why)) -> int:
    """Start ``argv`` in a session of its own, its output appended to ``log_path``, and wait until it is ready.

    :param ready: asked again and again; a program that serves answers True once it does.
    :param timeout_seconds: how long to wait, from the start or from the last sign of progress.
    :param environ: its environment; this process's own when None.
    :param progress: a text that is in a line of the log whenever a long start has come further.
    :param tell: called with the end of the log at such lines, but not at each.
    :param failed: the error, given why, that it ended before it was ready, or was not ready in time and was ended.
    :return: its process id. It lives on when this process ends.
    :raises NodeError: by default, as of ``failed``; the error shows the end of its log.
    :raises DiskError: the log cannot be written.
    """
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = log_path.open("ab")
    except OSError as error:
        raise DiskError(action="the writing", path=log_path, why=error.strerror) from error
    process: subprocess.Popen[bytes] | None = None
    try:
        with log, interruptions_held():
            begin = log.tell()
            process = subprocess.Popen(  # noqa: S603 - our own program
                list(argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
                env=environ, close_fds=True)
        why = _wait(process, ready, timeout_seconds, log_path, begin, progress.encode(), tell)
        if why:
            raise failed(why)
    except BaseException:
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        raise
    process.returncode = 0  # it is meant to outlive this process; Popen would warn of that
    return process.pid


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], bool], timeout_seconds: float, log_path: Path,
          begin: int, progress: bytes, tell: Callable[[str], None]) -> str:
    """Wait until it is ready; return what is wrong, "" when it is."""
    now, position = time.monotonic(), begin
    end, tell_at = now + timeout_seconds, now + _TELL_SECONDS
    while True:
        code = process.poll()
        if code is not None:
            return f"it ended at once, with exit code {code}. {log_tail(log_path, begin)}"
        if ready():
            return ""
        now = time.monotonic()
        if progress:
            lines = _whole_lines(log_path, position)
            position += len(lines)
            if progress in lines:
                end = now + timeout_seconds
                if now >= tell_at:
                    tell_at = now + _TELL_SECONDS
                    tell(f"It still starts. {log_tail(log_path, begin, 1)}")
        if now > end:
            return f"it was not ready after {timeout_seconds:g} s and was ended. {log_tail(log_path, begin)}"
        time.sleep(_POLL_SECONDS)


def _whole_lines(log_path: Path, position: int) -> bytes:
    """Return what was logged from a byte on, up to the last end of a line."""
    try:
        with log_path.open("rb") as log:
            log.seek(position)
            data = log.read()
    except OSError:
        return b""
    return data[:data.rfind(b"\n") + 1]


def log_tail(log_path: Path, begin: int = 0, lines_max: int = 5) -> str:
    """Return a sentence with the last lines of a log, none older than byte ``begin``, and where to find it."""
    try:
        size = log_path.stat().st_size
        with log_path.open("rb") as log:
            log.seek(max(begin, size - _TAIL_SIZE_BYTES))
            lines = log.read(_TAIL_SIZE_BYTES).decode("utf-8", "replace").strip().splitlines()
    except OSError as error:
        return f"Its log {log_path} cannot be read ({error.strerror})."
    if not lines:
        return f"Its log {log_path} is empty."
    return f"Its log {log_path} ends with: " + " | ".join(line.strip() for line in lines[-lines_max:])
