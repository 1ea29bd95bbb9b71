"""Cached copies, originals, pins: what may go, what never goes, and what planning costs."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kachery_fast._core import digest_buffer
from kachery_fast.errors import CacheConfigInvalid, FilePinned, NotInStore, NotInTrash, OnlyCopyHere
from kachery_fast.protocol.manifest import make_manifest
from kachery_fast.store import FileStore
from kachery_fast.store.cache import CacheIndex, note_use, score
from kachery_fast.store.eviction import CacheKeeper, Kind
from kachery_fast.store.importing import FileImport
from kachery_fast.store.quota import quota_of
from kachery_fast.store.tally import Tally

from .children import CHUNK_SIZE_BYTES, run_child
from .data import counter_stream, files_below, sha1_of, sound

HOUR = 3600.0


def fetch(root: Path, data: bytes, *, durable: bool = False) -> str:
    """Make bytes a file of the store as a download does."""
    store = FileStore(root, chunk_size_bytes=CHUNK_SIZE_BYTES, durable=durable)
    sha1 = sha1_of(data)
    size, _, chunks = digest_buffer(data, CHUNK_SIZE_BYTES)
    part = store.part_path(sha1)
    part.write_bytes(data)
    store.adopt(part, sha1, manifest=make_manifest(size, sha1, chunks, CHUNK_SIZE_BYTES).encode()
                if len(chunks) > 1 else None)
    return sha1


def keeper_of(root: Path) -> CacheKeeper:
    return CacheKeeper(root, durable=False)


def store_of(root: Path) -> FileStore:
    return FileStore(root, chunk_size_bytes=CHUNK_SIZE_BYTES, durable=False)


def evict_all(root: Path, *, later_seconds: float = HOUR) -> set[str]:
    """Evict whatever may go an hour from now; the names that went."""
    gone: set[str] = set()
    keeper_of(root).evict(0, now=time.time() + later_seconds, keep_seconds=600,
                          on_copy=lambda copy: gone.add(copy.sha1))
    return gone


def age(root: Path, sha1: str, seconds: float) -> None:
    """Make a copy as if it was last used so long ago."""
    used = time.time() - seconds
    path = store_of(root).find(sha1).path
    os.utime(path, ns=(int(used * 1e9), path.stat().st_mtime_ns))
    with CacheIndex(root).changing() as rows:
        rows.note_use(sha1, int(used * 1000))


def test_a_fetched_file_is_a_copy_and_a_stored_one_is_not(tmp_path: Path) -> None:
    fetched = fetch(tmp_path, b"from a channel")
    stored = store_of(tmp_path).put_bytes(b"from here").sha1
    kinds = {listed.sha1: listed.kind for listed in keeper_of(tmp_path).list()}
    assert kinds == {fetched: Kind.CACHED, stored: Kind.ORIGINAL}
    assert evict_all(tmp_path) == {fetched}
    assert not store_of(tmp_path).has(fetched)
    assert store_of(tmp_path).has(stored)


def test_a_store_without_copies_gets_no_index(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.put_bytes(b"x")
    store.put_bytes(b"x")
    assert not keeper_of(tmp_path).index.exists
    assert evict_all(tmp_path) == set()
    assert [listed.kind for listed in keeper_of(tmp_path).list()] == [Kind.ORIGINAL]
    assert not keeper_of(tmp_path).index.exists


@pytest.mark.parametrize("way", ["put_file", "put_files", "put_bytes", "put_stream", "link_file"])
@pytest.mark.parametrize("size", [10, 300_000])
def test_storing_what_was_fetched_makes_it_an_original(tmp_path: Path, way: str, size: int) -> None:
    data = counter_stream(size)
    source = tmp_path / "source"
    source.write_bytes(data)
    root = tmp_path / "store"
    sha1 = fetch(root, data)
    store = store_of(root)
    if way == "put_files":
        store.put_files([source])
    else:
        getattr(store, way)({"put_bytes": data, "put_stream": [data]}.get(way, source))
    assert evict_all(root) == set()
    assert store.verify(sha1).size == size
    assert keeper_of(root).index.totals() == (0, 0)


def test_storing_where_the_index_cannot_be_read_puts_a_file_of_its_own(tmp_path: Path) -> None:
    data = counter_stream(1000)
    sha1 = fetch(tmp_path, data)
    index = tmp_path / "kachery-fast-cache.db"
    kept = {path: path.read_bytes() for path in tmp_path.glob("kachery-fast-cache.db*")}
    before = store_of(tmp_path).find(sha1).path.stat().st_ino
    for path in kept:
        path.unlink()
    index.write_bytes(b"not a database, as far as this user can tell" * 100)
    store_of(tmp_path).put_bytes(data)
    assert store_of(tmp_path).find(sha1).path.stat().st_ino != before
    for path, content in kept.items():
        path.write_bytes(content)
    assert evict_all(tmp_path) == set()  # the row is there, and is of another file
    assert store_of(tmp_path).has(sha1)


def test_a_row_of_a_file_that_was_replaced_behind_its_back_is_not_believed(tmp_path: Path) -> None:
    data = b"fetched, deleted by hand, stored"
    sha1 = fetch(tmp_path, data)
    store_of(tmp_path).find(sha1).path.unlink()
    store_of(tmp_path).put_bytes(data)
    path = store_of(tmp_path).find(sha1).path
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # the inode may be the same again, its time is not
    assert evict_all(tmp_path) == set()
    assert store_of(tmp_path).has(sha1)


def test_a_manifest_goes_with_its_file_and_comes_back_when_needed(tmp_path: Path) -> None:
    data = counter_stream(300_000)
    sha1 = fetch(tmp_path, data)
    manifest_sha1 = store_of(tmp_path).manifest_for(sha1)[0]
    assert manifest_sha1 is not None
    assert evict_all(tmp_path) == {sha1}
    assert [name for name in files_below(tmp_path) if name.startswith("sha1/")] == []
    assert keeper_of(tmp_path).index.totals() == (0, 0)
    keeper_of(tmp_path).restore(sha1)
    assert store_of(tmp_path).manifest_for(sha1)[0] == manifest_sha1
    assert evict_all(tmp_path) == set()  # whoever restores wants to keep


def test_pinned_and_linked_files_stay(tmp_path: Path) -> None:
    root = tmp_path / "store"
    pinned, linked, free = (fetch(root, text) for text in (b"pinned", b"linked", b"free"))
    assert keeper_of(root).pin(pinned)
    assert not keeper_of(root).pin(pinned)
    (tmp_path / "file").write_bytes(b"linked")
    store_of(root).link_file(tmp_path / "file")
    assert evict_all(root) == {free}
    with pytest.raises(FilePinned):
        keeper_of(root).remove(pinned, force=True)
    assert keeper_of(root).unpin(pinned)
    assert not keeper_of(root).unpin(pinned)
    assert evict_all(root) == {pinned}
    assert store_of(root).has(linked)


def test_a_pin_outlives_the_file(tmp_path: Path) -> None:
    sha1 = store_of(tmp_path).put_bytes(b"pinned").sha1
    keeper_of(tmp_path).pin(sha1)
    store_of(tmp_path).remove(sha1)
    fetch(tmp_path, b"pinned")
    assert evict_all(tmp_path) == set()
    with pytest.raises(NotInStore):
        keeper_of(tmp_path).pin("0" * 40)


def test_old_and_large_files_go_first_and_no_more_than_needed(tmp_path: Path) -> None:
    sizes_and_ages = {"small old": (1000, 40 * HOUR), "small new": (1001, HOUR), "large old": (100_001, 30 * HOUR),
                      "large new": (60_000, 2 * HOUR)}
    names = {}
    for name, (size, seconds) in sizes_and_ages.items():
        names[fetch(tmp_path, counter_stream(size))] = name
        age(tmp_path, sha1_of(counter_stream(size)), seconds)
    order: list[str] = []
    keeper = keeper_of(tmp_path)
    keeper.evict(0, now=time.time(), keep_seconds=600, dry_run=True,
                 on_copy=lambda copy: order.append(names[copy.sha1]))
    assert order == ["large old", "large new", "small old", "small new"]
    assert len(list(keeper.list())) == 5  # with one manifest; nothing was done
    done = keeper.evict(3000, now=time.time(), keep_seconds=600)
    assert (done.files, done.left_bytes) == (2, 2001)
    assert score(10, 0, 100) > score(10, 50, 100)
    assert score(10, 0, 100) > score(9, 0, 100)


def test_what_came_or_was_read_a_moment_ago_stays(tmp_path: Path) -> None:
    first, second = fetch(tmp_path, b"first"), fetch(tmp_path, b"second")
    assert evict_all(tmp_path, later_seconds=60) == set()
    for sha1 in (first, second):
        age(tmp_path, sha1, 5 * HOUR)
    note_use(store_of(tmp_path).find(first).path, time.time())
    assert evict_all(tmp_path, later_seconds=0) == {second}


def test_a_reader_goes_on_reading_what_was_evicted(tmp_path: Path) -> None:
    sha1 = fetch(tmp_path, b"being read")
    with store_of(tmp_path).open(sha1) as file:
        keeper_of(tmp_path).evict(0, now=time.time() + HOUR, keep_seconds=0, at_once=True)
        assert file.read() == b"being read"
    assert [name for name in files_below(tmp_path) if sha1 in name] == []


def test_removing_asks_before_what_is_only_here_goes(tmp_path: Path) -> None:
    keeper = keeper_of(tmp_path)
    stored, fetched = store_of(tmp_path).put_bytes(b"only here").sha1, fetch(tmp_path, b"elsewhere too")
    with pytest.raises(OnlyCopyHere):
        keeper.remove(stored)
    assert store_of(tmp_path).has(stored)
    assert keeper.remove(fetched) == 13
    assert keeper.remove(stored, force=True) == 9
    with pytest.raises(NotInStore):
        keeper.remove(stored)
    assert {trashed.sha1 for trashed in keeper.trash.list()} == {stored, fetched}
    assert keeper.restore(stored).path.read_bytes() == b"only here"
    assert keeper.empty_trash(before=time.time() - HOUR) == (0, 0)
    assert keeper.empty_trash(before=time.time() + HOUR) == (1, 13)
    with pytest.raises(NotInTrash):
        keeper.restore(fetched)
    assert keeper.remove(stored, at_once=True, force=True) == 9
    assert list(keeper.trash.list()) == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=st.lists(st.tuples(st.sampled_from(["fetch", "put", "link", "pin", "unpin", "evict", "trash", "remove"]),
                               st.integers(0, 3)), max_size=20))
def test_eviction_never_touches_what_is_pinned_linked_or_original(
        tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int]]) -> None:
    root = tmp_path_factory.mktemp("store")
    data = [b"%d" % number * (number + 1) for number in range(4)]
    sha1s = [sha1_of(text) for text in data]
    (outside := root / "outside").mkdir()
    kept: set[str] = set()
    pinned: set[str] = set()
    for act, number in acts:
        sha1 = sha1s[number]
        if act == "fetch":
            fetch(root, data[number])
        elif act in ("put", "link"):
            (outside / sha1).write_bytes(data[number])
            getattr(store_of(root), f"{act}_file")(outside / sha1)
            kept.add(sha1)
        elif act == "pin" and store_of(root).has(sha1):
            keeper_of(root).pin(sha1)
            pinned.add(sha1)
        elif act == "unpin":
            keeper_of(root).unpin(sha1)
            pinned.discard(sha1)
        elif act == "remove" and store_of(root).has(sha1):
            store_of(root).remove(sha1)
            kept.discard(sha1)
            pinned.discard(sha1) if keeper_of(root).unpin(sha1) else None
        elif act == "trash" and sha1 in {trashed.sha1 for trashed in keeper_of(root).trash.list()}:
            keeper_of(root).restore(sha1)
            kept.add(sha1)
        else:
            before = {listed.sha1 for listed in keeper_of(root).list()}
            assert evict_all(root) == before - kept - pinned
        assert all(store_of(root).has(one) for one in kept | pinned)


def test_storing_while_everything_is_evicted_loses_nothing(tmp_path: Path) -> None:
    data = [b"%d" % number * 50 for number in range(150)]
    for text in data:
        fetch(tmp_path, text)
    threads = [threading.Thread(target=evict_all, args=(tmp_path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    store = store_of(tmp_path)
    for text in data:
        store.put_bytes(text)
    for thread in threads:
        thread.join()
    assert all(store.has(sha1_of(text)) for text in data)
    assert evict_all(tmp_path) == set()


def test_death_at_each_system_call_of_an_eviction_loses_no_original(tmp_path: Path) -> None:
    source = tmp_path / "source.dat"
    source.write_bytes(counter_stream(300_000))
    source.with_suffix(".small").write_bytes(b"small")
    (tmp_path / "roots").mkdir()
    lines = run_child("stages", "evict", tmp_path / "roots", source)
    assert [line.split()[1] for line in lines] == ["killed"] * (len(lines) - 1) + ["done"]
    assert len(lines) > 10
    for line in lines:
        root = Path(line.split()[0])
        sound(root)
        store = store_of(root)
        evict_all(root)
        stored = store.put_file(source)
        assert evict_all(root) == set()
        store.verify(stored.sha1)


def test_planning_costs_by_what_goes_and_not_by_what_there_is(tmp_path: Path) -> None:
    steps = {}
    for count in (1_000, 100_000):
        index = CacheIndex(tmp_path / str(count))
        assert not index.pin("0" * 40, pinned=False)
        with index.changing() as rows:
            assert rows._connection is not None
            rows._connection.executemany(
                "INSERT INTO copies VALUES (?, ?, ?, '', ?, 0, NULL)",
                ((f"{number:040x}", 1 + number % 5000, (1 + number % 5000).bit_length(), number)
                 for number in range(count)))
        assert index.totals().files == count
        with index._open().reading() as connection:
            done = [0]

            def count_step(done: list[int] = done) -> None:
                done[0] += 1

            connection.set_progress_handler(count_step, 1)
        plan = index.candidates(now_ms=10**9, before_ms=10**9)
        assert len([next(plan) for _ in range(100)]) == 100
        plan.close()  # type: ignore[attr-defined]
        steps[count] = done[0]
        index.close()
    assert 0 < steps[100_000] < 2 * steps[1_000] < 20_000


@pytest.mark.parametrize(("text", "quota"), [
    (None, None), ("", None), ("other: 1", None), ("maxCacheSizeGiB: 200", 200 * 2**30),
    ("maxCacheSizeGiB: 0.5", 2**29), ("maxCacheSizeGiB: 0", 0), ("maxCacheSizeGiB:", None),
])
def test_the_bound_of_2022_is_honoured_unless_ours_is_given(
        tmp_path: Path, text: str | None, quota: int | None) -> None:
    if text is not None:
        (tmp_path / "kachery.yaml").write_text(text)
    assert quota_of(tmp_path, 0) == quota
    assert quota_of(tmp_path, 123) == 123


@pytest.mark.parametrize("text", ["maxCacheSizeGiB: a lot", "maxCacheSizeGiB: -1", "maxCacheSizeGiB: .nan", "- 1", "{",
                                  "maxCacheSizeGiB: .inf", "maxCacheSizeGiB: true", "\x00"])
def test_a_bound_that_makes_no_sense_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "kachery.yaml").write_text(text)
    with pytest.raises(CacheConfigInvalid, match=r"kachery\.yaml"):
        quota_of(tmp_path, 0)


def test_what_is_imported_from_another_directory_is_no_copy_any_more(tmp_path: Path) -> None:
    data = counter_stream(1000)
    store_of(tmp_path / "old").put_bytes(data)
    root = tmp_path / "store"
    sha1 = fetch(root, data)
    for dry_run in (True, False):
        FileImport(tmp_path / "old", root, Tally(), chunk_size_bytes=CHUNK_SIZE_BYTES, fingerprint_size_bytes=1024,
                   dry_run=dry_run).run()
        assert keeper_of(root).index.totals().files == int(dry_run)
    assert evict_all(root) == set()
    assert store_of(root).has(sha1)
