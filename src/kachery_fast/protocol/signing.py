"""Envelopes, signatures and freshness.

Keys are raw Ed25519: 32 bytes, written as 64 hex digits; a node's id is its public key. What this program signs is the
canonical JSON of a body, directly. The network of 2022 signed the 20 raw bytes of the SHA-1 of it (WIRE-2022.md §1);
that form, only as strong as SHA-1, is verified where a message of 2022 is read and never made for new messages.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ..errors import StaleMessage
from .canonical import canonical_bytes

__all__ = ["FreshnessGuard", "private_key", "public_id", "sign", "sign_2022", "verify", "verify_2022", "verify_bytes"]


def private_key(seed: bytes) -> Ed25519PrivateKey:
    """Return the key of a 32-byte seed."""
    return Ed25519PrivateKey.from_private_bytes(seed)


def public_id(key: Ed25519PrivateKey) -> str:
    """Return the public half as 64 hex digits: the id of the node, or feed, that owns the key."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def sign(body: Any, key: Ed25519PrivateKey) -> str:
    """Sign the canonical JSON of ``body``; 128 hex digits."""
    return key.sign(canonical_bytes(body)).hex()


def sign_2022(body: Any, key: Ed25519PrivateKey) -> str:
    """Sign as the network of 2022 did, over the SHA-1 of the canonical JSON: for answers to its nodes."""
    return key.sign(hashlib.sha1(canonical_bytes(body), usedforsecurity=False).digest()).hex()


def verify(body: Any, signature: str, signer_id: str) -> bool:
    """Whether ``signature`` is ``signer_id``'s over the canonical JSON of ``body``. Malformed input is simply False."""
    return verify_bytes(canonical_bytes(body), signature, signer_id)


def verify_2022(body: Any, signature: str, signer_id: str) -> bool:
    """Whether either form that the network of 2022 accepted holds: over the SHA-1, or over the canonical JSON."""
    data = canonical_bytes(body)
    digest = hashlib.sha1(data, usedforsecurity=False).digest()
    return verify_bytes(digest, signature, signer_id) or verify_bytes(data, signature, signer_id)


def verify_bytes(data: bytes, signature: str, signer_id: str) -> bool:
    """Whether ``signature`` is ``signer_id``'s over these bytes. Malformed input is simply False."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signer_id))
        key.verify(bytes.fromhex(signature), data)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_age(time_ms: int, now: float, age_seconds_max: float) -> None:
    """Refuse a signed message that is too old, or from the future.

    :param time_ms: the time inside it, in milliseconds since the epoch. :param now: the present, in seconds.
    :raises StaleMessage: it is.
    """
    age_seconds = now - time_ms / 1000
    if abs(age_seconds) > age_seconds_max:
        why = f"{abs(age_seconds):.0f} s {'old' if age_seconds > 0 else 'in the future'}"
        raise StaleMessage(time=time_ms, now=int(now * 1000), why=why, limit=age_seconds_max)


class FreshnessGuard:
    """Refuses signed messages that are too old, from the future, or seen before.

    It remembers each (signer, id) for as long as a message of that age would be accepted, at most ``entries_max`` of
    them, and of one signer at most ``signer_entries_max`` (None: an eighth of that); when full, the oldest is
    forgotten only after it is too old anyway, else the new message is refused, so that a flood cannot open a window
    for replay, and the flood of one member shuts out that member alone.
    """

    def __init__(
        self, age_seconds_max: float, entries_max: int = 200_000, *, signer_entries_max: int | None = None
    ) -> None:
        self._age_seconds_max = age_seconds_max
        self._entries_max = entries_max
        self._signer_entries_max = max(1, entries_max // 8) if signer_entries_max is None else signer_entries_max
        self._seen: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def check(self, signer_id: str, message_id: str, time_ms: int, now: float) -> None:
        """Accept the message, once.

        :param time_ms: the time inside the signed body, milliseconds since the epoch.
        :param now: the present, seconds since the epoch.
        :raises StaleMessage: it is too old or from the future, was seen before, or too many are remembered.
        """
        check_age(time_ms, now, self._age_seconds_max)
        self._forget(now)
        if (signer_id, message_id) in self._seen:
            raise self._stale(time_ms, now, "it was received before")
        if len(self._seen) >= self._entries_max or self._counts[signer_id] >= self._signer_entries_max:
            raise self._stale(time_ms, now, "too many messages at once")
        # A message from the future stays acceptable longer; remember it for the longest possible while.
        self._seen[signer_id, message_id] = now + 2 * self._age_seconds_max
        self._counts[signer_id] += 1

    def _forget(self, now: float) -> None:
        while self._seen:
            (signer_id, message_id), expires = next(iter(self._seen.items()))
            if expires >= now:
                return
            del self._seen[signer_id, message_id]
            self._counts[signer_id] -= 1
            if not self._counts[signer_id]:
                del self._counts[signer_id]

    def _stale(self, time_ms: int, now: float, why: str) -> StaleMessage:
        return StaleMessage(time=time_ms, now=int(now * 1000), why=why, limit=self._age_seconds_max)
