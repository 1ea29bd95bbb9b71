"""The local store: content-addressed files, put, linked, opened, verified.

Layout as in 2022 (see ``layout``); a directory written by the daemon of 2022 works in place. Several processes, of
several users of one group, may use one store at once. Nothing here lists a directory to find or to put one file, so
either costs the same in a store of ten files and of ten million.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .._core import Digests, copy_file, digest_buffer, digest_file
from ..errors import CorruptFile, KacheryError, LinkInvalid, NotInStore
from ..protocol.manifest import Manifest
from . import downloads
from .batch import Result, SomePath, put_many, read_source
from .census import Totals, count_all, walk
from .disk import (
    SPAN_SIZE_BYTES,
    SourceFile,
    display,
    find_size,
    source_errors,
    translated,
    write_all,
)
from .flushing import sync_directory
from .layout import Layout
from .leftovers import Cleaned, clean_leftovers
from .links import (
    FINGERPRINT_SIZE_BYTES_MAX,
    LINK_SIZE_BYTES_MAX,
    LinkRecord,
    fingerprint_of,
    open_link,
    parse_link,
)
from .manifests import ManifestShelf
from .naming import make_directories
from .objects import Located, ObjectWriter, Stored, read_small
from .streams import IncomingFile, StreamWriter, byte_view, write_and_digest
from .verifying import Verified, verify_names

__all__ = ["Cleaned", "FileStore", "Located", "Stored", "StreamWriter", "Totals", "Verified"]

# Up to here one thread reads, hashes, looks whether the store has it, and only then writes.
SMALL_SIZE_BYTES_MAX = 256 * 1024
STREAM_READ_SIZE_BYTES = 1024 * 1024

Progress = Callable[[int], None]
Inspect = Callable[[os.stat_result], None]

_log = logging.getLogger("kachery_fast.store")


class FileStore:
    """The files of one storage directory. Safe for several threads and processes at once.

    Every method that takes a SHA-1 raises InvalidName when it is not 40 lower-case hex digits, and every one may
    raise DiskError when the disk fails.

    :param root: the storage directory; nothing is created before something is written.
    :param chunk_size_bytes: the length of a chunk in new manifests, a multiple of 64.
    :param fingerprint_size_bytes: how much of a linked file's head and of its tail is fingerprinted, 16 MiB at most.
    :param durable: whether what was stored survives a power cut; without it only the flushing is left out.
    :param machine: as of ``CacheIndex``.
    """

    def __init__(self, root: Path, *, chunk_size_bytes: int = 20 * 1024 * 1024, fingerprint_size_bytes: int = 65536,
                 durable: bool = True, machine: str = "") -> None:
        self.root = Path(root).absolute()
        self._layout = Layout(self.root)
        self.durable = durable
        self._writer = ObjectWriter(self._layout, chunk_size_bytes=chunk_size_bytes, durable=durable,
                                    machine=machine)
        self._chunk_size_bytes = chunk_size_bytes
        self._fingerprint_size_bytes = min(fingerprint_size_bytes, FINGERPRINT_SIZE_BYTES_MAX)
        self._manifests = ManifestShelf(self._writer, lambda *key: self._digest(*key)[1])

    def close(self) -> None:
        """Let go of the index of cached copies; it is opened again when needed."""
        self._writer.cache.close()

    # --- putting

    def put_file(self, path: SomePath, *, progress: Progress | None = None, inspect: Inspect | None = None) -> Stored:
        """Copy a file into the store, hashing it on the way.

        :param progress: called with the bytes done so far; what it raises ends the call, with nothing stored.
        :param inspect: is shown what was opened, whatever the path leads to by then; what it raises ends the call.
        :raises LocalFileMissing, LocalFileUnreadable, NotADataFile: there is nothing to store.
        :raises FileChanged: it changed meanwhile.
        :raises DiskFull: there is no room; checked before anything is copied.
        """
        with SourceFile(path, inspect) as source:
            if source.size <= SMALL_SIZE_BYTES_MAX:
                data = read_source(source)
                digests = digest_buffer(data, self._chunk_size_bytes)
                source.check_unchanged(len(data))
                if progress is not None:
                    progress(len(data))
                return self._writer.keep_small(memoryview(data), digests)
            self._writer.prepare(source.size)
            with self._writer.temp() as temp:
                with translated("copying", source.path, needed=source.size):
                    digests = copy_file(source.fd, temp.fd, self._chunk_size_bytes, progress=progress,
                                        begin_writeback=self.durable)
                source.check_unchanged(digests.size)
                return self._writer.finish(temp, digests)

    def put_files(
        self, paths: Iterable[SomePath], *, on_done: Callable[[SomePath, Result], None] | None = None
    ) -> list[Result]:
        """Copy many files into the store, flushing small ones in batches.

        :param on_done: called with each path and its answer, batch by batch.
        :return: for each path what was stored, or the error that ``put_file`` would have raised.
        :raises DiskFull, DiskError: the store's directory cannot be written to at all.
        """
        return put_many(self._writer, list(paths), self.put_file, on_done)

    def put_bytes(self, buffer: Any) -> Stored:
        """Store the bytes of any C-contiguous buffer, numpy arrays included, from its own memory.

        The caller must not change the buffer before this returns.

        :raises InvalidArgument: not a buffer, not contiguous, or an array of Python objects.
        :raises DiskFull: there is no room.
        """
        view = byte_view(buffer)
        if view.nbytes <= SPAN_SIZE_BYTES:
            return self._writer.keep_small(view, digest_buffer(view, self._chunk_size_bytes))
        self._writer.prepare(view.nbytes)
        with self._writer.temp() as temp:
            digests = write_and_digest(temp, view, self._chunk_size_bytes)
            return self._writer.finish(temp, digests)

    def put_stream(self, chunks: Iterable[Any] | BinaryIO, *, progress: Progress | None = None) -> Stored:
        """Store a stream of unknown length: an iterable of buffers, or something with ``read``.

        :param progress: called with the bytes done so far.
        :raises DiskFull: there is no room. What the stream itself raises is passed on. Nothing is stored then.
        """
        read = getattr(chunks, "read", None)
        pieces: Iterable[Any] = chunks if read is None else iter(lambda: read(STREAM_READ_SIZE_BYTES), b"")
        with self.stream_writer() as writer:
            for piece in pieces:
                writer.write(piece)
                if progress is not None:
                    progress(writer.size)
            return writer.commit()

    def stream_writer(self, *, expected_size_bytes: int = 0) -> StreamWriter:
        """Begin a file whose bytes arrive piece by piece.

        :param expected_size_bytes: refuse at once when so many do not fit; 0 when unknown.
        :raises DiskFull: they do not.
        """
        if expected_size_bytes:
            self._writer.prepare(expected_size_bytes)
        return StreamWriter(self._writer)

    def incoming(self, size_bytes: int) -> IncomingFile:
        """Begin a file of so many bytes that somebody else writes.

        :raises DiskFull: there is no room for it. :raises DiskError: it cannot be begun.
        """
        self._writer.prepare(size_bytes)
        return IncomingFile(self._writer, size_bytes)

    def link_file(self, path: SomePath, *, progress: Progress | None = None, inspect: Inspect | None = None) -> Stored:
        """Make a file part of the store where it lies, without a copy.

        It must not be changed or moved from then on; ``find`` and ``open`` see when it was. A file that the store
        holds already needs no link and gets none.

        :param progress, inspect: as ``put_file``.
        :raises LocalFileMissing, LocalFileUnreadable, NotADataFile: there is nothing to link.
        :raises FileChanged: it changed meanwhile.
        """
        with SourceFile(path, inspect) as source:
            with source_errors(source.path):
                digests = digest_file(source.fd, self._chunk_size_bytes, progress=progress)
                fingerprint = fingerprint_of(source.fd, source.size, self._fingerprint_size_bytes)
            source.check_unchanged(digests.size)
        size, sha1, _ = digests
        manifest_sha1 = self._writer.keep_manifest_of(digests)
        if not self._writer.keeps(sha1, size):
            record = LinkRecord(source.find_path(), size, source.stat.st_mtime, manifest_sha1,
                                source.stat.st_mtime_ns, fingerprint)
            with self._writer.temp() as temp:
                with translated("writing", temp.path):
                    write_all(temp.fd, memoryview(record.encode()))
                temp.publish(self._layout.link(sha1), durable=self._writer.durable)
        if manifest_sha1 is not None:
            self._writer.note_manifest(sha1, manifest_sha1)
        return Stored(sha1, size, manifest_sha1)

    # --- finding

    def find(self, sha1: str) -> Located:
        """Return where the bytes of ``sha1`` are; a stored file is preferred to a link.

        :raises NotInStore: there is neither.
        :raises LinkInvalid: only a link, and its file is not what it was.
        """
        path = self._layout.file(sha1)
        size = find_size(path)
        if size is not None:
            return Located(sha1, path, size, linked=False)
        record = self._link(sha1)
        open_link(record, sha1).close()
        return Located(sha1, Path(record.path), record.size, linked=True)

    def has(self, sha1: str) -> bool:
        """Whether ``find`` would find it."""
        try:
            self.find(sha1)
        except (NotInStore, LinkInvalid):
            return False
        return True

    def open(self, sha1: str) -> BinaryIO:
        """Open the bytes of ``sha1`` for reading. A linked file was checked after it was opened.

        :raises NotInStore, LinkInvalid: as ``find``.
        """
        return self._open(sha1)[1]

    def _open(self, sha1: str) -> tuple[Located, BinaryIO]:
        path = self._layout.file(sha1)
        if find_size(path) is not None:
            with translated("opening", path), suppress(FileNotFoundError):
                file = path.open("rb")
                return Located(sha1, path, os.fstat(file.fileno()).st_size, linked=False), file
        record = self._link(sha1)
        return Located(sha1, Path(record.path), record.size, linked=True), open_link(record, sha1)

    def _link(self, sha1: str) -> LinkRecord:
        path = self._layout.link(sha1)
        data = read_small(path, LINK_SIZE_BYTES_MAX)
        if data is None:
            raise NotInStore(sha1=sha1, store=display(self.root))
        return parse_link(data, sha1=sha1, record_path=display(path))

    # --- manifests

    def manifest_for(
        self, sha1: str, wanted: str | None = None, *, progress: Progress | None = None
    ) -> tuple[str | None, Manifest | None]:
        """Return the manifest of a file in the store with its SHA-1; ``(None, None)`` when the file fits one chunk.

        A large file that has none yet, as in stores of 2022, is read once to make it.

        :param wanted: the manifest that somebody asks for. It is preferred when the store has it and a reading of
            the file has shown that its digests are true: it may come from anywhere.
        :param progress: called when the file has to be read, with the bytes done so far, at first 0; what it raises
            ends the call.
        :raises NotInStore, LinkInvalid: as ``find``.
        :raises CorruptFile: the file had to be read, and is damaged.
        """
        located = self.find(sha1)
        noted = self._writer.noted_manifest(sha1)
        if noted is None and located.linked:
            noted = self._link(sha1).manifest_sha1
        return self._manifests.choose(sha1, located.size, noted=noted, wanted=wanted, progress=progress)

    # --- verifying

    def _digest(self, sha1: str, chunk_size_bytes: int, progress: Progress | None = None) -> tuple[Located, Digests]:
        located, file = self._open(sha1)
        with closing(file), translated("reading", located.path):
            digests = digest_file(file.fileno(), chunk_size_bytes, progress=progress)
        if digests.sha1 != sha1:
            advice = "Remove it from the store, and store or load it again."
            if located.linked:
                advice = "It was linked in place and has been changed since: link it anew, under its new name."
            raise CorruptFile(path=display(located.path), found=digests.sha1, sha1=sha1, advice=advice)
        return located, digests

    def verify(self, sha1: str, *, progress: Progress | None = None) -> Located:
        """Read all bytes of ``sha1`` and check that they have that name.

        :param progress: called with the bytes done so far.
        :raises NotInStore, LinkInvalid: as ``find``.
        :raises CorruptFile: they do not; the error says what to do.
        """
        return self._digest(sha1, self._chunk_size_bytes, progress)[0]

    def verify_all(
        self, *, on_result: Callable[[str, Located | KacheryError], None] | None = None, quarantine: bool = False
    ) -> Verified:
        """Verify every name in the store.

        :param on_result: called with each SHA-1 and where it is, or what is wrong with it.
        :param quarantine: move damaged stored files to ``damaged/``, and links that hold no more after them.
        """
        return verify_names(self._layout, self.verify, on_result=on_result, quarantine=quarantine, durable=self.durable)

    # --- the whole

    def remove(self, sha1: str) -> int:
        """Remove a file or link from the store, and return the bytes freed. A linked file itself is never touched.

        :raises NotInStore: there is neither.
        """
        freed, found = 0, False
        path = self._layout.file(sha1)
        # The sidecar first: a file without one is whole, a sidecar without a file is rubbish.
        for victim in (self._layout.sidecar(sha1), self._layout.link(sha1), path):
            with translated("removing", victim):
                try:
                    size = victim.lstat().st_size
                    victim.unlink()
                except (FileNotFoundError, NotADirectoryError):
                    continue
            freed += size
            found = found or victim != self._layout.sidecar(sha1)
        if not found:
            raise NotInStore(sha1=sha1, store=display(self.root))
        if self._writer.durable:
            with translated("flushing", path.parent):
                sync_directory(path.parent)
        return freed

    def list(self) -> Iterator[Located]:
        """Yield every file and link, in the order of the SHA-1; of links only the record is read, not checked."""
        for entry in walk(self._layout):
            if entry.size is not None:
                yield Located(entry.sha1, self._layout.file(entry.sha1), entry.size, linked=False)
                continue
            try:
                record = self._link(entry.sha1)
            except KacheryError as error:
                _log.warning("%s", error)
                continue
            yield Located(entry.sha1, Path(record.path), record.size, linked=True)

    def totals(self, *, seconds: float = 2.0, clock: Callable[[], float] = time.monotonic) -> Totals:
        """Count what the store holds; estimated from a part of it when that takes longer than ``seconds``."""
        return count_all(self._layout, seconds=seconds, clock=clock)

    # --- downloads

    def part_path(self, sha1: str) -> Path:
        """Return where the download of ``sha1`` is to be written, making the directories.

        :raises DiskFull, DiskError: they cannot be made.
        """
        part, marker = self._layout.part(sha1), self._layout.part_marker(sha1)
        with translated("writing", part):
            for directory in (part.parent, marker.parent):
                make_directories(directory, durable=self.durable)
            # Its time is when the download was last begun or resumed.
            marker.touch(0o666)
        return part

    def drop_part(self, sha1: str) -> None:
        """Give a download up: remove what ``part_path`` led to, its marker last.

        :raises DiskError: it cannot be removed.
        """
        for path in (self._layout.part(sha1), self._layout.part_marker(sha1)):
            with translated("removing", path):
                path.unlink(missing_ok=True)

    def adopt(self, part: Path, sha1: str, *, manifest: bytes | None) -> Located:
        """Make a verified download the file ``sha1``: a cached copy, unless the file was stored here meanwhile.

        :param part: as from ``part_path``; its bytes were verified by the caller.
        :param manifest: the bytes of its manifest, None for a file of one chunk.
        :raises ManifestInvalid: the manifest is not one of this file; nothing was changed.
        """
        return downloads.adopt(self._writer, part, sha1, manifest)

    def adopt_bytes(self, data: bytes, sha1: str) -> Located:
        """Make bytes that the caller has verified the file ``sha1``, as a copy that may be evicted.

        :raises DiskFull, DiskError: it could not be written.
        """
        return downloads.adopt_bytes(self._writer, data, sha1)

    def clean(self, *, now: float, partial_keep_days: float) -> Cleaned:
        """Remove what crashed writers left, and old unfinished downloads; for the start of a node.

        :param now: seconds since 1970.
        """
        return clean_leftovers(self._layout, now=now, partial_keep_days=partial_keep_days)
