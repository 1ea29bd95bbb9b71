"""A bucket that is a shared folder: whole objects, created once, by several nodes, users and machines at a time."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import pytest

from kachery_fast.embedded.bucket_mark import is_marked, mark
from kachery_fast.errors import (
    BucketUnreachable,
    DiskError,
    DiskFull,
    FileChanged,
    InvalidName,
    ObjectMissing,
    Stalled,
    TooLarge,
    UrlExpired,
    WrongSize,
)
from kachery_fast.net.bucket import FileSpan, SignedUpload
from kachery_fast.node import directory_bucket
from kachery_fast.node.directory_bucket import DirectoryBucket
from kachery_fast.protocol.names import object_name, subfeed_object_name
from tests.native.disks import MIB, mounted
from tests.network import LOOPS, run_on

T = TypeVar("T")
MARK = "0123456789abcdef"
NAME = object_name("lab", "ab" * 20)
OTHER = object_name("lab", "cd" * 20)
INDEX = subfeed_object_name("lab", "ef" * 32, "ab" * 20)
both_loops = pytest.mark.parametrize("loop_kind", LOOPS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "a folder #1"
    made.mkdir()
    mark(made, MARK)
    return made


def bucket_at(folder: Path, number: str = MARK, stall_seconds: float = 30.0) -> DirectoryBucket:
    return DirectoryBucket(f"file://{quote(str(folder))}#{number}", stall_seconds)


def do(folder: Path, what: Callable[[DirectoryBucket], Awaitable[T]], loop_kind: str = "uvloop") -> T:
    async def run() -> T:
        return await what(bucket_at(folder))

    return run_on(loop_kind, run())


def leave(name: str, *, replace: bool = False) -> SignedUpload:
    return SignedUpload(name, f"file:///{name}", {"replace": "1"} if replace else {})


@both_loops
def test_what_is_put_is_there_whole_and_is_read_into_memory_or_a_file(
    folder: Path, tmp_path: Path, loop_kind: str
) -> None:
    data = os.urandom(9 * MIB + 7)
    (tmp_path / "source").write_bytes(b"head" + data + b"tail")

    async def run(bucket: DirectoryBucket) -> None:
        moved: list[int] = []
        with (tmp_path / "source").open("rb") as source:
            assert await bucket.put_from(leave(NAME), source.fileno(), 4, len(data), progress=moved.append)
            assert sum(moved) == len(data)
            assert not await bucket.put_from(leave(NAME), source.fileno(), 0, 4)
        assert await bucket.size(NAME) == len(data)
        memory = bytearray(len(data))
        await bucket.get_into(NAME, memoryview(memory), progress=moved.append)
        assert (bytes(memory) == data, sum(moved)) == (True, 2 * len(data))
        with (tmp_path / "target").open("w+b") as target:
            await bucket.get_into(NAME, FileSpan(target.fileno(), 3, len(data)))
            assert target.read() == bytes(3) + data

    do(folder, run, loop_kind)
    assert list((folder / ".incoming").iterdir()) == []


@both_loops
def test_small_objects_and_what_may_be_replaced(folder: Path, loop_kind: str) -> None:
    async def run(bucket: DirectoryBucket) -> None:
        assert await bucket.put_bytes(leave(INDEX), b"first")
        assert not await bucket.put_bytes(leave(INDEX), b"second")
        assert await bucket.put_bytes(leave(INDEX, replace=True), b"the third")
        assert await bucket.get_small(INDEX, 9, fresh=True) == b"the third"
        with pytest.raises(TooLarge):
            await bucket.get_small(INDEX, 8)
        assert await bucket.put_bytes(leave(OTHER), b"")
        assert (await bucket.size(OTHER), await bucket.get_small(OTHER, 10)) == (0, b"")

    do(folder, run, loop_kind)


def test_leave_for_a_bucket_of_another_kind_is_asked_for_anew(folder: Path, tmp_path: Path) -> None:
    async def run(bucket: DirectoryBucket) -> None:
        await bucket.put_bytes(leave(NAME), b"first")
        of_s3 = SignedUpload(NAME, f"https://s3.example.org/bucket/{NAME}?X-Amz-Signature=1", {"if-none-match": "*"})
        with pytest.raises(UrlExpired, match="another bucket"):
            await bucket.put_bytes(of_s3, b"second")
        (tmp_path / "source").write_bytes(b"second")
        with (tmp_path / "source").open("rb") as source, pytest.raises(UrlExpired, match="another bucket"):
            await bucket.put_from(of_s3, source.fileno(), 0, 6)
        assert not await bucket.put_bytes(SignedUpload(NAME, "file:", {"replace": "0"}), b"second")
        assert await bucket.get_small(NAME, 10) == b"first"

    do(folder, run)


def test_what_is_missing_or_of_another_size(folder: Path) -> None:
    async def run(bucket: DirectoryBucket) -> None:
        for ask in (bucket.size(NAME), bucket.get_small(NAME, 10), bucket.get_into(NAME, memoryview(bytearray(3)))):
            with pytest.raises(ObjectMissing):
                await ask
        await bucket.put_bytes(leave(NAME), b"four")
        with pytest.raises(WrongSize, match="has 4 bytes, expected 3"):
            await bucket.get_into(NAME, memoryview(bytearray(3)))

    do(folder, run)


def test_a_source_that_ends_early_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"short")

    async def run(bucket: DirectoryBucket) -> None:
        with (tmp_path / "source").open("rb") as source, pytest.raises(FileChanged, match="ends at byte 5"):
            await bucket.put_from(leave(NAME), source.fileno(), 1, 10)
        with pytest.raises(ObjectMissing):
            await bucket.size(NAME)

    do(folder, run)
    assert list((folder / ".incoming").iterdir()) == []


def test_a_file_that_goes_while_it_is_read_may_be_asked_for_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    async def run(bucket: DirectoryBucket) -> None:
        assert await bucket.put_bytes(leave(NAME), b"x" * 10)
        with (tmp_path / "target").open("w+b") as target, monkeypatch.context() as patched:
            for call in ("copy_file_range", "pread", "preadv"):  # as NFS answers
                patched.setattr(os, call, stale)
            for into in (memoryview(bytearray(10)), FileSpan(target.fileno(), 0, 10)):
                with pytest.raises(BucketUnreachable, match="Stale file handle"):
                    await bucket.get_into(NAME, into)
            with pytest.raises(BucketUnreachable, match="Stale file handle"):
                await bucket.get_small(NAME, 10)
            with pytest.raises(DiskError, match="the file being sent"):
                await bucket.put_from(leave(OTHER), target.fileno(), 0, 10)
        assert await bucket.get_small(NAME, 10) == b"x" * 10
        with pytest.raises(ObjectMissing):
            await bucket.size(OTHER)

    do(folder, run)


def test_a_folder_whose_disk_fails_is_out_of_reach_and_no_failure_of_this_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def stale(path: str | Path, *arguments: int, **named: int) -> int:
        if str(path).endswith(NAME):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real_open(path, *arguments, **named)

    async def run(bucket: DirectoryBucket) -> None:
        assert await bucket.put_bytes(leave(NAME), b"x" * 10)
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", stale)
            for ask in (bucket.size(NAME), bucket.get_small(NAME, 10),
                        bucket.get_into(NAME, memoryview(bytearray(10)))):
                with pytest.raises(BucketUnreachable, match="Stale file handle"):
                    await ask
        (tmp_path / "target").touch()
        with (tmp_path / "target").open("rb") as unwritable, pytest.raises(DiskError):
            await bucket.get_into(NAME, FileSpan(unwritable.fileno(), 0, 10))

    do(folder, run)


def test_a_folder_that_cannot_be_used_is_out_of_reach(folder: Path) -> None:
    (folder / ".incoming").touch()

    async def run(bucket: DirectoryBucket) -> None:
        for ask in (bucket.size(NAME), bucket.put_bytes(leave(NAME), b"x")):
            with pytest.raises(BucketUnreachable, match="Not a directory"):
                await ask

    do(folder, run)


@pytest.mark.parametrize("name", ["lab/sha1/../../../etc/passwd", "/etc/passwd", "lab/x", ".kachery-bucket-" + MARK])
def test_no_other_file_is_reached(folder: Path, name: str) -> None:
    async def run(bucket: DirectoryBucket) -> None:
        for ask in (bucket.get_small(name, 100), bucket.size(name), bucket.put_bytes(leave(name), b"x")):
            with pytest.raises(InvalidName):
                await ask

    do(folder, run)


def test_no_link_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "lab").symlink_to(tmp_path / "elsewhere")

    async def run(bucket: DirectoryBucket) -> None:
        with pytest.raises(ObjectMissing):
            await bucket.put_bytes(leave(NAME), b"x")

    do(folder, run)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("number", ["f" * 16, "", "../x", "0" * 15])
def test_a_folder_without_the_mark_is_none(folder: Path, number: str) -> None:
    async def run() -> None:
        bucket = bucket_at(folder, number)
        for ask in (bucket.size(NAME), bucket.put_bytes(leave(NAME), b"x")):
            with pytest.raises(BucketUnreachable, match="is its file system mounted on this machine"):
                await ask

    run_on("uvloop", run())
    assert [path.name for path in folder.iterdir()] == [f".kachery-bucket-{MARK}"]


def test_a_file_system_that_is_unmounted_is_no_empty_bucket(folder: Path) -> None:
    async def run(bucket: DirectoryBucket) -> None:
        await bucket.put_bytes(leave(NAME), b"x")
        folder.rename(folder.parent / "away")
        folder.mkdir()
        for ask in (bucket.size(NAME), bucket.get_small(NAME, 10), bucket.put_bytes(leave(OTHER), b"x")):
            with pytest.raises(BucketUnreachable):
                await ask
        folder.rmdir()
        (folder.parent / "away").rename(folder)
        assert await bucket.get_small(NAME, 10) == b"x"

    do(folder, run)


def test_a_folder_is_marked_only_where_one_may_write(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="the marking as a bucket of"):
        mark(tmp_path / "absent", MARK)
    (tmp_path / f".kachery-bucket-{MARK}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DiskError):
        mark(tmp_path, MARK)
    assert not is_marked(tmp_path, MARK)


@pytest.mark.parametrize(("mode", "of_files"), [(0o2770, 0o640), (0o755, 0o644), (0o2775, 0o644)])
def test_what_is_made_has_the_permissions_of_the_folder(folder: Path, mode: int, of_files: int) -> None:
    folder.chmod(mode)
    before = os.umask(0o077)
    try:
        do(folder, lambda bucket: bucket.put_bytes(leave(NAME), b"x"))
    finally:
        os.umask(before)
    path = folder / NAME
    assert stat.S_IMODE(path.stat().st_mode) == of_files
    for made in (path.parent, folder / "lab", folder / ".incoming"):
        assert stat.S_IMODE(made.stat().st_mode) == mode


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", 8 * MIB) as disk:
        mark(disk, MARK)

        async def run(bucket: DirectoryBucket) -> None:
            with (tmp_path / "big").open("w+b") as big:
                big.truncate(64 * MIB)
                with pytest.raises(DiskFull):
                    await bucket.put_from(leave(NAME), big.fileno(), 0, 64 * MIB)

        do(disk, run)
        assert list((disk / ".incoming").iterdir()) == []


RACER = """
import asyncio, sys
from kachery_fast.net.bucket import SignedUpload
from kachery_fast.node.directory_bucket import DirectoryBucket
async def main():
    bucket = DirectoryBucket(sys.argv[1], 30.0)
    sys.stdin.readline()
    print(sum(await asyncio.gather(*(bucket.put_bytes(SignedUpload(name, "file:", {}), name.encode() * 1000)
                                     for name in sys.argv[2:]))))
