"""Buckets of an owner's own, beside what people do without us: a shared folder and ``cp``, their clients.

Everything is in memory (``/dev/shm``) unless its name says otherwise, on loopback, the cores shared with the server.
Both sides move the same objects, four at once. Neither sends a checksum to S3; both send one to Google.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

from benchmarks.digests import crc32c_versus_google
from benchmarks.lab import in_memory
from benchmarks.measure import Figure, Ratio, figure, make_file, pairs, rate
from benchmarks.moving import Pair, load_once, place_chunks, two_nodes
from benchmarks.objects import CHUNK_SIZE_BYTES, CONCURRENCY, check_same, run_together
from benchmarks.signing import sign_gcs, sign_gcs_hmac, sign_s3
from benchmarks.stores import Boto3, Opener, Rclone, Store, open_gcs, open_s3
from kachery_fast._checksum import crc32c
from kachery_fast.hub.engines import BucketEngine
from kachery_fast.hub.engines.gcs import GcsBucket
from kachery_fast.net.bucket import HttpBucket, SignedUpload
from kachery_fast.protocol.names import parse_file_uri
from kachery_fast.store.files import FileStore

__all__ = ["FIGURES", "load_versus", "upload_versus"]

GB = 1e9
LIFE_SECONDS = 3600


# --- a folder


def folder_load(directory: Path, size_bytes: int = 512 << 20, count: int = 5) -> Figure:
    """Node to node through a folder in memory, beside ``cp`` into it, ``cp`` out of it, and ``sha1sum``."""
    with in_memory() as place:
        return _folder_load(place, size_bytes, count, bar=">= 1.0", durable=False)


def folder_load_durable(directory: Path, size_bytes: int = 256 << 20, count: int = 5) -> Figure:
    """The same on the disk, each copy flushed: by node A, by node B, and by ``sync``."""
    return _folder_load(directory, size_bytes, count, bar="shown", durable=True)


def _folder_load(place: Path, size_bytes: int, count: int, *, bar: str, durable: bool) -> Figure:
    folder = place / "shared"
    folder.mkdir()
    source, shared, copy = place / "recording.dat", folder / "recording.dat", place / "copy.dat"
    with two_nodes(place, size_bytes, folder=folder) as (lab, uri):
        sha1 = parse_file_uri(uri).sha1
        pair = Pair(lab, uri, folder / lab.channel)

        def ours() -> float:
            return size_bytes / GB / pair.both()

        def by_hand() -> None:
            for origin, target in ((source, shared), (shared, copy)):
                subprocess.run(["cp", origin, target], check=True)
                if durable:
                    subprocess.run(["sync", target], check=True)
            summed = subprocess.run(["sha1sum", copy], check=True, capture_output=True, text=True)
            if summed.stdout.split()[0] != sha1:
                raise AssertionError("the copy differs")

        def rival() -> float:
            for path in (shared, copy):
                path.unlink(missing_ok=True)
            return rate(by_hand, size_bytes / GB)()

        measured = pairs(ours, rival, count)
        if not any(path.is_file() for path in (folder / lab.channel).rglob("*")):
            raise AssertionError("nothing went by the folder")
    copy.unlink()
    shutil.rmtree(folder)
    where = "on the disk, each copy flushed" if durable else "all in memory"
    return figure("node A to node B by a folder / cp, cp, sha1sum", measured, unit="GB/s", bar=bar,
                  note=f"{size_bytes >> 20} MiB, {where}; both sides begin with the source alone in the page cache")


# --- objects


class _Reads:
    """Every read by a URL of its own, signed as the hub does it."""

    def __init__(self, bucket: BucketEngine) -> None:
        self._bucket = bucket

    async def url(self, object_name: str, *, head: bool, ahead: Iterable[str], refused: str) -> str:
        """See ``ReadUrls``."""
        return self._bucket.sign_get(object_name, LIFE_SECONDS, head=head).url


def upload_versus(open_store: Opener, directory: Path, size_bytes: int = 256 << 20, count: int = 5) -> Figure:
    """The chunks and the manifest of a file by signed URLs, beside the same by the rival."""
    with in_memory() as place, open_store(place) as store:
        pieces, back = place / "pieces", place / "back"
        whole = make_file(place / "whole", size_bytes)
        _, names = place_chunks(whole, pieces)

        def ours() -> float:
            store.empty()
            return size_bytes / GB / _put_all(store.bucket, pieces, names)

        def theirs() -> float:
            store.empty()
            return rate(lambda: store.rival.upload(pieces, names), size_bytes / GB)()

        for side in (ours, theirs):
            side()
            store.rival.download(back, names)
            check_same(whole, *(back / name for name in names[:-1]))
            shutil.rmtree(back)
        measured = pairs(ours, theirs, count)
    return _compared("upload to", store, measured, size_bytes)


def load_versus(open_store: Opener, directory: Path, size_bytes: int = 256 << 20, count: int = 5) -> Figure:
    """A verified load by signed URLs, beside the rival fetching the same objects into files, unverified."""
    with in_memory() as place, open_store(place) as store:
        pieces, back = place / "pieces", place / "back"
        whole = make_file(place / "whole", size_bytes)
        uri, names = place_chunks(whole, pieces)
        store.rival.upload(pieces, names)

        def ours() -> float:
            shutil.rmtree(place / "B", ignore_errors=True)
            reads = _Reads(store.bucket)
            return size_bytes / GB / asyncio.run(load_once(store.bucket.url_base, uri, place / "B", reads))

        def theirs() -> float:
            shutil.rmtree(back, ignore_errors=True)
            return rate(lambda: store.rival.download(back, names), size_bytes / GB)()

        ours()
        check_same(whole, FileStore(place / "B").find(uri.sha1).path)
        theirs()
        check_same(whole, *(back / name for name in names[:-1]))
        measured = pairs(ours, theirs, count)
    return _compared("verified load from", store, measured, size_bytes)


def _put_all(bucket: BucketEngine, folder: Path, names: list[str]) -> float:
    """Sign and upload each object, a node's CRC-32C of it included where the store compares it; returns seconds."""
    of_google = isinstance(bucket, GcsBucket)

    async def put(http: HttpBucket, name: str, enough: asyncio.Semaphore) -> None:
        async with enough:
            fd = os.open(folder / name, os.O_RDONLY)
            try:
                size = os.fstat(fd).st_size
                told = await asyncio.to_thread(_crc32c_of, fd, size) if of_google else None
                signed = bucket.sign_put(name, size, LIFE_SECONDS, crc32c=told)
                await http.put_from(SignedUpload(name, *signed), fd, 0, size)
            finally:
                os.close(fd)

    def operations(http: HttpBucket) -> list[Awaitable[object]]:
        enough = asyncio.Semaphore(CONCURRENCY)
        return [put(http, name, enough) for name in names]

    return run_together(bucket.url_base, operations)


