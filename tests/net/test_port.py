"""One port for the web application and the bucket, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kachery_fast.config import load_settings
from kachery_fast.embedded.bucket import BucketServer, UploadSigner
from kachery_fast.errors import InvalidArgument, ObjectMissing, UploadRefused, UrlExpired
from kachery_fast.net.bucket import HttpBucket, SignedUpload
from kachery_fast.net.port import Port, serve_port
from kachery_fast.net.ranges import RangeClient
from kachery_fast.net.visitors import Visitors
from tests.embedded.bucket_server import NAME, SECRET, Clock, get_request, read_all, take_apart
from tests.network import LOOPS, run_on

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
DATA = bytes(range(256)) * 20_000


class House:
    """A web application and a bucket on one port."""

    def __init__(self, port: Port, bucket: BucketServer, signer: UploadSigner, clock: Clock) -> None:
        self.port, self.bucket, self.signer, self.clock = port, bucket, signer, clock
        self.url = f"http://127.0.0.1:{port.port}"

    def sign(self, name: str, size: int) -> SignedUpload:
        return SignedUpload(name, *self.signer.sign(name, size, 300, f"{self.url}/bucket"))


def in_house(loop_kind: str, tmp_path: Path, work: Callable[[House], Any], **options: Any) -> None:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    async def main() -> None:
        clock = Clock()
        signer = UploadSigner(SECRET, clock=clock)
        bucket = BucketServer(tmp_path / "root", signer, load_settings({}))
        app = web.Application()
        app.router.add_get("/hello", hello)
        app.router.add_get("/bucketful", hello)
        runner = web.AppRunner(app)
        await runner.setup()
        assert runner.server is not None
        port = await serve_port("127.0.0.1", 0, runner.server, bucket, **options)
        try:
            await work(House(port, bucket, signer, clock))
        finally:
            await port.close()
            await asyncio.to_thread(bucket.close)
            await runner.cleanup()
    run_on(loop_kind, main())


def test_the_application_and_the_bucket_share_the_port(loop_kind: str, tmp_path: Path) -> None:
    async def work(house: House) -> None:
        settings = load_settings({})
        client = RangeClient(settings, concurrency=4)
        bucket = HttpBucket(f"{house.url}/bucket", client, settings)
        source = tmp_path / "source"
        source.write_bytes(DATA)
        fd = os.open(source, os.O_RDONLY)
        try:
            names = [f"{NAME[:-1]}{digit}" for digit in range(8)]
            async with aiohttp.ClientSession() as session:
                async def say_hello(path: str) -> str:
                    async with session.get(f"{house.url}{path}") as response:
                        return await response.text()
                results = await asyncio.gather(
                    *(bucket.put_from(house.sign(name, len(DATA)), fd, 0, len(DATA)) for name in names),
                    *(say_hello(path) for path in ("/hello", "/bucketful") * 4))
            assert results == [True] * 8 + ["hello"] * 8
            assert not await bucket.put_from(house.sign(NAME[:-1] + "0", len(DATA)), fd, 0, len(DATA))
            memories = [bytearray(len(DATA)) for _ in names]
            await asyncio.gather(*(bucket.get_into(name, memoryview(memory))
                                   for name, memory in zip(names, memories, strict=True)))
            assert all(memory == DATA for memory in memories)
            assert await bucket.size(names[0]) == len(DATA)
            with pytest.raises(ObjectMissing):
                await bucket.size(NAME[:-1] + "a")
            old = house.sign(NAME, len(DATA))
            house.clock.now += 300
            with pytest.raises(UrlExpired):
                await bucket.put_from(old, fd, 0, len(DATA))
            forged = old._replace(url=old.url[:-1] + ("0" if old.url[-1] != "0" else "1"))
            with pytest.raises(UploadRefused):
                await bucket.put_from(forged, fd, 0, len(DATA))
        finally:
            os.close(fd)
            await client.close()
    in_house(loop_kind, tmp_path, work)


@pytest.mark.parametrize(("request_bytes", "status"), [
    (get_request(f"/bucket/{NAME}"), 404), (get_request("/bucket/x"), 400), (get_request("/bucketful"), 200),
    (get_request("/hello"), 200), (get_request("/other"), 404), (get_request("/bucket"), 404),
    (b"\r\n" + get_request("/hello"), 200),
])
@pytest.mark.parametrize("bytewise", [False, True])
def test_a_request_reaches_its_server_however_it_arrives(loop_kind: str, tmp_path: Path, request_bytes: bytes,
                                                         status: int, bytewise: bool) -> None:
    async def work(house: House) -> None:
        def talk() -> bytes:
            with socket.create_connection(("127.0.0.1", house.port.port), 10) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                size = 1 if bytewise else len(request_bytes)
                for start in range(0, len(request_bytes), size):
                    sock.sendall(request_bytes[start:start + size])
                return read_all(sock)
        assert take_apart(await asyncio.to_thread(talk)).status == status
    in_house(loop_kind, tmp_path, work)


@pytest.mark.parametrize("said", [b"", b"GET /buc"])
def test_a_client_that_does_not_say_what_it_wants_is_dropped(loop_kind: str, tmp_path: Path, said: bytes) -> None:
    async def work(house: House) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port.port)
        writer.write(said)
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            assert said  # closed on unread bytes
        writer.close()
        async with aiohttp.ClientSession() as session, session.get(f"{house.url}/hello") as response:
            assert response.status == 200
    in_house(loop_kind, tmp_path, work, first_bytes_seconds=0.2)


def test_closing_the_port_drops_who_has_not_spoken_and_frees_it(loop_kind: str, tmp_path: Path) -> None:
    async def work(house: House) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port.port)
        gone, closed = await asyncio.open_connection("127.0.0.1", house.port.port)
        closed.close()
        while not house.port._sorting:
            await asyncio.sleep(0.005)
        await house.port.close()
        assert await reader.read() == b""
        writer.close()
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await asyncio.open_connection("127.0.0.1", house.port.port)
        assert gone is not None
    in_house(loop_kind, tmp_path, work)


@pytest.mark.parametrize("begun", [b"", b"PO", b"GET /bucket/x HTTP/1.1\r\nHost: a\r\n"])
def test_who_ends_amid_the_head_is_let_go_at_once(loop_kind: str, tmp_path: Path, begun: bytes) -> None:
    async def work(house: House) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port.port)
        writer.write(begun)
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):  # for what was sent and nobody read
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
    in_house(loop_kind, tmp_path, work)


def test_a_head_that_comes_slowly_holds_no_thread(loop_kind: str, tmp_path: Path) -> None:
    async def work(house: House) -> None:
        slow = [await asyncio.open_connection("127.0.0.1", house.port.port) for _ in range(3)]
        for _, writer in slow:
            writer.write(b"GET /bucket/x HTTP/1.1\r\nHost:")
        async with aiohttp.ClientSession() as session, session.get(house.url + "/hello") as answer:
            assert answer.status == 200
        assert not house.bucket._served
        for reader, writer in slow:
            writer.write(b" a\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 4")
            writer.close()
    in_house(loop_kind, tmp_path, work)


def test_several_addresses_are_listened_on(loop_kind: str, tmp_path: Path) -> None:
    async def work(house: House) -> None:
        listeners = [socket.create_server(("127.0.0.1", 0))]
        listeners.append(socket.create_server(("127.0.0.2", listeners[0].getsockname()[1])))
        for listener in listeners:
            listener.setblocking(False)
        port = Port(listeners, asyncio.Protocol, house.bucket, Visitors(10), watched=False)
        try:
            for host in ("127.0.0.1", "127.0.0.2"):
                reader, writer = await asyncio.open_connection(host, port.port)
                writer.write(b"GET /bucket/x HTTP/1.1\r\nHost: a\r\n\r\n")
                assert (await reader.readline()).startswith(b"HTTP/1.1 4")
                writer.close()
        finally:
            await port.close()
    in_house(loop_kind, tmp_path, work)


def test_an_address_in_use_is_an_error_with_its_name(loop_kind: str, tmp_path: Path) -> None:
    async def work(house: House) -> None:
        with pytest.raises(InvalidArgument, match=str(house.port.port)):
            await serve_port("127.0.0.1", house.port.port, asyncio.Protocol, house.bucket)
    in_house(loop_kind, tmp_path, work)
