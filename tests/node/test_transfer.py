"""Transfers over the network in memory: what arrives, what is left behind, and what those who wait are told."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import (
    BucketUnreachable,
    Cancelled,
    CorruptFile,
    DiskFull,
    KacheryError,
    NodeError,
    NotAvailable,
    ObjectMissing,
    UploadRefused,
)
from kachery_fast.net.memory import MemoryBucket
from kachery_fast.node.transfer import Transfer
from kachery_fast.node.transfers import Transfers
from kachery_fast.protocol.manifest import make_manifest, parse_manifest
from kachery_fast.protocol.names import FileUri
from kachery_fast.protocol.provide import LookedUp
from kachery_fast.store import destination as destination_module
from kachery_fast.store.destination import Destination
from kachery_fast.store.files import FileStore
from tests.network import LOOPS, run_on
from tests.node.support import (
    CHUNK,
    FilesBucket,
    Network,
    data_of,
    fails,
    network,
    nothing_left,
    other_tasks,
    sha1_of,
    until,
)

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
BUCKETS = [MemoryBucket, FilesBucket]
SIZE = 9 * CHUNK + 1234


def run(loop_kind: str, tmp_path: Path, work: Coroutine[Any, Any, None]) -> None:
    with nothing_left(tmp_path):
        run_on(loop_kind, work, 60)


def fill(net: Network, data: bytes, chunk_size: int = CHUNK, *, skip: tuple[int, ...] = ()) -> FileUri:
    """Put a file's chunks and manifest into the bucket; return its URI."""
    pieces = [data[start:start + chunk_size] for start in range(0, len(data), chunk_size)]
    manifest = make_manifest(len(data), sha1_of(data), [sha1_of(piece) for piece in pieces], chunk_size)
    for index, piece in enumerate(pieces):
        if index not in skip:
            net.bucket.objects[net.object(sha1_of(piece))] = piece
    net.bucket.objects[net.object(manifest.name)] = manifest.encode()
    return FileUri(sha1_of(data), "", manifest.name)


def chunk_name(net: Network, data: bytes, index: int, chunk_size: int = CHUNK) -> str:
    return net.object(sha1_of(data[index * chunk_size:(index + 1) * chunk_size]))


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, SIZE])
def test_a_file_travels_from_node_to_node(loop_kind: str, tmp_path: Path, bucket: type[MemoryBucket],
                                          size: int) -> None:
    async def work() -> None:
        async with network(tmp_path, bucket()) as net:
            a, b = await net.peer("a"), await net.peer("b")
            uri = a.put(data_of(size))
            assert await b.load(uri) == data_of(size)
            assert b.parts() == []
            assert b.store.manifest_for(uri.sha1)[0] == uri.manifest_sha1
    run(loop_kind, tmp_path, work())


@pytest.mark.parametrize("bucket", BUCKETS)
def test_chunks_of_2022_that_no_page_begins_with_arrive(loop_kind: str, tmp_path: Path,
                                                        bucket: type[MemoryBucket]) -> None:
    async def work() -> None:
        async with network(tmp_path, bucket()) as net:
            b = await net.peer("b")
            data = data_of(45_000_017)
            uri = fill(net, data, 20_000_000)
            assert await b.read(uri, 19_999_990, 20_000_010) == data[19_999_990:20_000_010]
            assert await b.load(uri) == data
    run(loop_kind, tmp_path, work())


@pytest.mark.parametrize("manifest_is_there", [True, False])
def test_before_an_announced_object_is_missed_the_hub_is_asked_for_the_bucket(loop_kind: str, tmp_path: Path,
                                                                              manifest_is_there: bool) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b")
            data = data_of(SIZE)
            uri = a.put(data)
            if manifest_is_there:
                fill(net, data, skip=tuple(range(10)))
            net.move(a)
            assert await b.load(uri) == data
            assert b.refreshed >= 1
            assert len(net.bucket.puts) == sum(map(len, net.hub.signed)) == (10 if manifest_is_there else 11)
    run(loop_kind, tmp_path, work())