asyncio.run(main())
"""


def test_of_processes_that_put_the_same_objects_each_object_has_one_creator(folder: Path) -> None:
    names = [object_name("lab", f"{number:02x}" * 20) for number in range(40)]
    url = f"file://{quote(str(folder))}#{MARK}"
    racers = [subprocess.Popen([sys.executable, "-c", RACER, url, *names], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        created = sum(int(racer.communicate("go\n", timeout=60)[0]) for racer in racers)
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert created == len(names)
    for name in names:
        assert (folder / name).read_bytes() == name.encode() * 1000


def test_a_cancelled_read_is_over_when_its_caller_goes_on(folder: Path, tmp_path: Path) -> None:
    data = os.urandom(32 * MIB)

    async def run(bucket: DirectoryBucket) -> None:
        (tmp_path / "source").write_bytes(data)
        with (tmp_path / "source").open("rb") as source:
            await bucket.put_from(leave(NAME), source.fileno(), 0, len(data))
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        with (tmp_path / "target").open("w+b") as target:
            reading = asyncio.ensure_future(bucket.get_into(
                NAME, FileSpan(target.fileno(), 0, len(data)),
                progress=lambda _: [loop.call_soon_threadsafe(begun.set)].clear()))
            await begun.wait()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            os.ftruncate(target.fileno(), 0)
        await asyncio.sleep(0)
        assert (tmp_path / "target").stat().st_size == 0

    do(folder, run)


# --- a file server that is gone: who opens a pipe that nobody writes to waits in the kernel, too


def hang(folder: Path, name: str) -> Path:
    """Have who opens an object wait until somebody opens it for writing."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def let_go(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@both_loops
