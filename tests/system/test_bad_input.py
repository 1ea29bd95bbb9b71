"""What users do wrong and what goes wrong around them: each has its exit code and its line, through real commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_fast.cli.lab import Lab, LabNode
from tests.native.disks import MIB, mounted
from tests.programs import need_root
from tests.system.support import QUICK, make_recording, objects, store, wait_until

ABSENT = "sha1://" + "ab" * 20


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ=QUICK) as lab:
        lab.start_hub()
        lab.add_node("A")
        yield lab


def refused(node: LabNode, code: int, *arguments: str) -> str:
    """Run a command that must fail with this exit code, nothing on its output, and one line, which is returned."""
    done = node.run(*arguments, timeout_seconds=90)
    assert (done.returncode, done.stdout) == (code, b""), done
    line = done.stderr.decode()
    assert re.fullmatch(r"Error: .+\n", line), line
    return line


def kept(node: LabNode) -> list[Path]:
    """Everything that the store holds or has begun."""
    return sorted(path for room in ("sha1", "tmp") for path in (node.storage_dir / room).rglob("*") if path.is_file())


# --- files that cannot be stored


def test_what_is_no_file_to_store(lab: Lab, tmp_path: Path) -> None:
    a, before = lab.nodes["A"], kept(lab.nodes["A"])
    (tmp_path / "plain").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    for command in ("store", "link"):
        assert "is a directory, not a regular file" in refused(a, 2, command, str(tmp_path))
        assert "named pipe" in refused(a, 2, command, str(tmp_path / "pipe"))
        assert "a device" in refused(a, 2, command, "/dev/null")
        assert "There is no file" in refused(a, 3, command, str(tmp_path / "absent"))
        below = tmp_path / "plain" / "below"
        assert str(below) in refused(a, 3, command, str(below))
    assert kept(a) == before


# The interpreter may be closed to others too, so everything is imported, by a first run, before the user changes.
AS_NOBODY = """
import contextlib, io, os, sys
from kachery_fast.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    with contextlib.redirect_stderr(io.StringIO()):
        main([sys.argv[1], "/dev/null"])
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
main(sys.argv[1:])
"""


def test_a_file_that_the_user_may_not_read(lab: Lab) -> None:
    need_root()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # pytest's directories are closed to others
        place = Path(name)
        place.chmod(0o755)
        secret = place / "secret.dat"
        secret.write_bytes(b"secret")
        secret.chmod(0o600)
        store_dir = place / "store"
        store_dir.mkdir()
        store_dir.chmod(0o777)
        environ = {**lab.environ, "KACHERY_STORAGE_DIR": str(store_dir)}
        for command in ("store", "link"):
            done = subprocess.run([sys.executable, "-c", AS_NOBODY, command, str(secret)], env=environ, text=True,
                                  capture_output=True, timeout=60, check=False, cwd="/")
            assert (done.returncode, done.stdout) == (7, ""), done
            assert re.fullmatch(rf"Error: {re.escape(str(secret))} cannot be read: Permission denied\. .+\n",
                                done.stderr)
        assert not [path for path in store_dir.rglob("*") if path.is_file()]


def test_a_file_that_is_written_to_meanwhile(lab: Lab, tmp_path: Path) -> None:
    a, before = lab.nodes["A"], kept(lab.nodes["A"])
    path = tmp_path / "growing.dat"
    with path.open("wb") as file:
        file.truncate(300 * MIB)
    done = threading.Event()

    def write() -> None:
        with path.open("r+b") as writer:
            position = 0
            while not done.is_set():
                writer.seek(position % (300 * MIB))
                writer.write(b"changed")
                writer.flush()
                position += MIB

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for command in ("store", "link"):
            line = refused(a, 6, command, str(path))
            assert f"{path} changed while it was read" in line
            assert "Nothing was stored" in line
    finally:
        done.set()
        thread.join()
    assert kept(a) == before


def test_a_disk_without_room_for_what_is_stored(lab: Lab, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "tmpfs", 6 * MIB) as small:
        crowded = LabNode(lab, "crowded", KACHERY_STORAGE_DIR=str(small / "storage"))
        crowded.storage_dir = small / "storage"
        large = make_recording(tmp_path / "large.dat", 8 * MIB, seed=20)
        line = refused(crowded, 7, "store", str(large))
        assert "No room for" in line
        assert str(8 * MIB) in line
        assert not kept(crowded)
        store(crowded, make_recording(tmp_path / "fits.dat", MIB, seed=21))


# --- loads that cannot be


def test_a_load_without_permission(lab: Lab, tmp_path: Path) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "x.dat", 100, seed=22))
    writer = lab.add_node("writer", permissions=["provideFiles"])
    try:
        for command in ("load", "cat"):
            line = refused(writer, 4, command, uri)
            assert "requestFiles" in line
            assert "channel grant demo" in line
    finally:
        writer.program.stop()


def test_a_channel_that_the_node_is_not_on(lab: Lab) -> None:
    for command in ("load", "cat", "why"):
        line = refused(lab.nodes["A"], 3, command, ABSENT, "--channel", "elsewhere")
        assert "is not on the channel 'elsewhere' (it is on: demo)" in line


def test_no_node_to_ask(lab: Lab) -> None:
    nobody = LabNode(lab, "nobody")
    for arguments in (["load", ABSENT], ["cat", ABSENT], ["why", ABSENT], ["node", "info"], ["node", "stop"]):
        assert "kachery-fast node start" in refused(nobody, 5, *arguments)


def test_a_hub_that_is_down(tmp_path: Path) -> None:
    with Lab(tmp_path, environ={**QUICK, "KACHERY_RETRY_ATTEMPTS_MAX": "2"}) as lab:
        lab.start_hub()
        node = lab.add_node("A")
        link = lab.invite()
        lab.hub.stop()
        wait_until(lambda: not node.connection.info()["hubs"][0]["reachable"], "the node has noticed")
        for command in ("load", "cat"):
            assert re.search("hub|bucket", refused(node, 5, command, ABSENT))
        assert lab.hub_url in refused(LabNode(lab, "new"), 5, "node", "join", link)


# --- a bucket that fails, and nobody else who has the file


def test_an_object_that_was_cut_off_in_the_bucket_is_not_taken_for_the_file(tmp_path: Path) -> None:
    environ = {**QUICK, "KACHERY_RETRY_ATTEMPTS_MAX": "2", "KACHERY_PATIENCE_SECONDS": "2"}
    with Lab(tmp_path, environ=environ) as lab:
        lab.start_hub()
        a = lab.add_node("A")
        uri = store(a, make_recording(tmp_path / "x.dat", 1000, seed=23))
        lab.add_node("B").json("load", uri)
        reader = lab.add_node("reader", permissions=["requestFiles"])
        a.program.stop()
        lab.nodes["B"].program.stop()
        [victim] = objects(lab.bucket_dir)
        victim.write_bytes(victim.read_bytes()[:500])
        line = refused(reader, 3, "load", uri)
        assert uri in line
        assert "no answer from A (" in line
        assert not victim.exists()  # so that whoever has the file can bring it anew
        assert not kept(reader)
