"""Bringing stored bytes into a channel's bucket: leave from the hub, a turn among the node's uploads, the PUT."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from .._checksum import crc32c
from ..config import Settings
from ..errors import Cancelled, FileChanged, KacheryError, ObjectMissing, UrlExpired
from ..net.bucket import Bucket, SignedUpload
from ..protocol.hub_bodies import SignedObject
from ..protocol.names import FileUri, object_name
from ..protocol.provide import Upload
from ..store.cache import note_use
from ..store.files import FileStore
from .ending import end_tasks
from .link import ChannelLink
from .slots import AdaptiveSlots
from .threads import in_thread
from .tools import Traffic

__all__ = ["Account", "Uploader", "crc32c_of", "put_signed"]

_SIGN_TRIES_MAX = 3
_CRC32C_BATCH_MAX = 8

T = TypeVar("T")


@dataclass
class Account:
    """How far the upload of a file is: the bytes of its objects that are in the bucket, and in all once known."""

    done_bytes: int = 0
    total_bytes: int | None = None


class Uploader:
    """Uploads what the local store holds to one channel's bucket; what is there already is not sent again.

    :param uploads: bounds the uploads of the whole node; :param threads: runs what reads the disk;
    :param hash_threads: runs what may have to read a whole file for its manifest; :param traffic: counts what was
        uploaded.
    """

    def __init__(self, link: ChannelLink, store: FileStore, settings: Settings, uploads: AdaptiveSlots,
                 threads: Executor, hash_threads: Executor, traffic: Traffic) -> None:
        self._link = link
        self._store = store
        self._uploads = uploads
        self._threads = threads
        self._hash_threads = hash_threads
        self._traffic = traffic
        self._span_bytes = settings.small_read_size_bytes
        self._closing = threading.Event()
        self._sign_batch_max = settings.sign_batch_max

    @property
    def sign_batch_max(self) -> int:
        """Objects that leave is asked for at once. Where their CRC-32C is told, they are read before the first goes."""
        return min(self._sign_batch_max, _CRC32C_BATCH_MAX) if self._link.info.crc32c else self._sign_batch_max

    def close(self) -> None:
        """Break off the reading of files for their manifests. Uploads end with the tasks that await them."""
        self._closing.set()

    async def sign(self, uploads: list[Upload]) -> list[SignedObject]:
        """Return leave for some objects, ``sign_batch_max`` at most.

        :raises KacheryError: the hub's refusal; or, where the bucket wants their CRC-32C, as ``put``.
        """
        objects = [(upload.sha1, upload.end - upload.start, await in_thread(
            self._threads, self._crc32c, upload) if self._link.info.crc32c else None) for upload in uploads]
        return await self._link.hub.sign_uploads(self._link.name, objects)

    async def put(self, upload: Upload, leave: SignedObject, bucket: Bucket) -> None:
        """Wait for a turn and upload one object; leave that has expired is asked for anew.

        :param bucket: the link's when leave was asked for. Once it has another, what was uploaded is not there.
        :raises KacheryError: the file is not what it was, or hub or bucket refused or fell silent.
        """
        async with self._uploads.slot(upload.end - upload.start) as progress:
            while True:
                if self._link.bucket is not bucket:
                    bucket = self._link.bucket
                    (leave,) = await self.sign([upload])
                try:
                    await self._put(upload, leave, progress)
                except KacheryError:
                    if self._link.bucket is bucket:
                        raise
                if self._link.bucket is bucket:
                    return

    async def put_file(self, uri: FileUri, account: Account | None = None) -> FileUri:
        """Upload what the bucket lacks of a stored file: its manifest and its chunks.

        :param account: kept while it goes on.
        :return: the URI with the manifest by which the bucket has it.
        :raises NotInStore, LinkInvalid, CorruptFile: the file is not, or not as it was, in the store.
        :raises KacheryError: as ``put``; what was uploaded stays.
        """
        account = Account() if account is None else account
        manifest_sha1, objects = await in_thread(self._hash_threads, self._objects, uri)
        account.total_bytes = sum(upload.end - upload.start for upload in objects)
        while True:
            bucket, batch_max = self._link.bucket, self.sign_batch_max
            for start in range(0, len(objects), batch_max):
                await self._put_batch(objects[start:start + batch_max], account)
            if bucket is self._link.bucket:
                break
            account.done_bytes = 0  # the channel has another bucket now: all has to be in that one
        return FileUri(uri.sha1, uri.label, manifest_sha1)

    async def _put_batch(self, objects: list[Upload], account: Account) -> None:
        absent = [upload for upload, there in zip(objects, await _all([
            self._is_there(upload) for upload in objects]), strict=True) if not there]
        account.done_bytes += sum(upload.end - upload.start for upload in {*objects} - {*absent})

        bucket = self._link.bucket

        async def put(upload: Upload, leave: SignedObject) -> None:
            await self.put(upload, leave, bucket)
            account.done_bytes += upload.end - upload.start

        if absent:
            await _all([put(upload, leave) for upload, leave in zip(absent, await self.sign(absent), strict=True)])

    def _objects(self, uri: FileUri) -> tuple[str | None, list[Upload]]:
        """Return the SHA-1 of the manifest, None of a short file, and the objects that make up the file."""
        located = self._store.find(uri.sha1)
        manifest_sha1, manifest = self._store.manifest_for(uri.sha1, uri.manifest_sha1, progress=self._check_open)
        if manifest is None or manifest_sha1 is None:
            return None, [Upload(uri.sha1, uri.sha1, 0, located.size, False)]
        size = self._store.find(manifest_sha1).size
        return manifest_sha1, [Upload(manifest_sha1, manifest_sha1, 0, size, False),
                               *(Upload(chunk.sha1, uri.sha1, chunk.start, chunk.end, False)
                                 for chunk in {chunk.sha1: chunk for chunk in manifest.chunks}.values())]

    def _check_open(self, _bytes_read: int) -> None:
        if self._closing.is_set():
            raise Cancelled(what="The reading of a file for its manifest")

    async def _is_there(self, upload: Upload) -> bool:
        try:
            size = await self._link.bucket.size(object_name(self._link.name, upload.sha1))
        except ObjectMissing:
            return False
        return size == upload.end - upload.start

    async def _put(self, upload: Upload, leave: SignedObject, progress: Callable[[int], None]) -> None:
        file = await in_thread(self._threads, self._open, upload.file_sha1, undo=lambda opened: opened.close())
        try:
            if upload.check:
                await in_thread(self._threads, self._check, file.fileno(), upload)
            length = upload.end - upload.start

            def put(leave: SignedUpload) -> Awaitable[bool]:
                return self._link.bucket.put_from(leave, file.fileno(), upload.start, length, progress=progress)

            if await put_signed(self._link, leave, put, lambda: self.sign([upload])):
                self._traffic.uploaded_objects += 1
                self._traffic.uploaded_bytes += length
        finally:
            file.close()

    def _open(self, sha1: str) -> BinaryIO:
        """Open a file for an upload; once it is open, an eviction does not disturb."""
        located = self._store.find(sha1)
        if not located.linked:
            note_use(located.path, time.time())
        return self._store.open(sha1)

    def _pieces(self, fd: int, upload: Upload) -> Iterator[bytes]:
        position = upload.start
        while position < upload.end:
            data = os.pread(fd, min(self._span_bytes, upload.end - position), position)
            if not data:
                break
            yield data
            position += len(data)

    def _crc32c(self, upload: Upload) -> int:
        value = 0
        with self._open(upload.file_sha1) as file:
            for data in self._pieces(file.fileno(), upload):
                value = crc32c(data, value)
        return value

    def _check(self, fd: int, upload: Upload) -> None:
        digest = hashlib.sha1(usedforsecurity=False)
        for data in self._pieces(fd, upload):
            digest.update(data)
        if digest.hexdigest() != upload.sha1:
            raise FileChanged(path=f"sha1://{upload.file_sha1}", why=f"bytes {upload.start} to {upload.end} have "
                                                                     f"another SHA-1 than {upload.sha1}")


def crc32c_of(link: ChannelLink, data: bytes) -> int | None:
    """The CRC-32C of bytes that are to be uploaded, where the bucket compares it; else None."""
    return crc32c(data) if link.info.crc32c else None


async def put_signed(link: ChannelLink, leave: SignedObject, put: Callable[[SignedUpload], Awaitable[bool]],
                     sign: Callable[[], Awaitable[list[SignedObject]]]) -> bool:
    """Upload one object by ``put``, and return what it returns; leave that has expired, or was given for another bucket
    than the channel has now, is asked for anew by ``sign``.

    :raises UrlExpired: the new leave had expired too, again and again. :raises KacheryError: as ``put`` and ``sign``.
    """
    tries = 1
    while True:
        try:
            return await put(SignedUpload(leave.object, leave.url, leave.headers, leave.resumable))
        except UrlExpired:
            if tries == _SIGN_TRIES_MAX:
                raise
            if tries > 1:  # the new one neither: the hub may give leave for a bucket that this node has not heard of
                await link.look_again()
        (leave,) = await sign()
        tries += 1


async def _all(works: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Await some things at once; when one fails, the others are ended first."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await end_tasks(tasks)
        raise
