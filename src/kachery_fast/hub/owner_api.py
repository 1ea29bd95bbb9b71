"""What is asked of the hub by a bearer token: ``POST /api/v1/<action>``, or ``POST /api/owner``.

A request is one JSON object; at ``/api/owner`` its ``type`` is the name of the action, as in 0.1.0. Unknown actions and
unknown fields are refused.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..errors import BadMessage, NotOnHub, OwnerTokenRefused
from . import identity
from .actions import Actor, Answer, Request
from .limits import RateLimiter
from .performing import ACTS, ACTS_BY_NAME, Performer
from .registry import Registry

__all__ = ["OwnerApi"]

TOKEN_FAILURES_PER_MINUTE_MAX = 10


class OwnerApi:
    """Answers who sends a token. One for each hub, used on its event loop."""

    def __init__(self, registry: Registry, performer: Performer, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._performer = performer
        self._clock = clock
        self._failures = RateLimiter(TOKEN_FAILURES_PER_MINUTE_MAX / 60, 60.0)
        self._decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(_union(tuple(ACTS)))

    async def answer(self, data: bytes, authorization: str, address: str, action: str = "") -> Answer:
        """Answer one request.

        :param authorization: the header of this name. :param address: whom to count wrong tokens against.
        :param action: the action's name, where the address says it and not the request.
        :raises KacheryError: the request is refused; the error says why.
        """
        actor = await self.authenticate(authorization, address)
        try:
            request = _read(data, action) if action else self._decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadMessage(why=str(error)) from None
        return await self._performer.perform(actor, request)

    async def authenticate(self, authorization: str, address: str) -> Actor:
        """Return who sends this header.

        :raises OwnerTokenRefused: nobody. :raises RateLimited: too many wrong tokens from this address.
        """
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise OwnerTokenRefused(why="none was sent")
        # Taken beforehand, so that many guesses at once are counted too.
        self._failures.spend(address, 1, self._clock(), who=f"address {address}",
                             limit=f"{TOKEN_FAILURES_PER_MINUTE_MAX} wrong tokens are allowed in a minute")
        actor = await self._registry.call(identity.find_token, token.strip(), int(self._clock() * 1000))
        if actor is None:
            raise OwnerTokenRefused(why="it is not one of this hub's, or holds no more")
        self._failures.refund(address, 1, self._clock())
        return actor


def _read(data: bytes, action: str) -> Request:
    act = ACTS_BY_NAME.get(action)
    if act is None:
        raise NotOnHub(kind="action", name=action, advice="See /api/openapi.json.")
    fields = msgspec.json.decode(data)
    if not isinstance(fields, dict) or "type" in fields:
        raise BadMessage(why="an action takes one JSON object, without a field 'type'")
    return msgspec.convert(fields, act.request)


def _union(types: tuple[type[Request], ...]) -> type[Request]:
    made = types[0]
    for request in types[1:]:
        made = made | request  # type: ignore[assignment]
    return made
