"""Uploads take turns, and do not run in step."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from kachery_fast.node.slots import AdaptiveSlots
from tests.network import LOOPS, run_on


class _Uploads:
    """Uploads that go on only when they are told to."""

    def __init__(self, limit: int) -> None:
        self.slots = AdaptiveSlots(limit, lambda: 0.0)
        self.running: dict[int, asyncio.Event] = {}
        self.progress: dict[int, object] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def begin(self, number: int) -> asyncio.Task[None]:
        async def upload() -> None:
            async with self.slots.slot(100) as progress:
                self.running[number] = asyncio.Event()
                self.progress[number] = progress
                await self.running[number].wait()
            del self.running[number]

        self.tasks.append(asyncio.get_running_loop().create_task(upload()))
        return self.tasks[-1]

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    def tell(self, number: int, count: int) -> None:
        progress = self.progress[number]
        assert callable(progress)
        progress(count)


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_at_first_an_upload_begins_when_the_one_before_is_sent(loop_kind: str) -> None:
    async def scenario() -> None:
        uploads = _Uploads(4)
        for number in range(3):
            uploads.begin(number)
        await uploads.settle()
        assert sorted(uploads.running) == [0]
        uploads.tell(0, 99)
        await uploads.settle()
        assert sorted(uploads.running) == [0]
        uploads.tell(0, 1)
        await uploads.settle()
        assert sorted(uploads.running) == [0, 1]
        uploads.running[0].set()
        await uploads.settle()
        assert sorted(uploads.running) == [1]
        uploads.running[1].set()  # one that tells of nothing makes room at its end
        await uploads.settle()
        assert sorted(uploads.running) == [2]
        await _finish(uploads)

    run_on(loop_kind, scenario())


def _level_after(seconds_of_one: dict[int, float], count: int, limit: int = 4) -> list[int]:
    """The levels that are found when at each of them one upload takes so long, a queue always waiting."""
    levels: list[int] = []

    async def scenario() -> None:
        time = 0.0
        slots = AdaptiveSlots(limit, lambda: time)
        blocker = asyncio.Event()

        async def one(waits: asyncio.Event | None) -> None:
            nonlocal time
            async with slots.slot(1000):
                if waits is not None:
                    await waits.wait()
                time += seconds_of_one[slots.level] / slots.level
                levels.append(slots.level)

        first = asyncio.get_running_loop().create_task(one(blocker))
        rest = [asyncio.get_running_loop().create_task(one(None)) for _ in range(count)]
        await asyncio.sleep(0)
        blocker.set()
        await asyncio.gather(first, *rest)

    run_on("asyncio-debug", scenario())
    return levels


def test_the_level_rises_as_long_as_more_is_moved() -> None:
    levels = _level_after(dict.fromkeys(range(1, 5), 1.0), 40)  # each connection has a rate of its own
    assert levels[0] == 1
    assert levels[-1] == 4
    assert levels.index(4) < 20


def test_the_level_falls_back_where_one_connection_fills_the_path() -> None:
    levels = _level_after({level: float(level) for level in range(1, 5)}, 60)
    assert max(levels) == 2, "the next level was tried"
    assert levels[-1] == 1
    assert levels.count(2) <= 4


def test_a_level_that_was_given_up_is_tried_again_later() -> None:
    levels = _level_after({level: float(level) for level in range(1, 5)}, 200)
    tries = sum(1 for before, after in pairwise(levels) if (before, after) == (1, 2))
    assert 2 <= tries <= 4


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_turn_that_is_cancelled_is_not_lost(loop_kind: str) -> None:
    async def scenario() -> None:
        uploads = _Uploads(1)
        for number in range(3):
            uploads.begin(number)
        await uploads.settle()
        uploads.tasks[1].cancel()
        await uploads.settle()
        uploads.running[0].set()
        await uploads.settle()
        assert sorted(uploads.running) == [2]
        waiting = uploads.begin(3)
        await uploads.settle()
        uploads.running[2].set()
        waiting.cancel()  # in the same moment as its turn comes
        await uploads.settle()
        uploads.begin(4)
        await uploads.settle()
        assert sorted(uploads.running) == [4]
        await _finish(uploads)

    run_on(loop_kind, scenario())


async def _finish(uploads: _Uploads) -> None:
    while uploads.running:
        for event in uploads.running.values():
            event.set()
        await uploads.settle()
    await asyncio.gather(*uploads.tasks, return_exceptions=True)
