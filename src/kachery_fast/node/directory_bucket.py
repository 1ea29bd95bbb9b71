"""A bucket that is a folder on a file system that the nodes of a channel share (NFS, Lustre, GPFS): no server between.

An object appears under its name whole, by a link or a rename, and is copied by the system within the file system,
past this process's memory. A hub names the folder, and could name any: one is used only while it holds the mark that
the hub has put there (``embedded.bucket_mark``), and objects only under their strict names. Where nothing is mounted
there is no mark, so that an empty folder is not taken for an empty bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from ..embedded.bucket_files import ObjectFiles, OpenObject
from ..embedded.bucket_mark import is_marked
from ..errors import BucketUnreachable, DiskError, FileChanged, ObjectMissing, TooLarge, WrongSize
from ..net.bucket import SignedUpload, check_leave
from ..net.ranges import Progress
from ..net.targets import FileSpan, Target, disk_error, fill, size_of
from ..splice import FileRefused
from .threads import in_thread

__all__ = ["DirectoryBucket"]

T = TypeVar("T")


class DirectoryBucket:
    """A ``net.bucket.Bucket`` in a folder.

    :param url: ``file:///FOLDER#MARK``, as the hub tells it. :param threads: where files are read and written.
    """

    splices = True

    def __init__(self, url: str, threads: Executor) -> None:
        parts = urlsplit(url)
        self._root = Path(unquote(parts.path))
        self._mark = parts.fragment
        self._threads = threads
        self._files: ObjectFiles | None = None

    async def get_into(self, object_name: str, target: Target, *, progress: Progress | None = None,
                       ahead: Iterable[str] = ()) -> None:
        """As ``Bucket.get_into``."""
        await self._run(self._get_into, object_name, target, progress)

    async def get_small(self, object_name: str, limit_bytes: int, *, fresh: bool = False,
                        ahead: Iterable[str] = ()) -> bytes:
        """As ``Bucket.get_small``."""
        return await self._run(self._get_small, object_name, limit_bytes)

    async def size(self, object_name: str, *, ahead: Iterable[str] = ()) -> int:
        """As ``Bucket.size``."""
        return await self._run(self._size, object_name)

    async def put_from(self, upload: SignedUpload, fd: int, offset: int, length: int, *,
                       progress: Progress | None = None) -> bool:
        """As ``Bucket.put_from``."""
        return await self._run(self._put_from, upload, FileSpan(fd, offset, length), progress)

    async def put_bytes(self, upload: SignedUpload, data: bytes) -> bool:
        """As ``Bucket.put_bytes``."""
        return await self._run(self._put_bytes, upload, data)

    # --- in a thread

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        return await in_thread(self._threads, work, *arguments)

    def _get_into(self, object_name: str, target: Target, progress: Progress | None) -> None:
        with self._reading(object_name) as found:
            if found.size_bytes != size_of(target):
                raise WrongSize(object=object_name, found=found.size_bytes, expected=size_of(target))
            try:
                copied = fill(target, found.fd, 0, progress)
            except FileRefused as refused:
                raise disk_error(refused, target, object_name) from refused.error
            if copied != found.size_bytes:
                raise WrongSize(object=object_name, found=copied, expected=found.size_bytes)

    def _get_small(self, object_name: str, limit_bytes: int) -> bytes:
        with self._reading(object_name) as found:
            if found.size_bytes > limit_bytes:
                raise TooLarge(what=f"The object {object_name}", size=found.size_bytes, limit=limit_bytes,
                               setting="the reader's limit")
            data = bytearray(found.size_bytes)
            del data[fill(memoryview(data), found.fd, 0):]
            return bytes(data)

    def _size(self, object_name: str) -> int:
        with self._reading(object_name) as found:
            return found.size_bytes

    def _put_from(self, upload: SignedUpload, source: FileSpan, progress: Progress | None) -> bool:
        files, replace = self._opened(), _replaces(upload)
        if not replace and files.offered(upload.object_name):
            return False

        def copy(fd: int) -> None:
            try:
                sent = fill(FileSpan(fd, 0, source.length), source.fd, source.offset, progress)
            except OSError as error:
                raise DiskError(action="the reading", path="the file being sent", why=error.strerror) from error
            if sent != source.length:
                raise FileChanged(path="the file being sent", why=f"it ends at byte {source.offset + sent}")

        return files.make(upload.object_name, source.length, copy, replace=replace)

    def _put_bytes(self, upload: SignedUpload, data: bytes) -> bool:
        return self._opened().write(upload.object_name, data, replace=_replaces(upload))

    @contextmanager
    def _reading(self, object_name: str) -> Iterator[OpenObject]:
        entered = False
        try:
            with self._opened().reading(object_name) as found:
                entered = True
                yield found
        except ObjectMissing:
            self._opened()  # else it is the folder that is missing
            raise
        except DiskError as error:
            if entered:  # of what is written to here
                raise
            raise self._unreachable(object_name, error.details["why"]) from error
        except OSError as error:  # as of NFS, when the file was removed elsewhere (ESTALE)
            raise self._unreachable(object_name, error.strerror) from error

    def _opened(self) -> ObjectFiles:
        """The folder, while it bears the mark. :raises BucketUnreachable: it does not."""
        if not is_marked(self._root, self._mark):
            raise BucketUnreachable(object=f"the folder {self._root}", attempts=1, why=(
                "it does not bear the hub's mark: is its file system mounted on this machine, and may this user read "
                "there?"))
        if self._files is None:
            try:
                self._files = ObjectFiles(self._root, fsync=True, shared=True)
            except DiskError as error:
                raise self._unreachable(f"the folder {self._root}", error.details["why"]) from error
        return self._files

    def _unreachable(self, what: str, why: object) -> BucketUnreachable:
        """That a foreign disk fails is no fault of this machine's."""
        return BucketUnreachable(object=what, attempts=1, why=f"the folder {self._root}: {why}")


def _replaces(upload: SignedUpload) -> bool:
    """Whether an upload is to take the place of what is there. :raises UrlExpired: it is leave for another bucket."""
    check_leave(upload, "file:")
    return upload.headers.get("replace") == "1"
