"""Manifests: the golden ones of both chunk sizes, and hostile ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_fast.errors import ManifestInvalid
from kachery_fast.protocol.manifest import (
    CHUNK_SIZE_BYTES_MAX,
    Chunk,
    Manifest,
    make_manifest,
    parse_manifest,
)

VECTORS = [json.loads(line) for line in
           (Path(__file__).parent.parent / "vectors" / "manifests.jsonl").read_text("utf-8").splitlines()]
CHUNK_SIZES = {"20MiB": 20 * 1024 * 1024, "20MB": 20_000_000}
SHA1 = "025b4666424a0116c45970c27af4e2f90177af69"


def golden_bytes(size: int) -> memoryview:
    """The first bytes of sha256("0") + sha256("1") + …"""
    def blocks() -> Iterator[bytes]:
        for number in range(-(-size // 32)):
            yield hashlib.sha256(str(number).encode()).digest()

    return memoryview(b"".join(blocks()))[:size]


@pytest.fixture(scope="module")
def golden() -> memoryview:
    return golden_bytes(max(vector["size"] for vector in VECTORS))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["size"]))
def test_golden_manifests(vector: dict[str, Any], golden: memoryview) -> None:
    size = vector["size"]
    data = golden[:size]
    assert hashlib.sha1(data).hexdigest() == vector["sha1"]
    for label, chunk_size in CHUNK_SIZES.items():
        digests = [hashlib.sha1(data[start:start + chunk_size]).hexdigest() for start in range(0, size, chunk_size)]
        expected = vector.get(f"manifest_sha1_{label}")
        if expected is None:
            assert len(digests) <= 1
            continue
        manifest = make_manifest(size, vector["sha1"], digests, chunk_size)
        assert len(manifest.chunks) == vector[f"chunks_{label}"]
        assert manifest.name == expected
        assert parse_manifest(manifest.encode(), name=expected) == manifest


def test_the_canonical_bytes_are_those_of_2022() -> None:
    manifest = Manifest(3, SHA1, (Chunk(0, 2, SHA1), Chunk(2, 3, SHA1)))
    assert manifest.encode() == (f'{{"size":3,"sha1":"{SHA1}","chunks":[{{"start":0,"end":2,"sha1":"{SHA1}"}},'
                                 f'{{"start":2,"end":3,"sha1":"{SHA1}"}}]}}').encode()


def parse(value: Any) -> Manifest:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_manifest(data, name=hashlib.sha1(data).hexdigest())


def one(**changes: Any) -> dict[str, Any]:
    return {"size": 10, "sha1": SHA1, "chunks": [{"start": 0, "end": 10, "sha1": SHA1}], **changes}


def test_keys_that_are_not_known_are_no_harm() -> None:
    assert parse(one(extra=[1, {"a": 2}])) == Manifest(10, SHA1, (Chunk(0, 10, SHA1),))


@pytest.mark.parametrize("value", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, {}, one(size=11), one(size=9), one(size=-10),
    one(size="10"), one(size=1e400), one(sha1="x"), one(sha1=SHA1.upper()), one(sha1=None), one(chunks=None),
    one(chunks={}),
    one(chunks=[[0, 10, SHA1]]), one(chunks=[{"start": 0, "end": 10}]),
    one(chunks=[{"start": 0, "end": 10, "sha1": "../../../../etc/passwd"}]),
    one(chunks=[{"start": 1, "end": 10, "sha1": SHA1}]), one(chunks=[{"start": 0, "end": 0, "sha1": SHA1}]),
    one(chunks=[{"start": 0, "end": 6, "sha1": SHA1}, {"start": 5, "end": 10, "sha1": SHA1}]),
    one(chunks=[{"start": 0, "end": 4, "sha1": SHA1}, {"start": 5, "end": 10, "sha1": SHA1}]),
    one(chunks=[{"start": 0, "end": 12, "sha1": SHA1}, {"start": 12, "end": 10, "sha1": SHA1}]),
    one(chunks=[{"start": -5, "end": 10, "sha1": SHA1}]), one(chunks=[]),
    one(size=CHUNK_SIZE_BYTES_MAX + 1, chunks=[{"start": 0, "end": CHUNK_SIZE_BYTES_MAX + 1, "sha1": SHA1}]),
    one(size=2**70, chunks=[{"start": 0, "end": 2**70, "sha1": SHA1}]),
], ids=str)
def test_hostile_manifests_are_refused_with_a_reason(value: Any) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        parse(value)
    assert caught.value.details["why"]


def test_bytes_of_another_name_are_refused() -> None:
    with pytest.raises(ManifestInvalid, match="its bytes have the SHA-1"):
        parse_manifest(json.dumps(one()).encode(), name=SHA1)


def test_a_manifest_is_not_made_of_too_few_or_too_many_digests() -> None:
    for count in (0, 1, 3):
        with pytest.raises(ManifestInvalid):
            make_manifest(100, SHA1, [SHA1] * count, 64)
    assert make_manifest(0, SHA1, [], 64).chunks == ()


@given(st.integers(1, 2000), st.integers(1, 300), st.integers(-5, 2100), st.integers(-5, 2100))
def test_a_span_holds_every_chunk_that_overlaps_and_no_other(size: int, length: int, start: int, end: int) -> None:
    manifest = make_manifest(size, SHA1, [SHA1] * -(-size // length), length)
    start, end = max(0, start), min(end, size)
    overlapping = [index for index, chunk in enumerate(manifest.chunks)
                   if chunk.start < end and start < chunk.end and start < end]
    assert list(manifest.chunk_span(start, end)) == overlapping or start >= size
