"""What happens to a node that shares feeds (``sharing.FeedSharer``), and what it wants done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .feed_bodies import FeedMessages, FeedShared, FeedSubscribe, Segment

__all__ = [
    "Appended", "Asked", "Effect", "Event", "Forgotten", "Listen", "Overheard", "ReadRest", "RestRead", "Said", "Share",
    "ShareEnded", "SharedSome", "Tick", "Withdrawn",
]

Key = tuple[str, str]  # feed id, subfeed


@dataclass(frozen=True)
class Asked:
    """A node that may request feeds asks for a subfeed that this node knows.

    ``own``: this node owns the feed. ``count``: how many messages are here. ``forked``: its owner signed two histories.
    ``jitter``: a random number, 0.0 to 1.0.
    """

    body: FeedSubscribe
    sender: str
    own: bool
    count: int
    forked: bool
    jitter: float


@dataclass(frozen=True)
class Appended:
    """Messages from number ``first`` on, canonical and signed, were made durable in a subfeed of this node's own."""

    key: Key
    first: int
    messages: list[bytes]
    head: dict[str, Any]


@dataclass(frozen=True)
class Overheard:
    """Another node has answered somebody's question about a subfeed that ``Listen`` has named."""

    body: FeedMessages | FeedShared


@dataclass(frozen=True)
class RestRead:
    """``ReadRest`` has ended: with all messages from ``position`` on, or None: too many for a message on a band.

    ``reason``, ``detail``: why they could not be read, as of ``FeedFailed``.
    """

    key: Key
    position: int
    messages: list[bytes] | None
    head: dict[str, Any] | None = None
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class SharedSome:
    """These segments of ``Share`` are in the bucket; without a gap from the one that holds the position on."""

    key: Key
    segments: list[Segment]
    head: dict[str, Any] | None = None


@dataclass(frozen=True)
class ShareEnded:
    """``Share`` has ended: everything up to message ``end`` is in the bucket; or it failed, as of ``FeedFailed``."""

    key: Key
    end: int
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Withdrawn:
    """Only these nodes may request feeds from now on."""

    allowed: frozenset[str]


@dataclass(frozen=True)
class Forgotten:
    """A feed was deleted."""

    feed_id: str


@dataclass(frozen=True)
class Tick:
    """The time that ``deadline`` named has come."""


Event = (Asked | Appended | Overheard | RestRead | SharedSome | ShareEnded | Withdrawn | Forgotten | Tick)


@dataclass(frozen=True)
class ReadRest:
    """Read all messages from ``position`` on, if they fit a message; answer by ``RestRead``."""

    key: Key
    position: int


@dataclass(frozen=True)
class Share:
    """Put the missing segments and the index in the bucket, those from ``position`` on first.

    Answer by ``SharedSome``, perhaps several times, and in the end ``ShareEnded``. ``distrust``: a reader has missed
    something that should be there; put everything from ``position`` on anew.
    """

    key: Key
    position: int
    distrust: bool


@dataclass(frozen=True)
class Said:
    """Say a body of this kind with these fields."""

    kind: Any
    fields: dict[str, Any]


@dataclass(frozen=True)
class Listen:
    """Tell by ``Overheard`` what others answer about a subfeed; no more when not ``on``."""

    key: Key
    on: bool


Effect = ReadRest | Share | Said | Listen
