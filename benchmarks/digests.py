"""The digests, and storing and linking as far as the native core does them, beside hashlib and OpenSSL."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.measure import Figure, figure, make_file, pairs, rate
from kachery_fast import _core
from kachery_fast._checksum import crc32c

__all__ = [
    "copy_file_versus_openssl",
    "crc32c_versus_google",
    "digest_file_versus_openssl",
    "fused_versus_blake3", "fused_versus_hashlib",
    "fused_versus_two_passes",
]

CHUNK_SIZE_BYTES = 20 << 20
GB = 1e9


def _buffer(size_bytes: int) -> memoryview:
    return memoryview(np.random.Generator(np.random.SFC64(1)).bytes(size_bytes))


def _two_passes(buffer: memoryview) -> tuple[str, tuple[str, ...]]:
    chunks = range(0, len(buffer), CHUNK_SIZE_BYTES)
    return hashlib.sha1(buffer).hexdigest(), tuple(
        hashlib.sha1(buffer[start : start + CHUNK_SIZE_BYTES]).hexdigest() for start in chunks
    )


def fused_versus_hashlib(size_bytes: int = 256 << 20, count: int = 9) -> Figure:
    """Both digests of a buffer by one thread, beside one digest of it by ``hashlib.sha1``."""
    buffer = _buffer(size_bytes)
    if _core.digest_buffer(buffer, CHUNK_SIZE_BYTES)[1:] != _two_passes(buffer):
        raise AssertionError("the digests differ")
    measured = pairs(
        rate(lambda: _core.digest_buffer(buffer, CHUNK_SIZE_BYTES), size_bytes / GB),
        rate(lambda: hashlib.sha1(buffer), size_bytes / GB),
        count,
    )
    return figure("both digests / hashlib once", measured, unit="GB/s", bar=">= 0.85", note=_note(size_bytes))


def fused_versus_two_passes(size_bytes: int = 256 << 20, count: int = 7) -> Figure:
    """Both digests of a buffer by one thread, beside ``hashlib.sha1`` of it and then of each chunk."""
    buffer = _buffer(size_bytes)
    measured = pairs(
        rate(lambda: _core.digest_buffer(buffer, CHUNK_SIZE_BYTES), size_bytes / GB),
        rate(lambda: _two_passes(buffer), size_bytes / GB),
        count,
    )
    return figure("both digests / hashlib twice", measured, unit="GB/s", bar=">= 1.6", note=_note(size_bytes))


def fused_versus_blake3(size_bytes: int = 256 << 20, count: int = 7) -> Figure:
    """Both SHA-1 digests by one thread, beside one BLAKE3 digest by one: what the names of 2022 cost."""
    try:
        from blake3 import blake3
    except ImportError:
        raise FileNotFoundError("the package blake3 is not installed") from None
    buffer = _buffer(size_bytes)
    measured = pairs(
        rate(lambda: _core.digest_buffer(buffer, CHUNK_SIZE_BYTES), size_bytes / GB),
        rate(lambda: blake3(buffer).digest(), size_bytes / GB),
        count,
    )
    return figure("both SHA-1 digests / one BLAKE3", measured, unit="GB/s", bar="shown", note=_note(size_bytes))


def crc32c_versus_google(directory: Path, size_bytes: int = CHUNK_SIZE_BYTES, count: int = 15) -> Figure:
    """The CRC-32C of a chunk, which Google compares with what arrives, beside Google's own package."""
    import google_crc32c

    chunk = bytes(_buffer(size_bytes))
    if crc32c(chunk) != google_crc32c.value(chunk):
        raise AssertionError("the checksums differ")
    measured = pairs(rate(lambda: crc32c(chunk), size_bytes / GB),
                     rate(lambda: google_crc32c.value(chunk), size_bytes / GB), count)
    return figure("CRC-32C / google-crc32c", measured, unit="GB/s", bar=">= 1.0",
                  note=f"{size_bytes >> 20} MiB, one thread; google-crc32c's implementation in "
                       f"{'C' if google_crc32c.implementation == 'c' else 'Python'}")


def digest_file_versus_openssl(directory: Path, size_bytes: int = 2 << 30, count: int = 5) -> Figure:
    """Both digests of a file in the page cache, beside ``openssl dgst -sha1`` of it."""
    source = make_file(directory / "digest.dat", size_bytes)

    def ours() -> str:
        fd = os.open(source, os.O_RDONLY)
        try:
            return _core.digest_file(fd, CHUNK_SIZE_BYTES).sha1
        finally:
            os.close(fd)

    if ours() != openssl_sha1(source):
        raise AssertionError("the digests differ")
    measured = pairs(rate(ours, size_bytes / GB), rate(lambda: openssl_sha1(source), size_bytes / GB), count)
    source.unlink()
    return figure("digest_file / openssl dgst", measured, unit="GB/s", bar=">= 1.1", note=_note(size_bytes))


def copy_file_versus_openssl(directory: Path, size_bytes: int = 2 << 30, count: int = 5) -> Figure:
    """A copy and both digests of a file in the page cache, beside ``openssl dgst -sha1``, which copies nothing.

    The copy is not synced to the disk, and is removed outside the measured time.
    """
    source = make_file(directory / "source.dat", size_bytes)
    target = directory / "target.dat"

    def ours() -> str:
        source_fd = os.open(source, os.O_RDONLY)
        target_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            return _core.copy_file(source_fd, target_fd, CHUNK_SIZE_BYTES).sha1
        finally:
            os.close(source_fd)
            os.close(target_fd)

    def ours_to_nothing() -> float:
        target.unlink(missing_ok=True)
        return rate(ours, size_bytes / GB)()

    if ours() != openssl_sha1(source) or openssl_sha1(target) != openssl_sha1(source):
        raise AssertionError("the copy differs")
    measured = pairs(ours_to_nothing, rate(lambda: openssl_sha1(source), size_bytes / GB), count)
    source.unlink()
    target.unlink()
    return figure("copy_file / openssl dgst", measured, unit="GB/s", bar=">= 1.0", note=_note(size_bytes))


def openssl_sha1(path: Path) -> str:
    """Return the SHA-1 of a file by the ``openssl`` program.

    :raises FileNotFoundError: there is no such program.
    """
    output = subprocess.run(["openssl", "dgst", "-sha1", str(path)], check=True, capture_output=True, text=True)
    return output.stdout.split()[-1]


def _note(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB, kernel {_core.kernel()}"
