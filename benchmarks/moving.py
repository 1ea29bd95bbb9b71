"""Whole transfers: a verified load beside rclone, node to node beside its two halves, and the memory of a node.

Everything runs on loopback, both cores shared with the servers, data in the page cache, on the file system of
``directory``. Node-to-node figures are of real processes: hub, node A, node B.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tests.net.nginx import nginx

from benchmarks.digests import openssl_sha1
from benchmarks.measure import Figure, Ratio, figure, make_file, pairs
from benchmarks.objects import program
from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.config import Settings, load_settings
from kachery_fast.errors import NotInStore
from kachery_fast.net.bucket import HttpBucket, ReadUrls, SignedUpload
from kachery_fast.net.hub import HubClient
from kachery_fast.net.ranges import RangeClient
from kachery_fast.node.identity import load_identity
from kachery_fast.node.link import ChannelLink
from kachery_fast.node.transfer import Tools, Traffic, Transfer
from kachery_fast.node.transfers import request_limits
from kachery_fast.protocol.manifest import Chunk, Manifest, parse_manifest
from kachery_fast.protocol.names import FileUri, object_name, parse_file_uri
from kachery_fast.store.files import FileStore
from kachery_fast.store.objects import Stored

__all__ = [
    "Pair",
    "load_once",
    "load_versus_rclone",
    "load_versus_rclone_and_openssl",
    "memory_of_a_moving_node",
    "node_to_node_held_to_a_rate",
    "node_to_node_held_versus_the_sum",
    "node_to_node_versus_its_halves",
    "place_chunks",
    "two_nodes",
]

GB = 1e9
CHANNEL = "bench"
CONCURRENCY = 4
HELD_RATE_BYTES = 100_000_000


# --- a verified load from nginx


class _BucketAlone:
    """A channel with a bucket and nobody to ask, for ``Transfer``."""

    def __init__(self, bucket: HttpBucket) -> None:
        self.name = CHANNEL
        self.bucket = bucket
        self.on_restored: list[Callable[[], None]] = []
        self.on_members: list[Callable[[], None]] = []
        self.on_bucket: list[Callable[[], None]] = []

    def providers(self) -> dict[str, str]:
        """Nobody."""
        return {}

    def listen(self, request: str, listener: object) -> None:
        """There is nothing to hear."""

    def unlisten(self, request: str, listener: object) -> None:
        """There is nothing to hear."""


def load_versus_rclone(directory: Path, size_bytes: int = 2 << 30, count: int = 5) -> Figure:
    """A load of a file whose chunks nginx serves, verified, beside rclone fetching the same bytes unverified."""
    return _load_versus(directory, size_bytes, count, "verified load / rclone, unverified", ">= 1.0", verify=False)


def load_versus_rclone_and_openssl(directory: Path, size_bytes: int = 2 << 30, count: int = 5) -> Figure:
    """The same load beside rclone and then ``openssl dgst -sha1``."""
    return _load_versus(directory, size_bytes, count, "verified load / rclone, then openssl", ">= 1.6", verify=True)


def _load_versus(directory: Path, size_bytes: int, count: int, name: str, bar: str, *, verify: bool) -> Figure:
    rclone = program("rclone")
    target = directory / "rclone.dat"
    with _served_chunks(directory, size_bytes) as (url, uri, whole):
        def ours() -> float:
            shutil.rmtree(directory / "B", ignore_errors=True)
            return size_bytes / GB / asyncio.run(load_once(url, uri, directory / "B"))

        def rival() -> float:
            target.unlink(missing_ok=True)
            begun = time.perf_counter()
            subprocess.run([rclone, "copyto", "--config", os.devnull, "--http-url", url, "--multi-thread-streams",
                            str(CONCURRENCY), "--multi-thread-cutoff", "64M", "--retries", "1", ":http:whole",
                            str(target)], check=True)
            if verify and openssl_sha1(target) != uri.sha1:
                raise AssertionError("rclone's copy differs")
            return size_bytes / GB / (time.perf_counter() - begun)

        ours()
        stored = FileStore(directory / "B").find(uri.sha1).path
        subprocess.run(["cmp", str(stored), str(whole)], check=True)
        measured = pairs(ours, rival, count)
    for path in (directory / "B", target):
        shutil.rmtree(path, ignore_errors=True)
    target.unlink(missing_ok=True)
    note = f"{size_bytes >> 20} MiB from nginx, {CONCURRENCY} chunks at once; no fsync on either side"
    return figure(name, measured, unit="GB/s", bar=bar, note=note)


async def load_once(url: str, uri: FileUri, storage_dir: Path, reads: ReadUrls | None = None) -> float:
    """Load a file from the bucket at ``url``, where ``reads`` are signed if not None; returns the seconds it took."""
    settings = load_settings({}, storage_dir=storage_dir)
    client = RangeClient(settings, concurrency=CONCURRENCY + 2)
    over = asyncio.Event()
    with ThreadPoolExecutor(8) as disk, ThreadPoolExecutor(2) as verify:
        tools = Tools(FileStore(storage_dir, durable=False), request_limits(settings), disk, verify,
                      asyncio.Semaphore(CONCURRENCY), Traffic())
        link = cast(ChannelLink, _BucketAlone(HttpBucket(url, client, settings, reads=reads)))
        begun = time.perf_counter()
        transfer = Transfer(uri, link, tools, secrets.token_hex(16), over.set)
        await transfer.want(None, None)
        seconds = time.perf_counter() - begun
        await over.wait()
        await client.close()
    return seconds


@contextmanager
def _served_chunks(directory: Path, size_bytes: int) -> Iterator[tuple[str, FileUri, Path]]:
    """nginx with the chunks and manifest of a file as objects of a channel, and the file itself as ``whole``."""
    root = directory / "www"
    root.mkdir()
    whole = make_file(root / "whole", size_bytes)
    uri, _ = place_chunks(whole, root)
    with nginx(root, directory / "nginx", program=program("nginx"), workers=2) as url:
        yield url, uri, whole
    shutil.rmtree(root)


def place_chunks(whole: Path, root: Path) -> tuple[FileUri, list[str]]:
    """Write the chunks of a file and its manifest below ``root``, each as its object is named; returns the names,
    that of the manifest last."""
    store = FileStore(root.with_name("source"), durable=False)
    stored = store.put_file(whole)
    manifest = _manifest_of(store, stored)
    shutil.rmtree(root.with_name("source"))
    with whole.open("rb") as file:
        names = [_place(root, chunk.sha1, file.read(chunk.end - chunk.start)) for chunk in manifest.chunks]
    names.append(_place(root, manifest.name, manifest.encode()))
    return FileUri(stored.sha1, "", stored.manifest_sha1), names


def _manifest_of(store: FileStore, stored: Stored) -> Manifest:
    _, manifest = store.manifest_for(stored.sha1)
    if manifest is None:
        return Manifest(stored.size, stored.sha1, (Chunk(0, stored.size, stored.sha1),))
    return manifest


def _place(root: Path, sha1: str, data: bytes) -> str:
    name = object_name(CHANNEL, sha1)
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return name


# --- node to node


def node_to_node_versus_its_halves(directory: Path, size_bytes: int = 2 << 30, count: int = 5) -> Figure:
    """Seconds from the request at B to the verified file, beside the upload alone plus the download alone."""
    with two_nodes(directory, size_bytes) as (lab, uri):
        pair = Pair(lab, uri)
        measured = pairs(pair.both, lambda: pair.upload() + pair.download(), count)
    note = f"{size_bytes >> 20} MiB, hub, node A and node B on two cores; durable at B"
    return figure("node A to node B / upload alone + download alone", measured, unit="s", bar="<= 0.8", note=note)


def node_to_node_held_to_a_rate(directory: Path, size_bytes: int = 512 << 20, count: int = 5) -> Figure:
    """The same with the bucket held to 100 MB/s each way, beside the slower of the two halves."""
    with two_nodes(directory, size_bytes, KACHERY_BUCKET_RATE_BYTES_MAX=str(HELD_RATE_BYTES)) as (lab, uri):
        pair = Pair(lab, uri)
        measured = pairs(pair.both, lambda: max(pair.upload(), pair.download()), count)
    note = f"{size_bytes >> 20} MiB, bucket held to {HELD_RATE_BYTES // 10**6} MB/s each way"
    return figure("node A to node B, held / the slower half", measured, unit="s", bar="<= 1.15", note=note)


def node_to_node_held_versus_the_sum(directory: Path, size_bytes: int = 512 << 20, count: int = 5) -> Figure:
    """Held to 100 MB/s each way, beside upload alone plus download alone."""
    with two_nodes(directory, size_bytes, KACHERY_BUCKET_RATE_BYTES_MAX=str(HELD_RATE_BYTES)) as (lab, uri):
        pair = Pair(lab, uri)
        measured = pairs(pair.both, lambda: pair.upload() + pair.download(), count)
    note = f"{size_bytes >> 20} MiB, bucket held to {HELD_RATE_BYTES // 10**6} MB/s each way"
    return figure("node A to node B, held / upload + download alone", measured, unit="s", bar="shown", note=note)


def memory_of_a_moving_node(directory: Path, size_bytes: int = 8 << 30) -> Figure:
    """The largest resident memory, in MiB, of hub, node A and node B while 8 GiB move from A to B."""
    with two_nodes(directory, size_bytes) as (lab, uri):
        Pair(lab, uri).both()
        lab.close()
        peaks = {name: node.program.peak_rss_bytes / 2**20 for name, node in lab.nodes.items()}
        hub = lab.hub.peak_rss_bytes / 2**20
    largest = max(hub, *peaks.values())
    ratio = Ratio(largest, 512, largest / 512, largest / 512, largest / 512)
    note = f"{size_bytes >> 20} MiB; A {peaks['A']:.0f}, B {peaks['B']:.0f}, hub {hub:.0f} MiB at their peaks"
    return figure("resident memory of the largest process / 512 MiB", ratio, unit="MiB", bar="<= 1", note=note)


class Pair:
    """The transfer from A to B and its halves, each from a fresh start; all verified by B itself.

    :param objects: where the channel's objects are, if not in the hub's own bucket.
    """

    def __init__(self, lab: Lab, uri: str, objects: Path | None = None) -> None:
        self._lab = lab
        self._objects = lab.bucket_dir if objects is None else objects
        self._uri = uri
        self._a, self._b = lab.nodes["A"], lab.nodes["B"]

    def both(self) -> float:
        """Seconds of a load at B of what only A has."""
        self._empty_bucket()
        return self._timed_load()

    def download(self) -> float:
        """Seconds of a load at B of what the bucket has."""
        return self._timed_load()

    def upload(self) -> float:
        """Seconds of an upload of all chunks by A's identity, signed by the hub, to the empty bucket."""
        self._empty_bucket()
        return asyncio.run(_upload(self._a, self._lab.hub_url, parse_file_uri(self._uri)))

    def _timed_load(self) -> float:
        sha1 = parse_file_uri(self._uri).sha1
        with contextlib.suppress(NotInStore):
            FileStore(self._b.storage_dir).remove(sha1)
        begun = time.perf_counter()
        self._b.connection.load(self._uri, CHANNEL, None)
        return time.perf_counter() - begun

    def _empty_bucket(self) -> None:
        # A node checks what it uploads a second time; a fresh one has uploaded nothing yet.
        self._a.program.stop()
        shutil.rmtree(self._objects, ignore_errors=True)
        self._a.start()


