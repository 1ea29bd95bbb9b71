"""Who joins which transfer, and how many there are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kachery_fast.errors import NotAvailable
from kachery_fast.net.memory import MemoryBucket
from kachery_fast.protocol.names import FileUri
from tests.network import LOOPS, run_on
from tests.node.support import CHUNK, Network, Peer, data_of, fails, network, nothing_left, open_files, until
from tests.node.test_transfer import SIZE, fill

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)


def test_what_one_channel_lacks_comes_from_the_other(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path / "one") as poor:
            rich = Network(tmp_path / "two", MemoryBucket(), "rich")
            b, same = await poor.peer("b"), await rich.peer("b")
            try:
                data = data_of(SIZE)
                uri = fill(rich, data)
                poor.bucket.gate.clear()
                first = asyncio.create_task(b.transfers.load(uri, b.link))
                await until(lambda: b.transfers.active(uri.sha1) is not None)
                second = asyncio.create_task(b.transfers.load(uri, same.link))
                await asyncio.sleep(0.01)
                poor.bucket.gate.set()
                await fails(NotAvailable, first)
                assert (await second).path.read_bytes() == data
            finally:
                await rich.close()
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_a_wrong_manifest_of_one_asker_does_not_spoil_it_for_the_next(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data)
            wrong = FileUri(uri.sha1, "", "ab" * 20)
            net.bucket.gate.clear()
            first = asyncio.create_task(b.load(wrong))
            await until(lambda: b.transfers.active(uri.sha1) is not None)
            second = asyncio.create_task(b.load(uri))
            await asyncio.sleep(0.01)
            net.bucket.gate.set()
            await fails(NotAvailable, first)
            assert await second == data
    run_on(loop_kind, work(), 60)


def test_only_so_many_are_open_at_once_and_lingering_ones_make_room(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b", load_requests_max=2)
            files = [data_of(2 * CHUNK, seed) for seed in range(8)]
            uris = [fill(net, data) for data in files]
            for uri, data in zip(uris, files, strict=True):
                assert await b.read(uri, 1, 9) == data[1:9]
                assert len(set(open_files(tmp_path))) <= 2  # each is open a second time, for its lock
            reads = await asyncio.gather(*(b.read(uri, CHUNK, CHUNK + 9) for uri in uris))
            assert reads == [data[CHUNK:CHUNK + 9] for data in files]
            loads = [asyncio.create_task(b.load(uri)) for uri in uris]
            most = 0
            while not all(load.done() for load in loads):
                most = max(most, len(b.transfers.describe()))
                await asyncio.sleep(0)
            assert [load.result() for load in loads] == files
            assert 1 <= most <= 2
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_a_file_that_was_stored_meanwhile_is_not_fetched(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            uri = b.put(data_of(SIZE))
            assert await b.load(uri) == data_of(SIZE)
            assert await b.read(uri, 5, CHUNK + 5) == data_of(SIZE)[5:CHUNK + 5]
            assert b.link.providers() == {}
            assert net.bucket.gets == []
    run_on(loop_kind, work(), 60)


async def _transfer_state(b: Peer, uri: FileUri) -> dict[str, object]:
    await until(lambda: b.transfers.describe() and b.transfers.describe()[0]["total"])
    return b.transfers.describe()[0]


def test_what_is_under_way_is_described(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            uri = fill(net, data_of(SIZE))
            load = asyncio.create_task(b.load(uri))
            state = await _transfer_state(b, uri)
            assert state["total"] == SIZE
            assert state["uri"] == str(uri)
            assert isinstance(state["waiting"], str)
            await load
            await until(lambda: not b.transfers.describe())
    run_on(loop_kind, work(), 60)
