"""One exchange of JSON with a hub: what goes wrong is translated, and what may pass is tried again."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import aiohttp
import msgspec

from ..config import Settings
from ..errors import HubError, HubUnreachable, InvalidArgument, KacheryError, RateLimited

__all__ = ["Exchange", "check_hub_url"]

_log = logging.getLogger("kachery_fast.net")

# Past 10,000 members a NodeConfig takes about 3 MB.
ANSWER_SIZE_BYTES_MAX = 64 * 1024 * 1024
# A hub that shuts down, or a proxy before it, says so by these; another try may find it back.
_PASSING = frozenset({408, 429, 500, 502, 503, 504})


def check_hub_url(text: str) -> str:
    """Return a hub's address without a slash at its end.

    :raises InvalidArgument: it is not ``http(s)://HOST[:PORT][/PATH]``.
    """
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username is not None:
        raise InvalidArgument(what=f"{text!r} is not a hub's address. It looks like http://hub.example.org:20440")
    return text.rstrip("/")


class Exchange:
    """POSTs JSON to one hub; translates what goes wrong; tries again what may pass.

    :param session: an aiohttp session to use; None: one is made, and closed by ``close``.
    :param attempts_max: how often one request is tried. :param sleep: waits for a number of seconds.
    :param uniform: draws the jitter, ``random.uniform``-like.
    """

    def __init__(
        self, url: str, settings: Settings, session: aiohttp.ClientSession | None, attempts_max: int,
        sleep: Callable[[float], Awaitable[None]], uniform: Callable[[float, float], float],
    ) -> None:
        self.url = check_hub_url(url)
        self._settings = settings
        self._attempts_max = attempts_max
        self._session = session
        self._own_session = session is None
        self._sleep = sleep
        self._uniform = uniform

    async def post(self, path: str, make_body: Callable[[], bytes], headers: dict[str, str] | None = None) -> bytes:
        """Return the body of a 200 answer. ``make_body`` is called for each try, so each is signed anew.

        :raises HubUnreachable: no connection, or no answer in time, in any of the tries.
        :raises HubError: the hub's answer makes no sense, or it still fails after all tries.
        :raises KacheryError: the refusal that the hub sent.
        """
        attempt = 0
        while True:
            attempt += 1
            pause_seconds = 0.0
            try:
                status, data = await self._post_once(path, make_body(), headers or {})
                if status == 200:
                    return data
                failure = self._failure(status, data)
                if isinstance(failure, RateLimited):
                    pause_seconds = _seconds(failure.details.get("retry_seconds"))
                if status not in _PASSING:
                    raise failure
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
                failure = HubUnreachable(url=self.url, why=_reason(error))
            ceiling = min(self._settings.retry_cap_seconds, self._settings.retry_base_seconds * 2 ** (attempt - 1))
            # Asked to wait for longer than we ever do: say so at once rather than fail again.
            if attempt >= self._attempts_max or pause_seconds > self._settings.retry_cap_seconds:
                raise failure
            _log.debug("%s%s, attempt %d: %s", self.url, path, attempt, failure)
            await self._sleep(pause_seconds + self._uniform(0, ceiling))

    async def _post_once(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        if self._session is None:
            connect, stall = self._settings.connect_timeout_seconds, self._settings.stall_seconds
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=connect + stall, sock_connect=connect, sock_read=stall))
        headers = {"Content-Type": "application/json", **headers}
        async with self._session.post(self.url + path, data=body, headers=headers, allow_redirects=False) as response:
            data = bytearray()
            async for piece in response.content.iter_any():
                data += piece
                if len(data) > ANSWER_SIZE_BYTES_MAX:
                    raise HubError(url=self.url, why=f"its answer is longer than {ANSWER_SIZE_BYTES_MAX} bytes")
            return response.status, bytes(data)

    def _failure(self, status: int, data: bytes) -> KacheryError:
        try:
            answer = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or "error" not in answer or status == 500:
            what = answer.get("message") if isinstance(answer, dict) else None
            return HubError(url=self.url, why=str(what) if what else f"HTTP {status}, and not from a kachery-fast hub")
        try:
            return KacheryError.from_dict(answer)
        except TypeError:
            return HubError(url=self.url, why=str(answer.get("message", f"HTTP {status}")))

    async def close(self) -> None:
        """Close the session if it was made here."""
        if self._own_session and self._session is not None:
            await self._session.close()
            self._session = None


def _seconds(value: object) -> float:
    return max(0.0, float(value)) if isinstance(value, (int, float)) else 0.0


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
        # asyncio words a refused connection in its own way; the failures of name look-ups have negative numbers.
        return os.strerror(number).lower() if number and number > 0 else str(error.os_error.strerror or error.os_error)
    return str(error) or type(error).__name__