async def _upload(node: LabNode, hub_url: str, uri: FileUri) -> float:
    settings: Settings = node.settings
    store = FileStore(node.storage_dir)
    _, manifest = store.manifest_for(uri.sha1)
    if manifest is None:
        raise AssertionError("the file of a benchmark has several chunks")
    client = RangeClient(settings, concurrency=CONCURRENCY)
    bucket = HttpBucket(hub_url + "/bucket", client, settings)
    async with HubClient(hub_url, load_identity(node.storage_dir).key, settings) as hub:
        await hub.node_config()
        with store.open(uri.sha1) as file:
            begun = time.perf_counter()
            queue = [(chunk, leave) for start in range(0, len(manifest.chunks), settings.sign_batch_max)
                     for chunk, leave in await _signed(hub, manifest.chunks[start:start + settings.sign_batch_max])]
            queue.reverse()

            async def lane() -> None:
                while queue:
                    chunk, leave = queue.pop()
                    await bucket.put_from(leave, file.fileno(), chunk.start, chunk.end - chunk.start)

            await asyncio.gather(*(lane() for _ in range(CONCURRENCY)))
            seconds = time.perf_counter() - begun
        name = parse_manifest(manifest.encode(), name=manifest.name).name
        with store.open(name) as file:
            leave = (await hub.sign_uploads(CHANNEL, [(name, os.fstat(file.fileno()).st_size)]))[0]
            await bucket.put_from(SignedUpload(leave.object, leave.url, leave.headers), file.fileno(), 0,
                                  os.fstat(file.fileno()).st_size)
    await client.close()
    return seconds


