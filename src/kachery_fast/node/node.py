"""The node: its store, its hubs, their channels, its transfers, and its local API, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, Protocol

from ..config import Settings
from ..errors import ChannelUnknown, HubUnreachable, InvalidArgument, KacheryError, NoChannel
from ..net.hub import HubClient
from ..net.ranges import RangeClient
from ..protocol.access import Permission
from ..protocol.hub_bodies import ChannelInfo
from ..store.files import FileStore
from ..store.tasks import TaskLedger
from .api import LocalApi
from .deposits import Deposits
from .ending import end_tasks
from .evicting import Evicting
from .faults import logged_fault
from .feeds import Feeds
from .identity import ClientAuth, DirectoryLock, load_identity, note_owner
from .link import ChannelLink
from .membership import NodeFile, read_node_file
from .providing import Providing
from .rules import RULES
from .slots import AdaptiveSlots
from .takeover import take_over
from .task_backends import TaskBackends
from .task_providing import TaskProviding
from .task_requests import TaskRequests
from .threads import in_thread
from .tools import Tools, Traffic
from .transfers import Transfers, request_limits
from .uploading import Uploader

__all__ = ["Node"]

log = logging.getLogger("kachery_fast.node")

# Requests for small objects and heads go beside the big ones.
_SMALL_REQUESTS = 4
_DISK_THREADS = 8
_VERIFY_THREADS = 2
_HASH_THREADS = 2
_LOOK_AGAIN_SECONDS = 0.2
_API_THREADS = 4


class _HubSide:
    """One hub that the node belongs to, and the state of the talk with it."""

    def __init__(self, client: HubClient) -> None:
        self.client = client
        self.owner = ""
        self.reachable = False
        self.why = self.short_why = "not asked yet"
        self.ask_now = asyncio.Event()
        self.waiting: list[asyncio.Future[None]] = []
        self.task: asyncio.Task[None] | None = None


class _Service(Protocol):
    """What this node does for others on one channel."""

    def heard(self, body: Any, sender: str) -> None:
        """A node asks for something."""

    async def close(self) -> None:
        """Stop."""


class _Membership(NamedTuple):
    """One channel, and what this node does for others there, by the permission that it needs."""

    link: ChannelLink
    uploader: Uploader
    providing: Providing
    services: dict[Permission, _Service]

    async def close(self) -> None:
        async with contextlib.AsyncExitStack() as parts:
            parts.push_async_callback(self.link.close)
            for service in self.services.values():
                parts.push_async_callback(service.close)


class Node:
    """A node on the running event loop. ``start``, then ``stop``; ``stopped`` is set when a client asks for the end.

    :raises KacheryError: from ``start``, when the storage directory or the port cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.identity = load_identity(settings.storage_dir, settings.node_private_key)
        self.store = FileStore(settings.storage_dir, chunk_size_bytes=settings.chunk_size_bytes,
                               fingerprint_size_bytes=settings.fingerprint_size_bytes)
        self.client_auth = ClientAuth(settings.storage_dir, group=settings.client_auth_group)
        self._lock = DirectoryLock(settings.storage_dir)
        self.stopped = asyncio.Event()
        self.version = importlib.metadata.version("kachery-fast")
        self._node_file = NodeFile()
        self._disk_threads = ThreadPoolExecutor(_DISK_THREADS, "disk")
        self._verify_threads = ThreadPoolExecutor(_VERIFY_THREADS, "verify")
        self._hash_threads = ThreadPoolExecutor(_HASH_THREADS, "hash")
        self.api_threads = ThreadPoolExecutor(_API_THREADS, "api")
        self._uploads = AdaptiveSlots(settings.upload_concurrency, time.monotonic)
        self._ranges = RangeClient(settings, concurrency=settings.download_concurrency + settings.upload_concurrency
                                   + _SMALL_REQUESTS)
        self._traffic = Traffic()
        tools = Tools(self.store, request_limits(settings), self._disk_threads, self._verify_threads,
                      asyncio.Semaphore(settings.download_concurrency), self._traffic)
        self.transfers = Transfers(tools, settings)
        self.feeds = Feeds(settings, self._traffic)
        self.task_backends = TaskBackends(settings)
        self.task_requests = TaskRequests(settings)
        self._ledger = TaskLedger(settings.storage_dir)
        self._hubs: dict[str, _HubSide] = {}
        self._looked_again_at = float("-inf")
        self._memberships: dict[tuple[str, str], _Membership] = {}
        self.deposits = Deposits()
        self._api = LocalApi(self)
        self._evicting = Evicting(settings, self.store, self._disk_threads)
        self._background: list[asyncio.Task[None]] = []

    @property
    def port(self) -> int:
        """The port of the local API."""
        return self._api.port

    async def start(self) -> None:
        """Clean up after a crash, listen for clients, and begin to reach the hubs; hubs that are down are retried."""
        loop = asyncio.get_running_loop()
        self._lock.acquire()
        await loop.run_in_executor(self._disk_threads, partial(  # which logs what it removes
            self.store.clean, now=time.time(), partial_keep_days=self.settings.partial_keep_days))
        await loop.run_in_executor(self._disk_threads, take_over, self.settings, self.stopped.is_set)
        await self.feeds.open()
        # First the code: a client that finds the node listening finds it too.
        await loop.run_in_executor(self._disk_threads, self.client_auth.rotate)
        await self._api.start()
        self._background = [loop.create_task(self._rotate_for_ever()), loop.create_task(self._evicting.run())]
        await self._read_hubs()

    async def stop(self) -> None:
        """Break off what is under way, keeping what was received, and close everything."""
        async with contextlib.AsyncExitStack() as parts:  # closed in reverse, each whatever becomes of the others
            parts.callback(self._lock.release)
            parts.callback(self._ledger.close)
            parts.callback(self._evicting.close)
            for threads in (self._disk_threads, self._verify_threads, self._hash_threads, self.api_threads):
                parts.callback(threads.shutdown, wait=True)
            parts.callback(self.client_auth.remove)
            parts.push_async_callback(self.feeds.close)
            parts.push_async_callback(self._ranges.close)
            parts.callback(self.task_backends.close)
            for url in list(self._hubs):
                parts.push_async_callback(self._drop_hub, url)
            parts.push_async_callback(self.task_requests.close)
            parts.push_async_callback(self.transfers.close)
            parts.push_async_callback(end_tasks, self._background)
            parts.callback(self._evicting.stop)
            parts.push_async_callback(self._api.stop)

    async def _rotate_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.settings.client_auth_seconds)
            try:
                # A flush can take seconds while gigabytes are being written.
                await loop.run_in_executor(self._disk_threads, self.client_auth.rotate)
            except KacheryError as error:
                log.error("the client code could not be changed: %s", error)

    # --- hubs and channels

    async def reload(self) -> None:
        """Read the configuration anew and ask every hub; a silent one is waited for ``offer_wait_seconds`` at most."""
        await self._read_hubs()
        await self._ask_hubs()

    async def look_again(self) -> None:
        """Ask the hubs anew, before something is refused by what they said up to ``channel_refresh_seconds`` ago.

        Waits for ``offer_wait_seconds`` at most, and asks five times a second at most, however many want to know.
        """
        now = asyncio.get_running_loop().time()
        if not self._hubs or now - self._looked_again_at < _LOOK_AGAIN_SECONDS:
            return
        self._looked_again_at = now
        await self._ask_hubs()

    async def _ask_hubs(self) -> None:
        """Have every hub asked, and return when all have answered or failed to, or ``offer_wait_seconds`` are over."""
        asked = [asyncio.ensure_future(self._refresh(side)) for side in self._hubs.values()]
        if not asked:
            return
        try:
            await asyncio.wait(asked, timeout=self.settings.offer_wait_seconds)
        finally:
            for refresh in asked:
                refresh.cancel()

    async def _read_hubs(self) -> None:
        self._node_file = read_node_file(self.settings.storage_dir)
        wanted = {entry.url for entry in self._node_file.hubs}
        for url in set(self._hubs) - wanted:
            await self._drop_hub(url)
        for url in wanted - set(self._hubs):
            side = self._hubs[url] = _HubSide(HubClient(url, self.identity.key, self.settings))
            side.task = asyncio.get_running_loop().create_task(self._follow(url, side))

    async def _refresh(self, side: _HubSide) -> None:
        """Have a hub asked now by the task that follows it, and wait until that is done."""
        done = asyncio.get_running_loop().create_future()
        side.waiting.append(done)
        side.ask_now.set()
        await done

    async def _follow(self, url: str, side: _HubSide) -> None:
        """Ask a hub again and again. Nobody else does, so that channels change in one place."""
        loop = asyncio.get_running_loop()
        while True:
            side.ask_now.clear()
            waiting, side.waiting = side.waiting, []
            try:
                await self._ask_hub(url, side)
            except Exception as error:
                side.reachable = False
                side.why = side.short_why = logged_fault(error, f"the talk with the hub {url}")
            finally:
                for done in waiting:
                    if not done.done():
                        done.set_result(None)
            pause = self.settings.channel_refresh_seconds
            if not side.reachable:
                pause = min(pause, self.settings.retry_cap_seconds / 5)
            # Not wait_for: until Python 3.12 it may swallow the cancellation that ends this task.
            alarm = loop.call_later(pause, side.ask_now.set)
            try:
                await side.ask_now.wait()
            finally:
                alarm.cancel()

    async def _ask_hub(self, url: str, side: _HubSide) -> None:
        try:
            config = await side.client.node_config(self._node_file.label, self.version)
        except KacheryError as error:
            if side.reachable or side.why != error.message:
                log.warning("%s", error)
            side.reachable, side.why = False, error.message
            # Without the address and the advice of an error that is told again as part of another.
            side.short_why = str(error.details["why"]) if isinstance(error, HubUnreachable) else error.message
            return
        side.reachable, side.why, side.owner = True, "", config.owner
        await in_thread(self.api_threads, note_owner, self.settings.storage_dir, config.owner)
        await self._apply(url, side, config.channels)

    async def _apply(self, url: str, side: _HubSide, channels: list[ChannelInfo]) -> None:
        """Join new channels, leave old ones, and connect anew where permissions or the bands' place have changed."""
        named = {(url, info.name): info for info in channels}
        for key in [key for key in self._memberships if key[0] == url and key not in named]:
            await self._memberships.pop(key).close()
        for key, info in named.items():
            membership = self._memberships.get(key)
            if membership is None:
                link = ChannelLink(info, side.client, self.identity, self.settings, self._ranges,
                                   refresh=partial(self._refresh, side),
                                   on_request=partial(self._requested, key), wants_request=self.feeds.concerns)
                self._memberships[key] = self._serve(link)
                await link.start()
                continue
            link = membership.link
            before = sorted(link.info.permissions), link.info.pubsub
            link.update(info)
            if before != (sorted(info.permissions), info.pubsub):
                await link.connect()

    def _serve(self, link: ChannelLink) -> _Membership:
        uploader = Uploader(link, self.store, self.settings, self._uploads, self._disk_threads, self._hash_threads,
                            self._traffic)
        providing = Providing(link, self.identity.node_id, self.store, self.settings, uploader, self._disk_threads,
                              self._hash_threads)
        tasks = TaskProviding(link, self.identity, self.settings, self.task_backends, self._ledger, uploader,
                              self._disk_threads)
        return _Membership(link, uploader, providing, {
            Permission.PROVIDE_FILES: providing, Permission.PROVIDE_TASKS: tasks,
            Permission.PROVIDE_FEEDS: self.feeds.serve(link)})

    def _requested(self, key: tuple[str, str], body: Any, sender: str) -> None:
        membership = self._memberships.get(key)
        permission = RULES[type(body)].heard_by
        if membership is not None and membership.link.may(permission) and permission in membership.services:
            membership.services[permission].heard(body, sender)

    async def _drop_hub(self, url: str) -> None:
        side = self._hubs.pop(url, None)
        if side is None:
            return
        if side.task is not None:
            await end_tasks([side.task])
        for done in side.waiting:
            done.cancel()
        for key in [key for key in self._memberships if key[0] == url]:
            await self._memberships.pop(key).close()
        await side.client.close()

    # --- for the API

    def link_for(self, uri: object, channel: str | None) -> ChannelLink:
        """Return the channel to ask on; ``uri`` is what is asked for, for the errors.

        :raises NoChannel: none is named, here or in the settings. :raises ChannelUnknown: this node is not on it.
        :raises HubUnreachable: it may be, at a hub that could not be asked.
        :raises InvalidArgument: two of its hubs have a channel of that name.
        """
        name = channel or self.settings.channel
        if not name:
            raise NoChannel(uri=str(uri))
        links = {url: membership.link for (url, at), membership in self._memberships.items() if at == name}
        if not links:
            raise self._unknown(name)
        if len(links) > 1:
            raise InvalidArgument(what=f"The channel {name!r} is ambiguous: {' and '.join(sorted(links))} each have "
                                       "one of that name. Take the hub that is not meant out of "
                                       f"{self.settings.storage_dir / 'kachery-fast.json'}, and start the node anew.")
        return next(iter(links.values()))

    def links(self) -> list[ChannelLink]:
        """Return every channel that this node is on."""
        return [membership.link for membership in self._memberships.values()]

    def uploader(self, link: ChannelLink) -> Uploader:
        """Return who uploads to the bucket of a channel.

        :raises ChannelUnknown: this node has left it.
        """
        for membership in self._memberships.values():
            if membership.link is link:
                return membership.uploader
        raise self._unknown(link.name)

    def _unknown(self, name: str) -> KacheryError:
        known = ", ".join(sorted(link.name for link in self.links())) or "none"
        down = {url: side for url, side in self._hubs.items() if not side.reachable}
        if down:
            return HubUnreachable(url=", ".join(down), why=f"{'; '.join(side.short_why for side in down.values())}; "
                                                           f"the channel {name!r} is not among those known: {known}")
        return ChannelUnknown(channel=name, known=known)

    def describe(self) -> dict[str, Any]:
        """Return the node's state as plain JSON, for ``GET /api/info``."""
        hubs = []
        for url, side in self._hubs.items():
            channels = [{
                "name": link.name, "permissions": sorted(link.info.permissions), "connected": link.connected,
                "why": link.why, "load": providing.load, "bucketUrl": link.info.bucket_url.partition("#")[0],
                "members": [{"node": member.node_id, "label": member.label, "permissions": sorted(member.permissions)}
                            for member in link.info.members],
            } for key, (link, _, providing, _) in self._memberships.items() if key[0] == url]
            hubs.append({"url": url, "owner": side.owner, "reachable": side.reachable, "why": side.why,
                         "channels": channels})
        return {"nodeId": self.identity.node_id, "version": self.version, "label": self._node_file.label,
                "storageDir": str(self.settings.storage_dir), "pid": os.getpid(), "hubs": hubs,
                "transfers": self.transfers.describe(), "traffic": asdict(self._traffic),
                "taskBackends": self.task_backends.describe()}
