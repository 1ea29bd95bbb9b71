"""One client of ``nats-py`` (2.16), for one token after the other.

A NATS server ends a connection when its token ends, and ``nats-py`` then closes for good; so before that a second
connection, with a new token, is subscribed to the same bands, and the first one drained: nothing is lost, and what both
have got is known by its id. All that ``nats-py`` would do by itself after a break is switched off: it would offer the
same token again and again, though it may have ended, and ask servers that the first one has named.

What else is done about it, each from its source:

- a PING overtakes what was published before it and waits to be sent: with ``pending_size=1`` nothing waits;
- ``flush`` returns without an answer where its read loop has ended: ``rtt`` is used, and ended by the connection's end;
- a time-out of either leaves a future behind at which the read loop dies: the connection is then given up;
- a refusal is a line that comes before the answer to a PING sent after what was refused, and names only the subject,
  in lower case; as permissions last as long as the connection, it holds for all that this connection says there;
- ``tls://`` is no more than a wish: a server that does not ask for TLS is left before the token is told;
- its websocket is replaced (``nats_websocket``);
- its parser keeps whatever a server sends, and its end may take half a minute: both are bounded (``nats_stream``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from base64 import b64encode
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from ..errors import InvalidArgument
from ..protocol.hub_bodies import PubsubToken
from ..protocol.nkeys import USER, Nkey, nats_subject
from .band_client import NOT_PERMITTED_CODE, TOO_LARGE_CODE, Listener, SdkError, State
from .foreign import one_line

__all__ = ["NatsClient"]

log = logging.getLogger("kachery_fast.net.channel")

CONNECT_SECONDS = 5.0
TOKEN_TIMEOUT_SECONDS = 4.5
RENEW_BEFORE_SECONDS = 30.0
RENEW_AGAIN_SECONDS = 3.0
REFUSED_AGAIN_SECONDS = 10.0
# The time that is left may be less than an answer takes from afar, and without one the connection is given up.
ROUND_TRIP_SECONDS_MIN = 1.0
CLOSE_SECONDS = 3.0
PING_SECONDS = 5
DRAIN_SECONDS = 3
ID_HEADER = "Kachery-Id"
_REFUSED = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')


class _Connection:
    """A connection of ``nats-py`` with one token. ``life_seconds``: how long that lasts."""

    def __init__(self, on_ended: Callable[[_Connection], None]) -> None:
        from nats.aio.client import Client

        from .nats_stream import BoundedParser, NatsStream

        self.client = Client()
        self.client._ps = BoundedParser(self.client, self._failed)
        self.client._transport = NatsStream()
        self.refused: set[tuple[str, str]] = set()
        self.why = ""
        self.life_seconds = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_ended = on_ended

    async def open(self, url: str, token: PubsubToken, name: str, address: str) -> None:
        """Connect. :raises SdkError: that is not possible."""
        from nats.errors import UnexpectedEOF

        try:
            user = Nkey.from_seed(token.seed, USER)
        except InvalidArgument:
            raise SdkError(code=0, why="the hub gave a token that is not for NATS") from None
        options: dict[str, Any] = {}
        parts = urlsplit(url)
        if parts.scheme in ("ws", "wss"):
            from .nats_websocket import NatsWebsocket

            self.client._transport = NatsWebsocket(address)
        elif address:
            options["tls_hostname"] = parts.hostname
            host = f"[{address}]" if ":" in address else address
            url = f"{parts.scheme}://{host}:{parts.port or 4222}"

        def sign(nonce: str) -> bytes:  # which is asked for before the token is told
            if parts.scheme == "tls" and not self.client._server_info.get("tls_required"):
                raise OSError(no_tls)
            return b64encode(user.sign(nonce.encode()))

        no_tls = f"{parts.hostname} does not speak TLS, as its address says that it does"
        self.life_seconds = (token.expires - token.issued) / 1000
        connecting = asyncio.ensure_future(self.client.connect(
            [url], name=name, allow_reconnect=False, max_reconnect_attempts=1, reconnect_time_wait=0,
            connect_timeout=int(CONNECT_SECONDS), ping_interval=PING_SECONDS, max_outstanding_pings=2,
            drain_timeout=DRAIN_SECONDS, pending_size=1, error_cb=self._failed, closed_cb=self._closed,
            user_jwt_cb=lambda: bytearray(token.token.encode()),
            signature_cb=sign, **options))
        connecting.add_done_callback(_collect)
        try:
            await asyncio.wait([connecting], timeout=CONNECT_SECONDS)
        except BaseException:  # also when it has succeeded just now
            connecting.cancel()
            await self.close()
            raise
        if not connecting.done() or connecting.exception() is not None:
            connecting.cancel()
            await self.close()
        if self.ended.done():
            # It may do so before its error line could be read, and nats-py may take the end for an answer.
            if self.client._server_info and isinstance(self.client.last_error, ConnectionError | UnexpectedEOF):
                self.why = f"the server ended the connection when it got the token ({self.why})"
            raise SdkError(code=0, why=self.why)
        if parts.scheme == "tls" and not self.client._server_info.get("tls_required"):
            await self.close()
            raise SdkError(code=0, why=no_tls)

    async def subscribe(self, band: str, listener: Listener) -> None:
        """Have what comes on a band handed on. It may be refused by the time of the next ``round_trip``."""
        async def hand_on(message: Any) -> None:
            listener(band, message.data, "", (message.headers or {}).get(ID_HEADER) or secrets.token_hex(8))

        await self.client.subscribe(nats_subject(band), cb=hand_on)

    async def round_trip(self, timeout_seconds: float) -> None:
        """Wait until the server has taken what was sent, a second at least.

        :raises SdkError: it did not; the connection is over.
        """
        asked: asyncio.Future[Any] = asyncio.ensure_future(
            self.client.rtt(max(timeout_seconds, ROUND_TRIP_SECONDS_MIN)))  # type: ignore[arg-type]
        asked.add_done_callback(_collect)
        waited: list[asyncio.Future[Any]] = [asked, self.ended]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if asked.done() and not asked.cancelled() and asked.exception() is None:
            return
        asked.cancel()
        if not self.ended.done():
            self.why = "the server does not answer"
            await self.close()
        raise SdkError(code=0, why=self.why or "the connection has ended")

    def refuses(self, operation: str, band: str) -> bool:
        """Whether the server has refused that to this connection."""
        return (operation, nats_subject(band).lower()) in self.refused

    def check(self, operation: str, band: str) -> None:
        """:raises SdkError: the server has refused that to this connection."""
        if self.refuses(operation, band):
            raise SdkError(code=NOT_PERMITTED_CODE, why=f"the token does not cover {operation} on it")

    async def drain(self) -> None:
        """Close after what is on its way has come."""
        try:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self.client.drain(), 2 * DRAIN_SECONDS)
        finally:  # also when this was cancelled
            await self.close()

    async def close(self) -> None:
        """Close at once."""
        await self._closed()  # whatever a server that hangs makes of it
        closing = asyncio.ensure_future(self.client.close())
        closing.add_done_callback(_collect)
        await asyncio.wait([closing], timeout=CLOSE_SECONDS)
        if not closing.done():
            closing.cancel()
            transport: Any = self.client._transport
            transport.close()
            await asyncio.wait([asyncio.ensure_future(transport.wait_closed())], timeout=CLOSE_SECONDS)

    async def _failed(self, error: Exception) -> None:
        if self.ended.done():  # what goes wrong in closing is no cause
            return
        found = _REFUSED.search(str(error).lower())
        if found is None:
            self.why = one_line(str(error)) or type(error).__name__
        else:
            self.refused.add(("publish" if found[1] == "publish" else "subscribe", found[2]))

    async def _closed(self) -> None:
        if not self.ended.done():
            error = self.client.last_error
            self.why = self.why or (one_line(str(error)) if error else "") or "no answer in time"
            self.ended.set_result(None)
            self._on_ended(self)


class NatsClient:
    """A ``BandClient`` of a NATS server.

    :param url: ``nats://``, ``tls://``, ``ws://`` or ``wss://``. :param token: fetches a new one.
    :param address: the IP address to connect to, where that of the server was looked up before.
    """

    silent = False  # nats-py ends a connection whose server does not answer

    def __init__(self, url: str, *, token: Callable[[], Awaitable[PubsubToken]], client_id: str,
                 address: str = "") -> None:
        self.why = ""
        self.token_seconds = float("-inf")
        self._url = url
        self._token = token
        self._client_id = client_id
        self._address = address
        self._states: asyncio.Queue[State] = asyncio.Queue()
        self._listening: dict[str, Listener] = {}
        self._current: _Connection | None = None
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None

    @property
    def heard_seconds(self) -> float:
        """By the loop's clock; of no use, as a NATS server remembers nothing."""
        return asyncio.get_running_loop().time()

    def start(self) -> None:
        """See ``BandClient``."""
        self._begin(self._run())

    async def next_state(self) -> State:
        """See ``BandClient``."""
        return await self._states.get()

    async def publish(self, band: str, data: bytes, message_id: str, timeout_seconds: float) -> None:
        """See ``BandClient``."""
        connection = self._connection()
        connection.check("publish", band)
        await self._sent(connection.client.publish(nats_subject(band), data, headers={ID_HEADER: message_id}))
        await connection.round_trip(timeout_seconds)
        connection.check("publish", band)

    async def attach(self, band: str, listener: Listener, rewind: str | None, timeout_seconds: float) -> None:
        """See ``BandClient``; there is nothing to rewind."""
        async with self._changing:
            connection = self._connection()
            if band in self._listening:
                connection.check("subscribe", band)
                return
            await self._sent(connection.subscribe(band, listener))
            await connection.round_trip(timeout_seconds)
            connection.check("subscribe", band)
            self._listening[band] = listener

    async def renew(self) -> None:
        """See ``BandClient``."""
        begun = asyncio.get_running_loop().time()
        async with self._changing:
            if self.token_seconds >= begun:  # somebody else was faster
                return
            fresh = await self._connected()
            try:
                for band, listener in self._listening.items():
                    await self._sent(fresh.subscribe(band, listener))
                await fresh.round_trip(CONNECT_SECONDS)
                if self._closing is not None:  # by whom this is not awaited
                    raise SdkError(code=0, why="closed")
            except BaseException:
                await fresh.close()
                raise
            for band in self._refused(fresh):
                log.warning("NATS: %s is not subscribed: the new token does not cover it", band)
            old, self._current = self._current, fresh
        if fresh.ended.done():  # it was not the current one then
            self._ended(fresh)
        if old is not None:
            self._begin(old.drain())

    async def close(self) -> None:
        """See ``BandClient``. A cancelled call goes on closing."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        current, self._current = self._current, None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CONNECT_SECONDS)
        if current is not None:
            await current.close()

    # --- the connection

    async def _run(self) -> None:
        """Connect, and renew the token before it ends, for as long as there are connections."""
        loop = asyncio.get_running_loop()
        try:
            connection = self._current = await self._connected()
        except SdkError as error:
            self.why = error.why
            self._states.put_nowait(State(False, False))
            return
        self._states.put_nowait(State(True, True))
        while not connection.ended.done():
            left_seconds = connection.life_seconds - min(RENEW_BEFORE_SECONDS, connection.life_seconds / 4)
            if self._refused(connection):
                # Withdrawn for good, another channel takes this one's place; else the next token has it again.
                left_seconds = min(left_seconds, REFUSED_AGAIN_SECONDS)
            wait_seconds = self.token_seconds + left_seconds - loop.time()
            await asyncio.sleep(max(wait_seconds, 0.0))
            try:
                await self.renew()
            except SdkError as error:
                log.info("NATS: no new token, or no connection by it: %s", error.why)
                await asyncio.wait([connection.ended], timeout=min(RENEW_AGAIN_SECONDS, connection.life_seconds / 16))
            connection = self._current or connection
        self._ended(connection)

    async def _connected(self) -> _Connection:
        """Return a connection with a new token. :raises SdkError: there is no token, or it is refused."""
        try:
            connection = _Connection(self._ended)
        except ModuleNotFoundError:
            raise SdkError(code=0, why="the messages of this channel go by NATS, for which a package is not "
                           "installed. Install it with: pip install 'kachery-fast[nats]'") from None
        begun = asyncio.get_running_loop().time()
        try:
            token = await asyncio.wait_for(self._token(), TOKEN_TIMEOUT_SECONDS)
        except Exception as error:
            raise SdkError(code=0, why=f"no token: {error or type(error).__name__}") from None
        try:
            await connection.open(self._url, token, self._client_id, self._address)
        except SdkError as error:
            raise SdkError(code=0, why=f"cannot connect to {self._url}: {error.why}") from None
        self.token_seconds = begun
        return connection

    def _ended(self, connection: _Connection) -> None:
        if connection is self._current:
            self.why = connection.why
            self._states.put_nowait(State(False, False))

    def _refused(self, connection: _Connection) -> list[str]:
        return [band for band in self._listening if connection.refuses("subscribe", band)]

    def _connection(self) -> _Connection:
        if self._current is None or self._current.ended.done():
            raise SdkError(code=0, why=self.why or "closed")
        return self._current

    async def _sent(self, sending: Awaitable[None]) -> None:
        from nats.errors import Error, MaxPayloadError

        try:
            await sending
        except MaxPayloadError:
            raise SdkError(code=TOO_LARGE_CODE, why="it is longer than the server takes") from None
        except (Error, OSError) as error:
            raise SdkError(code=0, why=str(error) or type(error).__name__) from None

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_collect)


def _collect(future: asyncio.Future[Any]) -> None:
    """Look at a future's exception, so that asyncio does not report it as never retrieved."""
    if not future.cancelled() and future.exception() is not None:
        log.debug("NATS: %r", future.exception())
