"""Reads of private channels: by raw sockets, with signed URLs, without, and with those of others."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kachery_fast.embedded.bucket_reads import DownloadSigner, ReadGate
from kachery_fast.errors import InvalidArgument, InvalidName, NotPermitted, UploadRefused, UrlExpired
from tests.embedded.bucket_server import (
    NAME,
    SECRET,
    Answer,
    Bucket,
    Clock,
    get_request,
    put_request,
    running_bucket,
    take_apart,
)
from tests.programs import need_program

DATA = bytes(range(256)) * 1000
OTHER = NAME[:-1] + "0"
OPEN = NAME.replace("ch1/", "open/")
FEED = "ch1/feeds/47/9d/11/479d11" + "a" * 58 + "/subfeeds/0a/1b/2c/0a1b2c" + "d" * 34
KINDS = [NAME, f"{FEED}/subfeed.json", f"{FEED}/segments/{NAME[-40:]}", NAME.replace("sha1/", "task_results/")]


class Private(NamedTuple):
    """A bucket on which everybody may read the channel ``open`` and no other."""

    bucket: Bucket
    gate: ReadGate
    reads: DownloadSigner

    def url(self, name: str, method: str = "GET", life_seconds: float = 300) -> str:
        return "/bucket" + self.reads.sign(name, life_seconds, "", method=method).url

    def get(self, target: str, method: str = "GET", **headers: str) -> Answer:
        return self.bucket.talk(get_request(target, method=method, close=True, **headers), head_only=method == "HEAD")


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Private]:
    clock = Clock()
    reads = DownloadSigner(SECRET, clock=clock)
    gate = ReadGate(reads)
    gate.open(frozenset({"open"}))
    with running_bucket(tmp_path / "root", gate=gate) as bucket:
        assert bucket.put(NAME, DATA).status == bucket.put(OPEN, DATA).status == 200
        yield Private(bucket, gate, reads)


@pytest.mark.parametrize("name", KINDS)
def test_an_object_of_a_private_channel_is_read_by_its_signed_url_alone(private: Private, name: str) -> None:
    private.bucket.put(name, DATA)
    answer = private.get(private.url(name))
    assert (answer.status, answer.body) == (200, DATA)
    assert answer.headers["cache-control"] == "private, max-age=0"
    part = private.get(private.url(name), range="bytes=5-9")
    assert (part.status, part.body) == (206, DATA[5:10])
    head = private.get(private.url(name, "HEAD"), "HEAD")
    assert (head.status, head.headers["content-length"]) == (200, str(len(DATA)))
    for method in ("GET", "HEAD"):
        whole, part = (private.get(f"/bucket/{name}", method, **fields) for fields in ({}, {"range": "bytes=0-0"}))
        for refused in (whole, part):
            assert refused.status == 403
            assert "etag" not in refused.headers
    assert b"<Code>AccessDenied</Code>" in private.get(f"/bucket/{name}").body
    assert private.bucket.talk(get_request(f"/bucket/{OPEN}")).body == DATA, "the other channel is as open as ever"


def refusals(private: Private, name: str) -> dict[str, str]:
    """Targets that do not read ``name``, and why."""
    good, head = private.url(name), private.url(name, "HEAD")
    upload = "/" + private.bucket.sign(name, len(DATA)).url.split("/", 3)[3]
    return {
        f"/bucket/{name}": "AccessDenied", f"/bucket/{name}?": "AccessDenied",
        f"/bucket/{name}?cb=0123456789": "SignatureDoesNotMatch", head: "SignatureDoesNotMatch",
        upload: "SignatureDoesNotMatch",
        good.replace(name, OTHER if name == NAME else NAME): "SignatureDoesNotMatch",
        good.replace("ch1/", "CH1/").replace("/bucket/ch1", "/bucket/CH1"): "SignatureDoesNotMatch",
        good + "&cb=1": "SignatureDoesNotMatch", good + "0": "SignatureDoesNotMatch",
        good[:-1]: "SignatureDoesNotMatch",
        good.replace("Expires=1", "Expires=2"): "SignatureDoesNotMatch",
        good.replace("Expires=", "Expires=0"): "SignatureDoesNotMatch",
        good.partition("&")[0]: "SignatureDoesNotMatch", good.replace("Signature=", "Signature=%C3%A9"):
            "SignatureDoesNotMatch",
        private.url(name, life_seconds=-1): "ExpiredToken", private.url(name, life_seconds=0): "ExpiredToken",
    }


def blotted(body: bytes) -> bytes:
    """Without the names of the two objects."""
    return body.replace(NAME[-40:].encode(), b"").replace(OTHER[-40:].encode(), b"")


def test_what_is_refused_is_refused_alike_whether_the_object_is_there_or_not(private: Private) -> None:
    there, absent = (refusals(private, name) for name in (NAME, OTHER))
    assert len(there) == len(absent) == 16
    for (target, code), other in zip(there.items(), absent, strict=True):
        first, second = private.get(target), private.get(other)
        assert first.status == second.status == 403, target
        assert f"<Code>{code}</Code>".encode() in first.body, target
        assert blotted(first.body) == blotted(second.body), target
    assert private.get(private.url(OTHER)).status == 404, "who may read is told that there is none"


def test_nothing_tells_a_private_channel_from_one_that_is_not_there(private: Private) -> None:
    for target in (NAME, NAME.replace("ch1", "none"), "ch1/x", "none/x", "", "x", NAME.replace("ch1", "OPEN2")):
        assert private.get(f"/bucket/{target}").status == 403


def test_the_name_of_a_channel_counts_in_any_case(private: Private) -> None:
    """Where the file system does not tell "Lab" from "lab", a private one must not be read by the other's name."""
    private.gate.open(frozenset({"other"}))
    assert private.get(f"/bucket/{NAME.replace('ch1', 'CH1')}").status == 403
    private.gate.open(frozenset({"ch1"}))
    assert private.get(f"/bucket/{NAME.replace('ch1', 'Ch1')}").status in (200, 404)


