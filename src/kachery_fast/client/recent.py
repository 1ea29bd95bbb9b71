"""What the last direct reads of this process found: a file that is read part by part is asked for once, not each time.

A reader such as fsspec takes blocks of some MiB out of chunks of 20 MiB. Bounded: some files, for a minute, and the
last chunks, which are verified, so that their age does not matter.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from ..protocol.manifest import Chunk, Manifest

__all__ = ["Found", "Recent"]

_FILES_MAX = 16
_FILE_SECONDS = 60.0
# Three chunks: two that a block straddles, and one that comes in meanwhile.
_CHUNKS_SIZE_BYTES_MAX = 64 * 1024 * 1024


class Found(NamedTuple):
    """Where a file is, and how long: ``bucket_url``, ``size`` in bytes, and the ``chunks`` of ``manifest``, if any."""

    bucket_url: str
    manifest: Manifest | None
    size: int
    chunks: tuple[Chunk, ...]


class _Kept(NamedTuple):
    size: int
    data: Future[bytes]


class Recent:
    """Shared by the threads of a process. A forked one begins with nothing: it has none of the threads that fetch.

    :param clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.clear()
        os.register_at_fork(after_in_child=self.clear)

    def clear(self) -> None:
        """Forget everything."""
        self._lock = threading.Lock()
        self._files: OrderedDict[object, tuple[float, Found]] = OrderedDict()
        self._chunks: OrderedDict[object, _Kept] = OrderedDict()

    def find(self, file: object) -> Found | None:
        """Return what was found of a file in the last minute."""
        with self._lock:
            until, found = self._files.get(file, (0.0, None))
            return found if self._clock() < until else None

    def note(self, file: object, found: Found) -> None:
        """Keep what was found of a file."""
        with self._lock:
            self._files[file] = (self._clock() + _FILE_SECONDS, found)
            self._files.move_to_end(file)
            if len(self._files) > _FILES_MAX:
                self._files.popitem(last=False)

    def forget(self, file: object) -> None:
        """Drop what was found of a file: it is not so any more."""
        with self._lock:
            self._files.pop(file, None)

    def chunk(self, name: object, size: int, fetch: Callable[[], Future[bytes]]) -> tuple[Future[bytes], bool]:
        """Return what has the bytes of a chunk, or will have them, and whether ``fetch`` was called to get them.

        What another thread fetches may fail with that thread, which may have been told to stop. Then call this again.
        """
        with self._lock:
            kept = self._chunks.get(name)
            if kept is not None and not _has_failed(kept.data):
                self._chunks.move_to_end(name)
                return kept.data, False
            data = fetch()
            self._chunks[name] = _Kept(size, data)
            self._chunks.move_to_end(name)
            total = sum(one.size for one in self._chunks.values())
            while total > _CHUNKS_SIZE_BYTES_MAX and len(self._chunks) > 1:
                total -= self._chunks.popitem(last=False)[1].size
            return data, True


def _has_failed(data: Future[bytes]) -> bool:
    return data.cancelled() or (data.done() and data.exception() is not None)
