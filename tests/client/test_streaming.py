"""Files that come through the node's API, from a node whose store is not at hand, sound or not."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.store.eviction import CacheKeeper, Kind


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class ForeignNode:
    """A node on a disk that is not at hand, with one file, of which it sends ``sent``."""

    def __init__(self, sha1: str, size: int, sent: bytes) -> None:
        self.bodies: list[dict[str, Any]] = []
        node = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(json.dumps({"nodeId": "f" * 64, "kacheryStorageDir": "/no/such/directory"}).encode())

            def do_POST(self) -> None:
                node.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if self.path == "/api/read":
                    self._answer(sent)
                else:
                    self._answer(json.dumps({"type": "done", "path": f"/no/such/directory/{sha1}", "size": size,
                                             "sha1": sha1, "source": "channel", "seconds": 0.0}).encode())

            def _answer(self, data: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


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
