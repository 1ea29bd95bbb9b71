"""Crashes, damage and other users: eviction loses nothing, and one bad file stops nothing."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kachery_fast.errors import (
    CacheConfigInvalid,
    CacheOfAnother,
    CorruptFile,
    DatabaseUnusable,
    DiskError,
    DiskFull,
    FilePinned,
    NotInStore,
    OnlyCopyHere,
    StoredMeanwhile,
)
from kachery_fast.store import FileStore, emptying, eviction, naming
from kachery_fast.store.cache import CacheIndex, note_use
from kachery_fast.store.eviction import CacheKeeper, Kind
from kachery_fast.store.naming import rename_new
from kachery_fast.store.quota import quota_of
from kachery_fast.store.trash import Trash

from ..native.disks import MIB, mounted
from .data import counter_stream, files_below, sha1_of
from .test_cache import HOUR, evict_all, fetch, keeper_of, store_of

LATER = HOUR


def path_of(root: Path, sha1: str) -> Path:
    return store_of(root).find(sha1).path


def old_trash(root: Path, data: bytes) -> Path:
    sha1 = sha1_of(data)
    path = root / "sha1-trash" / sha1[:2] / sha1[2:4] / sha1[4:6] / sha1
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return path


def backup(root: Path) -> Callable[[], None]:
    """Copy the index; what is returned puts the copy back."""
    CacheIndex(root).close()
    with sqlite3.connect(root / "kachery-fast-cache.db") as source, sqlite3.connect(root / "backup") as target:
        source.backup(target)

    def put_back() -> None:
        for path in root.glob("kachery-fast-cache.db*"):
            path.unlink()
        shutil.copyfile(root / "backup", root / "kachery-fast-cache.db")

    return put_back


# --- the trash


def test_what_a_program_of_2022_left_in_its_trash_is_only_deleted_by_hand(tmp_path: Path) -> None:
    old = old_trash(tmp_path, b"the only copy")
    keeper = keeper_of(tmp_path)
    assert keeper.empty_trash(before=float("inf")) == (0, 0)
    assert [(found.sha1, found.old) for found in keeper.trash.list()] == [(old.name, True)]
    assert keeper.restore(old.name).path.read_bytes() == b"the only copy"
    assert not old.exists()
    old_trash(tmp_path / "other", b"rubbish")
    assert keeper_of(tmp_path / "other").empty_trash(before=float("inf"), old=True) == (1, 7)


def test_restoring_leaves_a_file_that_is_there_and_claims_it(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, b"copy")
    assert evict_all(tmp_path) == {sha1}
    fetch(tmp_path, b"copy")
    before = path_of(tmp_path, sha1).stat().st_ino
    assert keeper_of(tmp_path).restore(sha1).was_there
    assert path_of(tmp_path, sha1).stat().st_ino == before
    assert list(keeper_of(tmp_path).trash.list()) == []
    assert evict_all(tmp_path) == set()


def test_damaged_bytes_in_the_trash_are_not_restored(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, b"copy")
    evict_all(tmp_path)
    keeper = keeper_of(tmp_path)
    keeper.trash.path(sha1).write_bytes(b"dama")
    for content in (None, b"copy"):
        if content is not None:
            store_of(tmp_path).put_bytes(content)
        with pytest.raises(CorruptFile):
            keeper.restore(sha1)
    assert path_of(tmp_path, sha1).read_bytes() == b"copy"


def test_what_cannot_be_deleted_from_the_trash_does_not_keep_the_rest(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    sha1s = sorted(fetch(tmp_path, b"%d" % number) for number in range(3))
    evict_all(tmp_path)
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == sha1s[0]:
            raise PermissionError(errno.EACCES, "no")
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DiskError):
        keeper_of(tmp_path).empty_trash(before=float("inf"))
    assert [found.sha1 for found in keeper_of(tmp_path).trash.list()] == [sha1s[0]]


def test_the_directories_of_the_trash_go_with_what_was_in_them(tmp_path: Path) -> None:
    copies = [fetch(tmp_path, b"%d" % number) for number in range(5)]
    keeper = keeper_of(tmp_path)
    keeper.remove(copies[0], at_once=True)
    assert files_below(tmp_path / "trash") == []
    for sha1 in copies[1:]:
        keeper.remove(sha1)
    keeper.restore(copies[1])
    assert keeper.empty_trash(before=float("inf"))[0] == 3
    assert list((tmp_path / "trash").iterdir()) == []


def test_moving_to_the_trash_while_it_is_emptied_fails_nowhere(tmp_path: Path) -> None:
    data = [b"%d" % number for number in range(100)]
    copies = [fetch(tmp_path, text) for text in data]
    ended = threading.Event()
    emptied: list[int] = []

    def empty() -> None:
        while not ended.is_set():
            emptied.append(keeper_of(tmp_path).empty_trash(before=float("inf"))[0])

    emptier = threading.Thread(target=empty)
    emptier.start()
    try:
        sizes = [keeper_of(tmp_path).remove(sha1) for sha1 in copies]
    finally:
        ended.set()
        emptier.join()
    assert sizes == [len(text) for text in data]
    assert sum(emptied) + keeper_of(tmp_path).empty_trash(before=float("inf"))[0] == len(data)
    assert list((tmp_path / "trash").iterdir()) == []


def as_on_fat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a rename leave the time of change of status as it was: here, years ago."""
    entries = Trash.list
    monkeypatch.setattr(Trash, "list", lambda self, *, old=True: (
        found._replace(since=1e9) for found in entries(self, old=old)))


