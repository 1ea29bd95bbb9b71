"""Files that come through the node's API, from a node whose store is not at hand, sound or not."""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client.connection import NodeConnection
from kachery_fast.config import load_settings
from kachery_fast.store.eviction import CacheKeeper, Kind
from tests.cli.commands import Program
from tests.http_server import Handler, HttpServer


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class ForeignNode:
    """A node on a disk that is not at hand, with one file, of which it sends ``sent``."""

    def __init__(self, sha1: str, size: int, sent: bytes) -> None:
        self.bodies: list[dict[str, Any]] = []
        node = self

        class Requests(Handler):
            def get(self) -> None:
                self.answer({"nodeId": "f" * 64, "kacheryStorageDir": "/no/such/directory"})

            def post(self) -> None:
                node.bodies.append(self.body())
                self.answer(sent if self.path == "/api/read" else {
                    "type": "done", "path": f"/no/such/directory/{sha1}", "size": size, "sha1": sha1,
                    "source": "channel", "seconds": 0.0})

        self._server = HttpServer(Requests)
        self.port = self._server.port
        self.close = self._server.close


@contextmanager
def foreign_node(monkeypatch: pytest.MonkeyPatch, data: bytes, sent: bytes) -> Iterator[ForeignNode]:
    """Run such a node, the one of this test's client from now on, that has ``data`` and sends ``sent``."""
    node = ForeignNode(sha1_of(data), len(data), sent)
    monkeypatch.setenv("KACHERY_DAEMON_PORT", str(node.port))
    monkeypatch.setenv("KACHERY_CLIENT_AUTH_CODE", "code")
    try:
        yield node
    finally:
        node.close()


def stored(store_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store_dir / "sha1").rglob("*")
            if path.is_file() and len(path.name) == 40}


def left(store_dir: Path) -> list[Path]:
    return [path for path in (store_dir / "tmp").rglob("*") if path.is_file()]


def test_wrong_bytes_from_the_node_cost_nothing_that_was_here(
        store_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, linked = b"an original that only this machine has", b"a linked one"
    kf.store_text(wrong.decode())
    (tmp_path / "linked.dat").write_bytes(linked)
    kf.link_file(tmp_path / "linked.dat")
    for sent in (wrong, linked):
        uri = f"sha1://{sha1_of(b'wanted' + sent)}/wanted.dat"
        with foreign_node(monkeypatch, b"wanted" + sent, sent), \
                pytest.raises(errors.CorruptFile, match="verify its store"):
            kf.load_file(uri, channel="lab")
    assert stored(store_dir) == {sha1_of(wrong): wrong}
    assert kf.load_bytes(f"sha1://{sha1_of(linked)}") == linked
    assert not left(store_dir)


def test_what_comes_through_the_node_is_a_cached_copy(
        store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_CHUNK_SIZE_BYTES", str(1024 * 1024))
    data = bytes(range(256)) * 20000  # five chunks
    told: list[kf.Progress] = []
    with foreign_node(monkeypatch, data, data):
        loaded = kf.load(f"sha1://{sha1_of(data)}", channel="lab", progress=told.append)
    assert Path(loaded.path).read_bytes() == data
    assert Path(loaded.path).is_relative_to(store_dir)
    assert (told[-1].done_bytes, told[-1].total_bytes) == (len(data), len(data))
    keeper = CacheKeeper(store_dir)
    assert {found.kind for found in keeper.list()} == {Kind.CACHED}
    assert keeper.index.totals().files == 1
    assert keeper.index.totals().bytes > len(data)  # with the manifest
    assert kf.load(f"sha1://{sha1_of(data)}").source == "store"
    assert not left(store_dir)


def test_what_was_stored_here_meanwhile_stays_an_original(
        store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"the same"
    with foreign_node(monkeypatch, data, data):
        def store_it(step: kf.Progress) -> None:
            if step.done_bytes:
                monkeypatch.setenv("KACHERY_DAEMON_PORT", "1")  # as another process, without that node
                kf.store_text(data.decode())

        kf.load_file(f"sha1://{sha1_of(data)}", channel="lab", progress=store_it)
    assert [found.kind for found in CacheKeeper(store_dir).list()] == [Kind.ORIGINAL]


def test_what_does_not_fit_is_refused_before_it_is_sent(
        store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = ForeignNode("a" * 40, 2**60, b"")
    monkeypatch.setenv("KACHERY_DAEMON_PORT", str(node.port))
    monkeypatch.setenv("KACHERY_CLIENT_AUTH_CODE", "code")
    try:
        with pytest.raises(errors.DiskFull):
            kf.load_file(f"sha1://{'a' * 40}", channel="lab")
        assert len(node.bodies) == 1
    finally:
        node.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"


class SilentNode:
    """A node that answers probes, and reads with what it is told to send; each on a connection that stays open."""

    def __init__(self) -> None:
        self.says: queue.Queue[bytes] = queue.Queue()
        self.probes = threading.Semaphore(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def refuse(self) -> None:
        """Take no new connections; those that are there stay."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def close(self) -> None:
        with suppress(OSError):
            self.refuse()
        for _ in self._threads:
            self.says.put(b"")
        for thread in self._threads:
            thread.join()
        for caller in self._open:
            caller.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self._open.append(caller)
                self._threads.append(threading.Thread(target=self._serve, args=(caller,), daemon=True))
                self._threads[-1].start()

    def _serve(self, caller: socket.socket) -> None:
        if caller.recv(65536).startswith(b"GET /probe"):
            caller.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"nodeId": "n"}')
            self.probes.release()
            return
        with suppress(OSError):
            while said := self.says.get():
                caller.sendall(said)


@pytest.fixture
def silent(store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentNode]:
    node = SilentNode()
    for name, value in {"DAEMON_PORT": str(node.port), "CLIENT_AUTH_CODE": "code", "STALL_SECONDS": "0.2",
                        "PROVIDER_STALL_SECONDS": "0.3", "CONNECT_TIMEOUT_SECONDS": "0.5"}.items():
        monkeypatch.setenv(f"KACHERY_{name}", value)
    yield node
    node.close()


def read(channel: str = "lab") -> bytes:
    return kf.load_bytes(f"sha1://{'a' * 40}", channel=channel)


def test_a_read_waits_for_a_node_that_lives(silent: SilentNode) -> None:
    def answer_late() -> None:
        for _ in range(3):
            silent.probes.acquire()
        silent.says.put(HEAD + bytes(60))
        silent.says.put(bytes(40))

    thread = threading.Thread(target=answer_late)
    thread.start()
    assert read() == bytes(100)
    thread.join()


def test_a_read_ends_when_the_node_does_not_live_any_more(silent: SilentNode) -> None:
    def end() -> None:
        silent.probes.acquire()
        silent.refuse()

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(errors.NodeNotRunning):
        read()
    thread.join()


def test_a_read_that_is_silent_in_its_midst_for_too_long_is_broken_off(silent: SilentNode) -> None:
    silent.says.put(HEAD + bytes(60))
    with pytest.raises(errors.Stalled, match=r"0\.5 s"):
        read()


def test_a_node_that_was_stopped_in_its_tracks_is_noticed(node: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STALL_SECONDS", "CONNECT_TIMEOUT_SECONDS"):
        monkeypatch.setenv(f"KACHERY_{name}", "0.5")
    pid = node.json("node", "info")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(errors.Stalled):
            read()
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_system_watches_a_silent_connection(node: Program) -> None:
    with closing(NodeConnection(load_settings())._connect(10.0)) as connection:
        assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
        assert connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 5
