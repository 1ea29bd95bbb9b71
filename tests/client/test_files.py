"""Storing and loading files without a node."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import kachery_fast as kf
from kachery_fast import errors
from tests.native.disks import MIB, mounted

ABSENT = "sha1://" + "0" * 40


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "recording.dat"
    path.write_bytes(hashlib.shake_128(b"recording").digest(3 * MIB + 17))
    return path


def test_a_stored_file_comes_back(store_dir: Path, recording: Path) -> None:
    uri = kf.store_file(recording)
    sha1 = hashlib.sha1(recording.read_bytes()).hexdigest()
    assert uri == f"sha1://{sha1}/recording.dat"
    path = kf.load_file(uri)
    assert path == str(store_dir / "sha1" / sha1[:2] / sha1[2:4] / sha1[4:6] / sha1)
    assert Path(path).read_bytes() == recording.read_bytes()


def test_load_says_where_a_file_came_from(store_dir: Path, recording: Path) -> None:
    loaded = kf.load(kf.store_file(recording))
    assert (loaded.size, loaded.source) == (3 * MIB + 17, "store")
    assert loaded.uri == f"sha1://{loaded.sha1}/recording.dat"
    assert loaded.seconds >= 0


def test_a_file_of_several_chunks_names_its_manifest(
        store_dir: Path, recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_CHUNK_SIZE_BYTES", str(MIB))
    uri = kf.store_file(recording)
    manifest = kf.load_json("sha1://" + uri.partition("?manifest=")[2])
    assert [chunk["start"] for chunk in manifest["chunks"]] == [0, MIB, 2 * MIB, 3 * MIB]


@pytest.mark.parametrize(("arguments", "label"), [
    ({}, "recording.dat"),
    ({"label": "a b.dat"}, "a%20b.dat"),
    ({"basename": "x.dat"}, "x.dat"),
    ({"label": "x.dat", "basename": "x.dat"}, "x.dat"),
])
def test_the_label_goes_by_either_name(store_dir: Path, recording: Path, arguments: dict, label: str) -> None:
    assert kf.store_file(recording, **arguments).endswith("/" + label)
    assert kf.link_file(recording, **arguments).endswith("/" + label)


def test_a_basename_may_come_second_as_in_2022(store_dir: Path, recording: Path) -> None:
    assert kf.store_file(str(recording), "x.dat").endswith("/x.dat")
    assert kf.store_text("a", "t.txt").endswith("/t.txt")


def test_two_different_labels_are_refused(store_dir: Path, recording: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="same thing"):
        kf.store_file(recording, label="a", basename="b")
    assert not store_dir.exists()


def test_a_linked_file_is_loaded_from_its_own_place(store_dir: Path, recording: Path) -> None:
    uri = kf.link_file(recording)
    assert kf.load_file(uri) == str(recording)
    assert kf.load_bytes(uri, 5, 25) == recording.read_bytes()[5:25]


def test_a_changed_link_says_so(store_dir: Path, recording: Path) -> None:
    uri = kf.link_file(recording)
    recording.write_bytes(b"other")
    with pytest.raises(errors.LinkInvalid, match=r"recording\.dat"):
        kf.load_file(uri)


def test_progress_ends_at_the_whole(store_dir: Path, recording: Path) -> None:
    for act in (kf.store_file, kf.link_file):
        seen: list[kf.Progress] = []
        uri = act(recording, progress=seen.append)
        assert seen[-1] == kf.Progress(3 * MIB + 17, 3 * MIB + 17, "")
    seen = []
    kf.verify(uri, progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes == 3 * MIB + 17


# --- many


def test_each_of_many_files_has_its_answer(store_dir: Path, recording: Path, tmp_path: Path) -> None:
    told = []
    answers = kf.store_files([recording, tmp_path / "absent", tmp_path],
                             on_done=lambda path, answer: told.append((path, answer)))
    assert answers[0] == kf.store_file(recording)
    assert isinstance(answers[1], errors.LocalFileMissing)
    assert isinstance(answers[2], errors.NotADataFile)
    assert [path for path, _ in told] == [recording, tmp_path / "absent", tmp_path]
    assert [answer for _, answer in told] == answers


# --- ranges


@pytest.mark.parametrize(("start", "end"), [(0, 10), (5, 5), (None, 7), (3 * MIB, None), (None, None),
                                            (3 * MIB + 17, 3 * MIB + 17)])
def test_a_range_is_that_of_the_file(store_dir: Path, recording: Path, start: int | None, end: int | None) -> None:
    assert kf.load_bytes(kf.store_file(recording), start, end) == recording.read_bytes()[start:end]


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (0, 3 * MIB + 18), (3 * MIB + 18, None)])
def test_a_range_outside_the_file_is_refused(
        store_dir: Path, recording: Path, start: int | None, end: int | None) -> None:
    with pytest.raises(errors.InvalidArgument, match="Bytes"):
        kf.load_bytes(kf.store_file(recording), start, end)


# --- copies


def test_a_copy_is_whole_and_independent(store_dir: Path, recording: Path, tmp_path: Path) -> None:
    uri = kf.store_file(recording)
    dest = tmp_path / "copy.dat"
    assert kf.load_file(uri, dest) == str(dest)
    assert dest.read_bytes() == recording.read_bytes()
    dest.write_bytes(b"changed")
    kf.verify(uri)


def test_a_copy_replaces_what_is_there_and_leaves_nothing_else(
        store_dir: Path, recording: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    directory.mkdir()
    dest = directory / "copy.dat"
    dest.write_bytes(b"old")
    with dest.open("rb") as old:
        kf.load_file(kf.store_file(recording), dest=dest)
        assert old.read() == b"old"
    assert dest.read_bytes() == recording.read_bytes()
    assert os.listdir(directory) == ["copy.dat"]


def test_a_copy_never_writes_through_a_link_into_the_store(store_dir: Path, recording: Path, tmp_path: Path) -> None:
    other = kf.store_text("other")
    dest = tmp_path / "dest"
    dest.symlink_to(kf.load_file(other))
    kf.load_file(kf.store_file(recording), dest=dest)
    assert not dest.is_symlink()
    assert kf.load_text(other) == "other"


@pytest.mark.parametrize("room", ["", "sha1", "sha1/00", "tmp", "tmp/../sha1", "deep/new"])
@pytest.mark.parametrize("way", ["itself", "through a link", "linked away"])
def test_a_copy_is_never_put_into_the_store(
        store_dir: Path, recording: Path, tmp_path: Path, room: str, way: str) -> None:
    """There it could be other bytes under a file's name."""
    uri = kf.store_file(recording)
    if way == "linked away":  # the store's files are on another disk
        (store_dir / "sha1").rename(tmp_path / "disk")
        (store_dir / "sha1").symlink_to(tmp_path / "disk")
    place = store_dir / room
    place.mkdir(parents=True, exist_ok=True)
    if way == "through a link":
        (tmp_path / "way").symlink_to(place)
        place = tmp_path / "way"
    elif way == "linked away" and room.startswith("sha1"):
        place = tmp_path / "disk" / room[5:]
    before = sorted(store_dir.rglob("*"))
    for name in ("0" * 40, "copy.dat"):
        with pytest.raises(errors.InvalidArgument, match="within the local store"):
            kf.load_file(uri, dest=place / name)
    assert sorted(store_dir.rglob("*")) == before


