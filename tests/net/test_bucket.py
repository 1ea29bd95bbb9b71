"""What each answer of a bucket means, retries included; against faults, nginx, and the bucket in memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.config import load_settings
from kachery_fast.errors import (
    BucketUnreachable,
    FileChanged,
    KacheryError,
    ObjectMissing,
    PartialTransfer,
    Stalled,
    TooLarge,
    UploadRefused,
    UrlExpired,
    WrongSize,
)
from kachery_fast.net.bucket import Bucket, HttpBucket, SignedUpload
from kachery_fast.net.memory import MemoryBucket
from kachery_fast.net.ranges import RangeClient
from tests.net.faulty import FaultyServer, Step, answer, field, message, part_of, read_body, serve, silent
from tests.net.nginx import nginx
from tests.network import LOOPS, run_on

DATA = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(3 * 32 * 1024))  # 3 MiB
NAME = "ch1/sha1/02/5b/46/025b4666424a0116c45970c27af4e2f90177af69"
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)


class Pauses:
    """An injected sleep that notes what it was asked for, with jitter drawn at its upper end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)

    @staticmethod
    def uniform(low: float, high: float) -> float:
        assert low == 0.0
        return high


def with_bucket(loop_kind: str, url: str, work: Callable[[HttpBucket], Any],
                **overrides: Any) -> tuple[Any, list[float]]:
    """Run ``work`` on a bucket; its result or the error of ours that it raised, and the pauses made."""
    settings = load_settings({}, **{"stall_seconds": 0.3, **overrides})
    pauses = Pauses()

    async def main() -> Any:
        client = RangeClient(settings, concurrency=2)
        try:
            return await work(HttpBucket(f"{url}/bucket/", client, settings, sleep=pauses.sleep,
                                         uniform=pauses.uniform))
        except KacheryError as error:
            return error
        finally:
            await client.close()
    return run_on(loop_kind, main()), pauses.seconds


def fetch(loop_kind: str, server: FaultyServer, size: int = len(DATA),
          **overrides: Any) -> tuple[Any, bytes, int, list[float]]:
    """Receive the object: the result or error, the memory, the bytes reported as progress, the pauses."""
    memory, counts = bytearray(size), [0]
    result, pauses = with_bucket(
        loop_kind, server.url,
        lambda bucket: bucket.get_into(NAME, memoryview(memory), progress=counts.append), **overrides)
    return result, bytes(memory), sum(counts), pauses


def test_an_object_is_received_whole(loop_kind: str) -> None:
    with FaultyServer(serve(DATA)) as server:
        assert fetch(loop_kind, server) == (None, DATA, len(DATA), [])
        assert server.heads[0].startswith(b"GET /bucket/ch1/sha1/02/5b/46/025b4666424a0116c45970c27af4e2f90177af69 ")


@pytest.mark.parametrize("ending", ["close", "reset", "hang"])
def test_a_broken_transfer_goes_on_where_it_broke_off(loop_kind: str, ending: str) -> None:
    with FaultyServer(part_of(DATA, 1_000_000, ending), part_of(DATA, 500_000, ending), serve(DATA)) as server:
        result, memory, counted, pauses = fetch(loop_kind, server)
        ranges = [int(field(head, "range").removeprefix("bytes=").split("-")[0]) for head in server.heads[1:]]
    assert (result, memory, counted) == (None, DATA, len(DATA))
    assert len(pauses) == 2
    if ending != "reset":
        assert ranges == [1_000_000, 1_500_000]
    assert ranges == sorted(ranges)


def test_a_transfer_that_moves_is_tried_more_often_than_one_that_does_not(loop_kind: str) -> None:
    steps = [part_of(DATA, 300_000)] * 9
    with FaultyServer(*steps, serve(DATA)) as server:
        result, memory, _, _ = fetch(loop_kind, server, retry_attempts_max=2, small_read_size_bytes=262144)
    assert (result, memory) == (None, DATA)
    with FaultyServer(part_of(DATA, 1000)) as server:
        error, memory, _, _ = fetch(loop_kind, server, retry_attempts_max=3)
        assert len(server.heads) == 3
    assert isinstance(error, PartialTransfer)
    assert error.details["received"] == 3000
    assert error.details["object"] == NAME
    assert memory == DATA[:3000] + bytes(len(DATA) - 3000)