def _crc32c_of(fd: int, size: int) -> int:
    value = 0
    for start in range(0, size, 1 << 20):
        value = crc32c(os.pread(fd, 1 << 20, start), value)
    return value


def _compared(what: str, store: Store, measured: Ratio, size_bytes: int) -> Figure:
    return figure(f"{what} {store.about} / {store.rival.name}", measured, unit="GB/s", bar="shown",
                  note=f"{size_bytes >> 20} MiB in {CHUNK_SIZE_BYTES >> 20} MiB objects, {CONCURRENCY} at once, "
                       "in memory")


FIGURES: dict[str, Callable[..., Figure]] = {
    "folder-load": folder_load,
    "folder-load-durable": folder_load_durable,
    "s3-upload": partial(upload_versus, partial(open_s3, Boto3)),
    "s3-upload-rclone": partial(upload_versus, partial(open_s3, Rclone)),
    "s3-load": partial(load_versus, partial(open_s3, Boto3)),
    "s3-load-rclone": partial(load_versus, partial(open_s3, Rclone)),
    "gcs-upload": partial(upload_versus, open_gcs, size_bytes=64 << 20),
    "gcs-load": partial(load_versus, open_gcs, size_bytes=64 << 20),
    "sign-s3": sign_s3,
    "sign-gcs": sign_gcs,
    "sign-gcs-hmac": sign_gcs_hmac,
    "crc32c": crc32c_versus_google,
}
