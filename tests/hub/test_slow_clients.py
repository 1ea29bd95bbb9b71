"""Clients that take their time, or too much room: each is cut in the end, and meanwhile the hub serves the others."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.embedded.broker_wire import Action
from kachery_fast.hub import app
from kachery_fast.net.visitors import OTHER_FILES, Patience, connections_max

from ..embedded.broker_server import until
from ..network import LOOPS, run_on
from .support import CHANNEL, World, running_world

QUICK = Patience(head_seconds=0.4, body_seconds=0.4, answer_seconds=0.4, idle_seconds=0.4)
LONG = 10.0


@contextlib.asynccontextmanager
async def connection(
    world: World, buffer_bytes: int = 0
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    sock = socket.socket()
    if buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", world.hub.port))
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def the_rest(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the hub closes."""
    data = b""
    with contextlib.suppress(ConnectionError):  # closed on bytes that nobody read
        while piece := await asyncio.wait_for(reader.read(65536), LONG):
            data += piece
    return data


async def is_served(world: World) -> bool:
    async with world.session.get(world.url + "/api/health") as answer:
        return answer.status == 200


async def trickle(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send a byte every now and then, until the hub closes."""
    with contextlib.suppress(ConnectionError):
        for number in range(len(data)):
            writer.write(data[number:number + 1])
            await writer.drain()
            await asyncio.sleep(0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PATIENCE", QUICK)
    monkeypatch.setattr(app, "LINGERING_SECONDS", 0.2)


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("before", [b"", b"GET /api/health HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_a_head_that_trickles_is_cut(tmp_path: Path, loop_kind: str, before: bytes) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world, connection(world) as (reader, writer):
            if before:  # not only the first request of a connection has a head
                writer.write(before)
                assert b"200" in await reader.readuntil(b"\r\n\r\n")
                await reader.readuntil(b"}")
            begun = asyncio.get_running_loop().time()
            head = b"POST /api/node HTTP/1.1\r\nHost: a\r\n" + b"X-Slow: 1\r\n" * 50
            trickling = asyncio.create_task(trickle(writer, head))
            assert await is_served(world)
            assert await the_rest(reader) == b""
            assert 0.3 < asyncio.get_running_loop().time() - begun < LONG / 2
            trickling.cancel()

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
def test_a_body_that_trickles_is_refused(tmp_path: Path, loop_kind: str, length: bytes) -> None:
    async def refused(world: World, path: bytes) -> None:
        async with connection(world) as (reader, writer):
            writer.write(b"POST " + path + b" HTTP/1.1\r\nHost: a\r\n" + length + b"\r\n\r\n")
            trickling = asyncio.create_task(
                trickle(writer, b"{" * 1000 if b"Length" in length else b"1\r\n{\r\n" * 1000))
            answer = await the_rest(reader)
            assert answer.startswith(b"HTTP/1.1 408 "), answer
            trickling.cancel()

    async def scenario() -> None:
        paths = (b"/api/node", b"/api/owner", b"/keys/kachery.hub/requestToken", b"/sign-in/x", b"/no/such/page")
        async with running_world(tmp_path, channel=False) as world:
            trickling = asyncio.gather(*(refused(world, path) for path in paths))
            assert await is_served(world)
            await trickling

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_connection_that_is_only_held_is_cut(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world, connection(world) as (reader, writer):
            writer.write(b"GET /api/health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await the_rest(reader)).startswith(b"HTTP/1.1 200 ")
            assert await is_served(world)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_who_does_not_read_the_answers_is_cut(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world, connection(world, 4096) as (_, writer):
            transport: Any = writer.transport
            transport.pause_reading()
            visitors = world.hub._visitors
            for _ in range(500):  # until there is more than the system holds for a client
                writer.write(b"GET /api/openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")
            await until(lambda: any(visitor.full_since is not None for visitor in visitors._all), LONG)
            assert await is_served(world)
            await until(lambda: not visitors._by_transport, LONG)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("length", ["known", "chunked", "packed"])
def test_a_body_beyond_the_limit_is_refused(tmp_path: Path, loop_kind: str, length: str) -> None:
    async def scenario() -> None:
        limit = 64 * 1024
        bomb = gzip.compress(bytes(20 << 20))
        async with (running_world(tmp_path, channel=False, api_body_size_bytes_max=limit) as world,
                    connection(world) as (reader, writer)):
            head = b"POST /api/node HTTP/1.1\r\nHost: a\r\n"
            if length == "known":
                writer.write(head + b"Content-Length: 1000000000\r\n\r\n" + b"x" * (limit + 1))
            elif length == "chunked":
                writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + (b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 3)
            else:
                writer.write(head + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb)
            answer = await the_rest(reader)
            assert answer.startswith(b"HTTP/1.1 413 "), answer
            assert await is_served(world)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_websocket_without_a_token_is_closed_and_need_not_agree(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world, connection(world) as (reader, writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                         b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
            answer = await the_rest(reader)
            assert answer.startswith(b"HTTP/1.1 101 ")
            assert b"Only tokens are accepted here" in answer
            assert world.hub._broker.stats()["connections"] == 0

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_websockets_are_not_cut_for_being_quiet(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            token = await (await world.member("node")).pubsub_token(CHANNEL)
            async with world.session.ws_connect(world.url, params={"accessToken": token.token}) as websocket:
                assert (await websocket.receive_json())["action"] == Action.CONNECTED
                async with connection(world) as (reader, _):
                    await the_rest(reader)  # who came later, and is as quiet, is cut
                await websocket.send_json({"action": Action.HEARTBEAT})
                assert (await websocket.receive_json())["action"] == Action.HEARTBEAT

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_the_address_with_the_most_connections_makes_room_for_the_others(
        tmp_path: Path, loop_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PATIENCE", Patience())

    async def scenario() -> None:
        async with (running_world(tmp_path, hub_connections_max=16) as world, contextlib.AsyncExitStack() as many):
            token = await (await world.member("node")).pubsub_token(CHANNEL)
            websocket = await many.enter_async_context(
                world.session.ws_connect(world.url, params={"accessToken": token.token}))
            await websocket.receive_json()
            greedy = []
            for number in range(40):
                greedy.append(await asyncio.open_connection("127.0.0.1", world.hub.port, local_addr=("127.0.0.2", 0)))
                if number % 2:
                    greedy[-1][1].write(b"POST /api/node HTTP/1.1\r\nHost: ")
                assert await is_served(world)
                assert len(world.hub._visitors) <= 16
            await websocket.send_json({"action": Action.HEARTBEAT})
            assert (await websocket.receive_json())["action"] == Action.HEARTBEAT
            for _, writer in greedy:
                writer.transport.abort()

    run_on(loop_kind, scenario())


def test_a_hub_opens_as_many_files_as_it_may() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        assert connections_max(600) == 600
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600 + OTHER_FILES
        assert connections_max(hard) == hard - OTHER_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
