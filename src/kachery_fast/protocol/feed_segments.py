"""The objects that carry a subfeed in a bucket: segments of many messages, and the index that names them.

A *segment* is canonical signed messages, a line each; it is named by its SHA-1 and never changes. ``subfeed.json``, the
one object that is replaced, names all segments from the first message on, so that a subfeed is read while no node that
has it is alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import BadMessage
from . import plain_json
from .feed_bodies import Segment
from .names import is_sha1

__all__ = [
    "INDEX_SIZE_BYTES_MAX", "SEGMENT_MESSAGES_MAX", "SEGMENT_SIZE_BYTES_MAX", "Index", "cut", "encode_index",
    "encode_segment", "parse_index", "parse_segment",
]

# Owner and relays cut alike, so that they make the same objects: these two are part of the format.
_CUT_SIZE_BYTES = 1024 * 1024
SEGMENT_MESSAGES_MAX = 10_000
# A longer message stands alone. JSON can take 25 times its length in memory ("{},{},…"), and whoever wrote a segment
# may mean harm: this keeps a reader within its bound of 512 MiB.
SEGMENT_SIZE_BYTES_MAX = 8 * 1024 * 1024
_HEAD_SIZE_BYTES_MAX = 2048
# 70 bytes a segment: room for 50,000 segments, 50 GB of messages. Reading it takes 0.1 s, and 30 MB of memory.
INDEX_SIZE_BYTES_MAX = 4 * 1024 * 1024
_COUNT_MAX = 2**53


@dataclass(frozen=True)
class Index:
    """What ``subfeed.json`` says. Nothing of it is proven: the head is to be read with ``read_head``, and the messages
    of the segments are to be verified. An index of 2022 has a count alone."""

    count: int
    head: dict[str, Any] | None
    segments: tuple[Segment, ...]


class _WireIndex(msgspec.Struct, gc=False):
    count: int = msgspec.field(name="messageCount")
    head: msgspec.Raw = msgspec.Raw(b"null")
    segments: list[tuple[int, int, int, str]] = []


_index_decoder = msgspec.json.Decoder(_WireIndex)
_head_decoder = msgspec.json.Decoder(dict[str, Any] | None)


def cut(sizes: Iterable[int], first: int) -> Iterator[tuple[int, int, int, bool]]:
    """Cut messages into segments: greedily, at most 1 MiB and 10,000 messages each, a longer message alone.

    :param sizes: the length in bytes of each signed message from number ``first`` on.
    :param first: 0, or where a closed segment ended; the cuts are then the same as from 0.
    :returns: yields (first, end, size of the segment in bytes, whether it is closed: no message to come belongs in it).
    """
    start = end = first
    size_bytes = 0
    for length in sizes:
        if end > start and (size_bytes + length + 1 > _CUT_SIZE_BYTES or end - start == SEGMENT_MESSAGES_MAX):
            yield start, end, size_bytes, True
            start, size_bytes = end, 0
        end += 1
        size_bytes += length + 1
    if end > start:
        yield start, end, size_bytes, size_bytes >= _CUT_SIZE_BYTES or end - start == SEGMENT_MESSAGES_MAX


def encode_segment(messages: Sequence[bytes]) -> bytes:
    """Return the bytes of a segment: canonical signed messages, each with a line feed after it."""
    return b"".join(part for message in messages for part in (message, b"\n"))


def parse_segment(data: bytes) -> list[dict[str, Any]]:
    """Read a segment; its messages are still to be verified.

    :raises BadMessage: it is not lines of JSON objects, or has too many of them.
    """
    if data.count(b"\n") > SEGMENT_MESSAGES_MAX or not data.endswith(b"\n"):
        raise BadMessage(why=f"a segment is 1 to {SEGMENT_MESSAGES_MAX} lines, each ended by a line feed")
    try:
        messages = plain_json.decode_lines(data[:-1])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(why=f"a segment is lines of JSON objects ({error})") from None
    if not all(isinstance(message, dict) for message in messages):
        raise BadMessage(why="a segment is lines of JSON objects, and one is of something else")
    return messages


def encode_index(count: int, head: dict[str, Any] | None, segments: Sequence[Segment]) -> bytes:
    """Return the bytes of ``subfeed.json``: ``count`` messages, the head if one is known, all segments from 0."""
    rows = [(part.first, part.end, part.size, part.sha1) for part in segments]
    return msgspec.json.encode({"messageCount": count, "head": head, "segments": rows})


def parse_index(data: bytes) -> Index:
    """Read a ``subfeed.json``, ours or one of 2022 (which has no segments).

    :raises BadMessage: it is none, or its segments have gaps, are too long, or end elsewhere than the count.
    """
    try:
        wire = _index_decoder.decode(data)
        if len(bytes(wire.head)) > _HEAD_SIZE_BYTES_MAX:
            raise BadMessage(why=f"the head in the index is longer than {_HEAD_SIZE_BYTES_MAX} bytes")
        head = _head_decoder.decode(wire.head)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(why=f"it is not the index of a subfeed ({error})") from None
    position = 0
    for number, (first, end, size, sha1) in enumerate(wire.segments):
        if first != position or not first < end <= first + SEGMENT_MESSAGES_MAX or not is_sha1(sha1):
            raise BadMessage(why=f"segment {number} of the index is malformed, or does not follow the one before it")
        if not 0 < size <= SEGMENT_SIZE_BYTES_MAX:
            raise BadMessage(why=f"segment {number} of the index is {size} bytes; {SEGMENT_SIZE_BYTES_MAX} are allowed")
        position = end
    if not 0 <= wire.count < _COUNT_MAX or (wire.segments and position != wire.count):
        raise BadMessage(why=f"the segments of the index end at {position}, its count is {wire.count}")
    return Index(wire.count, head, tuple(Segment(*row) for row in wire.segments))
