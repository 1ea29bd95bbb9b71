"""Streams and whole buffers: every kernel gives what hashlib gives, wherever the borders fall."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast import _core
from kachery_fast._chunker import chunk_ranges
from kachery_fast.errors import InvalidSetting

VECTORS = Path(__file__).parents[1] / "vectors" / "manifests.jsonl"
MIB = 1 << 20
DATA = np.random.Generator(np.random.SFC64(5)).bytes(3 * MIB)


def expected(data: bytes | memoryview, chunk_size_bytes: int) -> _core.Digests:
    """The digests as hashlib works them out."""
    chunks = chunk_ranges(len(data), chunk_size_bytes)
    return _core.Digests(
        len(data),
        hashlib.sha1(data).hexdigest(),
        tuple(hashlib.sha1(data[start:end]).hexdigest() for start, end in chunks),
    )


def counter_stream(size_bytes: int) -> bytes:
    """sha256("0") + sha256("1") + ..., as the golden vectors are made."""
    count = -(-size_bytes // 32)
    return b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(count))[:size_bytes]


def manifest(digests: _core.Digests, chunk_size_bytes: int) -> bytes:
    chunks = [
        {"start": start, "end": end, "sha1": sha1}
        for (start, end), sha1 in zip(chunk_ranges(digests.size, chunk_size_bytes), digests.chunk_sha1s, strict=True)
    ]
    content = {"size": digests.size, "sha1": digests.sha1, "chunks": chunks}
    return json.dumps(content, separators=(",", ":")).encode()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process, with the kernel of the environment given, if any."""
    inherited = {name: value for name, value in os.environ.items() if name != "KACHERY_SHA1_KERNEL"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
        timeout=60,
    )


@pytest.mark.parametrize("kernel", _core.KERNELS)
@pytest.mark.parametrize("chunk_size_bytes", [64, 128, 192])
def test_every_length_near_block_and_chunk_borders_is_as_hashlib(kernel: str, chunk_size_bytes: int) -> None:
    lengths = {*range(450), *(k * 64 + d for k in (16, 63, 64, 65) for d in (-9, -8, -1, 0, 1, 55, 56, 57))}
    for length in sorted(lengths):
        data = DATA[length : 2 * length]
        found = _core.digest_buffer(data, chunk_size_bytes, kernel=kernel)
        assert found == expected(data, chunk_size_bytes), length
        assert _core.Sha1(data, kernel=kernel).hexdigest() == found.sha1, length


@pytest.mark.parametrize("kernel", _core.KERNELS)
def test_lengths_near_the_border_of_a_megabyte_chunk_are_as_hashlib(kernel: str) -> None:
    for length in (MIB - 65, MIB - 1, MIB, MIB + 1, MIB + 64, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1):
        assert _core.digest_buffer(DATA[:length], MIB, kernel=kernel) == expected(DATA[:length], MIB), length


@pytest.mark.parametrize("kernel", _core.KERNELS)
@settings(deadline=None, max_examples=150)
@given(
    pieces=st.lists(st.integers(0, 9000), max_size=12),
    chunk_blocks=st.integers(1, 40),
    offset=st.integers(0, 70),
)
def test_any_split_of_the_stream_gives_the_same(kernel: str, pieces: list[int], chunk_blocks: int, offset: int) -> None:
    fused = _core.FusedSha1(chunk_blocks * 64, kernel=kernel)
    single = _core.Sha1(kernel=kernel)
    start = offset
    for size in pieces:
        fused.update(memoryview(DATA)[start : start + size])
        single.update(DATA[start : start + size])
        start += size
    found = fused.finish()
    assert found == expected(DATA[offset:start], chunk_blocks * 64)
    assert single.hexdigest() == found.sha1


@pytest.mark.parametrize("vector", [json.loads(line) for line in VECTORS.read_text().splitlines()])
def test_golden_manifests_for_both_chunk_sizes(vector: dict[str, int | str]) -> None:
    data = counter_stream(int(vector["size"]))
    for name, chunk_size_bytes in (("20MiB", 20 * MIB), ("20MB", 20_000_000)):
        found = _core.digest_buffer(data, chunk_size_bytes)
        assert found.sha1 == vector["sha1"]
        if f"manifest_sha1_{name}" in vector:
            assert len(found.chunk_sha1s) == vector[f"chunks_{name}"]
            assert hashlib.sha1(manifest(found, chunk_size_bytes)).hexdigest() == vector[f"manifest_sha1_{name}"]
        else:
            assert len(found.chunk_sha1s) <= 1


