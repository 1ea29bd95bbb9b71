"""How the chunks of one file arrive: each is received into its place on the disk, and verified.

Several are received side by side while one task verifies them: in order, with the digest of the whole, when the whole
file is wanted; else each by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from .._chunker import ChunkMemory, ChunkSpan
from ..errors import DiskError, DiskFull, KacheryError, ObjectMissing
from ..net.bucket import Bucket, FileSpan
from ..protocol.chunks import State
from ..protocol.names import object_name
from ..protocol.request import Phase, Requester
from ..protocol.request_events import (
    ChunkAbsent,
    ChunkDamaged,
    ChunkFailed,
    ChunkGood,
    ChunkHeld,
    Event,
    WholeDamaged,
    WholeGood,
)
from ..store.destination import Destination
from .link import ChannelLink
from .threads import in_thread
from .tools import Tools

__all__ = ["Arrival"]

log = logging.getLogger("kachery_fast.node")

# The digest of the whole is the one thing that cannot be shared among cores. Where chunks arrive faster than it runs,
# they wait for it, rather than take the processor from it for data that would only lie there: one at a time when a few
# lie ready for it, none when many do. On two cores shared with the server, 2 GiB took 1.6 s so, 2.0 s without.
_FEW_CHUNKS = 2
_MANY_CHUNKS = 6


class Arrival:
    """The chunks of ``machine``'s file on their way from the bucket of ``link`` into ``destination``.

    :param post: takes what happens to them, as events for ``machine``.
    """

    def __init__(self, destination: Destination, machine: Requester, link: ChannelLink, tools: Tools,
                 post: Callable[[Event], None]) -> None:
        self.destination = destination
        self._machine = machine
        self._link = link
        self._tools = tools
        self._post = post
        self._changed = asyncio.Event()
        self._moved = asyncio.Event()
        self._receiving = 0
        self._in_flight: dict[int, int] = {}
        self._held: deque[int] = deque()

    @property
    def in_flight_bytes(self) -> int:
        """Bytes received of chunks that are not complete."""
        return sum(self._in_flight.values())

    def wake(self) -> None:
        """Something has changed; there may be something to verify."""
        self._changed.set()

    # --- receiving

    async def load(self, index: int, *, announced: bool) -> None:
        """Receive one chunk, unless a former attempt left it whole.

        :param announced: a node says that it is in the bucket; before that is called wrong, the hub is asked whether
            the channel has another bucket now, as the node may have heard of it first.
        :raises DiskFull, DiskError: the disk takes no more.
        """
        while not self._may_receive():
            await self._moved.wait()
        self._receiving += 1
        try:
            async with self._tools.downloads:
                if await in_thread(self._tools.disk_threads, self.destination.has_sound_chunk, index):
                    self._post(ChunkHeld(index))
                    self._post(ChunkGood(index))
                    return
                while True:
                    bucket = self._link.bucket
                    event = await self._receive(index, bucket)
                    if isinstance(event, ChunkAbsent) and announced:
                        await self._link.look_again()
                    if isinstance(event, ChunkHeld) or self._link.bucket is bucket:
                        break
        finally:
            self._receiving -= 1
            self._has_moved()
        if isinstance(event, ChunkHeld) and not self._machine.whole:
            self._held.append(index)
        self._post(event)

    def _may_receive(self) -> bool:
        if not self._machine.whole:
            return True
        next_index, book = self.destination.next_index, self._machine.book
        backlog = 0
        while backlog < _MANY_CHUNKS and next_index + backlog < book.count and (
                book[next_index + backlog] is State.HELD):
            backlog += 1
        return backlog < (_FEW_CHUNKS if self._receiving else _MANY_CHUNKS)

    def _has_moved(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    async def _receive(self, index: int, bucket: Bucket) -> Event:
        destination, disk_threads = self.destination, self._tools.disk_threads
        open_place: Callable[[int], ChunkMemory | ChunkSpan]
        open_place = destination.open_span if bucket.splices else destination.open_chunk
        place: ChunkMemory | ChunkSpan = await in_thread(disk_threads, open_place, index,
                                                         undo=destination.close_chunk)
        chunk = self._machine.chunks[index]
        self._in_flight[index] = 0

        def progress(count: int) -> None:
            self._in_flight[index] = self._in_flight.get(index, 0) + count

        try:
            target = place.view if isinstance(place, ChunkMemory) else FileSpan(place.fd, place.start, place.size)
            await bucket.get_into(object_name(self._link.name, chunk.sha1), target, progress=progress,
                                  ahead=(object_name(self._link.name, self._machine.chunks[following].sha1)
                                         for following in self._machine.book.wanted_with(index)))
        except ObjectMissing:
            return ChunkAbsent(index)
        except (DiskError, DiskFull):
            raise
        except KacheryError as error:
            return ChunkFailed(index, error)
        finally:
            self._in_flight.pop(index, None)
            await in_thread(disk_threads, destination.close_chunk, place)
        self._tools.traffic.downloaded_objects += 1
        self._tools.traffic.downloaded_bytes += chunk.end - chunk.start
        return ChunkHeld(index)

    # --- verifying

    async def verify(self) -> None:
        """Verify what has arrived, until cancelled.

        :raises DiskError: it cannot be read.
        """
        while True:
            self._changed.clear()
            if not await (self._verify_in_order() if self._machine.whole else self._verify_part()):
                await self._changed.wait()

    async def _verify_in_order(self) -> bool:
        destination, machine = self.destination, self._machine
        index = destination.next_index
        if index == len(machine.chunks):
            if machine.phase is Phase.MOVE and machine.book.count_in(State.GOOD) == index:
                found = destination.whole_sha1()
                self._post(WholeGood() if found == machine.sha1 else WholeDamaged(found))
            return False
        if machine.book[index] not in (State.HELD, State.GOOD):
            return False
        await self._judge(index, await in_thread(self._tools.verify_threads, destination.verify_next))
        return True

    async def _verify_part(self) -> bool:
        if not self._held:
            return False
        index = self._held.popleft()
        if self._machine.book[index] is State.HELD:
            good = await in_thread(self._tools.verify_threads, self.destination.verify_chunk, index)
            await self._judge(index, good)
        return True

    async def _judge(self, index: int, good: bool) -> None:
        self._has_moved()
        if good:
            self._post(ChunkGood(index))
            return
        found = await in_thread(self._tools.disk_threads, self.destination.digest_of, index)
        log.warning("chunk %d of %s arrived damaged (SHA-1 %s)", index, self._machine.inquiry.uri, found)
        self._post(ChunkDamaged(index, found))
