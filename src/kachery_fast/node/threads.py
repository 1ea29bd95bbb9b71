"""Work in threads that is over when whoever awaits it goes on, also when that was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any, TypeVar

__all__ = ["in_thread"]

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
