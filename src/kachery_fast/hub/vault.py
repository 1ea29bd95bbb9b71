"""Credentials of owners' engines, encrypted at rest: who has the registry alone, or a copy of it, has none of them.

AES-256-GCM (NIST SP 800-38D) with a random nonce of 96 bits for each; the key is in the hub's directory, outside the
registry. What is encrypted is bound to its engine's id, so that a row's secret is of no use in another row.
"""

from __future__ import annotations

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

    def seal(self, engine_id: str, secret: bytes) -> bytes:
        """Return a secret as it may be kept in the registry."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, secret, _bound_to(engine_id))

    def open(self, engine_id: str, sealed: bytes, name: str) -> bytes:
        """Return what was sealed for this engine.

        :param name: what its owner calls it, for the error.
        :raises CredentialsUnreadable: it was sealed with another key, for another engine, or is damaged.
        """
        begin = len(_FORMAT) + _NONCE_BYTES
        try:
            if not sealed.startswith(_FORMAT):
                raise InvalidTag
            return self._cipher.decrypt(sealed[len(_FORMAT):begin], sealed[begin:], _bound_to(engine_id))
        except (InvalidTag, ValueError):
            raise CredentialsUnreadable(name=name) from None


def _bound_to(engine_id: str) -> bytes:
    return b"kachery-fast:engine:" + engine_id.encode()
