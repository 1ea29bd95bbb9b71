"""Performs what ``protocol.provide.FileProvider`` decides for one channel: look files up, upload, say how far it is."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from ..config import Settings
from ..errors import (
    CorruptFile,
    DiskError,
    DiskFull,
    FileChanged,
    KacheryError,
    LinkInvalid,
    NotInStore,
    NotPermitted,
)
from ..net.bucket import Bucket
from ..protocol.hub_bodies import SignedObject
from ..protocol.manifest import Manifest
from ..protocol.provide import (
    Asked,
    BucketMoved,
    Event,
    FileProvider,
    LookedUp,
    LookUp,
    ProvideLimits,
    Said,
    Tick,
    Upload,
    Uploaded,
)
from ..store.files import FileStore
from .ending import begin_task, end_tasks
from .faults import logged_fault
from .link import ChannelLink
from .uploading import Uploader

__all__ = ["Providing"]

log = logging.getLogger("kachery_fast.node")

# About 40 MB of memory; files of one chunk have no manifest and are bounded by their number.
_MANIFEST_CHUNKS_KEPT = 200_000
_REASONS: tuple[tuple[type[KacheryError], str], ...] = (
    (NotInStore, "evicted"),
    (LinkInvalid, "changed-on-disk"),
    (FileChanged, "changed-on-disk"),
    (CorruptFile, "changed-on-disk"),
    (NotPermitted, "not-permitted"),
    (DiskError, "disk-error"),
    (DiskFull, "disk-error"),
)


class _MustBeRead(Exception):
    """A file has no manifest that can be trusted."""


class _Stopped(Exception):
    """Nobody waits any more for the manifest of a file."""


def _refuse_to_read(_bytes_read: int) -> None:
    raise _MustBeRead


class Providing:
    """Serves one channel from the local store.

    :param uploader: brings what is asked for into the bucket; :param threads: runs what reads the disk;
    :param hash_threads: runs what reads whole files for a manifest, minutes long, so that nothing else waits for it.
    """

    def __init__(self, link: ChannelLink, node_id: str, store: FileStore, settings: Settings,
                 uploader: Uploader, threads: Executor, hash_threads: Executor) -> None:
        self._link = link
        self._store = store
        self._uploader = uploader
        self._threads = threads
        self._hash_threads = hash_threads
        self._closing = threading.Event()
        self._machine = FileProvider(node_id, ProvideLimits(
            requests_max=settings.provide_requests_max,
            uploads_ahead_max=3 * settings.upload_concurrency,
            progress_interval_seconds=settings.progress_interval_seconds,
            ready_batch_seconds=settings.ready_batch_seconds,
        ))
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._lookups: dict[str, asyncio.Lock] = {}
        self._manifests: OrderedDict[tuple[str, str | None], tuple[str | None, Manifest | None]] = OrderedDict()
        self._manifests_lock = threading.Lock()
        link.on_bucket.append(self._bucket_moved)

    @property
    def load(self) -> int:
        """Objects queued or under way."""
        return self._machine.load

    def heard(self, body: Any, sender: str) -> None:
        """A node asks for something."""
        self._post(Asked(body, sender))

    async def close(self) -> None:
        """Stop; uploads under way are broken off, and so is the reading of a file for its manifest."""
        self._closing.set()
        if self._timer is not None:
            self._timer.cancel()
        await end_tasks(self._tasks)

    def _bucket_moved(self) -> None:
        self._post(BucketMoved())

    def _post(self, event: Event) -> None:
        loop = asyncio.get_running_loop()
        effects = self._machine.handle(event, loop.time())
        uploads = [effect for effect in effects if isinstance(effect, Upload)]
        for start in range(0, len(uploads), self._uploader.sign_batch_max):
            begin_task(self._upload_all(uploads[start:start + self._uploader.sign_batch_max]), self._tasks)
        for effect in effects:
            if isinstance(effect, LookUp):
                begin_task(self._look_up(effect), self._tasks)
            elif isinstance(effect, Said):
                self._link.say(effect.kind, effect.fields)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._machine.deadline
        if deadline is not None:
            self._timer = loop.call_at(deadline, self._post, Tick())

    async def _look_up(self, query: LookUp) -> None:
        loop = asyncio.get_running_loop()
        lock = self._lookups.setdefault(query.sha1, asyncio.Lock())
        try:
            async with lock:  # a file of 2022 without a manifest is hashed once, however many ask
                try:
                    found = await loop.run_in_executor(self._threads, self._find, query, _refuse_to_read)
                except _MustBeRead:
                    found = await loop.run_in_executor(self._hash_threads, self._find, query, self._check_open)
        finally:
            if not lock.locked():
                self._lookups.pop(query.sha1, None)
        self._post(found)

    def _check_open(self, _bytes_read: int) -> None:
        if self._closing.is_set():
            raise _Stopped

    def _find(self, query: LookUp, progress: Callable[[int], None]) -> LookedUp:
        """Look a file up; ``progress`` may raise when it has to be read, and to end the reading."""
        try:
            located = self._store.find(query.sha1)
            manifest_sha1, manifest = self._manifest(query, progress)
        except (_MustBeRead, _Stopped):
            raise
        except NotInStore:
            return LookedUp(query, reason="unknown")
        except KacheryError as error:
            return LookedUp(query, reason=_reason(error, "disk-error"), detail=error.message)
        except Exception as error:
            detail = logged_fault(error, f"channel {self._link.name}: the look-up of {query.sha1}")
            return LookedUp(query, reason="disk-error", detail=detail)
        return LookedUp(query, located.size, manifest, manifest_sha1)

    def _manifest(self, query: LookUp, progress: Callable[[int], None]) -> tuple[str | None, Manifest | None]:
        """Return the manifest to serve by, from memory if it was used lately: that of a 2 TB file is 10 MB to parse."""
        key = (query.sha1, query.manifest_sha1)
        with self._manifests_lock:
            known = self._manifests.pop(key, None)
        found = known if known is not None else self._store.manifest_for(*key, progress=progress)
        with self._manifests_lock:
            self._manifests[key] = found
            while len(self._manifests) > 1 and sum(
                    1 if m is None else len(m.chunks) for _, m in self._manifests.values()) > _MANIFEST_CHUNKS_KEPT:
                self._manifests.popitem(last=False)
        return found

    async def _upload_all(self, uploads: list[Upload]) -> None:
        """Sign in one request, then upload each; a failure to sign fails them all."""
        bucket = self._link.bucket
        try:
            signed = await self._uploader.sign(uploads)
        except Exception as error:
            for upload in uploads:
                self._post(self._failed(upload, error, "hub"))
            return
        for upload, leave in zip(uploads, signed, strict=True):
            begin_task(self._upload(upload, leave, bucket), self._tasks)

    async def _upload(self, upload: Upload, leave: SignedObject, bucket: Bucket) -> None:
        outcome = Uploaded(upload.sha1)
        try:
            await self._uploader.put(upload, leave, bucket)
        except Exception as error:
            outcome = self._failed(upload, error, "bucket")
        self._post(outcome)

    def _failed(self, upload: Upload, error: Exception, otherwise: str) -> Uploaded:
        """Every upload comes to an end that the machine hears of: it would wait for it for ever."""
        if isinstance(error, KacheryError):
            log.warning("channel %s: the upload of %s failed: %s", self._link.name, upload.sha1, error)
            return Uploaded(upload.sha1, _reason(error, otherwise), error.message)
        log.error("channel %s: the upload of %s failed", self._link.name, upload.sha1, exc_info=error)
        return Uploaded(upload.sha1, "disk-error" if isinstance(error, OSError) else otherwise, str(error))


def _reason(error: KacheryError, otherwise: str) -> str:
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    return otherwise


