"""A node over its bound evicts what it fetched, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kachery_fast.node.evicting import Evicting, TrashAge
from kachery_fast.node.node import Node
from kachery_fast.store import FileStore
from kachery_fast.store.cache import CacheIndex
from kachery_fast.store.eviction import CacheKeeper
from tests.hub.support import running_world
from tests.network import LOOPS, run_on
from tests.node.running import A_AND_B, enrolled, running_node
from tests.node.support import data_of, nothing_left, settings_for, sha1_of, until
from tests.store.test_cache import fetch
from tests.store.test_eviction import old_trash


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_node_evicts_downloads_that_are_too_many(loop_kind: str, tmp_path: Path) -> None:
    data = data_of(300_000)

    async def work() -> None:
        async with running_world(tmp_path / "hub") as world:
            a, b = await enrolled(world, tmp_path, A_AND_B, cache_size_bytes_max=1000, cache_keep_seconds=0.0,
                                  cache_check_seconds=0.1)
            own = FileStore(b.storage_dir).put_bytes(b"b's own" * 1000).sha1
            FileStore(a.storage_dir).put_bytes(data)
            async with running_node(a), running_node(b) as client:
                status, answer = await client.ask("POST", "/api/load", {"uri": f"sha1://{sha1_of(data)}"})
                assert status == 200, answer
                await until(lambda: not client.node.store.has(sha1_of(data)))
                assert client.node.store.has(own)
                assert FileStore(a.storage_dir).has(sha1_of(data))  # stored there: an original
            trashed = {found.sha1 for found in CacheKeeper(b.storage_dir).trash.list()}
            assert sha1_of(data) in trashed
            assert own not in trashed
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_a_bound_that_makes_no_sense_is_told_once_and_old_trash_goes(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_for(tmp_path, cache_check_seconds=0.05, trash_keep_days=0.0)
    sha1 = fetch(tmp_path, b"copy")
    keeper = CacheKeeper(tmp_path)
    keeper.remove(sha1)
    assert len(list(keeper.trash.list())) == 1
    (tmp_path / "kachery.yaml").write_text("maxCacheSizeGiB: much")
    old = old_trash(tmp_path, b"left in the trash by a program of 2022")

    async def work() -> None:
        with ThreadPoolExecutor(1) as threads:
            evicting = Evicting(settings, FileStore(tmp_path), threads)
            task = asyncio.get_running_loop().create_task(evicting.run())
            await until(lambda: "nothing is evicted" in caplog.text)
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.wait([task])
            evicting.close()
    with caplog.at_level(logging.INFO, "kachery_fast.node"):
        asyncio.run(work())
    assert caplog.text.count("nothing is evicted") == 1
    assert [found.sha1 for found in keeper.trash.list()] == [old.name]


HOUR, DAY = 3600.0, 86400.0


def test_nothing_is_old_in_the_first_hour_of_a_node() -> None:
    age = TrashAge(DAY, wall=1000 * DAY, running=0.0)
    assert age.before(1000 * DAY + 60, 60) == float("-inf")
    assert age.before(1000 * DAY + HOUR, HOUR) == 999 * DAY + HOUR
    assert TrashAge(0.0, wall=1000 * DAY, running=0.0).before(1000 * DAY, 0.0) == 1000 * DAY


def test_by_how_much_the_clock_is_put_forward_is_not_believed_for_as_long_as_the_trash_is_kept() -> None:
    age = TrashAge(DAY, wall=0.0, running=0.0)
    age.before(2 * HOUR, 2 * HOUR)
    assert age.before(3 * HOUR + 2 * DAY, 3 * HOUR) == 3 * HOUR - DAY
    assert age.before(4 * HOUR + 2 * DAY, 4 * HOUR) == 4 * HOUR - DAY
    assert age.before(3 * HOUR + 3 * DAY, 3 * HOUR + DAY) == 3 * HOUR + 2 * DAY


def test_a_clock_that_is_put_back_and_forward_again_makes_nothing_older() -> None:
    age = TrashAge(DAY, wall=100 * DAY, running=0.0)
    assert age.before(98 * DAY + 2 * HOUR, 2 * HOUR) == 97 * DAY + 2 * HOUR
    assert age.before(100 * DAY + 3 * HOUR, 3 * HOUR) == 97 * DAY + 3 * HOUR


def evicting_in(root: Path, **options: object) -> tuple[Evicting, ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(1)
    return Evicting(settings_for(root, **options), FileStore(root), threads), threads


def test_a_clock_that_is_days_ahead_does_not_empty_the_trash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha1 = FileStore(tmp_path).put_bytes(b"removed by mistake a moment ago").sha1
    CacheKeeper(tmp_path).remove(sha1, force=True)
    evicting, threads = evicting_in(tmp_path)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * DAY)
    evicting._look()
    evicting.close()
    threads.shutdown()
    assert [found.sha1 for found in CacheKeeper(tmp_path).list_trash()] == [sha1]


def test_a_bound_that_cannot_be_kept_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sha1 = fetch(tmp_path, b"copy in use")
    evicting, threads = evicting_in(tmp_path, cache_size_bytes_max=1)
    for _ in range(3):
        evicting._look()
    assert caplog.text.count("nothing can go") == 1
    CacheKeeper(tmp_path).remove(sha1)
    evicting._look()
    fetch(tmp_path, b"copy in use")
    evicting._look()
    assert caplog.text.count("nothing can go") == 2
    evicting.close()
    threads.shutdown()


def test_a_node_that_stops_does_not_finish_a_long_eviction(tmp_path: Path) -> None:
    count = 2000

    def copies() -> int:
        return CacheIndex(tmp_path).totals().files

    def fill() -> None:
        path = FileStore(tmp_path).find(fetch(tmp_path, b"first")).path
        with CacheIndex(tmp_path).changing() as rows:
            for number in range(count):
                other = path.with_name(f"{path.name[:6]}{number:034x}")
                other.write_bytes(b"x")
                found = other.stat()
                rows.execute("INSERT INTO copies VALUES (?, 1, 1, ?, 1, 0, NULL)",
                             (other.name, f"{found.st_ino}:{found.st_mtime_ns}:1"))
                os.utime(other, ns=(1, found.st_mtime_ns))

    async def work() -> None:
        settings = settings_for(tmp_path, cache_size_bytes_max=1, cache_keep_seconds=0.0, cache_check_seconds=0.05)
        node = Node(settings)
        await node.start()
        try:
            await until(lambda: copies() < count)
        finally:
            await node.stop()
        assert copies() > 0

    fill()
    asyncio.run(work())
