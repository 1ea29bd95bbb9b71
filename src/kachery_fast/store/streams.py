"""Bytes that come from memory or from a stream, not from a file."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from .._core import Digests, FusedSha1, digest_buffer
from ..errors import InvalidArgument
from .disk import TempFile, translated, write_all
from .objects import ObjectWriter, Stored

__all__ = ["StreamWriter", "byte_view", "write_and_digest"]


class StreamWriter:
    """A file being stored piece by piece; nothing is in the store before ``commit``, or after ``abort``."""

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

    def abort(self) -> None:
        """Throw away what was written; does nothing after ``commit``."""
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
