"""A bucket that is a folder on a file system that the nodes of a channel share (NFS, Lustre, GPFS): no server between.

An object appears under its name whole, by a link or a rename, and is copied by the system within the file system,
past this process's memory. A hub names the folder, and could name any: one is used only while it holds the mark that
the hub has put there (``embedded.bucket_mark``), and objects only under their strict names. Where nothing is mounted
there is no mark, so that an empty folder is not taken for an empty bucket.

A file server that is gone has whoever asks it wait in the kernel, without end and past any signal. So a bucket has
threads of its own, and one that waits so is left behind, with what it alone has open: nothing else waits for it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from ..embedded.bucket_files import ObjectFiles, OpenObject
from ..embedded.bucket_mark import is_marked
from ..errors import BucketUnreachable, Cancelled, DiskError, FileChanged, ObjectMissing, Stalled, TooLarge, WrongSize
from ..net.bucket import SignedUpload, check_leave
from ..net.ranges import Progress
from ..net.targets import FileSpan, Target, disk_error, fill, size_of
from ..splice import FileRefused
from .threads import PassingThreads

__all__ = ["DirectoryBucket"]

_THREADS = 8
LEAVE_SECONDS = 3.0

T = TypeVar("T")


class DirectoryBucket:
    """A ``net.bucket.Bucket`` in a folder.

    :param url: ``file:///FOLDER#MARK``, as the hub tells it. :param stall_seconds: when nothing in it has moved for so
        long, all methods raise ``Stalled``.
    """

    splices = True

    def __init__(self, url: str, stall_seconds: float) -> None:
        parts = urlsplit(url)
        self._root = Path(unquote(parts.path))
        self._mark = parts.fragment
        self._stall_seconds = stall_seconds
        self._threads = PassingThreads(_THREADS, "folder")
        self._moved = 0
        self._files: ObjectFiles | None = None

    async def get_into(self, object_name: str, target: Target, *, progress: Progress | None = None,
                       ahead: Iterable[str] = ()) -> None:
        """As ``Bucket.get_into``."""
        if isinstance(target, FileSpan):
            await self._run(self._get_into, object_name, file=target, progress=progress)
            return
        data = memoryview(bytearray(len(target)))  # no thread that is left behind writes to what is another's by then
        await self._run(self._get_into, object_name, data, progress=progress)
        target[:] = data

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
        return await self._run(self._put_from, upload, file=FileSpan(fd, offset, length), progress=progress)

    async def put_bytes(self, upload: SignedUpload, data: bytes) -> bool:
        """As ``Bucket.put_bytes``."""
        return await self._run(self._put_bytes, upload, data)

    # --- in a thread

    async def _run(self, work: Callable[..., T], *arguments: object, file: FileSpan | None = None,
                   progress: Progress | None = None) -> T:
        """Run ``work(*arguments, file, told)``, where the file is opened anew, and ``told`` takes progress.

        When cancelled, it is waited for, but not for long.
        """
        left = False

        def told(count: int) -> None:
            if left:
                raise Cancelled(what=f"The transfer from or to the folder {self._root}")
            self._moved += 1
            if progress is not None:
                progress(count)

        def over(_: object) -> None:
            self._moved += 1
            if file is not None:
                os.close(file.fd)

        if file is not None:
            try:
                file = file._replace(fd=os.dup(file.fd))
            except OSError as error:
                raise self._unreachable(f"the folder {self._root}", error.strerror) from error
            arguments = (*arguments, file)
        submitted = self._threads.submit(work, *arguments, told)
        submitted.add_done_callback(over)
        future = asyncio.wrap_future(submitted)
        try:
            moved = -1
            while moved != self._moved:
                moved = self._moved
                await asyncio.wait([future], timeout=self._stall_seconds)
                if future.done():
                    return future.result()
            raise Stalled(what=f"The folder {self._root}", seconds=self._stall_seconds)
        except asyncio.CancelledError:
            left = True
            if not submitted.cancel():  # it has begun
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([future], timeout=LEAVE_SECONDS)
            raise
        finally:
            left = True
            submitted.cancel()
            future.cancel()

    def _get_into(self, object_name: str, target: Target, progress: Progress) -> None:
        with self._reading(object_name) as found:
            if found.size_bytes != size_of(target):
                raise WrongSize(object=object_name, found=found.size_bytes, expected=size_of(target))
            try:
                copied = fill(target, found.fd, 0, progress)
            except FileRefused as refused:
                raise disk_error(refused, target, object_name) from refused.error
            if copied != found.size_bytes:
                raise WrongSize(object=object_name, found=copied, expected=found.size_bytes)

    def _get_small(self, object_name: str, limit_bytes: int, _told: Progress) -> bytes:
        with self._reading(object_name) as found:
            if found.size_bytes > limit_bytes:
                raise TooLarge(what=f"The object {object_name}", size=found.size_bytes, limit=limit_bytes,
                               setting="the reader's limit")
            data = bytearray(found.size_bytes)
            del data[fill(memoryview(data), found.fd, 0):]
            return bytes(data)

    def _size(self, object_name: str, _told: Progress) -> int:
        with self._reading(object_name) as found:
            return found.size_bytes

    def _put_from(self, upload: SignedUpload, source: FileSpan, progress: Progress) -> bool:
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

    def _put_bytes(self, upload: SignedUpload, data: bytes, _told: Progress) -> bool:
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
