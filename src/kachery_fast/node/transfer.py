"""Performs what ``protocol.request.Requester`` decides for one file: downloads, verifies, and brings it into the store.

One transfer serves everybody on this node who wants the file, whole or in part. Chunks are downloaded side by side
into the mapped partial file while one task verifies them: in order, with the digest of the whole, when the whole file
is wanted; else each by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import Cancelled, DiskError, DiskFull, KacheryError, ManifestInvalid, NodeError, NotInStore, ObjectMissing
from ..net.bucket import FileSpan
from ..protocol.asking import RequestLimits
from ..protocol.chunks import State
from ..protocol.inquiry import Inquiry
from ..protocol.manifest import MANIFEST_SIZE_BYTES_MAX, parse_manifest
from ..protocol.messages import Want
from ..protocol.names import FileUri, object_name
from ..protocol.request import Phase, Requester
from ..protocol.request_events import (
    BandRestored,
    Broken,
    ChunkAbsent,
    ChunkDamaged,
    ChunkFailed,
    ChunkGood,
    ChunkHeld,
    DamageChecked,
    Discard,
    Effect,
    Event,
    Fail,
    Heard,
    LoadChunk,
    Locate,
    Located,
    LocatedAbsent,
    LocateFailed,
    Need,
    Prepare,
    Prepared,
    ReportDamage,
    Say,
    SayFailed,
    Succeed,
    Tick,
    WholeDamaged,
    WholeGood,
)
from ..store import objects
from ..store.files import FileStore
from .destination import Destination
from .link import ChannelLink

__all__ = ["Tools", "Traffic", "Transfer"]

log = logging.getLogger("kachery_fast.node")


@dataclass
class Traffic:
    """What a node has moved since its start: whole objects, and their bytes."""

    uploaded_objects: int = 0
    uploaded_bytes: int = 0
    downloaded_objects: int = 0
    downloaded_bytes: int = 0


class Tools(NamedTuple):
    """What the transfers of a node share: its store, limits, thread pools, the bound on downloads, and the count."""

    store: FileStore
    limits: RequestLimits
    disk_threads: Executor
    verify_threads: Executor
    downloads: asyncio.Semaphore
    traffic: Traffic


class _Waiter(NamedTuple):
    start: int | None
    end: int | None
    done: asyncio.Future[objects.Located | None]


class Transfer:
    """The download of one file from one channel.

    :param request_id: the id under which nodes know the request.
    :param on_end: called once when the transfer is over, however it ended.
    """

    def __init__(self, uri: FileUri, link: ChannelLink, tools: Tools, request_id: str,
                 on_end: Callable[[], None]) -> None:
        self.uri = uri
        self._link = link
        self._tools = tools
        self._on_end = on_end
        self._machine = Requester(Inquiry(str(uri), link.name, link.providers()), uri.sha1, uri.manifest_sha1,
                                  request_id, tools.limits)
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._handling = False
        self._waiters: list[_Waiter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._destination: Destination | None = None
        self._to_verify = asyncio.Event()
        self._in_flight: dict[int, int] = {}
        self._held: deque[int] = deque()
        self._stopping = False
        self._note = ""
        self._ended = False
        self.over = asyncio.Event()
        link.listen(request_id, self._heard)
        link.on_restored.append(self._band_restored)
        link.on_members.append(self._members_changed)

    # --- what the node's API sees

    @property
    def received(self) -> int:
        """Bytes that are here, those of unfinished chunks included."""
        return self._machine.bytes_held + sum(self._in_flight.values())

    @property
    def total(self) -> int | None:
        """Bytes of the whole file, None while unknown."""
        return self._machine.size

    @property
    def waiting(self) -> str:
        """What the transfer waits for, for people."""
        return self._note or self._machine.waiting

    async def want(self, start: int | None, end: int | None) -> objects.Located | None:
        """Wait for the bytes ``start`` to ``end`` (both None: the whole file, which is then returned as stored).

        Cancelling the wait withdraws the wish; a transfer that nobody waits for is broken off, and what it received
        is kept for a resume.

        :raises KacheryError: as the requester found it.
        """
        waiter = _Waiter(start, end, self._loop.create_future())
        self._waiters.append(waiter)
        self._post(Need(start, end))
        try:
            return await waiter.done
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    @property
    def wanted(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiters)

    @property
    def ending(self) -> bool:
        """Whether it takes no further wishes; ``over`` is set once nothing of it is left."""
        return self._ended or self._machine.phase is Phase.FAILED

    def size_and_read(self) -> tuple[int, Destination]:
        """Return the file's size and the place to read verified bytes from, once a wish for a part is fulfilled."""
        if self._destination is None or self._machine.size is None:
            raise NodeError(what=f"nothing of {self.uri} is here yet")
        return self._machine.size, self._destination

    async def close(self) -> None:
        """Break the transfer off, if it is not over, and wait until nothing of it is left running."""
        self._stopping = True
        self._post(Broken(Cancelled(what=f"The transfer of {self.uri}")))
        await self._end(keep=True)

    # --- events and effects

    def _post(self, event: Event) -> None:
        self._events.append(event)
        if self._handling or self._ended:
            return
        self._handling = True
        try:
            while self._events:
                effects = self._machine.handle(self._events.popleft(), self._loop.time())
                for effect in effects:
                    _PERFORM[type(effect)](self, effect)
        finally:
            self._handling = False
        self._satisfy()
        self._set_timer()
        self._to_verify.set()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._machine.deadline
        if deadline is not None and not self._ended:
            self._timer = self._loop.call_at(deadline, self._post, Tick())

    def _satisfy(self) -> None:
        for waiter in list(self._waiters):
            if waiter.start is None and waiter.end is None:
                continue
            if not waiter.done.done() and self._machine.covers(waiter.start, waiter.end):
                waiter.done.set_result(None)

    def _heard(self, body: Any, sender: str) -> None:
        self._post(Heard(body, sender))

    def _band_restored(self) -> None:
        self._post(BandRestored())

    def _members_changed(self) -> None:
        self._machine.inquiry.providers = self._link.providers()
        self._post(Tick())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except KacheryError as error:
            self._post(Broken(error))
        except Exception as error:
            log.exception("the transfer of %s failed", self.uri)
            self._post(Broken(NodeError(what=f"the transfer of {self.uri} met a fault of the program: {error!r}")))

    # --- performing

    def _do_locate(self, effect: Locate) -> None:
        self._spawn(self._locate(effect.manifest_sha1))

    async def _locate(self, manifest_sha1: str | None) -> None:
        name = object_name(self._link.name, manifest_sha1 or self.uri.sha1)
        try:
            if manifest_sha1 is None:
                self._post(Located(None, None, await self._link.bucket.size(name)))
                return
            data = await self._read_manifest(manifest_sha1, name)
            self._post(Located(manifest := parse_manifest(data, name=manifest_sha1), manifest_sha1, manifest.size))
        except ObjectMissing:
            self._post(LocatedAbsent())
        except ManifestInvalid as error:
            removed = await self._report(manifest_sha1 or "", str(error.details.get("found", "")))
            self._post(LocatedAbsent() if removed else LocateFailed(error))
        except KacheryError as error:
            self._post(LocateFailed(error))

    async def _read_manifest(self, manifest_sha1: str, name: str) -> bytes:
        def read_local() -> bytes:
            with self._tools.store.open(manifest_sha1) as file:
                return file.read(MANIFEST_SIZE_BYTES_MAX)

        try:
            return await self._loop.run_in_executor(self._tools.disk_threads, read_local)
        except KacheryError as error:
            if not isinstance(error, NotInStore):
                log.warning("the local copy of the manifest %s is unusable: %s", manifest_sha1, error)
        return await self._link.bucket.get_small(name, MANIFEST_SIZE_BYTES_MAX)

    def _do_prepare(self, effect: Prepare) -> None:
        self._spawn(self._prepare(effect))

    async def _prepare(self, effect: Prepare) -> None:
        whole = any(waiter.start is None and waiter.end is None for waiter in self._waiters)

        def open_and_recover() -> tuple[Destination, list[int]]:
            destination = Destination(self._tools.store, self.uri.sha1, effect.manifest, effect.chunks, effect.size,
                                      whole=whole)
            self._note = "checking what a former attempt left" if destination.was_there and whole else ""
            return destination, destination.recover(lambda: self._stopping) if whole else []

        try:
            self._destination, good = await self._loop.run_in_executor(self._tools.disk_threads, open_and_recover)
        finally:
            self._note = ""
        self._spawn(self._verify())
        self._post(Prepared(tuple(good)))

    def _do_load(self, effect: LoadChunk) -> None:
        self._spawn(self._load(effect.index))

    async def _load(self, index: int) -> None:
        destination = self._opened()
        async with self._tools.downloads:
            if await self._in_thread(destination.has_sound_chunk, index):
                self._post(ChunkHeld(index))
                self._post(ChunkGood(index))
                return
            splices = self._link.bucket.splices
            place = await self._in_thread(destination.open_span if splices else destination.open_chunk, index)
            target = FileSpan(place.fd, place.start, place.size) if splices else place.view
            self._in_flight[index] = 0

            def progress(count: int) -> None:
                self._in_flight[index] = self._in_flight.get(index, 0) + count

            event: Event = ChunkHeld(index)
            try:
                name = object_name(self._link.name, self._machine.chunks[index].sha1)
                await self._link.bucket.get_into(name, target, progress=progress)
                self._tools.traffic.downloaded_objects += 1
                self._tools.traffic.downloaded_bytes += place.size if splices else len(target)
            except ObjectMissing:
                event = ChunkAbsent(index)
            except (DiskError, DiskFull):
                raise
            except KacheryError as error:
                event = ChunkFailed(index, error)
            finally:
                self._in_flight.pop(index, None)
                await asyncio.shield(self._in_thread(destination.close_chunk, place))
        if isinstance(event, ChunkHeld):
            self._held.append(index)
        self._post(event)

    async def _verify(self) -> None:
        """Verify what has arrived, as long as the transfer lives."""
        while True:
            self._to_verify.clear()
            if not await (self._verify_in_order() if self._machine.whole else self._verify_parts()):
                await self._to_verify.wait()

    async def _verify_in_order(self) -> bool:
        destination, machine = self._opened(), self._machine
        index = destination.next_index
        if index == len(machine.chunks):
            if machine.phase is Phase.MOVE and machine.book.count_in(State.GOOD) == len(machine.chunks):
                found = destination.whole_sha1()
                self._post(WholeGood() if found == self.uri.sha1 else WholeDamaged(found))
            return False
        if machine.book[index] not in (State.HELD, State.GOOD):
            return False
        await self._judge(index, await self._in_verify_thread(destination.verify_next))
        return True

    async def _verify_parts(self) -> bool:
        if not self._held:
            return False
        index = self._held.popleft()
        if self._machine.book[index] is State.HELD:
            await self._judge(index, await self._in_verify_thread(self._opened().verify_chunk, index))
        return True

    async def _judge(self, index: int, good: bool) -> None:
        if good:
            self._post(ChunkGood(index))
            return
        found = await self._in_thread(self._opened().digest_of, index)
        log.warning("chunk %d of %s arrived damaged (SHA-1 %s)", index, self.uri, found)
        self._post(ChunkDamaged(index, found))

    def _do_report(self, effect: ReportDamage) -> None:
        self._spawn(self._report_chunk(effect))

    async def _report_chunk(self, effect: ReportDamage) -> None:
        removed = await self._report(self._machine.chunks[effect.index].sha1, effect.found)
        self._post(DamageChecked(effect.index, removed))

    async def _report(self, sha1: str, found: str) -> bool:
        try:
            return await self._link.hub.report_corrupt(self._link.name, sha1, found)
        except KacheryError as error:
            log.warning("the damaged object %s could not be reported: %s", sha1, error)
            return False

    def _do_discard(self, effect: Discard) -> None:
        destination, self._destination = self._destination, None
        for task in self._tasks:
            task.cancel()
        if destination is not None:
            destination.close(keep=False)

    def _do_say(self, effect: Say) -> None:
        on_failed = (lambda error: self._post(SayFailed(error))) if effect.kind is Want else None
        self._link.say(effect.kind, effect.fields, on_failed)

    def _do_succeed(self, effect: Succeed) -> None:
        self._loop.create_task(self._succeed())

    async def _succeed(self) -> None:
        try:
            located = await self._in_thread(self._opened().adopt)
        except KacheryError as error:
            self._resolve(error)
        else:
            self._resolve(located)
        await self._end(keep=True)

    def _do_fail(self, effect: Fail) -> None:
        self._resolve(effect.error)
        self._loop.create_task(self._end(keep=True))

    def _resolve(self, outcome: objects.Located | KacheryError) -> None:
        for waiter in self._waiters:
            if not waiter.done.done():
                if isinstance(outcome, KacheryError):
                    waiter.done.set_exception(outcome)
                else:
                    waiter.done.set_result(outcome)

    async def _end(self, *, keep: bool) -> None:
        if self._ended:
            return
        self._ended = self._stopping = True
        self._link.unlisten(self._machine.request_id)
        self._link.on_restored.remove(self._band_restored)
        self._link.on_members.remove(self._members_changed)
        if self._timer is not None:
            self._timer.cancel()
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._destination is not None:
            await self._in_thread(self._close_destination, keep)
        self._on_end()
        self.over.set()

    def _close_destination(self, keep: bool) -> None:
        if self._destination is not None:
            self._destination.close(keep=keep)

    # --- threads

    def _opened(self) -> Destination:
        if self._destination is None:
            raise Cancelled(what=f"The transfer of {self.uri}")
        return self._destination

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await self._loop.run_in_executor(self._tools.disk_threads, work, *arguments)

    async def _in_verify_thread(self, work: Callable[..., bool], *arguments: Any) -> bool:
        return await self._loop.run_in_executor(self._tools.verify_threads, work, *arguments)


_PERFORM: dict[type[Effect], Callable[[Transfer, Any], None]] = {
    Locate: Transfer._do_locate,
    Prepare: Transfer._do_prepare,
    LoadChunk: Transfer._do_load,
    ReportDamage: Transfer._do_report,
    Discard: Transfer._do_discard,
    Say: Transfer._do_say,
    Succeed: Transfer._do_succeed,
    Fail: Transfer._do_fail,
}
