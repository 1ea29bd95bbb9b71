"""What a hub counts of what moves through its bucket, and tells the channel's owner."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import DiskError, NotPermitted
from kachery_fast.hub.registry import Registry, registry_url
from kachery_fast.hub.tables import usage as usage_table
from kachery_fast.hub.usage import KEPT_DAYS, Moved, Place, Usage, day_of

from ..network import LOOPS, run_on
from .support import CHANNEL, Clock, World, node_id, running_world, sha1_of

DAY = 24 * 3600.0


async def show(world: World, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = await world.owner.call("showUsage", channel=CHANNEL, **fields)
    return answer


async def show_after(world: World, downloads: int, **fields: Any) -> dict[str, Any]:
    """What the hub tells once it has counted so many downloads, as who downloads may be done with one sooner."""
    while True:
        told = await show(world, **fields)
        if sum(day["downloads"] for day in told["days"]) >= downloads:
            return told


def line(**moved: int) -> dict[str, int]:
    return {"uploads": 0, "uploadBytes": 0, "downloads": 0, "downloadBytes": 0, **moved}


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_what_moved_is_told_by_day_and_node(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a, b = await world.member("a"), await world.member("b")
            first = datetime.fromtimestamp(world.clock.now, timezone.utc).date().isoformat()
            assert await world.upload(a, b"12345") == 200
            assert await world.upload(a, b"12345") == 412
            assert await world.upload(b, b"123") == 200
            assert await world.download(sha1_of(b"12345")) == b"12345"
            await show_after(world, 1)
            world.clock.now += DAY
            second = datetime.fromtimestamp(world.clock.now, timezone.utc).date().isoformat()
            assert await world.download(sha1_of(b"123")) == b"123"
            told = await show_after(world, 2, days=3)
            assert [day["date"] for day in told["days"]][1:] == [first, second]
            assert told["days"][0] == {"date": told["days"][0]["date"], **line()}
            assert told["days"][1] == {"date": first, **line(uploads=2, uploadBytes=8, downloads=1, downloadBytes=5)}
            assert told["days"][2] == {"date": second, **line(downloads=1, downloadBytes=3)}
            assert told["nodes"] == [
                {"node": "", "label": "", **line(downloads=2, downloadBytes=8)},
                {"node": node_id("a"), "label": "a", **line(uploads=1, uploadBytes=5)},
                {"node": node_id("b"), "label": "b", **line(uploads=1, uploadBytes=3)}]
            assert {"kind": "sha1", "objects": 2, "sizeBytes": 8} in told["stored"]
            assert told["counted"] is True
            (today,) = (await show(world, days=1))["days"]
            assert today == told["days"][2]

    run_on(loop_kind, scenario())


def test_what_moved_is_kept_over_a_restart_and_goes_with_the_channel(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world:
            assert await world.upload(await world.member("a"), b"12345") == 200
        clock.now += 1
        async with running_world(tmp_path, clock) as world:
            assert (await show(world, days=1))["days"][0]["uploadBytes"] == 5
            assert await world.upload(world.node("a"), b"more") == 200
            await world.owner.call("deleteChannel", channel=CHANNEL)
            await world.owner.call("createChannel", name=CHANNEL)
            assert (await show(world))["nodes"] == []

    run_on("uvloop", scenario())


def test_usage_is_for_the_owner_of_the_channel(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            other = await world.person("second@lab.org")
            with pytest.raises(NotPermitted):
                await other.call("showUsage", channel=CHANNEL)

    run_on("uvloop", scenario())


# --- the counter itself


@asynccontextmanager
async def open_registry(tmp_path: Path) -> AsyncIterator[Registry]:
    """The registry of a hub that was there, with the channel."""
    async with running_world(tmp_path) as world:
        settings = world.settings
    registry = Registry(registry_url(settings.hub_database, settings.hub_dir))
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


async def rows(registry: Registry) -> list[tuple[Any, ...]]:
    return await registry.call(lambda connection: [tuple(row) for row in connection.execute(usage_table.select())])


def test_several_hubs_add_to_the_same_rows(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with open_registry(tmp_path) as registry:
            hubs = [Usage(registry, clock) for _ in range(2)]
            for count in (1, 2):
                for hub in hubs:
                    for _ in range(count):
                        hub.arrived(f"{CHANNEL}/sha1/x", "n", 10)
                        hub.sent(f"{CHANNEL}/sha1/x", "n", 100)
                    await hub.write()
            assert await rows(registry) == [(CHANNEL, day_of(clock.now), "n", 6, 60, 6, 600)]

    run_on("uvloop", scenario())


def test_threads_lose_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with open_registry(tmp_path) as registry:
            usage = Usage(registry, clock)

            def move() -> None:
                for _ in range(2000):
                    usage.arrived(f"{CHANNEL}/sha1/x", "n", 1)

            threads = [threading.Thread(target=move) for _ in range(4)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                await usage.write()
            await usage.stop()
            assert await rows(registry) == [(CHANNEL, day_of(clock.now), "n", 8000, 8000, 0, 0)]

    run_on("uvloop", scenario())


def test_what_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    class Failing(Registry):
        failing = True

        async def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            if self.failing:
                raise DiskError(action="use", path="hub.db", why="database is locked")
            return await super().call(function, *args, **kwargs)

    async def scenario() -> None:
        clock = Clock()
        async with open_registry(tmp_path):
            pass
        registry = Failing(registry_url("", tmp_path / "hub"))
        await registry.open()
        usage = Usage(registry, clock)
        place = Place(CHANNEL, day_of(clock.now), "n")
        usage.arrived(f"{CHANNEL}/sha1/x", "n", 5)
        await usage.write()
        usage.arrived(f"{CHANNEL}/sha1/x", "n", 6)
        assert usage.unwritten(place) == Moved(2, 11, 0, 0)
        registry.failing = False
        assert await usage.since(CHANNEL, 0) == {place: Moved(2, 11, 0, 0)}
        assert usage.unwritten(place) == Moved()
        await registry.close()

    run_on("uvloop", scenario())


def test_what_is_counted_of_a_deleted_channel_is_dropped_and_so_is_what_is_old(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with open_registry(tmp_path) as registry:
            usage = Usage(registry, clock)
            usage.arrived("gone/sha1/x", "n", 5)
            usage.arrived(f"{CHANNEL}/sha1/x", "old", 5)
            await usage.write()
            assert [row[2] for row in await rows(registry)] == ["old"]
            clock.now += (KEPT_DAYS + 1) * DAY
            usage.arrived(f"{CHANNEL}/sha1/x", "new", 5)
            await usage.write()
            assert [row[2] for row in await rows(registry)] == ["new"]

    run_on("uvloop", scenario())
