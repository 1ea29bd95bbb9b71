"""Bytes that come from memory or from a stream, not from a file."""

from __future__ import annotations

import errno
import os
import threading
from types import TracebackType
from typing import Any

from .._chunker import begin_writeback
from .._core import Digests, FusedSha1, digest_buffer
from ..errors import CorruptFile, InvalidArgument, KacheryError
from ..protocol.manifest import make_manifest
from .disk import TempFile, disk_error, translated, write_all
from .downloads import adopt
from .objects import Located, ObjectWriter, Stored

__all__ = ["IncomingFile", "StreamWriter", "byte_view", "write_and_digest"]

# What is hashed at a time: it is still in the processor's cache when it is read, and the turn costs little.
_HASH_SPAN_BYTES = 1024 * 1024


class StreamWriter:
    """A file being stored piece by piece; nothing is in the store before ``commit`` or ``adopt``."""

    def __init__(self, writer: ObjectWriter) -> None:
        self._writer = writer
        self._stream = FusedSha1(writer.chunk_size_bytes)
        self._temp: TempFile | None = writer.temp()
        self.size = 0

    def write(self, buffer: Any) -> None:
        """Take the next bytes, any C-contiguous buffer; it may be changed when this returns.

        :raises DiskFull, DiskError: they cannot be written; only ``abort`` is possible then.
        :raises InvalidArgument: not a buffer, or the stream is at its end.
        """
        view = byte_view(buffer)
        temp = self._open_temp()
        with translated("writing", temp.path, needed=view.nbytes):
            write_all(temp.fd, view)
        self._stream.update(view)
        self.size += view.nbytes

    def commit(self) -> Stored:
        """End the stream, and store it.

        :raises DiskFull, DiskError: it was not stored.
        """
        temp = self._open_temp()
        try:
            return self._writer.finish(temp, self._stream.finish())
        finally:
            self.abort()

    def adopt(self, sha1: str, *, source: str, advice: str) -> Located:
        """End the stream, and make it the file ``sha1``: a cached copy, unless the file was stored here meanwhile.

        :param source, advice: what it was received from, and what to do when it is damaged, for the error.
        :raises CorruptFile: its bytes have another name; nothing was stored.
        :raises DiskFull, DiskError: it was not stored.
        """
        temp = self._open_temp()
        try:
            digests = self._stream.finish()
            if digests.sha1 != sha1:
                raise CorruptFile(path=source, found=digests.sha1, sha1=sha1, advice=advice)
            manifest = None
            if len(digests.chunk_sha1s) > 1:
                manifest = make_manifest(digests.size, sha1, digests.chunk_sha1s,
                                         self._writer.chunk_size_bytes).encode()
            return adopt(self._writer, temp.path, sha1, manifest)
        finally:
            self.abort()

    def abort(self) -> None:
        """Throw away what was written; does nothing after ``commit`` or ``adopt``."""
        if self._temp is not None:
            self._temp.discard()
            self._temp = None

    def _open_temp(self) -> TempFile:
        if self._temp is None:
            raise InvalidArgument(what="This stream has ended; begin another.")
        return self._temp

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.abort()


class IncomingFile:
    """A file being stored whose bytes somebody else writes to ``fd``, while a thread hashes what has arrived.

    :param size_bytes: its length. :raises DiskFull, DiskError: it cannot be begun.
    """

    def __init__(self, writer: ObjectWriter, size_bytes: int) -> None:
        self._writer = writer
        self._size = size_bytes
        self._stream = FusedSha1(writer.chunk_size_bytes)
        self._temp = writer.temp()
        self._changed = threading.Condition()
        self._arrived = 0
        self._ended = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._hash, name="kachery-store-hash")
        self._thread.start()

    @property
    def fd(self) -> int:
        """The descriptor to write to, each byte at its own position."""
        return self._temp.fd

    def arrived(self, end: int) -> None:
        """All bytes before ``end`` were written."""
        with self._changed:
            self._arrived = end
            self._changed.notify()

    def commit(self) -> Stored:
        """Store the file, all of whose bytes have arrived.

        :raises DiskFull, DiskError: it was not stored.
        """
        self._end()
        with translated("reading", self._temp.path):
            if self._failure is not None:
                raise self._failure
        return self._writer.finish(self._temp, self._stream.finish())

    def error_of(self, error: OSError) -> KacheryError:
        """Return the project's error for one of who writes."""
        return disk_error(error, "writing", self._temp.path, needed=self._size)

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _wait_beyond(self, position: int) -> int:
        """Return how far the bytes have arrived, once that is worth a turn; ``position`` itself when it has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._arrived == self._size
                                   or self._arrived - position >= _HASH_SPAN_BYTES)
            return position if self._ended and self._arrived < self._size else self._arrived

    def _hash(self) -> None:
        buffer = memoryview(bytearray(_HASH_SPAN_BYTES))
        position = 0
        try:
            while position < self._size:
                begun, end = position, self._wait_beyond(position)
                if end == begun:
                    return  # it is given up
                while position < end:
                    count = os.preadv(self._temp.fd, [buffer[:end - position]], position)
                    if not count:
                        raise OSError(errno.EIO, "it is shorter than what was written to it")
                    self._stream.update(buffer[:count])
                    position += count
                if self._writer.durable:
                    begin_writeback(self._temp.fd, begun, position - begun)
        except BaseException as failure:
            self._failure = failure

    def __enter__(self) -> IncomingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._end()
        self._temp.discard()


def byte_view(buffer: Any) -> memoryview:
    """Return the bytes of a buffer without copying them.

    :raises InvalidArgument: it has none, or they are not contiguous, or are addresses of Python objects.
    """
    try:
        view = memoryview(buffer)
        if "O" in view.format.replace("Zd", ""):
            raise InvalidArgument(what="An array of Python objects has no bytes of its own; pickle it instead.")
        if view.nbytes == 0:
            return memoryview(b"")
        return view.cast("B")
    except TypeError as error:
        if not isinstance(buffer, memoryview) and not hasattr(buffer, "__array_interface__"):
            raise InvalidArgument(what=f"{type(buffer).__name__} has no bytes to store ({error}).") from None
    except ValueError:
        pass
    # Big-endian, structured and time arrays have bytes too, but memoryview cannot say so.
    import numpy

    try:
        return numpy.frombuffer(buffer, dtype=numpy.uint8).data
    except (ValueError, TypeError, BufferError) as error:
        raise InvalidArgument(what=f"Its bytes do not lie one after the other ({error}); copy it with "
                                   "numpy.ascontiguousarray first.") from None


def write_and_digest(temp: TempFile, view: memoryview, chunk_size_bytes: int) -> Digests:
    """Write ``view`` on a second thread while this one hashes it.

    :raises DiskFull, DiskError: writing failed.
    """
    stop = threading.Event()
    failures: list[OSError] = []

    def write() -> None:
        try:
            write_all(temp.fd, view, stop)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=write, name="kachery-store-write")
    thread.start()
    try:
        digests = digest_buffer(view, chunk_size_bytes)
    except BaseException:
        stop.set()
        raise
    finally:
        thread.join()
    with translated("writing", temp.path, needed=view.nbytes):
        for failure in failures:
            raise failure
    return digests
