"""How cost grows: objects in a store, length of a file, nodes on a channel. ``python -m benchmarks.growth [--dir D]``.

Writes ``docs/growth.png`` and, beside it, ``docs/growth.json``, the numbers that made it. The store of a million
objects is on a tmpfs where there is one (6 GB of memory, six minutes): on a disk it is its journal that one measures,
12 GB and half an hour of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tests.net.nginx import nginx

from benchmarks import storing
from benchmarks.moving import CHANNEL, load_once
from benchmarks.network_growth import measure_network_growth
from benchmarks.objects import program
from kachery_fast._core import FusedSha1, Sha1
from kachery_fast.protocol.manifest import make_manifest
from kachery_fast.protocol.names import FileUri, object_name, parse_file_uri

CHUNK_SIZE_BYTES = 20 << 20
LOAD_SIZES_BYTES = tuple(size << 20 for size in (20, 80, 320, 1280, 2560, 5120, 8192))
STORE_COUNTS = (1_000, 10_000, 100_000, 1_000_000)


def loads(directory: Path, sizes: tuple[int, ...] = LOAD_SIZES_BYTES) -> list[dict[str, float]]:
    """Seconds and peak memory of a verified load, each in a process of its own, nginx serving the chunks."""
    rows = []
    for size in sizes:
        with _served(directory, size) as (url, uri):
            done = subprocess.run([sys.executable, "-m", "benchmarks.growth", "--load", url, str(uri), "--dir",
                                   str(directory)], check=True, capture_output=True, text=True)
            rows.append({"size_bytes": size, **json.loads(done.stdout)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


@contextmanager
def _served(directory: Path, size: int) -> Iterator[tuple[str, FileUri]]:
    root = directory / "www"
    words = np.random.Generator(np.random.SFC64(1)).integers(0, 1 << 64, CHUNK_SIZE_BYTES // 8, dtype=np.uint64)
    digests = FusedSha1(CHUNK_SIZE_BYTES)
    for number, start in enumerate(range(0, size, CHUNK_SIZE_BYTES)):
        key = np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)
        data = (words ^ key).view(np.uint8)[:min(CHUNK_SIZE_BYTES, size - start)]
        digests.update(data)
        _place(root, Sha1(data).hexdigest(), data.tobytes())
    found = digests.finish()
    manifest_sha1 = None
    if len(found.chunk_sha1s) > 1:
        manifest = make_manifest(found.size, found.sha1, found.chunk_sha1s, CHUNK_SIZE_BYTES)
        manifest_sha1 = manifest.name
        _place(root, manifest_sha1, manifest.encode())
    with nginx(root, directory / "nginx", program=program("nginx"), workers=2) as url:
        yield url, FileUri(found.sha1, "", manifest_sha1)
    for folder in ("www", "nginx", "B"):
        shutil.rmtree(directory / folder, ignore_errors=True)


def _place(root: Path, sha1: str, data: bytes) -> None:
    path = root / object_name(CHANNEL, sha1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _load_here(url: str, uri: str, directory: Path) -> None:
    seconds = asyncio.run(load_once(url, parse_file_uri(uri), directory / "B"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak}))


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the three curves into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (store, load, network) = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    counts = [row["objects"] for row in found["store"]]
    for key, label in (("put_us", "store a new object"), ("put_again_us", "store what is there"),
                       ("find_us", "look up"), ("miss_us", "look up in vain")):
        store.plot(counts, [row[key] for row in found["store"]], "o-", label=label)
    store.set(xscale="log", yscale="log", xlabel="objects in the store", ylabel="microseconds, median",
              title=f"One operation, by objects in the store ({found['store_on']})")
    store.legend()
    sizes = [row["size_bytes"] / 2**30 for row in found["load"]]
    load.plot(sizes, [row["seconds"] for row in found["load"]], "o-", label="seconds")
    load.set(xlabel="GiB", ylabel="seconds", title="Verified load, by length of the file")
    memory = load.twinx()
    memory.plot(sizes, [row["peak_rss_bytes"] / 2**20 for row in found["load"]], "s--", color="tab:red")
    memory.set(ylabel="peak resident memory, MiB (dashed)", ylim=(0, 512))
    nodes = [row["nodes"] for row in found["network"]]
    network.plot(nodes, [row["messages"] for row in found["network"]], "o-", label="messages of the request")
    network.plot(nodes, [row["bystander_messages"] for row in found["network"]], "o-",
                 label="of them, looked at by a node without the file")
    network.plot(nodes, [row["seconds"] for row in found["network"]], "s--", label="seconds (simulated)")
    network.set(xscale="log", ylim=(0, None), xlabel="nodes on the channel",
                title="One request, by nodes on the channel")
    network.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, write the numbers, draw them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--dir", type=Path, default=None, help="where to work; 30 GB free")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="where the picture and its numbers go")
    parser.add_argument("--load", nargs=2, metavar=("URL", "URI"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        url, uri = options.load
        _load_here(url, uri, options.dir)
        return
    place = Path(tempfile.mkdtemp(prefix="kachery-growth-", dir=options.dir))
    try:
        found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
        found["load"] = loads(place)
        found["network"] = [asdict(row) for row in measure_network_growth()]
        memory = Path("/dev/shm")
        found["store_on"] = "tmpfs" if memory.is_dir() else "disk"
        crowd = Path(tempfile.mkdtemp(prefix="kachery-growth-", dir=memory if memory.is_dir() else place))
        try:
            found["store"] = [row._asdict() for row in storing.growth(crowd, STORE_COUNTS)]
        finally:
            shutil.rmtree(crowd, ignore_errors=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    (options.out / "growth.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, options.out / "growth.png")


if __name__ == "__main__":
    main()
