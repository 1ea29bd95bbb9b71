"""Reassembly: in any order, resumed, damaged, unaligned, from several threads, on a full disk."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import itertools
import os
import random
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast._chunker import ChunkMemory, Reassembly, chunk_ranges
from tests.native.disks import mounted

MIB = 1 << 20
DATA = np.random.Generator(np.random.SFC64(7)).bytes(9 * MIB + 12345)
MODES = ["map", "pwrite", "auto"]
# 1 MiB chunks begin on pages; 1,000,000-byte ones on block but not page borders; 999,999-byte ones nowhere.
CHUNK_SIZES = [MIB, 1_000_000, 999_999]


class Plan:
    """The chunks of some bytes, to be put together at a path."""

    def __init__(self, path: Path, data: bytes = DATA, chunk_size_bytes: int = MIB) -> None:
        self.path, self.data = path, data
        self.ranges = chunk_ranges(len(data), chunk_size_bytes)
        self.sha1s = [hashlib.sha1(data[start:end]).hexdigest() for start, end in self.ranges]

    def open(self, *, reserve: bool = True, mode: str = "auto") -> Reassembly:
        if sys.platform != "linux" and mode == "map":
            reserve = True  # elsewhere a hole in a file cannot be allocated, nor hence mapped
        return Reassembly(str(self.path), len(self.data), self.ranges, self.sha1s, reserve=reserve, mode=mode)

    def fill(self, reassembly: Reassembly, index: int, *, damage: bool = False) -> None:
        start, end = self.ranges[index]
        with reassembly.open_chunk(index) as memory:
            memory.view[:] = self.data[start:end]
            if damage:
                memory.view[(end - start) // 2] ^= 1


def mapped_kib(path: Path) -> int:
    """How much of the file this process has mapped; only Linux tells, elsewhere it is taken for nothing."""
    total = 0
    if sys.platform != "linux":
        return total
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            low, high = line.split()[0].split("-")
            total += (int(high, 16) - int(low, 16)) // 1024
    return total


@given(size_bytes=st.integers(0, 10**7), chunk_size_bytes=st.integers(1000, 10**7))
def test_chunks_follow_each_other_from_the_first_byte_to_the_last(size_bytes: int, chunk_size_bytes: int) -> None:
    ranges = chunk_ranges(size_bytes, chunk_size_bytes)
    assert [0, *(end for _, end in ranges)] == [*(start for start, _ in ranges), size_bytes]
    assert all(end - start == chunk_size_bytes for start, end in ranges[:-1])
    assert all(0 < end - start <= chunk_size_bytes for start, end in ranges[-1:])


@pytest.mark.parametrize(("size_bytes", "chunk_size_bytes"), [(-1, 64), (10, 0), (10, -5)])
def test_a_split_that_makes_no_sense_is_refused(size_bytes: int, chunk_size_bytes: int) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        chunk_ranges(size_bytes, chunk_size_bytes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("chunk_size_bytes", CHUNK_SIZES)
def test_chunks_in_any_order_become_the_file(tmp_path: Path, mode: str, reserve: bool, chunk_size_bytes: int) -> None:
    plan = Plan(tmp_path / "file", chunk_size_bytes=chunk_size_bytes)
    with plan.open(reserve=reserve, mode=mode) as reassembly:
        assert (reassembly.size_bytes, reassembly.chunk_count) == (len(DATA), len(plan.ranges))
        order = list(range(reassembly.chunk_count))
        random.Random(3).shuffle(order)
        for index in order:
            plan.fill(reassembly, index)
            assert reassembly.has_data(index)
            assert reassembly.verify_chunk(index)
        while reassembly.next_index < reassembly.chunk_count:
            assert reassembly.verify_next()
        assert reassembly.whole_sha1() == hashlib.sha1(DATA).hexdigest()
        assert reassembly.read(12345, 5_000_001) == DATA[12345:5_000_001]
        reassembly.sync()
    assert plan.path.read_bytes() == DATA
    assert mapped_kib(plan.path) == 0


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 300_000), min_size=1, max_size=12), seed=st.integers(0, 1000))
@pytest.mark.parametrize("mode", ["map", "pwrite"])
def test_chunks_of_any_lengths_are_verified_in_order(
    tmp_path_factory: pytest.TempPathFactory, mode: str, sizes: list[int], seed: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "file"
    plan = Plan(path, DATA[: sum(sizes)], 1 << 40)
    borders = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    plan.ranges = list(itertools.pairwise(borders))
    plan.sha1s = [hashlib.sha1(plan.data[start:end]).hexdigest() for start, end in plan.ranges]
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    with plan.open(mode=mode) as reassembly:
        for index in order:
            plan.fill(reassembly, index)
        while reassembly.next_index < reassembly.chunk_count:
            assert reassembly.verify_next()
        assert reassembly.whole_sha1() == hashlib.sha1(plan.data).hexdigest()
    assert path.read_bytes() == plan.data


@pytest.mark.parametrize("mode", MODES)
def test_a_damaged_chunk_stops_the_pass_and_alone_is_done_again(tmp_path: Path, mode: str) -> None:
    plan = Plan(tmp_path / "file", chunk_size_bytes=1_000_000)
    with plan.open(mode=mode) as reassembly:
        for index in range(reassembly.chunk_count):
            plan.fill(reassembly, index, damage=index == 4)
        assert [reassembly.verify_chunk(index) for index in range(3, 6)] == [True, False, True]
        for _ in range(4):
            assert reassembly.verify_next()
        for _ in range(2):
            assert not reassembly.verify_next()
            assert reassembly.next_index == 4
        with pytest.raises(ValueError, match="4 of 10 chunks are verified"):
            reassembly.whole_sha1()
        plan.fill(reassembly, 4)
        while reassembly.next_index < reassembly.chunk_count:
            assert reassembly.verify_next()
        assert reassembly.whole_sha1() == hashlib.sha1(DATA).hexdigest()
        with pytest.raises(IndexError):
            reassembly.verify_next()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reserve", [True, False])
def test_a_resume_finds_what_was_written_and_what_was_not(tmp_path: Path, mode: str, reserve: bool) -> None:
    plan = Plan(tmp_path / "file")
    with plan.open(reserve=reserve, mode=mode) as reassembly:
        if sys.platform == "linux":
            assert not any(reassembly.has_data(index) for index in range(reassembly.chunk_count))
        for index in (0, 3, 9):
            plan.fill(reassembly, index, damage=index == 3)
        reassembly.sync()
    # Reading ahead puts zeros of reserved space into the page cache, which then count as data until it is
    # emptied, as by a restart of the machine: a needless look at a chunk, never a missed one.
    if sys.platform == "linux":
        with plan.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with plan.open(reserve=reserve, mode=mode) as reassembly:
        found = [index for index in range(reassembly.chunk_count) if reassembly.has_data(index)]
        assert found == [0, 3, 9] or sys.platform != "linux"
        assert {0, 3, 9} <= set(found)
        assert [index for index in found if reassembly.verify_chunk(index)] == [0, 9]
        for index in set(range(reassembly.chunk_count)) - {0, 9}:
            plan.fill(reassembly, index)
        while reassembly.next_index < reassembly.chunk_count:
            assert reassembly.verify_next()
        assert reassembly.whole_sha1() == hashlib.sha1(DATA).hexdigest()


def test_what_is_longer_than_the_file_is_cut(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "file")
    plan.path.write_bytes(DATA + b"more")
    with plan.open() as reassembly:
        while reassembly.next_index < reassembly.chunk_count:
            assert reassembly.verify_next()
    assert plan.path.read_bytes() == DATA


def test_an_empty_file_has_no_chunks(tmp_path: Path) -> None:
    for mode in MODES:
        with Plan(tmp_path / mode, b"").open(mode=mode) as reassembly:
            assert reassembly.chunk_count == 0
            assert reassembly.whole_sha1() == hashlib.sha1().hexdigest()
            with pytest.raises(IndexError):
                reassembly.open_chunk(0)
        assert (tmp_path / mode).read_bytes() == b""


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Plan(tmp_path / "file").open().close()
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("mode", ["map", "pwrite"])
def test_a_socket_receives_straight_into_the_chunk(tmp_path: Path, mode: str) -> None:
    plan = Plan(tmp_path / "file", chunk_size_bytes=999_999)
    sender, receiver = socket.socketpair()
    start, end = plan.ranges[2]
    thread = threading.Thread(target=sender.sendall, args=(DATA[start:end],))
    thread.start()
    with plan.open(mode=mode) as reassembly, sender, receiver:
        with reassembly.open_chunk(2) as memory:
            view = memory.view
            assert (len(view), view.format, view.readonly) == (999_999, "B", False)
            done = 0
            while done < len(view):
                done += receiver.recv_into(view[done:])
        thread.join()
        assert reassembly.verify_chunk(2)


@pytest.mark.parametrize("mode", ["map", "pwrite"])
def test_views_outlive_their_chunk_and_their_file(tmp_path: Path, mode: str) -> None:
    plan = Plan(tmp_path / "file")
    reassembly = plan.open(mode=mode)
    memory = reassembly.open_chunk(1)
    view = memory.view
    array = np.frombuffer(view[100:], dtype=np.uint8)
    view[:] = DATA[MIB : 2 * MIB]
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        _ = memory.view
    assert reassembly.verify_chunk(1)
    reassembly.close()
    view[0] = 7  # the memory is still there
    del memory, reassembly
    gc.collect()
    assert bytes(array) == DATA[MIB + 100 : 2 * MIB]
    assert mapped_kib(plan.path) == (MIB // 1024 if mode == "map" and sys.platform == "linux" else 0)
    del array, view
    assert mapped_kib(plan.path) == 0


@pytest.mark.parametrize("mode", ["map", "pwrite"])
def test_open_chunks_stay_usable_when_the_file_is_closed(tmp_path: Path, mode: str) -> None:
    plan = Plan(tmp_path / "file")
    descriptors = psutil.Process().num_fds()
    reassembly = plan.open(mode=mode)
    memory = reassembly.open_chunk(0)
    reassembly.close()
    reassembly.close()
    for use in (
        lambda: reassembly.open_chunk(1),
        lambda: reassembly.verify_chunk(0),
        lambda: reassembly.has_data(0),
        reassembly.verify_next,
        reassembly.sync,
        lambda: reassembly.read(0, 1),
    ):
        with pytest.raises(ValueError, match="closed"):
            use()
    memory.view[:] = DATA[:MIB]
    memory.close()
    assert plan.path.read_bytes()[:MIB] == DATA[:MIB]
    assert psutil.Process().num_fds() == descriptors


def test_forgotten_chunks_and_files_give_everything_back(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "file")
    descriptors = psutil.Process().num_fds()
    for mode in ("map", "pwrite"):
        reassembly = plan.open(mode=mode)
        memory = reassembly.open_chunk(0)
        del reassembly
        del memory
    gc.collect()
    assert psutil.Process().num_fds() == descriptors
    assert mapped_kib(plan.path) == 0


@pytest.mark.parametrize("mode", ["map", "pwrite"])
def test_threads_fill_while_another_verifies(tmp_path: Path, mode: str) -> None:
    plan = Plan(tmp_path / "file", chunk_size_bytes=128 << 10)
    left = list(range(len(plan.ranges)))
    filled = [threading.Event() for _ in plan.ranges]
    with plan.open(mode=mode) as reassembly:

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    index = left.pop(0)
                    plan.fill(reassembly, index, damage=index % 5 == 0)
                    assert reassembly.verify_chunk(index) == (index % 5 != 0)
                    plan.fill(reassembly, index)
                    filled[index].set()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for event in filled:
            assert event.wait(60)
            assert reassembly.verify_next()
        for thread in threads:
            thread.join()
        assert reassembly.whole_sha1() == hashlib.sha1(DATA).hexdigest()


def test_two_passes_at_once_are_refused(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "file", DATA * 8, 70 * MIB)
    plan.path.write_bytes(plan.data)
    outcomes: list[object] = []
    barrier = threading.Barrier(2)
    with plan.open() as reassembly:

        def verify() -> None:
            barrier.wait()
            try:
                outcomes.append(reassembly.verify_next())
            except RuntimeError:
                outcomes.append("refused")

        threads = [threading.Thread(target=verify) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # On a busy machine the second may come only when the first is done.
        assert sorted(map(str, outcomes)) in (["True", "refused"], ["True", "True"])
        assert reassembly.next_index == outcomes.count(True)


def refused(plan: Plan, **changes: object) -> str:
    arguments: dict[str, object] = {
        "path": str(plan.path),
        "size_bytes": len(plan.data),
        "ranges": plan.ranges,
        "chunk_sha1s": plan.sha1s,
        "reserve": True,
        **changes,
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Reassembly(**arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_chunks_that_do_not_make_up_the_file_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "file")
    assert "digests" in refused(plan, chunk_sha1s=plan.sha1s[1:])
    assert "the file at" in refused(plan, size_bytes=len(DATA) + 1)
    assert "must begin at" in refused(plan, ranges=[plan.ranges[1], plan.ranges[0], *plan.ranges[2:]])
    assert "must begin at" in refused(plan, ranges=[(0, 0), *plan.ranges[1:]])
    assert "must begin at" in refused(plan, ranges=[(0, -5), *plan.ranges[1:]])
    assert "40 hexadecimal" in refused(plan, chunk_sha1s=["00" * 19, *plan.sha1s[1:]])
    refused(plan, chunk_sha1s=["zz" * 20, *plan.sha1s[1:]])
    assert "mode" in refused(plan, mode="telepathy")
    assert not plan.path.exists()


def test_what_lies_outside_is_refused(tmp_path: Path) -> None:
    with Plan(tmp_path / "file").open() as reassembly:
        for index in (-1, reassembly.chunk_count):
            for use in (reassembly.open_chunk, reassembly.verify_chunk, reassembly.has_data):
                with pytest.raises(IndexError, match="there is no chunk"):
                    use(index)
        for start, end in ((-1, 5), (5, 4), (0, len(DATA) + 1)):
            with pytest.raises(ValueError, match="not inside"):
                reassembly.read(start, end)
    with pytest.raises(TypeError):
        ChunkMemory()


def test_a_place_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan(tmp_path / "absent" / "file").open()
    with pytest.raises(IsADirectoryError):
        Plan(tmp_path).open()


def test_a_file_that_was_cut_behind_our_back_is_an_error_in_pwrite_mode(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "file")
    with plan.open(mode="pwrite") as reassembly:
        plan.fill(reassembly, 5)
        os.truncate(plan.path, 3 * MIB)
        with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
            reassembly.verify_chunk(5)
        with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
            reassembly.read(0, 4 * MIB)


def fill_until_refused(plan: Plan, mode: str) -> int:
    """Fill chunks until the disk is full; how many went in. The file takes no space before."""
    with plan.open(mode=mode, reserve=False) as reassembly:
        for index in range(reassembly.chunk_count):
            try:
                plan.fill(reassembly, index)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                assert all(reassembly.verify_chunk(before) for before in range(index))
                return index
    raise AssertionError("the disk took everything")


@pytest.mark.parametrize("mode", ["map", "auto"])
def test_a_full_disk_is_an_error_up_front(tmp_path: Path, mode: str) -> None:
    with (
        mounted(tmp_path / "disk", "tmpfs", 4 * MIB) as disk,
        pytest.raises(OSError, match=rf"\[Errno {errno.ENOSPC}\]"),
    ):
        Plan(disk / "file").open(mode=mode)


@pytest.mark.parametrize("mode", ["map", "pwrite"])
def test_a_disk_that_fills_up_is_an_error_of_the_chunk_and_what_is_there_stays(tmp_path: Path, mode: str) -> None:
    with mounted(tmp_path / "disk", "tmpfs", 4 * MIB) as disk:
        assert fill_until_refused(Plan(disk / "file"), mode) == 4


@pytest.mark.parametrize("kind", ["ramfs", "ext2"])
def test_where_space_cannot_be_allocated_chunks_are_written_not_mapped(tmp_path: Path, kind: str) -> None:
    with mounted(tmp_path / "disk", kind, 32 * MIB) as disk:
        for reserve in (True, False):
            plan = Plan(disk / f"file-{reserve}")
            with plan.open(reserve=reserve) as reassembly:
                assert reassembly.mode == "pwrite"
                for index in range(reassembly.chunk_count):
                    plan.fill(reassembly, index)
                    assert reassembly.verify_next()
                assert reassembly.whole_sha1() == hashlib.sha1(DATA).hexdigest()
            with pytest.raises(OSError, match=rf"\[Errno {errno.EOPNOTSUPP}\]"):
                plan.open(mode="map", reserve=reserve)


def test_a_full_disk_is_an_error_up_front_where_space_cannot_be_allocated_too(tmp_path: Path) -> None:
    enospc = rf"\[Errno {errno.ENOSPC}\]"
    with mounted(tmp_path / "disk", "ext2", 8 * MIB) as disk, pytest.raises(OSError, match=enospc):
        Plan(disk / "file").open()


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_chunks_become_the_file_on_other_file_systems(tmp_path: Path, kind: str) -> None:
    with mounted(tmp_path / "disk", kind, 400 * MIB) as disk:
        plan = Plan(disk / "file", chunk_size_bytes=1_000_000)
        with plan.open() as reassembly:
            assert reassembly.mode == {"btrfs": "pwrite", "xfs": "map"}[kind]
            for index in reversed(range(reassembly.chunk_count)):
                plan.fill(reassembly, index)
            while reassembly.next_index < reassembly.chunk_count:
                assert reassembly.verify_next()
        assert plan.path.read_bytes() == DATA


def test_a_limit_on_the_length_of_files_is_an_error_up_front(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        for mode in MODES:
            with pytest.raises(OSError, match=rf"\[Errno {errno.EFBIG}\]"):
                Plan(tmp_path / mode).open(mode=mode)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of one program")
def test_memory_is_that_of_the_open_windows(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from kachery_fast._chunker import Reassembly, chunk_ranges\n"
        "def peak_kib():\n"
        "    return int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])\n"
        "ranges = chunk_ranges(400 << 20, 20 << 20)\n"
        "before = peak_kib()\n"
        "with Reassembly(sys.argv[1], 400 << 20, ranges, ['0' * 40] * 20, reserve=True, mode=sys.argv[2]) as r:\n"
        "    for index in range(20):\n"
        "        with r.open_chunk(index) as memory:\n"
        "            memory.view[:] = bytes(20 << 20)\n"
        "        r.verify_chunk(index)\n"
        "print(peak_kib() - before)\n"
    )
    for mode in ("map", "pwrite"):
        path = tmp_path / mode
        output = subprocess.run(
            [sys.executable, "-c", code, str(path), mode], check=True, capture_output=True, text=True
        )
        path.unlink()
        assert int(output.stdout) < 50 * 1024  # a chunk of 20 MiB, its source of 20 MiB, a window of 4
