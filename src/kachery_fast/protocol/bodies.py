"""What nodes say about files on the bands; and what every body of ours carries.

Chunk ranges are lists of ``[first, end)`` pairs of chunk indices.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

__all__ = [
    "Assign", "Body", "Cancel", "Failed", "Offer", "Progress", "Ready", "RequestFile2022", "UploadFileStatus2022",
    "Want", "compress", "expand",
]

Ranges = list[tuple[int, int]]


class Body(msgspec.Struct, kw_only=True, rename="camel", omit_defaults=True):
    """What every body of ours carries. ``time`` is milliseconds since the epoch, ``id`` 32 random hex digits."""

    channel: str = ""
    time: int
    id: str


class Want(Body, tag="want"):
    """requestFiles: who has this file? ``manifest`` is the one the requester holds or was told of."""

    request: str
    sha1: str
    manifest: str | None = None


class Assign(Body, tag="assign"):
    """requestFiles: ``provider`` shall upload these chunks, and the manifest first when ``send_manifest``.

    Chunk indices beyond the file's end are ignored: a requester that has yet to see the manifest may guess.
    """

    request: str
    provider: str
    sha1: str
    manifest: str | None = None
    chunks: Ranges = []
    send_manifest: bool = False


class Cancel(Body, tag="cancel"):
    """requestFiles: the requester needs nothing more for this request."""

    request: str


class Offer(Body, tag="offer"):
    """provideFiles: I have it, ``size`` bytes, cut by ``manifest``; ``load`` chunks are queued here already."""

    request: str
    sha1: str
    size: int
    manifest: str | None = None
    load: int = 0


class Ready(Body, tag="ready"):
    """provideFiles: these chunks (and the manifest) are in the bucket now."""

    request: str
    chunks: Ranges = []
    manifest_ready: bool = False


class Progress(Body, tag="progress"):
    """provideFiles, each second while at work: ``bytes`` sent so far for this request, ``queued`` chunks to go."""

    request: str
    bytes: int
    queued: int = 0


class Failed(Body, tag="failed"):
    """provideFiles: the provider cannot go on. ``reason`` is one word of ``REASONS``, ``detail`` a sentence."""

    REASONS: ClassVar[tuple[str, ...]] = (
        "unknown", "not-permitted", "evicted", "changed-on-disk", "disk-error", "busy", "bucket", "hub")

    request: str
    reason: str
    detail: str = ""


class RequestFile2022(msgspec.Struct, tag="requestFile", rename="camel"):
    """requestFiles, 2022: please upload this object. ``file_key`` is echoed as it came."""

    file_key: dict[str, Any]


class UploadFileStatus2022(msgspec.Struct, tag="uploadFileStatus", rename="camel"):
    """provideFiles, 2022: ``status`` is ``started``, then ``finished`` once the object is in the bucket."""

    file_key: dict[str, Any]
    status: str


def compress(indices: list[int]) -> Ranges:
    """Turn chunk indices into ranges: ``[0, 1, 2, 5]`` -> ``[(0, 3), (5, 6)]``."""
    ranges: Ranges = []
    for index in sorted(indices):
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        elif not ranges or index >= ranges[-1][1]:
            ranges.append((index, index + 1))
    return ranges


def expand(ranges: Ranges, count: int) -> list[int]:
    """Turn ranges into sorted indices below ``count``, each once; overlaps and what lies beyond cost nothing."""
    indices: list[int] = []
    position = 0
    for first, end in sorted(ranges):
        indices.extend(range(max(first, position), min(end, count)))
        position = max(position, end)
    return indices