def test_a_signed_url_does_not_write(private: Private) -> None:
    before = private.bucket.files()
    signed = private.bucket.sign(OTHER, 3)
    for target in (private.url(OTHER), private.url(OTHER, "HEAD")):
        request = put_request(signed, b"abc", replace=(signed.url.split("/", 3)[3], target[1:]))
        assert private.bucket.talk(request).status == 403
    assert private.bucket.files() == before


def test_a_channel_that_is_made_private_closes_for_connections_that_are_open(private: Private) -> None:
    with private.bucket.connect() as sock:
        def ask(target: str) -> Answer:
            sock.sendall(get_request(target, method="HEAD", close=False))
            data = b""
            while not data.endswith(b"\r\n\r\n"):
                data += sock.recv(65536)
            return take_apart(data, head_only=True)

        assert ask(f"/bucket/{OPEN}").status == 200
        private.gate.open(frozenset())
        assert ask(f"/bucket/{OPEN}").status == 403
        assert ask(private.url(OPEN, "HEAD")).status == 200
        private.gate.open(frozenset({"open"}))
        assert ask(f"/bucket/{OPEN}").status == 200


def test_a_read_that_has_begun_goes_on_when_its_channel_becomes_private(tmp_path: Path) -> None:
    gate = ReadGate(DownloadSigner(SECRET))
    gate.open(frozenset({"ch1"}))
    data = bytes(64 * 1024 * 1024)
    with running_bucket(tmp_path / "root", gate=gate) as bucket, bucket.connect() as sock:
        bucket.put(NAME, data)
        sock.sendall(get_request(f"/bucket/{NAME}"))
        first = sock.recv(1000)
        gate.open(frozenset())
        received = len(first)
        while piece := sock.recv(1 << 20):
            received += len(piece)
        assert received > len(data)


def test_what_was_said_to_be_open_counts_for_a_while_only() -> None:
    clock = Clock()
    gate = ReadGate(DownloadSigner(SECRET), clock=clock)
    with pytest.raises(NotPermitted):
        gate.check("GET", NAME, "")
    gate.open(frozenset({"ch1"}), 10.0)
    clock.now += 9.9
    assert gate.check("GET", NAME, "") is False
    clock.now += 0.1
    with pytest.raises(NotPermitted):
        gate.check("GET", NAME, "")


def test_a_download_is_signed_for_its_life_object_and_method() -> None:
    clock = Clock()
    signer = DownloadSigner(SECRET, clock=clock)
    url, expires = signer.sign(NAME, 300, "http://hub:1/bucket/")
    place, _, query = url.partition("?")
    assert (place, expires) == (f"http://hub:1/bucket/{NAME}", int(clock.now) + 300)
    clock.now += 299
    signer.verify("GET", NAME, query)
    for method, name, other in (("HEAD", NAME, signer), ("GET", OTHER, signer),
                                ("GET", NAME, DownloadSigner(b"another secret of a hub", clock=clock))):
        with pytest.raises(UploadRefused):
            other.verify(method, name, query)
    clock.now += 1
    with pytest.raises(UrlExpired):
        signer.verify("GET", NAME, query)
    with pytest.raises(InvalidName):
        signer.sign(f"{NAME}/../x", 300, "http://hub/bucket")
    with pytest.raises(InvalidArgument):
        signer.sign(NAME, 300, "http://hub/bucket", method="PUT")
    with pytest.raises(InvalidArgument):
        DownloadSigner(b"short")


def test_readers_while_the_channels_change_are_let_in_or_refused_and_never_break(private: Private) -> None:
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            for channels in (frozenset({"open"}), frozenset[str]()):
                private.gate.open(channels)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        found = {private.get(f"/bucket/{OPEN}", "HEAD").status for _ in range(200)}
    finally:
        over.set()
        thread.join()
    assert found <= {200, 403}


def test_curl_is_refused_without_a_signed_url_and_reads_with_one(private: Private, tmp_path: Path) -> None:
    need_program("curl")

    def curl(target: str) -> tuple[str, bytes]:
        out = tmp_path / "out"
        with contextlib.suppress(FileNotFoundError):
            out.unlink()
        url = f"http://127.0.0.1:{private.bucket.port}{target}"
        done = subprocess.run(["curl", "-s", "-o", str(out), "-w", "%{http_code}", url], check=True,
                              capture_output=True, text=True, timeout=60)
        return done.stdout, out.read_bytes()

    status, body = curl(f"/bucket/{NAME}")
    assert status == "403"
    assert b"AccessDenied" in body
    assert DATA[:50] not in body
    assert curl(private.url(NAME)) == ("200", DATA)


def test_a_refused_read_with_a_body_behind_it_is_not_mistaken_for_the_next_request(private: Private) -> None:
    with socket.create_connection(("127.0.0.1", private.bucket.port), 20) as sock:
        sock.sendall(get_request(f"/bucket/{NAME}", close=False) + get_request(private.url(NAME)))
        data = b""
        while piece := sock.recv(1 << 20):
            data += piece
    first = take_apart(data)
    assert first.status == 403
    assert take_apart(first.rest).body == DATA
