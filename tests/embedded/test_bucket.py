"""The embedded bucket's semantics, asked by raw sockets and by curl."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.embedded.bucket import UploadSigner
from kachery_fast.embedded.bucket_files import ObjectFiles
from kachery_fast.embedded.bucket_http import ConnectionLimits, PutLeave, RateLimit, RequestHandler
from kachery_fast.embedded.bucket_incoming import Incoming
from kachery_fast.errors import InvalidArgument, InvalidName, ObjectMissing, TooLarge, UploadRefused, UrlExpired
from tests.embedded.bucket_server import (
    NAME,
    SECRET,
    Bucket,
    Clock,
    get_request,
    put_request,
    read_all,
    running_bucket,
    take_apart,
    wait_until,
)
from tests.native.disks import MIB, mounted
from tests.programs import need_program

DATA = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(65536)) + b"odd"  # 2 MiB and 3 bytes
OTHER = "ch1/sha1/02/5b/46/025b4666424a0116c45970c27af4e2f90177af60"
FEED = ("ch1/feeds/47/9d/11/479d11" + "a" * 58 + "/subfeeds/0a/1b/2c/0a1b2c" + "d" * 34)
INDEX = f"{FEED}/subfeed.json"
SEGMENT = f"{FEED}/segments/025b4666424a0116c45970c27af4e2f90177af69"
RESULT = NAME.replace("sha1/", "task_results/")


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    with running_bucket(tmp_path / "root") as bucket:
        yield bucket


# --- signatures


def test_a_signature_holds_for_its_life_and_its_object_alone() -> None:
    clock = Clock()
    signer = UploadSigner(SECRET, clock=clock)
    signed = signer.sign(NAME, 18, 300, "http://hub:1/bucket/")
    url, _, query = signed.url.partition("?")
    assert url == f"http://hub:1/bucket/{NAME}"
    assert signed.headers == {"x-goog-if-generation-match": "0", "x-goog-content-length-range": "18,18"}
    assert signer.verify(NAME, query) == PutLeave(18, False, "")
    clock.now += 299
    assert signer.verify(NAME, query) == PutLeave(18, False, "")
    clock.now += 1
    with pytest.raises(UrlExpired):
        signer.verify(NAME, query)
    clock.now -= 300
    with pytest.raises(UploadRefused):
        signer.verify(OTHER, query)
    with pytest.raises(UploadRefused):
        UploadSigner(b"another secret of a hub", clock=clock).verify(NAME, query)


@pytest.mark.parametrize("name", ["", "x", "../x", NAME.upper(), f"/{NAME}", f"{NAME}/"])
def test_only_object_names_are_signed(name: str) -> None:
    with pytest.raises(InvalidName):
        UploadSigner(SECRET).sign(name, 1, 1, "http://hub/bucket")


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        UploadSigner(b"short")


# --- names


@pytest.mark.parametrize("name", [
    NAME, RESULT, INDEX, SEGMENT, f"{FEED}/0", f"{FEED}/120",
    f"A.b-c_9{NAME[3:]}",
])
def test_objects_of_every_kind_go_in_and_out(bucket: Bucket, name: str) -> None:
    assert bucket.put(name, b"some bytes").status == 200
    answer = bucket.talk(get_request(f"/bucket/{name}"))
    assert (answer.status, answer.body) == (200, b"some bytes")
    assert bucket.files() == [name]


TRICKS = [
    NAME[4:], f"/{NAME}", f"./{NAME}", f"ch1/../{NAME}", f"ch1/%2e%2e/{NAME}", f"ch1/..%2f{NAME}",
    f"{NAME}%00", f"{NAME}%20", NAME.replace("/", "//", 1), NAME.replace("/", "\\"),
    NAME.replace("/", "%2f"), NAME.upper(), NAME.replace("ch1", ""), NAME.replace("025b4666", "025B4666"),
    NAME.replace("02/5b/46", "02/5b/47"), NAME[:-1], f"{NAME}0", f"{NAME}/", f"{NAME}/.",
    NAME.replace("sha1", "md5"), NAME.replace("ch1", ".incoming"), NAME.replace("ch1", "-ch1"),
    NAME.replace("ch1", "c" * 65), NAME.replace("ch1", "ch\u0661"), f"{FEED}/01", f"{FEED}/-1",
    f"{FEED}/subfeed.json.bak", FEED, "", "..", "etc/passwd", f"{FEED}/{'1' * 16}", f"{FEED}/segments", SEGMENT[:-1],
    f"{SEGMENT}0", SEGMENT.upper(), f"{FEED}/segments/subfeed.json", SEGMENT.replace("segments/", "segments/02/"),
    f"ch1/segments/{NAME[-40:]}", f"{FEED}/segments/../subfeed.json",
    NAME.replace("46/025b46", "46/025b46".replace("5", "٥")),
]


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_path_tricks_are_refused(bucket: Bucket, trick: str, method: str) -> None:
    bucket.put(NAME, b"some bytes")
    signed = bucket.sign(OTHER, 3)
    if method == "PUT":
        request = put_request(signed, b"abc", replace=(OTHER, trick))
    else:
        request = get_request(f"/bucket/{trick}", method=method)
    answer = bucket.talk(request, head_only=method == "HEAD")
    assert answer.status in (400, 403)
    assert bucket.files() == [NAME]
    if method == "PUT" and trick.isascii():
        # A signature for the trick itself, as from a hub that was tricked, does not help either.
        expires = str(int(bucket.clock()) + 100)
        forged = bucket.signer._signature(trick, "3", expires, "")
        query = f"X-Kachery-Expires={expires}&X-Kachery-Size=3&X-Kachery-Signature={forged}"
        request = put_request(signed._replace(url=f"{bucket.url}/{trick}?{query}"), b"abc")
        assert bucket.talk(request).status in (400, 403)
        assert bucket.files() == [NAME]


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("where", ["object", "folder", "channel"])
def test_symlinks_are_not_followed(bucket: Bucket, tmp_path: Path, where: str, method: str) -> None:
    outside = tmp_path / "outside" / NAME
    outside.parent.mkdir(parents=True)
    if method == "GET" or where == "object":
        outside.write_bytes(b"a secret")
    link = bucket.root / {"object": NAME, "folder": os.path.dirname(NAME), "channel": "ch1"}[where]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "outside" / link.relative_to(bucket.root))
    answer = bucket.talk(get_request(f"/bucket/{NAME}")) if method == "GET" else bucket.put(NAME, b"over it!")
    assert answer.status in (404, 412)
    assert b"secret" not in answer.body
    assert method == "GET" or where != "object" or outside.read_bytes() == b"a secret"
    assert method == "GET" or where == "object" or not outside.exists()


# --- refused uploads


def _other_object(bucket: Bucket) -> bytes:
    return put_request(bucket.sign(NAME, 3), b"abc", replace=(NAME, OTHER))


REFUSED: dict[str, tuple[Any, int]] = {
    "no signature": (lambda b: put_request(b.sign(NAME, 3), b"abc", replace=("X-Kachery-Signature", "X-Other")), 403),
    "no query": (lambda b: put_request(b.sign(NAME, 3)._replace(url=f"{b.url}/{NAME}"), b"abc"), 403),
    "forged": (lambda b: put_request(b.sign(NAME, 3), b"abc", replace=("Signature=", "Signature=0")), 403),
    "not ASCII": (lambda b: put_request(b.sign(NAME, 3), b"abc", replace=("Signature=", "Signature=%C3%A9")), 403),
    "later expiry": (lambda b: put_request(b.sign(NAME, 3), b"abc", replace=("Expires=1", "Expires=2")), 403),
    "other size signed": (lambda b: put_request(b.sign(NAME, 3), b"abcd", replace=("Size=3", "Size=4"),
                                                x_goog_content_length_range="4,4"), 403),
    "size twice": (lambda b: put_request(b.sign(NAME, 3), b"abc", replace=("Size=3", "Size=4&X-Kachery-Size=3")), 403),
    "size in other digits": (lambda b: put_request(b.sign(NAME, 3), b"abc", replace=("Size=3", "Size=03")), 403),
    "other object": (_other_object, 403),
    "other channel": (lambda b: put_request(b.sign(NAME, 3), b"abc", replace=("ch1/", "ch2/")), 403),
    "longer body": (lambda b: put_request(b.sign(NAME, 3), b"abcd"), 413),
    "shorter body": (lambda b: put_request(b.sign(NAME, 3), b"ab"), 400),
    "no length": (lambda b: put_request(b.sign(NAME, 3), b"", content_length=None), 411),
    "chunked": (lambda b: put_request(b.sign(NAME, 3), b"3\r\nabc\r\n0\r\n\r\n", content_length=None,
                                      transfer_encoding="chunked"), 411),
    "two lengths": (lambda b: put_request(b.sign(NAME, 3), b"abc", content_length="3\r\ncontent-length: 4"), 400),
    "length and chunked": (lambda b: put_request(b.sign(NAME, 3), b"abc", transfer_encoding="chunked"), 411),
    "not create-only": (lambda b: put_request(b.sign(NAME, 3), b"abc", x_goog_if_generation_match=None), 403),
    "of another generation": (lambda b: put_request(b.sign(NAME, 3), b"abc", x_goog_if_generation_match="7"), 403),
    "no length range": (lambda b: put_request(b.sign(NAME, 3), b"abc", x_goog_content_length_range=None), 403),
    "other length range": (lambda b: put_request(b.sign(NAME, 3), b"abc", x_goog_content_length_range="0,9"), 403),
    "POST": (lambda b: put_request(b.sign(NAME, 3), b"abc", method="POST"), 405),
    "DELETE": (lambda b: put_request(b.sign(NAME, 3), b"", method="DELETE"), 405),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_upload_that_is_not_what_was_signed_is_refused(bucket: Bucket, case: str) -> None:
    make, status = REFUSED[case]
    assert bucket.talk(make(bucket)).status == status
    assert bucket.files() == []
    assert bucket.put(NAME, b"abc").status == 200  # the same object, rightly signed, still goes in


def test_an_expired_upload_is_refused_and_says_so(bucket: Bucket) -> None:
    request = put_request(bucket.sign(NAME, 3), b"abc")
    bucket.clock.now += 300
    answer = bucket.talk(request)
    assert answer.status == 403
    assert b"<Code>ExpiredToken</Code>" in answer.body
    assert bucket.files() == []


def test_a_signature_does_not_read_or_delete(bucket: Bucket) -> None:
    bucket.put(NAME, b"abc")
    request = put_request(bucket.sign(NAME, 0), b"", method="DELETE")
    assert bucket.talk(request).status == 405
    assert bucket.files() == [NAME]


def test_an_object_is_created_once_and_the_second_body_is_not_awaited(bucket: Bucket) -> None:
    assert bucket.put(NAME, b"first").status == 200
    assert bucket.put(NAME, b"other").status == 412
    head = put_request(bucket.sign(NAME, 1 << 40), b"", content_length=str(1 << 40))
    assert bucket.talk(head).status == 412
    assert bucket.talk(get_request(f"/bucket/{NAME}")).body == b"first"


def test_of_racing_creators_exactly_one_wins(bucket: Bucket) -> None:
    requests = [put_request(bucket.sign(NAME, 4), body, connection="close") for body in (b"one!", b"two!", b"3rd!")]
    sockets = [bucket.connect() for _ in requests]
    for sock, request in zip(sockets, requests, strict=True):
        sock.sendall(request[:-1])
    wait_until(lambda: len(bucket.files()) == len(requests))  # all three were let in
    barrier = threading.Barrier(len(requests))

    def finish(sock: socket.socket, request: bytes) -> None:
        barrier.wait()
        sock.sendall(request[-1:])
    threads = [threading.Thread(target=finish, args=pair) for pair in zip(sockets, requests, strict=True)]
    for thread in threads:
        thread.start()
    statuses = [take_apart(read_all(sock)).status for sock in sockets]
    for thread, sock in zip(threads, sockets, strict=True):
        thread.join()
        sock.close()
    assert sorted(statuses) == [200, 412, 412]
    winner = requests[statuses.index(200)][-4:]
    assert bucket.talk(get_request(f"/bucket/{NAME}")).body == winner
    assert bucket.files() == [NAME]


# --- replaced objects


@pytest.mark.parametrize("name", [INDEX, RESULT])
def test_what_is_signed_to_be_replaced_is_replaced(bucket: Bucket, name: str) -> None:
    signed = bucket.sign(name, 5, replace=True)
    assert signed.headers == {"x-goog-content-length-range": "5,5"}
    etags = set()
    for body in (b"first", b"again", b"again"):
        assert bucket.talk(put_request(signed, body)).status == 200
        answer = bucket.talk(get_request(f"/bucket/{name}?cb=0123456789"))
        assert (answer.status, answer.body, answer.headers["cache-control"]) == (200, body, "no-cache")
        etags.add(answer.headers["etag"])
        assert bucket.files() == [name]
    assert len(etags) == 3
    assert bucket.put(name, b"other").status == 412, "a URL to create does not replace"
    assert bucket.put(name, b"a longer one", replace=True).status == 200


@pytest.mark.parametrize("name", [NAME, SEGMENT, f"{FEED}/0"])
def test_other_objects_are_never_signed_to_be_replaced(bucket: Bucket, name: str) -> None:
    with pytest.raises(InvalidName, match="never replaced"):
        bucket.sign(name, 3, replace=True)
    bucket.put(name, b"abc")
    signed = bucket.sign(INDEX, 3, replace=True)
    assert bucket.talk(put_request(signed, b"xyz", replace=(INDEX, name))).status == 403
    assert bucket.talk(get_request(f"/bucket/{name}")).body == b"abc"


REPLACING: dict[str, tuple[Any, int]] = {
    "not create-only": (lambda b: put_request(b.sign(INDEX, 3), b"xyz", x_goog_if_generation_match=None), 403),
    "create-only after all": (lambda b: put_request(b.sign(INDEX, 3, replace=True), b"xyz",
                                                    x_goog_if_generation_match="0"), 403),
    "another index": (lambda b: put_request(b.sign(INDEX, 3, replace=True), b"xyz", replace=("479d11a", "479d11b")),
                      403),
    "longer": (lambda b: put_request(b.sign(INDEX, 3, replace=True), b"wxyz"), 413),
    "shorter": (lambda b: put_request(b.sign(INDEX, 3, replace=True), b"xy"), 400),
    "no length range": (lambda b: put_request(b.sign(INDEX, 3, replace=True), b"xyz",
                                              x_goog_content_length_range=None), 403),
    "expired": (lambda b: put_request(b.signer.sign(INDEX, 3, -1, b.url, replace=True), b"xyz"), 403),
}


@pytest.mark.parametrize("case", REPLACING)
def test_a_replacement_that_is_not_what_was_signed_leaves_the_old_object(bucket: Bucket, case: str) -> None:
    bucket.put(INDEX, b"abc")
    make, status = REPLACING[case]
    assert bucket.talk(make(bucket)).status == status
    assert bucket.talk(get_request(f"/bucket/{INDEX}")).body == b"abc"
    assert bucket.files() == [INDEX]


def test_who_reads_an_object_that_is_replaced_reads_the_old_one_to_its_end(bucket: Bucket) -> None:
    old, new = DATA * 8, bytes(len(DATA)) * 8
    assert bucket.put(INDEX, old).status == 200
    with bucket.connect() as sock:
        sock.sendall(get_request(f"/bucket/{INDEX}"))
        begun = sock.recv(1000)
        assert bucket.put(INDEX, new, replace=True).status == 200
        assert bucket.talk(get_request(f"/bucket/{INDEX}")).body == new
        assert take_apart(begun + read_all(sock)).body == old


def test_readers_of_an_object_under_replacement_see_one_or_another_and_no_mixture(bucket: Bucket) -> None:
    bodies = [bytes([number]) * (200_000 + number) for number in range(8)]
    assert bucket.put(INDEX, bodies[0], replace=True).status == 200
    seen: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(bucket.talk(get_request(f"/bucket/{INDEX}")).body)

    def write(body: bytes) -> None:
        for _ in range(5):
            assert bucket.put(INDEX, body, replace=True).status == 200
    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(body,)) for body in bodies]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert seen
    assert set(seen) <= set(bodies)
    assert bucket.files() == [INDEX]


def test_a_replacement_that_breaks_off_leaves_the_old_object(bucket: Bucket) -> None:
    bucket.put(INDEX, b"abc")
    with bucket.connect() as sock:
        sock.sendall(put_request(bucket.sign(INDEX, len(DATA), replace=True), DATA)[:-1])
        wait_until(lambda: len(bucket.files()) == 2)
    wait_until(lambda: bucket.files() == [INDEX])
    assert bucket.talk(get_request(f"/bucket/{INDEX}")).body == b"abc"


def test_a_replacement_takes_the_place_of_a_symlink_and_does_not_follow_it(bucket: Bucket, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"a file of its own")
    link = bucket.root / RESULT
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    assert bucket.put(RESULT, b"abc", replace=True).status == 200
    assert (outside.read_bytes(), bucket.talk(get_request(f"/bucket/{RESULT}")).body) == (b"a file of its own", b"abc")


def test_the_hub_reads_small_objects_and_removes_only_the_one_it_read(bucket: Bucket) -> None:
    bucket.put(RESULT, b"first")
    data, etag = bucket.server.read(RESULT, 5)
    assert data == b"first"
    with pytest.raises(TooLarge):
        bucket.server.read(RESULT, 4)
    bucket.put(RESULT, b"again", replace=True)
    with pytest.raises(ObjectMissing):
        bucket.server.remove(RESULT, etag=etag)
    data, etag = bucket.server.read(RESULT, 5)
    assert data == b"again"
    bucket.server.remove(RESULT, etag=etag)
    for ask in (lambda: bucket.server.read(RESULT, 5), lambda: bucket.server.remove(RESULT, etag=etag)):
        with pytest.raises(ObjectMissing):
            ask()


# --- uploads that break off


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_truncated_upload_leaves_nothing(bucket: Bucket, how: str) -> None:
    with bucket.connect() as sock:
        sock.sendall(put_request(bucket.sign(NAME, len(DATA)), DATA)[:-1])
        wait_until(bucket.files)
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_until(lambda: not bucket.files())
    assert bucket.talk(get_request(f"/bucket/{NAME}")).status == 404
    assert bucket.put(NAME, DATA).status == 200


def test_what_an_earlier_run_left_unfinished_is_removed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with running_bucket(root) as bucket:
        bucket.put(NAME, b"abc")
    (root / ".incoming" / "deadbeef").write_bytes(b"half an obj")
    with running_bucket(root) as bucket:
        assert bucket.files() == [NAME]


def test_a_full_disk_is_told_before_the_body_travels(bucket: Bucket) -> None:
    size = 1 << 43
    answer = bucket.talk(put_request(bucket.sign(NAME, size), b"", content_length=str(size)))
    assert answer.status == 507
    assert b"<Code>InsufficientStorage</Code>" in answer.body
    assert bucket.files() == []


class _FullFiles(ObjectFiles):
    """Objects on a disk that takes nothing, though it promised room."""

    def create(self, name: str, size_bytes: int, *, replace: bool = False) -> Incoming:
        incoming = super().create(name, size_bytes, replace=replace)
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, incoming.fd)
        os.close(full)
        return incoming


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    signer = UploadSigner(SECRET)
    files = _FullFiles(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        handler = RequestHandler(listener.accept()[0], files, signer.verify, prefix="/bucket/", upload_rate=None,
                                 download_rate=None, limits=ConnectionLimits(idle_seconds=5, stall_seconds=5))
        thread = threading.Thread(target=handler.run)
        thread.start()
        client.sendall(put_request(signer.sign(NAME, len(DATA), 100, "http://x/bucket"), DATA))
        client.shutdown(socket.SHUT_WR)
        assert take_apart(read_all(client)).status == 507
        thread.join()
    assert list(files.objects()) == []
    assert os.listdir(tmp_path / ".incoming") == []


def test_continue_is_said_only_when_the_body_is_wanted(bucket: Bucket) -> None:
    request = put_request(bucket.sign(NAME, 3), b"", content_length="3", expect="100-continue")
    with bucket.connect() as sock:
        sock.sendall(request)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        sock.shutdown(socket.SHUT_WR)
        assert take_apart(read_all(sock)).status == 200
    with bucket.connect() as sock:
        sock.sendall(request)
        assert take_apart(read_all(sock)).status == 412


def test_uploads_may_be_forced_to_the_disk(tmp_path: Path) -> None:
    with running_bucket(tmp_path / "root", fsync=True) as bucket:
        assert bucket.put(NAME, DATA).status == 200
        assert bucket.talk(get_request(f"/bucket/{NAME}")).body == DATA


# --- reading


@pytest.mark.parametrize(("text", "start", "stop"), [
    ("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), (f"bytes=5-{len(DATA) - 1}", 5, None), ("bytes=7-", 7, None),
    ("bytes=-3", -3, None), (f"bytes=0-{10**14}", 0, None), (f"bytes=-{10**14}", 0, None), ("bytes= 1-2", 1, 3),
])
def test_single_ranges_are_served(bucket: Bucket, text: str, start: int, stop: int | None) -> None:
    bucket.put(NAME, DATA)
    answer = bucket.talk(get_request(f"/bucket/{NAME}", range=text))
    expected = DATA[start:stop]
    first = start % len(DATA)
    assert answer.status == 206
    assert answer.body == expected
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(expected) - 1}/{len(DATA)}"
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("text", ["bytes=-", "bytes=5-2", "bytes=a-b", "lines=1-2", "bytes=0-1,3-4", "bytes=1",
                                  f"bytes={10**15}-"])
def test_other_range_headers_are_ignored(bucket: Bucket, text: str) -> None:
    bucket.put(NAME, DATA)
    answer = bucket.talk(get_request(f"/bucket/{NAME}", range=text))
    assert (answer.status, answer.body) == (200, DATA)


@pytest.mark.parametrize("text", [f"bytes={len(DATA)}-", f"bytes={len(DATA)}-{len(DATA) + 5}", "bytes=-0"])
def test_ranges_beyond_the_end_are_416(bucket: Bucket, text: str) -> None:
    bucket.put(NAME, DATA)
    answer = bucket.talk(get_request(f"/bucket/{NAME}", range=text))
    assert answer.status == 416
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


def test_if_range_and_head(bucket: Bucket) -> None:
    bucket.put(NAME, DATA)
    head = bucket.talk(get_request(f"/bucket/{NAME}", method="HEAD"), head_only=True)
    assert (head.status, head.headers["content-length"], head.body, head.rest) == (200, str(len(DATA)), b"", b"")
    for etag, status in ((head.headers["etag"], 206), ('"other"', 200)):
        assert bucket.talk(get_request(f"/bucket/{NAME}", range="bytes=0-1", if_range=etag)).status == status
    missing = bucket.talk(get_request(f"/bucket/{OTHER}", method="HEAD"), head_only=True)
    assert (missing.status, missing.rest) == (404, b"")


def test_an_empty_object_is_an_object(bucket: Bucket) -> None:
    assert bucket.put(NAME, b"").status == 200
    answer = bucket.talk(get_request(f"/bucket/{NAME}"))
    assert (answer.status, answer.body) == (200, b"")


def test_an_object_cut_short_on_the_disk_never_looks_whole(bucket: Bucket) -> None:
    path = bucket.root / NAME
    path.parent.mkdir(parents=True)
    path.touch()
    os.truncate(path, 1 << 30)
    with bucket.connect() as sock:
        sock.sendall(get_request(f"/bucket/{NAME}"))
        sock.recv(1)
        os.truncate(path, 1000)
        received = 1 + len(read_all(sock))
    assert received < 1 << 30


# --- the connection


def test_a_head_may_arrive_byte_by_byte(bucket: Bucket) -> None:
    request = put_request(bucket.sign(NAME, 3), b"abc", connection="close")
    with bucket.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for n in range(len(request)):
            sock.sendall(request[n:n + 1])
        assert take_apart(read_all(sock)).status == 200


def test_pipelined_requests_are_answered_in_order(bucket: Bucket) -> None:
    get = get_request(f"/bucket/{NAME}", close=False)
    requests = [get, put_request(bucket.sign(NAME, len(DATA)), DATA), get,
                put_request(bucket.sign(NAME, 3), b"abc"), put_request(bucket.sign(OTHER, 3), b"abc"),
                get_request(f"/bucket/{OTHER}")]
    answers = []
    with bucket.connect() as sock:
        threading.Thread(target=sock.sendall, args=(b"".join(requests),)).start()
        rest = read_all(sock)
    while rest:
        answer = take_apart(rest)
        answers.append((answer.status, answer.body))
        rest = answer.rest
    assert [status for status, _ in answers] == [404, 200, 200, 412, 200, 200]
    assert answers[2][1] == DATA
    assert answers[5][1] == b"abc"


def test_a_big_body_that_is_not_wanted_ends_the_connection(bucket: Bucket) -> None:
    answer = bucket.talk(put_request(bucket.sign(NAME, len(DATA)), DATA, replace=("Size=", "Size=1")))
    assert answer.status == 403
    assert answer.headers["connection"] == "close"
    assert answer.rest == b""


@pytest.mark.parametrize(("request_bytes", "status"), [
    (b"GET /bucket/" + b"x" * 20000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
    (b"GET /bucket/x HTTP/1.1\r\nhost: x\r\n" + b"".join(b"a%d: b\r\n" % n for n in range(3000)) + b"\r\n", 431),
    (b"nonsense\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    (b"GET /bucket/x HTTP/1.1\r\n\r\n", 400), (b"GET /bucket/x\x00 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    (get_request("/other/place"), 421), (get_request("/bucket"), 421), (get_request("//bucket/x"), 421),
    (get_request("http://x/bucket/x"), 421),
])
def test_strange_requests_are_refused_and_the_connection_ends(bucket: Bucket, request_bytes: bytes,
                                                              status: int) -> None:
    answer = bucket.talk(request_bytes)
    assert answer.status == status
    assert answer.headers["connection"] == "close"


def test_http_1_0_and_a_get_with_a_body_end_the_connection(bucket: Bucket) -> None:
    bucket.put(NAME, b"abc")
    old = bucket.talk(f"GET /bucket/{NAME} HTTP/1.0\r\n\r\n".encode())
    assert (old.status, old.body, old.headers["connection"]) == (200, b"abc", "close")
    smuggled = get_request(f"/bucket/{OTHER}")
    request = get_request(f"/bucket/{NAME}", close=False, content_length=str(len(smuggled))) + smuggled
    answer = bucket.talk(request)
    assert (answer.status, answer.body, answer.rest) == (200, b"abc", b"")


def test_connections_beyond_the_limit_are_asked_to_come_back(tmp_path: Path) -> None:
    with running_bucket(tmp_path / "root", bucket_connections_max=2) as bucket:
        held = [bucket.connect() for _ in range(2)]
        for sock, name in zip(held, (NAME, OTHER), strict=True):
            sock.sendall(put_request(bucket.sign(name, 10), b"12345", content_length="10"))
        wait_until(lambda: len(bucket.files()) == 2)  # both are busy
        busy = bucket.talk(get_request(f"/bucket/{NAME}"))
        assert (busy.status, busy.headers["retry-after"]) == (503, "1")
        held.pop().close()
        wait_until(lambda: bucket.talk(get_request(f"/bucket/{NAME}")).status == 404)
        held[0].sendall(b"67890")
        assert held[0].recv(12) == b"HTTP/1.1 200"
        held.pop().close()


def test_an_address_that_holds_most_connections_makes_room_for_another(tmp_path: Path) -> None:
    with running_bucket(tmp_path / "root", bucket_connections_max=2) as bucket:
        held = [socket.create_connection(("127.0.0.1", bucket.port), 20, ("127.0.0.2", 0)) for _ in range(2)]
        for sock, name in zip(held, (NAME, OTHER), strict=True):
            sock.sendall(put_request(bucket.sign(name, 10), b"12345", content_length="10"))
        wait_until(lambda: len(bucket.files()) == 2)  # both are busy
        assert bucket.talk(get_request(f"/bucket/{NAME}")).status == 404
        assert held[0].recv(1) == b""  # the one that came first
        held[1].sendall(b"67890")
        assert held[1].recv(12) == b"HTTP/1.1 200"
        for sock in held:
            sock.close()


def test_an_idle_connection_makes_room_for_a_new_one(tmp_path: Path) -> None:
    with running_bucket(tmp_path / "root", bucket_connections_max=2) as bucket:
        held: list[socket.socket] = []
        while len(held) < 2:
            held.append(bucket.connect())
            held[-1].sendall(get_request(f"/bucket/{NAME}", close=False))
            answer = b""
            while not answer.endswith(b"</Error>"):
                answer += held[-1].recv(1000)
            wait_until(lambda: len(held) == sum(
                handler.idle_since is not None for handler in bucket.server._served.values()))
        assert bucket.talk(get_request(f"/bucket/{NAME}")).status == 404
        assert held[0].recv(1) == b""  # the one that had been idle longest
        held[1].sendall(get_request(f"/bucket/{NAME}"))
        assert take_apart(read_all(held[1])).status == 404
        for sock in held:
            sock.close()


def test_closing_the_server_breaks_off_every_connection(tmp_path: Path) -> None:
    with running_bucket(tmp_path / "root") as bucket:
        idle, uploading = bucket.connect(), bucket.connect()
        uploading.sendall(put_request(bucket.sign(NAME, 10), b"12345", content_length="10"))
        wait_until(bucket.files)
        bucket.server.close()
        assert read_all(idle) == read_all(uploading) == b""
        assert bucket.files() == []
        with bucket.connect() as late:
            assert read_all(late) == b""
        idle.close()
        uploading.close()


@pytest.mark.parametrize("sent", [b"", b"GET /buck", get_request(f"/bucket/{NAME}", close=False), b"body"])
def test_idle_and_silent_clients_are_dropped(tmp_path: Path, sent: bytes) -> None:
    signer = UploadSigner(SECRET)
    if sent == b"body":
        sent = put_request(signer.sign(NAME, 10, 100, "http://x/bucket"), b"12345", content_length="10")
    files = ObjectFiles(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        handler = RequestHandler(listener.accept()[0], files, signer.verify, prefix="/bucket/", upload_rate=None,
                                 download_rate=None, limits=ConnectionLimits(idle_seconds=0.05, stall_seconds=0.05))
        client.sendall(sent)
        handler.run()
        answered = read_all(client)
    assert answered[:12] == (b"HTTP/1.1 404" if sent.endswith(b"\r\n\r\n") else b"")
    assert list(files.objects()) == []
    assert os.listdir(tmp_path / ".incoming") == []


def test_a_client_that_takes_nothing_is_dropped(tmp_path: Path) -> None:
    files = ObjectFiles(tmp_path)
    (tmp_path / NAME).parent.mkdir(parents=True)
    (tmp_path / NAME).touch()
    os.truncate(tmp_path / NAME, 1 << 30)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        client.sendall(get_request(f"/bucket/{NAME}"))
        RequestHandler(listener.accept()[0], files, UploadSigner(SECRET).verify, prefix="/bucket/", upload_rate=None,
                       download_rate=None, limits=ConnectionLimits(idle_seconds=5, stall_seconds=0.05)).run()
        assert len(read_all(client)) < 1 << 30


def test_a_rate_is_held_by_all_together() -> None:
    clock = Clock()
    slept: list[float] = []
    rate = RateLimit(1000.0, clock=clock, sleep=slept.append)
    for _ in range(3):
        rate.take(500)
    clock.now += 10
    rate.take(100)
    assert slept == pytest.approx([0.5, 1.0, 1.5, 0.1])


def test_a_bucket_held_to_a_rate_still_moves_the_right_bytes(tmp_path: Path) -> None:
    with running_bucket(tmp_path / "root", rate_limit_bytes_per_second=50_000_000) as bucket:
        assert bucket.put(NAME, DATA).status == 200
        answer = bucket.talk(get_request(f"/bucket/{NAME}", range=f"bytes=1-{len(DATA) - 2}"))
        assert answer.body == DATA[1:-1]
        assert answer.rest == b""


# --- the hub's care


def test_the_hub_measures_hashes_lists_and_removes_objects(bucket: Bucket) -> None:
    bucket.put(NAME, DATA)
    bucket.put(OTHER.replace("ch1", "ch2"), b"abc")
    bucket.put(f"{FEED}/0", b"{}")
    (bucket.root / "stray").write_bytes(b"not an object")
    server = bucket.server
    assert server.size(NAME) == len(DATA)
    assert server.sha1(NAME) == hashlib.sha1(DATA).hexdigest()
    def names(prefix: str = "", after: str = "") -> list[str]:
        return [found.name for found in server.objects(prefix, after)]

    assert names() == [f"{FEED}/0", NAME, OTHER.replace("ch1", "ch2")]
    assert names("ch1/") == [f"{FEED}/0", NAME]
    assert names("ch1/sha1/02/") == [NAME]
    assert names("ch3/") == []
    server.remove(NAME)
    for ask in (server.size, server.sha1, server.remove):
        with pytest.raises(ObjectMissing):
            ask(NAME)
        with pytest.raises(InvalidName):
            ask("../stray")
    assert bucket.talk(get_request(f"/bucket/{NAME}")).status == 404
    assert bucket.put(NAME, DATA).status == 200


# --- a foreign client


def test_curl_uploads_and_downloads(bucket: Bucket, tmp_path: Path) -> None:
    curl = need_program("curl")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(DATA)
    signed = bucket.sign(NAME, len(DATA))
    headers = [part for name, value in signed.headers.items() for part in ("-H", f"{name}: {value}")]

    def run(*arguments: str) -> str:
        return subprocess.run([curl, "-sS", "-o", str(target), "-w", "%{http_code}", *arguments], check=True,
                              capture_output=True, text=True, timeout=30).stdout
    assert run("-T", str(source), *headers, signed.url) == "200"
    assert run("-T", str(source), *headers, signed.url) == "412"
    assert run("-T", str(source), *headers, "-H", "Expect: 100-continue", signed.url) == "412"
    assert run("-T", str(source), signed.url) == "403"
    assert run(f"{bucket.url}/{NAME}") == "200"
    assert target.read_bytes() == DATA
    assert run("-r", "100-299", f"{bucket.url}/{NAME}") == "206"
    assert target.read_bytes() == DATA[100:300]
    assert run("--path-as-is", f"{bucket.url}/../root/{NAME}") == "400"
    assert run("--head", f"{bucket.url}/{NAME}") == "200"
    assert f"Content-Length: {len(DATA)}" in target.read_text()


if sys.platform == "linux":
    def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
        with mounted(tmp_path / "root", "tmpfs", 3 * MIB) as root, running_bucket(root) as bucket:
            assert bucket.put(NAME, DATA).status == 200
            assert bucket.put(OTHER, DATA).status == 507
            assert bucket.files() == [NAME]
            bucket.server.remove(NAME)
            assert bucket.put(OTHER, DATA).status == 200
