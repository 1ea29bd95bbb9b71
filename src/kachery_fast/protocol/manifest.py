"""Chunk manifests: parse, validate, canonical bytes.

Format of 2022 (WIRE-2022.md §4): ``{"size":N,"sha1":"…","chunks":[{"start":0,"end":20000000,"sha1":"…"},…]}``,
compact, keys in this order. A manifest's name is the SHA-1 of exactly these bytes, and it exists only for a file of
more than one chunk. New ones cut at 20 MiB, those of 2022 at 20,000,000 bytes; any geometry is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from ..errors import ManifestInvalid
from .names import is_sha1

__all__ = ["CHUNK_SIZE_BYTES_MAX", "MANIFEST_SIZE_BYTES_MAX", "Chunk", "Manifest", "make_manifest", "parse_manifest"]

# A chunk takes about 80 bytes here and 300 in memory while a manifest is read: this holds files of 500,000 chunks
# (10 TB at 20 MiB), and a hostile one cannot take a node beyond its bound of 512 MiB.
MANIFEST_SIZE_BYTES_MAX = 48 * 1024 * 1024
# A chunk is mapped, and held in flight, as a whole: bound what a hostile manifest can ask for.
CHUNK_SIZE_BYTES_MAX = 64 * 1024 * 1024


class Chunk(NamedTuple):
    """Bytes ``start`` to ``end`` (exclusive) of a file, and their SHA-1."""

    start: int
    end: int
    sha1: str


class Manifest(NamedTuple):
    """The chunks of one file, in order and without gaps."""

    size: int
    sha1: str
    chunks: tuple[Chunk, ...]

    def encode(self) -> bytes:
        """Return the canonical bytes, whose SHA-1 is the manifest's name."""
        chunks = ",".join(f'{{"start":{c.start},"end":{c.end},"sha1":"{c.sha1}"}}' for c in self.chunks)
        return f'{{"size":{self.size},"sha1":"{self.sha1}","chunks":[{chunks}]}}'.encode()

    @property
    def name(self) -> str:
        """The SHA-1 of the canonical bytes."""
        return hashlib.sha1(self.encode(), usedforsecurity=False).hexdigest()

    def chunk_span(self, start: int, end: int) -> range:
        """Return the indices of the chunks that overlap the bytes ``start`` to ``end`` (exclusive)."""
        if start >= end:
            return range(0)
        return range(self._index_at(start), self._index_at(end - 1) + 1)

    def _index_at(self, position: int) -> int:
        low, high = 0, len(self.chunks)
        while low + 1 < high:
            middle = (low + high) // 2
            if self.chunks[middle].start <= position:
                low = middle
            else:
                high = middle
        return low


class _WireChunk(msgspec.Struct, gc=False):
    start: int
    end: int
    sha1: str


class _WireManifest(msgspec.Struct, gc=False):
    size: int
    sha1: str
    chunks: list[_WireChunk]


_decoder = msgspec.json.Decoder(_WireManifest)


def make_manifest(size: int, sha1: str, chunk_sha1s: Sequence[str], chunk_size_bytes: int) -> Manifest:
    """Build the manifest of a file of ``size`` bytes cut every ``chunk_size_bytes`` bytes.

    :param chunk_sha1s: one SHA-1 for each chunk, the last short one included.
    :raises ManifestInvalid: their number does not fit the size.
    """
    if len(chunk_sha1s) != -(-size // chunk_size_bytes):
        raise ManifestInvalid(manifest=f"of {sha1}", why=f"{len(chunk_sha1s)} chunks cannot make {size} bytes")
    chunks = tuple(
        Chunk(index * chunk_size_bytes, min(size, (index + 1) * chunk_size_bytes), chunk_sha1)
        for index, chunk_sha1 in enumerate(chunk_sha1s)
    )
    return Manifest(size, sha1, chunks)


def parse_manifest(data: bytes, *, name: str) -> Manifest:
    """Read a manifest and check it against its name and in itself.

    :param name: the SHA-1 that its bytes must have.
    :raises ManifestInvalid: wrong bytes for the name, not a manifest, gaps or overlaps, an absurd chunk size.
    """
    def invalid(why: str) -> ManifestInvalid:
        return ManifestInvalid(manifest=name, why=why)

    found = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    if found != name:
        raise invalid(f"its bytes have the SHA-1 {found}")
    try:
        wire = _decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"it is not a manifest ({error})") from None
    if not is_sha1(wire.sha1):
        raise invalid("its file's SHA-1 is malformed")
    position = 0
    for number, chunk in enumerate(wire.chunks):
        if chunk.start != position or chunk.end <= chunk.start:
            raise invalid(f"chunk {number} goes from {chunk.start} to {chunk.end}, expected to start at {position}")
        if chunk.end - chunk.start > CHUNK_SIZE_BYTES_MAX:
            raise invalid(f"chunk {number} is {chunk.end - chunk.start} bytes; {CHUNK_SIZE_BYTES_MAX} are allowed")
        if not is_sha1(chunk.sha1):
            raise invalid(f"the SHA-1 of chunk {number} is malformed")
        position = chunk.end
    if position != wire.size:
        raise invalid(f"its chunks end at {position}, its size is {wire.size}")
    return Manifest(wire.size, wire.sha1, tuple(Chunk(c.start, c.end, c.sha1) for c in wire.chunks))
