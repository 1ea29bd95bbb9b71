"""Storing many small files at once.

An ``fsync`` for each of ten thousand files takes minutes on a disk; one ``syncfs`` for all of them takes about as long
as one. So the files of a batch are written under temporary names, flushed together, and only then renamed.
"""

# Plain strings for paths: at ten thousand files a second a Path costs more than the call.
# ruff: noqa: PTH108, PTH120

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from .._core import Digests, digest_buffer
from ..errors import FileChanged, KacheryError
from .disk import (
    SourceFile,
    display,
    source_errors,
    translated,
    write_all,
)
from .flushing import flush_file, sync_directory, sync_file_system
from .leftovers import BATCH_SUFFIX
from .naming import make_directories, rename_into
from .objects import ObjectWriter, Stored

__all__ = ["put_many", "read_source"]

# Larger files are worth a flush of their own, and a copy by the two threads of the native core.
SMALL_SIZE_BYTES_MAX = 1024 * 1024
# What a crash can lose, and what waits in the page cache for one flush.
BATCH_FILES_MAX = 2048
BATCH_SIZE_BYTES_MAX = 128 * 1024 * 1024

SomePath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Result = Stored | KacheryError


def put_many(
    writer: ObjectWriter,
    paths: Sequence[SomePath],
    put_one: Callable[[SomePath], Stored],
    on_done: Callable[[SomePath, Result], None] | None,
) -> list[Result]:
    """Store each of ``paths``; the answers stand in their order, an error in the place of a file that failed.

    Each batch is flushed by a second thread while this one names the batch before and writes the next. More threads
    do not help: the calls are short, and the interpreter's lock passes to and fro.

    :param put_one: stores one large file.
    :param on_done: called with each path and its answer as soon as that is known, batch by batch.
    :raises DiskFull, DiskError: the names that were given could not be flushed.
    """
    answers: dict[int, Result] = {}
    changed: set[str] = set()

    def tell(done: list[tuple[int, Result]]) -> None:
        for number, answer in done:
            answers[number] = answer
            if on_done is not None:
                on_done(paths[number], answer)

    with ThreadPoolExecutor(1, thread_name_prefix="kachery-store-flush") as flusher, ExitStack() as batches:
        flushed: tuple[_Batch, Future[None]] | None = None
        numbers = iter(range(len(paths)))
        number = next(numbers, None)
        while number is not None or flushed is not None:
            batch = batches.enter_context(closing(_Batch(writer)))
            final: list[tuple[int, Result]] = []
            while number is not None and batch.has_room:
                answer = _put(batch, number, paths[number], put_one)
                if answer is not None:
                    final.append((number, answer))
                number = next(numbers, None)
            if flushed is not None:
                wait([flushed[1]])
            before, flushed = flushed, None
            if not batch.is_empty:
                flushed = batch, flusher.submit(batch.flush)
            tell(final)
            if before is not None:
                tell(before[0].finish(before[1]))
                changed |= before[0].changed
                before[0].close()
    if changed and writer.durable:
        # The files are safe already; this makes their names safe too.
        with translated("flushing", writer.layout.root):
            if not sync_file_system(writer.layout.root):
                for directory in sorted(changed):
                    sync_directory(directory)
    return [answers[number] for number in range(len(paths))]


def _put(batch: _Batch, number: int, path: SomePath, put_one: Callable[[SomePath], Stored]) -> Result | None:
    """Give one file to the batch, or store it on its own; its answer, or None when the batch will give it."""
    try:
        return batch.known if batch.add(number, path) else put_one(path)
    except KacheryError as error:
        return error


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
        self._written: dict[str, str] = {}
        self._waiting: list[tuple[int, Stored]] = []
        self._size_bytes = 0
        self.known: Stored | None = None
        # Directories with names in them that are not flushed.
        self.changed: set[str] = set()

    @property
    def has_room(self) -> bool:
        return len(self._waiting) < BATCH_FILES_MAX and self._size_bytes < BATCH_SIZE_BYTES_MAX

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    def add(self, number: int, path: SomePath) -> bool:
        """Take a small file in; False for a large one.

        It is answered by ``finish``, or at once by ``known`` when the store has it already.
        """
        writer, self.known = self._writer, None
        with SourceFile(path) as source:
            if source.size > min(SMALL_SIZE_BYTES_MAX, writer.chunk_size_bytes):
                return False
            data = read_source(source)
            source.check_unchanged(len(data))
        digests = digest_buffer(data, writer.chunk_size_bytes)
        stored = Stored(digests.sha1, digests.size, None)
        if digests.sha1 not in self._written:
            if writer.keeps(digests.sha1, digests.size):
                self.known = stored
                return True
            self._write(data, digests)
        self._waiting.append((number, stored))
        return True

    def _write(self, data: bytes, digests: Digests) -> None:
        with translated("writing", self._writer.layout.root, needed=len(data)):
            directory = self._open()
            path = f"{directory}/{digests.sha1}"
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(fd, memoryview(data))
            except BaseException:
                os.unlink(path)
                raise
            finally:
                os.close(fd)
        self._written[digests.sha1] = path
        self._size_bytes += len(data)

    def _open(self) -> Path:
        while self._directory is None:
            temp, durable = self._writer.layout.temp, self._writer.durable
            directory = temp / f"{os.getpid()}-{secrets.token_hex(8)}{BATCH_SUFFIX}"
            make_directories(temp, durable=durable)
            make_directories(directory, durable=False)
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

    def flush(self) -> None:
        """Make the directories of what was written, half of the work that is left, and flush.

        :raises DiskFull, DiskError: it could not be.
        """
        with translated("writing", self._writer.layout.files, needed=self._size_bytes):
            for sha1 in self._written:
                made = make_directories(os.path.dirname(self._writer.layout.file_name(sha1)), durable=False)
                self.changed.update(map(os.path.dirname, made))
        if self._directory is None or not self._writer.durable:
            return
        with translated("flushing", self._directory, needed=self._size_bytes):
            if sync_file_system(self._directory):
                return
            for path in self._written.values():
                flush_file(path)

    def finish(self, flushing: Future[None]) -> list[tuple[int, Result]]:
        """Name what was written and flushed; the answers of the files that waited for it."""
        failed: dict[str, KacheryError] = {}
        try:
            flushing.result()
        except KacheryError as error:
            return [(number, error) for number, _ in self._waiting]
        for sha1, path in self._written.items():
            final = self._writer.layout.file_name(sha1)
            try:
                with translated("writing", final):
                    rename_into(path, final, durable=False)
            except KacheryError as error:
                failed[sha1] = error
            else:
                self.changed.add(os.path.dirname(final))
        return [(number, failed.get(stored.sha1, stored)) for number, stored in self._waiting]

    def close(self) -> None:
        """Remove what has no name; a second call does nothing."""
        if self._directory is None:
            return
        with suppress(OSError):
            for left in self._directory.iterdir():
                left.unlink()
            self._directory.rmdir()
        os.close(self._lock)
        self._directory = None
