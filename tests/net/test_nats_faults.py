"""The channel adapter over ``nats-py`` before a server that does what it should not, or hangs."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kachery_fast.errors import BandUnreachable
from kachery_fast.net import nats_client as nats_client_module
from kachery_fast.net import nats_stream
from kachery_fast.net.band_client import SdkError
from kachery_fast.net.nats_client import NatsClient, _Connection
from kachery_fast.protocol.nkeys import ACCOUNT
from tests.embedded.broker_server import until
from tests.nats_server import new_key
from tests.network import LOOPS, run_on

from .peers import BAND, NatsPeer

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
INFO = {"server_id": "X", "version": "2.9.0", "max_payload": 1048576, "headers": True, "nonce": "x",
        "auth_required": True}
Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class FakeServer:
    """A server that greets its clients, and answers their PINGs as ``answer`` says. ``lines`` of theirs are noted;
    ``open`` counts the connections that are."""

    def __init__(self) -> None:
        self.account = self.signer = new_key(ACCOUNT)
        self.lines: list[bytes] = []
        self.open = 0
        self.port = 0
        self.answer: Answer = pong

    def url(self, scheme: str = "nats") -> str:
        return f"{scheme}://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            writer.write(greeting())
            while line := await reader.readline():
                self.lines.append(line)
                if line.startswith(b"PING"):
                    await self.answer(line, writer)
        except ConnectionError:
            pass
        finally:
            self.open -= 1
            writer.close()


def greeting(**more: bool) -> bytes:
    return b"INFO " + json.dumps({**INFO, **more}).encode() + b"\r\n"


async def pong(_line: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"PONG\r\n")


@asynccontextmanager
async def fake_server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    listening = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.port = listening.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        listening.close()
        await until(lambda: not fake.open)


async def the_client(peer: NatsPeer) -> NatsClient:
    await peer.channel.connect()
    client = peer.channel._client
    assert isinstance(client, NatsClient)
    return client


def test_a_server_that_should_speak_tls_and_does_not_is_told_no_token(loop_kind: str) -> None:
    async def scenario() -> None:
        async with fake_server() as server:
            peer = NatsPeer(server, url=server.url("tls"), connect_timeout_seconds=0.5)
            with pytest.raises(BandUnreachable, match=r"127\.0\.0\.1 does not speak TLS"):
                await peer.channel.connect()
            assert "when it got the token" not in peer.channel.why
            await peer.channel.close()
        assert server.lines == []

    run_on(loop_kind, scenario())


def test_a_message_at_the_end_of_its_time_does_not_end_a_connection_that_is_slow(loop_kind: str) -> None:
    async def scenario() -> None:
        async def from_afar(line: bytes, writer: asyncio.StreamWriter) -> None:
            asyncio.get_running_loop().call_later(0.05, writer.write, b"PONG\r\n")

        async with fake_server() as server, NatsPeer.joined(server, listen=False) as one:
            client = await the_client(one)
            server.answer = from_afar
            await client.publish(BAND, b"{}", "id", 0.002)
            assert one.channel.connected
            assert one.states == [(True, "")]

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("endless", [b"MSG a 1 99999999999\r\n", b"MSG ", b"INFO "])
def test_a_server_that_sends_without_end_is_left(loop_kind: str, endless: bytes) -> None:
    async def scenario() -> None:
        sent = 0

        async def without_end(_line: bytes, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.write(b"PONG\r\n" + endless)
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
                sent += 65536

        async with fake_server() as server:
            async with NatsPeer.joined(server, listen=False) as one:
                server.answer = without_end
                client = await the_client(one)
                await client.publish(BAND, b"{}", "id", 5.0)
                await one.become(False)
                assert "longer than" in client.why
                server.answer = pong
            await until(lambda: not server.open)
            assert sent < 32 * 1024 * 1024  # most of it in the system's buffers

    run_on(loop_kind, scenario())


def test_what_a_server_says_is_shown_as_one_short_line(loop_kind: str) -> None:
    async def scenario() -> None:
        async def refuse(_line: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(b"-ERR '\x1b[2J" + b"no " * 5000 + b"'\r\n")

        async with fake_server() as server:
            server.answer = refuse
            peer = NatsPeer(server, connect_timeout_seconds=0.5)
            with pytest.raises(BandUnreachable) as refused:
                await peer.channel.connect()
            await peer.channel.close()
        assert "no no" in refused.value.message
        assert refused.value.message.isprintable()
        assert len(refused.value.message) < 500

    run_on(loop_kind, scenario())


def test_a_connection_that_is_cancelled_as_it_succeeds_is_closed(loop_kind: str) -> None:
    async def scenario() -> None:
        async with fake_server() as server:
            peer = NatsPeer(server)
            token, connection = await peer.token(), _Connection(lambda _: None)
            connect = connection.client.connect

            async def connected(*arguments: object, **named: object) -> None:
                await connect(*arguments, **named)  # type: ignore[arg-type]
                opening.cancel()

            connection.client.connect = connected  # type: ignore[method-assign]
            opening = asyncio.ensure_future(connection.open(server.url(), token, "node-1", ""))
            with pytest.raises(asyncio.CancelledError):
                await opening
            assert connection.client.is_closed
            await until(lambda: not server.open)

    run_on(loop_kind, scenario())


def test_what_is_renewed_while_it_is_closed_is_closed(loop_kind: str) -> None:
    async def scenario() -> None:
        async with fake_server() as server, NatsPeer.joined(server, listen=False) as one:
            client = await the_client(one)
            one.gate.clear()
            renewing = asyncio.ensure_future(client.renew())  # as a refusal has the channel do
            await until(lambda: one.calls == 2)
            await client.close()
            one.gate.set()
            with pytest.raises(SdkError, match="closed"):
                await renewing
            assert client._current is None
            one.gate.clear()  # the channel's next client gets no token
            await until(lambda: not server.open)

    run_on(loop_kind, scenario())


def test_a_server_over_tls_that_hangs_is_given_up_at_once(
    loop_kind: str, pem_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pem_file)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem_file))
    monkeypatch.setattr(nats_client_module, "ROUND_TRIP_SECONDS_MIN", 0.1)
    monkeypatch.setattr(nats_stream, "CLOSE_SECONDS", 0.1)
    done = threading.Event()

    def serve_and_hang(listener: socket.socket) -> None:
        plain, _ = listener.accept()
        plain.sendall(greeting(tls_required=True))
        with tls.wrap_socket(plain, server_side=True) as sock:
            said = b""
            while b"PING\r\n" not in said:
                said += sock.recv(65536)
            sock.sendall(b"PONG\r\n")
            done.wait(60)

    async def scenario(port: int) -> None:
        server = FakeServer()
        server.port = port
        peer = NatsPeer(server)
        connection = _Connection(lambda _: None)
        await connection.open(server.url("tls"), await peer.token(), "node-1", "")
        with pytest.raises(SdkError, match="does not answer"):
            await asyncio.wait_for(connection.round_trip(0.1), 10)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_and_hang, args=(listener,), daemon=True)
        thread.start()
        try:
            run_on(loop_kind, scenario(listener.getsockname()[1]))
        finally:
            done.set()
            thread.join(20)
    assert not thread.is_alive()
