"""Databases with damage anywhere: an error that says so, or what is left of them, and no other exception."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from kachery_fast.errors import DatabaseUnusable, KacheryError
from kachery_fast.store.feeds import FeedLog
from kachery_fast.store.mutables import MutableStore
from kachery_fast.store.takeover import take_over_in_place

from .data import sha1_of
from .legacy_directory import MAIN, append, legacy_directory, set_mutable, snapshot
from .test_cache import keeper_of, store_of

SUBFEED = "a" * 40
OWN = ("kachery-fast-cache.db", "kachery-fast-mutables.db", "kachery-fast-feeds.db")


def whole(root: Path) -> str:
    """Make the three databases; return the id of a feed."""
    with closing(store_of(root)) as files:
        for number in range(20):
            files.adopt_bytes(b"%d" % number, sha1_of(b"%d" % number))
    with mutables(root) as store:
        store.add((f"key {number}", {"value": number}) for number in range(20))
    log = feeds(root)
    feed_id, _ = log.create("diary")
    log.append(feed_id, SUBFEED, [{"number": number} for number in range(50)]).result()
    log.close()
    return feed_id


def mutables(root: Path) -> MutableStore:
    return MutableStore(root, value_size_bytes_max=1000)


def feeds(root: Path) -> FeedLog:
    return FeedLog(root, message_size_bytes_max=1000)


def use_mutables(root: Path) -> None:
    with mutables(root) as store:
        store.get("key 1")
        list(store.items())
        store.set("key 2", 3)


def use_feeds(root: Path, feed_id: str) -> None:
    log = feeds(root)
    try:
        log.feeds()
        log.read(feed_id, SUBFEED, 0, 100, 10**6)
        log.head(feed_id, SUBFEED)
        log.append(feed_id, SUBFEED, [{"x": 1}]).result()
    finally:
        log.close()


def use_cache(root: Path) -> None:
    keeper = keeper_of(root)
    try:
        uses: list[Callable[[], object]] = [
            keeper.index.totals, lambda: list(keeper.list()), lambda: keeper.evict(10, now=1e10, keep_seconds=0),
            lambda: keeper.empty_trash(before=0)]
        for use in uses:
            with suppress(KacheryError):
                use()
    finally:
        keeper.index.close()


def spoil(path: Path, rng: random.Random, bytes_max: int) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(bytes_max):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def test_a_damaged_schema_is_told_as_damage_and_files_are_stored_all_the_same(tmp_path: Path) -> None:
    """Its text is not UTF-8, which the error of SQLite repeats."""
    root = tmp_path / "store"
    feed_id = whole(root)
    for name in OWN:
        path = root / name
        path.write_bytes(path.read_bytes().replace(b"CREATE TABLE", b"CRE\xc6TE TABLE"))
    uses: list[Callable[[], object]] = [lambda: use_mutables(root), lambda: use_feeds(root, feed_id),
                                        keeper_of(root).index.totals]
    for use in uses:
        with pytest.raises(DatabaseUnusable, match="damaged"):
            use()
    with closing(store_of(root)) as store:
        assert store.put_bytes(b"3").sha1 == sha1_of(b"3")
        assert store.adopt_bytes(b"new", sha1_of(b"new")).size == 3


@pytest.mark.parametrize("value", [b"{", b"\xff", b""])
def test_a_row_that_is_not_json_is_told_as_damage(tmp_path: Path, value: bytes) -> None:
    use_mutables(tmp_path)
    with closing(sqlite3.connect(tmp_path / OWN[1])) as connection, connection:
        connection.execute("INSERT INTO mutables VALUES (?, ?)", (b'"key 1"', value))
    with mutables(tmp_path) as store:
        with pytest.raises(DatabaseUnusable, match="malformed row"):
            store.get("key 1")
        with pytest.raises(DatabaseUnusable, match="malformed row"):
            list(store.items())
        assert store.get("key 2") == (True, 3)


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_of_own_databases_is_an_error_of_ours_or_none(tmp_path: Path, seed: int) -> None:
    root, rng = tmp_path / "store", random.Random(seed)
    feed_id = whole(root)
    for name in OWN:
        spoil(root / name, rng, rng.choice([3, 30, 300]))
    use_cache(root)
    with suppress(KacheryError):
        use_mutables(root)
    with suppress(KacheryError):
        use_feeds(root, feed_id)
    with closing(store_of(root)) as store:
        assert store.put_bytes(b"3").sha1 == sha1_of(b"3")


def test_random_damage_of_old_databases_breaks_no_take_over_and_changes_nothing(tmp_path: Path) -> None:
    old = legacy_directory(tmp_path / "old", tmp_path / "elsewhere", large_size_bytes=10)
    append(old.root, [{"number": number} for number in range(20)], subfeed=MAIN)
    for seed in range(20):
        rng, root = random.Random(seed), tmp_path / f"store-{seed}"
        shutil.copytree(old.root, root)
        paths = [root / path.name for path in old.databases]
        for path in paths:
            # The schema is on the first page, and each other page begins with what is most easily misread.
            spoil(path, rng, rng.choice([1, 30, 300]))
            if seed % 4 == 0:
                path.write_bytes(path.read_bytes().replace(b"TABLE", b"T\xc7BLE"))
        before = snapshot(*paths)
        take_over_in_place(root, mutable_size_bytes_max=1000, message_size_bytes_max=1000)
        assert snapshot(*paths) == before


def test_a_name_of_a_feed_that_leads_to_no_feed_is_not_taken(tmp_path: Path) -> None:
    old = legacy_directory(tmp_path / "store", tmp_path / "elsewhere", large_size_bytes=10)
    set_mutable(old.root, {"type": "feed_id_for_name", "feed_name": "odd"}, "no id")
    with closing(sqlite3.connect(old.root / "mutables.db")) as connection, connection:
        connection.execute("INSERT INTO mutables VALUES ('x', ?, ?)",
                           ('{"feed_name":"bad","type":"feed_id_for_name"}', '"\\ud800"'))
    tally = take_over_in_place(old.root, mutable_size_bytes_max=1000, message_size_bytes_max=1000)
    assert tally is not None
    assert (tally.feeds.taken, len(tally.refused)) == (2, 1)
    with mutables(old.root) as store:
        assert store.get({"type": "feed_id_for_name", "feed_name": "odd"}) == (True, "no id")
