"""What can happen to a request, and what it can ask to be done: the two vocabularies of ``request.Requester``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import KacheryError
from .bodies import Assign, Cancel, Failed, Offer, Progress, Ready, Want
from .manifest import Chunk, Manifest

__all__ = [
    "BandRestored", "Broken", "ChunkAbsent", "ChunkDamaged", "ChunkEvent", "ChunkFailed", "ChunkGood", "ChunkHeld",
    "DamageChecked", "Discard", "Effect", "Event", "Fail", "Heard", "LoadChunk", "Locate", "LocateEvent",
    "LocateFailed", "Located", "LocatedAbsent", "Need", "Prepare", "Prepared", "ReportDamage", "Say", "SayFailed",
    "Succeed", "Tick", "WholeDamaged", "WholeGood",
]

# --- events


@dataclass(frozen=True)
class Need:
    """Somebody needs the bytes ``start`` to ``end``; the first such event starts the request. ``None``: the whole."""

    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Located:
    """The file is cut by ``manifest``, or (None) is one object of ``size`` bytes."""

    manifest: Manifest | None
    manifest_sha1: str | None
    size: int


@dataclass(frozen=True)
class LocatedAbsent:
    """The bucket has neither the manifest nor (asked without one) the object."""


@dataclass(frozen=True)
class LocateFailed:
    """The bucket could not be asked, or what it gave is unusable."""

    error: KacheryError


@dataclass(frozen=True)
class Prepared:
    """The destination is laid out; ``good`` are the chunks that a former attempt left there, verified again."""

    good: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChunkHeld:
    """All bytes of a chunk have arrived, unverified."""

    index: int


@dataclass(frozen=True)
class ChunkGood:
    """A chunk's digest is right."""

    index: int


@dataclass(frozen=True)
class ChunkDamaged:
    """A chunk's digest is wrong; ``found`` is what it is."""

    index: int
    found: str


@dataclass(frozen=True)
class ChunkAbsent:
    """The bucket does not have this chunk."""

    index: int


@dataclass(frozen=True)
class ChunkFailed:
    """A download failed for good, after the tries of the layer below."""

    index: int
    error: KacheryError


@dataclass(frozen=True)
class DamageChecked:
    """The hub has looked at a damaged object: ``removed``, or found sound (or could not be asked)."""

    index: int
    removed: bool


@dataclass(frozen=True)
class WholeGood:
    """The SHA-1 of the whole file is right."""


@dataclass(frozen=True)
class WholeDamaged:
    """Every chunk has the digest that the manifest names, and yet the file is not the one asked for."""

    found: str


@dataclass(frozen=True)
class Heard:
    """A message of a node that may provide files on this channel."""

    body: Offer | Ready | Progress | Failed
    sender: str


@dataclass(frozen=True)
class SayFailed:
    """A message could not be sent."""

    error: KacheryError


@dataclass(frozen=True)
class BandRestored:
    """The bands were out of reach for a while; messages may have been lost."""


@dataclass(frozen=True)
class Broken:
    """Something local failed: the disk, the store, a cancellation."""

    error: KacheryError


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


LocateEvent = Located | LocatedAbsent | LocateFailed
ChunkEvent = ChunkHeld | ChunkGood | ChunkDamaged | ChunkAbsent | ChunkFailed | DamageChecked
Event = (Need | LocateEvent | Prepared | ChunkEvent | WholeGood | WholeDamaged | Heard | SayFailed | BandRestored
         | Broken | Tick)


# --- effects


@dataclass(frozen=True)
class Locate:
    """Look in the local store and the bucket for the manifest, or (None) for the whole file as one object."""

    manifest_sha1: str | None


@dataclass(frozen=True)
class Prepare:
    """Lay out the destination for these chunks."""

    manifest: Manifest | None
    manifest_sha1: str | None
    size: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class LoadChunk:
    """Download one chunk to its place."""

    index: int


@dataclass(frozen=True)
class ReportDamage:
    """Show the hub a damaged object; ``found`` is the SHA-1 of its bytes, empty when it has the wrong length."""

    index: int
    found: str


@dataclass(frozen=True)
class Discard:
    """Throw away what was received: the manifest that cut it was not this file's."""


@dataclass(frozen=True)
class Say:
    """Publish a message on the requestFiles band; the caller adds channel, time and id."""

    kind: type[Want] | type[Assign] | type[Cancel]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Succeed:
    """The whole file is here and verified."""


@dataclass(frozen=True)
class Fail:
    """Nothing more can be done."""

    error: KacheryError


Effect = Locate | Prepare | LoadChunk | ReportDamage | Discard | Say | Succeed | Fail
