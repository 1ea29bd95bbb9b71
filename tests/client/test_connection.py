"""The way to the node: a real one, one that is stopped, and peers that are no node at all."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client import storing
from kachery_fast.client.access import ClientCode
from kachery_fast.client.connection import NodeConnection
from kachery_fast.config import load_settings
from tests.cli.commands import Program, environment, free_port
from tests.programs import need_root

ABSENT = "sha1://" + "0" * 40


def connection() -> NodeConnection:
    return NodeConnection(load_settings())


# --- a node


def test_a_node_tells_who_it_is(node: Program) -> None:
    found = connection().probe()
    assert found["kacheryStorageDir"] == str(node.storage_dir)
    assert found["nodeId"] == (node.storage_dir / "kachery-node-id").read_text().strip()
    assert connection().is_running()
    info = kf.info()["node"]
    assert (info["nodeId"], info["hubs"], info["transfers"]) == (found["nodeId"], [], [])


def test_errors_of_the_node_arrive_as_they_are(node: Program) -> None:
    with pytest.raises(errors.ChannelUnknown, match="it is on: none"):
        kf.load_file(ABSENT, channel="lab")
    with pytest.raises(errors.ChannelUnknown):
        kf.load_bytes(ABSENT, 0, 10, channel="lab")
    with pytest.raises(errors.InvalidUri):
        connection().load("nonsense", None)


def test_the_node_loads_and_reads_what_its_store_has(node: Program, tmp_path: Path) -> None:
    data = hashlib.shake_128(b"node").digest(3_000_000)
    (tmp_path / "x.dat").write_bytes(data)
    uri = kf.store_file(tmp_path / "x.dat")
    done = connection().load(uri, None)
    assert (done["size"], done["source"]) == (len(data), "store")
    with connection().read(uri, None, 5, 2_000_000) as answer:
        pieces = list(iter(lambda: answer.read(300_000), b""))
    assert b"".join(pieces) == data[5:2_000_000]
    assert "in the local store" in kf.why(uri)["verdict"]


def test_bytes_are_stored_through_the_node(node: Program) -> None:
    pieces = [os.urandom(1_000_000) for _ in range(3)]
    answer = connection().store(lambda: iter(pieces), 3_000_000)
    assert answer["sha1"] == hashlib.sha1(b"".join(pieces)).hexdigest()
    assert kf.load_bytes(answer["sha1"]) == b"".join(pieces)


@pytest.mark.parametrize("size", [1000, 30_000_000])
@pytest.mark.parametrize("change", ["written", "appended", "replaced"])
def test_a_file_that_changes_while_it_goes_to_the_node_is_not_stored(
        node: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, change: str) -> None:
    monkeypatch.setattr(storing, "may_write", lambda _: False)
    path = tmp_path / "changing.dat"
    path.write_bytes(os.urandom(size))
    checked: list[int] = []
    read = os.pread

    def changing(fd: int, length: int, position: int) -> bytes:
        data = read(fd, length, position)
        if not checked:
            checked.append(position)
            if change == "replaced":
                path.rename(tmp_path / "old")
                path.write_bytes(b"new")
            else:
                with path.open("r+b") as writer:
                    writer.seek(0 if change == "written" else size)
                    writer.write(b"changed")
        return data

    before = files_of(node)
    monkeypatch.setattr(os, "pread", changing)
    with pytest.raises(errors.FileChanged, match="Nothing was stored"):
        kf.store_file(path)
    assert checked == [0]
    end = time.monotonic() + 20
    while [*(node.storage_dir / "tmp").glob("*")]:  # the node throws away what it has got
        assert time.monotonic() < end
        time.sleep(0.02)
    assert files_of(node) == before


def files_of(node: Program) -> list[Path]:
    return sorted(path for path in (node.storage_dir / "sha1").rglob("*") if path.is_file())


@pytest.mark.parametrize("size", [0, 1, 20_000_000])
def test_a_file_goes_to_the_node_whole(
        node: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(storing, "may_write", lambda _: False)
    path = tmp_path / "whole.dat"
    path.write_bytes(os.urandom(size))
    assert Path(kf.load_file(kf.store_file(path))).read_bytes() == path.read_bytes()


def test_a_stopped_node_is_said_to_be_stopped(program: Program) -> None:
    with program.node():
        assert connection().is_running()
        connection().stop()
        end = time.monotonic() + 20
        while connection().is_running():
            assert time.monotonic() < end
            time.sleep(0.02)
    with pytest.raises(errors.NodeNotRunning, match="kachery-fast node start"):
        connection().info()
    with pytest.raises(errors.NodeNotRunning):
        kf.load_file(ABSENT, channel="lab")


def has_address(host: str) -> bool:
    """Whether one may listen at this address of loopback: Linux has all of 127/8, macOS one; IPv6 may be off."""
    try:
        with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(("host", "url"), [("127.0.0.2", "127.0.0.2"), ("::1", "[::1]"), ("[::1]", "[::1]"),
                                           ("localhost", "localhost")])
def test_node_client_and_command_line_meet_at_the_chosen_host(
        program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    if not has_address(host.strip("[]")):
        pytest.skip(f"this system has no address {host}")
    program.env["KACHERY_DAEMON_HOST"] = host
    monkeypatch.setenv("KACHERY_DAEMON_HOST", host)
    with program.node() as started:
        assert started["url"] == connection().url == f"http://{url}:{program.port}"
        assert kf.info()["node"]["pid"] == program.json("node", "info")["pid"] == started["pid"]
        assert connection().store(lambda: [b"here"], 4)["sha1"] == hashlib.sha1(b"here").hexdigest()
        with pytest.raises(errors.ChannelUnknown):
            kf.load_file(ABSENT, channel="lab")
        assert program.run("load", ABSENT, "--channel", "lab").returncode == 3
        if host != "localhost":  # and nowhere else
            monkeypatch.setenv("KACHERY_DAEMON_HOST", "127.0.0.1")
            assert not connection().is_running()
    program.env["KACHERY_DAEMON_HOST"] = host
    done = program.run("node", "info")
    assert done.returncode == 5
    assert f"http://{url}:{program.port}" in done.stderr


@pytest.mark.parametrize(("name", "value"), [
    ("KACHERY_DAEMON_HOST", "bad host"), ("KACHERY_DAEMON_HOST", "a..b"), ("KACHERY_DAEMON_PORT", "65536"),
    ("KACHERY_CONNECT_TIMEOUT_SECONDS", "inf"), ("KACHERY_STALL_SECONDS", "1e300"),
])
def test_an_address_or_time_that_cannot_be_is_a_usage_error(program: Program, name: str, value: str) -> None:
    program.env[name] = value
    for arguments in (["node", "info"], ["info"], ["load", ABSENT, "--channel", "lab"], ["node", "start"]):
        done = program.run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert done.stderr.startswith(f"Error: The setting {name.removeprefix('KACHERY_').lower()} "
                                      .replace("daemon", "node"))
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("host", ["bad host", "a..b", "x" * 64])
def test_no_host_makes_a_connection_fail_otherwise(store_dir: Path, host: str) -> None:
    settings = dataclasses.replace(load_settings(), node_host=host)
    with pytest.raises(errors.NodeNotRunning, match="not the name of a host"):
        NodeConnection(settings).probe()
    assert not NodeConnection(settings).is_running()


# --- the code


def test_a_wrong_code_is_refused(node: Program) -> None:
    (node.storage_dir / "client-auth").write_text("wrongwrongwr")
    with pytest.raises(errors.ClientAuthRefused, match="client-auth"):
        connection().info()


def test_a_code_that_changes_meanwhile_is_read_again(node: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (node.storage_dir / "client-auth").read_text()
    codes = iter(["outdatedcode", code])
    monkeypatch.setattr(ClientCode, "read", lambda _: next(codes))
    data = b"twice"
    sent: list[bytes] = []

    def body() -> list[bytes]:
        sent.append(data)
        return [data]

    answer = connection().store(body, len(data))
    assert answer["sha1"] == hashlib.sha1(data).hexdigest()
    assert sent == [data, data]


def test_a_code_that_appears_while_it_is_missed_is_read(node: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = NodeConnection(load_settings())
    path = load_settings().storage_dir / "client-auth"
    code = path.read_text(encoding="ascii")
    path.unlink()
    probe = connection.probe

    def begun() -> dict[str, Any]:
        path.write_text(code, encoding="ascii")
        return probe()

    monkeypatch.setattr(connection, "probe", begun)
    try:
        assert "feeds" in connection.call("/api/feed/list", {})
    finally:
        path.write_text(code, encoding="ascii")


def test_another_storage_directory_is_pointed_out(
        node: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_STORAGE_DIR", str(tmp_path / "other"))
    with pytest.raises(errors.ClientAuthRefused, match=f"set KACHERY_STORAGE_DIR to that.*{tmp_path}/other"):
        connection().info()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"two words\r\nX-Header: 1"])
def test_a_file_without_a_code_is_refused(node: Program, content: bytes) -> None:
    (node.storage_dir / "client-auth").write_bytes(content)
    with pytest.raises(errors.ClientAuthRefused, match="code"):
        connection().info()


# Imports everything as root, then acts as a user who may read the store but not write it, nor read the code.
AS_NOBODY = """
import os, sys
import kachery_fast as kf
import encodings.ascii, encodings.idna, fcntl
import kachery_fast.client.formats, kachery_fast.client.connection, kachery_fast.errors
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
for act in (lambda: kf.load_text(sys.argv[1]), lambda: kf.store_text("other"), lambda: kf.info()["nodeWhy"]):
    try:
        print(act())
    except kf.KacheryError as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def shared_dir() -> Iterator[Path]:
    """A directory that others may reach: those of pytest are closed to them."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(program: Program, uri: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, uri], env=program.env, capture_output=True, text=True,
                          timeout=60, check=False, umask=0o022)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_user_without_permission_reads_but_is_told_what_else_is_needed(shared_dir: Path) -> None:
    need_root()
    program = Program(shared_dir / "store")
    (shared_dir / "t.txt").write_text("readable")
    uri = program.ok("store", str(shared_dir / "t.txt")).strip()
    loaded, stored, _ = as_nobody(program, uri)
    assert loaded == "readable"
    assert stored.startswith("NodeNotRunning")
    assert "because you may not write" in stored
    with program.node():
        loaded, stored, state = as_nobody(program, uri)
    assert loaded == "readable"
    for text in (stored, state):
        assert "must be able to read" in text
        assert str(shared_dir / "store" / "client-auth") in text


def test_who_may_read_the_code_stores_through_the_node(shared_dir: Path) -> None:
    need_root()
    program = Program(shared_dir / "store")
    (shared_dir / "t.txt").write_text("readable")
    uri = program.ok("store", str(shared_dir / "t.txt")).strip()
    with program.node():
        (shared_dir / "store" / "client-auth").chmod(0o644)
        _, stored, _ = as_nobody(program, uri)
        assert stored == f"sha1://{hashlib.sha1(b'other').hexdigest()}/file.txt"
        path = program.ok("load", stored).strip()
    assert Path(path).stat().st_uid == 0


# --- peers that are no node, or a broken one


@contextmanager
def peer(answer: bytes, monkeypatch: pytest.MonkeyPatch, *, hold: bool = False) -> Iterator[None]:
    """A listener at the node's address that answers every connection with these bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("KACHERY_DAEMON_PORT", str(listener.getsockname()[1]))
        storage_dir = load_settings().storage_dir
        storage_dir.mkdir(exist_ok=True)
        (storage_dir / "client-auth").write_text("abcdefghijkl")
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                caller.recv(65536)
                caller.sendall(answer)
                if hold:
                    held.append(caller)
                else:
                    caller.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for caller in held:
                caller.close()


