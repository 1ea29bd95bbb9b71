"""Kept connections: shared between calls, found out when stale, and no request is ever done twice."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kachery_fast import errors
from kachery_fast.client.connection import NodeConnection
from kachery_fast.client.keeping import KeptConnections, Withdrawal
from kachery_fast.config import load_settings

Handler = Callable[[socket.socket, bytes], bool]


def reply(body: bytes, status: str = "200 OK", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def echo(caller: socket.socket, body: bytes) -> bool:
    """Answer with the body itself, and keep the connection."""
    caller.sendall(reply(body))
    return True


class Peer:
    """A server at the node's address: what it was asked, on how many connections."""

    def __init__(self, handler: Handler = echo) -> None:
        self.handler = handler
        self.asked: list[bytes] = []
        self.heads: list[str] = []
        self.connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(caller)
            thread = threading.Thread(target=self._serve, args=(caller,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, caller: socket.socket) -> None:
        with caller:
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    try:
                        piece = caller.recv(65536)
                    except OSError:
                        return
                    if not piece:
                        return
                    data += piece
                head, _, data = data.partition(b"\r\n\r\n")
                text = head.decode("ascii")
                length = int(text.lower().partition("content-length:")[2].split("\r\n")[0])
                while len(data) < length:
                    data += caller.recv(65536)
                body, data = data[:length], data[length:]
                self.heads.append(text)
                self.asked.append(body)
                if not self.handler(caller, body):
                    return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for caller in self.connections:
            with suppress(OSError):
                caller.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


@pytest.fixture
def peer(store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """A peer that echoes, with a client code to read."""
    found = Peer()
    store_dir.mkdir()
    (store_dir / "client-auth").write_text("abcdefghijkl")
    monkeypatch.setenv("KACHERY_DAEMON_PORT", str(found.port))
    yield found
    found.close()


def connection() -> NodeConnection:
    return NodeConnection(load_settings())


def test_calls_share_one_connection_and_say_what_a_node_wants_to_hear(peer: Peer) -> None:
    node = connection()
    for number in range(5):
        assert node.call("/api/x", {"n": number}) == {"n": number}
    assert len(peer.connections) == 1
    lines = peer.heads[4].split("\r\n")
    assert lines[0] == "POST /api/x HTTP/1.1"
    assert set(lines[1:]) == {"KACHERY-CLIENT-AUTH-CODE: abcdefghijkl", "Content-Type: application/json",
                              "Content-Length: 8", f"Host: 127.0.0.1:{peer.port}"}


def test_a_body_may_be_text_and_long(peer: Peer) -> None:
    text = json.dumps({"x": "y" * 3_000_000}).encode()
    assert connection().call("/api/x", text) == json.loads(text)


@pytest.mark.parametrize("text", [
    '{"x": "\\ud800"}', '{"x": [NaN, -Infinity, 1e400]}', '{"x": 1, "x": 2}',
    '{"\\u00e9\\/": [0.1, -0.0, 1E5, 5e-324]}',
    '{"x": [18446744073709551616, -9223372036854775809, 1.0, 123456789012345678901234567890]}', ' {"x":\ttrue }\n',
    '{"x": ' + 200 * "[" + 200 * "]" + "}",
])
def test_an_answer_is_read_as_python_reads_json(peer: Peer, text: str) -> None:
    found = connection().call("/api/x", text.encode())
    assert repr(found) == repr(json.loads(text))


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"{} {}", b'{"x": 01}', b'{"x": "\xff"}', b"{'x': 1}"])
def test_an_answer_that_is_no_object_is_a_fault_of_the_node(peer: Peer, data: bytes) -> None:
    with pytest.raises(errors.NodeError):
        connection().call("/api/x", data)


def test_a_connection_that_was_closed_while_idle_is_replaced_before_anything_is_sent(peer: Peer) -> None:
    node = connection()
    node.call("/api/x", {"n": 1})
    peer.connections[0].shutdown(socket.SHUT_RDWR)
    assert node.call("/api/x", {"n": 2}) == {"n": 2}
    assert len(peer.connections) == 2
    assert peer.asked == [b'{"n": 1}', b'{"n": 2}']


def test_a_connection_on_which_something_unasked_came_is_not_used_again(peer: Peer) -> None:
    node = connection()
    node.call("/api/x", {"n": 1})
    peer.connections[0].sendall(reply(b'{"n": "an old answer"}'))
    end = time.monotonic() + 20
    while node.call("/api/x", {"n": 2}) != {"n": 2}:
        assert time.monotonic() < end  # loopback delivers before send returns; still, do not hang
    assert len(peer.connections) == 2


def test_a_node_that_says_so_keeps_no_connection(peer: Peer) -> None:
    def last(caller: socket.socket, body: bytes) -> bool:
        caller.sendall(reply(body, "200 OK", "Connection: close"))
        return False

    peer.handler = last
    node = connection()
    for number in range(3):
        assert node.call("/api/x", {"n": number}) == {"n": number}
    assert len(peer.connections) == 3


@pytest.mark.parametrize("idle_first", [False, True])
def test_a_request_that_got_no_answer_is_not_sent_again(peer: Peer, idle_first: bool) -> None:
    node = connection()
    if idle_first:
        node.call("/api/append", {"n": 0})
    peer.handler = lambda caller, body: False  # it read the request, and ends
    with pytest.raises(errors.NodeNotRunning, match="without an answer"):
        node.call("/api/append", {"n": 1})
    peer.handler = echo
    assert node.call("/api/append", {"n": 2}) == {"n": 2}
    assert peer.asked == [b'{"n": 0}'] * idle_first + [b'{"n": 1}', b'{"n": 2}']


