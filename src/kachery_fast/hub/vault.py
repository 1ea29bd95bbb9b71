"""Credentials of owners' engines, encrypted at rest: who has the registry alone, or a copy of it, has none of them.

AES-256-GCM (NIST SP 800-38D) with a random nonce of 96 bits for each; the key is in the hub's directory, outside the
registry. What is encrypted is bound to the rest of its engine's row: it is of no use in another one, nor in this one
when it names another bucket.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import CredentialsUnreadable

__all__ = ["Vault"]

_FORMAT = b"\x01"
_NONCE_BYTES = 12


class Vault:
    """Seals and opens secrets.

    :param key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._key = key

    def number_of(self, text: str) -> str:
        """Return the number, in hex, that only who has the key can name for a text: the same each time."""
        return hmac.new(self._key, f"kachery-fast:number:{text}".encode(), hashlib.sha256).hexdigest()[:32]

    def seal(self, engine_id: str, settings: str, secret: bytes) -> bytes:
        """Return a secret as it may be kept in the registry, with these settings of its engine."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, secret, _bound_to(engine_id, settings))

    def open(self, engine_id: str, settings: str, sealed: bytes, name: str) -> bytes:
        """Return what was sealed for this engine.

        :param name: what its owner calls it, for the error.
        :raises CredentialsUnreadable: it was sealed with another key, for another engine or settings, or is damaged.
        """
        begin = len(_FORMAT) + _NONCE_BYTES
        try:
            if not sealed.startswith(_FORMAT):
                raise InvalidTag
            return self._cipher.decrypt(sealed[len(_FORMAT):begin], sealed[begin:], _bound_to(engine_id, settings))
        except (InvalidTag, ValueError):
            raise CredentialsUnreadable(name=name) from None


def _bound_to(engine_id: str, settings: str) -> bytes:
    return f"kachery-fast:engine:{engine_id}:{settings}".encode()
