"""Nodes' ends of a channel in one process: real links, providers, transfers and stores over the network in memory.

``Network`` stands for hub, bucket and bands; ``nothing_left`` looks for what a test's node should have let go of.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import psutil

from kachery_fast.config import Settings, load_settings
from kachery_fast.errors import HubUnreachable, KacheryError, ResultRefused
from kachery_fast.net.hub import HubClient
from kachery_fast.net.memory import MemoryBroker, MemoryBucket
from kachery_fast.net.ranges import RangeClient
from kachery_fast.node.identity import Identity
from kachery_fast.node.link import ChannelLink
from kachery_fast.node.providing import Providing
from kachery_fast.node.slots import AdaptiveSlots
from kachery_fast.node.tools import Tools, Traffic
from kachery_fast.node.transfers import Transfers, request_limits
from kachery_fast.node.uploading import Uploader
from kachery_fast.protocol import claims
from kachery_fast.protocol.access import Permission
from kachery_fast.protocol.hub_bodies import (
    ChannelInfo,
    ClaimTask,
    FinishTask,
    Member,
    PubsubInfo,
    SignedObject,
    TaskClaim,
)
from kachery_fast.protocol.names import (
    BAND_KINDS,
    FileUri,
    band_name,
    object_name,
    result_object_name,
    segment_object_name,
    subfeed_object_name,
)
from kachery_fast.protocol.signing import private_key, public_id
from kachery_fast.protocol.tasks import check_result
from kachery_fast.store.files import FileStore

CHANNEL = "lab"
CHUNK = 64 * 1024
ALL = [permission.value for permission in Permission]
QUICK: dict[str, Any] = {
    "chunk_size_bytes": CHUNK, "offer_wait_seconds": 0.4, "offer_gather_seconds": 0.01, "patience_seconds": 3.0,
    "provider_silence_seconds": 1.5, "retry_base_seconds": 0.01, "retry_cap_seconds": 0.1, "ready_batch_seconds": 0.01,
    "progress_interval_seconds": 0.1, "connect_timeout_seconds": 5.0, "stall_seconds": 5.0,
    "channel_refresh_seconds": 60.0,
}


def data_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def identity_of(name: str) -> Identity:
    key = private_key(hashlib.sha256(name.encode()).digest())
    return Identity(key, public_id(key))


def settings_for(storage_dir: Path, **overrides: Any) -> Settings:
    return load_settings({}, storage_dir=storage_dir, **{**QUICK, **overrides})


class FilesBucket(MemoryBucket):
    """The bucket in memory, filled through a file span as the one over plain HTTP is."""

    splices = True


class MemoryHub:
    """What nodes ask of a hub, answered from memory. ``down`` makes it unreachable; ``clock`` is its own.

    ``of`` gives the hub as one node sees it, which is what a link wants.
    """

    url = "http://127.0.0.1:1"

    def __init__(self, bucket: MemoryBucket) -> None:
        self.bucket = bucket
        self.down = False
        self.clock: Callable[[], float] = time.time
        self.lease_seconds = 20.0
        self.signed: list[list[tuple[str, int]]] = []
        self.reports: list[tuple[str, str]] = []
        self.bad_results: list[str] = []
        self.claims: dict[tuple[str, str], claims.Claim] = {}
        self.granted: list[tuple[str, str]] = []  # (node id, task), one for each claim that was given
        self.may_provide_tasks: Callable[[str], bool] = lambda _node_id: True

    def of(self, node_id: str) -> HubOfNode:
        """The hub as one node sees it."""
        return HubOfNode(self, node_id)

    def now_ms(self) -> int:
        return int(self.clock() * 1000)

    async def sign_uploads(
        self, channel: str, objects: Sequence[tuple[str, int] | tuple[str, int, int | None]]
    ) -> list[SignedObject]:
        await self.reached()
        self.signed.append([(item[0], item[1]) for item in objects])
        return [self._leave(item[0], object_name(channel, item[0])) for item in objects]

    async def sign_feed_uploads(
        self, channel: str, feed_id: str, subfeed: str,
        segments: Sequence[tuple[str, int] | tuple[str, int, int | None]], index_size_bytes: int | None = None,
        index_crc32c: int | None = None,
    ) -> list[SignedObject]:
        await self.reached()
        self.signed.append([(item[0], item[1]) for item in segments])
        leaves = [self._leave(item[0], segment_object_name(channel, feed_id, subfeed, item[0])) for item in segments]
        if index_size_bytes is not None:
            leaves.append(self._leave("", subfeed_object_name(channel, feed_id, subfeed), replace=True))
        return leaves

    async def sign_task_result(self, channel: str, result_id: str, size: int, *, replace: bool = False,
                               crc32c: int | None = None) -> SignedObject:
        await self.reached()
        self.signed.append([(result_id, size)])
        return self._leave(result_id, result_object_name(channel, result_id), replace=replace)

    async def report_corrupt(
        self, channel: str, sha1: str, found: str, *, feed_id: str = "", subfeed: str = ""
    ) -> bool:
        await self.reached()
        self.reports.append((sha1, found))
        name = segment_object_name(channel, feed_id, subfeed, sha1) if feed_id else object_name(channel, sha1)
        if name in self.bucket.objects and sha1_of(self.bucket.objects[name]) == sha1:
            return False
        self.bucket.objects.pop(name, None)
        return True

    async def report_bad_result(self, channel: str, result_id: str) -> bool:
        await self.reached()
        self.bad_results.append(result_id)
        name = result_object_name(channel, result_id)
        if name not in self.bucket.objects:
            return False
        try:
            if self.may_provide_tasks(check_result(self.bucket.objects[name], result_id, channel).node_id):
                return False
        except ResultRefused:
            pass
        del self.bucket.objects[name]
        return True

    async def find_task(self, channel: str, task: str) -> TaskClaim:
        await self.reached()
        found = self.claims.get((channel, task))
        if found is not None:
            found = claims.look(found, self.now_ms())
            if found.state == "unknown":
                self.claims[channel, task] = found
        return claims.describe(found, task)

    async def reached(self) -> None:
        """What begins each request: the way to the hub."""
        await asyncio.sleep(0)
        if self.down:
            raise HubUnreachable(url=self.url, why="connection refused")

    def _leave(self, sha1: str, name: str, *, replace: bool = False) -> SignedObject:
        return SignedObject(sha1, name, self.bucket.sign(name, replace=replace).url, {})


class HubOfNode:
    """``MemoryHub`` as one node sees it; by the hub's own rules of claims."""

    def __init__(self, hub: MemoryHub, node_id: str) -> None:
        self._hub = hub
        self._node_id = node_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name)

    async def claim_task(self, channel: str, task: str, kind: str, function: str, *, idempotent: bool = False,
                         attempt: str = "") -> TaskClaim:
        hub = self._hub
        await hub.reached()
        asked = ClaimTask(channel=channel, time=hub.now_ms(), id="", task=task, kind=kind, function=function,
                          idempotent=idempotent, attempt=attempt)
        standing, granted = claims.claim(hub.claims.get((channel, task)), asked, self._node_id, hub.now_ms(),
                                         int(hub.lease_seconds * 1000))
        hub.claims[channel, task] = standing
        if granted:
            hub.granted.append((self._node_id, task))
        return claims.describe(standing, task, granted=granted)

    async def keep_tasks(self, channel: str, tasks: list[str]) -> set[str]:
        hub = self._hub
        await hub.reached()
        lost = set()
        for task in tasks:
            found = hub.claims.get((channel, task))
            kept = found and claims.keep(found, self._node_id, hub.now_ms(), int(hub.lease_seconds * 1000))
            if kept:
                hub.claims[channel, task] = kept
            else:
                lost.add(task)
        return lost

    async def finish_task(
        self, channel: str, task: str, state: str, receipt: dict[str, Any] | None = None, *, attempt: str = ""
    ) -> TaskClaim:
        hub = self._hub
        await hub.reached()
        asked = FinishTask(channel=channel, time=hub.now_ms(), id="", task=task, state=state, receipt=receipt,
                           attempt=attempt)
        hub.claims[channel, task] = claims.finish(hub.claims.get((channel, task)), asked, self._node_id)
        return claims.describe(hub.claims[channel, task], task)


