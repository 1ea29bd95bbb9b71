"""Uploads take turns, and do not run in step."""

from __future__ import annotations

import asyncio

import pytest

from kachery_fast.node.slots import StaggeredSlots
from tests.network import LOOPS, run_on


class _Uploads:
    """Uploads that go on only when they are told to."""

    def __init__(self, limit: int) -> None:
        self.slots = StaggeredSlots(limit)
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
def test_the_next_upload_begins_when_the_one_before_is_a_part_of_the_way(loop_kind: str) -> None:
    async def scenario() -> None:
        uploads = _Uploads(4)
        for number in range(6):
            uploads.begin(number)
        await uploads.settle()
        assert sorted(uploads.running) == [0]
        uploads.tell(0, 24)
        await uploads.settle()
        assert sorted(uploads.running) == [0]
        uploads.tell(0, 1)
        await uploads.settle()
        assert sorted(uploads.running) == [0, 1]
        uploads.tell(0, 75)
        await uploads.settle()
        assert sorted(uploads.running) == [0, 1], "one upload makes room once"
        for number in (1, 2, 3):
            uploads.tell(number, 25)
            await uploads.settle()
        assert sorted(uploads.running) == [0, 1, 2, 3], "never more than the limit"
        uploads.running[0].set()
        await uploads.settle()
        assert sorted(uploads.running) == [1, 2, 3, 4]
        await _finish(uploads)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_an_upload_that_tells_of_nothing_makes_room_at_its_end_and_rest_begins_anew(loop_kind: str) -> None:
    async def scenario() -> None:
        uploads = _Uploads(4)
        for number in range(3):
            uploads.begin(number)
        await uploads.settle()
        uploads.running[0].set()
        await uploads.settle()
        assert sorted(uploads.running) == [1, 2]
        await _finish(uploads)
        uploads.begin(7)
        uploads.begin(8)
        await uploads.settle()
        assert sorted(uploads.running) == [7]
        await _finish(uploads)

    run_on(loop_kind, scenario())


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
