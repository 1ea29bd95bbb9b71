"""One client of the ``ably`` SDK (3.1), with the SDK's rough edges filed off.

The SDK is imported at first use (100 ms). What is changed about it, each reproduced against a broker of ours:

- its websocket is opened here, so that a refused connection is seen at once (the SDK waits for its request timeout),
  loopback is never routed through a proxy of the environment, and a hung peer's close takes one second, not ten;
- a disposed transport sets no more idle timers: such a timer, when it fires, would end the connection after it;
- a DISCONNECTED without an error, or with a status from 500 to 504, leaves the SDK connected to nothing for ever;
- a refused token is replaced only once in a client's life, as the SDK keeps the first refusal for its last error, and
  it calls itself connected meanwhile: here a refused token ends the client;
- a publish whose frame cannot be sent leaves a future that fails later and that nobody awaits: it is collected;
- an ATTACH that finds no connection is no unhandled exception; the SDK attaches again when connected;
- a message marked as a delta to an unknown one is left out; the SDK would attach again, get it again, and so on;
- the CLOSE sent at the end may find no websocket; that is no error;
- its log lines carry tokens and blame every retry, so they are switched off unless someone sets their level.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

from .band_client import NOT_PERMITTED_CODE, Listener, SdkError, State

__all__ = ["AblyClient"]

log = logging.getLogger("kachery_fast.net.channel")

REQUEST_TIMEOUT_SECONDS = 5.0
"""The SDK's limit for opening, attaching and closing; also added to the broker's idle interval."""

TOKEN_TIMEOUT_SECONDS = 4.5
"""Less than the above: the SDK does not end a token request that outlasts its attempt to connect."""

RECONNECT_SECONDS = 0.8
RECONNECT_JITTER_SECONDS = 0.8
CHANNEL_RETRY_SECONDS = 2.0
FAILURES_MAX = 3
"""Calls that fail in a row while the SDK believes to be connected before the client is given up."""

FRAME_SIZE_BYTES_MAX = 4 * 1024 * 1024


class AblyClient:
    """A connection of the SDK: started once, followed by ``next_state``, closed once."""

    def __init__(self, endpoint: str, *, tls: bool, token: Callable[[], Awaitable[dict[str, Any]]], client_id: str,
                 message_size_bytes_max: int, address: str = "") -> None:
        """
        :param address: the IP address to connect to, where that of the endpoint was looked up before.
        """
        self.why = ""
        self._address = address
        self._endpoint = endpoint
        self._tls = tls
        self._token = token
        self._client_id = client_id
        self._message_size_bytes_max = message_size_bytes_max
        self._states: asyncio.Queue[State] = asyncio.Queue()
        self._realtime: Any = None
        self._transports: list[Any] = []
        self._listening: dict[str, Any] = {}
        self._up = False
        self._failures = 0
        self._closing: asyncio.Task[None] | None = None
        self.token_seconds = float("-inf")
        self.heard_seconds = float("-inf")

    # --- life

    def start(self) -> None:
        """Build the SDK's client and begin to connect."""
        from ably import AblyRealtime

        sdk_log = logging.getLogger("ably")
        if sdk_log.level == logging.NOTSET:
            sdk_log.setLevel(logging.CRITICAL)
        options: dict[str, Any] = {"client_id": self._client_id} if self._client_id else {}
        pause_seconds = RECONNECT_SECONDS + random.uniform(0, RECONNECT_JITTER_SECONDS)  # noqa: S311
        realtime = AblyRealtime(
            auth_callback=self._fetch_token, endpoint=self._endpoint, tls=self._tls, queue_messages=False,
            realtime_request_timeout=int(REQUEST_TIMEOUT_SECONDS * 1000),
            disconnected_retry_timeout=int(pause_seconds * 1000), suspended_retry_timeout=5000,
            channel_retry_timeout=int(CHANNEL_RETRY_SECONDS * 1000), auto_connect=False,
            # Before it tries a fallback host, the SDK asks a web page whether there is an internet, blocking the loop.
            fallback_hosts=[], **options)
        realtime.options.max_message_size = 2 * self._message_size_bytes_max + 1024
        manager = realtime.connection.connection_manager
        manager.on("transport.pending", self._adopt)
        _collect_outcomes(manager.pending_message_queue)
        self._leave_when_told(manager)
        realtime.connection.on(self._on_change)
        self._realtime = realtime
        realtime.connect()

    async def next_state(self) -> State:
        """Wait for the next change of the connection's state."""
        return await self._states.get()

    @property
    def silent(self) -> bool:
        """Whether nothing was heard for longer than the SDK should have borne."""
        details = self._realtime.connection.connection_details if self._realtime is not None else None
        idle_seconds = (details.max_idle_interval or 0) / 1000 if details is not None else 0.0
        silence_seconds = asyncio.get_running_loop().time() - self.heard_seconds
        return idle_seconds > 0 and silence_seconds > idle_seconds + 2 * REQUEST_TIMEOUT_SECONDS

    async def close(self) -> None:
        """Close the connection and end what the SDK has running. A cancelled call goes on closing; call it again to
        wait for that."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        realtime, self._realtime = self._realtime, None
        if realtime is None:
            return
        realtime.connection.off(self._on_change)
        manager = realtime.connection.connection_manager
        # A websocket that closes while the SDK closes takes the transport away under its hands.
        manager.deactivate_transport = lambda reason=None: None
        with contextlib.suppress(Exception):
            await asyncio.wait_for(realtime.close(), REQUEST_TIMEOUT_SECONDS)
        tasks = [manager.connect_base_task, manager.disconnect_transport_task]
        for timer in (manager.transition_timer, manager.suspend_timer, manager.retry_timer):
            if timer is not None:
                timer.cancel()
        for transport in self._transports:
            if transport.idle_timer is not None:
                transport.idle_timer.cancel()
            tasks += [transport.read_loop, transport.ws_connect_task]
        left = [task for task in tasks if task is not None and not task.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=REQUEST_TIMEOUT_SECONDS)

    async def _fetch_token(self, _params: Any) -> dict[str, Any]:
        try:
            details = await asyncio.wait_for(self._token(), TOKEN_TIMEOUT_SECONDS)
        except Exception as error:
            self.why = f"no token: {error or type(error).__name__}"
            raise
        self.token_seconds = asyncio.get_running_loop().time()
        return details

    def _on_change(self, change: Any) -> None:
        state, reason = change.current.value, change.reason
        code = getattr(reason, "code", 0) or 0
        if reason is not None and code != 80019:
            self.why = str(getattr(reason, "message", reason))
        self._up = state == "connected"
        if self._up:
            self._failures = 0
        usable = state in ("connected", "connecting", "disconnected") and not _is_token_code(code)
        self._states.put_nowait(State(self._up, usable))

    def _leave_when_told(self, manager: Any) -> None:
        """Let no farewell of the broker go unheard, and have a refused token replaced by replacing the client."""
        on_disconnected, on_error = manager.on_disconnected, manager.on_error

        async def disconnected(exception: Any) -> None:
            if self._token_refused(exception):
                return
            await on_disconnected(exception)
            if manager.state.value == "connected":
                manager.deactivate_transport(exception)

        async def failed(message: dict[str, Any], exception: Any) -> None:
            if message.get("channel") is not None or not self._token_refused(exception):
                await on_error(message, exception)

        manager.on_disconnected, manager.on_error = disconnected, failed

    def _token_refused(self, exception: Any) -> bool:
        if not _is_token_code(getattr(exception, "code", None)):
            return False
        self.why = str(exception.message)
        self._up = False
        self._states.put_nowait(State(False, False))
        return True

    def _adopt(self, transport: Any) -> None:
        """Replace on a transport that is about to connect what the module's docstring names."""
        from ably.util.exceptions import AblyException
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        options: dict[str, Any] = {"proxy": None if self._address or _is_loopback(self._endpoint) else True}
        if self._address:  # with which no redirect to elsewhere is followed, either
            options["host"] = self._address
        on_activity, send_close = transport.on_activity, transport.close

        async def ws_connect(url: str, headers: Any) -> None:
            try:
                async with connect(url, additional_headers=headers, max_size=FRAME_SIZE_BYTES_MAX, close_timeout=1.0,
                                   open_timeout=REQUEST_TIMEOUT_SECONDS, **options) as websocket:
                    await transport._handle_websocket_connection(url, websocket)
            except (WebSocketException, OSError, asyncio.TimeoutError) as error:
                failure = AblyException(f"cannot connect to {self._endpoint}: {error}", 400, 40000)
                transport._emit("failed", failure)
                raise failure from error

        def on_activity_of_the_living() -> None:
            if not transport.is_disposed:
                self.heard_seconds = asyncio.get_running_loop().time()
                on_activity()

        async def close() -> None:
            with contextlib.suppress(Exception):
                await send_close()

        transport.ws_connect, transport.on_activity, transport.close = ws_connect, on_activity_of_the_living, close
        self._transports = [known for known in self._transports if not known.is_disposed] + [transport]

    # --- calls

    async def publish(self, band: str, data: bytes, message_id: str, timeout_seconds: float) -> None:
        """Publish one message under an id of ours; returns at the broker's ACK.

        :raises SdkError: refused, not connected, or no answer in time.
        """
        from ably.types.message import Message

        channel = self._channel(band)
        await self._call(channel.publish(Message(id=message_id, data=data)), timeout_seconds)

    async def attach(self, band: str, listener: Listener, rewind: str | None, timeout_seconds: float) -> None:
        """Have ``listener`` called with what arrives on a band, from ``rewind`` ("30s") ago when given.

        :raises SdkError: refused (code 40160 also when only publishing is granted), or no answer in time.
        """
        from ably.types.channelmode import ChannelMode
        from ably.types.channeloptions import ChannelOptions

        channel: Any = self._channel(band, ChannelOptions(params={"rewind": rewind}) if rewind else None)
        if band in self._listening and self._listening[band] is channel:
            await self._call(channel.attach(), timeout_seconds)
        else:
            self._listening[band] = channel

            def on_message(message: Any) -> None:
                listener(band, message.data, message.client_id or "", message.id or "")

            await self._call(channel.subscribe(on_message), timeout_seconds)
        if ChannelMode.SUBSCRIBE not in channel.modes:
            raise SdkError(code=NOT_PERMITTED_CODE, why="the token does not cover subscribing to it")

    async def renew(self) -> None:
        """Fetch a new token and take it up without a break.

        :raises SdkError: no token, or refused.
        """
        await self._call(self._realtime.auth.authorize(), REQUEST_TIMEOUT_SECONDS)

    def _channel(self, band: str, options: Any = None) -> Any:
        if self._realtime is None:
            raise SdkError(code=0, why="closed")
        channels = self._realtime.channels
        channel = channels.get(band)
        if channel.state.value == "failed":
            # A failed channel refuses even what it may do: only a new object asks the broker again.
            channels.release(band)
            self._listening.pop(band, None)
        channel = channels.get(band, options) if options is not None else channels.get(band)
        manager = self._realtime.connection.connection_manager

        def send(message: dict[str, Any]) -> None:
            task = asyncio.get_running_loop().create_task(manager.send_protocol_message(message))
            task.add_done_callback(_collect)

        def leave_out(error: Exception) -> None:
            log.warning("a message on %s is left out: %s", band, error)

        channel._send_message, channel._start_decode_failure_recovery = send, leave_out
        return channel

    async def _call(self, call: Awaitable[Any], timeout_seconds: float) -> None:
        from ably.util.exceptions import AblyException

        try:
            await asyncio.wait_for(call, max(timeout_seconds, 0.001))
        except AblyException as error:
            raise SdkError(code=error.code, why=str(error.message)) from error
        except asyncio.TimeoutError:
            self._failed()
            raise SdkError(code=0, why="the broker does not answer") from None
        except Exception as error:
            self._failed()
            raise SdkError(code=0, why=f"{type(error).__name__}: {error}") from error
        self._failures = 0

    def _failed(self) -> None:
        if self._up:
            self._failures += 1
            if self._failures >= FAILURES_MAX:
                self.why = "the broker does not answer"
                self._states.put_nowait(State(False, False))


def _collect_outcomes(queue: Any) -> None:
    push = queue.push

    def push_and_collect(pending: Any) -> None:
        pending.future.add_done_callback(_collect)
        push(pending)

    queue.push = push_and_collect


def _is_token_code(code: int | None) -> bool:
    """Whether an error asks for a new token (https://ably.com/docs/platform/errors/codes)."""
    return code is not None and 40140 <= code < 40150


def _collect(future: asyncio.Future[Any]) -> None:
    """Look at a future's exception, so that asyncio does not report it as never retrieved."""
    if not future.cancelled():
        future.exception()


def _is_loopback(endpoint: str) -> bool:
    host = endpoint.rstrip("/").rsplit(":", 1)[0].strip("[]") if ":" in endpoint else endpoint.rstrip("/")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
