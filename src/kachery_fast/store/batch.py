"""Storing many small files at once.

An ``fsync`` for each of ten thousand files takes minutes on a disk; one ``syncfs`` for all of them takes about as long
as one. So the files of a batch are written under temporary names, flushed together, and only then renamed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .._core import Digests, digest_buffer
from ..errors import FileChanged, KacheryError
from .disk import (
    SourceFile,
    display,
    make_directories,
    rename_into,
    source_errors,
    sync_file_system,
    translated,
    write_all,
)
from .leftovers import BATCH_SUFFIX
from .objects import ObjectWriter, Stored

__all__ = ["put_many", "read_source"]

# Larger files are worth a flush of their own, and a copy by the two threads of the native core.
SMALL_SIZE_BYTES_MAX = 1024 * 1024
# What a crash can lose, and what waits in the page cache for one flush.
BATCH_FILES_MAX = 4096
BATCH_SIZE_BYTES_MAX = 256 * 1024 * 1024

SomePath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Result = Stored | KacheryError


def put_many(
    writer: ObjectWriter,
    paths: Sequence[SomePath],
    put_one: Callable[[SomePath], Stored],
    on_done: Callable[[SomePath, Result], None] | None,
) -> list[Result]:
    """Store each of ``paths``; the answers stand in their order, an error in the place of a file that failed.

    :param put_one: stores one large file.
    :param on_done: called with each path and its answer as soon as that is known, batch by batch.
    :raises DiskFull, DiskError: the store itself cannot be written to.
    """
    answers: list[Result | None] = [None] * len(paths)
    position = 0
    while position < len(paths):
        with _Batch(writer) as batch:
            first = position
            while position < len(paths) and batch.has_room:
                try:
                    answers[position] = batch.add(position, paths[position], put_one)
                except KacheryError as error:
                    answers[position] = error
                position += 1
            for number, final in batch.finish():
                answers[number] = final
        for number in range(first, position):
            answer = answers[number]
            if on_done is not None and answer is not None:
                on_done(paths[number], answer)
    if writer.durable and paths:
        # The files are safe already; this makes their names safe too.
        with translated("flushing", writer.layout.root):
            if writer.layout.root.exists():
                sync_file_system(writer.layout.root)
    return [answer for answer in answers if answer is not None]


def read_source(source: SourceFile) -> bytes:
    """Return the whole content of a small source.

    :raises LocalFileUnreadable: reading failed.
    :raises FileChanged: it has another length than when it was opened.
    """
    # One byte more than there should be shows a file that grows.
    with source_errors(source.path):
        data = os.read(source.fd, source.size + 1)
        while len(data) < source.size and (more := os.read(source.fd, source.size - len(data))):
            data += more
    if len(data) != source.size:
        raise FileChanged(path=display(source.path), why=f"{source.size} bytes by its size, others by reading")
    return data


class _Batch:
    """Files written but not yet named, in a locked directory of their own below ``tmp/``."""

    def __init__(self, writer: ObjectWriter) -> None:
        self._writer = writer
        self._directory: Path | None = None
        self._lock = -1
        self._written: dict[str, tuple[Path, Stored]] = {}
        self._waiting: list[tuple[int, Stored]] = []
        self._size_bytes = 0

    @property
    def has_room(self) -> bool:
        return len(self._waiting) < BATCH_FILES_MAX and self._size_bytes < BATCH_SIZE_BYTES_MAX

    def add(self, number: int, path: SomePath, put_one: Callable[[SomePath], Stored]) -> Stored | None:
        """Take one file in; the answer when it is final already, else None."""
        writer = self._writer
        with SourceFile(path) as source:
            small = source.size <= min(SMALL_SIZE_BYTES_MAX, writer.chunk_size_bytes)
            if small:
                data = read_source(source)
                source.check_unchanged(len(data))
        if not small:
            return put_one(path)
        digests = digest_buffer(data, writer.chunk_size_bytes)
        stored = Stored(digests.sha1, digests.size, None)
        if digests.sha1 not in self._written:
            if writer.holds(digests.sha1, digests.size):
                return stored
            self._write(data, digests, stored)
        self._waiting.append((number, stored))
        return None

    def _write(self, data: bytes, digests: Digests, stored: Stored) -> None:
        with translated("writing", self._writer.layout.root, needed=len(data)):
            directory = self._open()
            path = directory / digests.sha1
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(fd, memoryview(data))
            except BaseException:
                path.unlink()
                raise
            finally:
                os.close(fd)
        self._written[digests.sha1] = (path, stored)
        self._size_bytes += len(data)

    def _open(self) -> Path:
        while self._directory is None:
            directory = self._writer.layout.temp / f"{os.getpid()}-{secrets.token_hex(8)}{BATCH_SUFFIX}"
            make_directories(directory)
            try:
                lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = os.fstat(lock).st_nlink > 0
            except OSError as error:
                # A cleaner has it, and will remove it; or the file system knows no locks.
                taken = error.errno != errno.EWOULDBLOCK
            if taken:
                self._directory, self._lock = directory, lock
            else:
                os.close(lock)
        return self._directory

    def finish(self) -> list[tuple[int, Result]]:
        """Flush, then name, what was written; the answers of the files that waited for it."""
        failed: dict[str, KacheryError] = {}
        try:
            self._flush()
        except KacheryError as error:
            return [(number, error) for number, _ in self._waiting]
        for sha1, (path, _) in self._written.items():
            final = self._writer.layout.file(sha1)
            try:
                with translated("writing", final):
                    rename_into(path, final, durable=False)
            except KacheryError as error:
                failed[sha1] = error
        return [(number, failed.get(stored.sha1, stored)) for number, stored in self._waiting]

    def _flush(self) -> None:
        if self._directory is None or not self._writer.durable:
            return
        with translated("flushing", self._directory, needed=self._size_bytes):
            if sync_file_system(self._directory):
                return
            for path, _ in self._written.values():
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)

    def __enter__(self) -> _Batch:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._directory is None:
            return
        with suppress(OSError):
            for left in self._directory.iterdir():
                left.unlink()
            self._directory.rmdir()
        os.close(self._lock)
