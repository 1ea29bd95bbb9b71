"""Parts of ``nats-py`` within bounds: what is kept of what a server sends, and how long a connection's end takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from nats.aio.client import Client
from nats.aio.transport import TcpTransport
from nats.errors import Error, ProtocolError
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

__all__ = ["BoundedParser", "NatsStream"]

CLOSE_SECONDS = 1.0
# A server passes on messages of 1 MiB at most, if it is not told otherwise; ours are far below that.
MESSAGE_SIZE_BYTES_MAX = 2 * 1024 * 1024
# That of a server with many routes, which names them all.
CONTROL_LINE_SIZE_BYTES_MAX = 64 * 1024


class BoundedParser(Parser):
    """Ends a connection whose server sends without end what is no whole message or line.

    :param on_error: told why.
    """

    def __init__(self, client: Client, on_error: Callable[[Exception], Awaitable[None]]) -> None:
        super().__init__(client)
        self._on_error = on_error

    async def parse(self, data: bytes = b"") -> None:
        """See ``Parser``. :raises ProtocolError: too much is kept of what has no end yet."""
        await super().parse(data)
        limit = CONTROL_LINE_SIZE_BYTES_MAX if self.state == AWAITING_CONTROL_LINE else MESSAGE_SIZE_BYTES_MAX
        if len(self.buf) > limit:
            self.reset()
            await self._on_error(Error(f"the server sends a message or line longer than {limit} bytes"))
            raise ProtocolError


class NatsStream(TcpTransport):
    """A connection by TCP, with or without TLS, that is over soon after it was closed.

    A peer that has fallen silent would not answer TLS's goodbye, for which asyncio waits for 30 seconds.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    async def wait_closed(self) -> None:
        """Wait a moment for a closed connection's end, then break it off."""
        try:
            await asyncio.wait_for(super().wait_closed(), CLOSE_SECONDS)  # type: ignore[no-untyped-call]
        except asyncio.TimeoutError:
            if self._io_writer is not None:
                self._io_writer.transport.abort()

    def __bool__(self) -> bool:
        return True  # else the client would take one of its own
