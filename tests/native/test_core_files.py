"""Hashing a file and copying while hashing: right at every size, stoppable at once, clean after every failure."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from kachery_fast import _core
from tests.native.disks import mounted
from tests.native.test_core import expected
from tests.spinning import spin_until

MIB = 1 << 20
SLOT = 512 << 10  # of the ring between the two threads
SIZES = [0, 1, 10_000, MIB - 1, MIB, MIB + 1, 2 * MIB, 8 * MIB, 8 * MIB + SLOT, 8 * MIB + SLOT + 1, 19 * MIB + 7]
DATA = np.random.Generator(np.random.SFC64(6)).bytes(20 * MIB)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def threads_and_descriptors() -> tuple[int, int]:
    process = psutil.Process()
    return process.num_threads(), process.num_fds()


@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_file_is_hashed_from_its_first_byte_to_its_end(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "source"
    path.write_bytes(DATA[:size_bytes])
    with opened(path) as fd:
        os.lseek(fd, 5, os.SEEK_SET)
        assert _core.digest_file(fd, MIB) == expected(memoryview(DATA)[:size_bytes], MIB)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 5


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
@pytest.mark.parametrize("size_bytes", SIZES)
def test_a_copy_has_the_bytes_that_its_digests_tell(tmp_path: Path, size_bytes: int, flags: int) -> None:
    (tmp_path / "source").write_bytes(DATA[:size_bytes])
    with (
        opened(tmp_path / "source") as source,
        opened(tmp_path / "target", flags | os.O_CREAT) as target,
    ):
        assert _core.copy_file(source, target, MIB) == expected(memoryview(DATA)[:size_bytes], MIB)
    assert (tmp_path / "target").read_bytes() == DATA[:size_bytes]


@pytest.mark.skipif(sys.platform != "linux", reason="such files are a thing of Linux")
def test_a_file_that_claims_no_length_is_read_to_its_end() -> None:
    with opened(Path("/proc/self/maps")) as fd:
        found = _core.digest_file(fd, MIB)
    assert found.size > 0
    assert len(found.chunk_sha1s) == 1


def test_progress_grows_in_steps_of_8_mib_and_ends_with_all(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(DATA * 2)
    for call in ("digest", "copy"):
        seen: list[int] = []
        with opened(path) as fd, opened(tmp_path / call, os.O_RDWR | os.O_CREAT) as target:
            if call == "digest":
                _core.digest_file(fd, MIB, progress=seen.append)
            else:
                _core.copy_file(fd, target, MIB, progress=seen.append)
        assert seen[-1] == 40 * MIB
        assert all(after - before >= 8 * MIB for before, after in zip([0, *seen], seen[:-1], strict=False))


def test_what_progress_raises_ends_the_call_and_leaves_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(DATA)

    def stop(done: int) -> None:
        raise LookupError(done)

    with opened(path) as fd, opened(tmp_path / "target", os.O_RDWR | os.O_CREAT) as target:
        before = threads_and_descriptors()
        for _ in range(5):
            with pytest.raises(LookupError):
                _core.digest_file(fd, MIB, progress=stop)
            with pytest.raises(LookupError):
                _core.copy_file(fd, target, MIB, progress=stop)
        assert threads_and_descriptors() == before


@pytest.mark.parametrize("size_bytes", [100, 3 * MIB])
def test_errors_of_the_system_carry_their_number(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "source"
    path.write_bytes(DATA[:size_bytes])
    before = threads_and_descriptors()
    reader, writer = os.pipe()
    with opened(path) as fd, opened(path, os.O_WRONLY) as unreadable, opened(tmp_path) as directory:
        for bad, number in (
            (unreadable, errno.EBADF),
            (directory, errno.EISDIR),
            (reader, errno.ESPIPE),
            (-1, errno.EBADF),
        ):
            with pytest.raises(OSError, match=rf"\[Errno {number}\]"):
                _core.digest_file(bad, MIB)
        with pytest.raises(OSError, match=rf"\[Errno {errno.EBADF}\]"):
            _core.copy_file(fd, fd, MIB)
    os.close(reader)
    os.close(writer)
    assert threads_and_descriptors() == before


@pytest.mark.parametrize("size_bytes", [200_000, 6 * MIB])
def test_a_copy_beyond_the_limit_fails_with_its_number(tmp_path: Path, size_bytes: int) -> None:
    (tmp_path / "source").write_bytes(DATA[:size_bytes])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        opened(tmp_path / "source") as source,
        opened(tmp_path / "target", os.O_RDWR | os.O_CREAT) as target,
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(OSError, match=rf"\[Errno {errno.EFBIG}\]"):
                _core.copy_file(source, target, MIB)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_source_that_shrinks_or_grows_meanwhile_gives_a_copy_true_to_its_digests(tmp_path: Path) -> None:
    path = tmp_path / "source"
    for change in ("shrink", "grow"):
        path.write_bytes(DATA)

        def alter(done: int, change: str = change) -> None:
            if change == "shrink":
                os.truncate(path, 10 * MIB)
            else:
                with path.open("ab") as file:
                    file.write(DATA[: 3 * MIB])

        with (
            opened(path) as source,
            opened(tmp_path / change, os.O_WRONLY | os.O_CREAT) as target,
        ):
            found = _core.copy_file(source, target, MIB, progress=alter)
        assert found == expected((tmp_path / change).read_bytes(), MIB)


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
def test_a_copy_shares_the_blocks_where_the_file_system_can(tmp_path: Path, kind: str, flags: int) -> None:
    with mounted(tmp_path / "disk", kind, 400 * MIB) as disk:
        (disk / "source").write_bytes(DATA)
        os.sync()
        before = os.statvfs(disk).f_bfree
        with opened(disk / "source") as source, opened(disk / "target", flags | os.O_CREAT) as target:
            assert _core.copy_file(source, target, MIB) == expected(DATA, MIB)
            os.fsync(target)
        os.sync()
        used_bytes = (before - os.statvfs(disk).f_bfree) * os.statvfs(disk).f_frsize
        assert (disk / "target").read_bytes() == DATA
        # A target that is not open for reading could not be hashed as a clone, so that it is written.
        assert (used_bytes < 4 * MIB) == (flags == os.O_RDWR)


def test_a_full_disk_is_an_error_before_the_copy_is_written(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(DATA)
    with mounted(tmp_path / "disk", "tmpfs", 8 * MIB) as disk:
        seen: list[int] = []
        with (
            opened(tmp_path / "source") as source,
            opened(disk / "target", os.O_RDWR | os.O_CREAT) as target,
            pytest.raises(OSError, match=rf"\[Errno {errno.ENOSPC}\]"),
        ):
            _core.copy_file(source, target, MIB, progress=seen.append)
        assert seen == []


def test_several_files_are_hashed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    right = hashlib.sha1(DATA).hexdigest()
    found: list[str] = []

    def digest() -> None:
        with opened(path) as fd:
            found.append(_core.digest_file(fd, MIB).sha1)

    threads = [threading.Thread(target=digest) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [right] * 6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of one program")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "source"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    code = (
        "import os, sys\n"
        "from kachery_fast import _core\n"
        "def peak_kib():  # of this program, where getrusage counts what forked it too\n"
        "    return int(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "before = peak_kib()\n"
        "target = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)\n"
        "_core.digest_file(fd, 20 << 20)\n"
        "_core.copy_file(fd, target, 20 << 20)\n"
        "print(peak_kib() - before)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "copy")],
        check=True,
        capture_output=True,
        text=True,
    )
    (tmp_path / "copy").unlink()
    assert int(output.stdout) < 10 * 1024  # the ring has 8 MiB


INTERRUPTED = """
import os, sys
import psutil
from kachery_fast import _core
kind, source, target = sys.argv[1:]
print("ready", flush=True)
try:
    if kind == "buffer":
        data = memoryview(bytearray(256 << 20))
        while True:
            _core.digest_buffer(data, 20 << 20)
    fd = os.open(source, os.O_RDONLY)
    while True:
        if kind == "file":
            _core.digest_file(fd, 20 << 20)
        else:
            _core.copy_file(fd, os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC), 20 << 20)
