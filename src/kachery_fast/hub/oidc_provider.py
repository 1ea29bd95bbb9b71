"""Talk with an OpenID Connect provider: what it says of itself, its keys, and the answers of its endpoints.

The provider is whom the hub's admin chose, yet every answer is bounded in time and length, no redirect is followed, and
addresses that it tells are https, or on this machine when the provider itself is.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import aiohttp
import msgspec
from authlib.oidc.discovery import get_well_known_url
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, KeySetSerialization

from ..errors import IdentityRefused, InvalidSetting, ProviderUnusable

__all__ = ["Metadata", "Provider", "shown"]

ANSWER_SIZE_BYTES_MAX = 1024 * 1024
ISSUER_LENGTH_MAX = 400
SHOWN_LENGTH_MAX = 200
# How long metadata and keys are kept; keys are looked up anew before when one is missing.
KEPT_SECONDS = 3600

_LATER = "Try again later; when it stays so, tell an admin of this hub."


class Metadata(msgspec.Struct):
    """What is used of a provider's metadata. Defaults are those of OpenID Connect Discovery 1.0, 3, and RFC 9207, 3."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    userinfo_endpoint: str | None = None
    id_token_signing_alg_values_supported: tuple[str, ...] = ("RS256",)
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)
    authorization_response_iss_parameter_supported: bool = False


