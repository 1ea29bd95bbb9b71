"""The range client against real sockets and every fault that a network has."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.config import Settings, load_settings
from kachery_fast.errors import (
    BucketUnreachable,
    FileChanged,
    InvalidArgument,
    KacheryError,
    PartialTransfer,
    Stalled,
    TooLarge,
    WrongSize,
)
from kachery_fast.net.ranges import RangeClient
from tests.net.faulty import (
    FaultyServer,
    answer,
    field,
    message,
    part_of,
    read_body,
    read_head,
    reset,
    serve,
    silent,
)
from tests.network import LOOPS, run_on

DATA = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(3 * 32 * 1024))  # 3 MiB
pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)


def settings(**overrides: Any) -> Settings:
    return load_settings({}, **{"stall_seconds": 5.0, **overrides})


def with_client(loop_kind: str, work: Callable[[RangeClient], Any], *, concurrency: int = 2,
                tls: ssl.SSLContext | None = None, **overrides: Any) -> Any:
    async def main() -> Any:
        client = RangeClient(settings(**overrides), concurrency=concurrency, tls=tls)
        try:
            return await work(client)
        finally:
            await client.close()
    return run_on(loop_kind, main())


def receive(loop_kind: str, server: FaultyServer, length: int, **options: Any) -> tuple[Any, bytes]:
    """One ``receive`` of ``length`` bytes; the result or the error, and what is in memory."""
    memory = bytearray(length)

    async def work(client: RangeClient) -> Any:
        try:
            return await client.receive(f"{server.url}/object", memoryview(memory), **options)
        except KacheryError as error:
            return error
    return with_client(loop_kind, work, stall_seconds=0.3), bytes(memory)


def test_a_whole_object_lands_in_memory(loop_kind: str) -> None:
    counts: list[int] = []
    with FaultyServer(serve(DATA)) as server:
        received, memory = receive(loop_kind, server, len(DATA), progress=counts.append)
    assert memory == DATA
    assert received.received_bytes == received.object_size_bytes == len(DATA) == sum(counts)
    assert received.response.status == 200


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 3 << 20), (1, 70_000), ((3 << 20) - 1, 1)])
def test_a_range_lands_in_memory(loop_kind: str, start: int, length: int) -> None:
    with FaultyServer(serve(DATA)) as server:
        received, memory = receive(loop_kind, server, length, start=start)
    assert memory == DATA[start:start + length]
    assert (received.response.status, received.object_size_bytes) == (206, len(DATA))


def test_an_empty_object_is_received(loop_kind: str) -> None:
    with FaultyServer(serve(b"")) as server:
        received, _ = receive(loop_kind, server, 0)
    assert received.received_bytes == 0
    assert received.response.status == 200


@pytest.mark.parametrize(("reply", "error"), [
    (message(206, DATA[:100], content_range="bytes 1-100/1000"), BucketUnreachable),
    (message(206, DATA[:100], content_range="bytes 0-98/1000"), BucketUnreachable),
    (message(206, DATA[:100]), BucketUnreachable),
    (message(206, DATA[:100], content_range="bytes 0-99/100", content_encoding="gzip"), BucketUnreachable),
    (message(206, DATA[:99], content_range="bytes 0-98/99"), WrongSize),
    (message(206, DATA[:100], content_range="bytes 0-99/2000"), WrongSize),
    (b"HTTP/1.1 206 Because\r\ncontent-range: bytes 0-99/1000\r\ntransfer-encoding: chunked\r\n\r\n",
     BucketUnreachable),
    (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", BucketUnreachable),
    (b"HTTP/1.1 206 Because\r\ncontent-length: many\r\n\r\n", BucketUnreachable),
    (b"HTTP/1.1 206 Because\r\nx: " + b"y" * 100_000 + b"\r\n\r\n", BucketUnreachable),
])
def test_an_answer_that_does_not_fit_is_refused_untouched(loop_kind: str, reply: bytes,
                                                          error: type[KacheryError]) -> None:
    def step(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(reply)
        return True
    with FaultyServer(step) as server:
        raised, memory = receive(loop_kind, server, 100, start=0, total=1000)
    assert type(raised) is error
    assert memory == bytes(100)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
def test_a_whole_object_of_another_size_is_damage(loop_kind: str, size: int) -> None:
    with FaultyServer(serve(DATA)) as server:
        raised, memory = receive(loop_kind, server, size)
    assert isinstance(raised, WrongSize)
    assert raised.details["found"] == len(DATA)
    assert memory == bytes(size)


@pytest.mark.parametrize(("ending", "error"), [("close", PartialTransfer), ("reset", PartialTransfer),
                                               ("hang", Stalled)])
@pytest.mark.parametrize("count", [0, 1, 100_000, len(DATA) - 1])
def test_a_body_that_breaks_off_says_how_far_it_came(loop_kind: str, ending: str, error: type[KacheryError],
                                                     count: int) -> None:
    with FaultyServer(part_of(DATA, count, ending)) as server:
        raised, memory = receive(loop_kind, server, len(DATA))
    assert type(raised) is error
    received = raised.details["received"]
    assert received == count or (ending == "reset" and received < count)  # a reset may overtake the last bytes
    assert memory == DATA[:received] + bytes(len(DATA) - received)


@pytest.mark.parametrize(("ending", "error"), [("close", BucketUnreachable), ("reset", BucketUnreachable),
                                               ("hang", Stalled)])
def test_a_server_without_an_answer_is_unreachable_or_stalled(loop_kind: str, ending: str,
                                                              error: type[KacheryError]) -> None:
    with FaultyServer(silent(ending)) as server:
        raised, _ = receive(loop_kind, server, 10)
        assert type(raised) is error
        assert server.connections == 1  # a fresh connection is not tried twice


@pytest.mark.parametrize("status", [301, 302, 307, 403, 404, 416, 500, 503])
def test_other_statuses_come_back_with_their_body(loop_kind: str, status: int) -> None:
    with FaultyServer(answer(status, b"why", location="http://127.0.0.1:1/elsewhere")) as server:
        received, memory = receive(loop_kind, server, 3)
        assert len(server.heads) == 1
    assert (received.response.status, received.response.body) == (status, b"why")
    assert received.received_bytes == 0
    assert memory == bytes(3)


def test_a_long_error_body_is_cut_off(loop_kind: str) -> None:
    with FaultyServer(answer(500, bytes(1 << 20))) as server:
        received, _ = receive(loop_kind, server, 3)
    assert received.response.body == bytes(65536)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/x", "http:///x", "http://user@127.0.0.1/x", "http://h:port/x",
                                 "http://127.0.0.1:1/a b", "x"])
def test_what_is_not_a_url_is_refused(loop_kind: str, url: str) -> None:
    async def work(client: RangeClient) -> None:
        with pytest.raises((InvalidArgument, BucketUnreachable)) as caught:
            await client.head(url)
        if " " not in url:
            assert caught.type is InvalidArgument
    with_client(loop_kind, work)


@pytest.mark.parametrize("host", ["127.0.0.1", "a..b"])
def test_nobody_there_is_unreachable(loop_kind: str, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def work(client: RangeClient) -> None:
        with pytest.raises(BucketUnreachable) as caught:
            await client.head(f"http://{host}:{port}/x")
        assert caught.value.details["why"]
    with_client(loop_kind, work)


def test_connections_are_kept_alive_and_reused(loop_kind: str) -> None:
    with FaultyServer(serve(DATA)) as server:
        async def work(client: RangeClient) -> None:
            for start in range(0, 1000, 100):
                memory = bytearray(100)
                await client.receive(f"{server.url}/x", memoryview(memory), start=start)
                assert memory == DATA[start:start + 100]
                assert (await client.get_small(f"{server.url}/x", len(DATA))).body == DATA
        with_client(loop_kind, work)
        assert server.connections == 1


@pytest.mark.parametrize("how", ["idle", "request", "reset"])
def test_a_kept_connection_that_the_server_closed_is_replaced(loop_kind: str, how: str) -> None:
    steps = {"idle": [answer(200, b"1", keep=False), answer(200, b"2")],
             "request": [answer(200, b"1"), silent(), answer(200, b"2")],
             "reset": [answer(200, b"1"), silent("reset"), answer(200, b"2")]}[how]
    with FaultyServer(*steps) as server:
        async def work(client: RangeClient) -> list[bytes]:
            return [(await client.get_small(f"{server.url}/x", 10)).body for _ in range(2)]
        assert with_client(loop_kind, work) == [b"1", b"2"]
        assert server.connections == 2


def test_connection_close_is_obeyed(loop_kind: str) -> None:
    with FaultyServer(answer(200, b"12", connection="close")) as server:
        async def work(client: RangeClient) -> None:
            for _ in range(2):
                await client.receive(f"{server.url}/x", memoryview(bytearray(2)))
        with_client(loop_kind, work)
        assert server.connections == 2


def test_chunked_small_bodies_interim_answers_and_limits(loop_kind: str) -> None:
    def chunked(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
                     b"3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n")
        return True
    with FaultyServer(chunked) as server:
        async def work(client: RangeClient) -> None:
            assert (await client.get_small(server.url, 7)).body == b"abcdefg"
            with pytest.raises(TooLarge):
                await client.get_small(server.url, 6)
        with_client(loop_kind, work)
    with FaultyServer(answer(200, DATA)) as server:
        async def too_large(client: RangeClient) -> None:
            with pytest.raises(TooLarge) as caught:
                await client.get_small(server.url, 100)
            assert caught.value.details["size"] == len(DATA)
        with_client(loop_kind, too_large)


# --- sending


def send(loop_kind: str, server: FaultyServer, path: Path, offset: int, length: int, *,
         tls: ssl.SSLContext | None = None, progress: Callable[[int], None] | None = None) -> Any:
    fd = os.open(path, os.O_RDONLY)

    async def work(client: RangeClient) -> Any:
        try:
            return await client.send(f"{server.url}/object", fd, offset, length, headers={"x-signed": "yes"},
                                     progress=progress)
        except KacheryError as error:
            return error
    try:
        return with_client(loop_kind, work, tls=tls, stall_seconds=0.5)
    finally:
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        os.close(fd)


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


def collecting(bodies: list[bytes]) -> Callable[[socket.socket, bytes], bool]:
    def step(sock: socket.socket, head: bytes) -> bool:
        bodies.append(read_body(sock, head))
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" + message(200))
        return True
    return step


@pytest.mark.parametrize(("offset", "length"), [(0, len(DATA)), (12345, 2_000_001), (5, 0)])
def test_a_part_of_a_file_is_sent(loop_kind: str, data_file: Path, offset: int, length: int) -> None:
    bodies: list[bytes] = []
    counts: list[int] = []
    with FaultyServer(collecting(bodies)) as server:
        response = send(loop_kind, server, data_file, offset, length, progress=counts.append)
        assert field(server.heads[0], "x-signed") == "yes"
        assert field(server.heads[0], "content-length") == str(length)
    assert response.status == 200
    assert bodies == [DATA[offset:offset + length]]
    assert sum(counts) == length


@pytest.mark.parametrize("how", ["reads on", "closes", "resets"])
def test_an_early_answer_ends_the_sending(loop_kind: str, tmp_path: Path, how: str) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 30)
    taken: list[int] = [0]

    def refuse(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(message(412, b"exists", connection="close"))
        if how == "reads on":
            while count := len(sock.recv(1 << 20)):
                taken[0] += count
        elif how == "resets":
            sock.recv(1)
            reset(sock)
        return False
    with FaultyServer(refuse) as server:
        response = send(loop_kind, server, path, 0, 1 << 30)
    assert (response.status, response.body) == (412, b"exists")
    assert taken[0] < 1 << 30


def test_a_server_that_takes_nothing_stalls_the_sending(loop_kind: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 30)
    released = threading.Event()

    def hang(sock: socket.socket, head: bytes) -> bool:
        released.wait(20)
        return False
    with FaultyServer(hang) as server:
        raised = send(loop_kind, server, path, 0, 1 << 30)
        released.set()
    assert isinstance(raised, Stalled)


def test_a_file_that_ends_too_early_is_an_error_of_the_file(loop_kind: str, data_file: Path) -> None:
    with FaultyServer(collecting([])) as server:
        raised = send(loop_kind, server, data_file, 0, len(DATA) + 1)
    assert isinstance(raised, FileChanged)


def test_a_broken_sending_is_unreachable(loop_kind: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 28)

    def cut(sock: socket.socket, head: bytes) -> bool:
        sock.recv(100_000)
        reset(sock)
        return False
    with FaultyServer(cut) as server:
        raised = send(loop_kind, server, path, 0, 1 << 28)
    assert isinstance(raised, BucketUnreachable)


# --- TLS


@pytest.fixture(scope="module")
def certificates(pem_file: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's context around a self-signed certificate of 127.0.0.1."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem_file)
    return server, ssl.create_default_context(cafile=str(pem_file))


def test_tls_receives_sends_and_sees_early_answers(loop_kind: str, data_file: Path,
                                                   certificates: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    bodies: list[bytes] = []
    with FaultyServer(serve(DATA), collecting(bodies), collecting(bodies), tls=certificates[0]) as server:
        memory = bytearray(len(DATA) - 7)

        async def work(client: RangeClient) -> None:
            await client.receive(f"{server.url}/x", memoryview(memory), start=7)
            with data_file.open("rb") as file:
                assert (await client.send(f"{server.url}/x", file.fileno(), 9, 2_500_000)).status == 200
            assert (await client.send_small(f"{server.url}/x", DATA)).status == 200
        with_client(loop_kind, work, tls=certificates[1])
    assert memory == DATA[7:]
    assert bodies == [DATA[9:2_500_009], DATA]

    def refuse(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(message(403, b"expired"))
        while sock.recv(1 << 16):
            pass
        return False
    with FaultyServer(refuse, tls=certificates[0]) as server:
        assert send(loop_kind, server, data_file, 0, len(DATA), tls=certificates[1]).status == 403


def test_tls_stalls_and_strangers_are_seen(loop_kind: str,
                                           certificates: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    with FaultyServer(part_of(DATA, 50_000, "hang"), tls=certificates[0]) as server:
        async def stall(client: RangeClient) -> None:
            with pytest.raises(Stalled) as caught:
                await client.receive(f"{server.url}/x", memoryview(bytearray(len(DATA))))
            assert caught.value.details["received"] <= 50_000
        with_client(loop_kind, stall, tls=certificates[1], stall_seconds=0.3)

        async def stranger(client: RangeClient) -> None:
            with pytest.raises(BucketUnreachable):
                await client.head(f"{server.url}/x")
        with_client(loop_kind, stranger)


# --- cancellation, bounds


@pytest.mark.parametrize("tls", [False, True])
def test_nothing_writes_to_memory_after_a_cancellation(loop_kind: str, tls: bool,
                                                       certificates: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    half = len(DATA) // 2
    sent, cancelled = threading.Event(), threading.Event()
    tried: list[bool] = []

    def step(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(message(200, DATA)[:-half])
        sent.set()
        assert cancelled.wait(20)
        tried.append(True)
        sock.sendall(DATA[-half:])
        return False
    memory = bytearray(len(DATA))
    with FaultyServer(step, tls=certificates[0] if tls else None) as server:
        async def work(client: RangeClient) -> bytes:
            arrived = asyncio.Event()
            loop = asyncio.get_running_loop()

            def progress(_count: int) -> None:
                loop.call_soon_threadsafe(arrived.set)

            task = asyncio.ensure_future(client.receive(f"{server.url}/x", memoryview(memory), progress=progress))
            await arrived.wait()
            assert await asyncio.to_thread(sent.wait, 20)  # or the server would be broken off while it still sends
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # a second cancellation does not let go of the memory either
            with pytest.raises(asyncio.CancelledError):
                await task
            snapshot = bytes(memory)
            cancelled.set()
            await asyncio.to_thread(server.join)
            return snapshot
        snapshot = with_client(loop_kind, work, tls=certificates[1] if tls else None)
    assert tried == [True]
    assert bytes(memory) == snapshot
    assert snapshot[:1 << 20] == DATA[:1 << 20]
    memory.clear()  # would raise if any view of it were still held


def test_a_cancellation_ends_a_connect_and_a_waiting_exchange(loop_kind: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = []
        for _ in range(4):  # the queue of the listener is full: a further connect gets no answer
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)

        async def work(client: RangeClient) -> None:
            tasks = [asyncio.ensure_future(client.head(f"http://127.0.0.1:{address[1]}/{n}")) for n in range(3)]
            while len(client._active) < 1:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            done, pending = await asyncio.wait(tasks, timeout=20)
            assert not pending
            assert all(task.cancelled() for task in done)
        with_client(loop_kind, work, concurrency=1, connect_timeout_seconds=60)
        for filler in fillers:
            filler.close()


def test_a_connect_without_an_answer_times_out(loop_kind: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)

        async def work(client: RangeClient) -> None:
            with pytest.raises(BucketUnreachable, match=r"no connection within 0\.2 s"):
                await client.head(f"http://127.0.0.1:{address[1]}/x")
        with_client(loop_kind, work, connect_timeout_seconds=0.2)
        for filler in fillers:
            filler.close()


def test_concurrency_is_bounded_and_small_exchanges_pass_beside(loop_kind: str) -> None:
    lock, now, most = threading.Lock(), [0], [0]
    gate = threading.Event()

    def step(sock: socket.socket, head: bytes) -> bool:
        if head.startswith(b"HEAD"):
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
            return True
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        assert gate.wait(20)
        with lock:
            now[0] -= 1
        sock.sendall(message(200, b"12345"))
        return True
    with FaultyServer(step) as server:
        async def work(client: RangeClient) -> None:
            tasks = [asyncio.ensure_future(client.receive(f"{server.url}/{n}", memoryview(bytearray(5))))
                     for n in range(7)]
            while now[0] < 2:
                await asyncio.sleep(0.005)
            assert (await client.head(f"{server.url}/head")).headers["content-length"] == "5"
            gate.set()
            await asyncio.gather(*tasks)
        with_client(loop_kind, work, concurrency=2)
    assert most[0] == 2


def test_closing_the_client_breaks_off_what_is_under_way(loop_kind: str) -> None:
    with FaultyServer(part_of(DATA, 1000, "hang")) as server:
        async def work(client: RangeClient) -> None:
            task = asyncio.ensure_future(client.receive(server.url, memoryview(bytearray(len(DATA)))))
            while not server.heads:
                await asyncio.sleep(0.005)
            await client.close()
            with pytest.raises((PartialTransfer, BucketUnreachable)):
                await task
            with pytest.raises(BucketUnreachable, match="closed"):
                await client.head(server.url)
        with_client(loop_kind, work)


def test_the_helper_reads_heads(loop_kind: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"GET / HTTP/1.1\r\nA: b\r\n\r\nrest")
        assert field(read_head(ours), "a") == "b"
