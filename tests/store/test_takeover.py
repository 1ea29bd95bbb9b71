"""A directory of 2022 is taken over: nothing is lost, nothing of it is written, and a key is never let loose."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import FeedNotWritable
from kachery_fast.protocol import feeds as rules
from kachery_fast.store.feeds import FeedLog
from kachery_fast.store.legacy import WORK_PREFIX, OldDatabase
from kachery_fast.store.mutables import ADMITTED_KEY, MutableStore
from kachery_fast.store.takeover import PROGRESS_TEXT, take_over_in_place
from kachery_fast.store.takeover_marker import MARKER_NAME
from kachery_fast.store.tally import Tally

from .legacy_directory import (
    MAIN,
    OTHER_FEED,
    OWN_FEED,
    OWN_SEED,
    Legacy,
    append,
    legacy_directory,
    set_mutable,
    snapshot,
)

MANY = 1 << 40


@pytest.fixture
def old(tmp_path: Path) -> Legacy:
    return legacy_directory(tmp_path / "store", tmp_path / "elsewhere", large_size_bytes=1000)


def take(root: Path, size_bytes_max: int = 1 << 20) -> Tally | None:
    return take_over_in_place(root, mutable_size_bytes_max=size_bytes_max, message_size_bytes_max=1 << 20)


def taken(root: Path, size_bytes_max: int = 1 << 20) -> Tally:
    found = take(root, size_bytes_max)
    assert found is not None
    return found


def opened(root: Path) -> FeedLog:
    return FeedLog(root, message_size_bytes_max=1 << 20)


def mutables(root: Path) -> list[tuple[Any, Any]]:
    with MutableStore(root, value_size_bytes_max=1 << 20) as store:
        return list(store.items())


def contents(log: FeedLog, feed_id: str = OWN_FEED, subfeed: str = MAIN) -> list[Any]:
    signed = log.read(feed_id, subfeed, 0, MANY, MANY)
    found = rules.extend(rules.Tail(feed_id, subfeed), 0, [json.loads(message) for message in signed], lambda _: None)
    assert isinstance(found, rules.Extension)
    assert found.error is None
    return [rules.payload(message) for message in signed]


def change(path: Path, statement: str, *arguments: Any) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, arguments)


ALL = [{"i": number} for number in range(700)]


def test_everything_is_taken_and_no_byte_of_the_old_files_changes(old: Legacy) -> None:
    before, names = snapshot(*old.databases), {path.name for path in old.root.iterdir()}
    tally = taken(old.root)
    assert tally.refused == []
    assert (tally.mutables.taken, tally.feeds.taken, tally.messages.taken) == (3, 2, 704)
    assert snapshot(*old.databases) == before
    new = {path.name for path in old.root.iterdir()} - names
    assert new == {"kachery-fast-mutables.db", "kachery-fast-feeds.db", MARKER_NAME, "tmp"}
    found = {json.dumps(key): value for key, value in mutables(old.root)}
    assert found['"greeting"'] == "grüß dich 😀"
    assert found['{"a": true, "b": [1, 2.5, null]}'] == {"x": 1}
    assert found['{"feed_name": "diary", "type": "feed_id_for_name"}'] == OWN_FEED
    with closing(opened(old.root)) as log:
        assert contents(log) == ALL
        assert log.find("diary") == OWN_FEED
        assert log.append(OWN_FEED, MAIN, [{"new": 1}]).result().first == 700
        assert contents(log) == [*ALL, {"new": 1}]
        assert len(contents(log, OTHER_FEED)) == 3
        with pytest.raises(FeedNotWritable):
            log.append(OTHER_FEED, MAIN, [{}]).result()


def test_private_keys_are_neither_mutables_nor_in_the_marker(old: Legacy) -> None:
    taken(old.root)
    assert OWN_SEED.hex() not in json.dumps(mutables(old.root)) + (old.root / MARKER_NAME).read_text()


def test_codes_that_the_old_daemon_admitted_are_not_taken_and_those_of_this_node_stay(
        old: Legacy, caplog: pytest.LogCaptureFixture) -> None:
    set_mutable(old.root, ADMITTED_KEY, ["code-of-2022"])
    ((what, why),) = taken(old.root).refused
    assert ADMITTED_KEY in what
    assert f"kachery-fast mutable set --parse '\"{ADMITTED_KEY}\"'" in why
    assert "code-of-2022" not in what + why + caplog.text + (old.root / MARKER_NAME).read_text()
    with MutableStore(old.root, value_size_bytes_max=1000) as store:
        assert store.get(ADMITTED_KEY) == (False, None)
        store.set(ADMITTED_KEY, ["admitted-here"])
    set_mutable(old.root, "more", 1)
    assert taken(old.root).mutables.taken == 1
    assert (ADMITTED_KEY, ["admitted-here"]) in mutables(old.root)


def test_an_empty_list_of_codes_is_no_refusal(old: Legacy) -> None:
    set_mutable(old.root, ADMITTED_KEY, [])
    assert taken(old.root).refused == []


def test_a_second_start_looks_at_nothing_and_a_changed_file_is_looked_at_anew(old: Legacy) -> None:
    taken(old.root)
    with MutableStore(old.root, value_size_bytes_max=1000) as store:
        store.set("greeting", "newer")
    assert take(old.root) is None
    append(old.root, [{"later": 1}])
    tally = taken(old.root)
    assert (tally.messages.taken, tally.messages.here, tally.mutables.taken, tally.refused) == (1, 704, 0, [])
    assert ("greeting", "newer") in mutables(old.root)
    with closing(opened(old.root)) as log:
        assert contents(log)[-1] == {"later": 1}


def test_a_second_history_of_the_old_daemon_does_not_cost_our_own_messages(old: Legacy) -> None:
    taken(old.root)
    with closing(opened(old.root)) as log:
        log.append(OWN_FEED, MAIN, [{"ours": 1}]).result()
    append(old.root, [{"theirs": 1}])
    tally = taken(old.root)
    assert "message 700 is not the one that this node has" in tally.refused[0][1]
    with closing(opened(old.root)) as log:
        assert contents(log) == [*ALL, {"ours": 1}]
        log.append(OWN_FEED, MAIN, [{"ours": 2}]).result()


def test_a_wrong_signature_keeps_the_good_prefix_and_the_key_is_not_taken(
        old: Legacy, caplog: pytest.LogCaptureFixture) -> None:
    change(old.databases[1], "UPDATE subfeedMessages SET message = replace(message, '\"i\":600', '\"i\":601')"
                             " WHERE position = 600 AND feedId = ?", OWN_FEED)
    before = snapshot(*old.databases)
    caplog.set_level(logging.INFO)
    tally = taken(old.root)
    assert len(tally.refused) == 1
    assert "did not sign it" in tally.refused[0][1]
    assert "did not sign it" in caplog.text
    assert snapshot(*old.databases) == before
    with closing(opened(old.root)) as log:
        assert contents(log) == ALL[:600]
        with pytest.raises(FeedNotWritable):
            log.append(OWN_FEED, MAIN, [{}]).result()
        assert len(contents(log, OTHER_FEED)) == 3
    caplog.clear()
    assert take(old.root) is None
    assert "did not sign it" in caplog.text


def test_a_missing_message_is_a_refusal(old: Legacy) -> None:
    change(old.databases[1], "DELETE FROM subfeedMessages WHERE position = 100 AND feedId = ?", OWN_FEED)
    tally = taken(old.root)
    assert "message 100 is missing" in tally.refused[0][1]
    with closing(opened(old.root)) as log:
        assert contents(log) == ALL[:100]
        assert not log.owns(OWN_FEED)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "page", "missing"])
def test_a_damaged_feeds_db_is_reported_and_its_feeds_are_not_writable_until_it_is_whole(
        old: Legacy, damage: str) -> None:
    path = old.databases[1]
    whole = path.read_bytes()
    pages = len(whole) // 4096
    path.write_bytes({"truncated": whole[:pages // 2 * 4096], "garbage": b"nonsense" * 1000, "empty": b"",
                      "page": whole[:-8192] + b"\xff" * 8192, "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
    before = snapshot(*(each for each in old.databases if each.exists()))
    tally = taken(old.root)
    assert any(what == str(path) for what, _ in tally.refused), tally.refused
    assert tally.mutables.taken == 3
    assert snapshot(*(each for each in old.databases if each.exists())) == before
    with closing(opened(old.root)) as log:
        assert not log.owns(OWN_FEED)
    path.write_bytes(whole)
    assert taken(old.root).refused == []
    with closing(opened(old.root)) as log:
        assert contents(log) == ALL
        log.append(OWN_FEED, MAIN, [{}]).result()


def test_a_damaged_mutables_db_is_reported_and_the_messages_are_taken(old: Legacy) -> None:
    old.databases[0].write_bytes(b"nonsense" * 1000)
    tally = taken(old.root)
    assert tally.refused[0][0] == str(old.databases[0])
    assert tally.messages.taken == 704


@pytest.mark.parametrize(("number", "code"), [(0, errno.EACCES), (1, errno.EACCES), (1, errno.EIO)])
def test_a_file_that_cannot_be_read_is_told_as_that_and_tried_again_at_the_next_start(
        old: Legacy, monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
    path, open_file = old.databases[number], os.open

    def refuse(name: Any, *arguments: Any, **options: Any) -> int:
        if name == path:
            raise OSError(code, os.strerror(code))
        return open_file(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        for _ in range(2):
            (what, why), = taken(old.root).refused[:1]
            assert what == str(path)
            assert f"cannot be read ({os.strerror(code)})" in why
            assert "damaged" not in why
            assert "backup" not in why
            assert ("chmod u+r" in why) == (code == errno.EACCES)
    tally = taken(old.root)
    assert tally.refused == []
    with closing(opened(old.root)) as log:
        assert contents(log) == ALL
        assert log.owns(OWN_FEED)
    assert take(old.root) is None


def test_an_error_of_the_disk_while_rows_are_read_is_not_remembered(
        old: Legacy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: OldDatabase) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(OldDatabase, "_check", fail)
        assert "could not be read this time" in taken(old.root).refused[0][1]
    assert taken(old.root).refused == []


@pytest.mark.parametrize("name", ["kachery-fast-mutables.db", "kachery-fast-feeds.db"])
def test_a_database_of_ours_that_was_lost_is_filled_again(old: Legacy, name: str) -> None:
    taken(old.root)
    assert take(old.root) is None
    for path in old.root.glob(f"{name}*"):
        path.unlink()
    opened(old.root).close()  # a new one in its place, perhaps of the same inode
    MutableStore(old.root, value_size_bytes_max=1000).close()
    tally = taken(old.root)
    assert tally.refused == []
    assert len(mutables(old.root)) == 3
    with closing(opened(old.root)) as log:
        assert contents(log) == ALL
        assert log.find("diary") == OWN_FEED
        log.append(OWN_FEED, MAIN, [{}]).result()
    assert take(old.root) is None


def test_a_mutable_that_was_too_large_is_taken_when_the_setting_allows_it(old: Legacy) -> None:
    set_mutable(old.root, "long", "x" * 1000)
    assert "mutable_size_bytes_max" in taken(old.root, 500).refused[0][1]
    assert take(old.root, 1001) is None
    tally = taken(old.root, 1002)
    assert (tally.refused, tally.mutables.taken) == ([], 1)
    assert take(old.root, 2000) is None


def test_another_mode_of_an_old_file_has_it_looked_at_anew(old: Legacy) -> None:
    taken(old.root)
    old.databases[1].chmod(0o640)
    assert taken(old.root).refused == []


def test_mutables_are_taken_in_batches(old: Legacy, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2500):
        change(old.databases[0], "INSERT INTO mutables VALUES (?, ?, '1')", str(number), str(number))
    for number in range(5):
        change(old.databases[0], "INSERT INTO mutables VALUES (?, ?, ?)", f"long {number}", f'"long {number}"',
               json.dumps("x" * 2_500_000))
    lengths, add = [], MutableStore.add

    def count(store: MutableStore, pairs: Any) -> Any:
        lengths.append(len(pairs))
        return add(store, pairs)

    monkeypatch.setattr(MutableStore, "add", count)
    monkeypatch.setattr("kachery_fast.store.takeover._BATCH_MUTABLES_MAX", 1000)
    tally = taken(old.root, 4_000_000)
    assert tally.mutables.taken == sum(lengths) == 2508
    assert max(lengths) <= 1000
    assert len(lengths) >= 5


def test_a_long_take_over_says_how_far_it_is(
        old: Legacy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("kachery_fast.store.takeover._PROGRESS_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    taken(old.root)
    lines = [record.getMessage() for record in caplog.records if PROGRESS_TEXT in record.getMessage()]
    assert lines[0].endswith("so far 0 mutables, 0 messages")  # while the old file is read and checked
    assert any(line.endswith("so far 3 mutables, 500 messages") for line in lines)


def test_a_take_over_ends_wherever_it_is_told_to_and_is_taken_up_again(old: Legacy) -> None:
    """Also within SQLite, which keeps what a callback raises to itself, and with copies of databases under way."""
    (old.root / "feeds.db-wal").write_bytes(b"x" * 100)
    left = [0]

    class Ended(Exception):
        pass

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Ended

    def take_until_told(ticks: int) -> None:
        left[0] = ticks
        take_over_in_place(old.root, mutable_size_bytes_max=1 << 20, message_size_bytes_max=1 << 20, check=check)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kachery_fast.store.legacy._CALL_BACK_STEPS", 50)
        for ticks in (0, 1, 2, 3, 5, 10, 20, 50, 100, 200):
            with pytest.raises(Ended):
                take_until_told(ticks)
            assert not list(old.root.glob(f"{WORK_PREFIX}*"))
            assert not (old.root / MARKER_NAME).exists()
    take_until_told(10**9)
    with closing(opened(old.root)) as log:
        assert log.owns(OWN_FEED)
        assert contents(log) == ALL


def test_rows_that_are_not_of_2022_are_refused_one_by_one(old: Legacy) -> None:
    for key, value in (("not json", "1"), ('{"type":"feedConfig","feedId":"00"}', '{"privateKey":"11"}'),
                       ('"key"', "NaN"), (b"\xff\xfe", "1")):
        change(old.databases[0], "INSERT INTO mutables VALUES (?, ?, ?)", str(key), key, value)
    change(old.databases[1], "INSERT INTO subfeedMessages VALUES ('x', 'y', 0, 'z')")
    tally = taken(old.root)
    assert len(tally.refused) == 5
    assert (tally.mutables.taken, tally.messages.taken) == (3, 704)


def test_a_transaction_that_a_killed_daemon_left_half_done_is_rolled_back_in_a_copy(old: Legacy) -> None:
    code = f"""