def test_what_the_former_bucket_refuses_is_read_from_the_other_one(loop_kind: str, tmp_path: Path) -> None:
    moved = asyncio.Event()

    class Refusing(MemoryBucket):
        async def get_into(self, object_name: str, *arguments: Any, **named: Any) -> None:
            self.gets.append(object_name)
            await moved.wait()
            raise UploadRefused(action="the reading", object=object_name, status=403, why="its key was taken back")

    async def work() -> None:
        former = Refusing()
        async with network(tmp_path, former) as net:
            a, b = await net.peer("a"), await net.peer("b")
            data = data_of(SIZE)
            uri = a.put(data)
            fill(net, data)
            loading = asyncio.ensure_future(b.load(uri))
            await until(lambda: chunk_name(net, data, 0) in former.gets)
            net.move(a, b)
            moved.set()
            assert await loading == data
    run(loop_kind, tmp_path, work())


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_damaged_chunk_is_reported_and_comes_again_from_its_owner(loop_kind: str, tmp_path: Path,
                                                                    bucket: type[MemoryBucket]) -> None:
    async def work() -> None:
        async with network(tmp_path, bucket()) as net:
            a, b = await net.peer("a"), await net.peer("b")
            data = data_of(SIZE)
            uri = a.put(data)
            fill(net, data)
            net.bucket.corrupt(chunk_name(net, data, 3))
            assert await b.load(uri) == data
            assert len(net.hub.reports) == 1
            assert net.bucket.puts == [chunk_name(net, data, 3)]
    run(loop_kind, tmp_path, work())