class Network:
    """A channel and its nodes."""

    def __init__(self, root: Path, bucket: MemoryBucket | None = None, channel: str = CHANNEL) -> None:
        self.root = root
        self.channel = channel
        self.bucket = bucket or MemoryBucket()
        self.bucket_url = "http://127.0.0.1:1/bucket"
        self.broker = MemoryBroker(message_size_bytes_max=60000)
        self.hub = MemoryHub(self.bucket)
        self.hub.may_provide_tasks = self._may_provide_tasks
        self.members: dict[str, list[str]] = {}
        self.peers: list[Peer] = []

    def info(self, name: str) -> ChannelInfo:
        members = [Member(identity_of(known).node_id, known, permissions)
                   for known, permissions in self.members.items()]
        return ChannelInfo(self.channel, "owner", self.members.get(name, []), self.bucket_url,
                           PubsubInfo("ably"), members)

    def _may_provide_tasks(self, node_id: str) -> bool:
        return any(identity_of(name).node_id == node_id and Permission.PROVIDE_TASKS.value in permissions
                   for name, permissions in self.members.items())

    async def peer(self, name: str, permissions: list[str] | None = None, **settings: Any) -> Peer:
        """Add a node, and tell the others of it."""
        self.members[name] = ALL if permissions is None else permissions
        peer = Peer(self, name, settings_for(self.root / name, **settings))
        self.peers.append(peer)
        for other in self.peers:
            other.link.update(self.info(other.name))
        await peer.link.start()
        await until(lambda: peer.link.connected)
        await asyncio.sleep(0.01)
        return peer

    def move(self, *hear: Peer) -> None:
        """Have the channel move to another bucket, which is empty. Some hear of it; the others when they ask."""
        self.bucket = self.hub.bucket = MemoryBucket()
        self.bucket_url += "/another"
        for peer in hear:
            peer.link.update(self.info(peer.name))

    async def close(self) -> None:
        for peer in self.peers:
            await peer.close()

    def object(self, sha1: str) -> str:
        return object_name(self.channel, sha1)


