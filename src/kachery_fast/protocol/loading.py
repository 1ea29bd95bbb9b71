"""The chunks of one file on their way from the bucket to the disk: loading, damage, absence.

The bucket is looked at first. After ``absent_probes_max`` absent chunks in a row the rest is taken to be absent too: a
provider that finds one in the bucket counts it as uploaded, so a wrong guess costs nothing.

``Loading`` keeps the book; ``request.Requester`` hands it what happened to chunks, and asks nodes for what it finds
absent. An event that does not fit the state of its chunk is ignored: a late word of an effect that nobody waits for any
more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import CorruptObject
from .asking import Asking, RequestLimits
from .bodies import Ready, expand
from .chunks import ChunkBook, State
from .inquiry import Inquiry
from .manifest import Chunk
from .providers import ProviderPool
from .request_events import (
    ChunkAbsent,
    ChunkDamaged,
    ChunkEvent,
    ChunkFailed,
    ChunkGood,
    ChunkHeld,
    DamageChecked,
    LoadChunk,
    ReportDamage,
)

__all__ = ["Loading"]


class Loading:
    """The chunks of one file as one manifest cuts it.

    :param all_absent: the bucket is known to have none of them.
    """

    def __init__(self, chunks: tuple[Chunk, ...], pool: ProviderPool, asking: Asking, inquiry: Inquiry,
                 limits: RequestLimits, *, all_absent: bool = False) -> None:
        self.chunks = chunks
        self.book = ChunkBook(len(chunks))
        self.bytes_held = 0
        self.pause_until: float | None = None
        self._pool = pool
        self._asking = asking
        self._inquiry = inquiry
        self._limits = limits
        self._all_absent = all_absent
        self._found = self._missed = False
        self._absent_streak = 0
        self._failures = 0
        self._damages: dict[int, int] = {}
        pool.lay_out(self.book)

    @property
    def failing(self) -> bool:
        """Whether the bucket did not answer when it was last asked."""
        return self._failures > 0

    @property
    def under_way(self) -> bool:
        """Whether a download is under way, or can begin without anybody's help."""
        return self.book.count_in(State.LOADING, State.READY, State.UNKNOWN) > 0

    def recovered(self, indices: Iterable[int]) -> None:
        """A former attempt left these chunks, and they are sound."""
        for index in indices:
            if self.book[index] is not State.GOOD:
                self.book.move(index, State.GOOD)
                self.bytes_held += self._length(index)

    def need(self, indices: range) -> None:
        """Somebody needs these chunks."""
        self.book.need(indices)
        if self._all_absent:
            self._presume_absent()

    def bucket_moved(self) -> None:
        """What is known of the bucket is of another one than is read from now on."""
        self._all_absent, self._absent_streak = False, 0
        while (index := self.book.take(State.READY, State.UNKNOWN)) is not None:
            self._pool.vanished(index, excused=True)
        while self.book.take(State.ABSENT, State.UNKNOWN) is not None:
            pass

    def start(self, now: float) -> list[LoadChunk]:
        """Begin as many downloads as there is room for: first what was announced, then what nobody has looked at."""
        if self.pause_until is not None:
            if now < self.pause_until:
                return []
            self.pause_until = None
        loads: list[LoadChunk] = []
        while self.book.count_in(State.LOADING) < self._limits.download_concurrency:
            index = self.book.take(State.READY, State.LOADING)
            if index is None:
                index = self.book.take(State.UNKNOWN, State.LOADING)
            if index is None:
                break
            loads.append(LoadChunk(index, announced=self._pool.source(index) is not None))
        return loads

    def announced(self, ready: Ready, sender: str, now: float) -> None:
        """A node says that chunks are in the bucket."""
        for index in expand(ready.chunks, self.book.count):
            if self._pool.uploaded(sender, index, now) and self._is(index, State.UNKNOWN, State.ABSENT, State.ASSIGNED):
                self.book.move(index, State.READY)
                self._asking.alive(now)  # to announce is not to bring: progress is a chunk that arrives

    def handle(self, event: ChunkEvent, now: float) -> list[ReportDamage]:
        """Take what happened to one chunk.

        :raises CorruptObject: it was damaged too often.
        :raises KacheryError: the bucket failed, and there is no more patience with it.
        """
        if not 0 <= event.index < self.book.count:
            return []
        effects: list[ReportDamage] | None = _HANDLERS[type(event)](self, event, now)
        return effects or []

    # --- what happened to a chunk

    def _on_held(self, event: ChunkHeld, now: float) -> None:
        if self._is(event.index, State.LOADING):
            self.book.move(event.index, State.HELD)
            self.bytes_held += self._length(event.index)
            self._absent_streak = self._failures = 0
            self._note_bucket(event.index, found=True)
            if event.index not in self._damages:
                self._asking.progressed(now)

    def _on_good(self, event: ChunkGood, now: float) -> None:
        if self._is(event.index, State.HELD):
            self.book.move(event.index, State.GOOD)
            self._pool.sound(event.index)

    def _on_damaged(self, event: ChunkDamaged, now: float) -> list[ReportDamage]:
        if not self._is(event.index, State.HELD, State.GOOD):
            return []
        self.bytes_held -= self._length(event.index)
        return self._report(event.index, event.found, now)

    def _on_damage_checked(self, event: DamageChecked, now: float) -> None:
        if self._is(event.index, State.CHECKING):
            self.book.move(event.index, State.ABSENT if event.removed else State.READY)

    def _on_absent(self, event: ChunkAbsent, now: float) -> None:
        index = event.index
        if not self._is(index, State.LOADING):
            return
        self._note_bucket(index, found=False)
        self.book.move(index, State.ABSENT)
        if self._pool.source(index) is not None:
            self._pool.vanished(index, excused=self._asking.moved_lately(now))
            return
        self._absent_streak += 1
        if self._absent_streak >= self._limits.absent_probes_max:
            self._presume_absent()

    def _on_failed(self, event: ChunkFailed, now: float) -> list[ReportDamage]:
        index = event.index
        if not self._is(index, State.LOADING):
            return []
        if isinstance(event.error, CorruptObject):  # of the wrong size
            return self._report(index, "", now)
        self._inquiry.bucket = event.error.message
        if not self._asking.bears(event.error, now):
            raise event.error
        self._failures += 1
        self._pause(self._failures, now)
        self.book.move(index, State.READY if self._pool.source(index) is not None else State.UNKNOWN)
        return []

    # --- small parts

    def _report(self, index: int, found: str, now: float) -> list[ReportDamage]:
        count = self._damages[index] = self._damages.get(index, 0) + 1
        if count > self._limits.corrupt_retries_max * self._pool.blame(index):
            name = self.chunks[index].sha1
            raise CorruptObject(object=name, found=found or "of another length", sha1=name)
        self.book.move(index, State.CHECKING)
        if count > 1:
            self._pause(count, now)
        return [ReportDamage(index, found)]

    def _pause(self, count: int, now: float) -> None:
        seconds = self._limits.retry_base_seconds * 2.0 ** min(count, 16)
        self.pause_until = now + min(seconds, self._limits.retry_cap_seconds)

    def _presume_absent(self) -> None:
        while self.book.take(State.UNKNOWN, State.ABSENT) is not None:
            pass

    def _note_bucket(self, index: int, *, found: bool) -> None:
        if self._pool.source(index) is None:
            self._found, self._missed = self._found or found, self._missed or not found
            self._inquiry.bucket = ("has some of it" if self._found and self._missed
                                    else "has it" if self._found else "does not have it")

    def _is(self, index: int, *states: State) -> bool:
        return self.book[index] in states

    def _length(self, index: int) -> int:
        return self.chunks[index].end - self.chunks[index].start


_HANDLERS: dict[type[Any], Any] = {
    ChunkHeld: Loading._on_held,
    ChunkGood: Loading._on_good,
    ChunkDamaged: Loading._on_damaged,
    DamageChecked: Loading._on_damage_checked,
    ChunkAbsent: Loading._on_absent,
    ChunkFailed: Loading._on_failed,
}