def test_a_refused_code_is_read_again_and_the_request_sent_again_once(peer: Peer, store_dir: Path) -> None:
    refusal = reply(json.dumps(errors.ClientAuthRefused(why="it is old", path="x").to_dict()).encode(), "403 Forbidden")

    def guard(caller: socket.socket, body: bytes) -> bool:
        caller.sendall(reply(body) if "newcodenewco" in peer.heads[-1] else refusal)
        return True

    node = connection()
    node.call("/api/x", {"n": 1})
    peer.handler = guard
    (store_dir / "client-auth").write_text("newcodenewco")
    assert node.call("/api/x", {"n": 2}) == {"n": 2}
    assert peer.asked == [b'{"n": 1}', b'{"n": 2}', b'{"n": 2}']
    (store_dir / "client-auth").write_text("othercodeoth")
    node = connection()
    with pytest.raises(errors.ClientAuthRefused, match="it is old"):
        node.call("/api/x", {"n": 3})
    assert peer.asked[3:] == [b'{"n": 3}'] * 2


def test_an_error_of_the_node_arrives_as_it_is_and_the_connection_stays(peer: Peer) -> None:
    error = errors.FeedUnknown(feed="x", advice="y")
    node = connection()

    def refuse(caller: socket.socket, body: bytes) -> bool:
        caller.sendall(reply(json.dumps(error.to_dict()).encode(), "404 Not Found"))
        return True

    peer.handler = refuse
    with pytest.raises(errors.FeedUnknown, match="no feed x"):
        node.call("/api/x", {})
    peer.handler = echo
    assert node.call("/api/x", {"n": 1}) == {"n": 1}
    assert len(peer.connections) == 1


def test_threads_get_the_answers_to_their_own_questions(peer: Peer) -> None:
    node = connection()

    def ask(number: int) -> Any:
        return [node.call("/api/x", {"n": number, "i": i}) for i in range(50)]

    with ThreadPoolExecutor(8) as pool:
        for number, answers in enumerate(pool.map(ask, range(8))):
            assert answers == [{"n": number, "i": i} for i in range(50)]
    assert len(peer.connections) <= 8


def test_an_answer_may_come_byte_by_byte(peer: Peer) -> None:
    def slowly(caller: socket.socket, body: bytes) -> bool:
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in reply(body):
            caller.sendall(bytes([byte]))
        return True

    peer.handler = slowly
    node = connection()
    assert node.call("/api/x", {"n": 1}) == {"n": 1}
    assert node.call("/api/x", {"n": 2}) == {"n": 2}
    assert len(peer.connections) == 1


@pytest.mark.parametrize(("answer", "what"), [
    (b"SSH-2.0-OpenSSH_9.2\r\n", "not HTTP"),
    (b"HTTP/1.1 200 OK\r\n\r\n{}", "length"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "length"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}", "length"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n{}", "length"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{}", "longer than"),
    (b"HTTP/1.1 twohundred OK\r\nContent-Length: 2\r\n\r\n{}", "status"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{}", "broke off"),
    (b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000, "too long"),
    (b"HTTP/1.1 200 OK\r\nContent", "broke off in its head"),
    (reply(b"[1]"), "not a JSON object"),
    (reply(b"<html>"), "makes no sense"),
])
def test_answers_that_make_no_sense_are_errors(peer: Peer, answer: bytes, what: str) -> None:
    def speak(caller: socket.socket, body: bytes) -> bool:
        caller.sendall(answer)
        return False

    peer.handler = speak
    with pytest.raises(errors.NodeError, match=what):
        connection().call("/api/x", {})
    assert len(peer.asked) == 1


def test_a_silent_node_is_given_up(peer: Peer) -> None:
    peer.handler = lambda caller, body: True
    node = connection()
    with pytest.raises(errors.Stalled, match=r"0\.2 s"):
        node.call("/api/x", {"n": 1}, 0.2)
    peer.handler = echo
    assert node.call("/api/x", {"n": 2}) == {"n": 2}
    assert len(peer.connections) == 2  # the late answer to the first has nowhere to go


def test_a_call_that_waits_can_be_taken_back_from_another_thread(peer: Peer) -> None:
    heard = threading.Event()

    def wait(caller: socket.socket, body: bytes) -> bool:
        heard.set()
        return True

    peer.handler = wait
    withdrawal = Withdrawal()
    node = connection()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(node.call, "/api/x", {}, 60.0, withdrawal=withdrawal)
        assert heard.wait(20)
        withdrawal.withdraw()
        with pytest.raises(errors.NodeNotRunning):
            call.result(timeout=20)
    with pytest.raises(errors.NodeNotRunning, match="withdrawn"):
        node.call("/api/x", {}, 60.0, withdrawal=withdrawal)
    assert len(peer.asked) == 1


def test_what_is_idle_is_closed_with_its_owner(peer: Peer) -> None:
    node = connection()
    node.call("/api/x", {})
    kept = node._kept
    assert isinstance(kept, KeptConnections)
    kept.close()
    assert node.call("/api/x", {"n": 1}) == {"n": 1}
    assert len(peer.connections) == 2


FORKING = """
import os, sys
from kachery_fast.client.connection import NodeConnection
from kachery_fast.config import load_settings
node = NodeConnection(load_settings())
assert node.call("/api/x", {"who": "parent"}) == {"who": "parent"}
pid = os.fork()
who = "parent" if pid else "child"
for n in range(200):
    assert node.call("/api/x", {"who": who, "n": n}) == {"who": who, "n": n}
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_forked_process_has_connections_of_its_own(peer: Peer) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", FORKING], capture_output=True, text=True, timeout=60,
                          check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(peer.asked) == 401
    assert len(peer.connections) == 2
