"""Where a request can stand, what can happen to it, and what it can ask to be done: the words of ``request.Requester``.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from msgspec import Struct

from ..errors import KacheryError
from .bodies import Assign, Cancel, Failed, Offer, Progress, Ready, Want
from .manifest import Chunk, Manifest

__all__ = [
    "BandRestored", "Broken", "BucketMoved", "ChunkAbsent", "ChunkDamaged", "ChunkEvent", "ChunkFailed", "ChunkGood",
    "ChunkHeld", "DamageChecked", "Discard", "Effect", "Event", "Fail", "Heard", "LoadChunk", "Locate", "LocateEvent",
    "LocateFailed", "Located", "LocatedAbsent", "Need", "Phase", "Prepare", "Prepared", "ReportDamage", "Say",
    "SayFailed", "Succeed", "Tick", "WholeDamaged", "WholeGood",
]


class Phase(Enum):
    """Where a request stands."""

    LOCATE = "locate"
    PREPARE = "prepare"
    MOVE = "move"
    DONE = "done"
    FAILED = "failed"


# --- events


class Need(Struct, frozen=True):
    """Somebody needs the bytes ``start`` to ``end``; the first such event starts the request. ``None``: the whole."""

    start: int | None = None
    end: int | None = None


class Located(Struct, frozen=True):
    """The file is cut by ``manifest``, or (None) is one object of ``size`` bytes."""

    manifest: Manifest | None
    manifest_sha1: str | None
    size: int


class LocatedAbsent(Struct, frozen=True):
    """The bucket has neither the manifest nor (asked without one) the object."""


class LocateFailed(Struct, frozen=True):
    """The bucket could not be asked, or what it gave is unusable."""

    error: KacheryError


class Prepared(Struct, frozen=True):
    """The destination is laid out; ``good`` are the chunks that a former attempt left there, verified again."""

    good: tuple[int, ...] = ()


class ChunkHeld(Struct, frozen=True):
    """All bytes of a chunk have arrived, unverified."""

    index: int


class ChunkGood(Struct, frozen=True):
    """A chunk's digest is right."""

    index: int


class ChunkDamaged(Struct, frozen=True):
    """A chunk's digest is wrong; ``found`` is what it is."""

    index: int
    found: str


class ChunkAbsent(Struct, frozen=True):
    """The bucket does not have this chunk."""

    index: int


class ChunkFailed(Struct, frozen=True):
    """A download failed for good, after the tries of the layer below."""

    index: int
    error: KacheryError


class DamageChecked(Struct, frozen=True):
    """The hub has looked at a damaged object: ``removed``, or found sound (or could not be asked)."""

    index: int
    removed: bool


class WholeGood(Struct, frozen=True):
    """The SHA-1 of the whole file is right."""


class WholeDamaged(Struct, frozen=True):
    """Every chunk has the digest that the manifest names, and yet the file is not the one asked for."""

    found: str


class Heard(Struct, frozen=True):
    """A message of a node that may provide files on this channel."""

    body: Offer | Ready | Progress | Failed
    sender: str


class SayFailed(Struct, frozen=True):
    """A message could not be sent."""

    error: KacheryError


class BandRestored(Struct, frozen=True):
    """The bands were out of reach for a while; messages may have been lost."""


class BucketMoved(Struct, frozen=True):
    """The channel has another bucket; what was announced so far may be in the former one."""


class Broken(Struct, frozen=True):
    """Something local failed: the disk, the store, a cancellation."""

    error: KacheryError


class Tick(Struct, frozen=True):
    """Time has passed."""


LocateEvent = Located | LocatedAbsent | LocateFailed
ChunkEvent = ChunkHeld | ChunkGood | ChunkDamaged | ChunkAbsent | ChunkFailed | DamageChecked
Event = (Need | LocateEvent | Prepared | ChunkEvent | WholeGood | WholeDamaged | Heard | SayFailed | BandRestored
         | BucketMoved | Broken | Tick)


# --- effects


class Locate(Struct, frozen=True):
    """Look in the local store and the bucket for the manifest, or (None) for the whole file as one object.

    ``announced``: a node says that it is there.
    """

    manifest_sha1: str | None
    announced: bool = False


class Prepare(Struct, frozen=True):
    """Lay out the destination for these chunks."""

    manifest: Manifest | None
    manifest_sha1: str | None
    size: int
    chunks: tuple[Chunk, ...]


class LoadChunk(Struct, frozen=True):
    """Download one chunk to its place. ``announced``: a node says that it is in the bucket."""

    index: int
    announced: bool = False


class ReportDamage(Struct, frozen=True):
    """Show the hub a damaged object; ``found`` is the SHA-1 of its bytes, empty when it has the wrong length."""

    index: int
    found: str


class Discard(Struct, frozen=True):
    """Throw away what was received: the manifest that cut it was not this file's."""


class Say(Struct, frozen=True):
    """Publish a message on the requestFiles band; the caller adds channel, time and id."""

    kind: type[Want] | type[Assign] | type[Cancel]
    fields: dict[str, Any]


class Succeed(Struct, frozen=True):
    """The whole file is here and verified."""


class Fail(Struct, frozen=True):
    """Nothing more can be done."""

    error: KacheryError


Effect = Locate | Prepare | LoadChunk | ReportDamage | Discard | Say | Succeed | Fail
