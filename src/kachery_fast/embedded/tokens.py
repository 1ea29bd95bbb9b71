"""Pub/sub tokens of the embedded broker: JSON Web Tokens as Ably defines them, made and checked over ``hmac``.

A token is a JWT (RFC 7519) with HS256 alone: header ``kid`` = key name, claims ``iat`` and ``exp`` (seconds, with
milliseconds as decimals), ``x-ably-capability`` (JSON text: channel name -> operations) and ``x-ably-clientId``.
Source: https://ably.com/docs/auth/token (JWT) and
https://ably.com/docs/api/rest-api#request-token (the signed TokenRequest).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import msgspec

from .broker_wire import Fault

__all__ = ["LIFE_SECONDS_MAX", "Claims", "TokenKey", "allows", "check_token", "check_token_request", "make_token"]

LIFE_SECONDS_MAX = 24 * 3600.0
"""No token lives longer, as at Ably; it bounds how long a revocation must be remembered."""

SKEW_SECONDS = 60.0
"""How far ahead of this clock a token's ``iat`` may be."""

REQUEST_AGE_SECONDS_MAX = 120.0
"""A signed TokenRequest older or newer than this is refused."""

TOKEN_SIZE_BYTES_MAX = 16384


class TokenKey(NamedTuple):
    """The key that signs tokens. The secret never leaves the hub."""

    name: str
    secret: str


class Claims(NamedTuple):
    """What a valid token grants. Times are seconds since the epoch; ``client_id`` is "" for an anonymous token."""

    client_id: str
    capability: Mapping[str, frozenset[str]]
    issued: float
    expires: float


def allows(capability: Mapping[str, frozenset[str]], channel: str, operation: str) -> bool:
    """Say whether ``operation`` ("publish" or "subscribe") is granted on exactly this channel name.

    Only a ``*`` that stands in the token itself, as the channel name or as the operation, means all of them.
    """
    for name in (channel, "*"):
        operations = capability.get(name)
        if operations is not None and (operation in operations or "*" in operations):
            return True
    return False


def make_token(key: TokenKey, client_id: str, capability: Mapping[str, Sequence[str]], issued: float,
               life_seconds: float) -> dict[str, Any]:
    """Return a TokenDetails: ``token``, ``issued`` and ``expires`` (ms), ``clientId``, ``capability`` (JSON text)."""
    text = msgspec.json.encode({name: sorted(set(granted)) for name, granted in capability.items()}).decode()
    issued = round(issued, 3)
    expires = round(issued + min(life_seconds, LIFE_SECONDS_MAX), 3)
    claims: dict[str, Any] = {"iat": _plain(issued), "exp": _plain(expires), "x-ably-capability": text}
    details: dict[str, Any] = {"keyName": key.name, "issued": int(issued * 1000), "expires": int(expires * 1000),
                               "capability": text}
    if client_id:
        claims["x-ably-clientId"] = details["clientId"] = client_id
    head = _pack({"typ": "JWT", "alg": "HS256", "kid": key.name})
    body = f"{head}.{_pack(claims)}"
    details["token"] = f"{body}.{_sign(key, body)}"
    return details


def check_token(key: TokenKey, token: str, now: float) -> Claims | Fault:
    """Verify a token's form, algorithm, key name, signature and times, in that order.

    :returns: its claims, or the fault to send: 40142 when it has expired, else 40101 (final).
    """
    if len(token) > TOKEN_SIZE_BYTES_MAX or token.count(".") != 2 or not token.isascii():
        return _bad("it is not a token of this broker")
    body, _, signature = token.rpartition(".")
    head_text, _, claims_text = body.partition(".")
    head = _unpack(head_text)
    # The algorithm is ours to choose, never the token's: "none" and RS256 confusion end here (RFC 8725, 3.1).
    if head is None or head.get("alg") != "HS256" or head.get("kid") != key.name:
        return _bad("its algorithm or its key name is not this broker's")
    if not hmac.compare_digest(signature, _sign(key, body)):
        return _bad("its signature is wrong")
    claims = _unpack(claims_text)
    if claims is None:
        return _bad("its claims cannot be read")
    return _read_claims(claims, now)


def _read_claims(claims: dict[str, Any], now: float) -> Claims | Fault:
    issued, expires = claims.get("iat"), claims.get("exp")
    if not _is_number(issued) or not _is_number(expires):
        return _bad("iat or exp is missing")
    if not 0 < expires - issued <= LIFE_SECONDS_MAX or issued > now + SKEW_SECONDS:
        return _bad("its times are impossible")
    client_id = claims.get("x-ably-clientId", "")
    capability = read_capability(claims.get("x-ably-capability", "{}"))
    if not isinstance(client_id, str) or capability is None:
        return _bad("its capability or client id cannot be read")
    if now >= expires:
        return Fault(40142, 401, "The token has expired. Ask the hub for a new one.")
    return Claims(client_id, capability, issued, expires)


def read_capability(text: Any) -> dict[str, frozenset[str]] | None:
    """Parse a capability (JSON text: name -> list of operations); ``None`` when it is not one."""
    try:
        raw = msgspec.json.decode(text, type=dict[str, list[str]])
    except (msgspec.MsgspecError, TypeError, RecursionError):
        return None
    return {name: frozenset(operations) for name, operations in raw.items()}


class TokenRequest(msgspec.Struct, rename="camel"):
    """The body of ``POST /keys/{keyName}/requestToken``; times in ms, ``capability`` as JSON text."""

    key_name: str
    timestamp: int
    nonce: str
    mac: str
    ttl: int | None = None
    capability: str | None = None
    client_id: str | None = None


def check_token_request(key: TokenKey, request: TokenRequest, now: float) -> Fault | None:
    """Verify the signature and the freshness of a TokenRequest. Its nonce is the caller's to check."""
    fields = (request.key_name, request.ttl, request.capability, request.client_id, request.timestamp, request.nonce)
    text = "".join(f"{'' if field is None else field}\n" for field in fields)
    digest = hmac.new(key.secret.encode(), text.encode(), hashlib.sha256).digest()
    expected = base64.b64encode(digest)
    if request.key_name != key.name or not hmac.compare_digest(request.mac.encode(), expected):
        return _bad("the mac of the token request is wrong")
    if abs(now - request.timestamp / 1000) > REQUEST_AGE_SECONDS_MAX:
        return Fault(40104, 401, "The token request is stale. Check the clock of this machine.")
    if request.ttl is not None and not 0 < request.ttl <= LIFE_SECONDS_MAX * 1000:
        return Fault(40003, 400, "The ttl of the token request is out of range.")
    if request.capability is not None and read_capability(request.capability) is None:
        return Fault(40000, 400, "The capability of the token request cannot be read.")
    return None


def _bad(why: str) -> Fault:
    return Fault(40101, 401, f"The token is refused: {why}.")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) < 1e12


def _plain(seconds: float) -> float:
    """A number without decimals where it needs none."""
    return int(seconds) if seconds == int(seconds) else seconds


def _sign(key: TokenKey, body: str) -> str:
    return _encode(hmac.new(key.secret.encode(), body.encode(), hashlib.sha256).digest())


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _pack(value: dict[str, Any]) -> str:
    return _encode(msgspec.json.encode(value))


def _unpack(text: str) -> dict[str, Any] | None:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        return msgspec.json.decode(raw, type=dict[str, Any])
    except (binascii.Error, msgspec.MsgspecError, RecursionError):
        return None
