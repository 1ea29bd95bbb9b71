"""The small kernels under pytest-benchmark, for comparing two versions of the project on one machine.

``pytest benchmarks/test_kernels.py --benchmark-only``; the ``benchmarks`` workflow runs it for the base and the head
of each pull request, in turn. The figures that count for users are made by ``python -m benchmarks``.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from kachery_fast import _core
from kachery_fast._checksum import crc32c
from kachery_fast._chunker import Reassembly, chunk_ranges
from kachery_fast.protocol.bodies import Offer
from kachery_fast.protocol.canonical import canonical_bytes
from kachery_fast.protocol.manifest import make_manifest, parse_manifest
from kachery_fast.protocol.messages import decode_band, encode_band
from kachery_fast.protocol.signing import private_key
from kachery_fast.store.files import FileStore

MIB = 1024 * 1024
CHUNK_SIZE_BYTES = 20 * MIB


@pytest.fixture(scope="module")
def data() -> bytes:
    """64 MiB that do not repeat."""
    return hashlib.shake_128(b"kernels").digest(64 * MIB)


@pytest.fixture(scope="module")
def manifest_bytes() -> bytes:
    """The manifest of a file of 200 GB: 10,000 chunks."""
    names = [hashlib.sha1(str(index).encode()).hexdigest() for index in range(10_000)]
    return make_manifest(10_000 * CHUNK_SIZE_BYTES, "0" * 40, names, CHUNK_SIZE_BYTES).encode()


def test_one_digest(benchmark: Any, data: bytes) -> None:
    digest = benchmark(lambda: _core.Sha1(data).hexdigest())
    assert digest == hashlib.sha1(data).hexdigest()


def test_both_digests(benchmark: Any, data: bytes) -> None:
    digests = benchmark(_core.digest_buffer, data, CHUNK_SIZE_BYTES)
    assert digests.sha1 == hashlib.sha1(data).hexdigest()


def test_both_digests_of_a_file(benchmark: Any, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        digests = benchmark(_core.digest_file, fd, CHUNK_SIZE_BYTES)
    finally:
        os.close(fd)
    assert digests.size == len(data)


def test_the_checksum_of_google(benchmark: Any, data: bytes) -> None:
    assert benchmark(crc32c, data) == google_crc32c.value(data)


def test_verification_in_order(benchmark: Any, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.write_bytes(data)
    ranges = chunk_ranges(len(data), CHUNK_SIZE_BYTES)
    names = [hashlib.sha1(data[start:end]).hexdigest() for start, end in ranges]

    def verify() -> str:
        with Reassembly(str(path), len(data), ranges, names, reserve=True) as reassembly:
            assert all(reassembly.verify_next() for _ in ranges)
            return reassembly.whole_sha1()

    assert benchmark(verify) == hashlib.sha1(data).hexdigest()


def test_a_thousand_small_files(benchmark: Any, data: bytes, tmp_path: Path) -> None:
    sources = []
    for index in range(1000):
        sources.append(tmp_path / f"source-{index}")
        sources[-1].write_bytes(data[index * 10_000:(index + 1) * 10_000])
    places = iter(range(1_000_000))

    def fresh_store() -> tuple[tuple[FileStore], dict[str, Any]]:
        return (FileStore(tmp_path / f"store-{next(places)}"),), {}

    results = benchmark.pedantic(lambda store: store.put_files(sources), setup=fresh_store, rounds=5)
    assert len(results) == len(sources)


def test_reading_a_manifest(benchmark: Any, manifest_bytes: bytes) -> None:
    name = hashlib.sha1(manifest_bytes).hexdigest()
    manifest = benchmark(parse_manifest, manifest_bytes, name=name)
    assert manifest.encode() == manifest_bytes


def test_a_signed_message_there_and_back(benchmark: Any) -> None:
    key = private_key(bytes(32))
    offer = Offer(channel="lab", time=1, id="0" * 32, request="1" * 32, sha1="2" * 40, size=10**12, manifest="3" * 40)

    def there_and_back() -> Any:
        return decode_band(encode_band([offer], key), size_bytes_max=60_000)

    [(body, _sender)] = benchmark(there_and_back)
    assert body == offer


def test_canonical_json(benchmark: Any) -> None:
    value = {"chunks": [{"start": index, "end": index + 1, "sha1": "0" * 40} for index in range(100)], "label": "é€𐍈"}
    assert benchmark(canonical_bytes, value).startswith(b'{"chunks":')