def test_not_even_a_stored_file_onto_itself(store_dir: Path, recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = kf.store_file(recording)
    path = Path(kf.load_file(uri))
    monkeypatch.chdir(path.parent)
    for dest in (path, path.name):
        with pytest.raises(errors.InvalidArgument, match="outside"):
            kf.load_file(uri, dest=dest)
    assert path.read_bytes() == recording.read_bytes()


def test_a_copy_may_lie_beside_the_store_and_under_a_like_name(
        store_dir: Path, recording: Path, tmp_path: Path) -> None:
    uri = kf.store_file(recording)
    (tmp_path / "store-of-mine").mkdir()
    for dest in (tmp_path / "store.dat", tmp_path / "store-of-mine" / "x"):
        assert kf.load_file(uri, dest=dest) == str(dest)


def test_a_copy_onto_a_linked_file_itself_changes_nothing(store_dir: Path, recording: Path) -> None:
    uri = kf.link_file(recording)
    before = recording.stat()
    assert kf.load_file(uri, dest=recording) == str(recording)
    after = recording.stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_a_copy_needs_a_place_for_a_file(store_dir: Path, recording: Path, tmp_path: Path) -> None:
    uri = kf.store_file(recording)
    with pytest.raises(errors.NotADataFile, match="a directory"):
        kf.load_file(uri, dest=tmp_path)
    with pytest.raises(errors.NotADataFile, match="a directory"):
        kf.load_file(uri, dest=f"{tmp_path}/new/")
    with pytest.raises(errors.NotADataFile, match="a device"):
        kf.load_file(uri, dest="/dev/null")
    with pytest.raises(errors.DiskError, match="no such directory"):
        kf.load_file(uri, dest=tmp_path / "absent" / "copy")
    with pytest.raises(errors.InvalidArgument, match="not the path"):
        kf.load_file(uri, dest="")
    assert not (tmp_path / "absent").exists()


# --- what is not there


def test_without_a_channel_nothing_is_asked(store_dir: Path) -> None:
    with pytest.raises(errors.NoChannel, match="KACHERY_CHANNEL"):
        kf.load_file(ABSENT)
    with pytest.raises(errors.NoChannel):
        kf.load_bytes(ABSENT, 0, 1)
    assert not store_dir.exists()


def test_local_only_asks_nobody(store_dir: Path) -> None:
    with pytest.raises(errors.NotInStore):
        kf.load_file(ABSENT, local_only=True, channel="lab")


def test_without_a_node_a_channel_cannot_be_asked(store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.NodeNotRunning, match="node start"):
        kf.load_file(ABSENT, channel="lab")
    monkeypatch.setenv("KACHERY_CHANNEL", "lab")
    with pytest.raises(errors.NodeNotRunning):
        kf.load_file(ABSENT)
    with pytest.raises(errors.NodeNotRunning):
        kf.why(ABSENT)


@pytest.mark.parametrize("uri", ["", "x", "/etc/passwd", "sha1://", "sha1://12", "sha1://../x", "http://" + "0" * 40,
                                 ABSENT + "?manifest=1", ABSENT.upper()])
def test_malformed_uris_are_refused(store_dir: Path, uri: str) -> None:
    for act in (kf.load_file, kf.load_bytes, kf.verify, kf.why):
        with pytest.raises(errors.InvalidUri):
            act(uri)


def test_a_malformed_channel_is_refused(store_dir: Path) -> None:
    with pytest.raises(errors.InvalidName, match="channel"):
        kf.load_file(ABSENT, channel="a/b")


def test_what_cannot_be_stored_says_why(store_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.LocalFileMissing):
        kf.store_file(tmp_path / "absent")
    with pytest.raises(errors.NotADataFile):
        kf.store_file(tmp_path)
    with pytest.raises(errors.LocalFileMissing):
        kf.link_file(tmp_path / "absent")


def test_damage_is_found(store_dir: Path, recording: Path) -> None:
    uri = kf.store_file(recording)
    path = Path(kf.load_file(uri))
    path.chmod(0o644)
    path.write_bytes(b"\0" + recording.read_bytes()[1:])
    with pytest.raises(errors.CorruptFile, match="damaged"):
        kf.verify(uri)
    with pytest.raises(errors.NotInStore):
        kf.verify(ABSENT)


def test_info_counts_the_store_without_a_node(store_dir: Path, recording: Path) -> None:
    kf.store_file(recording)
    found = kf.info()
    assert found["storageDir"] == str(store_dir)
    assert found["store"] == {"files": 1, "links": 0, "bytes": 3 * MIB + 17, "exact": True}
    assert found["node"] is None
    assert "No node answers" in found["nodeWhy"]


def test_why_needs_no_node_for_what_is_here(store_dir: Path, recording: Path) -> None:
    found = kf.why(kf.store_file(recording))
    assert found["verdict"] == "It is in the local store."
    assert found["channels"] == []


# --- copies to other file systems


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with mounted(tmp_path / "disk", "tmpfs", MIB) as place:
        yield place


def test_a_copy_crosses_file_systems(store_dir: Path, small_disk: Path) -> None:
    uri = kf.store_text("x" * 100_000)
    assert Path(kf.load_file(uri, dest=small_disk / "copy")).read_text() == "x" * 100_000


def test_a_copy_to_a_full_disk_says_so_and_leaves_nothing(store_dir: Path, recording: Path, small_disk: Path) -> None:
    dest = small_disk / "copy"
    dest.write_text("old")
    with pytest.raises(errors.DiskFull, match="3145745 are needed"):
        kf.load_file(kf.store_file(recording), dest=dest)
    assert os.listdir(small_disk) == ["copy"]
    assert dest.read_text() == "old"