class Peer:
    """One node's end of a channel."""

    def __init__(self, network: Network, name: str, settings: Settings, *, share: Peer | None = None) -> None:
        self.network = network
        self.name = name
        self.settings = settings
        self.identity = identity_of(name)
        self.store = FileStore(settings.storage_dir, chunk_size_bytes=settings.chunk_size_bytes, durable=False)
        self.heard: list[tuple[Any, str]] = []
        self.refreshed = 0
        self.serves = True
        self.ranges = RangeClient(settings, concurrency=2)
        self.threads = ThreadPoolExecutor(4, "disk")
        self.link = ChannelLink(
            network.info(name), cast(HubClient, network.hub.of(self.identity.node_id)), self.identity, settings,
            self.ranges, refresh=self._refresh, on_request=self._handed_on,
            open_channel=lambda channel, _pubsub, *, client_id, **_: network.broker.channel(
                channel, client_id, {band_name(channel, kind): ["publish", "subscribe"] for kind in BAND_KINDS}))
        self.link._open_bucket = lambda url: network.bucket  # type: ignore[method-assign]
        self.link.bucket = network.bucket
        self.traffic = Traffic()
        self.hash_threads = ThreadPoolExecutor(2, "hash")
        self.uploader = Uploader(self.link, self.store, settings,
                                 AdaptiveSlots(settings.upload_concurrency, time.monotonic), self.threads,
                                 self.hash_threads, self.traffic)
        self.providing = Providing(self.link, self.identity.node_id, self.store, settings, self.uploader, self.threads,
                                   self.hash_threads)
        self.tools = Tools(self.store, request_limits(settings), self.threads, self.threads,
                           asyncio.Semaphore(settings.download_concurrency), self.traffic)
        self.transfers = Transfers(self.tools, settings)

    def put(self, data: bytes) -> FileUri:
        stored = self.store.put_bytes(data)
        return FileUri(stored.sha1, "", stored.manifest_sha1)

    async def load(self, uri: FileUri) -> bytes:
        return (await self.transfers.load(uri, self.link)).path.read_bytes()

    async def read(self, uri: FileUri, start: int, end: int | None) -> bytes:
        length, spans = await self.transfers.read(uri, self.link, start, end)
        data = b"".join([span async for span in spans])
        assert len(data) == length
        return data

    def parts(self) -> list[Path]:
        return list(self.settings.storage_dir.rglob("*.part"))

    def traces(self, uri: FileUri) -> list[Path]:
        """What is on the disk of a download: the partial file, and the marker that says where it lies."""
        return [path for path in self.settings.storage_dir.rglob(f"{uri.sha1}*") if path.name != uri.sha1]

    async def close(self) -> None:
        self.serves = False
        await self.transfers.close()
        await self.providing.close()
        await self.link.close()
        await self.ranges.close()
        self.threads.shutdown()
        self.hash_threads.shutdown()
        self.store.close()

    async def _refresh(self) -> None:
        await asyncio.sleep(0)
        self.refreshed += 1
        self.link.update(self.network.info(self.name))

    def _handed_on(self, body: Any, sender: str) -> None:
        if self.serves:  # a node that leaves a channel hands nothing on to what it closes
            self._requested(body, sender)

    def _requested(self, body: Any, sender: str) -> None:
        self.heard.append((body, sender))
        if self.link.may(Permission.PROVIDE_FILES):
            self.providing.heard(body, sender)