def test_a_server_without_ranges_is_read_from_the_start_again(loop_kind: str) -> None:
    with FaultyServer(part_of(DATA, 2_000_000), answer(200, DATA)) as server:
        result, memory, counted, _ = fetch(loop_kind, server)
    assert (result, memory, counted) == (None, DATA, len(DATA))


@pytest.mark.parametrize(("status", "body", "error"), [
    (404, b"", ObjectMissing), (403, b"AccessDenied", UploadRefused), (401, b"", UploadRefused),
    (302, b"", UploadRefused), (400, b"", UploadRefused), (416, b"", WrongSize), (403, EXPIRED, UrlExpired),
    (404, b"<Error><Code>NoSuchBucket</Code></Error>", UploadRefused),
    (404, b"<Error><Code>NoSuchKey</Code></Error>", ObjectMissing),
])
def test_answers_that_do_not_pass_are_not_tried_again(loop_kind: str, status: int, body: bytes,
                                                      error: type[KacheryError]) -> None:
    with FaultyServer(answer(status, body, location="http://127.0.0.1:1/")) as server:
        raised, memory, counted, pauses = fetch(loop_kind, server)
        assert len(server.heads) == 1
    assert type(raised) is error
    assert (memory, counted, pauses) == (bytes(len(DATA)), 0, [])


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_troubles_are_tried_again_with_back_off(loop_kind: str, status: int) -> None:
    with FaultyServer(*[answer(status)] * 4, serve(DATA)) as server:
        result, memory, _, pauses = fetch(loop_kind, server, retry_base_seconds=1.0, retry_cap_seconds=3.0)
    assert (result, memory) == (None, DATA)
    assert pauses == [1.0, 2.0, 3.0, 3.0]
    with FaultyServer(answer(status, b"broken")) as server:
        raised, _, _, pauses = fetch(loop_kind, server)
        assert len(server.heads) == 5
    assert isinstance(raised, BucketUnreachable)
    assert raised.details["attempts"] == 5
    assert "broken" in raised.message


@pytest.mark.parametrize(("value", "seconds"), [
    ("7", 7.0), ("100000", 30.0), ("Fri, 20 Nov 2026 12:00:09 GMT", 9.0), ("Fri, 20 Nov 2026 11:00:00 GMT", 0.25),
    ("soon", 0.25), ("-3", 0.25),
])
def test_retry_after_is_honoured_within_bounds(loop_kind: str, value: str, seconds: float) -> None:
    with FaultyServer(answer(503, retry_after=value, date="Fri, 20 Nov 2026 12:00:00 GMT"), serve(DATA)) as server:
        result, _, _, pauses = fetch(loop_kind, server)
    assert result is None
    assert pauses == [seconds]


@pytest.mark.parametrize(("step", "error"), [(silent(), BucketUnreachable), (silent("reset"), BucketUnreachable),
                                             (silent("hang"), Stalled)])
def test_silence_is_tried_again_and_named_in_the_end(loop_kind: str, step: Any, error: type[KacheryError]) -> None:
    with FaultyServer(step) as server:
        raised, _, _, pauses = fetch(loop_kind, server, retry_attempts_max=3)
        assert len(server.heads) == 3
    assert type(raised) is error
    assert raised.details["object"] == NAME
    assert NAME in raised.message
    assert pauses == [0.25, 0.5]


