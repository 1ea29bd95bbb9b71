"""The partial file of one download: received into, verified, and at last adopted by the store.

Everything here blocks on the disk and runs in threads; ``transfer`` awaits it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from .._chunker import ChunkMemory, ChunkSpan, Reassembly
from ..errors import AlreadyExists, KacheryError
from ..protocol.manifest import Chunk, Manifest
from .disk import check_room, translated
from .files import FileStore
from .objects import Located

__all__ = ["Destination"]


class Destination:
    """Where the chunks of ``sha1`` are put together.

    :param whole: the whole file is wanted, so room for all of it is reserved at once.
    :raises AlreadyExists: another program is at it.
    """

    def __init__(self, store: FileStore, sha1: str, manifest: Manifest | None, chunks: tuple[Chunk, ...], size: int, *,
                 whole: bool) -> None:
        self._store, self._sha1, self._manifest, self._chunks = store, sha1, manifest, chunks
        self._path = store.part_path(sha1)
        self._lock_fd = -1
        self._size = size
        self._checked: set[int] = set()
        self._lock = threading.Lock()
        self.was_there = self._path.exists()
        try:
            with self._translated():
                present = self._path.stat().st_blocks * 512 if self.was_there else 0
                if whole:
                    check_room(self._path.parent, size - present)
                self._reassembly = Reassembly(
                    str(self._path), size, [(chunk.start, chunk.end) for chunk in chunks],
                    [chunk.sha1 for chunk in chunks], reserve=whole)
            self._lock_fd = self._locked()
        except AlreadyExists:
            self._reassembly.close()
            raise
        except KacheryError:
            if not self.was_there:
                with suppress(KacheryError):  # a full disk is the news, not what it does not let go of
                    self.remove()
            raise

    def _locked(self) -> int:
        """Lock the partial file and return the descriptor that holds the lock: two that wrote into one file could
        damage what the other has verified. The system drops the lock with the process.
        """
        with self._translated():
            fd = os.open(self._path, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), self._path.stat()):  # not adopted by the other meanwhile
                    return fd
            except (BlockingIOError, FileNotFoundError):
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
        raise AlreadyExists(what=f"A download of sha1://{self._sha1} by another program",
                            advice="Wait until it has ended, and try again.")

    def _unlock(self) -> None:
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    @property
    def next_index(self) -> int:
        """How many chunks the in-order pass has verified."""
        return self._reassembly.next_index

    def recover(self, stop: Callable[[], bool]) -> list[int]:
        """Verify what a former attempt left, and return the sound chunks; ``stop`` is asked between chunks."""
        good: list[int] = []
        if not self.was_there:
            return good
        in_order = True
        for index in range(len(self._chunks)):
            if stop():
                break
            if not self._reassembly.has_data(index):
                in_order = False
                continue
            in_order = in_order and self.verify_next()
            if in_order or self.verify_chunk(index):
                good.append(index)
            self._checked.add(index)
        return good

    def has_sound_chunk(self, index: int) -> bool:
        """Whether a former attempt left this chunk whole; looked at once for each chunk."""
        with self._lock:
            if not self.was_there or index in self._checked:
                return False
            self._checked.add(index)
        return self._reassembly.has_data(index) and self.verify_chunk(index)

    def open_chunk(self, index: int) -> ChunkMemory:
        """Return the memory that a chunk is received into.

        :raises DiskFull, DiskError: there is no room, or the file cannot be mapped.
        """
        self._checked.add(index)
        with self._translated():
            return self._reassembly.open_chunk(index)

    def open_span(self, index: int) -> ChunkSpan:
        """Return the part of the file that a chunk is received into past this process's memory.

        :raises DiskFull, DiskError: there is no room.
        """
        self._checked.add(index)
        with self._translated():
            return self._reassembly.open_span(index)

    def close_chunk(self, place: ChunkMemory | ChunkSpan) -> None:
        """Hand a chunk's place back. :raises DiskFull, DiskError: the bytes could not be written."""
        with self._translated():
            place.close()

    def verify_next(self) -> bool:
        """Run the in-order pass over the next chunk. :raises DiskError: it cannot be read."""
        with self._translated():
            index = self._reassembly.next_index
            if not self._reassembly.verify_next():
                return False
            if self._store.durable:
                self._reassembly.begin_writeback(index)
            return True

    def verify_chunk(self, index: int) -> bool:
        """Verify one chunk by itself. :raises DiskError: it cannot be read."""
        with self._translated():
            return self._reassembly.verify_chunk(index)

    def digest_of(self, index: int) -> str:
        """Return the SHA-1 that a damaged chunk has, as evidence."""
        chunk = self._chunks[index]
        return hashlib.sha1(self.read(chunk.start, chunk.end), usedforsecurity=False).hexdigest()

    def whole_sha1(self) -> str:
        """Return the SHA-1 of the whole, once the in-order pass is through."""
        return self._reassembly.whole_sha1()

    def read(self, start: int, end: int) -> bytes:
        """Return bytes that were verified. :raises DiskError: they cannot be read."""
        with self._translated():
            return self._reassembly.read(start, end)

    def adopt(self) -> Located:
        """Make the verified whole a file of the store. What is read here still works until ``close``.

        :raises DiskFull, DiskError: it could not be renamed, or its manifest not be written.
        """
        manifest = self._manifest.encode() if self._manifest is not None and len(self._chunks) > 1 else None
        return self._store.adopt(self._path, self._sha1, manifest=manifest)

    def close(self, *, keep: bool) -> None:
        """Let go of the partial file; ``keep`` it for a later resume, or remove it.

        :raises DiskError: it cannot be removed.
        """
        self._reassembly.close()
        self._unlock()
        if not keep:
            self.remove()

    def remove(self) -> None:
        """Remove the partial file, if it is not adopted; who still reads it can go on. :raises DiskError:"""
        self._store.drop_part(self._sha1)
        self._unlock()

    def _translated(self) -> AbstractContextManager[None]:
        return translated("download into", self._path, needed=self._size)
