"""Files straight from a public channel's bucket, without a node: what the bucket has, anybody may read.

The manifest comes first, then the chunks that are wanted, each verified by its SHA-1; a whole file is put together
beside its place in the local store, where a broken download goes on the next time, and adopted once the SHA-1 of the
whole is right. Nobody is asked to upload anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from .._chunker import ChunkMemory
from ..config import Settings
from ..errors import (
    ChannelPrivate,
    CorruptObject,
    DiskError,
    KacheryError,
    ManifestInvalid,
    NotAvailable,
    NotInStore,
    ObjectMissing,
    UploadRefused,
    WrongSize,
)
from ..net.bucket import FileSpan, HttpBucket
from ..net.public import find_bucket_url
from ..net.ranges import RangeClient
from ..protocol.manifest import CHUNK_SIZE_BYTES_MAX, MANIFEST_SIZE_BYTES_MAX, Chunk, Manifest, parse_manifest
from ..protocol.names import FileUri, object_name
from ..store.destination import Destination
from ..store.files import FileStore
from ..store.objects import Located
from .progress import Progress, ProgressCallback
from .recent import Found, Recent

__all__ = ["load_directly", "read_directly"]

_T = TypeVar("_T")
_EMPTY_SHA1 = hashlib.sha1(b"", usedforsecurity=False).hexdigest()
_PROGRESS_INTERVAL_SECONDS = 0.25
_NEVER = "nobody is asked to upload it in direct mode; a node would ask"


def load_directly(uri: FileUri, hub_url: str, channel: str, store: FileStore, settings: Settings,
                  progress: ProgressCallback | None) -> Located:
    """Bring a whole file into the local store.

    :param progress: called in this thread, about four times a second; what it raises ends the download.
    :raises NotAvailable: the bucket does not have all of it. :raises ChannelPrivate: not everybody may read there.
    :raises CorruptObject, ManifestInvalid: what the bucket has is damaged.
    :raises HubUnreachable, HubError, NotOnHub, BucketUnreachable, Stalled: hub or bucket could not be asked.
    :raises DiskFull, DiskError: the store takes no more.
    """
    download = _Download(uri, channel, store, settings)
    with _loop_thread() as run:
        future = run(download.load(hub_url))
        while not wait([future], timeout=_PROGRESS_INTERVAL_SECONDS).done:
            if progress is not None:
                progress(Progress(download.received, download.total, download.waiting))
        located = future.result()
    if progress is not None:
        progress(Progress(located.size, located.size))
    return located


def read_directly(uri: FileUri, hub_url: str, channel: str, store: FileStore, settings: Settings, start: int,
                  end: int | None, check: Callable[[int], None]) -> Generator[bytes, None, None]:
    """Yield the bytes ``start`` to ``end`` (None: the file's end); only the chunks that hold them are fetched.

    :param check: called with the file's size before anything is fetched; it raises when the range is outside of it.
    :raises KacheryError: as ``load_directly``.
    """
    file = (hub_url, channel, uri.sha1, uri.manifest_sha1)
    with _Reading(uri, hub_url, channel, store, settings) as reading:
        found = _recent.find(file)
        if found is None:
            found = reading.begin()
            _recent.note(file, found)
        check(found.size)
        stop = found.size if end is None else end
        chunks = [chunk for chunk in found.chunks if chunk.start < stop and chunk.end > start]
        try:
            coming: _Coming | None = None
            for number, chunk in enumerate(chunks):
                data = reading.get(found, chunk, coming)
                # The next one comes in while the caller uses this one.
                coming = reading.ask(found, chunks[number + 1]) if number + 1 < len(chunks) else None
                yield data[max(0, start - chunk.start):stop - chunk.start]
        except KacheryError:
            _recent.forget(file)  # what was found a moment ago may not be so any more
            raise


_recent = Recent()


class _Coming(NamedTuple):
    """``data``: the bytes of a chunk, when they are here. ``own``: whether it is this read that fetches them."""

    data: Future[bytes]
    own: bool


class _Reading:
    """One read of a file. What it does not have to fetch costs neither a thread nor a connection."""

    def __init__(self, uri: FileUri, hub_url: str, channel: str, store: FileStore, settings: Settings) -> None:
        self._make = partial(_Download, uri, channel, store, settings)
        self._hub_url = hub_url
        self._channel = channel
        self._parts = ExitStack()
        self._begun: tuple[_Download, Callable[..., Future[Any]]] | None = None

    def __enter__(self) -> _Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    def _begin(self) -> tuple[_Download, Callable[..., Future[Any]]]:
        if self._begun is None:
            download, run = self._make(), self._parts.enter_context(_loop_thread())
            self._parts.callback(lambda: run(download.close()).result())
            self._begun = download, run
        return self._begun

    def begin(self) -> Found:
        """Ask the hub and the bucket for the file."""
        download, run = self._begin()
        found: Found = run(download.begin(self._hub_url)).result()
        return found

    def ask(self, found: Found, chunk: Chunk) -> _Coming:
        """See to it that the bytes of a chunk come."""

        def fetch() -> Future[bytes]:
            download, run = self._begin()
            download.go_on(found)
            return run(download.fetch(chunk))

        return _Coming(*_recent.chunk((found.bucket_url, self._channel, chunk.sha1), chunk.end - chunk.start, fetch))

    def get(self, found: Found, chunk: Chunk, coming: _Coming | None) -> bytes:
        """Return the bytes of a chunk. :param coming: what ``ask`` returned for it, if it was asked for."""
        while True:
            coming = coming or self.ask(found, chunk)
            try:
                return coming.data.result()
            except (KacheryError, CancelledError):
                if coming.own:
                    raise
            coming = None


class _Download:
    """One file on its way from the bucket. Its coroutines run on one loop, that of ``_loop_thread``."""

    def __init__(self, uri: FileUri, channel: str, store: FileStore, settings: Settings) -> None:
        self._uri = uri
        self._channel = channel
        self._store = store
        self._settings = settings
        self._ranges = RangeClient(settings, concurrency=settings.download_concurrency)
        self._bucket: HttpBucket | None = None
        self._manifest: Manifest | None = None
        self.chunks: tuple[Chunk, ...] = ()
        self.total: int | None = None
        self.received = 0
        self._counting = threading.Lock()
        self.waiting = "asking the hub"

    def go_on(self, found: Found) -> None:
        """Go on from what was found before."""
        if self._bucket is None:
            self._bucket = HttpBucket(found.bucket_url, self._ranges, self._settings)
            self._manifest, self.chunks, self.total = found.manifest, found.chunks, found.size

    async def begin(self, hub_url: str) -> Found:
        """Find the bucket, the manifest, and the file's size."""
        url = await find_bucket_url(hub_url, self._channel, self._settings)
        self._bucket = HttpBucket(url, self._ranges, self._settings)
        self.waiting = "looking in the bucket"
        with self._refusals():
            return await self._look(url, self._bucket)

    async def _look(self, url: str, bucket: HttpBucket) -> Found:
        self._manifest = await self._find_manifest()
        if self._uri.sha1 == _EMPTY_SHA1:  # nobody uploads an empty file
            size = 0
        elif self._manifest is not None:
            size, self.chunks = self._manifest.size, self._manifest.chunks
        else:
            try:
                size = await bucket.size(self._name(self._uri.sha1))
            except ObjectMissing as error:
                raise self._absent("the bucket does not have it") from error
            if size > CHUNK_SIZE_BYTES_MAX:
                raise self._absent(f"the bucket has one object of {size} bytes, too long to be verified piece by "
                                   "piece; use the URI with its manifest")
            if not size:
                raise WrongSize(object=self._name(self._uri.sha1), found=0, expected="more")
            self.chunks = (Chunk(0, size, self._uri.sha1),)
        self.total = size
        return Found(url, self._manifest, size, self.chunks)

    async def _find_manifest(self) -> Manifest | None:
        """Return the manifest that the URI names; None when it names none, or the bucket does not have it."""
        name = self._uri.manifest_sha1
        if name is None or self._bucket is None:
            return None
        try:
            with self._store.open(name) as file:
                data = file.read(MANIFEST_SIZE_BYTES_MAX)
        except NotInStore:
            try:
                data = await self._bucket.get_small(self._name(name), MANIFEST_SIZE_BYTES_MAX)
            except ObjectMissing:
                return None
        manifest = parse_manifest(data, name=name)
        if manifest.sha1 != self._uri.sha1:
            raise ManifestInvalid(manifest=name, why=f"it is of another file, sha1://{manifest.sha1}. The URI puts "
                                                     "together a file and another file's manifest")
        return manifest

    async def fetch(self, chunk: Chunk) -> bytes:
        """Return the verified bytes of one chunk."""
        data = bytearray(chunk.end - chunk.start)

        def is_sound() -> bool:
            return hashlib.sha1(data, usedforsecurity=False).hexdigest() == chunk.sha1

        for _ in range(self._settings.corrupt_retries_max):
            await self._receive(chunk, memoryview(data))
            if await asyncio.to_thread(is_sound):
                return bytes(data)
        raise self._corrupt(chunk, hashlib.sha1(data, usedforsecurity=False).hexdigest())

    async def load(self, hub_url: str) -> Located:
        """Bring the whole into the store."""
        threads = ThreadPoolExecutor(self._settings.download_concurrency + 1, "direct")
        destination: Destination | None = None
        try:
            size = (await self.begin(hub_url)).size
            self.waiting = "checking what a former attempt left"
            destination = Destination(self._store, self._uri.sha1, self._manifest, self.chunks, size, whole=True)
            stopped = threading.Event()
            try:
                good = set(await _in(threads, destination.recover, stopped.is_set))
                self.received = sum(chunk.end - chunk.start for n, chunk in enumerate(self.chunks) if n in good)
                self.waiting = ""
                await self._fill(destination, [n for n in range(len(self.chunks)) if n not in good], threads)
            finally:
                stopped.set()
            self.waiting = "flushing it to the disk"
            return await _in(threads, self._finish, destination)
        finally:
            # A thread that still reads or writes the file is waited for before it is closed.
            threads.shutdown(wait=True)
            await self.close()
            if destination is not None:
                destination.close(keep=destination.was_there or self.received > 0)

    async def _fill(self, destination: Destination, missing: list[int], threads: ThreadPoolExecutor) -> None:
        remaining = iter(missing)

        async def work() -> None:
            for index in remaining:  # shared: each chunk goes to one worker
                await self._receive_into(destination, index, threads)

        workers = [asyncio.ensure_future(work()) for _ in range(self._settings.download_concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _receive_into(self, destination: Destination, index: int, threads: ThreadPoolExecutor) -> None:
        chunk, bucket = self.chunks[index], self._bucket
        for _ in range(self._settings.corrupt_retries_max):
            splices = bucket is not None and bucket.splices
            place = destination.open_span(index) if splices else destination.open_chunk(index)
            try:
                await self._receive(chunk, place.view if isinstance(place, ChunkMemory) else
                                    FileSpan(place.fd, place.start, place.size))
            finally:
                destination.close_chunk(place)
            if await _in(threads, destination.verify_chunk, index):
                return
            self._moved(chunk.start - chunk.end)
        raise self._corrupt(chunk, await _in(threads, destination.digest_of, index))

    def _finish(self, destination: Destination) -> Located:
        while destination.next_index < len(self.chunks):
            if not destination.verify_next():
                chunk = self.chunks[destination.next_index]
                raise DiskError(action="the reading back", path=f"sha1://{self._uri.sha1}",
                                why=f"the bytes {chunk.start} to {chunk.end} are not what was written. Try again")
        found = destination.whole_sha1()
        if found != self._uri.sha1:
            destination.remove()
            name = self._uri.manifest_sha1
            raise ManifestInvalid(manifest=name, why=f"its chunks together have the SHA-1 {found}, not that of "
                                                     f"sha1://{self._uri.sha1}")
        return destination.adopt()

    async def _receive(self, chunk: Chunk, target: Any) -> None:
        if self._bucket is None:
            raise AssertionError("the bucket is found first")
        before = self.received
        try:
            with self._refusals():
                await self._bucket.get_into(self._name(chunk.sha1), target, progress=self._moved)
        except ObjectMissing as error:
            raise self._absent(f"the bucket has it in part, without the bytes {chunk.start} to {chunk.end}"
                               if before or self._manifest is not None else "the bucket does not have it") from error

    def _moved(self, count: int) -> None:
        with self._counting:  # each connection is served by a thread of its own
            self.received += count

    async def close(self) -> None:
        """Let go of every connection."""
        await self._ranges.close()

    def _name(self, sha1: str) -> str:
        return object_name(self._channel, sha1)

    @contextmanager
    def _refusals(self) -> Generator[None, None, None]:
        """The hub said a moment ago that everybody may read: that has changed."""
        try:
            yield
        except UploadRefused as error:
            if error.details.get("status") not in (401, 403):
                raise
            raise ChannelPrivate(channel=self._channel) from error

    def _absent(self, why: str) -> NotAvailable:
        return NotAvailable(uri=str(self._uri), channel=self._channel, why=why, tried=f"the bucket ({_NEVER})")

    def _corrupt(self, chunk: Chunk, found: str) -> CorruptObject:
        return CorruptObject(object=self._name(chunk.sha1), found=found, sha1=chunk.sha1)


async def _in(threads: ThreadPoolExecutor, work: Callable[..., _T], *arguments: Any) -> _T:
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


@contextmanager
def _loop_thread() -> Generator[Callable[[Coroutine[Any, Any, _T]], Future[_T]], None, None]:
    """Yield what runs a coroutine on an event loop in a thread of its own, as the caller may have one already.

    Leaving cancels what still runs and waits for its end.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="kachery-direct", daemon=True)
    thread.start()
    try:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop)
    finally:
        asyncio.run_coroutine_threadsafe(_end_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
