"""Running a network test on each event loop that the program may meet."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

LOOPS = ("asyncio-debug", "uvloop")


def run_on(loop_kind: str, coroutine: Coroutine[Any, Any, T], timeout_seconds: float = 120.0) -> T:
    """Run ``coroutine`` to its end on a fresh loop: ``asyncio-debug`` or ``uvloop``.

    Fails when a task or a callback died with an exception that nobody collected.
    """
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if loop_kind == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    loop = factory()
    loop.set_debug(loop_kind == "asyncio-debug")
    loop.slow_callback_duration = 2.0
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: unhandled.append(context))
    try:
        result = loop.run_until_complete(asyncio.wait_for(coroutine, timeout_seconds))
        left = [task for task in asyncio.all_tasks(loop) if not task.done()]
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        gc.collect()
    finally:
        loop.close()
    if unhandled:
        raise AssertionError(f"unhandled on the loop: {unhandled}")
    return result