@asynccontextmanager
async def network(root: Path, bucket: MemoryBucket | None = None) -> AsyncIterator[Network]:
    made = Network(root, bucket)
    try:
        yield made
    finally:
        await made.close()


async def until(happened: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something that other tasks do has happened."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise AssertionError(f"it did not happen within {seconds} s")
        await asyncio.sleep(0.002)


async def fails(kind: type[KacheryError], work: Awaitable[Any]) -> KacheryError:
    """Await ``work``, which must raise ``kind``; return the error."""
    try:
        await work
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def open_files(under: Path, process: Path = Path("/proc/self")) -> list[str]:
    """Files below a directory that this process has open or, where the system can tell, mapped."""
    if not process.exists():  # macOS, whose mappings no library lists
        return _below(under, [file.path for file in psutil.Process().open_files()])
    found = []
    for fd in (process / "fd").iterdir():
        try:
            found.append(str(fd.readlink()))
        except OSError:
            continue
    with (process / "maps").open() as maps:
        found += [line.split(maxsplit=5)[5].strip() for line in maps if line.count(" ") > 5]
    return _below(under, found)


def _below(under: Path, paths: list[str]) -> list[str]:
    return [path for path in paths if path.startswith((f"{under}{os.sep}", f"{under.resolve()}{os.sep}"))]


@contextmanager
def nothing_left(under: Path) -> Iterator[None]:
    """Look, at the end, for threads and for files below a directory that were not there, or open, before."""
    before = {thread.name for thread in threading.enumerate()}
    yield
    assert open_files(under) == []
    left = {thread.name for thread in threading.enumerate()} - before
    ours = ("disk", "verify", "hash", "api", "feeds", "writer", "kachery")
    assert not [name for name in left if name.startswith(ours)]


def other_tasks() -> list[str]:
    """The names of what runs on the loop beside the caller."""
    return [repr(task.get_coro()) for task in asyncio.all_tasks()
            if task is not asyncio.current_task() and not task.done()]
