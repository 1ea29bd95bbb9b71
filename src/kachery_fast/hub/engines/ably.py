"""Ably, or a server that speaks its protocol, with an API key of a channel's owner.

Tokens are JWTs that the hub signs with the key; no connection is needed for it. Sources:
https://ably.com/docs/auth/token/jwt, https://ably.com/docs/auth/revocation (``POST /keys/{keyName}/revokeTokens``),
https://ably.com/docs/platform/pricing/limits (message rates).
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import msgspec

from ...embedded.tokens import TokenKey, make_token
from ...errors import EngineUnusable, InvalidArgument
from ...protocol.hub_bodies import PubsubInfo, PubsubToken
from ..outbound import Outbound, check_endpoint, shown

__all__ = ["AblyCredentials", "AblyPubsub", "AblySettings", "check_ably"]

# A token that was not taken back, as the key may not allow it, holds no longer.
TOKEN_LIFE_SECONDS_MAX = 600.0
MESSAGES_PER_SECOND_MAX = 4.0
_REVOKED_AT_ONCE_MAX = 100
_KEY = re.compile(r"([A-Za-z0-9_-]{1,50}\.[A-Za-z0-9_-]{1,50}):([!-~]{8,200})")
_OWN_ENDPOINT = "main"
_OWN_HOST = "main.realtime.ably.net"


class AblySettings(msgspec.Struct, frozen=True, rename="camel"):
    """An account. ``key_name``: the part of the API key that is no secret; ``endpoint``: a server's address, "" for
    Ably's."""

    key_name: str
    endpoint: str = ""

    @property
    def url(self) -> str:
        """The address of the server."""
        return self.endpoint or f"https://{_OWN_HOST}"

    @property
    def server(self) -> tuple[str, int]:
        """The host and the port of the server."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def info(self) -> PubsubInfo:
        """What nodes are told."""
        parts = urlsplit(self.url)
        return PubsubInfo(kind="ably", endpoint=parts.netloc if self.endpoint else _OWN_ENDPOINT,
                          tls=parts.scheme == "https", messages_per_second_max=MESSAGES_PER_SECOND_MAX)


class AblyCredentials(msgspec.Struct, frozen=True):
    """The rest of an API key. Kept in the vault only; it has no text form."""

    secret: str

    def __repr__(self) -> str:
        return "AblyCredentials(…)"


class _Checked(NamedTuple):
    settings: AblySettings
    credentials: AblyCredentials


def check_ably(key: str, endpoint: str) -> _Checked:
    """Return what an owner has given, as it is kept. :raises InvalidArgument: it cannot be; the key is not shown."""
    found = _KEY.fullmatch(key.strip())
    if found is None:
        raise InvalidArgument(what="That is not an API key of Ably, which looks like APP.KEY:SECRET.")
    if endpoint:
        endpoint = check_endpoint(endpoint if "://" in endpoint else f"https://{endpoint}")
    return _Checked(AblySettings(found[1], endpoint), AblyCredentials(found[2]))


class AblyPubsub:
    """A ``PubsubEngine`` of Ably's."""

    def __init__(self, settings: AblySettings, credentials: AblyCredentials, outbound: Outbound,
                 clock: Callable[[], float]) -> None:
        self._settings = settings
        self._key = TokenKey(settings.key_name, credentials.secret)
        self._outbound = outbound
        self._clock = clock

    def info(self) -> PubsubInfo:
        """See ``PubsubEngine``."""
        return self._settings.info

    def token(self, node_id: str, capability: Mapping[str, Sequence[str]], life_seconds: float) -> PubsubToken:
        """See ``PubsubEngine``. Times are whole seconds, as every reader of a JWT takes them."""
        life_seconds = max(int(min(life_seconds, TOKEN_LIFE_SECONDS_MAX)), 1)
        details = make_token(self._key, node_id, capability, int(self._clock()), life_seconds)
        return PubsubToken(
            token=details["token"], issued=details["issued"], expires=details["expires"],
            capability=details["capability"], client_id=details["clientId"], pubsub=self.info())

    async def revoke(self, node_ids: Sequence[str]) -> None:
        """See ``PubsubEngine``. :raises EngineUnusable: the key is not one whose tokens can be taken back."""
        for at in range(0, len(node_ids), _REVOKED_AT_ONCE_MAX):
            await asyncio.get_running_loop().run_in_executor(
                None, self._revoke, node_ids[at:at + _REVOKED_AT_ONCE_MAX])

    def _revoke(self, node_ids: Sequence[str]) -> None:
        basic = b64encode(f"{self._key.name}:{self._key.secret}".encode()).decode()
        reply = self._outbound.request(
            "POST", f"{self._settings.url}/keys/{quote(self._key.name, safe='')}/revokeTokens",
            headers={"authorization": f"Basic {basic}", "content-type": "application/json",
                     "accept": "application/json"},
            body=msgspec.json.encode({"targets": [f"clientId:{node_id}" for node_id in node_ids]}))
        if reply.status not in (200, 201):
            raise EngineUnusable(
                what="Ably's revocation of tokens", why=f"HTTP {reply.status}, {shown(reply.body)}",
                advice='Tick "Revocable tokens" in the settings of the API key.')
