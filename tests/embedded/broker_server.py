"""A broker on a real port, a client that speaks raw frames, and a TCP proxy that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from kachery_fast.embedded.broker import Broker, BrokerLimits, TokenKey
from kachery_fast.embedded.broker_wire import Action

KEY = TokenKey("app.key", "0123456789abcdef0123456789abcdef")
BANDS = tuple(f"lab-{side}{kind}" for side in ("request", "provide") for kind in ("Files", "Feeds", "Tasks"))
BOTH = ("publish", "subscribe")
ALL = dict.fromkeys(BANDS, BOTH)


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


async def until(condition: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
    """Wait until ``condition`` holds; it is looked at every 10 ms."""
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


class Server:
    """A broker in an aiohttp server on loopback; ``restart`` comes back on the same port as another incarnation."""

    def __init__(self, limits: BrokerLimits | None = None, clock: Callable[[], float] | None = None) -> None:
        self.limits = limits or BrokerLimits(tick_seconds=0.05)
        self.clock = clock
        self.port = 0
        self.broker: Broker
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        kwargs: dict[str, Any] = {} if self.clock is None else {"clock": self.clock}
        self.broker = Broker(keys=KEY, limits=self.limits, **kwargs)
        app = web.Application()
        app.add_routes(self.routes())
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def routes(self) -> list[web.RouteDef]:
        return self.broker.routes()

    async def stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await self.broker.close()
            await runner.cleanup()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def token(self, client_id: str = "node-1", capability: Mapping[str, Sequence[str]] = ALL,
              life_seconds: float = 900.0) -> str:
        return str(self.broker.issue_token(client_id, capability, life_seconds)["token"])


@contextlib.asynccontextmanager
async def serving(limits: BrokerLimits | None = None, clock: Callable[[], float] | None = None
                  ) -> AsyncIterator[Server]:
    server = Server(limits, clock)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class Raw:
    """A client that sends and reads protocol messages as they are."""

    def __init__(self, websocket: Any, binary: bool) -> None:
        self.websocket = websocket
        self.binary = binary
        self.connected: dict[str, Any] = {}
        self.stalled: Any = None

    async def send(self, **body: Any) -> None:
        if self.binary:
            await self.websocket.send_bytes(msgspec.msgpack.encode(body))
        else:
            await self.websocket.send_str(msgspec.json.encode(body).decode())

    async def read(self, action: Action | None = None, timeout_seconds: float = 5.0) -> dict[str, Any]:
        """Return the next protocol message, of ``action`` when given (heartbeats are skipped)."""
        while True:
            message = await asyncio.wait_for(self.websocket.receive(), timeout_seconds)
            assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
            assert (message.type is aiohttp.WSMsgType.BINARY) is self.binary
            decode = msgspec.msgpack.decode if self.binary else msgspec.json.decode
            body: dict[str, Any] = decode(message.data)
            if action is None or body["action"] == action:
                return body
            assert body["action"] == Action.HEARTBEAT, body

    async def attach(self, channel: str, **fields: Any) -> dict[str, Any]:
        await self.send(action=Action.ATTACH, channel=channel, **fields)
        return await self.read(Action.ATTACHED)

    async def publish(self, channel: str, serial: int, *messages: dict[str, Any]) -> dict[str, Any]:
        """Publish, and return the ACK or NACK; messages that arrive before it are dropped."""
        await self.send(action=Action.MESSAGE, channel=channel, msgSerial=serial, messages=list(messages))
        while True:
            body = await self.read()
            if body["action"] in (Action.ACK, Action.NACK):
                return body

    def stop_reading(self) -> None:
        """Let whatever arrives pile up, as a client does that hangs."""
        connection = self.websocket._conn
        assert connection is not None
        transport: Any = connection.transport
        transport.pause_reading()
        self.stalled = transport

    async def ended(self, timeout_seconds: float = 5.0) -> None:
        """Wait until the server has closed the connection."""
        while True:
            message = await asyncio.wait_for(self.websocket.receive(), timeout_seconds)
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING,
                                aiohttp.WSMsgType.ERROR):
                return


@contextlib.asynccontextmanager
async def raw_client(server: Server, *, token: str | None = None, binary: bool = False, expect: Action | None =
                     Action.CONNECTED, query: Mapping[str, str] | None = None) -> AsyncIterator[Raw]:
    """Connect with ``token`` (a fresh one when None, none when "") and read the first answer, ``expect``."""
    params = {"v": "5", **(query or {})}
    if binary:
        params["format"] = "msgpack"
    if token != "":
        params["accessToken"] = server.token() if token is None else token
    async with aiohttp.ClientSession() as session, session.ws_connect(
            f"http://{server.endpoint}/", params=params, max_msg_size=0) as websocket:
        client = Raw(websocket, binary)
        if expect is not None:
            client.connected = await client.read(expect)
        try:
            yield client
        finally:
            if client.stalled is not None:
                client.stalled.abort()


class Proxy:
    """A TCP proxy to a port: ``cut`` resets every connection, ``hold`` stops moving bytes without closing."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.flow = asyncio.Event()
        self.flow.set()
        self.accepted = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, family=socket.AF_INET)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.get_running_loop().create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self.flow.wait()
                sink.write(data)
                await sink.drain()
        except (OSError, RuntimeError):  # uvloop's word for a transport that was aborted
            pass
        finally:
            self._writers.discard(sink)
            sink.close()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._writers):
            writer.transport.abort()

    def hold(self, held: bool) -> None:
        """Stop (True) or resume (False) moving bytes."""
        if held:
            self.flow.clear()
        else:
            self.flow.set()

    async def close(self) -> None:
        self._server.close()
        self.flow.set()
        self.cut()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


@contextlib.asynccontextmanager
async def proxying(port: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
