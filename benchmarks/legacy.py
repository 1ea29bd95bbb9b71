"""Storing by kachery-client 1.2.0 at a node, beside the same client sending to a handler that only counts the bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.lab import in_memory
from benchmarks.measure import Figure, figure, make_file, pairs
from kachery_fast.cli.lab import Lab, LabNode, free_port

__all__ = ["durable_store_versus_counting", "store_versus_counting"]

GB = 1e9
CLIENT = Path(__file__).parents[1] / ".venv-2022" / "bin" / "python"
# The client's own function for it, timed where its user waits; it reads the code as the client does.
SENDER = """
import os, sys, time
from kachery_client._misc import _http_post_file
for line in sys.stdin:
    url, path, auth = line.split()
    headers = {'KACHERY-CLIENT-AUTH-CODE': open(auth).read(), 'Content-Length': str(os.path.getsize(path))}
    begun = time.perf_counter()
    answer = _http_post_file(url, path, headers=headers)
    print(time.perf_counter() - begun, answer['sha1'], flush=True)
"""
COUNTER = """
import asyncio, sys
from aiohttp import web
import uvloop

async def store(request):
    size = 0
    async for piece in request.content.iter_any():
        size += len(piece)
    return web.json_response({'success': True, 'error': None, 'sha1': str(size), 'manifestSha1': None})

async def main():
    app = web.Application()
    app.add_routes([web.post('/store', store)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, '127.0.0.1', int(sys.argv[1])).start()
    print('ready', flush=True)
    await asyncio.Event().wait()

uvloop.run(main())
"""


def store_versus_counting(directory: Path, size_bytes: int = 1 << 30, count: int = 5) -> Figure:
    """With the node's store in memory, where there is nothing to flush: what API, digests and copy cost."""
    with in_memory() as place:
        return _measure(directory, place, size_bytes, count, bar=">= 0.8", note="the node's store in memory, no flush")


def durable_store_versus_counting(directory: Path, size_bytes: int = 1 << 30, count: int = 3) -> Figure:
    """With the node's store on the disk, to which every byte has been flushed when the node answers."""
    return _measure(directory, directory, size_bytes, count, bar="", note="flushed to the disk by the node")


def _measure(directory: Path, store: Path, size_bytes: int, count: int, *, bar: str, note: str) -> Figure:
    source = make_file(directory / "recording.dat", size_bytes)
    expected = hashlib.sha1(source.read_bytes(), usedforsecurity=False).hexdigest()
    with _counting() as counter, _node(store) as node, _sending() as send:
        auth = node.storage_dir / "client-auth"

        def ours() -> float:
            shutil.rmtree(node.storage_dir / "sha1", ignore_errors=True)
            return size_bytes / GB / send(f"http://127.0.0.1:{node.port}/store", source, auth, expected)

        def rival() -> float:
            return size_bytes / GB / send(counter, source, auth, str(size_bytes))

        measured = pairs(ours, rival, count)
    return figure("store by the client of 2022 / the same, only counted", measured, unit="GB/s", bar=bar,
                  note=f"{size_bytes >> 20} MiB, page cache warm; {note}")


@contextmanager
def _node(place: Path) -> Iterator[LabNode]:
    with Lab(place / "lab") as lab:
        node = lab.nodes["a"] = LabNode(lab, "a")
        node.start(connected=False)
        yield node


@contextmanager
def _counting() -> Iterator[str]:
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", COUNTER, str(port)], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            yield f"http://127.0.0.1:{port}/store"
        finally:
            server.terminate()


@contextmanager
def _sending() -> Iterator[Callable[[str, Path, Path, str], float]]:
    if not CLIENT.exists():
        raise FileNotFoundError("kachery-client 1.2.0 is not installed in .venv-2022 (make bench does that)")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with subprocess.Popen([str(CLIENT), "-W", "ignore", "-c", SENDER], env=environ, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        told, answers = client.stdin, client.stdout

        def send(url: str, path: Path, auth: Path, expected: str) -> float:
            print(url, path, auth, file=told, flush=True)
            seconds, sha1 = answers.readline().split()
            if sha1 != expected:
                raise AssertionError(f"{url} answered {sha1}, expected {expected}")
            return float(seconds)

        yield send
        told.close()
