"""Keys and tokens of NATS: Ed25519 keys as text ("nkeys"), and the user claims that a hub signs for a node.

An nkey is base32 of a prefix byte that tells its kind, the key, and its CRC-16; a seed has two prefix bytes, so that it
begins with ``S`` and the letter of its kind. A token is a JWT whose algorithm is ``ed25519-nkey``, version 2 of NATS's
claims. Sources: https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/nkey_auth,
https://github.com/nats-io/nkeys (``strkey.go``), https://github.com/nats-io/jwt (``v2/user_claims.go``).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import InvalidArgument, InvalidName

__all__ = ["ACCOUNT", "OPERATOR", "USER", "Nkey", "check_account", "nats_subject", "user_token"]

ACCOUNT = 0
OPERATOR = 14 << 3
USER = 20 << 3
_SEED = 18 << 3
_KEY_BYTES = 32
_BAND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Nkey(NamedTuple):
    """A pair of keys. It has no text form but those that are asked for."""

    kind: int
    private: Ed25519PrivateKey

    def __repr__(self) -> str:
        return "Nkey(…)"

    @property
    def public(self) -> str:
        """The public key as text: ``A…`` of an account, ``U…`` of a user."""
        return _encode(bytes([self.kind]) + self.private.public_key().public_bytes_raw())

    @property
    def seed(self) -> str:
        """The private key as text: ``SA…``, ``SU…``."""
        head = bytes([_SEED | self.kind >> 5, (self.kind & 31) << 3])
        return _encode(head + self.private.private_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        """Sign bytes."""
        return self.private.sign(data)

    @classmethod
    def from_seed(cls, text: str, kind: int) -> Nkey:
        """Read a seed of a kind. :raises InvalidArgument: it is none; the error does not show it."""
        raw = _decode(text)
        if raw is None or len(raw) != 2 + _KEY_BYTES or raw[0] & 248 != _SEED or (
                (raw[0] & 7) << 5 | raw[1] >> 3) != kind:
            raise InvalidArgument(what=f"That is not the seed of {_WORDS[kind]} of NATS, which begins with "
                                       f"S{_encode(bytes([kind]) + bytes(_KEY_BYTES))[0]} and has 58 characters.")
        return cls(kind, Ed25519PrivateKey.from_private_bytes(raw[2:]))


_WORDS = {ACCOUNT: "an account key", OPERATOR: "an operator key", USER: "a user"}


def check_account(text: str) -> str:
    """Return the public key of an account. :raises InvalidArgument: it is none."""
    raw = _decode(text)
    if raw is None or len(raw) != 1 + _KEY_BYTES or raw[0] != ACCOUNT:
        raise InvalidArgument(what="That is not the id of a NATS account, which begins with A and has 56 characters.")
    return text


def nats_subject(band: str) -> str:
    """The subject of a band, ``kachery.<band>``: no part of a name can be a wildcard or end a part of the subject.

    :raises InvalidName: it is not the name of a band.
    """
    if _BAND.fullmatch(band) is None:
        raise InvalidName(name=band, kind="band", why="it begins with a channel's name")
    return "kachery." + band.replace(".", "=")


def user_token(
    signer: Nkey, account: str, user: str, name: str, capability: Mapping[str, Sequence[str]], issued: int,
    expires: int, token_id: str,
) -> str:
    """Return a token for a user who may do exactly what the capability has.

    :param signer: the account's key, or one of its signing keys. :param account: the account's public key.
    :param user: the user's. :param capability: band -> "publish" and/or "subscribe".
    :param issued: seconds since the epoch, as ``expires``. :param token_id: random.
    """
    limits: dict[str, object] = {"subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2}
    for operation, field in (("publish", "pub"), ("subscribe", "sub")):
        allowed = sorted(nats_subject(band) for band, operations in capability.items() if operation in operations)
        # Nothing named would mean that everything is allowed.
        limits[field] = {"allow": allowed} if allowed else {"deny": [">"]}
    if signer.public != account:
        limits["issuer_account"] = account
    claims = {"jti": token_id, "iat": issued, "exp": expires, "iss": signer.public, "sub": user, "name": name,
              "nats": limits}
    body = f"{_pack({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{_pack(claims)}"
    return f"{body}.{_web(signer.sign(body.encode()))}"


def _pack(value: Mapping[str, object]) -> str:
    return _web(json.dumps(value, separators=(",", ":")).encode())


def _web(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _encode(data: bytes) -> str:
    return base64.b32encode(data + _crc(data).to_bytes(2, "little")).rstrip(b"=").decode()


def _decode(text: str) -> bytes | None:
    """The bytes of an nkey without their check sum; None when it is none."""
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except ValueError:
        return None
    data, check = raw[:-2], raw[-2:]
    return data if len(check) == 2 and _crc(data).to_bytes(2, "little") == check else None


def _crc(data: bytes) -> int:
    """CRC-16 as of XMODEM."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc
