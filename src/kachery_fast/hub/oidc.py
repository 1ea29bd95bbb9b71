"""Sign-in by an OpenID Connect provider: the authorization code flow, with PKCE (RFC 7636), state and nonce.

The rules are those of OpenID Connect Core 1.0 (3.1), Discovery 1.0, and RFC 9207 (the issuer in the response). Authlib
writes the requests and checks the claims, joserfc, which is its part for that, the signatures. Requests go out by
aiohttp as all others here: Authlib's own clients neither bound an answer nor take a clock.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from authlib.oauth2.auth import ClientAuth
from authlib.oauth2.rfc6749.parameters import prepare_grant_uri, prepare_token_request
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import BadSignatureError, InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry

from ..config import Settings
from ..errors import IdentityRefused, IdTokenRefused, InvalidSetting
from .accounts import Person, allowed_addresses
from .oidc_provider import Provider, shown

__all__ = ["Begun", "OpenIdSignIn", "sign_in_of"]

SCOPES = "openid email profile"

# How long somebody may take at the provider.
KEPT_SECONDS = 600
# By how much the provider's clock may differ from the hub's.
LEEWAY_SECONDS = 60
SPENT_MAX = 10_000
# OpenID Connect Core 1.0, 2: of "sub".
SUBJECT_LENGTH_MAX = 255
EMAIL_LENGTH_MAX = 254
NAME_LENGTH_MAX = 200
# Signatures that only the provider can make. With HS256 the client's secret would be the key, with none there is none.
ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})

_AGAIN = "Sign in again."


class Begun(NamedTuple):
    """A sign-in that was begun.

    ``url``: where the browser goes. ``kept``: what ``finish`` needs, a word of fewer than 200 characters, to be kept
    by this browser alone, and so that it cannot change it (a signed cookie of ``KEPT_SECONDS``).
    """

    url: str
    kept: str


class OpenIdSignIn:
    """Signs people in by one provider. Used on the hub's event loop; begun by one hub, finished by any.

    :param issuer: the provider's name, an https address; http for one on this machine.
    :param client_secret: "" when the hub is registered without one.
    :param name: what people know the provider by; its host name when it is "". :param allowed: for ``owner_of``.
    :param clock: seconds since the epoch. :param timeout_seconds: how long one exchange with the provider may take.
    :raises InvalidSetting: the issuer cannot be one, or there is no client id.
    """

    def __init__(
        self, issuer: str, client_id: str, client_secret: str, *, name: str = "", allowed: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.time, timeout_seconds: float = 10.0,
    ) -> None:
        if not client_id:
            raise InvalidSetting(name="hub_oidc_client_id", value=client_id, source="the settings", why=(
                "the provider gives one when the hub is registered there; hub_oidc_issuer is of no use without it"))
        self._provider = Provider(issuer, clock, timeout_seconds)
        self._issuer = issuer
        self._client_id = client_id
        self._client_secret = client_secret
        self._clock = clock
        self._spent: OrderedDict[str, float] = OrderedDict()
        self.allowed = allowed
        self.name = name or str(urlsplit(issuer).hostname)

    async def begin(self, redirect_uri: str) -> Begun:
        """Begin a sign-in.

        :param redirect_uri: where the provider sends the browser back to; one that it was told of before.
        :raises ProviderUnusable: the provider does not say where to sign in.
        """
        metadata = await self._provider.metadata()
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        url = prepare_grant_uri(
            metadata.authorization_endpoint, self._client_id, "code", redirect_uri=redirect_uri, scope=SCOPES,
            state=state, nonce=nonce, code_challenge=create_s256_code_challenge(verifier), code_challenge_method="S256")
        return Begun(url, f"{int(self._clock())}.{state}.{nonce}.{verifier}")

    async def finish(self, kept: str, query: Mapping[str, str], redirect_uri: str) -> Person:
        """Finish a sign-in whose browser came back.

        :param kept: what ``begin`` gave for this browser, "" when it brings none. :param query: of the address that it
            came to. :param redirect_uri: as of ``begin``.
        :raises IdentityRefused: nobody is signed in; the error says why. :raises ProviderUnusable: as of ``begin``.
        """
        nonce, verifier = self._take(kept, query.get("state", ""))
        metadata = await self._provider.metadata()
        told = query.get("iss")  # RFC 9207, 2.4: an answer of another provider is not even sent back to that one
        if told is not None and told != self._issuer:
            raise IdentityRefused(why=f"the answer comes from {shown(told)}, not from {self._issuer}", advice=_AGAIN)
        if told is None and metadata.authorization_response_iss_parameter_supported:
            raise IdentityRefused(why=f"the answer does not say that it comes from {self._issuer}", advice=_AGAIN)
        if "error" in query or not query.get("code"):
            raise IdentityRefused(
                why=f"{self._issuer} answered: {shown(query.get('error', 'nothing'))} "
                    f"{shown(query.get('error_description', ''))}".rstrip(), advice=_AGAIN)
        id_token, access_token = await self._redeem(query["code"], verifier, redirect_uri)
        claims = await self._verified(id_token, access_token, nonce)
        if not {"email", "name"} <= claims.keys() and metadata.userinfo_endpoint:
            return _person(self._issuer, claims, await self._provider.userinfo(access_token))
        return _person(self._issuer, claims, {})

    def _take(self, kept: str, state: str) -> tuple[str, str]:
        """Return nonce and verifier of the sign-in that ``state`` belongs to; once."""
        now = self._clock()
        parts = kept.split(".")
        if len(parts) != 4 or not parts[0].isdecimal():
            raise IdentityRefused(why="this browser has not begun one, or does not keep cookies", advice=_AGAIN)
        created, expected, nonce, verifier = parts
        if not hmac.compare_digest(*(text.encode("utf-8", "surrogatepass") for text in (expected, state))):
            raise IdentityRefused(why="the answer belongs to another sign-in than the one that this browser began last",
                                  advice=_AGAIN)
        if not -LEEWAY_SECONDS <= now - int(created) <= KEPT_SECONDS:
            raise IdentityRefused(why=f"it took longer than {KEPT_SECONDS // 60} minutes", advice=_AGAIN)
        while self._spent and (len(self._spent) >= SPENT_MAX or next(iter(self._spent.values())) < now - KEPT_SECONDS):
            self._spent.popitem(last=False)
        if expected in self._spent:
            raise IdentityRefused(why="this answer was used before", advice=_AGAIN)
        self._spent[expected] = now
        return nonce, verifier

    async def _redeem(self, code: str, verifier: str, redirect_uri: str) -> tuple[str, str]:
        """Change the code into an ID token and an access token ("" without one)."""
        metadata = await self._provider.metadata()
        methods = metadata.token_endpoint_auth_methods_supported
        method = "none"
        if self._client_secret:  # the first is what every provider has unless it says otherwise
            method = "client_secret_basic" if "client_secret_basic" in methods else "client_secret_post"
        body = prepare_token_request("authorization_code", code=code, redirect_uri=redirect_uri, code_verifier=verifier)
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        url, headers, body = ClientAuth(self._client_id, self._client_secret, method).prepare(
            "POST", metadata.token_endpoint, headers, body)
        return await self._provider.tokens(url, headers, body)

    async def _verified(self, id_token: str, access_token: str, nonce: str) -> dict[str, Any]:
        """Return the claims of an ID token that holds: OpenID Connect Core 1.0, 3.1.3.7."""
        now = int(self._clock())
        options = {"iss": {"essential": True, "value": self._issuer}, "sub": {"essential": True},
                   "aud": {"essential": True, "value": self._client_id}}
        expected = {"nonce": nonce, "client_id": self._client_id, "access_token": access_token}
        try:
            token = await self._decode(id_token)
            claims = CodeIDToken(token.claims, token.header, options, expected)
            claims.validate(now=now, leeway=LEEWAY_SECONDS)
        except (JoseError, ValueError, TypeError, RecursionError) as error:
            raise IdTokenRefused(issuer=self._issuer, why=shown(str(error) or type(error).__name__)) from None
        return dict(claims)

    async def _decode(self, id_token: str) -> jwt.Token:
        """Check the signature; by the provider's keys of now, when those of before do not fit."""
        metadata = await self._provider.metadata()
        # joserfc takes an empty list for its own, which has HS256.
        allowed = sorted(ALGORITHMS.intersection(metadata.id_token_signing_alg_values_supported)) or ["RS256"]

        def decode(keys: KeySet) -> jwt.Token:
            return jwt.decode(id_token, keys, registry=JWSRegistry(algorithms=allowed, strict_check_header=False))

        known = self._provider.known_keys()
        if known is not None:
            try:
                return decode(known)
            except (InvalidKeyIdError, BadSignatureError):
                pass
        return decode(await self._provider.fetch_keys())


