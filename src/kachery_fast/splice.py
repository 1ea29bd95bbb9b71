"""From a socket, or another file, into a file, past the memory of the process where the system can.

Linux's ``splice`` hands a socket's pages to a pipe and copies them from there into the page cache: one copy, no page
faults. Receiving 1 GiB in 20 MiB objects on loopback took 0.33 CPU seconds so, 0.6 by ``recv`` into a mapping of the
same file, and 0.6 by ``recv`` and ``pwrite`` (two copies), which is what other systems and TLS do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import ssl
import sys
from contextlib import suppress

__all__ = ["FileReceiver", "FileRefused", "copy_span", "write_at"]

_PIPE_BYTES = 1024 * 1024
_BUFFER_BYTES = 256 * 1024
_F_SETPIPE_SZ = 1031  # fcntl.h of Linux; in the module fcntl since Python 3.10 on some builds only


class FileRefused(Exception):
    """The file, not the socket, failed; ``error`` is the system's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class FileReceiver:
    """Moves what arrives on ``sock`` to offsets of the open file ``fd``; the file's position is not used.

    The socket's own time-out bounds each wait. Used by one thread, and closed by it.

    :param use_splice: None: where possible.
    """

    def __init__(self, sock: socket.socket, fd: int, *, use_splice: bool | None = None) -> None:
        self._sock = sock
        self._fd = fd
        self._pipe: tuple[int, int] | None = None
        self._buffer: memoryview | None = None
        can = sys.platform == "linux" and not isinstance(sock, ssl.SSLSocket)
        self._use_splice = can if use_splice is None else can and use_splice

    def __enter__(self) -> FileReceiver:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def move(self, offset: int, limit_bytes: int) -> int:
        """Wait for bytes and write at least one and at most ``limit_bytes`` of them at ``offset``.

        :returns: how many; 0 when the other side closed.
        :raises TimeoutError: none came in time. :raises OSError: the socket failed. :raises FileRefused: the file did.
        """
        return self._splice(offset, limit_bytes) if self._use_splice else self._copy(offset, limit_bytes)

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write bytes that came by another way. :raises FileRefused:"""
        write_at(self._fd, data, offset)

    def close(self) -> None:
        """Give the pipe back; the socket and the file stay open."""
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def _copy(self, offset: int, limit_bytes: int) -> int:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        count = self._sock.recv_into(self._buffer[:limit_bytes])
        self.write(self._buffer[:count], offset)
        return count

    def _splice(self, offset: int, limit_bytes: int) -> int:
        pipe = self._pipe or self._open_pipe()
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        timeout = self._sock.gettimeout()
        while True:
            if not poller.poll(None if timeout is None else timeout * 1000):
                raise TimeoutError("timed out")
            with suppress(BlockingIOError):
                moved = _system_splice(self._sock.fileno(), pipe[1], min(limit_bytes, _PIPE_BYTES))
                break
        done = 0
        while done < moved:
            try:
                done += _system_splice(pipe[0], self._fd, moved - done, offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise FileRefused(error) from error
                # This file system takes no splice: what is in the pipe, and all that follows, is copied.
                self._use_splice = False
                data = os.read(pipe[0], moved - done)
                self.write(data, offset + done)
                done += len(data)
        return moved

    def _open_pipe(self) -> tuple[int, int]:
        self._pipe = os.pipe()
        with suppress(OSError):  # above the user's allowance a pipe stays at 64 KiB
            fcntl.fcntl(self._pipe[1], _F_SETPIPE_SZ, _PIPE_BYTES)
        return self._pipe


def write_at(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of ``data`` at an offset of an open file. :raises FileRefused:"""
    view = memoryview(data)
    try:
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
    except OSError as error:
        raise FileRefused(error) from error


def copy_span(source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
    """Copy bytes between two open files, by ``copy_file_range`` where the system can: within a file system it may share
    the blocks, or have a file server copy them.

    :returns: how many; less than ``length`` when the source ends. :raises OSError: the source cannot be read.
    :raises FileRefused: the target took no more.
    """
    done = 0
    # What it cannot do between these two files, as between file systems, is done below; or it is told there which of
    # them failed.
    with suppress(OSError):
        while sys.platform == "linux" and done < length:
            count = os.copy_file_range(source, target, length - done, source_offset + done, target_offset + done)
            if not count:
                break
            done += count
    while done < length:
        data = os.pread(source, min(_PIPE_BYTES, length - done), source_offset + done)
        if not data:
            break
        write_at(target, data, target_offset + done)
        done += len(data)
    return done


def _system_splice(source: int, target: int, count: int, target_offset: int | None = None) -> int:
    if sys.platform == "linux":
        return os.splice(source, target, count, offset_dst=target_offset)
    raise AssertionError("only Linux has splice")
