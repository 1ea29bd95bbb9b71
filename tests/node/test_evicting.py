"""A node over its bound evicts what it fetched, and nothing else."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kachery_fast.node.evicting import Evicting
from kachery_fast.store import FileStore
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
