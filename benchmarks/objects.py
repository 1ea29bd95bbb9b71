"""Objects over loopback: receiving into a file beside curl and rclone, uploading beside curl.

Both sides share the machine's cores with the server. Ours runs in this process, as it does in a node, on a fresh
event loop and fresh connections each time; a rival's figure includes the start of its program (20 to 50 ms). Data
are in the page cache, files on the file system of ``directory``.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.net.nginx import nginx

from benchmarks.measure import Figure, figure, make_file, pairs
from kachery_fast import _core
from kachery_fast.config import load_settings
from kachery_fast.embedded.bucket import BucketServer, UploadSigner
from kachery_fast.net.bucket import FileSpan, HttpBucket, SignedUpload, Target
from kachery_fast.net.ranges import RangeClient

__all__ = [
    "CHUNK_SIZE_BYTES", "CONCURRENCY", "check_same", "cut", "object_names", "program", "receive_versus_curl",
    "receive_versus_rclone", "run_together", "spans_of", "upload_versus_curl",
]

CHUNK_SIZE_BYTES = 20 << 20
CONCURRENCY = 4
GB = 1e9
CHANNEL = "bench"
SECRET = b"the secret of a bucket that lives for one benchmark"


def receive_versus_curl(directory: Path, size_bytes: int = 2 << 30, count: int = 5, *,
                        mapped: bool = False) -> Figure:
    """Four chunks at once from nginx into a file, beside curl fetching one object to nothing.

    :param mapped: receive into a shared mapping of the file instead of splicing into the file.
    """
    curl = program("curl")
    with _nginx(directory, size_bytes) as (url, source):
        ours = _receiver(url, source, directory / "received.dat", mapped=mapped)
        command = [curl, "-sS", "-o", os.devnull, f"{url}/whole"]
        measured = pairs(ours, lambda: _timed(size_bytes, [command]), count)
    return figure(f"receive into a {_kind(mapped)} / curl to nothing", measured, unit="GB/s", bar="shown",
                  note=_note(size_bytes))


def receive_versus_rclone(directory: Path, size_bytes: int = 2 << 30, count: int = 5, *,
                          mapped: bool = False) -> Figure:
    """Four chunks at once from nginx into a file, beside rclone fetching one object to a file.

    :param mapped: receive into a shared mapping of the file instead of splicing into the file.
    """
    rclone = program("rclone")
    target = directory / "rclone.dat"
    with _nginx(directory, size_bytes) as (url, source):
        ours = _receiver(url, source, directory / "received.dat", mapped=mapped)
        command = [rclone, "copyto", "--config", os.devnull, "--http-url", url, "--multi-thread-streams",
                   str(CONCURRENCY), "--multi-thread-cutoff", "64M", "--retries", "1", ":http:whole", str(target)]

        def rival() -> float:
            target.unlink(missing_ok=True)
            return _timed(size_bytes, [command])
        rival()
        check_same(source, target)
        measured = pairs(ours, rival, count)
    target.unlink()
    return figure(f"receive into a {_kind(mapped)} / rclone", measured, unit="GB/s", bar="shown",
                  note=_note(size_bytes))


def upload_versus_curl(directory: Path, size_bytes: int = 2 << 30, count: int = 5) -> Figure:
    """The chunks of a file to the embedded bucket, four at once, beside four ``curl -T`` that send the same.

    Each curl sends every fourth chunk, from a file of its own, over one connection that it keeps.
    """
    curl = program("curl")
    spans = spans_of(size_bytes)
    names = object_names(len(spans))
    source = make_file(directory / "upload.dat", size_bytes)
    pieces = directory / "pieces"
    pieces.mkdir()
    cut(source, pieces, names)
    root = directory / "bucket"
    with _embedded_bucket(root) as (base_url, sign):
        def signed() -> list[SignedUpload]:
            shutil.rmtree(root / CHANNEL, ignore_errors=True)
            return [sign(name, length) for name, (_, length) in zip(names, spans, strict=True)]

        def ours() -> float:
            uploads = signed()
            fd = os.open(source, os.O_RDONLY)
            try:
                return size_bytes / GB / run_together(base_url, lambda bucket: [
                    bucket.put_from(upload, fd, offset, length)
                    for upload, (offset, length) in zip(uploads, spans, strict=True)])
            finally:
                os.close(fd)

        def rival() -> float:
            uploads = signed()
            commands = []
            for lane in range(CONCURRENCY):
                script = directory / f"curl-{lane}"
                sections = [_curl_upload(pieces, upload) for upload in uploads[lane::CONCURRENCY]]
                script.write_text("\nnext\n".join(sections))
                commands.append([curl, "-K", str(script)])
            return _timed(size_bytes, commands)

        for warm_up in (ours, rival):
            warm_up()
            check_same(source, *(root / name for name in names))
        measured = pairs(ours, rival, count)
    source.unlink()
    shutil.rmtree(pieces)
    shutil.rmtree(root)
    return figure("upload to the embedded bucket / 4 x curl -T", measured, unit="GB/s", bar=">= 1.0",
                  note=_note(size_bytes))


def _kind(mapped: bool) -> str:
    return "mapping" if mapped else "file"


def _receiver(url: str, source: Path, target: Path, *, mapped: bool) -> Callable[[], float]:
    """A measurement: allocate a file and receive all chunks into it; the first outcome is also compared."""
    size_bytes = source.stat().st_size
    spans = spans_of(size_bytes)
    names = object_names(len(spans))

    def receive() -> float:
        target.unlink(missing_ok=True)
        start = time.perf_counter()
        fd = os.open(target, os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(fd, 0, size_bytes)
        with mmap.mmap(fd, size_bytes) as mapping, memoryview(mapping) as memory:
            views = [memory[offset:offset + length] for offset, length in spans]
            spliced: list[Target] = [FileSpan(fd, offset, length) for offset, length in spans]
            targets: list[Target] = [*views] if mapped else spliced
            run_together(url, lambda bucket: [bucket.get_into(name, target)
                                      for name, target in zip(names, targets, strict=True)])
            seconds = time.perf_counter() - start
            for view in views:
                view.release()
        os.close(fd)
        return size_bytes / GB / seconds

    receive()
    check_same(source, target)
    return receive


def run_together(base_url: str, operations: Callable[[HttpBucket], list[Awaitable[object]]]) -> float:
    """Perform ``operations`` together on a fresh loop and client; returns the seconds they took."""
    async def main() -> float:
        settings = load_settings({})
        client = RangeClient(settings, concurrency=CONCURRENCY)
        start = time.perf_counter()
        await asyncio.gather(*operations(HttpBucket(base_url, client, settings)))
        seconds = time.perf_counter() - start
        await client.close()
        return seconds
    return asyncio.run(main())


def _timed(size_bytes: int, commands: list[list[str]]) -> float:
    start = time.perf_counter()
    processes = [subprocess.Popen(command) for command in commands]
    for process in processes:
        if process.wait() != 0:
            raise AssertionError(f"{process.args!r} failed")
    return size_bytes / GB / (time.perf_counter() - start)


@contextmanager
def _nginx(directory: Path, size_bytes: int) -> Iterator[tuple[str, Path]]:
    """nginx with one object ``whole`` and the same bytes as chunks; yields its URL and the path of the whole."""
    root = directory / "www"
    root.mkdir()
    whole = make_file(root / "whole", size_bytes)
    cut(whole, root, object_names(len(spans_of(size_bytes))))
    with nginx(root, directory / "nginx", program=program("nginx"), workers=2) as url:
        yield url, whole
    shutil.rmtree(root)
    (directory / "received.dat").unlink(missing_ok=True)


@contextmanager
def _embedded_bucket(root: Path) -> Iterator[tuple[str, Callable[[str, int], SignedUpload]]]:
    """The embedded bucket in a process of its own; yields its URL and a signer of uploads to it."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.objects", str(root)], stdout=subprocess.PIPE,
                               stdin=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    base_url = f"http://127.0.0.1:{int(process.stdout.readline())}/bucket"
    signer = UploadSigner(SECRET)
    try:
        yield base_url, lambda name, size: SignedUpload(name, *signer.sign(name, size, 3600, base_url))
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(20)


