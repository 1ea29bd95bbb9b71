"""Uploading before anybody asks: a real hub, bucket and node, and readers without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.protocol.names import parse_file_uri
from tests.cli.commands import Program
from tests.system.support import CHUNK_SIZE_BYTES, QUICK, make_recording, objects, traffic

SIZE = 3 * CHUNK_SIZE_BYTES + 7


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("uploading") / "lab", environ=QUICK) as lab:
        lab.start_hub()
        lab.add_node("A")
        lab.add_node("reader", permissions=("requestFiles",))
        yield lab


@pytest.fixture
def giver(lab: Lab) -> Iterator[LabNode]:
    """A node that provides files; the test is a client of it."""
    with lab.nodes["A"].used():
        yield lab.nodes["A"]


def read_directly(lab: Lab, directory: Path, *uris: str) -> list[bytes]:
    """Load files into a store of their own, by the command, without a node."""
    reader = Program(directory / "elsewhere", None, **QUICK)
    return [Path(reader.json("load", uri, "--direct", lab.hub_url, "--channel", lab.channel)["path"]).read_bytes()
            for uri in uris]


def test_what_was_uploaded_is_had_without_a_node(lab: Lab, giver: LabNode, tmp_path: Path) -> None:
    long = make_recording(tmp_path / "long.dat", SIZE, seed=51)
    short = make_recording(tmp_path / "short.dat", 1000, seed=52)
    linked = make_recording(tmp_path / "linked.dat", SIZE, seed=53)
    (tmp_path / "empty.dat").touch()
    steps: list[kf.Progress] = []
    uris = [kf.upload_file(long, channel=lab.channel, progress=steps.append), kf.upload_file(kf.store_file(short)),
            kf.upload_file(kf.link_file(linked)), kf.upload_file(str(tmp_path / "empty.dat"))]
    assert uris[0] == kf.store_file(long)
    assert steps
    assert read_directly(lab, tmp_path, *uris) == [path.read_bytes() for path in (long, short, linked)] + [b""]


def test_a_uri_without_its_manifest_is_given_back_with_it(lab: Lab, giver: LabNode, tmp_path: Path) -> None:
    path = make_recording(tmp_path / "a.dat", SIZE, seed=54)
    uri = kf.store_file(path)
    assert kf.upload_file(f"sha1://{parse_file_uri(uri).sha1}/a.dat") == uri
    assert read_directly(lab, tmp_path, uri) == [path.read_bytes()]


def test_what_the_bucket_has_is_not_sent_again(lab: Lab, giver: LabNode, tmp_path: Path) -> None:
    uri = kf.store_file(make_recording(tmp_path / "b.dat", SIZE, seed=55))

    def leave(_step: kf.Progress) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kf.upload_file(uri, progress=leave)
    kf.upload_file(uri)
    sent = traffic(giver)["uploaded_objects"]
    kf.upload_file(uri)
    assert traffic(giver)["uploaded_objects"] == sent


def test_every_format_is_loaded_directly(lab: Lab, giver: LabNode, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(2 * CHUNK_SIZE_BYTES // 8)
    uris = [kf.upload_file(uri) for uri in (kf.store_text("a text"), kf.store_json([1, None]), kf.store_npy(array),
                                            kf.store_pkl({"a": (1, 2)}))]
    monkeypatch.setenv("KACHERY_STORAGE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("KACHERY_DAEMON_PORT", "1")
    where: dict[str, Any] = {"channel": lab.channel, "direct": lab.hub_url}
    with pytest.raises(errors.NodeNotRunning):
        kf.load_text(uris[0])
    assert kf.load_text(uris[0], **where) == "a text"
    assert kf.load_json(uris[1], **where) == [1, None]
    assert (kf.load_npy(uris[2], **where) == array).all()
    assert kf.load_pkl(uris[3], **where) == {"a": (1, 2)}


def test_a_client_without_the_node_s_store_hands_the_file_over(lab: Lab, giver: LabNode, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_recording(tmp_path / "c.dat", SIZE, seed=56)
    monkeypatch.setenv("KACHERY_CLIENT_AUTH_FILE", str(giver.storage_dir / "client-auth"))
    monkeypatch.setenv("KACHERY_STORAGE_DIR", str(tmp_path / "own"))
    uri = kf.upload_file(path)
    assert read_directly(lab, tmp_path, uri) == [path.read_bytes()]
    late = make_recording(tmp_path / "late.dat", SIZE, seed=58)
    with monkeypatch.context() as alone:  # stored while no node answered
        alone.setenv("KACHERY_DAEMON_PORT", "1")
        kept = kf.store_file(late)
    assert Path(kf.load_file(kept, local_only=True)).is_relative_to(tmp_path / "own")
    assert read_directly(lab, tmp_path, kf.upload_file(kept)) == [late.read_bytes()]


def test_what_cannot_be_uploaded_is_told(lab: Lab, giver: LabNode, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(objects(lab.bucket_dir))
    path = make_recording(tmp_path / "d.dat", 100, seed=57)
    with pytest.raises(errors.NotInStore):
        kf.upload_file(f"sha1://{'1' * 40}/absent.dat")
    with pytest.raises(errors.LocalFileMissing):
        kf.upload_file(tmp_path / "absent.dat")
    with pytest.raises(errors.InvalidUri):
        kf.upload_file("sha1://nothing")
    with pytest.raises(errors.ChannelUnknown):
        kf.upload_file(path, channel="other")
    monkeypatch.delenv("KACHERY_CHANNEL")
    with pytest.raises(errors.InvalidArgument, match="No channel was named to upload to"):
        kf.upload_file(path)
    monkeypatch.setenv("KACHERY_OFFLINE_STORAGE_DIR", str(giver.storage_dir))
    with pytest.raises(errors.ClientOffline):
        kf.upload_file(path, channel=lab.channel)
    with lab.nodes["reader"].used(), pytest.raises(errors.NotPermitted, match="provideFiles"):
        kf.upload_file(path)
    assert len(objects(lab.bucket_dir)) == before


def test_the_command_uploads_files_and_uris(lab: Lab, giver: LabNode, tmp_path: Path) -> None:
    first, second = (make_recording(tmp_path / f"{n}.dat", SIZE, seed=n) for n in (58, 59))
    stored = giver.json("store", str(second))[0]["uri"]
    done = giver.run("upload", str(first), stored, str(tmp_path / "absent.dat"), "--channel", lab.channel)
    assert done.returncode == 3
    uris = done.stdout.decode().splitlines()
    assert uris[1] == stored
    assert read_directly(lab, tmp_path, *uris) == [first.read_bytes(), second.read_bytes()]
    assert giver.json("upload", stored) == [{"path": stored, "uri": stored}]
