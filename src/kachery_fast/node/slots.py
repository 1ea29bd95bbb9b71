"""How many uploads run at once: as many as make it faster, one after the other begun.

Uploads that begin together end together: the first chunk is in the bucket only when the fourth is too, and at the end
the last four are downloaded when nothing is left to upload. On a path that one connection fills, more of them do just
that and nothing else; on a long one (a cloud's bucket), four may be four times as fast. So the level is found by
trying: it starts with one, and rises as long as that moves more bytes a second. At level L the next upload begins
when the one before it is sent to a part of 1 / L, so that they end one by one. What the system's buffers have taken
counts as sent, so even at level 1 the path does not run dry between two uploads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["AdaptiveSlots"]

# A level is better when it moves this much more; less is noise.
_GAIN = 1.15
# Uploads after which a level that was given up is tried once more: paths change.
_RETRY_UPLOADS = 64


class AdaptiveSlots:
    """At most ``limit`` uploads at once.

    :param clock: seconds, monotonic.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._level = 1
        self._rates = [0.0] * (limit + 2)
        self._window: deque[tuple[float, int]] = deque()
        self._settled_uploads = 0
        self._active = 0
        self._may_begin = True
        self._newest: object = None
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def level(self) -> int:
        """How many uploads run side by side at present."""
        return self._level

    @asynccontextmanager
    async def slot(self, size_bytes: int) -> AsyncIterator[Callable[[int], None]]:
        """Wait for a turn, and hold it in the block.

        Yields a function to be told of bytes sent, from any thread, with those since its last call.
        """
        await self._acquire()
        loop = asyncio.get_running_loop()
        mine = self._newest = object()
        sent_bytes = 0
        told = False

        def progress(count: int) -> None:
            nonlocal sent_bytes, told
            sent_bytes += count
            if not told and sent_bytes * self._level >= size_bytes:
                told = True
                loop.call_soon_threadsafe(self._let_next_begin, mine)

        try:
            yield progress
            self._learn(size_bytes)
        finally:
            self._active -= 1
            self._let_next_begin(mine)

    async def _acquire(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the turn was given, and is not taken
                self._active -= 1
                self._may_begin = True
                self._wake()
            raise

    def _let_next_begin(self, upload: object) -> None:
        if upload is self._newest:
            self._may_begin = True
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._may_begin and self._active < self._limit:
            turn = self._waiting.popleft()
            if not turn.done():  # else its upload was cancelled
                self._active += 1
                self._may_begin = False
                turn.set_result(None)

    def _learn(self, size_bytes: int) -> None:
        """An upload has ended well: after a few on one level, under load all the while, judge that level."""
        if not self._waiting:
            self._window.clear()
            return
        self._window.append((self._clock(), size_bytes))
        self._settled_uploads += 1
        if len(self._window) <= max(2, self._level):
            return
        seconds = self._window[-1][0] - self._window[0][0]
        moved = sum(size for _, size in self._window) - self._window[0][1]
        self._window.clear()
        if seconds > 0:
            self._judge(moved / seconds)

    def _judge(self, rate: float) -> None:
        self._rates[self._level] = rate
        if self._level > 1 and rate < _GAIN * self._rates[self._level - 1]:
            self._level -= 1
            self._settled_uploads = 0
        elif self._level < self._limit and (rate > _GAIN * self._rates[self._level + 1] or
                                            self._settled_uploads >= _RETRY_UPLOADS):
            self._level += 1
            self._settled_uploads = 0