class Provider:
    """One provider. Used on one event loop.

    :param clock: seconds since the epoch. :param timeout_seconds: how long one exchange may take, as a whole.
    :raises InvalidSetting: the issuer cannot be one.
    """

    def __init__(self, issuer: str, clock: Callable[[], float], timeout_seconds: float) -> None:
        self._issuer = issuer
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._loopback = False
        why = self._refusal(issuer, issuer=True)
        if why:
            raise InvalidSetting(name="hub_oidc_issuer", value=issuer, source="the settings", why=why)
        self._metadata: Metadata | None = None
        self._keys: KeySet | None = None
        self._since = 0.0

    async def metadata(self) -> Metadata:
        """Return what the provider says of itself, at most an hour old.

        :raises ProviderUnusable: it says nothing, or nothing that is of use.
        """
        if self._metadata is not None and 0 <= self._clock() - self._since < KEPT_SECONDS:
            return self._metadata
        address = get_well_known_url(self._issuer, external=True)
        _, found = await self._exchange("GET", address)
        try:
            metadata = msgspec.convert(found, Metadata)
        except msgspec.ValidationError as error:
            raise self._unusable(f"its metadata at {address} are not usable: {error}") from None
        if metadata.issuer != self._issuer:  # OpenID Connect Discovery 1.0, 4.3
            raise self._unusable(f"it calls itself {shown(metadata.issuer)}",
                                 "An admin of this hub has to set KACHERY_HUB_OIDC_ISSUER to just that, if that is it.")
        for name in ("authorization_endpoint", "token_endpoint", "jwks_uri", "userinfo_endpoint"):
            why = self._refusal(getattr(metadata, name) or self._issuer)
            if why:
                raise self._unusable(f"its {name} is {shown(getattr(metadata, name))}: {why}")
        self._metadata, self._keys, self._since = metadata, None, self._clock()
        return metadata

    def known_keys(self) -> KeySet | None:
        """Return the keys that were fetched before, None when there are none."""
        return self._keys

    async def fetch_keys(self) -> KeySet:
        """Return the keys by which the provider signs now.

        :raises ProviderUnusable: it does not tell them.
        """
        address = (await self.metadata()).jwks_uri
        _, found = await self._exchange("GET", address)
        keys = found.get("keys")
        # RFC 7517, 5: others are not looked at. Secret ones ("oct") are no keys that somebody else can publish.
        known = [key for key in (keys if isinstance(keys, list) else [])
                 if isinstance(key, dict) and key.get("kty") in ("RSA", "EC", "OKP")]
        try:
            if not known:
                raise ValueError("there is none that is known here")
            self._keys = KeySet.import_key_set(cast(KeySetSerialization, {"keys": known}))
        except (JoseError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._unusable(f"its keys at {address} are not usable: {shown(str(error))}") from None
        return self._keys

    async def tokens(self, url: str, headers: dict[str, str], body: str) -> tuple[str, str]:
        """Ask the token endpoint; return the ID token and the access token, "" when it gives none.

        :raises IdentityRefused: it does not take the code. :raises ProviderUnusable: it failed, or refuses the hub.
        """
        status, answer = await self._exchange("POST", url, headers, body, statuses=(200, 400, 401))
        if status != 200 or "error" in answer:
            error = f"{shown(answer.get('error', status))} {shown(answer.get('error_description', ''))}".rstrip()
            if answer.get("error") == "invalid_grant":  # RFC 6749, 5.2: the code, where it came from, or the verifier
                raise IdentityRefused(why=f"{self._issuer} did not take the code of this answer: {error}",
                                      advice="Sign in again.")
            raise self._unusable(f"it refuses this hub: {error}", "An admin of this hub has to look at "
                                 "KACHERY_HUB_OIDC_CLIENT_ID and KACHERY_HUB_OIDC_CLIENT_SECRET.")
        id_token, access_token = answer.get("id_token"), answer.get("access_token", "")
        if not isinstance(id_token, str) or not isinstance(access_token, str):
            raise self._unusable("it gives no ID token, so it may be of OAuth 2.0 alone")
        return id_token, access_token

    async def userinfo(self, access_token: str) -> dict[str, Any]:
        """Return what the userinfo endpoint says.

        :raises ProviderUnusable: it says nothing.
        """
        address = (await self.metadata()).userinfo_endpoint
        assert address is not None, "asked only where there is one"
        if not access_token or not access_token.isascii() or not access_token.isprintable():
            raise self._unusable("it gives no access token")
        _, answer = await self._exchange("GET", address, {"Authorization": f"Bearer {access_token}"})
        return answer

    async def _exchange(
        self, method: str, url: str, headers: dict[str, str] | None = None, body: str | None = None,
        statuses: tuple[int, ...] = (200,),
    ) -> tuple[int, dict[str, Any]]:
        """Return status and JSON object of an answer with one of ``statuses``."""
        timeout = aiohttp.ClientTimeout(total=self._timeout_seconds)
        sent = {"Accept": "application/json", "Accept-Encoding": "identity", **(headers or {})}
        try:
            # Sign-ins are rare: a connection each, and nothing to close in the end.
            async with aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()) as session, \
                    session.request(method, url, headers=sent, data=body, allow_redirects=False) as response:
                if response.status not in statuses:
                    raise self._unusable(f"{url} answered with the status {response.status}")
                content = await _read(response)
        except asyncio.TimeoutError:
            raise self._unusable(f"{url} did not answer within {self._timeout_seconds:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._unusable(f"{url} cannot be asked ({shown(str(error) or type(error).__name__)})") from None
        if content is None:
            raise self._unusable(f"{url} answered with more than {ANSWER_SIZE_BYTES_MAX} bytes")
        try:
            answer = msgspec.json.decode(content, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._unusable(f"{url} did not answer with a JSON object: {error}") from None
        return response.status, answer

    def _unusable(self, why: str, advice: str = _LATER) -> ProviderUnusable:
        return ProviderUnusable(issuer=self._issuer, why=why, advice=advice)

    def _refusal(self, url: str, *, issuer: bool = False) -> str:
        """Say why an address is not taken, "" when it is. That of the issuer decides whether others may be http."""
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018 - may raise
        except ValueError as error:
            return str(error)
        if not parts.hostname or not url.isascii() or not url.isprintable() or len(url) > ISSUER_LENGTH_MAX:
            return "it must be an address such as https://accounts.example.org"
        if parts.username is not None or parts.fragment or (issuer and parts.query):
            return "it may have neither a user's name nor a fragment, and an issuer no query"
        if issuer:
            self._loopback = parts.scheme == "http" and _is_loopback(parts)
        if parts.scheme == "https" or (self._loopback and parts.scheme == "http" and _is_loopback(parts)):
            return ""
        return "it must begin with https:// (http:// is for a provider on this machine)"


def shown(text: object, length_max: int = SHOWN_LENGTH_MAX) -> str:
    """What others said, for a message: no control characters, bounded."""
    return "".join(character for character in str(text) if character.isprintable())[:length_max]


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """Return the body, None when it is too long."""
    try:
        await response.content.readexactly(ANSWER_SIZE_BYTES_MAX + 1)
    except asyncio.IncompleteReadError as error:
        return error.partial
    return None


def _is_loopback(parts: SplitResult) -> bool:
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"
