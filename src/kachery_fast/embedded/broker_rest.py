"""The broker's REST side: its time, and tokens for whoever holds the key and signs a TokenRequest.

Source: https://ably.com/docs/api/rest-api#request-token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from aiohttp import hdrs, web

from .broker_wire import Fault
from .tokens import REQUEST_AGE_SECONDS_MAX, TokenKey, TokenRequest, check_token_request, read_capability

__all__ = ["Rest"]

REQUEST_SIZE_BYTES_MAX = 65536
DEFAULT_TTL_SECONDS = 3600.0
MSGPACK = "application/x-msgpack"


class Rest:
    """Handlers of ``POST /keys/{key_name}/requestToken`` and ``GET /time``. Each nonce works once."""

    def __init__(self, key: TokenKey, clock: Callable[[], float],
                 issue: Callable[[str, Mapping[str, Sequence[str]], float], dict[str, Any]]) -> None:
        self._key = key
        self._clock = clock
        self._issue = issue
        self._nonces: dict[str, float] = {}

    def expire(self, now: float) -> None:
        """Forget nonces whose requests would be stale by now."""
        for nonce in [nonce for nonce, at in self._nonces.items() if now - at > 2 * REQUEST_AGE_SECONDS_MAX]:
            del self._nonces[nonce]

    async def time(self, request: web.Request) -> web.Response:
        """Answer with a list of one number, ms since the epoch."""
        return _answer(request, [int(self._clock() * 1000)], 200)

    async def request_token(self, request: web.Request) -> web.Response:
        """Answer 201 and TokenDetails to a rightly signed, fresh TokenRequest; else an error map."""
        raw = await request.read()
        if len(raw) > REQUEST_SIZE_BYTES_MAX:
            return _refusal(request, Fault(40009, 413, f"A token request has at most {REQUEST_SIZE_BYTES_MAX} bytes."))
        decode = msgspec.msgpack.decode if MSGPACK in request.headers.get(hdrs.CONTENT_TYPE, "") \
            else msgspec.json.decode
        try:
            asked = decode(raw, type=TokenRequest)
        except (msgspec.MsgspecError, RecursionError) as error:
            return _refusal(request, Fault(40000, 400, f"The token request cannot be read: {error}."))
        if request.match_info["key_name"] != self._key.name:
            return _refusal(request, Fault(40400, 404, "There is no such key."))
        now = self._clock()
        fault = check_token_request(self._key, asked, now)
        if fault is None and (asked.nonce in self._nonces or not 16 <= len(asked.nonce) <= 128):
            fault = Fault(40101, 401, "The nonce of the token request is too short, or was used before.")
        if fault is not None:
            return _refusal(request, fault)
        self._nonces[asked.nonce] = now
        capability = read_capability(asked.capability or '{"*":["*"]}') or {}
        life_seconds = DEFAULT_TTL_SECONDS if asked.ttl is None else asked.ttl / 1000
        details = self._issue(asked.client_id or "",
                              {name: sorted(operations) for name, operations in capability.items()}, life_seconds)
        return _answer(request, details, 201)


def _answer(request: web.Request, body: Any, status: int) -> web.Response:
    """Return ``body`` in the format the client speaks: msgpack when it accepts or sends that, else JSON."""
    spoken = request.headers.get(hdrs.ACCEPT, "") + request.headers.get(hdrs.CONTENT_TYPE, "")
    if MSGPACK in spoken:
        return web.Response(body=msgspec.msgpack.encode(body), status=status, content_type=MSGPACK)
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def _refusal(request: web.Request, fault: Fault) -> web.Response:
    return _answer(request, {"error": fault.to_map()}, fault.status)