def test_size_and_small_objects(loop_kind: str) -> None:
    def step(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(message(200, DATA[:1000])[:-1000 if head.startswith(b"HEAD") else None])
        return True
    with FaultyServer(answer(500), step) as server:
        async def work(bucket: HttpBucket) -> tuple[int, bytes]:
            return await bucket.size(NAME), await bucket.get_small(NAME, 1000)
        assert with_bucket(loop_kind, server.url, work)[0] == (1000, DATA[:1000])
        assert isinstance(with_bucket(loop_kind, server.url, lambda bucket: bucket.get_small(NAME, 999))[0], TooLarge)
    with FaultyServer(answer(404)) as server:
        for ask in (lambda bucket: bucket.size(NAME), lambda bucket: bucket.get_small(NAME, 10)):
            assert isinstance(with_bucket(loop_kind, server.url, ask)[0], ObjectMissing)


def test_why_head_is_refused_is_asked_for_by_get(loop_kind: str) -> None:
    said = (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code><Message>Access\x1b Denied</Message>"
            b"<RequestId>0123456789</RequestId></Error>")
    with FaultyServer(answer(403), answer(403, said)) as server:
        raised, _ = with_bucket(loop_kind, server.url, lambda bucket: bucket.size(NAME))
        assert [head.split()[0] for head in server.heads] == [b"HEAD", b"GET"]
    assert isinstance(raised, UploadRefused)
    assert "AccessDenied: Access Denied (HTTP 403)" in raised.message
    with FaultyServer(answer(403), serve(DATA)) as server:
        assert with_bucket(loop_kind, server.url, lambda bucket: bucket.size(NAME))[0] == len(DATA)
        assert field(server.heads[1], "range") == "bytes=0-0"


# --- uploads


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


def upload(loop_kind: str, server: FaultyServer, path: Path, length: int = 2_000_000,
           **overrides: Any) -> tuple[Any, int, list[float]]:
    """Upload a part of the file: the result or error, the bytes reported as progress, the pauses."""
    counts = [0]
    signed = SignedUpload(NAME, f"{server.url}/bucket/{NAME}?signature=1",
                          {"x-goog-if-generation-match": "0", "x-goog-content-length-range": f"{length},{length}"})
    fd = os.open(path, os.O_RDONLY)
    try:
        result, pauses = with_bucket(
            loop_kind, server.url,
            lambda bucket: bucket.put_from(signed, fd, 1_000_000, length, progress=counts.append), **overrides)
    finally:
        os.close(fd)
    return result, sum(counts), pauses


def taking(bodies: list[bytes]) -> Step:
    """Take an upload, and keep its body."""
    def step(sock: socket.socket, head: bytes) -> bool:
        bodies.append(read_body(sock, head))
        sock.sendall(message(200))
        return True
    return step


def test_an_upload_sends_the_signed_headers_and_the_bytes(loop_kind: str, data_file: Path) -> None:
    bodies: list[bytes] = []
    with FaultyServer(taking(bodies)) as server:
        assert upload(loop_kind, server, data_file) == (True, 2_000_000, [])
        head = server.heads[0]
    assert bodies == [DATA[1_000_000:3_000_000]]
    assert head.startswith(b"PUT /bucket/" + NAME.encode() + b"?signature=1 HTTP/1.1")
    assert field(head, "x-goog-if-generation-match") == "0"
    assert field(head, "x-goog-content-length-range") == "2000000,2000000"


def test_an_object_that_exists_counts_as_uploaded(loop_kind: str, data_file: Path) -> None:
    with FaultyServer(answer(412)) as server:
        assert upload(loop_kind, server, data_file)[0] is False


@pytest.mark.parametrize(("status", "body", "error"), [
    (403, EXPIRED, UrlExpired), (400, EXPIRED, UrlExpired), (403, b"Request has expired", UrlExpired),
    (403, b"", UrlExpired), (403, b"<Code>SignatureDoesNotMatch</Code>", UploadRefused),
    (400, b"<Code>EntityTooSmall</Code>", UploadRefused), (404, b"NoSuchBucket", UploadRefused),
    (307, b"", UploadRefused), (411, b"", UploadRefused), (413, b"", UploadRefused),
])
def test_refused_uploads_are_told_apart(loop_kind: str, data_file: Path, status: int, body: bytes,
                                        error: type[KacheryError]) -> None:
    with FaultyServer(answer(status, body, connection="close", keep=False)) as server:
        raised, _, pauses = upload(loop_kind, server, data_file)
        assert len(server.heads) == 1
    assert type(raised) is error
    assert raised.details["object"] == NAME
    assert pauses == []


def test_leave_for_a_bucket_of_another_kind_is_asked_for_anew(loop_kind: str, data_file: Path) -> None:
    leave = SignedUpload(NAME, f"file:///folder/{NAME}", {})
    with FaultyServer(answer(200)) as server, data_file.open("rb") as file:
        for put_it in (lambda bucket: bucket.put_from(leave, file.fileno(), 0, 10),
                       lambda bucket: bucket.put_bytes(leave, b"x")):
            raised, _ = with_bucket(loop_kind, server.url, put_it)
            assert type(raised) is UrlExpired
        assert server.heads == []


@pytest.mark.parametrize("code", [b"BadDigest", b"RequestTimeout"])
def test_a_refusal_of_s3_that_may_pass_is_tried_again(loop_kind: str, data_file: Path, code: bytes) -> None:
    refusal = answer(400, b"<Error><Code>" + code + b"</Code></Error>")
    with FaultyServer(refusal, answer(200)) as server:
        assert upload(loop_kind, server, data_file)[:2] == (True, 2_000_000)


def test_uploads_are_tried_again_from_the_start(loop_kind: str, data_file: Path) -> None:
    def broken(sock: socket.socket, head: bytes) -> bool:
        sock.recv(1000)
        return False
    with FaultyServer(broken, answer(503, retry_after="2"), answer(409), answer(200)) as server:
        result, counted, pauses = upload(loop_kind, server, data_file)
    assert result is True
    assert counted == 2_000_000
    assert pauses == [0.25, 2.0, 1.0]


def test_an_upload_gives_up_after_all_tries(loop_kind: str, data_file: Path) -> None:
    with FaultyServer(answer(500, b"no")) as server:
        raised, _, _ = upload(loop_kind, server, data_file, retry_attempts_max=3)
        assert len(server.heads) == 3
    assert isinstance(raised, BucketUnreachable)
    with FaultyServer(silent("hang")) as server:
        raised, _, _ = upload(loop_kind, server, data_file, retry_attempts_max=2)
    assert isinstance(raised, Stalled)


def test_a_file_that_ends_too_early_is_not_tried_again(loop_kind: str, data_file: Path) -> None:
    with FaultyServer(answer(200)) as server:
        raised, _, pauses = upload(loop_kind, server, data_file, length=len(DATA))
    assert isinstance(raised, FileChanged)
    assert pauses == []


# --- bytes from memory


def put(loop_kind: str, server: FaultyServer, data: bytes, **overrides: Any) -> tuple[Any, list[float]]:
    signed = SignedUpload(NAME, f"{server.url}/bucket/{NAME}?signature=1",
                          {"x-goog-content-length-range": f"{len(data)},{len(data)}"})
    return with_bucket(loop_kind, server.url, lambda bucket: bucket.put_bytes(signed, data), **overrides)


def test_bytes_are_sent_with_the_signed_headers(loop_kind: str) -> None:
    bodies: list[bytes] = []
    with FaultyServer(taking(bodies)) as server:
        for data in (DATA, b"", b"x"):
            assert put(loop_kind, server, data) == (True, [])
            assert bodies.pop() == data
        assert server.heads[0].startswith(b"PUT /bucket/" + NAME.encode() + b"?signature=1 HTTP/1.1")
        assert field(server.heads[0], "x-goog-content-length-range") == f"{len(DATA)},{len(DATA)}"
        assert "if-generation-match" not in server.heads[0].decode()


def test_bytes_that_could_not_be_sent_are_sent_again_from_the_start(loop_kind: str) -> None:
    def broken(sock: socket.socket, head: bytes) -> bool:
        sock.recv(1000)
        return False
    bodies: list[bytes] = []
    with FaultyServer(broken, answer(429, retry_after="2"), taking(bodies)) as server:
        assert put(loop_kind, server, DATA) == (True, [0.25, 2.0])
    assert bodies == [DATA]


@pytest.mark.parametrize(("status", "body", "error"), [
    (403, EXPIRED, UrlExpired), (403, b"<Code>SignatureDoesNotMatch</Code>", UploadRefused), (413, b"", UploadRefused),
    (500, b"", BucketUnreachable),
])
def test_what_becomes_of_bytes_is_told_apart_as_for_files(loop_kind: str, status: int, body: bytes,
                                                          error: type[KacheryError]) -> None:
    with FaultyServer(answer(status, body, connection="close", keep=False)) as server:
        raised, _ = put(loop_kind, server, DATA)
    assert type(raised) is error
    with FaultyServer(answer(412)) as server:
        assert put(loop_kind, server, b"abc") == (False, [])


def test_bytes_go_out_beside_the_bulk_of_files(loop_kind: str, data_file: Path) -> None:
    """A segment of a feed is not to wait for the recordings that are being moved."""
    held = threading.Event()

    def step(sock: socket.socket, head: bytes) -> bool:
        read_body(sock, head)
        if b"/bulk" in head:
            held.wait(20)
        sock.sendall(message(200))
        return True

    with FaultyServer(step) as server, data_file.open("rb") as file:
        async def work(bucket: HttpBucket) -> bool:
            bulk = [asyncio.ensure_future(bucket.put_from(SignedUpload("bulk", f"{server.url}/bulk", {}),
                                                          file.fileno(), 0, 1000)) for _ in range(2)]
            while len(server.heads) < 2:
                await asyncio.sleep(0.001)
            done = await bucket.put_bytes(SignedUpload("small", f"{server.url}/small", {}), b"abc")
            held.set()
            return done and all(await asyncio.gather(*bulk))
        assert with_bucket(loop_kind, server.url, work, stall_seconds=15.0) == (True, [])


def test_a_fresh_copy_is_asked_for_by_a_name_that_no_cache_knows(loop_kind: str) -> None:
    with FaultyServer(answer(200, b"{}")) as server:
        async def work(bucket: HttpBucket) -> list[bytes]:
            return [await bucket.get_small(NAME, 10, fresh=fresh) for fresh in (True, True, False)]
        assert with_bucket(loop_kind, server.url, work)[0] == [b"{}"] * 3
        paths = [head.split()[1].decode() for head in server.heads]
    assert all(re.fullmatch(rf"/bucket/{NAME}\?cb=[0-9a-f]{{10}}", path) for path in paths[:2])
    assert paths[0] != paths[1]
    assert paths[2] == f"/bucket/{NAME}"


# --- a foreign peer


def test_nginx_serves_whole_objects_ranges_and_sizes(loop_kind: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    target = root / "bucket" / NAME
    target.parent.mkdir(parents=True)
    target.write_bytes(DATA)
    memory = bytearray(len(DATA))
    with nginx(root, tmp_path / "nginx", keepalive_seconds=1) as url:
        async def work(bucket: HttpBucket) -> None:
            await asyncio.gather(*(bucket.get_into(NAME, memoryview(memory)) for _ in range(3)))
            assert memory == DATA
            assert await bucket.size(NAME) == len(DATA)
            with pytest.raises(WrongSize):
                await bucket.get_into(NAME, memoryview(memory)[1:])
            with pytest.raises(ObjectMissing):
                await bucket.size(NAME[:-1] + "0")
            part = bytearray(70_001)
            received = await bucket._client.receive(f"{url}/bucket/{NAME}", memoryview(part), start=1_500_000,
                                                    total=len(DATA))
            assert received.object_size_bytes == len(DATA)
            assert part == DATA[1_500_000:1_570_001]
            beyond = await bucket._client.receive(f"{url}/bucket/{NAME}", memoryview(part), start=len(DATA))
            assert beyond.response.status == 416
        assert with_bucket(loop_kind, url, work, stall_seconds=5) == (None, [])


# --- in memory


def test_the_bucket_in_memory_has_the_same_manners(loop_kind: str, data_file: Path) -> None:
    async def main() -> None:
        memory = MemoryBucket()
        bucket: Bucket = memory
        counts: list[int] = []
        with data_file.open("rb") as file:
            assert await bucket.put_from(memory.sign(NAME), file.fileno(), 5, 100, progress=counts.append)
            assert not await bucket.put_from(memory.sign(NAME), file.fileno(), 5, 100)
            with pytest.raises(FileChanged):
                await bucket.put_from(memory.sign("x"), file.fileno(), len(DATA) - 1, 2)
        target = bytearray(100)
        await bucket.get_into(NAME, memoryview(target), progress=counts.append)
        assert target == DATA[5:105] == await bucket.get_small(NAME, 100)
        assert await bucket.size(NAME) == 100
        assert counts == [100, 100]
        with pytest.raises(WrongSize):
            await bucket.get_into(NAME, memoryview(target)[1:])
        with pytest.raises(TooLarge):
            await bucket.get_small(NAME, 99)
        with pytest.raises(ObjectMissing):
            await bucket.size("other")
        assert await bucket.put_bytes(memory.sign("small"), b"abc")
        assert not await bucket.put_bytes(memory.sign("small"), b"xyz")
        assert await bucket.get_small("small", 3, fresh=True) == b"abc"
        assert await bucket.put_bytes(memory.sign("small", replace=True), b"xyz")
        assert await bucket.get_small("small", 3) == b"xyz"
        memory.corrupt(NAME)
        assert await bucket.get_small(NAME, 100) != DATA[5:105]
        memory.fail(NAME, Stalled(what="it", seconds=1))
        with pytest.raises(Stalled):
            await bucket.size(NAME)
        memory.gate.clear()
        waiting = asyncio.ensure_future(bucket.size(NAME))
        await asyncio.sleep(0)
        assert not waiting.done()
        memory.gate.set()
        assert await waiting == 100
        assert memory.puts == [NAME, "small", "small"]
    run_on(loop_kind, main())