async def _signed(hub: HubClient, chunks: tuple[Chunk, ...]) -> list[tuple[Chunk, SignedUpload]]:
    signed = await hub.sign_uploads(CHANNEL, [(chunk.sha1, chunk.end - chunk.start) for chunk in chunks])
    return [(chunk, SignedUpload(leave.object, leave.url, leave.headers))
            for chunk, leave in zip(chunks, signed, strict=True)]


@contextmanager
def two_nodes(directory: Path, size_bytes: int, *, folder: Path | None = None,
              **environ: str) -> Iterator[tuple[Lab, str]]:
    """A lab with nodes A and B and ``recording.dat`` of random bytes linked at A; everything is removed at the end.

    :param folder: the channel's bucket; None: it is the hub's own.
    """
    if folder is not None:
        environ["KACHERY_HUB_BUCKET_FOLDERS"] = str(folder)
    place = directory / "lab"
    source = make_file(directory / "recording.dat", size_bytes)
    try:
        with Lab(place, channel=CHANNEL, environ=environ) as lab:
            lab.start_hub()
            if folder is not None:
                lab.owner("bucket", CHANNEL, "--folder", str(folder))
            a = lab.add_node("A")
            lab.add_node("B")
            linked: Any = a.json("link", str(source))
            yield lab, str(linked[0]["uri"])
    finally:
        shutil.rmtree(place, ignore_errors=True)
        source.unlink()
