"""What nodes say about feeds on the bands.

A subfeed is named by its feed's id (the feed's public key) and the SHA-1 of its name (``names.subfeed_hash``). A signed
message, and a head, are plain JSON as ``protocol.feeds`` makes and checks them: whoever sends them, only the feed's
key can have made them, so a node that holds a copy may answer for the owner.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from .bodies import Body

__all__ = ["FeedFailed", "FeedMessages", "FeedShared", "FeedSubscribe", "Segment"]


class FeedSubscribe(Body, tag="feedSubscribe"):
    """requestFeeds: I hold ``position`` messages of this subfeed; who has more?

    With ``live``, the owner also pushes what is appended later, for ``feed_subscription_seconds``; readers renew it.
    """

    request: str
    feed_id: str
    subfeed: str
    position: int
    live: bool = False


class Segment(msgspec.Struct, frozen=True):
    """Messages ``first`` to ``end`` (exclusive) of a subfeed, in one object of the bucket named by its SHA-1."""

    first: int
    end: int
    size: int
    sha1: str


class FeedShared(Body, tag="feedShared"):
    """provideFeeds: these segments, without a gap from the one that holds the position asked for, are in the bucket.

    When they end before the head's count there is more: the reader asks on from where they end. ``request`` is empty
    in what the owner tells whoever subscribed.
    """

    request: str
    feed_id: str
    subfeed: str
    segments: list[Segment]
    head: dict[str, Any] | None = None


class FeedMessages(Body, tag="feedMessages"):
    """provideFeeds: signed messages from number ``first`` on, few enough for a band; none: you are at the end.

    ``request`` is empty in what the owner pushes to whoever subscribed.
    """

    request: str
    feed_id: str
    subfeed: str
    first: int
    messages: list[dict[str, Any]] = msgspec.field(default_factory=list)
    head: dict[str, Any] | None = None


class FeedFailed(Body, tag="feedFailed"):
    """provideFeeds: I have it and cannot share it. ``reason`` is one word of ``REASONS``, ``detail`` a sentence."""

    REASONS: ClassVar[tuple[str, ...]] = ("forked", "deleted", "not-permitted", "disk-error", "bucket", "hub", "busy")

    request: str
    feed_id: str
    subfeed: str
    reason: str
    detail: str = ""
