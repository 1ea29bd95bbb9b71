"""Work in threads: over when whoever awaits it goes on, also when that was cancelled; or such as may never end."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

__all__ = ["PassingThreads", "in_thread"]

T = TypeVar("T")


async def in_thread(executor: Executor, work: Callable[..., T], *arguments: Any,
                    undo: Callable[[T], object] | None = None, stop: Callable[[], object] | None = None) -> T:
    """Run ``work(*arguments)`` in ``executor``.

    When cancelled, work that has not begun is dropped, and work that has is waited for: nothing goes on behind the
    caller's back with a file that it is about to close.

    :param stop: tells work that has begun, and whose caller was cancelled, to end early.
    :param undo: takes what the work of a cancelled caller returned, so that it can be closed.
    :raises Exception: what ``work`` raised.
    """
    submitted = executor.submit(work, *arguments)
    future = asyncio.wrap_future(submitted)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if submitted.cancel():
            raise
        if stop is not None:
            stop()
        while not future.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled() and future.exception() is None and undo is not None:
            undo(future.result())
        raise


class PassingThreads(Executor):
    """Threads that are there while there is work for them. Nobody waits for their end, not even the process at its own.

    :param count_max: how many work at once; further work waits.
    """

    def __init__(self, count_max: int, name: str) -> None:
        self._count_max = count_max
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running = 0

    def submit(self, work: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        """See ``Executor``."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((future, partial(work, *arguments, **named)))
            more = self._running < self._count_max
            self._running += more
        if more:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, work = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del future, work