def test_since_when_a_file_is_in_the_trash_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_fat(monkeypatch)
    copy, removed = fetch(tmp_path, b"copy"), store_of(tmp_path).put_bytes(b"removed by mistake").sha1
    start = time.time() - 1
    assert evict_all(tmp_path) == {copy}
    keeper = keeper_of(tmp_path)
    keeper.remove(removed, force=True)
    assert all(found.since > start for found in keeper.list_trash())
    assert keeper.empty_trash(before=start) == (0, 0)
    assert keeper.empty_trash(before=start + HOUR)[0] == 2
    with keeper.index.looking() as rows:
        assert rows.execute("SELECT count(*) FROM trashed").fetchone() == (0,)


def test_a_node_takes_what_has_no_note_as_there_since_it_saw_it(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_fat(monkeypatch)
    sha1 = store_of(tmp_path).put_bytes(b"removed before there was an index").sha1
    keeper, now = keeper_of(tmp_path), time.time()
    keeper.remove(sha1, force=True)
    assert not keeper.index.exists
    assert keeper.empty_trash(before=now, seen_at=now + HOUR) == (0, 0)
    assert keeper.empty_trash(before=now + HOUR - 1, seen_at=now + 2 * HOUR) == (0, 0)
    # The clock was ahead when that was noted.
    assert keeper.empty_trash(before=now - 1, seen_at=now) == (0, 0)
    assert keeper.empty_trash(before=now + 1, seen_at=now + 1)[0] == 1


def test_a_note_is_not_believed_of_a_later_file_of_the_name(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, b"data")
    evict_all(tmp_path)
    keeper = keeper_of(tmp_path)
    path = keeper.trash.path(sha1)
    noted = path.stat().st_mtime_ns
    os.utime(path, ns=(noted, noted + 10**9))
    with keeper.index.changing() as rows:
        rows.note_trash(sha1, noted, 0, is_copy=True)
    assert keeper.empty_trash(before=time.time() - HOUR) == (0, 0)
    assert path.exists()


def test_emptying_ends_when_it_is_told_to(tmp_path: Path) -> None:
    for number in range(5):
        fetch(tmp_path, b"%d" % number)
    evict_all(tmp_path)
    answers = iter([False, False, True])
    assert keeper_of(tmp_path).empty_trash(before=float("inf"), stop=lambda: next(answers))[0] == 2
    assert keeper_of(tmp_path).evict(0, now=time.time(), keep_seconds=0, stop=lambda: True).files == 0
    assert keeper_of(tmp_path).empty_trash(before=float("inf"))[0] == 3


def test_a_disk_that_is_nearly_full_costs_evicted_copies_alone_and_the_oldest_first(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [fetch(tmp_path, b"copy %d" % number) for number in range(4)]
    removed = store_of(tmp_path).put_bytes(b"removed by mistake").sha1
    keeper = keeper_of(tmp_path)
    keeper.remove(removed, force=True)
    for number, sha1 in enumerate(reversed(copies)):
        keeper.remove(sha1)
        with keeper.index.changing() as rows:
            rows.note_trash(sha1, keeper.trash.path(sha1).stat().st_mtime_ns, number, is_copy=True)
    wanted = 3

    def is_low(_: Path) -> bool:
        return len([name for name in files_below(tmp_path / "trash") if len(name) >= 40]) > wanted

    for module in (emptying, eviction):
        monkeypatch.setattr(module, "is_low", is_low)
    assert keeper.make_room() == (2, 12)
    assert {found.sha1 for found in keeper.list_trash()} == {copies[0], copies[1], removed}
    wanted = 0
    assert keeper.make_room(stop=lambda: True) == (0, 0)
    assert keeper.make_room() == (2, 12)
    assert [found.sha1 for found in keeper.list_trash()] == [removed]
    assert keeper.make_room() == (0, 0)


def test_room_is_made_on_a_disk_that_is_full_in_truth(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", 8 * MIB) as root:
        store, keeper = store_of(root), keeper_of(root)
        for number in range(3):
            data = counter_stream(MIB + number)
            store.adopt_bytes(data, sha1_of(data))
            keeper.remove(sha1_of(data))
        store.close()
        assert keeper.make_room() == (0, 0)
        with (root / "filler").open("wb", buffering=0) as filler:
            while not emptying.is_low(root):
                filler.write(bytes(MIB // 8))
        assert keeper.make_room()[0] == 1
        assert not emptying.is_low(root)
        assert len(list(keeper.list_trash())) == 2
        keeper.index.close()


def test_a_note_that_finds_no_room_does_not_keep_the_trash_from_being_emptied(tmp_path: Path,
                                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    removed = store_of(tmp_path).put_bytes(b"removed without a note").sha1
    keeper = keeper_of(tmp_path)
    keeper.remove(removed, force=True)
    copy = fetch(tmp_path, b"copy")
    keeper.remove(copy)

    def refuse(*_: object) -> object:
        raise DiskFull(what="a note", path="it", free=0, needed=1)

    with monkeypatch.context() as patch:
        patch.setattr(keeper.index, "changing", refuse)
        assert keeper.empty_trash(before=time.time() + HOUR - 1, seen_at=time.time() + HOUR) == (1, 4)
    assert [found.sha1 for found in keeper.list_trash()] == [removed]


def test_what_a_dead_process_had_moved_is_noted_as_the_copy_it_was(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, b"copy")
    _intend(tmp_path, sha1)
    Trash(tmp_path, durable=False).take(sha1)
    keeper = keeper_of(tmp_path)
    keeper.settle()
    with keeper.index.looking() as rows:
        assert [name for name, _ in rows.oldest_copies_in_trash(10)] == [sha1]


# --- the index


def test_a_copy_that_came_while_the_clock_was_ahead_goes_like_any_other(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, b"copy")
    years_ahead = time.time() + 1e9
    path = path_of(tmp_path, sha1)
    os.utime(path, ns=(int(years_ahead * 1e9), path.stat().st_mtime_ns))
    with CacheIndex(tmp_path).changing() as rows:
        rows.note_use(sha1, int(years_ahead * 1000))
    assert evict_all(tmp_path, later_seconds=0) == set()  # as if it was used now
    assert evict_all(tmp_path, later_seconds=700) == {sha1}


def test_a_time_of_access_that_is_ahead_is_put_right_by_the_next_use(tmp_path: Path) -> None:
    path = path_of(tmp_path, fetch(tmp_path, b"copy"))
    os.utime(path, ns=(2 * 10**18, path.stat().st_mtime_ns))
    now = time.time()
    note_use(path, now)
    assert abs(path.stat().st_atime - now) < 1


def test_an_older_index_does_not_make_a_claimed_file_a_copy_again(tmp_path: Path) -> None:
    data = counter_stream(1000)
    sha1, second = fetch(tmp_path, data), fetch(tmp_path, b"restored")
    put_back = backup(tmp_path)
    store_of(tmp_path).put_bytes(data)
    keeper_of(tmp_path).remove(second)
    keeper_of(tmp_path).restore(second)
    put_back()
    assert evict_all(tmp_path) == set()
    assert store_of(tmp_path).verify(sha1).size == 1000
    assert store_of(tmp_path).has(second)


def test_a_row_that_comes_back_after_a_file_was_stored_again_does_not_fit_it(tmp_path: Path) -> None:
    """The row was gone when the file was stored: an older index had been put in place, or a mount did not show it."""
    data = counter_stream(1000)
    sha1, _ = fetch(tmp_path, data), fetch(tmp_path, b"another, so that there is an index")
    put_back = backup(tmp_path)
    with CacheIndex(tmp_path).changing() as rows:
        rows.forget(sha1)
    store_of(tmp_path).put_bytes(data)
    put_back()
    assert sha1 not in evict_all(tmp_path)
    assert store_of(tmp_path).has(sha1)


def test_a_damaged_index_is_to_be_moved_away(tmp_path: Path) -> None:
    fetch(tmp_path, b"copy")
    for path in tmp_path.glob("kachery-fast-cache.db*"):
        path.unlink()
    (tmp_path / "kachery-fast-cache.db").write_bytes(b"no database" * 1000)
    with pytest.raises(DatabaseUnusable, match="Move it away") as caught:
        keeper_of(tmp_path).index.totals()
    assert "backup" not in str(caught.value)


def test_rows_of_files_that_are_gone_are_dropped(tmp_path: Path) -> None:
    path_of(tmp_path, fetch(tmp_path, b"copy")).unlink()
    assert evict_all(tmp_path) == set()
    assert keeper_of(tmp_path).index.totals() == (0, 0)


def test_a_manifest_that_was_pinned_while_its_file_went_is_a_copy_of_its_own(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, counter_stream(300_000))
    manifest = store_of(tmp_path).manifest_for(sha1)[0]
    assert manifest is not None
    keeper_of(tmp_path).pin(manifest)
    assert evict_all(tmp_path) == {sha1}
    assert keeper_of(tmp_path).index.totals().files == 1
    keeper_of(tmp_path).unpin(manifest)
    assert evict_all(tmp_path) == {manifest}
    assert keeper_of(tmp_path).index.totals() == (0, 0)


def test_a_manifest_whose_file_has_no_row_goes_at_last(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, counter_stream(300_000))
    with CacheIndex(tmp_path).changing() as rows:
        rows.execute("DELETE FROM copies WHERE sha1 = ?", (sha1,))
    assert len(evict_all(tmp_path)) == 1
    assert keeper_of(tmp_path).index.totals() == (0, 0)


def test_a_long_eviction_does_not_let_the_log_grow(tmp_path: Path) -> None:
    count = 3000
    with CacheIndex(tmp_path).changing() as rows:
        for number in range(count):
            rows.execute("INSERT INTO copies VALUES (?, 5, 3, '', ?, 0, NULL)", (f"{number:040x}", number))
    evict_all(tmp_path)
    keeper = keeper_of(tmp_path)
    assert keeper.index.totals() == (0, 0)
    log = tmp_path / "kachery-fast-cache.db-wal"
    assert not log.exists() or log.stat().st_size < 8 * 2**20


# --- what cannot be moved, and deaths


def test_a_copy_that_cannot_be_moved_is_passed_over_and_told(tmp_path: Path) -> None:
    large, small = fetch(tmp_path, counter_stream(5000)), fetch(tmp_path, b"small")
    (tmp_path / "trash" / large[:2]).parent.mkdir()
    (tmp_path / "trash" / large[:2]).write_text("not a directory")
    gone: set[str] = set()
    done = keeper_of(tmp_path).evict(0, now=time.time() + LATER, keep_seconds=0,
                                     on_copy=lambda copy: gone.add(copy.sha1))
    assert gone == {small}
    assert (done.failed, done.left_bytes, len(done.reasons)) == (1, 5000, 1)
    assert store_of(tmp_path).has(large)
    with CacheIndex(tmp_path).looking() as rows:
        assert rows.intents() == []


def _intend(root: Path, sha1: str) -> None:
    with CacheIndex(root).changing() as rows:
        copy = rows.find(sha1)
        assert copy is not None
        rows.intend(copy)


def test_a_death_after_the_move_leaves_no_row_of_what_is_in_the_trash(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, b"copy")
    _intend(tmp_path, sha1)
    Trash(tmp_path, durable=False).take(sha1)
    keeper_of(tmp_path).settle()
    assert keeper_of(tmp_path).index.totals() == (0, 0)
    keeper_of(tmp_path).restore(sha1)
    assert evict_all(tmp_path) == set()


def test_a_death_after_the_move_of_what_was_just_stored_is_undone(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, b"copy")
    _intend(tmp_path, sha1)
    store_of(tmp_path).put_bytes(b"copy")
    Trash(tmp_path, durable=False).take(sha1)
    assert keeper_of(tmp_path).empty_trash(before=float("inf")) == (0, 0)
    assert store_of(tmp_path).has(sha1)
    with CacheIndex(tmp_path).looking() as rows:
        assert rows.intents() == []


def store_as_it_goes(root: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Have another process store a file between the last look at it and its move, and the disk refuse to put it back.

    The disk is willing again with ``monkeypatch.undo``.
    """
    take = Trash.take

    def store_and_take(self: Trash, sha1: str) -> Path | None:
        path_of(root, sha1).unlink()
        store_of(root).put_bytes(data)
        return take(self, sha1)

    def refuse(*_: object) -> bool:
        raise DiskError(action="the restoring", path="it", why="Disk quota exceeded")

    monkeypatch.setattr(Trash, "take", store_and_take)
    monkeypatch.setattr(Trash, "put_back", refuse)


def test_what_was_stored_as_it_went_and_could_not_be_put_back_is_put_back_later(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha1 = fetch(tmp_path, b"copy")
    store_as_it_goes(tmp_path, monkeypatch, b"copy")
    done = keeper_of(tmp_path).evict(0, now=time.time() + LATER, keep_seconds=0)
    assert (done.files, done.failed) == (0, 1)
    assert keeper_of(tmp_path).empty_trash(before=float("inf")) == (0, 0)
    monkeypatch.undo()
    keeper_of(tmp_path).settle()
    assert evict_all(tmp_path) == set()
    assert path_of(tmp_path, sha1).read_bytes() == b"copy"
    with CacheIndex(tmp_path).looking() as rows:
        assert rows.intents() == []


@pytest.mark.parametrize("was_copy", [True, False])
def test_what_was_stored_as_it_was_removed_is_put_back_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             was_copy: bool) -> None:
    fetch(tmp_path, b"another, so that there is an index")
    sha1 = fetch(tmp_path, b"data") if was_copy else store_of(tmp_path).put_bytes(b"data").sha1
    store_as_it_goes(tmp_path, monkeypatch, b"data")
    with pytest.raises(DiskError):
        keeper_of(tmp_path).remove(sha1, force=True)
    monkeypatch.undo()
    assert keeper_of(tmp_path).empty_trash(before=float("inf")) == (0, 0)
    assert path_of(tmp_path, sha1).read_bytes() == b"data"
    assert sha1 not in evict_all(tmp_path)


def test_what_is_fetched_while_a_stored_file_could_not_be_put_back_is_no_copy(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha1 = fetch(tmp_path, b"copy")
    store_as_it_goes(tmp_path, monkeypatch, b"copy")
    keeper_of(tmp_path).evict(0, now=time.time() + LATER, keep_seconds=0)
    fetch(tmp_path, b"copy")
    assert evict_all(tmp_path) == set()
    monkeypatch.undo()
    assert evict_all(tmp_path) == set()
    assert store_of(tmp_path).has(sha1)


@pytest.mark.parametrize("was_copy", [True, False])
def test_a_removal_that_did_not_happen_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_copy: bool) -> None:
    sha1 = fetch(tmp_path, b"data") if was_copy else store_of(tmp_path).put_bytes(b"data").sha1
    take = Trash.take

    def store_and_take(self: Trash, sha1: str) -> Path | None:
        path_of(tmp_path, sha1).unlink()
        store_of(tmp_path).put_bytes(b"data")
        return take(self, sha1)

    def lose_and_take(self: Trash, sha1: str) -> Path | None:
        path_of(tmp_path, sha1).unlink()
        return take(self, sha1)

    monkeypatch.setattr(Trash, "take", store_and_take)
    with pytest.raises(StoredMeanwhile):
        keeper_of(tmp_path).remove(sha1, force=True)
    assert store_of(tmp_path).has(sha1)
    monkeypatch.setattr(Trash, "take", lose_and_take)
    with pytest.raises(NotInStore):
        keeper_of(tmp_path).remove(sha1, force=True)


@pytest.mark.parametrize("at_once", [True, False])
def test_of_a_file_kept_on_another_disk_by_a_symbolic_link_the_link_is_removed(tmp_path: Path, at_once: bool) -> None:
    root, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    sha1 = store_of(root).put_bytes(b"original on a larger disk").sha1
    path = path_of(root, sha1)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    keeper_of(root).remove(sha1, force=True, at_once=at_once)
    assert not store_of(root).has(sha1)
    assert elsewhere.read_bytes() == b"original on a larger disk"
    if not at_once:
        keeper_of(root).restore(sha1)
        assert store_of(root).verify(sha1).path.resolve() == elsewhere


def test_removing_does_not_take_what_is_stored_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha1 = store_of(tmp_path).put_bytes(b"first").sha1
    take = Trash.take

    def take_and_store(self: Trash, sha1: str) -> Path | None:
        trashed = take(self, sha1)
        store_of(tmp_path).put_bytes(b"first")
        return trashed

    monkeypatch.setattr(Trash, "take", take_and_store)
    keeper_of(tmp_path).remove(sha1, force=True)
    assert store_of(tmp_path).has(sha1)


def test_a_pin_that_comes_while_a_file_is_removed_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha1 = fetch(tmp_path, b"copy")
    keeper, index = keeper_of(tmp_path), keeper_of(tmp_path).index
    intend = keeper._mover.intend

    def intend_and_pin(*arguments: object) -> None:
        intend(*arguments)  # type: ignore[arg-type]
        arguments[0].execute("INSERT INTO pins VALUES (?)", (sha1,))  # type: ignore[attr-defined]

    monkeypatch.setattr(keeper._mover, "intend", intend_and_pin)
    with pytest.raises(FilePinned):
        keeper.remove(sha1)
    assert store_of(tmp_path).has(sha1)
    index.close()


def test_pinning_what_goes_meanwhile_leaves_no_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha1 = fetch(tmp_path, b"copy")
    keeper = keeper_of(tmp_path)
    pin = keeper.index.pin

    def pin_and_lose(sha1: str, *, pinned: bool) -> bool:
        changed = pin(sha1, pinned=pinned)
        if pinned:
            store_of(tmp_path).remove(sha1)
        return changed

    monkeypatch.setattr(keeper.index, "pin", pin_and_lose)
    with pytest.raises(NotInStore):
        keeper.pin(sha1)
    with keeper.index.looking() as rows:
        assert not rows.is_pinned(sha1)


# --- other users


def as_other_user(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            work()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_others_of_a_shared_store_keep_what_they_fetch_and_see_no_index(request: pytest.FixtureRequest) -> None:
    place = tempfile.TemporaryDirectory(dir="/tmp")  # others may not enter pytest's own
    request.addfinalizer(place.cleanup)
    Path(place.name).chmod(0o755)
    root = Path(place.name) / "store"
    sha1 = fetch(root, b"copy")
    for directory, _, _ in os.walk(root):
        Path(directory).chmod(0o777)

    def work() -> None:
        theirs = fetch(root, b"theirs")
        FileStore(root, durable=False).put_bytes(b"copy")
        keeper = CacheKeeper(root, durable=False)
        assert {listed.kind for listed in keeper.list()} == {Kind.ORIGINAL}
        for act in (lambda: keeper.pin(theirs), lambda: keeper.evict(0, now=time.time(), keep_seconds=0),
                    lambda: keeper.unpin(theirs)):
            with pytest.raises(CacheOfAnother, match="root"):
                act()
        with pytest.raises(OnlyCopyHere):
            keeper.remove(theirs)
        assert keeper.remove(theirs, force=True) == 6
        keeper.restore(theirs)
        bare = CacheKeeper(root / "sha1", durable=False)  # a directory of another, without an index
        with pytest.raises(CacheOfAnother):
            bare.evict(0, now=time.time(), keep_seconds=0)

    assert as_other_user(work) == 0
    assert evict_all(root) == set()  # the other user stored it
    assert store_of(root).has(sha1)
    assert (root / "kachery-fast-cache.db").stat().st_uid == 0


@pytest.fixture
def nobodys_store() -> Iterator[Path]:
    """A storage directory of another user, who is not root, in a place that he may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        root = Path(place) / "store"
        root.mkdir()
        os.chown(root, 65534, 65534)
        yield root


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_what_root_evicts_and_removes_leaves_the_store_to_its_owner(nobodys_store: Path) -> None:
    root = nobodys_store
    assert as_other_user(lambda: [fetch(root, b"copy %d" % number) for number in range(20)]) == 0
    assert len(evict_all(root)) == 20
    CacheKeeper(root, durable=False).restore(sha1_of(b"copy 1"))
    fetch(root, b"fetched by root")
    assert {path.stat().st_uid for path in (root, *root.rglob("*")) if path.is_dir()} == {65534}
    assert {path.stat().st_uid for path in root.glob("kachery-fast-cache.db*")} == {65534}

    def work() -> None:
        fetch(root, b"fetched later")
        assert evict_all(root) == {sha1_of(b"fetched later"), sha1_of(b"fetched by root")}
        assert keeper_of(root).empty_trash(before=float("inf"))[0] == 21

    assert as_other_user(work) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="root is kept from nothing, so the test becomes another user")
@pytest.mark.parametrize("with_log", [False, True])
def test_a_store_that_is_read_only_can_be_listed(nobodys_store: Path, with_log: bool) -> None:
    root = nobodys_store
    copy, original = sha1_of(b"copy"), sha1_of(b"original")

    def fill() -> None:
        store = store_of(root)
        store.adopt_bytes(b"copy", copy)
        store.put_bytes(b"original")
        if not with_log:  # else it is left as by a node that was killed
            store.close()

    assert as_other_user(fill) == 0
    assert (root / "kachery-fast-cache.db-wal").exists() == with_log

    def look() -> None:
        directories = [root, *(path for path in root.rglob("*") if path.is_dir())]
        for directory in directories:
            directory.chmod(0o555)
        keeper = keeper_of(root)
        assert {found.sha1: found.kind for found in keeper.list()} == {copy: Kind.CACHED, original: Kind.ORIGINAL}
        assert keeper.index.totals().files == 1
        assert keeper.evict(0, now=time.time() + LATER, keep_seconds=0, dry_run=True).files == 1
        if with_log:
            assert keeper.evict(0, now=time.time() + LATER, keep_seconds=0).failed == 1
        else:
            with pytest.raises(DiskError):
                keeper.evict(0, now=time.time() + LATER, keep_seconds=0)
        for directory in directories:
            directory.chmod(0o755)
        assert keeper.evict(0, now=time.time() + LATER, keep_seconds=0).files == 1

    assert as_other_user(look) == 0


# --- names and bounds


def without_links(monkeypatch: pytest.MonkeyPatch, code: int = errno.EPERM, *, knows_new: bool = True) -> None:
    """Make the file system one without hard links, and maybe without renames that replace nothing."""
    def refuse(*_: object) -> None:
        raise OSError(code, "refused")

    monkeypatch.setattr(os, "link", refuse)
    if not knows_new:
        monkeypatch.setattr(naming, "rename_new", lambda *_: False)


@pytest.mark.parametrize("knows_new", [True, False])
@pytest.mark.parametrize(("code", "falls_back"), [
    (errno.EPERM, True), (errno.EXDEV, True), (errno.ENOSYS, True), (errno.EACCES, True), (errno.EIO, False)])
def test_only_a_file_system_without_links_is_renamed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int,
                                                        falls_back: bool, knows_new: bool) -> None:
    without_links(monkeypatch, code, knows_new=knows_new)
    (tmp_path / "source").write_text("new")
    if not falls_back:
        with pytest.raises(OSError, match="refused"):
            naming.name_new(tmp_path / "source", tmp_path / "final", durable=False)
        return
    unsure: list[str] = []
    final = tmp_path / "deep" / "final"
    assert naming.name_new(tmp_path / "source", final, durable=False, before_unsure=lambda: unsure.append("told"))
    assert bool(unsure) == (not knows_new)
    (tmp_path / "source").write_text("newer")
    assert not naming.name_new(tmp_path / "source", final, durable=False)
    assert final.read_text() == "new"


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no such call")
def test_a_rename_that_replaces_nothing(tmp_path: Path) -> None:
    source, final = tmp_path / "source", tmp_path / os.fsdecode(b"fin\xffal")
    source.write_text("first")
    if not rename_new(source, final):
        pytest.skip("this file system cannot promise it")
    source.write_text("second")
    with pytest.raises(FileExistsError):
        rename_new(source, final)
    assert final.read_text() == "first"
    with pytest.raises(FileNotFoundError):
        rename_new(source, tmp_path / "none" / "final")


@pytest.mark.parametrize("knows_new", [True, False])
def test_without_links_a_download_is_a_copy_only_where_it_surely_replaced_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows_new: bool) -> None:
    without_links(monkeypatch, errno.ENOSYS, knows_new=knows_new)
    sha1 = fetch(tmp_path, counter_stream(300_000))
    assert evict_all(tmp_path) == ({sha1} if knows_new else set())


@pytest.mark.parametrize("damaged", [True, False])
def test_what_is_stored_while_a_download_gets_its_name_is_not_evicted(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    """Between the last look and the rename, on a file system where only a plain rename is left."""
    data = b"both stored and fetched"
    sha1 = sha1_of(data)
    path = Path(tmp_path, "sha1", sha1[:2], sha1[2:4], sha1[4:6], sha1)
    if damaged:
        store_of(tmp_path).put_bytes(data)
        path.write_bytes(b"torn")
    else:
        without_links(monkeypatch, knows_new=False)
    rename = os.rename
    stored: list[str] = []

    def store_then_rename(source: str | Path, final: str | Path) -> None:
        if Path(final) == path and not stored:
            stored.append(sha1)
            store_of(tmp_path).put_bytes(data)
        rename(source, final)

    monkeypatch.setattr(os, "rename", store_then_rename)
    fetch(tmp_path, data)
    assert stored
    assert evict_all(tmp_path) == set()
    assert path.read_bytes() == data


def test_a_manifest_stored_while_it_is_fetched_is_not_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = counter_stream(300_000)
    link = os.link
    stored: list[str | Path] = []

    def link_then_store(source: str | Path, final: str | Path) -> None:
        link(source, final)
        if not stored:
            stored.append(final)
            store_of(tmp_path).put_bytes(Path(final).read_bytes())

    monkeypatch.setattr(os, "link", link_then_store)
    sha1 = fetch(tmp_path, data)
    manifest = store_of(tmp_path).manifest_for(sha1)[0]
    assert manifest is not None
    assert evict_all(tmp_path) == {sha1}
    assert store_of(tmp_path).has(manifest)


@pytest.mark.parametrize("text", ['maxCacheSizeGiB: !!int ""', "maxCacheSizeGiB: !!bool foo", "a: !!timestamp x",
                                  "maxCacheSizeGiB: " + "9" * 5000, "maxCacheSizeGiB: 0x" + "f" * 5000,
                                  "maxCacheSizeGiB: " + "x" * 5000, "[" * 5000])
def test_a_bound_that_yaml_chokes_on_is_a_short_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "kachery.yaml").write_text(text)
    with pytest.raises(CacheConfigInvalid) as caught:
        quota_of(tmp_path, 0)
    assert len(str(caught.value)) < 600


def test_a_bound_with_an_exponent_counts_and_a_name_alike_is_told(tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "kachery.yaml").write_text("maxCacheSizeGiB: 1e3")
    assert quota_of(tmp_path, 0) == 1000 * 2**30
    (tmp_path / "kachery.yaml").write_text("maxCacheSizeGB: 5")
    assert [quota_of(tmp_path, 0) for _ in range(2)] == [None, None]
    assert caplog.text.count("maxCacheSizeGB") == 1


def test_planning_comes_in_pages_and_meets_each_copy_once(tmp_path: Path) -> None:
    index = CacheIndex(tmp_path)
    with index.changing() as rows:
        for number in range(1000):
            size = 1 + number % 7
            rows.execute("INSERT INTO copies VALUES (?, ?, ?, '', ?, 0, NULL)",
                         (f"{number:040x}", size, size.bit_length(), number // 10))
    plan = [copy.sha1 for copy in index.candidates(now_ms=10**6, before_ms=10**6)]
    assert len(plan) == len(set(plan)) == 1000
