"""What the node has in its own store: loaded without a channel, by clients that share its store and by others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import numpy
import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client import by_node
from kachery_fast.client.fs import KacheryFileSystem
from tests.cli.commands import Program

ABSENT = f"sha1://{'1' * 40}/absent.dat"
NOT_HERE = "/only/at/the/machine/of/the/node"


@pytest.fixture
def apart(node: Program, tmp_path: Path) -> Program:
    """A client of the node with another storage directory, and no channel."""
    return Program(tmp_path / "other", node.port)


@pytest.fixture
def mounted(node: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this process a client at another machine, and return where it has the store of the node: the same files,
    but what the links lead to is not there."""
    for name in ("recording.dat", "array.npy", "text.json"):
        path = tmp_path / name
        if name == "array.npy":
            numpy.save(path, numpy.arange(1000))
        else:
            path.write_bytes(json.dumps(["a text", name]).encode())
        node.ok("link", str(path))
    mount = tmp_path / "mount"
    shutil.copytree(node.storage_dir / "sha1", mount / "sha1")
    for name in ("kachery-node-id", "client-auth"):
        shutil.copy(node.storage_dir / name, mount / name)
    for link in mount.rglob("*.link"):
        record = json.loads(link.read_text())
        link.write_text(json.dumps({**record, "path": NOT_HERE + record["path"]}))
    monkeypatch.setenv("KACHERY_STORAGE_DIR", str(mount))
    return mount


def linked(node: Program, path: Path) -> str:
    return node.ok("link", str(path)).strip()


def kept(store_dir: Path) -> set[Path]:
    return {path for path in store_dir.rglob("*") if path.is_file() and len(path.name) == 40}


def test_what_the_node_has_needs_no_channel(node: Program, apart: Program, tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(b"0123456789")
    for command in ("store", "link"):
        uri = node.ok(command, str(path)).strip()
        assert apart.ok("cat", uri, "--start", "2", "--end", "4") == "23"
        assert Path(apart.ok("load", uri).strip()).read_bytes() == path.read_bytes()
        path.write_bytes(b"0123456789, linked")
        path = path.rename(tmp_path / "b.dat")


def test_what_it_does_not_have_needs_one(apart: Program) -> None:
    for command in ("load", "cat"):
        done = apart.run(command, ABSENT)
        assert done.returncode == errors.NoChannel.exit_code
        assert "KACHERY_CHANNEL" in done.stderr


def test_a_link_that_leads_nowhere_here_is_read_through_the_node(node: Program, mounted: Path, tmp_path: Path) -> None:
    path = tmp_path / "recording.dat"
    uri = linked(node, path)
    before = kept(mounted)
    with pytest.raises(errors.LinkInvalid):
        kf.load_file(uri, local_only=True)
    assert kf.load_bytes(uri, 3, 7) == path.read_bytes()[3:7]
    with pytest.raises(errors.FileElsewhere, match="load_bytes or cat") as caught:
        kf.load_file(uri)
    assert str(path) in str(caught.value)
    assert kf.load_json(linked(node, tmp_path / "text.json")) == ["a text", "text.json"]
    array = linked(node, tmp_path / "array.npy")
    assert kf.load_npy(array).sum() == sum(range(1000))
    with pytest.raises(errors.FileElsewhere):
        kf.load_npy(array, mmap_mode="r")
    KacheryFileSystem.clear_instance_cache()
    with fsspec.open(uri) as file:
        assert file.read() == path.read_bytes()
    assert kept(mounted) == before


def test_a_copy_of_such_a_link_goes_where_it_is_wanted_and_nowhere_else(
        node: Program, mounted: Path, tmp_path: Path) -> None:
    path, dest = tmp_path / "recording.dat", tmp_path / "copy.dat"
    uri = linked(node, path)
    before = kept(mounted)
    dest.write_bytes(b"before")
    told: list[kf.Progress] = []
    assert kf.load_file(uri, dest=dest, progress=told.append) == str(dest)
    assert dest.read_bytes() == path.read_bytes()
    assert told[-1].done_bytes == path.stat().st_size
    assert kept(mounted) == before


def test_a_link_that_the_node_does_not_find_either_says_so(node: Program, tmp_path: Path) -> None:
    path = tmp_path / "gone.dat"
    path.write_bytes(b"soon gone")
    uri = linked(node, path)
    path.unlink()
    for call in (lambda: kf.load_file(uri), lambda: kf.load_bytes(uri)):
        with pytest.raises(errors.LinkInvalid, match=r"gone\.dat"):
            call()


def test_what_the_node_has_just_written_is_looked_for_until_it_shows(
        node: Program, mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps in mind that a name was missing, until the directory is listed again."""
    path = tmp_path / "new.dat"
    path.write_bytes(b"just brought by the node")
    uri = node.ok("store", str(path)).strip()
    listed: list[Path] = []

    def list_it(directory: Path) -> object:
        listed.append(directory)
        if directory == mounted / "sha1":
            shutil.copytree(node.storage_dir / "sha1", directory, dirs_exist_ok=True)
        return scan(directory)

    scan = os.scandir
    monkeypatch.setattr(os, "scandir", list_it)
    loaded = kf.load(uri)
    assert Path(loaded.path).is_relative_to(mounted)
    assert Path(loaded.path).stat().st_ino != (node.storage_dir / Path(loaded.path).relative_to(mounted)).stat().st_ino
    assert listed
    assert not (mounted / "kachery-fast-cache.db").exists()  # found, not streamed


def test_what_never_shows_is_streamed(
        node: Program, mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hidden.dat"
    path.write_bytes(b"never shown")
    uri = node.ok("store", str(path)).strip()
    monkeypatch.setattr(by_node, "_SEEN_SECONDS", 0.0)
    monkeypatch.setattr(by_node, "_is_here", lambda *_: False)  # the disk of the node is not at hand
    assert Path(kf.load_file(uri)).read_bytes() == b"never shown"
