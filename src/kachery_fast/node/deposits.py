"""Where a client that got a "signed upload URL" from this node brings the bytes.

Clients of 2022 ask their node for such a URL, and PUT to it with no more than ``Content-Type`` and ``Content-Length``.
The hub's own upload URLs want more (created once, of one length), which an old client cannot say. So the node hands
out a URL of its own, good for one object and a few minutes, takes the bytes, checks them, and does the rest itself.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from aiohttp import web

from ..errors import BadMessage, RateLimited, Stalled, TooLarge

__all__ = ["DEPOSIT_PREFIX", "Deposits"]

DEPOSIT_PREFIX = "/deposit/"
# As the hub's own URLs; a client of 2022 PUTs at once.
_LIFE_SECONDS = 300.0
# Deposits that are expected; the oldest is given up for the next.
_EXPECTED_MAX = 10_000
# Bytes of deposits that are in memory at once.
_HELD_BYTES_MAX = 128 * 1024 * 1024
# How long one waits for its turn, and how long its body may take; a client of 2022 does not try again.
_TURN_SECONDS = 60.0
_LOOK_SECONDS = 0.05
_BODY_SECONDS = 120.0


class _Deposit(NamedTuple):
    size_bytes: int | None
    size_bytes_max: int
    take: Callable[[bytes], Awaitable[None]]
    ends: float


class Deposits:
    """The deposits of one node; who knows a URL may use it once, so it needs no client code."""

    def __init__(self) -> None:
        self._expected: OrderedDict[str, _Deposit] = OrderedDict()
        self._held_bytes = 0

    def expect(self, request: web.Request, size_bytes: int | None, size_bytes_max: int,
               take: Callable[[bytes], Awaitable[None]]) -> str:
        """Return the URL for one upload, at the address by which the client has reached this node.

        :param size_bytes: its exact length, None if the client did not say. :param take: gets the bytes; what it
            raises is told to the client.
        :raises TooLarge: it is longer than ``size_bytes_max``.
        """
        if size_bytes is not None and size_bytes > size_bytes_max:
            raise TooLarge(what="The upload", size=size_bytes, limit=size_bytes_max,
                           setting="one object in a bucket; leave single_chunk out")
        now = asyncio.get_running_loop().time()
        while self._expected and (next(iter(self._expected.values())).ends < now
                                  or len(self._expected) >= _EXPECTED_MAX):
            self._expected.popitem(last=False)
        name = secrets.token_urlsafe(24)
        self._expected[name] = _Deposit(size_bytes, size_bytes_max, take, now + _LIFE_SECONDS)
        return f"http://{request.headers['Host']}{DEPOSIT_PREFIX}{name}"

    async def put(self, request: web.Request) -> web.Response:
        """Serve ``PUT /deposit/NAME``.

        :raises BadMessage: the URL is unknown or has expired, or the length is another. :raises TooLarge: likewise.
        """
        deposit = self._expected.get(request.match_info["name"])
        if deposit is None or deposit.ends < asyncio.get_running_loop().time():
            raise BadMessage(why="this upload URL was used already or has expired; ask for another one")
        length = request.content_length
        if length is None or (deposit.size_bytes is not None and length != deposit.size_bytes):
            raise BadMessage(why=f"the upload has {length} bytes, and {deposit.size_bytes} were announced")
        if length > deposit.size_bytes_max:
            raise TooLarge(what="The upload", size=length, limit=deposit.size_bytes_max,
                           setting="one object in a bucket")
        del self._expected[request.match_info["name"]]  # good once
        try:
            await self._take(request, deposit, length)
        except BaseException:
            self._expected[request.match_info["name"]] = deposit
            raise
        return web.Response(text="")

    async def _take(self, request: web.Request, deposit: _Deposit, length: int) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + _TURN_SECONDS
        while self._held_bytes and self._held_bytes + length > _HELD_BYTES_MAX:
            if loop.time() > end:
                raise RateLimited(who="A client of this node", retry_seconds=1,
                                  limit=f"uploads of {self._held_bytes} bytes are under way")
            await asyncio.sleep(_LOOK_SECONDS)
        self._held_bytes += length
        try:
            await deposit.take(await asyncio.wait_for(_read(request, length), _BODY_SECONDS))
        except asyncio.TimeoutError:
            raise Stalled(what="The upload of a client", seconds=_BODY_SECONDS) from None
        finally:
            self._held_bytes -= length


async def _read(request: web.Request, length: int) -> bytes:
    return await request.clone(client_max_size=length + 1).read()
