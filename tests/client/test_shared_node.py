"""One node for several machines: other paths of one mounted store, no mount at all, lasting codes, a group."""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.client import mutables, place
from kachery_fast.client.connection import NodeConnection
from kachery_fast.client.running import encode_result
from kachery_fast.config import load_settings
from kachery_fast.node.identity import ClientAuth
from kachery_fast.store.eviction import CacheKeeper, Kind
from kachery_fast.store.mutables import ADMITTED_KEY
from tests.system.support import CHUNK_SIZE_BYTES, QUICK, load, make_recording, store

NODE_HOST = "127.0.0.2"  # another address than that which clients and nodes take without being told


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ=QUICK) as lab:
        lab.start_hub()
        lab.add_node("A")
        lab.add_node("B", KACHERY_DAEMON_HOST=NODE_HOST)
        yield lab


def enter(lab: Lab, node: LabNode, storage_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process a client at another machine, whose local store is ``storage_dir``."""
    for name, value in {**QUICK, "KACHERY_DAEMON_HOST": NODE_HOST, "KACHERY_DAEMON_PORT": str(node.port),
                        "KACHERY_CHANNEL": lab.channel, "KACHERY_STORAGE_DIR": str(storage_dir)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(place, "is_this_machine", lambda host: host != NODE_HOST)  # every test's node is on this one


def admit(node: LabNode, *codes: str) -> None:
    """Do as the owner of a node does, on its machine."""
    node.json("mutable", "set", "--parse", json.dumps(ADMITTED_KEY), json.dumps(codes))


def wait_for_admission() -> None:
    time.sleep(3.1)  # the node keeps what it has read for three seconds


def test_a_store_that_is_mounted_at_another_path_is_read_from_there(
        lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_recording(tmp_path / "a.dat", 3 * CHUNK_SIZE_BYTES + 1, seed=41)
    uri = store(lab.nodes["A"], path)
    node = lab.nodes["B"]
    mount = tmp_path / "mount"
    mount.symlink_to(node.storage_dir)
    enter(lab, node, mount, monkeypatch)
    loaded = kf.load(uri)
    assert Path(loaded.path).is_relative_to(mount)
    assert Path(loaded.path).read_bytes() == path.read_bytes()
    assert loaded.source == "channel"


def test_without_the_mount_an_admitted_code_lets_in_and_the_file_is_streamed(
        lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_recording(tmp_path / "b.dat", 3 * CHUNK_SIZE_BYTES + 1, seed=42)
    uri = store(lab.nodes["A"], path)
    node, own = lab.nodes["B"], tmp_path / "own"
    code = secrets.token_hex(16)
    enter(lab, node, own, monkeypatch)
    with pytest.raises(errors.ClientAuthRefused, match="KACHERY_CLIENT_AUTH_CODE"):
        kf.load_file(uri)
    monkeypatch.setenv("KACHERY_CLIENT_AUTH_CODE", code)
    with pytest.raises(errors.ClientAuthRefused):
        NodeConnection(load_settings()).info()
    admit(node, "another", code)
    wait_for_admission()
    assert kf.load_bytes(uri, 5, 9) == path.read_bytes()[5:9]
    monkeypatch.setattr("kachery_fast.client.by_node._is_here", lambda *_: False)  # the disk of the node is elsewhere
    loaded = kf.load(uri)
    assert Path(loaded.path).is_relative_to(own)
    assert Path(loaded.path).read_bytes() == path.read_bytes()
    connection = NodeConnection(load_settings())
    for call, body in (("get", {"key": ADMITTED_KEY}), ("delete", {"key": ADMITTED_KEY}),
                       ("set", {"key": ADMITTED_KEY, "value": ["x"]})):
        with pytest.raises(errors.ClientAuthRefused, match="owner"):
            connection.call(f"/api/mutable/{call}", body)
    assert ADMITTED_KEY not in str(connection.call("/api/mutable/list", {}))
    admit(node)
    wait_for_admission()
    with pytest.raises(errors.ClientAuthRefused):
        NodeConnection(load_settings()).info()


def test_the_file_with_the_code_may_be_named(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = lab.nodes["B"]
    enter(lab, node, tmp_path / "own", monkeypatch)
    monkeypatch.setenv("KACHERY_CLIENT_AUTH_FILE", str(node.storage_dir / "client-auth"))
    assert NodeConnection(load_settings()).info()["storageDir"] == str(node.storage_dir)
    monkeypatch.setenv("KACHERY_CLIENT_AUTH_FILE", str(tmp_path / "none"))
    with pytest.raises(errors.ClientAuthRefused, match=str(tmp_path / "none")):
        NodeConnection(load_settings()).info()


def test_the_code_is_handed_to_the_group(tmp_path: Path) -> None:
    auth = ClientAuth(tmp_path, group=str(os.getgid()))
    auth.rotate()
    found = auth.path.stat()
    assert (found.st_gid, found.st_mode & 0o777) == (os.getgid(), 0o640)
    with pytest.raises(errors.NodeError, match="there is no group 'no-such-group'"):
        ClientAuth(tmp_path, group="no-such-group").rotate()


@pytest.mark.parametrize("number", ["4294967295", "99999999999", "9" * 5000])
def test_a_number_that_no_group_has_is_refused(tmp_path: Path, number: str) -> None:
    auth = ClientAuth(tmp_path, group=number)
    with pytest.raises(errors.InvalidSetting, match=r"client_auth_group = .*end at 4294967294"):
        auth.rotate()
    assert not auth.path.exists()


@pytest.mark.parametrize("value", [None, "code", {"code": 1}, [1, None, ""], ["other"]])
def test_a_list_that_is_none_admits_nobody(tmp_path: Path, value: object) -> None:
    auth = ClientAuth(tmp_path)
    assert not auth.admits("code", value)
    assert not auth.admits("", value)
    assert auth.admits("code", ["other", "code"])


@pytest.fixture
def far(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabNode:
    """The node B, whose client without the mount this process is, admitted, its own store in ``own``."""
    node = lab.nodes["B"]
    enter(lab, node, tmp_path / "own", monkeypatch)
    monkeypatch.setenv("KACHERY_CLIENT_AUTH_FILE", str(node.storage_dir / "client-auth"))
    return node


def test_what_a_client_without_the_mount_stores_is_in_the_store_of_the_node(
        lab: Lab, far: LabNode, tmp_path: Path) -> None:
    path = make_recording(tmp_path / "c.dat", 3 * CHUNK_SIZE_BYTES + 1, seed=43)
    numbers = numpy.arange(1000).reshape(10, 100)
    uris = [kf.store_file(path), *map(str, kf.store_files([path])), kf.store_text("a text"), kf.store_npy(numbers)]
    with far.used():
        assert [Path(kf.load_file(uri)).is_relative_to(far.storage_dir) for uri in uris] == [True] * 4
    assert load(lab.nodes["A"], uris[0])["source"] == "channel"  # a colleague's
    assert not (tmp_path / "own").exists()
    info = kf.info()
    assert info["place"] == "apart"
    assert str(far.storage_dir) in info["storesWhere"]
    assert NODE_HOST in info["storesWhere"]


def test_a_result_of_a_task_goes_to_the_node_as_well(far: LabNode, tmp_path: Path) -> None:
    result = encode_result(numpy.arange(50), 1000)
    with far.used():
        assert kf.load_npy(result["file"]).sum() == sum(range(50))


def test_mutables_of_a_client_without_the_mount_are_those_of_the_node(far: LabNode, tmp_path: Path) -> None:
    with far.used():
        kf.set("last", 5)
    assert kf.get("last") == 5
    assert kf.set("mine", [1])
    assert ("mine", [1]) in mutables.items()
    with far.used():
        assert kf.get("mine") == [1]
    assert kf.delete("mine")
    assert not (tmp_path / "own").exists()


def test_a_link_at_another_machine_says_why_it_cannot_be_and_what_to_do(far: LabNode, tmp_path: Path) -> None:
    path = make_recording(tmp_path / "d.dat", 10)
    with pytest.raises(errors.CannotLink, match="store_file") as caught:
        kf.link_file(path)
    assert f"{far.storage_dir} on {NODE_HOST}" in str(caught.value)


def test_a_node_that_goes_away_is_missed_and_nothing_goes_astray(
        far: LabNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kf.store_text("before")
    found = place.find_place()
    gone = found._replace(settings=replace(found.settings, node_port=1))
    kept = place._kept
    assert kept is not None
    monkeypatch.setattr(place, "_kept", (kept[0], gone, float("inf")))
    with pytest.raises(errors.NodeNotRunning, match="is not its store"):
        kf.store_text("after")
    with pytest.raises(errors.NodeNotRunning, match="is not its store"):
        kf.get("last")
    assert not (tmp_path / "own").exists()


@pytest.fixture
def mounted(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabNode:
    """The node B, whose store this process has mounted at another machine."""
    (tmp_path / "mount").symlink_to(lab.nodes["B"].storage_dir)
    enter(lab, lab.nodes["B"], tmp_path / "mount", monkeypatch)
    return lab.nodes["B"]


def test_databases_of_a_mounted_store_are_not_opened(
        lab: Lab, mounted: LabNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "e.dat", CHUNK_SIZE_BYTES + 1, seed=45))
    kf.load_file(uri)  # a cached copy, so there is an index
    seen: list[str] = []
    connect: Any = sqlite3.connect

    def note(path: object, *arguments: object, **options: object) -> object:
        seen.append(str(path))
        return connect(path, *arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", note)
    assert kf.set("mounted", 1)
    assert kf.get("mounted") == 1
    copy = Path(kf.load_file(uri))
    before = copy.stat().st_ino
    assert kf.store_file(copy).startswith(uri.partition("/e.dat")[0])
    assert copy.stat().st_ino != before  # no row of the index fits it any more: it is an original
    keeper = CacheKeeper(tmp_path / "mount", machine=place.find_place().machine)
    assert {found.kind for found in keeper.list()} == {Kind.ORIGINAL}
    sha1 = copy.name
    for call in (lambda: keeper.pin(sha1), lambda: keeper.unpin(sha1), lambda: keeper.index.totals()):
        with pytest.raises(errors.CacheElsewhere, match=NODE_HOST):
            call()
    assert not seen
    with mounted.used():
        assert kf.get("mounted") == 1
        kinds = {found.sha1: found.kind for found in CacheKeeper(mounted.storage_dir).list()}
        assert kinds[sha1] is Kind.ORIGINAL
    info = kf.info()
    assert info["place"] == "shared"
    assert f"on {NODE_HOST} and keeps the mutables" in info["storesWhere"]