def reply(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + body


@pytest.mark.usefixtures("store_dir")
@pytest.mark.parametrize(("answer", "kind"), [
    (b"", errors.NodeNotRunning),
    (b"SSH-2.0-OpenSSH_9.2\r\n", errors.NodeError),
    (reply(b"<html>"), errors.NodeError),
    (reply(b"[1]"), errors.NodeError),
    (reply(b'{"type":"done"', length=100), errors.NodeError),
    (reply(b'{"type":"progress","received":1,"total":2,"waiting":"x"}\n'), errors.NodeError),
    (reply(b"no such page", "404 Not Found"), errors.NodeError),
    (reply(b'{"error":"SomethingNew","message":"of tomorrow"}', "400 Bad Request"), errors.NodeError),
    (reply(b'{"error":"NotAvailable","details":{"uri":"u"}}', "404 Not Found"), errors.NotAvailable),
    (reply(b'{"type":"error","error":"DiskFull","details":{"path":"/x"}}\n'), errors.DiskFull),
])
def test_answers_that_make_no_sense_are_errors(
        answer: bytes, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    with peer(answer, monkeypatch), pytest.raises(kind) as caught:
        kf.load_file(ABSENT, channel="lab")
    assert type(caught.value) is kind


@pytest.mark.usefixtures("store_dir")
def test_bytes_that_break_off_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with peer(reply(b"12345", length=10), monkeypatch), pytest.raises(errors.NodeError, match="broke off"):
        kf.load_bytes(ABSENT, 0, 10, channel="lab")
    with peer(reply(b"12345"), monkeypatch), pytest.raises(errors.InvalidArgument, match="not within"):
        kf.load_bytes(ABSENT, 0, 10, channel="lab")


@pytest.mark.usefixtures("store_dir")
def test_a_node_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_STALL_SECONDS", "0.2")
    told: list[kf.Progress] = []
    line = b'{"type":"progress","received":1,"total":2,"waiting":"asking"}\n'
    with peer(reply(line, length=1000), monkeypatch, hold=True), pytest.raises(errors.Stalled, match=r"0\.2 s"):
        kf.load_file(ABSENT, channel="lab", progress=told.append)
    assert told == [kf.Progress(1, 2, "asking")]


@pytest.mark.usefixtures("store_dir")
def test_what_a_callback_raises_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or a closed pipe behind a callback must not look like a fault of the node."""
    def fail(_: kf.Progress) -> None:
        raise BrokenPipeError

    with peer(reply(b'{"type":"progress"}\n'), monkeypatch), pytest.raises(BrokenPipeError):
        kf.load_file(ABSENT, channel="lab", progress=fail)


def test_a_client_does_not_wait_for_an_address_that_is_not_there(store_dir: Path) -> None:
    port = free_port()
    assert not NodeConnection(load_settings(environment(store_dir, port))).is_running()
