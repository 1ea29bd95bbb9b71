"""Work without a node: KACHERY_OFFLINE_STORAGE_DIR."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client.connection import NodeConnection
from kachery_fast.config import load_settings
from tests.cli.commands import Program

ABSENT = f"sha1://{'1' * 40}/absent.dat"


@pytest.fixture
def offline_dir(node: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that is used offline, while a node runs that must not be asked."""
    (tmp_path / "offline").mkdir()
    monkeypatch.setenv("KACHERY_OFFLINE_STORAGE_DIR", str(tmp_path / "offline"))
    return tmp_path / "offline"


def test_files_are_stored_and_loaded_in_the_offline_store(offline_dir: Path, node: Program, tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(b"0123456789")
    uri = kf.store_file(path)
    assert Path(kf.load_file(uri)).is_relative_to(offline_dir)
    assert kf.load_bytes(uri, 2, 4) == b"23"
    kf.set("a key", 5)
    assert kf.get("a key") == 5
    assert not [name for name in (node.storage_dir / "sha1").rglob("*") if name.is_file()]
    info = kf.info()
    assert (info["storageDir"], info["node"]) == (str(offline_dir), None)
    assert "KACHERY_OFFLINE_STORAGE_DIR" in info["nodeWhy"]


def test_what_needs_a_node_says_that_the_client_is_offline(offline_dir: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: kf.load_file(ABSENT), lambda: kf.load_file(ABSENT, channel="lab"),
        lambda: kf.load_bytes(ABSENT, 0, 1), lambda: kf.create_feed("a"), lambda: kf.why(ABSENT, channel="lab"),
        lambda: NodeConnection(load_settings()).stop(), lambda: NodeConnection(load_settings()).call("/x", {}),
    ]
    for call in calls:
        with pytest.raises(errors.ClientOffline, match="KACHERY_OFFLINE_STORAGE_DIR") as caught:
            call()
        assert str(offline_dir) in caught.value.message
    with pytest.raises(errors.NotInStore):
        kf.load_file(ABSENT, local_only=True)


def test_a_store_that_may_not_be_written_is_still_read(offline_dir: Path, tmp_path: Path) -> None:
    uri = kf.store_text("kept")
    (tmp_path / "b.dat").write_bytes(b"b")
    rooms = [offline_dir, offline_dir / "sha1", offline_dir / "tmp"]
    for room in rooms:
        room.chmod(0o555)
    try:
        assert kf.load_text(uri) == "kept"
        if os.geteuid() != 0:
            with pytest.raises(errors.DiskError, match="KACHERY_OFFLINE_STORAGE_DIR"):
                kf.store_file(tmp_path / "b.dat")
    finally:
        for room in rooms:
            room.chmod(0o755)


def test_commands_on_the_node_are_refused_and_leave_the_store_alone(tmp_path: Path) -> None:
    (tmp_path / "offline").mkdir()
    program = Program(tmp_path / "store", KACHERY_OFFLINE_STORAGE_DIR=str(tmp_path / "offline"))
    for arguments in (("start", "--detach"), ("join", "http://127.0.0.1:1/join/a"), ("leave", "lab"), ("stop",)):
        done = program.run("node", *arguments)
        assert (done.returncode, done.stdout) == (5, "")
        assert "KACHERY_OFFLINE_STORAGE_DIR" in done.stderr
    assert not list((tmp_path / "offline").iterdir())
    assert not (tmp_path / "store").exists()


def test_the_offline_store_is_absolute_and_a_call_comes_before_it(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    environ = {"KACHERY_OFFLINE_STORAGE_DIR": "here", "KACHERY_STORAGE_DIR": "/elsewhere"}
    assert load_settings(environ).storage_dir == tmp_path / "here"
    assert load_settings(environ, storage_dir="/third").storage_dir == Path("/third")


def test_a_store_that_is_not_there_is_an_error_and_not_made(program: Program, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a disk which is not mounted: else the files would land in the mount point."""
    offline = tmp_path / "disk" / "store"
    monkeypatch.setenv("KACHERY_OFFLINE_STORAGE_DIR", str(offline))
    program.env["KACHERY_OFFLINE_STORAGE_DIR"] = str(offline)
    (tmp_path / "a.dat").write_bytes(b"a")

    def all_fail() -> None:
        for call in (lambda: kf.store_file(tmp_path / "a.dat"), lambda: kf.load_file(ABSENT), lambda: kf.set("a", 1),
                     lambda: kf.store_text("a"), kf.info):
            with pytest.raises(errors.InvalidSetting, match=r"no such directory\. Is its disk mounted") as caught:
                call()
            assert str(offline) in caught.value.message
        assert not offline.exists()

    all_fail()
    done = program.run("store", str(tmp_path / "a.dat"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Is its disk mounted?" in done.stderr
    offline.mkdir(parents=True)
    assert Path(kf.load_file(kf.store_file(tmp_path / "a.dat"))).is_relative_to(offline)
    offline.rename(tmp_path / "elsewhere")  # in the middle of a program
    all_fail()