except KeyboardInterrupt:
    print(psutil.Process().num_threads(), flush=True)
"""


@pytest.mark.parametrize("kernel", _core.KERNELS)
@pytest.mark.parametrize("kind", ["buffer", "file", "copy"])
def test_an_interrupt_ends_the_work_at_once(tmp_path: Path, kind: str, kernel: str) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(512 * MIB)
    command = [sys.executable, "-c", INTERRUPTED, kind, str(source), str(tmp_path / "target")]
    # A span takes 5 to 20 ms of CPU. The best of three counts: the machine may be at other work for a while.
    assert min(interrupt(command, kernel) for _ in range(3)) < 0.2


def interrupt(command: list[str], kernel: str) -> float:
    """Interrupt the work in its midst; return the seconds until it has ended, by the clock of ``spinning``."""
    environ = {**os.environ, "KACHERY_SHA1_KERNEL": kernel}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as process:
        output = process.stdout
        assert output is not None
        assert output.readline() == "ready\n"
        time.sleep(0.3)  # into the midst of the work, which goes on until it is interrupted
        process.send_signal(signal.SIGINT)
        seconds = spin_until(lambda: select.select([output], [], [], 0)[0])
        assert output.readline() == "1\n", "no thread is left at work"
        assert process.wait(60) == 0
    return seconds
