"""Running a network test on each event loop that the program may meet."""

from __future__ import annotations

import asyncio
import gc
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import islice
from types import FrameType
from typing import Any, TypeVar
from unittest import mock

from aiohttp import web_app

T = TypeVar("T")

LOOPS = ("asyncio-debug", "uvloop")

# How many are kept, from the innermost on.
_FRAMES = 3


def run_on(loop_kind: str, coroutine: Coroutine[Any, Any, T], timeout_seconds: float = 120.0) -> T:
    """Run ``coroutine`` to its end on a fresh loop: ``asyncio-debug`` or ``uvloop``.

    Fails when a task or a callback died with an exception that nobody collected.
    """
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if loop_kind == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    # What is there already is left out of the collection below, which would otherwise take longer with each test.
    gc.freeze()
    loop = factory()
    loop.set_debug(loop_kind == "asyncio-debug")
    loop.slow_callback_duration = 2.0
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: unhandled.append(context))
    try:
        with _short_stacks():
            result = loop.run_until_complete(asyncio.wait_for(coroutine, timeout_seconds))
        left = [task for task in asyncio.all_tasks(loop) if not task.done()]
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        # It keeps the last 1,024 handlers, and with them whole nodes and hubs, to be gone through by each collection.
        web_app._cached_build_middleware.cache_clear()
        gc.collect()
    finally:
        loop.close()
    if unhandled:
        raise AssertionError(f"unhandled on the loop: {unhandled}")
    return result


@contextmanager
def _short_stacks() -> Iterator[None]:
    """Let asyncio note of each future where it was made, but not the 60 frames of pytest below: a third of the time."""
    walk_stack = traceback.walk_stack

    def innermost(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
        return islice(walk_stack(frame), _FRAMES)

    with mock.patch.object(traceback, "walk_stack", innermost):
        yield
