"""Where a client stores: in the directory of its settings, in the node's, or through the node."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client import place
from kachery_fast.client.place import PlaceKind, find_place, is_this_machine
from kachery_fast.config import load_settings
from tests.cli.commands import Program
from tests.http_server import Handler, HttpServer

NODE_ID = "e" * 64


class ProbedNode:
    """What answers a probe as a node does, and counts the requests."""

    def __init__(self, storage_dir: Path) -> None:
        self.requests: list[str] = []
        node = self

        class Requests(Handler):
            def get(self) -> None:
                node.requests.append(self.path)
                self.answer({"nodeId": NODE_ID, "kacheryStorageDir": str(storage_dir)})

        self._server = HttpServer(Requests)
        self.port = self._server.port
        self.close = self._server.close


@pytest.fixture
def probed(store_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProbedNode]:
    """Such a node, with a storage directory ``node`` on this machine that has its id and code."""
    directory = tmp_path / "node"
    directory.mkdir()
    (directory / "kachery-node-id").write_text(NODE_ID)
    (directory / "client-auth").write_text("code")
    node = ProbedNode(directory)
    monkeypatch.setenv("KACHERY_DAEMON_PORT", str(node.port))
    yield node
    node.close()


def user(node: Program, tmp_path: Path, **more: str) -> Program:
    """Somebody at the node's machine who has only been told its port."""
    program = Program(tmp_path / "unused", node.port, HOME=str(tmp_path / "home"), **more)
    del program.env["KACHERY_STORAGE_DIR"]
    return program


def test_without_a_directory_that_of_the_node_is_used(node: Program, tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(b"recorded by somebody")
    somebody = user(node, tmp_path)
    uri = somebody.ok("store", str(tmp_path / "a.dat")).strip()
    assert Path(kf.load_file(uri)).is_relative_to(node.storage_dir)
    assert somebody.ok("cat", uri) == "recorded by somebody"
    kf.set("last", uri)
    assert somebody.json("mutable", "get", "last") == uri
    (tmp_path / "b.dat").write_bytes(b"linked by somebody")
    linked = somebody.ok("link", str(tmp_path / "b.dat")).strip()
    assert kf.load_bytes(linked) == b"linked by somebody"
    info = somebody.json("info")
    assert (info["place"], info["storageDir"]) == ("shared", str(node.storage_dir))
    assert uri.partition("/a.dat")[0] in somebody.ok("ls")
    assert f"Files are stored in {node.storage_dir}, the store of the node, as" in somebody.ok("info")
    assert somebody.json("node", "info")["nodeId"] == info["node"]["nodeId"]
    assert not (tmp_path / "home").exists()


def test_what_lies_in_the_directory_that_was_used_without_the_node_is_still_found(
        node: Program, tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(b"from before there was a node")
    somebody = user(node, tmp_path)
    own = tmp_path / "home" / "kachery-storage"
    own.mkdir(parents=True)
    somebody.env["KACHERY_OFFLINE_STORAGE_DIR"] = str(own)
    uri = somebody.ok("store", str(tmp_path / "a.dat")).strip()
    del somebody.env["KACHERY_OFFLINE_STORAGE_DIR"]
    assert somebody.ok("cat", uri) == "from before there was a node"


def test_a_directory_of_its_own_beside_the_node_is_stored_past(node: Program, tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(b"recorded")
    apart = Program(tmp_path / "other", node.port)
    uri = apart.ok("store", str(tmp_path / "a.dat")).strip()
    assert Path(kf.load_file(uri)).is_relative_to(node.storage_dir)
    assert apart.ok("cat", uri, "--channel", "lab") == "recorded"
    assert apart.json("info")["place"] == "apart"
    assert "CannotLink" in apart.run("link", str(tmp_path / "a.dat"), "--json").stdout


def test_the_node_is_asked_once_and_not_for_each_file(probed: ProbedNode, store_dir: Path) -> None:
    store_dir.mkdir()
    (store_dir / "kachery-node-id").write_text(NODE_ID)
    for number in range(5):
        kf.store_text(f"text {number}")
        kf.set("number", number)
    assert kf.get("number") == 4
    assert probed.requests == ["/probe"]
    assert find_place().kind is PlaceKind.SHARED


def test_without_a_node_the_local_directory_is_used(store_dir: Path) -> None:
    uri = kf.store_text("alone")
    assert Path(kf.load_file(uri)).is_relative_to(store_dir)
    found = kf.info()
    assert found["place"] == "alone"
    assert "no node answers" in found["storesWhere"]


def test_a_node_that_has_begun_is_noticed(probed: ProbedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    port = probed.port
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("KACHERY_DAEMON_PORT", str(closed.getsockname()[1]))
    assert find_place().kind is PlaceKind.ALONE
    kept = place._kept
    assert kept is not None
    assert kept[2] < float("inf")
    monkeypatch.setenv("KACHERY_DAEMON_PORT", str(port))
    assert find_place().kind is PlaceKind.APART
    assert place._kept is not None
    assert place._kept[2] == float("inf")


def test_the_node_of_somebody_else_changes_nothing(probed: ProbedNode, tmp_path: Path, store_dir: Path) -> None:
    """Of a shared machine: at the port that nobody had to name is the node of a user whose code is not for us."""
    (tmp_path / "node" / "client-auth").unlink()
    settings = load_settings()
    for has_directory in (False, True):
        found = place._decide(settings, has_directory, has_node=False)
        assert (found.kind, found.settings.storage_dir) == (PlaceKind.ALONE, store_dir)
        assert "no code" in found.text
    assert place._decide(settings, has_directory=False, has_node=True).kind is PlaceKind.APART


def test_a_directory_with_another_id_is_not_taken_for_the_node_s(
        probed: ProbedNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_CLIENT_AUTH_CODE", "code")
    (tmp_path / "node" / "kachery-node-id").write_text("d" * 64)
    assert place._decide(load_settings(), has_directory=False, has_node=True).kind is PlaceKind.APART


def test_addresses_of_this_machine_are_known() -> None:
    own = [address.address for addresses in psutil.net_if_addrs().values() for address in addresses
           if address.family == socket.AF_INET]
    for host in ("127.0.0.1", "127.0.0.2", "localhost", "0.0.0.0", *own):
        assert is_this_machine(host), host
    for host in ("192.0.2.1", "no-such-host.invalid"):
        assert not is_this_machine(host), host


def test_what_a_node_of_another_machine_keeps_in_databases_is_left_to_it(tmp_path: Path) -> None:
    """Also while it does not answer: nobody knows then whose a directory is in which a node has been."""
    program = Program(tmp_path / "store", KACHERY_DAEMON_HOST="192.0.2.1", KACHERY_CONNECT_TIMEOUT_SECONDS="0.1")
    (tmp_path / "a.dat").write_bytes(b"stored")
    uri = program.ok("store", str(tmp_path / "a.dat")).strip()
    assert program.json("pin", uri)[0]["pinned"]  # a directory of its own
    (tmp_path / "store" / "kachery-node-id").write_text(NODE_ID)
    (tmp_path / "old" / "sha1").mkdir(parents=True)
    for arguments in (["pin", uri], ["unpin", uri], ["gc", "--to", "0"], ["import", str(tmp_path / "old")]):
        done = program.run(*arguments)
        assert done.returncode
        assert "192.0.2.1" in done.stderr
    assert "on 192.0.2.1" in program.run("ls").stderr
    assert program.run("mutable", "set", "key", "value").returncode == errors.NodeNotRunning.exit_code
    assert program.ok("store", str(tmp_path / "a.dat")).strip() == uri
