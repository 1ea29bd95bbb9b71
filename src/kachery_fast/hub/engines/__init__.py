"""What a hub needs of a bucket and of a pub/sub service; one file for each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from ...protocol.hub_bodies import PubsubInfo, PubsubToken

__all__ = [
    "BandTraffic", "BucketEngine", "BucketTotals", "KindTotal", "ObjectRecord", "PubsubEngine", "SignedRead",
    "SignedUrl",
]


class SignedUrl(NamedTuple):
    """Where to PUT one object, and the headers without which the signature does not hold.

    ``resumable``: where to POST, instead, for a session that takes it (Google's; ``net.resumable``).
    """

    url: str
    headers: dict[str, str]
    resumable: bool = False


class ObjectRecord(NamedTuple):
    """An object in a bucket. Times are seconds since the epoch; ``last_read`` is None where that is not known."""

    name: str
    size_bytes: int
    created: float
    last_read: float | None


class KindTotal(NamedTuple):
    """How many objects of a kind there are, and of how many bytes together."""

    objects: int = 0
    size_bytes: int = 0


class BucketTotals(NamedTuple):
    """How much there is of a channel, by kind (``sha1``, ``feeds``, ``task_results``).

    ``counted``: whether that is all; else it is what was counted so far.
    """

    kinds: Mapping[str, KindTotal]
    counted: bool

    @property
    def size_bytes(self) -> int:
        """All kinds together."""
        return sum(kind.size_bytes for kind in self.kinds.values())


class SignedRead(NamedTuple):
    """Where to read one object, and until when, milliseconds since the epoch."""

    url: str
    expires_ms: int


class BandTraffic(NamedTuple):
    """What moves on a band: messages in each of the last seconds, the oldest first, the bytes of them all, and the ids
    of the nodes that listen."""

    messages: Sequence[int]
    size_bytes: int
    listeners: frozenset[str]


class BucketEngine(Protocol):
    """Objects by name. The methods that touch objects block, and are called off the event loop."""

    url_base: str
    """The base of object URLs, relative to the hub if it begins with a slash."""

    watched: bool
    """Whether the hub sees what moves; else an upload counts from when it was signed."""

    notes_reads: bool
    """Whether it is known when an object was last read, so that unread ones can expire."""

    def sign_put(
        self, object_name: str, size_bytes: int, life_seconds: float, *, replace: bool = False, node_id: str = "",
        crc32c: int | None = None,
    ) -> SignedUrl:
        """Sign one upload of exactly ``size_bytes`` bytes by a node, create-only unless ``replace``. Quick: no I/O.

        :param crc32c: of the bytes, where the node told; a bucket that does not compare it leaves it out.
        """

    def totals(self, channel: str) -> BucketTotals:
        """Return how much there is of a channel, as far as that is known without I/O."""

    def size(self, object_name: str) -> int | None:
        """Return an object's size in bytes, None when there is no such object."""

    def objects(self, channel: str, *, kind: str = "", after: str = "", limit: int) -> list[ObjectRecord]:
        """Return a channel's objects in the order of their names (by code points), at most ``limit``.

        :param kind: only those of this one. :param after: only those whose names come after this.
        """

    def expire(self, object_name: str, unread_since: float) -> bool:
        """Remove an object if it was last read before then (seconds since the epoch) and is not being read.

        :returns: whether it was removed. Of a bucket that knows of no reads: never.
        """

    def sign_get(self, object_name: str, life_seconds: float, *, head: bool = False) -> SignedRead:
        """Sign reads of one object by GET, or by HEAD, there or not. Quick: no I/O."""

    def sha1(self, object_name: str) -> str:
        """Return the SHA-1 of an object's bytes.

        :raises ObjectMissing: there is no such object. :raises TooLarge: it is longer than any that was signed for.
        """

    def read(self, object_name: str, limit_bytes: int) -> tuple[bytes, str]:
        """Return an object's bytes, and what tells it from any object that replaces it (its etag, or generation).

        :raises ObjectMissing: there is no such object. :raises TooLarge: it is longer than ``limit_bytes``.
        """

    def write(self, object_name: str, data: bytes, *, replace: bool = False) -> bool:
        """Make an object of these bytes; False when there was one already, and it was not to be replaced."""

    def remove(self, object_name: str, *, etag: str | None = None) -> bool:
        """Remove an object, only that of ``read`` when its ``etag`` is given; False when it was not there."""

    def remove_channel(self, channel: str) -> int:
        """Remove all objects of a channel; return how many."""


class PubsubEngine(Protocol):
    """Bands by name."""

    def info(self) -> PubsubInfo:
        """Where nodes find the bands."""

    def token(self, node_id: str, capability: Mapping[str, Sequence[str]], life_seconds: float) -> PubsubToken:
        """Issue a token for exactly these operations on these bands. Quick and synchronous: it follows a decision,
        and nothing may come between the two."""

    async def revoke(self, node_ids: Sequence[str]) -> None:
        """Make all tokens issued to these nodes until now useless, and break their connections off, as well as the
        service can. :raises KacheryError: it cannot."""
