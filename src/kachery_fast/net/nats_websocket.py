"""The way of ``nats-py`` over a websocket, in the place of its own.

Its own lets itself be redirected anywhere, connects to whatever address a name has by then, and passes a timeout in a
form that aiohttp warns of.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from typing import Any
from urllib.parse import ParseResult

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from nats.aio.transport import Transport

__all__ = ["NatsWebsocket"]

FRAME_SIZE_BYTES_MAX = 8 * 1024 * 1024
CLOSE_SECONDS = 1.0


class NatsWebsocket(Transport):
    """A connection.

    :param address: the IP address to connect to, where that of the server was looked up before.
    """

    def __init__(self, address: str = "") -> None:
        redirects = aiohttp.TraceConfig()
        redirects.on_request_redirect.append(_refuse)
        connector = aiohttp.TCPConnector(resolver=_Pinned(address)) if address else aiohttp.TCPConnector()
        self._session = aiohttp.ClientSession(connector=connector, trace_configs=[redirects])
        self._websocket: aiohttp.ClientWebSocketResponse[Any] | None = None
        self._outgoing: deque[bytes] = deque()
        self._ended = False

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        """Connect to ``ws://``."""
        await self._connect(uri, connect_timeout, True)

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """Connect to ``wss://``; called a second time, with a name, when the server says that it wants TLS."""
        if isinstance(uri, str):
            return
        await self._connect(uri, connect_timeout, ssl_context)

    async def _connect(self, uri: ParseResult, timeout_seconds: float, tls: ssl.SSLContext | bool) -> None:
        try:
            self._websocket = await asyncio.wait_for(self._session.ws_connect(
                uri.geturl(), ssl=tls, max_msg_size=FRAME_SIZE_BYTES_MAX,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS)), timeout_seconds)
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error

    def write(self, payload: bytes) -> None:
        """Have bytes sent by the next ``drain``."""
        self._outgoing.append(payload)

    def writelines(self, payload: list[bytes]) -> None:
        """Have bytes sent by the next ``drain``."""
        self._outgoing.extend(payload)

    async def read(self, buffer_size: int) -> bytes:
        """Return the next frame."""
        return await self.readline()

    async def readline(self) -> bytes:
        """Return the next frame."""
        assert self._websocket is not None, "it was connected"
        message = await self._websocket.receive()
        if message.type is not aiohttp.WSMsgType.BINARY:
            raise ConnectionError("the server has closed the connection")
        return bytes(message.data)

    async def drain(self) -> None:
        """Send what was written."""
        if self._websocket is None or not self._outgoing:
            return
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        try:
            await self._websocket.send_bytes(data)
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error

    async def wait_closed(self) -> None:
        """Close, and wait until that is done."""
        if self._websocket is not None:
            await self._websocket.close()
        await self._session.close()

    def close(self) -> None:
        """Take nothing more; ``wait_closed`` follows."""
        self._ended = True

    def at_eof(self) -> bool:
        """Whether nothing will come."""
        return self._ended or self._websocket is None or self._websocket.closed

    def __bool__(self) -> bool:
        return not self._ended


async def _refuse(*_: object) -> None:
    raise ConnectionError("the server sends its clients elsewhere")


class _Pinned(AbstractResolver):
    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        return [ResolveResult(hostname=host, host=self._address, port=port, family=family, proto=0,
                              flags=socket.AI_NUMERICHOST)]

    async def close(self) -> None:
        pass
