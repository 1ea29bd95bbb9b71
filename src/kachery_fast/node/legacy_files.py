"""The local API of 2022 for files: what kachery-client 1.2 asks of its node. Bodies and answers as in docs/formats.md.

    POST /store                     a raw body with Content-Length   -> STORED
    POST /storeFile                 {"localFilePath"}                -> STORED
    POST /linkFile                  {"localFilePath", "size", "mtime"}  -> STORED
    POST /loadFile                  {"fileKey": KEY, "channelName"}  -> a stream of FRAMES
    POST /downloadFileData          {"fileKey": KEY, "startByte", "endByte"}  -> the bytes
    POST /uploadFile                {"sha1", "channel"}              -> {"success"}
    POST /createSignedFileUploadUrl {"channelName", "sha1", "size"}  -> {"success", "alreadyUploaded", "signedUrl"}

STORED is ``{"success", "error", "sha1", "manifestSha1"}``, KEY ``{"sha1", "manifestSha1", "chunkOf": {"fileKey": KEY,
"startByte", "endByte"}}``, a FRAME the length of some JSON in decimal, ``#``, and the JSON: ``progress``, then
``finished`` or ``error``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from aiohttp import web

from .._core import digest_buffer
from ..errors import (
    Cancelled,
    CorruptObject,
    FileChanged,
    InvalidArgument,
    KacheryError,
    LinkInvalid,
    NotInStore,
    ObjectMissing,
)
from ..protocol.access import Permission
from ..protocol.hub_bodies import SignedObject
from ..protocol.manifest import CHUNK_SIZE_BYTES_MAX
from ..protocol.names import FileUri, check_sha1, object_name
from ..store.files import Inspect
from ..store.objects import Located, Stored
from .api_parts import fault_of, permitted_link
from .legacy_parts import answer_success, read_legacy_body, tell_in_text
from .link import ChannelLink
from .receiving import STORE_2022_PATH, send_stored, store_body, tell_stored
from .threads import in_thread
from .uploading import crc32c_of, put_signed

if TYPE_CHECKING:
    from .node import Node

__all__ = ["LegacyFiles"]

log = logging.getLogger("kachery_fast.node")

_BODY_SIZE_BYTES_MAX = 1024 * 1024
_READING_THREADS = 4
_PATH_LENGTH_MAX = 4096  # of Linux (PATH_MAX)
_PROGRESS_INTERVAL_SECONDS = 2.0  # the client prints each of them
_MTIME_TOLERANCE_SECONDS = 0.002  # of 2022, which sent seconds as a double
_MISSING = "Error downloading file: Unable get data read stream for local file."  # of 2022

_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _ChunkOf(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    file_key: _FileKey
    start_byte: _Bytes
    end_byte: _Bytes


class _FileKey(msgspec.Struct, forbid_unknown_fields=True):
    sha1: str
    manifest_sha1: str | None = msgspec.field(default=None, name="manifestSha1")
    chunk_of: _ChunkOf | None = msgspec.field(default=None, name="chunkOf")

    def uri(self) -> FileUri:
        """:raises InvalidName: a SHA-1 is none."""
        return FileUri(check_sha1(self.sha1), "",
                       None if self.manifest_sha1 is None else check_sha1(self.manifest_sha1))


class _StoreFile(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    local_file_path: str


class _LinkFile(_StoreFile, forbid_unknown_fields=True, rename="camel"):
    size: _Bytes
    mtime: float


class _LoadFile(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    file_key: _FileKey
    channel_name: str


class _Download(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    file_key: _FileKey
    start_byte: _Bytes = 0
    end_byte: _Bytes | None = None


class _Upload(msgspec.Struct, forbid_unknown_fields=True):
    sha1: str
    channel: str


class _SignUpload(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    channel_name: str
    sha1: str
    size: _Bytes | None = None


class LegacyFiles:
    """The routes for one ``Node``; ``close`` when it stops."""

    def __init__(self, node: Node) -> None:
        self._node = node
        # Of its own: one such call takes minutes, and all others go by ``api_threads``.
        self._threads = ThreadPoolExecutor(_READING_THREADS, "read")

    def close(self) -> None:
        """Let go of the threads, whose callers are gone."""
        self._threads.shutdown(wait=True)

    def routes(self) -> list[web.RouteDef]:
        """Return what is to be served."""
        return [
            web.post(STORE_2022_PATH, self._store),
            web.post("/storeFile", self._store_file),
            web.post("/linkFile", self._link_file),
            web.post("/loadFile", self._load_file),
            web.post("/downloadFileData", self._download),
            web.post("/uploadFile", self._upload_file),
            web.post("/createSignedFileUploadUrl", self._sign_upload),
        ]

    # --- storing

    async def _store(self, request: web.Request) -> web.Response:
        if request.content_length is None:
            return tell_in_text("Missing Content-Length in header", 403)  # a chunked body may end anywhere
        return await store_body(self._node, request)

    async def _store_file(self, request: web.Request) -> web.Response:
        asked = await read_legacy_body(request, _StoreFile, _BODY_SIZE_BYTES_MAX)
        path = _absolute(asked.local_file_path)
        return await self._read_file(path, self._node.store.put_file, partial(self._inspect, path))

    async def _link_file(self, request: web.Request) -> web.Response:
        asked = await read_legacy_body(request, _LinkFile, _BODY_SIZE_BYTES_MAX)
        path = _absolute(asked.local_file_path)

        def inspect(found: os.stat_result) -> None:
            self._inspect(path, found)
            if found.st_size != asked.size:
                raise FileChanged(path=path, why=f"the client saw {asked.size} bytes, this node {found.st_size}")
            if not abs(found.st_mtime - asked.mtime) <= _MTIME_TOLERANCE_SECONDS:
                raise FileChanged(path=path, why="client and node see different times of its last change")

        return await self._read_file(path, self._node.store.link_file, inspect)

    async def _read_file(self, path: str, work: Callable[..., Stored], inspect: Inspect) -> web.Response:
        """Have the store read a whole file, until that is done, the client has gone, or the node stops."""
        gone = threading.Event()

        def check_wanted(_bytes_read: int) -> None:
            if gone.is_set():
                raise Cancelled(what=f"The reading of {path}")

        stored = await in_thread(self._threads, partial(work, path, progress=check_wanted, inspect=inspect),
                                 stop=gone.set)
        return tell_stored(STORE_2022_PATH, stored)

    def _inspect(self, path: str, opened: os.stat_result) -> None:
        """Refuse the node's own files: its key, its codes, its databases, by whatever name or link they were opened,
        and all else that lies below its directory, except what is stored there under its SHA-1.

        :raises InvalidArgument: it is one of them. :raises FileChanged: the path leads elsewhere by now.
        """
        root = self._node.settings.storage_dir
        own = {_id(root.stat())}
        with os.scandir(root) as entries:
            for entry in entries:
                own.add(_id(entry.stat(follow_symlinks=False)))
                with contextlib.suppress(OSError):
                    if not entry.is_dir():
                        own.add(_id(entry.stat()))  # where a link leads, as of a key that is kept elsewhere
        shared = None
        with contextlib.suppress(FileNotFoundError):
            shared = _id((root / "sha1").stat())
        real = Path(os.path.realpath(path))
        try:
            if _id(real.stat()) != _id(opened):
                raise FileChanged(path=path, why="another file was put in its place")
            above = [_id(directory.stat()) for directory in real.parents]
        except OSError as error:
            raise FileChanged(path=path, why=error.strerror or str(error)) from None
        for place in (_id(opened), *above):  # from the inside out, by inodes: a mount gives a directory another name
            if place == shared:
                return
            if place in own:
                raise InvalidArgument(what=f"{path[:200]!r} is one of the node's own files, and not stored by its "
                                           "path.")

    # --- loading

    async def _load_file(self, request: web.Request) -> web.StreamResponse:
        asked = await read_legacy_body(request, _LoadFile, _BODY_SIZE_BYTES_MAX)
        uri = asked.file_key.uri()
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        task = asyncio.get_running_loop().create_task(self._load(asked.file_key, uri, asked.channel_name))
        try:
            await self._tell_progress(response, uri, task)
            located = task.result()
        except ConnectionError:
            raise
        except Exception as error:  # the head is out: the error is the last frame
            told = error if isinstance(error, KacheryError) else fault_of(request, error)
            log.warning("a client asked for %s: %s", uri, told)
            await _write_frame(response, {"type": "error", "error": told.message})
            return response
        finally:
            task.cancel()
            await asyncio.wait([task])
        await _write_frame(response, {"type": "progress", "bytesLoaded": located.size, "bytesTotal": located.size})
        await _write_frame(response, {"type": "finished", "localFilePath": str(located.path)})
        return response

    async def _tell_progress(self, response: web.StreamResponse, uri: FileUri, task: asyncio.Task[Located]) -> None:
        while not (await asyncio.wait([task], timeout=_PROGRESS_INTERVAL_SECONDS))[0]:
            transfer = self._node.transfers.active(uri.sha1)
            received, total = (0, None) if transfer is None else (transfer.received, transfer.total)
            await _write_frame(response, {"type": "progress", "bytesLoaded": received, "bytesTotal": total or 0})

    async def _load(self, key: _FileKey, uri: FileUri, channel: str) -> Located:
        node = self._node
        with contextlib.suppress(NotInStore, LinkInvalid):
            return await in_thread(node.api_threads, node.store.find, uri.sha1)
        if key.chunk_of is not None:
            return await self._load_chunk(uri.sha1, key.chunk_of, channel)
        link = await permitted_link(node, uri, channel, Permission.REQUEST_FILES, suffices=ChannelLink.providers)
        return await node.transfers.load(uri, link)

    async def _load_chunk(self, sha1: str, part: _ChunkOf, channel: str) -> Located:
        """Make a file of a chunk, since an old client opens it as one.

        It is cut from its file where that is here, taken from the bucket, or had from a node that has the file.
        """
        node, whole = self._node, part.file_key.uri()
        length = part.end_byte - part.start_byte
        if not 0 < length <= CHUNK_SIZE_BYTES_MAX:
            raise InvalidArgument(what=f"bytes {part.start_byte} to {part.end_byte} are not those of a chunk")
        data = await in_thread(node.api_threads, self._cut, whole.sha1, part.start_byte, length)
        if data is None:
            link = await permitted_link(node, whole, channel, Permission.REQUEST_FILES,
                                        suffices=ChannelLink.providers)
            try:
                data = await link.bucket.get_small(object_name(link.name, sha1), length)
            except ObjectMissing:
                _, spans = await node.transfers.read(whole, link, part.start_byte, part.end_byte)
                async with contextlib.aclosing(spans):
                    data = b"".join([span async for span in spans])
        return await in_thread(node.api_threads, self._keep_chunk, sha1, data)

    def _cut(self, sha1: str, start: int, length: int) -> bytes | None:
        try:
            with self._node.store.open(sha1) as file:
                return os.pread(file.fileno(), length, start)
        except (NotInStore, LinkInvalid):
            return None

    def _keep_chunk(self, sha1: str, data: bytes) -> Located:
        store = self._node.store
        found = digest_buffer(data, CHUNK_SIZE_BYTES_MAX).sha1
        if found != sha1:
            raise CorruptObject(object=f"sha1://{sha1}", found=found, sha1=sha1)
        return store.adopt_bytes(data, sha1)

    async def _download(self, request: web.Request) -> web.StreamResponse:
        asked = await read_legacy_body(request, _Download, _BODY_SIZE_BYTES_MAX)
        node, sha1 = self._node, asked.file_key.uri().sha1
        try:
            located = await in_thread(node.api_threads, node.store.find, sha1)
        except (NotInStore, LinkInvalid) as error:
            return tell_in_text(f"{_MISSING} {error.message}", 500)
        start, end = asked.start_byte, located.size if asked.end_byte is None else asked.end_byte
        if not start <= end <= located.size:
            raise InvalidArgument(what=f"bytes {start} to {end} are not a range of a file of {located.size} bytes")
        return await send_stored(node, request, sha1, start, end, "application/octet-stream")

    # --- uploading

    async def _upload_file(self, request: web.Request) -> web.Response:
        asked = await read_legacy_body(request, _Upload, _BODY_SIZE_BYTES_MAX)
        uri = FileUri(check_sha1(asked.sha1))
        link = await permitted_link(self._node, uri, asked.channel, Permission.PROVIDE_FILES)
        await self._node.uploader(link).put_file(uri)
        return answer_success()

    async def _sign_upload(self, request: web.Request) -> web.Response:
        asked = await read_legacy_body(request, _SignUpload, _BODY_SIZE_BYTES_MAX)
        sha1 = check_sha1(asked.sha1)
        link = await permitted_link(self._node, f"sha1://{sha1}", asked.channel_name, Permission.PROVIDE_FILES)
        with contextlib.suppress(ObjectMissing):
            if await link.bucket.size(object_name(link.name, sha1)) == asked.size or asked.size is None:
                return answer_success(alreadyUploaded=True, signedUrl="")

        async def take(data: bytes) -> None:
            found = hashlib.sha1(data, usedforsecurity=False).hexdigest()
            if found != sha1:
                raise InvalidArgument(what=f"the bytes have the SHA-1 {found}, and {sha1} was announced")

            async def sign() -> list[SignedObject]:
                return await link.hub.sign_uploads(link.name, [(sha1, len(data), crc32c_of(link, data))])

            (leave,) = await sign()
            await put_signed(link, leave, lambda upload: link.bucket.put_bytes(upload, data), sign)

        url = self._node.deposits.expect(request, asked.size, CHUNK_SIZE_BYTES_MAX, take)
        return answer_success(alreadyUploaded=False, signedUrl=url)


def _id(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _absolute(path: str) -> str:
    """:raises InvalidArgument: a path is relative, or longer than any."""
    if len(path) > _PATH_LENGTH_MAX:
        raise InvalidArgument(what=f"{path[:200]!r}… has {len(path)} characters; a path has up to {_PATH_LENGTH_MAX}.")
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(what=f"{path[:200]!r} is not an absolute path. The node has another working directory "
                                   "than its client.")
    return path


async def _write_frame(response: web.StreamResponse, message: dict[str, object]) -> None:
    data = msgspec.json.encode(message)
    await response.write(b"%d#%b" % (len(data), data))
