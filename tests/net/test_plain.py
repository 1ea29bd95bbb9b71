"""Small objects over a kept connection: read on the event loop where they are plain, and with the same outcome else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_fast.config import load_settings
from kachery_fast.errors import BucketUnreachable, InvalidArgument, Stalled, TooLarge
from kachery_fast.net.plain import NotPlain, Origin, Request, Response, plain_answer, plain_request
from kachery_fast.net.ranges import RangeClient
from tests.net.faulty import FaultyServer, Step, answer, field, message, reset, silent
from tests.network import LOOPS, run_on

ORIGIN = Origin("http", "bucket.example", 80)
on_each_loop = pytest.mark.parametrize("loop_kind", LOOPS)


class Counted:
    """A client that counts what it does in threads, with one kept connection to ``server``."""

    def __init__(self, server: FaultyServer, **overrides: Any) -> None:
        self.client = RangeClient(load_settings({}, **{"stall_seconds": 5.0, **overrides}), concurrency=2)
        self.url = f"{server.url}/object"
        self.in_threads = 0
        submit = self.client._threads.submit

        def counting(*arguments: Any) -> Any:
            self.in_threads += 1
            return submit(*arguments)
        self.client._threads.submit = counting  # type: ignore[assignment]

    async def get(self, limit_bytes: int = 1 << 20) -> Response:
        return await self.client.get_small(self.url, limit_bytes, headers={"x-asked": "yes"})


def on_kept(loop_kind: str, second: Step, work: Callable[[Counted, FaultyServer], Any], *more: Step,
            **overrides: Any) -> Any:
    """Run ``work`` with a client whose connection was kept after a first answer; the next one is by ``second``."""
    with FaultyServer(answer(200, b"first"), second, *more) as server:
        async def main() -> Any:
            counted = Counted(server, **overrides)
            try:
                assert (await counted.get()).body == b"first"
                counted.in_threads = 0
                return await work(counted, server)
            finally:
                await counted.client.close()
        return run_on(loop_kind, main())


def pieces(*data: bytes, keep: bool = True) -> Step:
    def step(sock: socket.socket, head: bytes) -> bool:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in data:
            sock.sendall(piece)
            threading.Event().wait(0.02)  # so that they do not come as one
        return keep
    return step


@on_each_loop
@pytest.mark.parametrize("status", [200, 403, 404, 412, 500, 503])
@pytest.mark.parametrize("size", [0, 1, 1000, 60_000])
def test_a_plain_answer_needs_no_thread(loop_kind: str, status: int, size: int) -> None:
    async def work(counted: Counted, server: FaultyServer) -> None:
        for _ in range(3):
            found = await counted.get()
            assert (found.status, found.body, found.headers["content-length"]) == (status, bytes(size), str(size))
        assert (counted.in_threads, server.connections) == (0, 1)
        assert field(server.heads[-1], "host") == server.url.removeprefix("http://")
        assert field(server.heads[-1], "x-asked") == "yes"
        assert server.heads[-1] == server.heads[0]  # the first was written by h11
    on_kept(loop_kind, answer(status, bytes(size)), work)


@on_each_loop
@pytest.mark.parametrize("step", [
    pieces(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n", b"sec", b"ond"),
    pieces(b"HTTP/1.1 20", b"0 OK\r\ncontent-le", b"ngth: 6\r\n\r\nsec", b"ond"),
    pieces(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
           b"3\r\nsec\r\n", b"3\r\nond\r\n0\r\n\r\n"),
    pieces(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\ncontent-length: 6\r\n\r\nsecond"),
    pieces(b"HTTP/1.1 200 OK\r\nx: \xe9\r\ncontent-length: 6\r\n\r\nsecond"),
    pieces(b"HTTP/1.1 200 OK\ncontent-length: 6\n\nsecond"),
    pieces(b"HTTP/1.0 200 OK\r\ncontent-length: 6\r\n\r\nsecond", keep=False),
    pieces(b"HTTP/1.1 200 OK\r\n\r\nsecond", keep=False),
    pieces(b"HTTP/1.1 200 OK\r\nconnection: Close\r\ncontent-length: 6\r\n\r\nsecond", keep=False),
    pieces(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecond, and something unasked"),
])
def test_any_other_answer_is_read_all_the_same(loop_kind: str, step: Step) -> None:
    async def work(counted: Counted, _server: FaultyServer) -> None:
        assert (await counted.get()).body == b"second"
        assert (await counted.get()).body == b"third"  # whatever became of the connection
    on_kept(loop_kind, step, work, answer(200, b"third"))


@on_each_loop
def test_what_is_long_is_received_in_a_thread(loop_kind: str) -> None:
    data = bytes(range(256)) * 4096

    async def work(counted: Counted, server: FaultyServer) -> None:
        assert (await counted.get()).body == data
        assert counted.in_threads == 1
        with pytest.raises(TooLarge) as caught:
            await counted.get(100)
        assert caught.value.details["size"] == len(data)
    on_kept(loop_kind, answer(200, data), work)


@on_each_loop
@pytest.mark.parametrize("size", [101, 50_000, 100_000])
def test_the_readers_limit_holds(loop_kind: str, size: int) -> None:
    async def work(counted: Counted, _server: FaultyServer) -> None:
        with pytest.raises(TooLarge) as caught:
            await counted.get(100)
        assert (caught.value.details["size"], caught.value.details["limit"]) == (size, 100)
        assert len((await counted.get(size)).body) == size
    on_kept(loop_kind, answer(200, bytes(size)), work)


@on_each_loop
def test_a_redirect_is_not_followed(loop_kind: str) -> None:
    async def work(counted: Counted, server: FaultyServer) -> None:
        found = await counted.get()
        assert (found.status, found.headers["location"]) == (302, "http://127.0.0.1:1/elsewhere")
        assert len(server.heads) == 2
    on_kept(loop_kind, answer(302, b"", location="http://127.0.0.1:1/elsewhere"), work)


def closing(data: bytes, *, by_reset: bool = False) -> Step:
    def step(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(data)
        if by_reset:
            threading.Event().wait(0.05)  # what a reset overtakes is lost
            reset(sock)
        return False
    return step


@on_each_loop
@pytest.mark.parametrize("by_reset", [False, True])
@pytest.mark.parametrize("data", [b"H", b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n", message(200, b"second")[:-1],
                                  b"SSH-2.0-OpenSSH_9.2\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n"])
def test_an_answer_that_breaks_off_or_is_none_is_an_error_and_not_asked_for_again(loop_kind: str, data: bytes,
                                                                                  by_reset: bool) -> None:
    async def work(counted: Counted, server: FaultyServer) -> None:
        with pytest.raises(BucketUnreachable) as caught:
            await counted.get()
        assert caught.value.details["why"]
        assert (len(server.heads), server.connections) == (2, 1)
        assert (await counted.get()).body == b"third"
    on_kept(loop_kind, closing(data, by_reset=by_reset), work, answer(200, b"third"))


@on_each_loop
@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\n", message(200, b"second")[:-1]])
def test_a_server_that_falls_silent_stalls(loop_kind: str, data: bytes) -> None:
    def step(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(data)
        sock.recv(1)  # until the client gives up
        return False

    async def work(counted: Counted, server: FaultyServer) -> None:
        with pytest.raises(Stalled) as caught:
            await counted.get()
        assert caught.value.details["seconds"] == 0.2
        assert server.connections == 1
    on_kept(loop_kind, step, work, stall_seconds=0.2)


@on_each_loop
@pytest.mark.parametrize("ending", ["close", "reset"])
def test_a_connection_closed_without_an_answer_is_replaced_once(loop_kind: str, ending: str) -> None:
    async def work(counted: Counted, server: FaultyServer) -> None:
        assert (await counted.get()).body == b"third"
        assert (len(server.heads), server.connections) == (3, 2)
    on_kept(loop_kind, silent(ending), work, answer(200, b"third"))


@on_each_loop
@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\n"])
@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_what_is_under_way_is_broken_off_at_once(loop_kind: str, data: bytes, how: str) -> None:
    ended = threading.Event()

    def step(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(data)
        with contextlib.suppress(ConnectionError):
            assert not sock.recv(1)
        ended.set()
        return False

    async def work(counted: Counted, server: FaultyServer) -> None:
        task = asyncio.ensure_future(counted.get())
        while len(server.heads) < 2 or counted.in_threads < len(data[:1]):
            await asyncio.sleep(0.001)
        if how == "cancelled":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await counted.client.close()
            with pytest.raises(BucketUnreachable):
                await task
        assert await asyncio.to_thread(ended.wait, 30)
        assert not counted.client._active
        assert not counted.client._idle
    on_kept(loop_kind, step, work, stall_seconds=90.0)


@on_each_loop
def test_many_at_once_keep_the_loop_free(loop_kind: str) -> None:
    async def work(counted: Counted, server: FaultyServer) -> None:
        found = await asyncio.gather(*(counted.get() for _ in range(20)))
        assert {one.body for one in found} == {b"more"}
        assert server.connections <= 2
        assert len(counted.client._idle) == server.connections
    on_kept(loop_kind, answer(200, b"more"), work)


# --- how a request is written and an answer read


@pytest.mark.parametrize("target", ["/a b", "/a\r\nx: y", "/a HTTP/1.1\r\nx: y", "/\xe9", "/" + "a" * 5000, "/a\n", ""])
def test_a_request_with_anything_odd_is_left_to_h11(target: str) -> None:
    assert plain_request(Request("GET", ORIGIN, target, {}, "it")) is None


@pytest.mark.parametrize("fields", [{"a\r\nb": "c"}, {"a": "b\r\nc: d"}, {"a": "\xe9"}, {"a b": "c"}, {"": "c"},
                                    {"a": " b"}, {"a": "b\n"}, {"a": ""}])
def test_so_is_one_with_odd_fields(fields: dict[str, str]) -> None:
    assert plain_request(Request("GET", ORIGIN, "/a", fields, "it")) is None


def test_so_is_one_that_is_no_get() -> None:
    for method in ("HEAD", "PUT", "get", "GETS"):
        assert plain_request(Request(method, ORIGIN, "/a", {}, "it")) is None


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    data = plain_request(Request("GET", Origin("http", "::1", 8080), "/a?b", {"c": "d e"}, "it"))
    assert data == b"GET /a?b HTTP/1.1\r\nhost: [::1]:8080\r\nc: d e\r\n\r\n"


@on_each_loop
def test_a_target_that_nothing_can_ask_for_is_refused_on_a_kept_connection_too(loop_kind: str) -> None:
    async def work(counted: Counted, server: FaultyServer) -> None:
        counted.url += "/a b"
        with pytest.raises(InvalidArgument):
            await counted.get()
        assert len(server.heads) == 1
    on_kept(loop_kind, answer(200), work)


NAMES = st.sampled_from(["content-length", "Content-Length", "transfer-encoding", "connection", "x", "etag", "x y",
                         "\xe9"])
VALUES = st.sampled_from(["0", "3", "+3", " 3 ", "03", "3, 3", "close", "keep-alive", "chunked", "", "\t3", "a\x00b",
                          "\xe9"])
FIRST = st.sampled_from(["HTTP/1.1 200 OK", "HTTP/1.1 404", "HTTP/1.1 404 Not Found", "HTTP/1.0 200 OK",
                         "HTTP/1.1 204 No", "HTTP/1.1 304 No", "HTTP/1.1 100 Go on", "HTTP/2 200 OK",
                         "HTTP/1.1 2000 x"])


@given(FIRST, st.lists(st.tuples(NAMES, VALUES), max_size=4), st.sampled_from([":", ": ", " :"]),
       st.sampled_from(["\r\n", "\n"]), st.binary(max_size=5), st.booleans())
def test_what_is_read_plainly_is_what_h11_reads(first: str, fields: list[tuple[str, str]], colon: str, line_end: str,
                                                body: bytes, plain_length: bool) -> None:
    if plain_length:
        fields = [*fields, ("content-length", str(len(body)))]
    lines = [first, *(f"{name}{colon}{value}" for name, value in fields), "", ""]
    data = line_end.join(lines).encode("latin-1") + body
    try:
        found = plain_answer(data)
    except NotPlain:
        return
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data)
    head, content = parser.next_event(), b""
    assert isinstance(head, h11.Response)
    while isinstance(event := parser.next_event(), h11.Data):
        content += event.data
    if found is None:
        assert event is h11.NEED_DATA
        return
    assert isinstance(event, h11.EndOfMessage)
    assert parser.trailing_data[0] == b""
    assert found.body == content
    assert found.status == head.status_code
    assert found.headers == {name.decode(): value.decode("latin-1") for name, value in head.headers}
    parser.start_next_cycle()  # raises where the connection has to end
