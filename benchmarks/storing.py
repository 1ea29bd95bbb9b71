"""Storing and linking, beside programs that do less: ``openssl dgst`` copies nothing, ``cp`` hashes nothing."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Figure, figure, make_file, pairs, rate
from kachery_fast.store import FileStore, Stored

__all__ = [
    "Growth",
    "durable_store_versus_cp_and_fsync",
    "growth",
    "link_versus_openssl",
    "small_files_versus_cp",
    "store_versus_openssl",
]

GB = 1e9


class Growth(NamedTuple):
    """What one put and one look-up cost in a store of ``objects`` files: medians, in microseconds."""

    objects: int
    put_us: float
    put_again_us: float
    find_us: float
    miss_us: float


def store_versus_openssl(directory: Path, size_bytes: int = 2 << 30, count: int = 5) -> Figure:
    """``put_file`` without the final fsync (both digests, copy, rename), beside ``openssl dgst -sha1`` of the file.

    The stored file is removed outside the measured time.
    """
    source = make_file(directory / "recording.dat", size_bytes)
    expected = _openssl_sha1(source)
    root = directory / "store"
    store = FileStore(root, durable=False)

    def ours() -> float:
        shutil.rmtree(root, ignore_errors=True)
        return rate(lambda: _check(store.put_file(source), expected), size_bytes / GB)()

    measured = pairs(ours, rate(lambda: _openssl_sha1(source), size_bytes / GB), count)
    store.verify(expected)
    shutil.rmtree(root)
    source.unlink()
    return figure("store / openssl dgst", measured, unit="GB/s", bar=">= 1.0",
                  note=f"{size_bytes >> 20} MiB, page cache warm, without the final fsync")


def durable_store_versus_cp_and_fsync(directory: Path, size_bytes: int = 2 << 30, count: int = 3) -> Figure:
    """``put_file`` with its fsync, beside ``cp`` followed by ``sync`` of the copy: what the disk takes, shown apart."""
    source = make_file(directory / "recording.dat", size_bytes)
    root, copy = directory / "store", directory / "copy.dat"
    store = FileStore(root)

    def ours() -> float:
        shutil.rmtree(root, ignore_errors=True)
        return rate(lambda: store.put_file(source), size_bytes / GB)()

    def copied() -> None:
        subprocess.run(["cp", "--reflink=auto", source, copy], check=True)
        subprocess.run(["sync", copy], check=True)

    def rival() -> float:
        copy.unlink(missing_ok=True)
        return rate(copied, size_bytes / GB)()

    measured = pairs(ours, rival, count)
    shutil.rmtree(root)
    copy.unlink()
    source.unlink()
    return figure("durable store / cp + sync", measured, unit="GB/s", bar="",
                  note=f"{size_bytes >> 20} MiB, page cache warm, flushed to the disk by both")


def link_versus_openssl(directory: Path, size_bytes: int = 2 << 30, count: int = 5) -> Figure:
    """``link_file``, beside ``openssl dgst -sha1`` of the same file."""
    source = make_file(directory / "recording.dat", size_bytes)
    expected = _openssl_sha1(source)
    root = directory / "store"
    store = FileStore(root)

    def ours() -> float:
        shutil.rmtree(root, ignore_errors=True)
        return rate(lambda: _check(store.link_file(source), expected), size_bytes / GB)()

    measured = pairs(ours, rate(lambda: _openssl_sha1(source), size_bytes / GB), count)
    shutil.rmtree(root)
    source.unlink()
    return figure("link / openssl dgst", measured, unit="GB/s", bar=">= 1.1",
                  note=f"{size_bytes >> 20} MiB, page cache warm, the record flushed")


def small_files_versus_cp(
    directory: Path, files: int = 10_000, size_bytes: int = 10_000, count: int = 5, *, durable: bool = True
) -> Figure:
    """``put_files`` of a whole tree in one call, beside ``cp -r`` of it, which flushes nothing.

    Both write into a new directory each time; all are removed at the end, since removing disturbs what follows.
    """
    tree = directory / "tree"
    tree.mkdir()
    generator = random.Random(0)
    paths = [tree / f"{number:06d}.dat" for number in range(files)]
    for path in paths:
        path.write_bytes(generator.randbytes(size_bytes))
    places = iter(range(1000))

    def ours() -> float:
        store = FileStore(directory / f"store-{next(places)}", durable=durable)
        answers: list[object] = []
        measured = rate(lambda: answers.extend(store.put_files(paths)), files)()
        failed = [answer for answer in answers if not isinstance(answer, Stored)]
        if failed or len(answers) != files:
            raise AssertionError(f"{len(failed)} files were not stored: {failed[:1]}")
        sample = paths[generator.randrange(files)].read_bytes()
        if store.find(hashlib.sha1(sample).hexdigest()).path.read_bytes() != sample:
            raise AssertionError("another file came out")
        return measured

    def rival() -> float:
        target = directory / f"copy-{next(places)}"
        return rate(lambda: subprocess.run(["cp", "-r", tree, target], check=True), files)()

    try:
        measured = pairs(ours, rival, count)
    finally:
        for path in directory.iterdir():
            if path.name.startswith(("store-", "copy-", "tree")):
                shutil.rmtree(path)
    flushed = "flushed by one syncfs a batch" if durable else "not flushed"
    return figure(f"{files} small files / cp -r", measured, unit="files/s", bar=">= 0.3" if durable else "",
                  note=f"{size_bytes} bytes each, ours {flushed}, cp not")


def growth(
    directory: Path, counts: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000), samples: int = 300
) -> list[Growth]:
    """Fill a store with more and more objects, and time a put, a put of what is there, a look-up, and a miss.

    :param counts: numbers of objects, ascending; a million take about 12 GB and 3 million inodes.
    :param samples: how many of each are timed.
    """
    store = FileStore(directory / "store", durable=False)
    rows: list[Growth] = []
    held = 0
    generator = random.Random(1)
    for objects in counts:
        for number in range(held, objects):
            store.put_bytes(b"object %d" % number)
        held = objects + samples
        known = [b"object %d" % generator.randrange(objects) for _ in range(samples)]
        names = [hashlib.sha1(data).hexdigest() for data in known]
        absent = [os.urandom(20).hex() for _ in range(samples)]
        rows.append(Growth(
            objects,
            statistics.median(_us(store.put_bytes, b"object %d" % number) for number in range(objects, held)),
            statistics.median(_us(store.put_bytes, data) for data in known),
            statistics.median(_us(store.find, name) for name in names),
            statistics.median(_us(store.has, name) for name in absent),
        ))
    shutil.rmtree(directory / "store")
    return rows


def _us(call: object, argument: object) -> float:
    assert callable(call)
    start = time.perf_counter()
    call(argument)
    return (time.perf_counter() - start) * 1e6


def _check(stored: Stored, expected: str) -> None:
    if stored.sha1 != expected:
        raise AssertionError("the digests differ")


def _openssl_sha1(path: Path) -> str:
    output = subprocess.run(["openssl", "dgst", "-sha1", str(path)], check=True, capture_output=True, text=True)
    return output.stdout.split()[-1]