def test_a_damaged_chunk_of_a_range_comes_again(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b")
            data = data_of(SIZE)
            uri = a.put(data)
            fill(net, data)
            net.bucket.corrupt(chunk_name(net, data, 3))
            assert await b.read(uri, 3 * CHUNK, 4 * CHUNK + 1) == data[3 * CHUNK:4 * CHUNK + 1]
    run(loop_kind, tmp_path, work())


def test_a_bucket_that_fails_for_a_while_costs_time_only(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data)
            for index in (0, 4):
                trouble = BucketUnreachable(object="x", why="HTTP 500", attempts=5)
                net.bucket.fail(chunk_name(net, data, index), trouble, trouble)
            net.bucket.fail(net.object(uri.manifest_sha1 or ""), BucketUnreachable(object="x", why="no", attempts=1))
            assert await b.load(uri) == data
    run(loop_kind, tmp_path, work())


def test_what_nobody_has_leaves_nothing_on_the_disk(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data, skip=tuple(range(10)))
            error = await fails(NotAvailable, b.load(uri))
            assert "no other node" in error.message
            await until(lambda: b.transfers.active(uri.sha1) is None)
            assert b.traces(uri) == []
    run(loop_kind, tmp_path, work())


def test_what_did_arrive_is_kept_and_checked_before_it_counts(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data, skip=(5, 6, 7, 8, 9))
            await fails(NotAvailable, b.load(uri))
            await until(lambda: b.transfers.active(uri.sha1) is None)
            part, = b.parts()
            found = part.read_bytes()
            arrived = [index for index in range(10)  # not all of the five, when the load fails early
                       if found[index * CHUNK:(index + 1) * CHUNK] == data[index * CHUNK:(index + 1) * CHUNK]]
            assert arrived
            assert set(arrived) <= set(range(5))
            with part.open("r+b") as file:  # a crash has left good, damaged and missing chunks
                file.seek(arrived[-1] * CHUNK + 17)
                file.write(b"\0\1\2\3")
            fill(net, data)
            net.bucket.gets.clear()
            assert await b.load(uri) == data
            loaded = [name for name in net.bucket.gets if name != net.object(uri.manifest_sha1 or "")]
            assert sorted(loaded) == sorted(chunk_name(net, data, index) for index in range(10)
                                            if index not in arrived[:-1])
    run(loop_kind, tmp_path, work())


def test_a_part_that_was_cut_otherwise_or_is_too_long_does_no_harm(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data)
            b.store.part_path(uri.sha1).write_bytes(data_of(SIZE + 99999, 2))
            assert await b.load(uri) == data
    run(loop_kind, tmp_path, work())


def test_ranges_come_without_the_rest_and_the_whole_uses_them(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data)
            assert await b.read(uri, 4 * CHUNK - 2, 4 * CHUNK + 2) == data[4 * CHUNK - 2:4 * CHUNK + 2]
            assert b.traffic.downloaded_objects == 2
            assert await b.read(uri, SIZE - 5, None) == data[-5:]
            assert await b.read(uri, SIZE, None) == b""
            assert await b.read(uri, SIZE + 10**15, SIZE + 2 * 10**15) == b""
            assert await b.read(uri, 7, 7) == b""
            assert b.traffic.downloaded_objects == 3
            assert await b.load(uri) == data
            assert b.traffic.downloaded_objects == 10
            assert await b.read(uri, 0, None) == data
            assert b.traffic.downloaded_objects == 10
    run(loop_kind, tmp_path, work())


def test_a_range_of_an_empty_file_is_empty(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b")
            assert await b.read(a.put(b""), 0, None) == b""
    run(loop_kind, tmp_path, work())


def test_a_range_read_while_the_whole_is_under_way_outlives_its_end(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(20 * CHUNK)
            uri = fill(net, data)
            net.bucket.gate.clear()
            whole = asyncio.create_task(b.load(uri))
            reads = [asyncio.create_task(b.read(uri, index * CHUNK + 5, (index + 3) * CHUNK)) for index in range(17)]
            await asyncio.sleep(0.01)
            net.bucket.gate.set()
            assert await whole == data
            for index, read in enumerate(reads):
                assert await read == data[index * CHUNK + 5:(index + 3) * CHUNK]
            assert len(net.bucket.gets) == 21
    run(loop_kind, tmp_path, work())


def test_a_range_read_that_is_still_going_on_when_the_whole_is_stored_moves_nothing_twice(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kachery_fast.node.transfers._READ_SPAN_BYTES", CHUNK)

    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data)
            length, spans = await b.transfers.read(uri, b.link, 0, None)
            pieces = [await anext(spans)]
            assert await b.load(uri) == data
            await until(lambda: b.transfers.active(uri.sha1) is None)
            pieces += [span async for span in spans]
            assert (length, b"".join(pieces)) == (SIZE, data)
            assert b.traffic.downloaded_objects == 10
    run(loop_kind, tmp_path, work())


def test_several_who_wait_share_one_transfer(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data)
            net.bucket.gate.clear()
            waits = [asyncio.create_task(b.load(uri)) for _ in range(5)]
            await asyncio.sleep(0.01)
            waits[0].cancel()
            await asyncio.sleep(0.01)
            net.bucket.gate.set()
            assert [await wait for wait in waits[1:]] == [data] * 4
            assert len(net.bucket.gets) == 11
    run(loop_kind, tmp_path, work())


class _ClosingBehind(list[str]):
    """The names of what was got from a bucket, whose gate is closed behind the third."""

    def __init__(self, bucket: MemoryBucket) -> None:
        super().__init__()
        self._bucket = bucket

    def append(self, name: str) -> None:
        super().append(name)
        if len(self) == 3:
            self._bucket.gate.clear()


STAGES = ["at once", "locating", "receiving", "asking", "verifying", "adopting"]


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_withdrawn_wish_leaves_nothing_behind_at_any_stage(
        loop_kind: str, tmp_path: Path, bucket: type[MemoryBucket], stage: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def slowly(name: str) -> None:
        original = getattr(Destination, name)

        def slow(*arguments: Any) -> Any:
            reached.append(name)
            return original(*arguments)

        monkeypatch.setattr(Destination, name, slow)

    slowly("verify_next")
    slowly("adopt")

    async def work() -> None:
        async with network(tmp_path, bucket()) as net:
            b = await net.peer("b")
            await net.peer("silent", provide_requests_max=1)
            data = data_of(SIZE)
            uri = fill(net, data, skip=(9,) if stage == "asking" else ())
            before = other_tasks()
            if stage in ("locating", "receiving"):
                net.bucket.gate.clear()
            load = asyncio.create_task(b.load(uri))
            await asyncio.sleep(0)
            if stage == "receiving":
                await until(lambda: b.transfers.active(uri.sha1) is not None)
                await asyncio.sleep(0.01)
                net.bucket.gets = _ClosingBehind(net.bucket)
                net.bucket.gate.set()
                await until(lambda: b.transfers.active(uri.sha1).received > 0)  # type: ignore[union-attr]
                await asyncio.sleep(0.02)
            elif stage == "asking":
                await until(lambda: "asking" in (getattr(b.transfers.active(uri.sha1), "waiting", "")))
            elif stage == "verifying":
                await until(lambda: "verify_next" in reached)
            elif stage == "adopting":
                await until(lambda: "adopt" in reached)
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            await until(lambda: b.transfers.active(uri.sha1) is None)
            assert [task for task in other_tasks() if task not in before] == []
            if stage == "locating":  # not a byte had come
                assert b.traces(uri) == []
            net.bucket.gate.set()
            fill(net, data)
            assert await b.load(uri) == data
    run(loop_kind, tmp_path, work())


def test_a_node_that_stops_tells_those_who_wait(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data)
            net.bucket.gate.clear()
            load, read = asyncio.create_task(b.load(uri)), asyncio.create_task(b.read(uri, 0, 5))
            await until(lambda: b.transfers.active(uri.sha1) is not None)
            await b.transfers.close()
            assert b.transfers.active(uri.sha1) is None
            await fails(Cancelled, load)
            await fails(Cancelled, read)
            await fails(Cancelled, b.load(uri))
    run(loop_kind, tmp_path, work())


def test_a_wish_that_comes_while_its_transfer_is_broken_off_is_fulfilled(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data)
            net.bucket.gate.clear()
            for yields in range(12):
                first = asyncio.create_task(b.load(uri))
                await until(lambda: b.transfers.active(uri.sha1) is not None)
                first.cancel()
                for _ in range(yields):
                    await asyncio.sleep(0)
                second = asyncio.create_task(b.read(uri, 0, 9))
                await asyncio.sleep(0.005)
                net.bucket.gate.set()
                assert await second == data[:9]
                net.bucket.gate.clear()
                active = b.transfers.active(uri.sha1)
                assert active is not None
                await active.close()
    run(loop_kind, tmp_path, work())


def test_a_damaged_manifest_in_the_bucket_is_reported_and_comes_from_a_node(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b")
            data = data_of(SIZE)
            uri = a.put(data)
            fill(net, data)
            net.bucket.corrupt(net.object(uri.manifest_sha1 or ""), 30)
            assert await b.load(uri) == data
            assert net.hub.reports == [(uri.manifest_sha1, "")]
    run(loop_kind, tmp_path, work())


def test_a_manifest_of_absurd_length_is_a_damaged_one(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b")
            data = data_of(SIZE)
            uri = a.put(data)
            fill(net, data)
            net.bucket.objects[net.object(uri.manifest_sha1 or "")] = bytes(80 << 20)
            assert await b.load(uri) == data
            assert net.hub.reports == [(uri.manifest_sha1, "")]
    run(loop_kind, tmp_path, work())


def test_a_damaged_manifest_in_the_local_store_is_no_obstacle(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            data = data_of(SIZE)
            uri = fill(net, data)
            manifest = net.bucket.objects[net.object(uri.manifest_sha1 or "")]
            path = b.store.find(b.store.put_bytes(manifest).sha1).path
            path.chmod(0o644)
            path.write_bytes(manifest[:-9] + b"damaged}}")
            assert await b.load(uri) == data
            assert net.hub.reports == []
    run(loop_kind, tmp_path, work())


def test_a_manifest_of_another_file_is_called_that(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            uri = fill(net, data_of(SIZE))
            other = fill(net, data_of(SIZE, 2))
            error = await fails(CorruptFile, b.load(FileUri(uri.sha1, "", other.manifest_sha1)))
            assert "another file's manifest" in error.message
            assert b.parts() == []
    run(loop_kind, tmp_path, work())


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_false_manifest_on_offer_gives_way_to_a_true_one(
        loop_kind: str, tmp_path: Path, bucket: type[MemoryBucket], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is cut anew while all chunks of the false cut are here, and a range of it is waited for."""
    discarded = []
    original = Destination.remove

    def remove(self: Destination) -> None:
        discarded.append(1)
        original(self)

    monkeypatch.setattr(Destination, "remove", remove)

    async def work() -> None:
        async with network(tmp_path, bucket()) as net:
            data = data_of(SIZE)
            sha1 = sha1_of(data)
            pieces = [data_of(CHUNK, 100 + index) for index in range(30)]
            false = make_manifest(30 * CHUNK, sha1, [sha1_of(piece) for piece in pieces], CHUNK)
            for blob in (*pieces, false.encode()):
                net.bucket.objects[net.object(sha1_of(blob))] = blob
            for name in ("liar", "accomplice"):  # the cut that most offer is tried first
                liar = await net.peer(name)
                liar.store.put_bytes(false.encode())
                monkeypatch.setattr(liar.providing, "_find",
                                    lambda query, *_: LookedUp(query, false.size, false, false.name))
            honest, b = await net.peer("honest", chunk_size_bytes=2 * CHUNK), await net.peer("b")
            b.tools = b.tools._replace(limits=replace(b.tools.limits, offer_gather_seconds=0.3))
            b.transfers = Transfers(b.tools, b.settings)
            honest.put(data)
            assert await b.load(FileUri(sha1, "", None)) == data
            assert len(discarded) == 1
    run(loop_kind, tmp_path, work())


def test_a_disk_that_fills_up_in_the_middle_is_said_to_be_full(loop_kind: str, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = Destination.open_chunk

    def open_chunk(self: Destination, index: int) -> Any:
        opened.append(index)
        if len(opened) > 4:
            with self._translated():
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, index)

    monkeypatch.setattr(Destination, "open_chunk", open_chunk)

    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            uri = fill(net, data_of(SIZE))
            waits = [asyncio.create_task(b.load(uri)) for _ in range(3)]
            for wait in waits:
                await fails(DiskFull, wait)
            await until(lambda: b.transfers.active(uri.sha1) is None)
    run(loop_kind, tmp_path, work())


def test_a_download_that_finds_no_room_leaves_nothing_not_even_its_marker(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(directory: Path, size_bytes: int) -> None:
        raise DiskFull(what=f"{size_bytes} bytes", path=str(directory), free=0, needed=size_bytes)

    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            uri = fill(net, data_of(SIZE))
            with monkeypatch.context() as patched:
                patched.setattr(destination_module, "check_room", no_room)
                await fails(DiskFull, b.load(uri))
            await until(lambda: b.transfers.active(uri.sha1) is None)
            assert b.traces(uri) == []
            b.store.put_bytes(net.bucket.objects[net.object(uri.manifest_sha1 or "")])
            net.bucket.gate.clear()
            load = asyncio.create_task(b.load(uri))
            await until(lambda: b.traces(uri))  # it begins, and is withdrawn before any byte came
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            await until(lambda: b.transfers.active(uri.sha1) is None)
            assert b.traces(uri) == []
            net.bucket.gate.set()
    run(loop_kind, tmp_path, work())


@pytest.mark.parametrize("name", ["adopt", "verify_next", "has_sound_chunk", "open_chunk", "recover"])
def test_a_fault_of_the_program_is_an_error_and_no_hang(loop_kind: str, tmp_path: Path, name: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any, **_named: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Destination, name, broken)

    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            uri = fill(net, data_of(SIZE))
            error = await fails(NodeError, asyncio.wait_for(b.load(uri), 10))
            assert "a bug" in error.message
            await until(lambda: b.transfers.active(uri.sha1) is None)
    run(loop_kind, tmp_path, work())


def test_closing_an_ended_transfer_waits_for_its_end(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            uri = fill(net, data_of(SIZE))
            ends: list[int] = []
            transfer = Transfer(uri, b.link, b.tools, "ab" * 16, lambda: ends.append(1))
            want = asyncio.create_task(transfer.want(None, None))
            await asyncio.sleep(0)
            transfer.break_off()
            await asyncio.gather(transfer.close(), transfer.close())
            assert ends == [1]
            await fails(Cancelled, want)
            await fails(Cancelled, transfer.want(0, 1))
    run(loop_kind, tmp_path, work())


def test_errors_carry_the_account_of_what_was_tried(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            await net.peer("c")
            error = await fails(KacheryError, b.load(FileUri("ab" * 20, "", None)))
            assert isinstance(error, NotAvailable)
            assert "does not have it" in error.message
            assert "c (" in error.message
            assert not isinstance(error, ObjectMissing)
    run(loop_kind, tmp_path, work())


def test_the_stored_manifest_names_the_chunks_that_came(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b", chunk_size_bytes=4 * CHUNK)
            data = data_of(SIZE)
            uri = fill(net, data)
            await b.load(uri)
            manifest_sha1, manifest = FileStore(b.settings.storage_dir).manifest_for(uri.sha1)
            assert manifest_sha1 == uri.manifest_sha1
            assert manifest == parse_manifest(net.bucket.objects[net.object(uri.manifest_sha1 or "")],
                                              name=uri.manifest_sha1 or "")
    run(loop_kind, tmp_path, work())


def test_work_that_is_cancelled_before_its_first_step_leaves_no_coroutine_behind(loop_kind: str) -> None:
    async def work() -> None:
        transfer = Transfer.__new__(Transfer)
        transfer._tasks = set()

        async def never() -> None:
            raise AssertionError("it was cancelled before")

        transfer._spawn(never())  # a warning, and so a failure, if the coroutine were dropped unawaited
        (task,) = transfer._tasks
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_on(loop_kind, work())
