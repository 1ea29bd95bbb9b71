"""Performs what ``protocol.request.Requester`` decides for one file: locate it, receive it, bring it into the store.

One transfer serves everybody on this node who wants the file, whole or in part. However it ends, all who wait hear of
it, and once ``over`` is set no task, thread, listener or open file of it is left.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from ..errors import Cancelled, KacheryError, NodeError
from ..protocol.bodies import Want
from ..protocol.inquiry import Inquiry
from ..protocol.names import FileUri
from ..protocol.request import Phase, Requester
from ..protocol.request_events import (
    BandRestored,
    Broken,
    BucketMoved,
    DamageChecked,
    Discard,
    Effect,
    Event,
    Fail,
    Heard,
    LoadChunk,
    Locate,
    Need,
    Prepare,
    Prepared,
    ReportDamage,
    Say,
    SayFailed,
    Succeed,
    Tick,
)
from ..store.destination import Destination
from ..store.objects import Located
from .arrival import Arrival
from .ending import begin_task, end_tasks
from .faults import logged_fault
from .link import ChannelLink
from .locate import locate, report
from .threads import in_thread
from .tools import Tools, Traffic

__all__ = ["Tools", "Traffic", "Transfer"]

log = logging.getLogger("kachery_fast.node")


class _Waiter(NamedTuple):
    start: int | None
    end: int | None
    done: asyncio.Future[Located | None]

    @property
    def is_whole(self) -> bool:
        return self.start is None and self.end is None


class Transfer:
    """The download of one file from one channel.

    :param request_id: the id under which nodes know the request.
    :param on_end: called once when the transfer is over, however it ended.
    """

    def __init__(self, uri: FileUri, link: ChannelLink, tools: Tools, request_id: str,
                 on_end: Callable[[], None]) -> None:
        self.uri = uri
        self.link = link
        self.over = asyncio.Event()
        self._tools = tools
        self._on_end = on_end
        self._machine = Requester(Inquiry(str(uri), link.name, link.providers()), uri.sha1, uri.manifest_sha1,
                                  request_id, tools.limits)
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._handling = False
        self._waiters: list[_Waiter] = []
        self._reads: set[asyncio.Future[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._arrival: Arrival | None = None
        self._disposal: asyncio.Task[None] | None = None
        self._conclusion: asyncio.Task[None] | None = None
        self._outcome: Located | KacheryError | None = None
        self._stopping = False
        self._note = ""
        link.listen(request_id, self._heard)
        link.on_restored.append(self._band_restored)
        link.on_members.append(self._members_changed)
        link.on_bucket.append(self._bucket_moved)

    # --- what the node's API sees

    @property
    def received(self) -> int:
        """Bytes that are here, those of unfinished chunks included."""
        return self._machine.bytes_held + (0 if self._arrival is None else self._arrival.in_flight_bytes)

    @property
    def total(self) -> int | None:
        """Bytes of the whole file, None while unknown."""
        return self._machine.size

    @property
    def waiting(self) -> str:
        """What the transfer waits for, for people."""
        if self._machine.phase is Phase.DONE:
            return "flushing it to the disk"
        return self._note or self._machine.waiting

    @property
    def wanted(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiters or self._reads)

    @property
    def ending(self) -> bool:
        """Whether it is too late to join; ``over`` is set once nothing of it is left."""
        return self._outcome is not None

    async def want(self, start: int | None, end: int | None) -> Located | None:
        """Wait for the bytes ``start`` to ``end`` (both None: the whole file, which is then returned as stored).

        Cancelling the wait withdraws the wish.

        :raises KacheryError: as the requester found it.
        """
        waiter = _Waiter(start, end, self._loop.create_future())
        self._waiters.append(waiter)
        try:
            if self._outcome is not None:
                self._settle(waiter, self._outcome)
            else:
                self._post(Need(start, end))
            return await waiter.done
        finally:
            self._waiters.remove(waiter)
            if waiter.done.done() and not waiter.done.cancelled():
                waiter.done.exception()  # collected, also when this wait was cancelled at the same moment

    async def size(self, start: int, end: int) -> int:
        """Return the file's size in bytes, once the bytes ``start`` to ``end`` are here.

        :raises KacheryError: as ``want``.
        """
        await self.want(start, end)
        if self._machine.size is None:
            raise NodeError(what=f"the size of {self.uri} is not known any more; try again")
        return self._machine.size

    async def read(self, start: int, end: int) -> bytes:
        """Wait for the bytes ``start`` to ``end``, which must lie in the file, and return them, verified.

        :raises KacheryError: as ``want``. :raises DiskError: they cannot be read.
        """
        reading = self._loop.create_future()
        self._reads.add(reading)  # keeps the partial file open until the bytes are read
        try:
            while True:
                await self.want(start, end)
                if self._arrival is not None and self._machine.covers(start, end):
                    return await in_thread(self._tools.disk_threads, self._arrival.destination.read, start, end)
                # Between the good news and now the cut turned out to be false, and the transfer has begun anew.
        finally:
            self._reads.remove(reading)
            reading.set_result(None)

    def break_off(self) -> None:
        """End the transfer, if it is not over; what it received is kept for a resume."""
        self._stopping = True
        self._post(Broken(Cancelled(what=f"The transfer of {self.uri}")))

    async def close(self) -> None:
        """``break_off``, and wait until nothing of it is left running."""
        self.break_off()
        await self.over.wait()

    # --- events and effects

    def _post(self, event: Event) -> None:
        if self._conclusion is not None:
            return
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                for effect in self._machine.handle(self._events.popleft(), self._loop.time()):
                    _PERFORM[type(effect)](self, effect)
        except Exception as error:
            self._events.clear()
            self._fail(self._fault(error))
        finally:
            self._handling = False
        self._satisfy()
        self._set_timer()
        if self._arrival is not None:
            self._arrival.wake()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._machine.deadline
        if deadline is not None and self._conclusion is None:
            self._timer = self._loop.call_at(deadline, self._post, Tick())

    def _satisfy(self) -> None:
        for waiter in self._waiters:
            if not waiter.is_whole and not waiter.done.done() and self._machine.covers(waiter.start, waiter.end):
                waiter.done.set_result(None)

    def _heard(self, body: Any, sender: str) -> None:
        self._post(Heard(body, sender))

    def _band_restored(self) -> None:
        self._post(BandRestored())

    def _members_changed(self) -> None:
        self._machine.inquiry.change_providers(self.link.providers())
        self._post(Tick())

    def _bucket_moved(self) -> None:
        self._post(BucketMoved())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = begin_task(self._guard(work), self._tasks)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it never reached the work

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except KacheryError as error:
            self._post(Broken(error))
        except Exception as error:
            self._post(Broken(self._fault(error)))

    def _fault(self, error: Exception) -> NodeError:
        doing = f"the transfer of {self.uri}"
        return NodeError(what=f"{doing} met {logged_fault(error, doing)}")

    # --- performing

    def _do_locate(self, effect: Locate) -> None:
        self._spawn(self._locate(effect))

    async def _locate(self, effect: Locate) -> None:
        self._post(await locate(self.uri.sha1, effect, self.link, self._tools))

    def _do_prepare(self, effect: Prepare) -> None:
        self._spawn(self._prepare(effect))

    async def _prepare(self, effect: Prepare) -> None:
        if self._disposal is not None:
            await asyncio.shield(self._disposal)
        whole = any(waiter.is_whole for waiter in self._waiters)

        def open_and_recover() -> tuple[Destination, list[int]]:
            destination = Destination(self._tools.store, self.uri.sha1, effect.manifest, effect.chunks, effect.size,
                                      whole=whole)
            self._note = "checking what a former attempt left" if destination.was_there and whole else ""
            try:
                return destination, destination.recover(lambda: self._stopping) if whole else []
            except BaseException:
                destination.close(keep=True)
                raise

        try:
            destination, good = await in_thread(self._tools.disk_threads, open_and_recover,
                                                undo=lambda made: made[0].close(keep=made[0].was_there))
        finally:
            self._note = ""
        self._arrival = Arrival(destination, self._machine, self.link, self._tools, self._post)
        self._spawn(self._arrival.verify())
        self._post(Prepared(tuple(good)))

    def _do_load(self, effect: LoadChunk) -> None:
        if self._arrival is None:
            raise AssertionError("chunks are loaded into a destination")
        self._spawn(self._arrival.load(effect.index, announced=effect.announced))

    def _do_report(self, effect: ReportDamage) -> None:
        self._spawn(self._report(self._machine.chunks[effect.index].sha1, effect))

    async def _report(self, sha1: str, effect: ReportDamage) -> None:
        self._post(DamageChecked(effect.index, await report(self.link, sha1, effect.found)))

    def _do_discard(self, effect: Discard) -> None:
        arrival, self._arrival = self._arrival, None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        self._disposal = self._loop.create_task(self._dispose(arrival, tasks, self._disposal))

    async def _dispose(self, arrival: Arrival | None, tasks: list[asyncio.Task[None]],
                       former: asyncio.Task[None] | None) -> None:
        await end_tasks(tasks)
        if former is not None:
            await asyncio.gather(former, return_exceptions=True)
        if arrival is not None:
            await in_thread(self._tools.disk_threads, arrival.destination.remove)

    def _do_say(self, effect: Say) -> None:
        on_failed = (lambda error: self._post(SayFailed(error))) if effect.kind is Want else None
        self.link.say(effect.kind, effect.fields, on_failed)

    # --- the end

    def _do_succeed(self, effect: Succeed) -> None:
        self._conclude()

    def _do_fail(self, effect: Fail) -> None:
        self._fail(effect.error)

    def _fail(self, error: KacheryError) -> None:
        self._resolve(error)
        self._conclude()

    def _conclude(self) -> None:
        if self._conclusion is None:
            self._stopping = True
            self._conclusion = self._loop.create_task(self._come_to_an_end())

    async def _come_to_an_end(self) -> None:
        """Adopt what succeeded, tell all who wait, and let go of everything."""
        try:
            if self._outcome is None:
                self._resolve(await self._adopt())
            self.link.unlisten(self._machine.request_id, self._heard)
            self.link.on_restored.remove(self._band_restored)
            self.link.on_members.remove(self._members_changed)
            self.link.on_bucket.remove(self._bucket_moved)
            await end_tasks(self._tasks)
            if self._disposal is not None:
                await asyncio.gather(self._disposal, return_exceptions=True)
            await asyncio.gather(*self._reads)
            if self._arrival is not None:
                destination = self._arrival.destination
                keep = destination.was_there or self._machine.bytes_held > 0
                await in_thread(self._tools.disk_threads, lambda: destination.close(keep=keep))
        except Exception:
            log.exception("the end of the transfer of %s failed", self.uri)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._on_end()
            self.over.set()

    async def _adopt(self) -> Located | KacheryError:
        try:
            if self._arrival is None:
                raise AssertionError("a whole file has a destination")
            return await in_thread(self._tools.disk_threads, self._arrival.destination.adopt)
        except KacheryError as error:
            return error
        except Exception as error:
            return self._fault(error)

    def _resolve(self, outcome: Located | KacheryError) -> None:
        if self._outcome is None:
            self._outcome = outcome
            for waiter in self._waiters:
                self._settle(waiter, outcome)

    @staticmethod
    def _settle(waiter: _Waiter, outcome: Located | KacheryError) -> None:
        if waiter.done.done():
            return
        if isinstance(outcome, KacheryError):
            waiter.done.set_exception(outcome)
        else:
            waiter.done.set_result(outcome)


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
