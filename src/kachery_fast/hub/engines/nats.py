"""A NATS server, with a signing key of an account that a channel's owner has there.

Tokens are user JWTs that the hub signs; the server enforces what they permit, subject by subject. The hub cannot take
one back, which would take the operator's key, so they are short-lived.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...errors import InvalidArgument
from ...protocol.hub_bodies import PubsubInfo, PubsubToken
from ...protocol.nkeys import ACCOUNT, USER, Nkey, check_account, user_token
from ..outbound import shown

__all__ = ["NatsCredentials", "NatsPubsub", "NatsSettings", "check_nats"]

TOKEN_LIFE_SECONDS_MAX = 300.0
_PORTS = {"nats": 4222, "tls": 4222, "ws": 80, "wss": 443}


class NatsSettings(msgspec.Struct, frozen=True, rename="camel"):
    """A server's address, and the public key of the account there."""

    url: str
    account: str

    @property
    def server(self) -> tuple[str, int]:
        """The host and the port of the server."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or _PORTS[parts.scheme]

    @property
    def info(self) -> PubsubInfo:
        """What nodes are told."""
        return PubsubInfo(kind="nats", endpoint=self.url, tls=urlsplit(self.url).scheme in ("tls", "wss"))


class NatsCredentials(msgspec.Struct, frozen=True):
    """The seed of a signing key of the account. Kept in the vault only; it has no text form."""

    seed: str

    def __repr__(self) -> str:
        return "NatsCredentials(…)"


class _Checked(NamedTuple):
    settings: NatsSettings
    credentials: NatsCredentials


def check_nats(url: str, account: str, seed: str) -> _Checked:
    """Return what an owner has given, as it is kept. :raises InvalidArgument: it cannot be; the seed is not shown."""
    Nkey.from_seed(seed.strip(), ACCOUNT)
    return _Checked(NatsSettings(_check_url(url.strip()), check_account(account.strip())),
                    NatsCredentials(seed.strip()))


def _check_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in _PORTS and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or not text.isascii() or not text.isprintable() or any(mark in text for mark in "\\@?# \"<>,") or (
            parts.path not in ("", "/")):
        raise InvalidArgument(what=f"{shown(text.encode())!r} is not the address of a NATS server. It looks like "
                                   "tls://nats.example.org:4222 or wss://nats.example.org")
    return text.rstrip("/")


class NatsPubsub:
    """A ``PubsubEngine`` of NATS."""

    def __init__(self, settings: NatsSettings, credentials: NatsCredentials, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._signer = Nkey.from_seed(credentials.seed, ACCOUNT)
        self._clock = clock

    def info(self) -> PubsubInfo:
        """See ``PubsubEngine``."""
        return self._settings.info

    def token(self, node_id: str, capability: Mapping[str, Sequence[str]], life_seconds: float) -> PubsubToken:
        """See ``PubsubEngine``."""
        user = Nkey(USER, Ed25519PrivateKey.generate())
        now = self._clock()
        # Whole seconds, by which the token lives no shorter; the node reckons from when it was made in fact.
        expires = math.ceil(now + min(life_seconds, TOKEN_LIFE_SECONDS_MAX))
        token = user_token(self._signer, self._settings.account, user.public, node_id, capability, int(now), expires,
                           secrets.token_hex(16))
        return PubsubToken(
            token=token, issued=int(now * 1000), expires=expires * 1000, client_id=node_id, seed=user.seed,
            capability=msgspec.json.encode({band: list(granted) for band, granted in capability.items()}).decode(),
            pubsub=self.info())

    async def revoke(self, node_ids: Sequence[str]) -> None:
        """See ``PubsubEngine``: nothing but their end takes tokens back."""