import os, sqlite3
connection = sqlite3.connect({str(old.databases[1])!r}, isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
connection.execute("UPDATE subfeedMessages SET message = 'torn'")
os.kill(os.getpid(), {signal.SIGKILL})
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
    journal = old.root / "feeds.db-journal"
    assert journal.stat().st_size > 0
    before = snapshot(*old.databases, journal)
    assert taken(old.root).refused == []
    assert snapshot(*old.databases, journal) == before
    assert not list(old.root.glob(".takeover-*"))
    with closing(opened(old.root)) as log:
        assert contents(log) == ALL


def test_what_a_killed_start_left_is_removed(old: Legacy) -> None:
    (old.root / ".takeover-x").mkdir()
    (old.root / ".takeover-x" / "mutables.db").write_bytes(b"keys")
    taken(old.root)
    assert not (old.root / ".takeover-x").exists()


def test_kill_at_any_moment_and_a_second_start_give_the_same(tmp_path: Path) -> None:
    code = ("import sys; from pathlib import Path; from kachery_fast.store.takeover import take_over_in_place\n"
            "print('ready', flush=True); take_over_in_place(Path(sys.argv[1]), mutable_size_bytes_max=1000,"
            " message_size_bytes_max=1000)")
    for number in range(6):
        old = legacy_directory(tmp_path / str(number), tmp_path / "elsewhere", large_size_bytes=10)
        before = snapshot(*old.databases)
        with subprocess.Popen([sys.executable, "-c", code, str(old.root)], stdout=subprocess.PIPE,
                              env=dict(os.environ)) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            # Real time on purpose: the moment of death is what is tried.
            time.sleep(number * 0.03)
            child.kill()
        take(old.root)
        assert snapshot(*old.databases) == before
        assert len(mutables(old.root)) == 3
        with closing(opened(old.root)) as log:
            assert contents(log) == ALL
            assert log.owns(OWN_FEED)
            assert log.find("diary") == OWN_FEED


def test_a_directory_that_is_not_of_2022_is_left_alone(tmp_path: Path) -> None:
    assert take(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