def test_lengths_beyond_32_bits_of_bits_are_counted() -> None:
    block = DATA[:MIB]
    ours, theirs = _core.FusedSha1(512 * MIB), hashlib.sha1()
    for _ in range(513):  # 2**32 bits are 512 MiB
        ours.update(block)
        theirs.update(block)
    found = ours.finish()
    assert found.sha1 == theirs.hexdigest()
    assert found.chunk_sha1s[1] == hashlib.sha1(block).hexdigest()


def test_nothing_has_no_chunks() -> None:
    assert _core.digest_buffer(b"", 64) == (0, hashlib.sha1().hexdigest(), ())


def test_a_digest_goes_on_after_it_was_asked_and_after_it_was_copied() -> None:
    sha1 = _core.Sha1(b"abc")
    twin = sha1.copy()
    assert sha1.digest() == hashlib.sha1(b"abc").digest()
    sha1.update(b"def")
    twin.update(b"xyz")
    assert sha1.hexdigest() == hashlib.sha1(b"abcdef").hexdigest()
    assert twin.hexdigest() == hashlib.sha1(b"abcxyz").hexdigest()


def test_arrays_are_hashed_from_their_own_memory_and_gaps_are_refused() -> None:
    array = np.arange(10000, dtype=np.float64).reshape(100, 100)
    assert _core.digest_buffer(array, 64) == expected(array.tobytes(), 64)
    assert _core.Sha1(array).digest() == hashlib.sha1(array.tobytes()).digest()
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        _core.digest_buffer(array[:, ::2], 64)
    with pytest.raises(TypeError):
        _core.Sha1("text")  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_size_bytes", [0, -64, 63, 65, 100])
def test_a_chunk_size_that_is_no_multiple_of_a_block_is_refused(chunk_size_bytes: int) -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        _core.FusedSha1(chunk_size_bytes)


def test_a_finished_stream_takes_nothing_more() -> None:
    fused = _core.FusedSha1(64)
    fused.update(b"abc")
    assert fused.finish().sha1 == hashlib.sha1(b"abc").hexdigest()
    with pytest.raises(RuntimeError, match="finished"):
        fused.update(b"d")
    with pytest.raises(RuntimeError, match="finished"):
        fused.finish()


def test_one_stream_fed_by_two_threads_is_refused_not_garbled() -> None:
    data = memoryview(DATA * 40)
    for kind in (lambda: _core.FusedSha1(MIB), _core.Sha1):
        stream = kind()
        outcomes: list[str] = []
        barrier = threading.Barrier(2)

        def feed(
            stream: _core.FusedSha1 | _core.Sha1 = stream,
            outcomes: list[str] = outcomes,
            barrier: threading.Barrier = barrier,
        ) -> None:
            barrier.wait()
            try:
                stream.update(data)
                outcomes.append("fed")
            except RuntimeError:
                outcomes.append("refused")

        threads = [threading.Thread(target=feed) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sha1 = stream.hexdigest() if isinstance(stream, _core.Sha1) else stream.finish().sha1
        # On a busy machine the second may come only when the first is done: then both were fed, in turn.
        assert sha1 == hashlib.sha1(bytes(data) * outcomes.count("fed")).hexdigest()


def test_digests_are_a_named_tuple_that_survives_pickling() -> None:
    found = _core.digest_buffer(b"abc", 64)
    assert found._fields == ("size", "sha1", "chunk_sha1s")
    assert pickle.loads(pickle.dumps(found)) == found


def test_the_best_kernel_is_used_unless_the_environment_names_another() -> None:
    code = "from kachery_fast import _core; print(_core.kernel(), _core.Sha1(b'abc').hexdigest())"
    for kernel in (*_core.KERNELS, ""):
        environment = {"KACHERY_SHA1_KERNEL": kernel} if kernel else {}
        outcome = run_python(code, **environment)
        assert outcome.stdout.split() == [kernel or _core.KERNELS[0], hashlib.sha1(b"abc").hexdigest()], outcome


@pytest.mark.parametrize("kernel", sorted({"sha-ni", "armv8", "sse9"} - set(_core.KERNELS)))
def test_a_kernel_that_the_cpu_lacks_is_an_error(kernel: str) -> None:
    with pytest.raises(InvalidSetting, match=kernel):
        _core.Sha1(kernel=kernel)
    with pytest.raises(InvalidSetting, match="this CPU has"):
        _core.digest_buffer(b"", 64, kernel=kernel)
    code = (
        "from kachery_fast import _core, errors\n"
        "for call in (_core.kernel, _core.Sha1, lambda: _core.digest_file(0, 64)):\n"
        "    try:\n        call()\n"
        "    except errors.InvalidSetting as error:\n        print(error)\n"
    )
    outcome = run_python(code, KACHERY_SHA1_KERNEL=kernel)
    assert outcome.stdout.count(kernel) == 3, outcome
    assert outcome.stdout.count("KACHERY_SHA1_KERNEL") == 3, outcome
