"""Tasks and threads that are told to end have ended when the wait for them is over."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kachery_fast.node.ending import end_tasks
from kachery_fast.node.threads import in_thread
from tests.network import LOOPS, run_on

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)


def test_a_task_that_swallows_its_cancellation_ends_too(loop_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kachery_fast.node.ending._PATIENCE_SECONDS", 0.01)
    swallowed: list[int] = []

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if len(swallowed) == 3:
                    raise
                swallowed.append(1)

    async def broken() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ZeroDivisionError

    async def work() -> None:
        tasks = [asyncio.create_task(stubborn()), asyncio.create_task(broken())]
        await asyncio.sleep(0)
        await end_tasks(tasks)
        assert all(task.done() for task in tasks)
        assert len(swallowed) == 3
        await end_tasks([])
    run_on(loop_kind, work(), 30)


def test_work_in_a_thread_is_waited_for_and_undone_when_its_caller_is_cancelled(loop_kind: str) -> None:
    begun, release = threading.Event(), threading.Event()
    undone: list[str] = []
    dropped: list[int] = []

    def slow() -> str:
        begun.set()
        release.wait(10)
        return "made"

    async def work() -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as executor:
            task = asyncio.create_task(in_thread(executor, slow, undo=undone.append))
            await loop.run_in_executor(None, begun.wait)
            waiting = asyncio.create_task(in_thread(executor, dropped.append, 1))
            await asyncio.sleep(0)
            task.cancel()
            waiting.cancel()
            await asyncio.wait([waiting])
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
            release.set()
            await asyncio.wait([task])
            assert task.cancelled()
            assert (undone, dropped) == (["made"], [])
            assert await in_thread(executor, int, "7") == 7
            with pytest.raises(ValueError, match="x"):
                await in_thread(executor, int, "x")
    run_on(loop_kind, work(), 30)
