"""Listing, counting, verifying and removing."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest

from kachery_fast.errors import CorruptFile, KacheryError, LinkInvalid, NotInStore
from kachery_fast.store import FileStore, Located

from .data import counter_stream, files_below, sha1_of

MIB = 1024 * 1024


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store", chunk_size_bytes=MIB, durable=False)


def test_everything_is_listed_once_in_order(store: FileStore, tmp_path: Path) -> None:
    names = [store.put_bytes(b"%d" % number).sha1 for number in range(50)]
    linked = tmp_path / "linked"
    linked.write_bytes(counter_stream(2 * MIB))
    stored = store.link_file(linked)
    names += [stored.sha1, str(stored.manifest_sha1)]
    listed = list(store.list())
    assert [located.sha1 for located in listed] == sorted(names)
    assert all(located == store.find(located.sha1) for located in listed)
    totals = store.totals()
    assert (totals.files, totals.links, totals.exact) == (51, 1, True)
    assert totals.bytes == sum(located.size for located in listed if not located.linked)


def test_foreign_files_in_the_store_are_ignored(store: FileStore) -> None:
    sha1 = store.put_bytes(b"x").sha1
    directory = store.find(sha1).path.parent
    for name in ("README", sha1 + ".part", sha1 + ".manifest", "z" * 40, sha1 + ".link.bak"):
        (directory / name).write_bytes(b"")
    (store.root / "sha1" / "notes.txt").write_bytes(b"")
    (directory / ("0" * 40)).mkdir()
    assert [located.sha1 for located in store.list()] == [sha1]
    assert store.totals() == (1, 0, 1, True)


def test_totals_of_a_large_store_are_estimated_in_time(store: FileStore) -> None:
    for number in range(2000):
        store.put_bytes(b"%d" % number)
    ticks = count()
    totals = store.totals(seconds=128.0, clock=lambda: float(next(ticks)))
    assert not totals.exact
    assert 1600 < totals.files < 2400


def test_verify_finds_damage_and_says_what_to_do(store: FileStore) -> None:
    sha1 = store.put_bytes(counter_stream(3 * MIB)).sha1
    done: list[int] = []
    assert store.verify(sha1, progress=done.append) == store.find(sha1)
    assert done[-1] == 3 * MIB
    with store.find(sha1).path.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(b"\0")
    with pytest.raises(CorruptFile, match="Remove it") as caught:
        store.verify(sha1)
    assert caught.value.details["sha1"] == sha1
    with pytest.raises(NotInStore):
        store.verify("0" * 40)


@pytest.mark.parametrize("quarantine", [False, True])
def test_verifying_all_reports_each_and_moves_only_when_asked(
    store: FileStore, tmp_path: Path, quarantine: bool
) -> None:
    good = store.put_bytes(b"good").sha1
    bad = store.put_bytes(b"bad").sha1
    store.find(bad).path.write_bytes(b"BAD")
    linked = tmp_path / "linked"
    linked.write_bytes(b"linked")
    link = store.link_file(linked).sha1
    linked.unlink()
    results: dict[str, Located | KacheryError] = {}
    verified = store.verify_all(on_result=results.__setitem__, quarantine=quarantine)
    assert verified == (1, 2, 4)
    assert isinstance(results[good], Located)
    assert isinstance(results[bad], CorruptFile)
    assert isinstance(results[link], LinkInvalid)
    assert (store.root / "damaged").exists() == quarantine
    assert [located.sha1 for located in store.list()] == sorted([good] if quarantine else [good, bad, link])
    if quarantine:
        assert files_below(store.root / "damaged") == sorted([bad, link + ".link"])
        assert store.verify_all() == (1, 0, 4)


def test_remove_takes_file_link_and_sidecar(store: FileStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(counter_stream(2 * MIB))
    sha1 = store.link_file(source).sha1
    stored = store.put_file(source)
    assert store.remove(sha1) > 2 * MIB
    assert [name for name in files_below(store.root) if sha1 in name] == []
    assert store.has(str(stored.manifest_sha1))
    assert source.exists()
    with pytest.raises(NotInStore, match=sha1):
        store.remove(sha1)


def test_neither_finding_nor_putting_lists_a_directory(store: FileStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(counter_stream(3 * MIB))
    store.put_file(source)
    listings: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("os.listdir", "os.scandir") and str(tmp_path) in str(arguments):
            listings.append(event)

    sys.addaudithook(watch)
    try:
        source.write_bytes(counter_stream(2 * MIB))
        stored = store.put_file(source)
        store.link_file(source)
        store.put_bytes(b"more")
        store.find(stored.sha1)
        store.has("0" * 40)
        store.open(stored.sha1).close()
        store.manifest_for(stored.sha1)
        store.part_path("0" * 40)
        store.remove(stored.sha1)
        assert listings == []
        list(store.list())
        assert listings
    finally:
        watching = False
    assert sha1_of(source.read_bytes()) == stored.sha1
