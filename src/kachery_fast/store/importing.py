"""Taking the files and links of another storage directory into a store; the other is only read.

Each file is hashed on its way, and gets its name in the store only when its bytes have that name. What is here already
is hashed as well: the other directory may be deleted next, and with it the only good bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .._core import Digests, copy_file, digest_buffer, digest_file
from ..errors import (
    CorruptFile,
    DiskError,
    DiskFull,
    FileChanged,
    KacheryError,
    LinkInvalid,
    LocalFileMissing,
    NotADataFile,
    NotInStore,
)
from .batch import read_source
from .census import Entry, walk
from .disk import SourceFile, display, find_size, source_errors, translated, write_all
from .files import SMALL_SIZE_BYTES_MAX, FileStore
from .layout import Layout
from .links import LINK_SIZE_BYTES_MAX, LinkRecord, fingerprint_of, open_link, parse_link
from .objects import ObjectWriter, Stored, read_small
from .tally import Count, Tally
from .verifying import set_aside

__all__ = ["FileImport"]

# Small files are flushed together.
_BATCH_FILES_MAX = 500

Progress = Callable[[int], None]


class FileImport:
    """The import of the files and links of one directory. ``run`` it once.

    :param source: the other storage directory.
    :param root: the storage directory of this store.
    :param chunk_size_bytes, fingerprint_size_bytes: as for ``FileStore``.
    :param dry_run: read and check everything, and write nothing.
    :param progress: called with the bytes read so far, here and there.
    """

    def __init__(self, source: Path, root: Path, tally: Tally, *, chunk_size_bytes: int, fingerprint_size_bytes: int,
                 dry_run: bool = False, progress: Progress | None = None) -> None:
        self._from = Layout(source)
        self._layout = Layout(root)
        self._store = FileStore(root, chunk_size_bytes=chunk_size_bytes, fingerprint_size_bytes=fingerprint_size_bytes)
        self._writer = ObjectWriter(self._layout, chunk_size_bytes=chunk_size_bytes, durable=True)
        self._chunk_size_bytes = chunk_size_bytes
        self._fingerprint_size_bytes = fingerprint_size_bytes
        self._tally = tally
        self._dry_run = dry_run
        self._progress = progress
        self._done_bytes = 0
        self._damaged = ""  # the SHA-1 of a file here that has other bytes, until it is replaced
        self._small: list[tuple[Path, int]] = []  # with their length in bytes

    def run(self) -> None:
        """Take every file and link that is not here yet; what is refused is in the tally.

        :raises DiskFull: there is no room; what was taken before stays.
        :raises DiskError: the other directory cannot be listed.
        """
        for entry in walk(self._from):
            count = self._tally.links if entry.size is None else self._tally.files
            try:
                if self._is_here(entry):
                    count.here += 1
                elif entry.size is None:
                    self._take_link(entry.sha1, count)
                else:
                    self._take_file(entry.sha1, count)
            except DiskFull:
                raise
            except (CorruptFile, FileChanged, LinkInvalid, LocalFileMissing, NotADataFile, NotInStore,
                    DiskError) as error:
                note = " The file that is here under this name is damaged as well." if self._damaged else ""
                self._tally.refuse(f"sha1://{entry.sha1}", error.message + note)
        self._put_small()

    def _is_here(self, entry: Entry) -> bool:
        self._damaged = ""
        if find_size(self._layout.file(entry.sha1)) is None:
            return entry.size is None and self._has_link(entry.sha1)
        try:
            size = self._store.verify(entry.sha1, progress=self._report).size
        except CorruptFile:
            self._damaged = entry.sha1
            return False
        self._done_bytes += size
        # A cached copy becomes an original: the other directory may be deleted next.
        keeps = self._writer.holds if self._dry_run else self._writer.keeps
        return keeps(entry.sha1, size) or (entry.size is None and self._has_link(entry.sha1))

    def _has_link(self, sha1: str) -> bool:
        """Whether there is a link here, to a file that is what it was."""
        path = self._layout.link(sha1)
        data = read_small(path, LINK_SIZE_BYTES_MAX)
        if data is None:
            return False
        try:
            open_link(parse_link(data, sha1=sha1, record_path=display(path)), sha1).close()
        except LinkInvalid:
            return False
        return True

    def _take_file(self, sha1: str, count: Count) -> None:
        path = self._from.file(sha1)
        with SourceFile(path) as source:
            if source.size <= SMALL_SIZE_BYTES_MAX:
                data = read_source(source)
                self._check(sha1, digest_buffer(data, self._chunk_size_bytes), source)
                self._count(count, source.size)
                self._small.append((path, source.size))
            elif self._dry_run:
                self._check(sha1, self._digest(source), source)
                self._count(count, source.size)
            else:
                self._copy(sha1, source)
                self._count(count, source.size)
        if len(self._small) == _BATCH_FILES_MAX:
            self._put_small()

    def _copy(self, sha1: str, source: SourceFile) -> None:
        self._writer.prepare(source.size)
        with self._writer.temp() as temp:
            with translated("copying", source.path, needed=source.size):
                digests = copy_file(source.fd, temp.fd, self._chunk_size_bytes, progress=self._report,
                                    begin_writeback=True)
            self._check(sha1, digests, source)
            self._writer.finish(temp, digests)

    def _put_small(self) -> None:
        small, self._small = self._small, []
        if self._dry_run or not small:
            return
        for (path, size_bytes), answer in zip(small, self._store.put_files([path for path, _ in small]), strict=True):
            problem = answer if isinstance(answer, KacheryError) else None
            if isinstance(answer, Stored) and answer.sha1 != path.name:
                problem = FileChanged(path=display(path), why="other bytes stood in it at a second reading")
            if isinstance(problem, DiskFull):
                raise problem
            if problem is not None:
                self._tally.files.taken -= 1
                self._tally.files.size_bytes -= size_bytes
                self._tally.refuse(f"sha1://{path.name}", problem.message)

    def _take_link(self, sha1: str, count: Count) -> None:
        record_path = self._from.link(sha1)
        data = read_small(record_path, LINK_SIZE_BYTES_MAX)
        if data is None:
            raise NotInStore(sha1=sha1, store=display(self._from.root))
        record = parse_link(data, sha1=sha1, record_path=display(record_path))
        open_link(record, sha1).close()
        with SourceFile(record.path) as source:
            digests = self._digest(source)
            with source_errors(source.path):
                fingerprint = fingerprint_of(source.fd, source.size, self._fingerprint_size_bytes)
            self._check(sha1, digests, source)
            if not self._dry_run:
                manifest_sha1 = self._writer.keep_manifest_of(digests)
                made = LinkRecord(record.path, source.size, source.stat.st_mtime, manifest_sha1,
                                  source.stat.st_mtime_ns, fingerprint)
                with self._writer.temp() as temp:
                    with translated("writing", temp.path):
                        write_all(temp.fd, memoryview(made.encode()))
                    temp.publish(self._layout.link(sha1), durable=True)
                if manifest_sha1 is not None:
                    self._writer.note_manifest(sha1, manifest_sha1)
            self._count(count, source.size)

    # --- small parts

    def _digest(self, source: SourceFile) -> Digests:
        with source_errors(source.path):
            return digest_file(source.fd, self._chunk_size_bytes, progress=self._report)

    def _check(self, sha1: str, digests: Digests, source: SourceFile) -> None:
        """Check the bytes that are to be taken, and make way for them.

        :raises CorruptFile, FileChanged: they have not this name.
        """
        source.check_unchanged(digests.size)
        if digests.sha1 != sha1:
            raise CorruptFile(path=display(source.path), found=digests.sha1, sha1=sha1,
                              advice="It was not taken; it is left as it is.")
        if sha1 == self._damaged:
            if not self._dry_run:
                set_aside(self._layout, sha1, durable=True)
            self._damaged = ""
            self._tally.replaced.append(sha1)

    def _report(self, done_bytes: int) -> None:
        if self._progress is not None:
            self._progress(self._done_bytes + done_bytes)

    def _count(self, count: Count, size_bytes: int) -> None:
        count.taken += 1
        count.size_bytes += size_bytes
        self._done_bytes += size_bytes
        self._report(0)
