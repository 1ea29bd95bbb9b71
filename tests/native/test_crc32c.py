"""CRC-32C against the vectors of its specification and Google's own implementation, by every kernel."""

from __future__ import annotations

import os

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_fast import _checksum

every_kernel = pytest.mark.parametrize("kernel", [*_checksum.KERNELS, None])


@every_kernel
@pytest.mark.parametrize(("data", "value"), [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),  # this one and those that follow: RFC 3720, B.4
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
])
def test_the_vectors_of_the_specification_hold(data: bytes, value: int, kernel: str | None) -> None:
    assert _checksum.crc32c(data, kernel=kernel) == value


@every_kernel
def test_every_length_and_alignment_is_right(kernel: str | None) -> None:
    data = os.urandom(50_000)
    for length in [*range(70), 4095, 4096, 4097, 8190, *range(24_575, 24_586), 49_151, 49_152, 49_153]:
        for start in range(9):
            piece = memoryview(data)[start:start + length]
            assert _checksum.crc32c(piece, kernel=kernel) == google_crc32c.value(bytes(piece))


@every_kernel
def test_more_than_one_span_is_right(kernel: str | None) -> None:
    data = os.urandom(17 * 2**20 + 3)
    assert _checksum.crc32c(data, kernel=kernel) == google_crc32c.value(data)


@given(st.lists(st.binary(max_size=200)))
def test_pieces_make_a_whole(pieces: list[bytes]) -> None:
    value = 0
    for piece in pieces:
        value = _checksum.crc32c(piece, value)
    assert value == google_crc32c.value(b"".join(pieces))


def test_a_kernel_that_the_cpu_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="this CPU has"):
        _checksum.crc32c(b"", kernel="sse9")
    with pytest.raises(TypeError):
        _checksum.crc32c("text")  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        _checksum.crc32c(memoryview(bytes(10))[::2])