def test_a_folder_that_hangs_is_given_up_and_comes_back(folder: Path, tmp_path: Path, loop_kind: str) -> None:
    names = [object_name("lab", f"{number:02x}" * 20) for number in range(8)]
    paths = [hang(folder, name) for name in names]

    async def run() -> None:
        bucket = bucket_at(folder, stall_seconds=0.2)
        with (tmp_path / "target").open("w+b") as target:
            errors = await asyncio.gather(*(bucket.get_into(name, FileSpan(target.fileno(), 0, 1)) for name in names),
                                          bucket.put_bytes(leave(NAME), b"x"), return_exceptions=True)
        assert [type(error) for error in errors] == [Stalled] * 9
        bucket._stall_seconds = 30.0
        for path in paths:
            let_go(path)
        assert await bucket.put_bytes(leave(OTHER), b"x")
        assert await bucket.get_small(OTHER, 1) == b"x"
        assert not (folder / NAME).exists()  # what had not begun was dropped

    run_on(loop_kind, run())


def test_who_is_cancelled_while_the_folder_hangs_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_bucket, "LEAVE_SECONDS", 0.05)
    path = hang(folder, NAME)

    async def run(bucket: DirectoryBucket) -> None:
        reading = asyncio.ensure_future(bucket.size(NAME))
        await asyncio.sleep(0)
        while bucket._threads._waiting:  # until it has begun
            await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(reading, 10)

    do(folder, run)
    let_go(path)


ENDING = """
import asyncio, sys
from kachery_fast.errors import Stalled
from kachery_fast.node.directory_bucket import DirectoryBucket
async def main():
    try:
        await DirectoryBucket(sys.argv[1], 0.05).size(sys.argv[2])
    except Stalled:
        print("stalled")
asyncio.run(main())
"""


def test_a_process_ends_though_its_folder_hangs(folder: Path) -> None:
    hang(folder, NAME)
    done = subprocess.run([sys.executable, "-c", ENDING, f"file://{quote(str(folder))}#{MARK}", NAME],
                          capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("stalled\n", "", 0)
