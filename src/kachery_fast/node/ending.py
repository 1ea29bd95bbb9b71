"""Tasks that are begun by the way, and ended for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

__all__ = ["begin_task", "end_tasks"]

_PATIENCE_SECONDS = 1.0


def begin_task(work: Coroutine[Any, Any, None], among: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """Run ``work`` on the running loop, as a task that stays among the others until it is over."""
    task = asyncio.get_running_loop().create_task(work)
    among.add(task)
    task.add_done_callback(among.discard)
    task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it never reached the work
    return task


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are over, however they end.

    Until Python 3.12 ``asyncio.wait_for`` swallows a cancellation that comes in the same moment as what it waits for;
    a loop that goes on for ever would then never end. So who does not end is cancelled again.
    """
    pending = left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_PATIENCE_SECONDS)
    for task in pending:
        if not task.cancelled():
            task.exception()  # collected