def _serve_bucket(root: Path) -> None:
    """Serve until standard input ends."""


    server = BucketServer(root, UploadSigner(SECRET), load_settings({}))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            server.serve(listener.accept()[0])
    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()
    server.close()


def spans_of(size_bytes: int) -> list[tuple[int, int]]:
    """Where the chunks of a file begin, and how long they are."""
    return [(start, min(CHUNK_SIZE_BYTES, size_bytes - start)) for start in range(0, size_bytes, CHUNK_SIZE_BYTES)]


def object_names(count: int) -> list[str]:
    """Names of so many objects of the channel."""
    digests = (_core.Sha1(str(number).encode()).hexdigest() for number in range(count))
    return [f"{CHANNEL}/sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}" for sha1 in digests]


def cut(source: Path, folder: Path, names: list[str]) -> None:
    """Write each chunk of a file to a file of its own, with such a name below ``folder``."""
    with source.open("rb") as file:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(file.read(CHUNK_SIZE_BYTES))


def _curl_upload(pieces: Path, upload: SignedUpload) -> str:
    headers = "\n".join(f'header = "{name}: {value}"' for name, value in upload.headers.items())
    return (f'silent\nshow-error\nfail\noutput = "{os.devnull}"\n{headers}\n'
            f'upload-file = "{pieces / upload.object_name}"\nurl = "{upload.url}"')


def check_same(source: Path, *parts: Path) -> None:
    """:raises AssertionError: the parts together are not the file."""
    with source.open("rb") as file:
        for part in parts:
            with part.open("rb") as other:
                while data := other.read(CHUNK_SIZE_BYTES):
                    if data != file.read(len(data)):
                        raise AssertionError(f"{part} differs")
        if file.read(1):
            raise AssertionError("bytes are missing")


def program(name: str) -> str:
    """The path of a program, of this environment or the system. :raises FileNotFoundError: it is not installed."""
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin"]
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        raise FileNotFoundError(f"the program {name} is not installed")
    return path


def _note(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB in {CHUNK_SIZE_BYTES >> 20} MiB objects, {CONCURRENCY} at once, loopback"


if __name__ == "__main__":
    _serve_bucket(Path(sys.argv[1]))
