"""What a hub needs of a bucket and of a pub/sub service; one file for each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from ...protocol.hub_bodies import PubsubInfo, PubsubToken

__all__ = ["BucketEngine", "PubsubEngine", "SignedRead", "SignedUrl"]


class SignedUrl(NamedTuple):
    """Where to PUT one object, and the headers without which the signature does not hold."""

    url: str
    headers: dict[str, str]


class SignedRead(NamedTuple):
    """Where to read one object, and until when, milliseconds since the epoch."""

    url: str
    expires_ms: int


class BucketEngine(Protocol):
    """Objects by name. The methods that touch objects block, and are called off the event loop."""

    url_base: str
    """The base of object URLs, relative to the hub if it begins with a slash."""

    def sign_put(
        self, object_name: str, size_bytes: int, life_seconds: float, *, replace: bool = False
    ) -> SignedUrl:
        """Sign one upload of exactly ``size_bytes`` bytes, create-only unless ``replace``. Quick: no I/O."""

    def sign_get(self, object_name: str, life_seconds: float, *, head: bool = False) -> SignedRead:
        """Sign reads of one object by GET, or by HEAD, there or not. Quick: no I/O."""

    def sha1(self, object_name: str) -> str:
        """Return the SHA-1 of an object's bytes.

        :raises ObjectMissing: there is no such object.
        """

    def read(self, object_name: str, limit_bytes: int) -> tuple[bytes, str]:
        """Return an object's bytes, and what tells it from any object that replaces it (its etag, or generation).

        :raises ObjectMissing: there is no such object. :raises TooLarge: it is longer than ``limit_bytes``.
        """

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

    async def revoke(self, node_id: str) -> None:
        """Make all tokens issued to a node until now useless, and break its connections off."""
