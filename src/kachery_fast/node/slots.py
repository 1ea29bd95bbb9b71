"""How many uploads run at once, and that they do not run in step.

Uploads that begin together end together: the first chunk is in the bucket only when the fourth is too, and at the end
the last four are downloaded when nothing is left to upload. So a second upload begins when the first has sent a
quarter (of four), and so on; from then on one ends every quarter of the time that one takes. With the bucket held to
100 MB/s each way, 512 MiB from node to node took 1.19 of the time of its slower half in step, and 1.08 so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

__all__ = ["StaggeredSlots"]


class StaggeredSlots:
    """At most ``limit`` at once; after a time of rest one, and one more each time that one has come ``1 / limit`` far.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = 1
        self._active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def slot(self, size_bytes: int) -> AsyncIterator[Callable[[int], None]]:
        """Wait for a turn, and hold it in the block.

        Yields a function to be told of bytes sent, from any thread, with those since its last call.
        """
        await self._acquire()
        loop = asyncio.get_running_loop()
        sent_bytes = 0
        told = False

        def progress(count: int) -> None:
            nonlocal sent_bytes, told
            sent_bytes += count
            if not told and sent_bytes * self._limit >= size_bytes:
                told = True
                loop.call_soon_threadsafe(self._grow)

        try:
            yield progress
        finally:
            if not told:
                told = True
                self._grow()
            self._active -= 1
            self._wake()
            if not self._active:
                self._open = 1

    async def _acquire(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._wake()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the turn was given, and is not taken
                self._active -= 1
                self._wake()
            raise

    def _grow(self) -> None:
        self._open = min(self._limit, self._open + 1)
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._active < self._open:
            turn = self._waiting.popleft()
            if not turn.done():  # else its upload was cancelled
                self._active += 1
                turn.set_result(None)