def sign_in_of(settings: Settings, clock: Callable[[], float]) -> OpenIdSignIn:
    """Return the sign-in by the provider that the settings name.

    :raises InvalidSetting: they do not fit together.
    """
    return OpenIdSignIn(
        settings.hub_oidc_issuer, settings.hub_oidc_client_id, settings.hub_oidc_client_secret,
        name=settings.hub_oidc_name, allowed=allowed_addresses(settings.hub_oidc_allowed), clock=clock)


def _person(issuer: str, claims: dict[str, Any], userinfo: dict[str, Any]) -> Person:
    """Put together what the ID token and, where that tells less, the userinfo endpoint say."""
    subject = claims["sub"]
    if not isinstance(subject, str) or not 0 < len(subject) <= SUBJECT_LENGTH_MAX or not subject.isprintable():
        raise IdTokenRefused(issuer=issuer, why="the subject is not one that can be written down")
    if userinfo and userinfo.get("sub") != subject:  # OpenID Connect Core 1.0, 5.3.2
        raise IdTokenRefused(issuer=issuer, why="the userinfo endpoint answered about somebody else")
    # An address and whether it is verified come from one place.
    source = claims if "email" in claims else userinfo
    email = source.get("email")
    if not isinstance(email, str) or not email.isprintable() or len(email) > EMAIL_LENGTH_MAX:
        email = ""
    # Some providers (Amazon Cognito) say it as a string.
    verified = bool(email) and source.get("email_verified") in (True, "true")
    name = claims.get("name", userinfo.get("name"))
    return Person(issuer, subject, email, verified,
                  shown(name, NAME_LENGTH_MAX) if isinstance(name, str) else "")
