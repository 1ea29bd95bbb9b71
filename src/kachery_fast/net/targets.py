"""Where a received body goes: memory of the caller, or a part of an open file."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Protocol

from ..errors import DiskError, DiskFull
from ..splice import FileReceiver, FileRefused, copy_span

__all__ = ["FileSpan", "Sink", "Target", "disk_error", "fill", "open_sink", "rest_of", "size_of"]


class FileSpan(NamedTuple):
    """``length`` bytes of the open file ``fd`` from byte ``offset`` on."""

    fd: int
    offset: int
    length: int


_STEP_BYTES = 4 * 1024 * 1024

Target = memoryview | FileSpan
"""A writable, contiguous view of bytes; or a part of a file, which the data enter past this process's memory."""


def size_of(target: Target) -> int:
    """How many bytes fit."""
    return target.length if isinstance(target, FileSpan) else len(target)


def rest_of(target: Target, start: int) -> Target:
    """What is left of a target behind its first ``start`` bytes."""
    if isinstance(target, FileSpan):
        return FileSpan(target.fd, target.offset + start, target.length - start)
    return target[start:]


class Sink(Protocol):
    """A target being filled from a socket; offsets count from the target's start."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...

    def write(self, data: bytes | bytearray, at: int) -> None:
        """Put bytes that were received by another way."""

    def move(self, at: int, limit_bytes: int) -> int:
        """Wait for bytes and put at most ``limit_bytes`` of them; 0 when the server closed."""


def open_sink(target: Target, sock: socket.socket) -> Sink:
    """Fill ``target`` from ``sock``, in this thread."""
    return _FileSink(target, sock) if isinstance(target, FileSpan) else _MemorySink(target, sock)


def fill(target: Target, fd: int, offset: int, progress: Callable[[int], None] | None = None) -> int:
    """Fill a target from an open file, from byte ``offset`` on; return how many bytes there were.

    :raises OSError: the file cannot be read. :raises FileRefused: the target is a file and refused them.
    """
    done, size = 0, size_of(target)
    while done < size:
        step = min(size - done, _STEP_BYTES)
        if isinstance(target, FileSpan):
            count = copy_span(fd, offset + done, target.fd, target.offset + done, step)
        else:
            count = os.preadv(fd, [target[done:done + step]], offset + done)
        if not count:
            break
        done += count
        if progress is not None:
            progress(count)
    return done


def disk_error(refused: FileRefused, target: Target, name: str) -> DiskError | DiskFull:
    """What it means that the file refused bytes of the object ``name``."""
    path = "the file it is received into"
    if isinstance(target, FileSpan) and refused.error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = os.fstatvfs(target.fd)
        return DiskFull(what=name, path=path, free=room.f_bavail * room.f_frsize, needed=target.length)
    return DiskError(action=f"writing {name} to", path=path, why=refused.error.strerror)


class _MemorySink:
    def __init__(self, memory: memoryview, sock: socket.socket) -> None:
        self._memory = memory
        self._sock = sock

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def write(self, data: bytes | bytearray, at: int) -> None:
        self._memory[at:at + len(data)] = data

    def move(self, at: int, limit_bytes: int) -> int:
        return self._sock.recv_into(self._memory[at:at + limit_bytes])


class _FileSink:
    def __init__(self, span: FileSpan, sock: socket.socket) -> None:
        self._span = span
        self._receiver = FileReceiver(sock, span.fd)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._receiver.close()

    def write(self, data: bytes | bytearray, at: int) -> None:
        self._receiver.write(data, self._span.offset + at)

    def move(self, at: int, limit_bytes: int) -> int:
        return self._receiver.move(self._span.offset + at, min(limit_bytes, self._span.length - at))
