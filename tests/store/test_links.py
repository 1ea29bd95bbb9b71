"""Linking files in place, and noticing that they are not what they were."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kachery_fast.errors import CorruptFile, LinkInvalid, NotInStore
from kachery_fast.store import FileStore

from .data import counter_stream, files_below, sha1_of

MIB = 1024 * 1024


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store", chunk_size_bytes=MIB, fingerprint_size_bytes=4096)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "recording.dat"
    path.write_bytes(counter_stream(3 * MIB))
    return path


def _rewrite(path: Path, offset: int) -> None:
    """Change one byte, and put the times back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_link_takes_no_space_and_finds_the_file(store: FileStore, source: Path) -> None:
    stored = store.link_file(source)
    assert stored.sha1 == sha1_of(source.read_bytes())
    assert store.find(stored.sha1) == (stored.sha1, source, 3 * MIB, True)
    assert store.has(stored.sha1)
    with store.open(stored.sha1) as file:
        assert file.read() == source.read_bytes()
    assert store.verify(stored.sha1).linked
    assert sum((store.root / name).stat().st_size for name in files_below(store.root)) < 2000


def test_the_record_is_that_of_2022_and_more(store: FileStore, source: Path) -> None:
    stored = store.link_file(source)
    record = json.loads(_record(store, stored.sha1).read_text())
    assert record["path"] == str(source)
    assert record["manifestSha1"] == stored.manifest_sha1
    assert record["stat"] == {"size": 3 * MIB, "mtime": source.stat().st_mtime}
    assert record["_writingProcess"] == "kachery-fast"
    assert record["kacheryFast"]["mtimeNs"] == source.stat().st_mtime_ns
    assert len(record["kacheryFast"]["head"]) == len(record["kacheryFast"]["tail"]) == 16


def _record(store: FileStore, sha1: str) -> Path:
    return store.root / "sha1" / sha1[:2] / sha1[2:4] / sha1[4:6] / (sha1 + ".link")


def test_a_relative_path_becomes_absolute(store: FileStore, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    sha1 = store.link_file(source.name).sha1
    monkeypatch.chdir("/")
    assert store.find(sha1).path == source


def test_a_path_that_goes_up_from_behind_a_symbolic_link_is_that_of_the_file(
        store: FileStore, source: Path, tmp_path: Path) -> None:
    deep = tmp_path / "real" / "deep"
    deep.mkdir(parents=True)
    (tmp_path / "link").symlink_to(deep)
    moved = source.rename(tmp_path / "real" / "x.dat")
    sha1 = store.link_file(f"{tmp_path}/link/../x.dat").sha1
    assert store.find(sha1).path == moved
    (tmp_path / "x.dat").write_bytes(b"another file, where the path would lead without the link")
    assert store.link_file(f"{tmp_path}/link/../x.dat").sha1 == sha1
    assert store.find(sha1).path == moved


@pytest.mark.parametrize(
    ("change", "why"),
    [("head", "head or tail"), ("tail", "head or tail"), ("time", "written to"), ("longer", "had 3145728 bytes"),
     ("gone", "gone"), ("directory", "regular file")],
)
def test_a_link_whose_file_changed_is_invalid_and_says_why(
    store: FileStore, source: Path, change: str, why: str
) -> None:
    sha1 = store.link_file(source).sha1
    if change == "head":
        _rewrite(source, 0)
    elif change == "tail":
        _rewrite(source, 3 * MIB - 1)
    elif change == "time":
        os.utime(source, ns=(0, source.stat().st_mtime_ns + 1))
    elif change == "longer":
        with source.open("ab") as file:
            file.write(b"x")
    else:
        source.unlink()
        if change == "directory":
            source.mkdir()
    assert not store.has(sha1)
    for call in (store.find, store.open, store.verify, store.manifest_for):
        with pytest.raises(LinkInvalid, match=why) as caught:
            call(sha1)
        assert str(source) in str(caught.value)


def test_a_change_that_the_fingerprint_misses_is_found_by_verify(store: FileStore, source: Path) -> None:
    sha1 = store.link_file(source).sha1
    _rewrite(source, MIB)
    assert store.has(sha1)
    with pytest.raises(CorruptFile, match="link it anew"):
        store.verify(sha1)


def test_linking_anew_heals_a_link(store: FileStore, source: Path) -> None:
    sha1 = store.link_file(source).sha1
    os.utime(source, (1, 1))
    assert not store.has(sha1)
    assert store.link_file(source).sha1 == sha1
    assert store.has(sha1)
    moved = source.rename(source.with_name("moved.dat"))
    assert not store.has(sha1)
    store.link_file(moved)
    assert store.find(sha1).path == moved


def test_a_stored_file_wins_over_a_link(store: FileStore, source: Path) -> None:
    sha1 = store.link_file(source).sha1
    store.put_file(source)
    source.unlink()
    assert not store.find(sha1).linked
    store.verify(sha1)
    assert [located.linked for located in store.list() if located.sha1 == sha1] == [False]


def test_a_file_that_is_stored_gets_no_link(store: FileStore, source: Path) -> None:
    sha1 = store.put_file(source).sha1
    store.link_file(source)
    assert not _record(store, sha1).exists()


def test_removing_a_link_leaves_the_file(store: FileStore, source: Path) -> None:
    stored = store.link_file(source)
    store.remove(stored.sha1)
    assert source.stat().st_size == 3 * MIB
    with pytest.raises(NotInStore):
        store.find(stored.sha1)
    assert stored.manifest_sha1 is not None
    store.remove(stored.manifest_sha1)
    assert files_below(store.root) == []


@pytest.mark.parametrize(("shift", "valid"), [(0.0, True), (0.0015, True), (0.01, False)])
def test_a_link_of_2022_is_held_to_two_milliseconds(
    store: FileStore, source: Path, shift: float, valid: bool
) -> None:
    sha1 = sha1_of(source.read_bytes())
    _record(store, sha1).parent.mkdir(parents=True)
    _record(store, sha1).write_text(json.dumps({
        "path": str(source), "manifestSha1": None, "_writingProcess": "daemon",
        "stat": {"size": 3 * MIB, "mtime": source.stat().st_mtime + shift},
    }))
    assert store.has(sha1) == valid
    if valid:
        name, manifest = store.manifest_for(sha1)
        assert manifest is not None
        assert store.put_file(source).manifest_sha1 == name


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"path": 5, "stat": {"size": 1, "mtime": 1}}', '{"path": "relative", "stat": {}}',
     '{"path": "/x", "stat": {"size": "many", "mtime": 1}}', '{"path": "/x\\u0000", "stat": {"size": 1, "mtime": 1}}',
     '{"path": "/x", "stat": {"size": 1, "mtime": 1}, "kacheryFast": {"mtimeNs": 1, "fingerprintSizeBytes": 1e12, '
     '"head": "", "tail": ""}}', "\udcff" * 3, "[" * 50_000,
     '{"path": "/x", "stat": {"size": 1e999, "mtime": 1}}'],
    ids=range(12),
)
def test_a_record_that_cannot_be_read_is_an_invalid_link(store: FileStore, text: str) -> None:
    sha1 = "0" * 40
    _record(store, sha1).parent.mkdir(parents=True)
    _record(store, sha1).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(LinkInvalid, match="cannot be read"):
        store.find(sha1)
    assert list(store.list()) == []
    assert store.verify_all().damaged == 1
