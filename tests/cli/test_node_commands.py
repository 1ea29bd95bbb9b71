"""node start, info, join, leave, stop, and info, with a real node and no hub."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.cli.node import _node_lines
from kachery_fast.store.takeover_marker import MARKER_NAME
from tests.cli.commands import PROGRAM, Program
from tests.http_server import Handler, HttpServer
from tests.store.legacy_directory import OTHER_SEED, append, legacy_directory


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path / "store")


def test_a_node_starts_in_the_background_and_stops(program: Program) -> None:
    text = program.ok("node", "start", "--detach", "--label", "alice")
    try:
        assert str(program.port) in text
        found = program.json("node", "info")
        assert (found["label"], found["storageDir"]) == ("alice", str(program.storage_dir))
        assert found["hubs"] == []
        assert "node join LINK" in program.ok("node", "info")
        whole = program.json("info")
        assert whole["node"]["nodeId"] == found["nodeId"]
        assert whole["nodeWhy"] is None
        assert found["nodeId"] in program.ok("info")
        again = program.run("node", "start", "--detach")
        assert again.returncode == 9
        assert "exists already" in again.stderr
    finally:
        stopped = program.json("node", "stop")
    assert stopped == {"stopped": True, "pid": found["pid"]}
    assert program.run("node", "stop").returncode == 5
    log = (program.storage_dir / "node.log").read_text()
    assert found["nodeId"] in log
    assert "Traceback" not in log
    # The label is remembered.
    with program.node() as started:
        assert program.json("node", "info")["label"] == "alice"
        assert started["nodeId"] == found["nodeId"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_in_the_foreground_ends_by_a_signal(program: Program, number: signal.Signals) -> None:
    process = subprocess.Popen([*PROGRAM, "node", "start"], env=program.env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while program.run("node", "info").returncode:
        assert time.monotonic() < end
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in err
    assert program.run("node", "info").returncode == 5


def test_a_signal_ends_a_take_over_and_the_next_start_goes_on_with_it(program: Program, tmp_path: Path) -> None:
    old = legacy_directory(program.storage_dir, tmp_path / "elsewhere", large_size_bytes=10)
    append(old.root, [{"i": number} for number in range(6000)], seed=OTHER_SEED, subfeed="b" * 40)
    process = subprocess.Popen([*PROGRAM, "node", "start"], env=program.env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "every signature is checked" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "The next start goes on with it" in err
    assert "taken over from 2022" not in err
    assert not (old.root / MARKER_NAME).exists()
    with program.node():
        assert (old.root / MARKER_NAME).exists()
        assert "taken over from 2022: " in (old.root / "node.log").read_text()


def test_a_relative_storage_directory_is_the_same_for_the_node(program: Program, tmp_path: Path) -> None:
    program.env["KACHERY_STORAGE_DIR"] = "store"
    done = program.run("node", "start", "--detach", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    try:
        assert program.storage_dir.is_dir()
    finally:
        assert program.run("node", "stop", cwd=tmp_path).returncode == 0


def test_a_node_that_cannot_start_says_why(program: Program) -> None:
    program.storage_dir.mkdir()
    (program.storage_dir / "private.pem").write_text("nonsense")
    (program.storage_dir / "private.pem").chmod(0o600)
    for arguments in (["node", "start"], ["node", "start", "--detach"]):
        done = program.run(*arguments)
        assert done.returncode == 1
        assert "private.pem" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_port_in_use_is_an_error(program: Program) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        program.env["KACHERY_DAEMON_PORT"] = str(other.getsockname()[1])
        program.env["KACHERY_CONNECT_TIMEOUT_SECONDS"] = "0.3"
        done = program.run("node", "start")
    assert done.returncode == 1
    assert "KACHERY_DAEMON_PORT" in done.stderr


def test_without_a_hub_nothing_is_joined_or_left(program: Program) -> None:
    for link, code in (("nonsense", 2), ("http://127.0.0.1:9/join/abc", 5)):
        done = program.run("node", "join", link)
        assert done.returncode == code, done
        assert re.fullmatch(r"Error: .+\n", done.stderr)
    assert program.run("node", "leave", "lab").returncode == 3


@contextmanager
def slow_node(port: int) -> Iterator[None]:
    """A node at this port that answers a probe, and nothing else in time."""
    released = threading.Event()

    class Requests(Handler):
        def get(self) -> None:
            self.answer({"success": True})

        def post(self) -> None:
            released.wait(60)

    server = HttpServer(Requests, port)
    try:
        yield
    finally:
        released.set()
        server.close()


def test_joining_succeeds_also_when_the_node_is_slow_to_take_it_up(tmp_path: Path) -> None:
    # Of the hub nobody is to think that it stalls, so this is longer than it takes on a busy machine.
    with Lab(tmp_path, environ={"KACHERY_STALL_SECONDS": "2"}) as lab:
        lab.start_hub()
        node = LabNode(lab, "slow")
        link = lab.invite()
        node.storage_dir.mkdir(parents=True, exist_ok=True)
        (node.storage_dir / "client-auth").write_text("abcdefghijkl")
        with slow_node(node.port):
            done = node.run("node", "join", link)
            assert (done.returncode, done.stderr) == (0, b"")
            told, note = done.stdout.decode().splitlines()
            assert told.startswith("This node is on the channel demo of lab@localhost")
            assert "may not have taken that up yet" in note
            assert "stalled" in note
            found = node.json("node", "join", lab.invite())
            assert (found["channel"], found["running"]) == ("demo", True)
            assert "stalled" in found["note"]
            found = node.json("node", "leave", "demo")
            assert (found["channel"], found["running"]) == ("demo", True)
            assert "stalled" in found["note"]
        done = node.run("node", "join", lab.invite())
        assert "Start the node with" in done.stdout.decode()


def test_a_node_is_described_for_people() -> None:
    state = {
        "label": "", "pid": 7, "nodeId": "ab" * 32,
        "hubs": [
            {"url": "http://a", "reachable": False, "why": "refused", "channels": []},
            {"url": "http://b", "reachable": True, "channels": [
                {"name": "lab", "permissions": ["requestFiles"], "connected": True,
                 "members": [{"label": "alice", "node": "cd" * 32}, {"label": "", "node": "ef" * 32}]},
                {"name": "new", "permissions": [], "connected": False, "why": "no token", "members": []}]}],
        "transfers": [{"uri": "sha1://x", "received": 5_000_000, "total": 10_000_000, "waiting": "alice"},
                      {"uri": "sha1://y", "received": 0, "total": None, "waiting": ""}],
    }
    assert _node_lines(state) == [
        "Node: without a label, process 7",
        f"  id {'ab' * 32}",
        "  Hub http://a, not reachable: refused",
        "  Hub http://b",
        "    channel lab: may requestFiles",
        "      nodes: alice, efefefefef",
        "    channel new: may do nothing yet, not connected: no token",
        "  Loading sha1://x: 5.0 MB of 10.0 MB, alice",
        "  Loading sha1://y: 0 bytes",
    ]
    assert os.path.sep not in _node_lines(state)[0]
