"""The small databases: durable, whole or not at all, and clear about what is wrong with them."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from kachery_fast.errors import DatabaseUnusable, DiskError, DiskFull, InvalidArgument
from kachery_fast.store.database import Database
from kachery_fast.store.writing import GroupWriter

from ..native.disks import MIB, mounted
from ..programs import need_program, need_root
from .children import PROJECT

STEPS = [["CREATE TABLE things (id INTEGER PRIMARY KEY, thing TEXT NOT NULL)"]]
NEXT_STEPS = [*STEPS, ["ALTER TABLE things ADD COLUMN size INTEGER NOT NULL DEFAULT 0",
                       "CREATE INDEX things_by_size ON things (size)"]]
FOREIGN = "import sys, time; from tests.store.test_database import hold; hold(sys.argv[1])"


def put(database: Database, *things: str) -> None:
    with database.writing() as connection:
        connection.executemany("INSERT INTO things (thing) VALUES (?)", [(thing,) for thing in things])


def things(database: Database) -> list[str]:
    with database.reading() as connection:
        return [row[0] for row in connection.execute("SELECT thing FROM things ORDER BY id")]


def hold(path: str) -> None:
    """Begin to write, and stay there until the standard input ends."""
    with closing(Database(Path(path), STEPS)) as database, database.writing():
        os.write(1, b"held\n")
        sys.stdin.read()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "things.db"


def test_a_new_database_is_for_its_owner_alone(path: Path) -> None:
    with closing(Database(path, STEPS)) as database:
        put(database, "a")
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {"things.db": 0o600, "things.db-wal": 0o600, "things.db-shm": 0o600}


def test_a_database_that_others_could_read_is_made_private(path: Path) -> None:
    Database(path, STEPS).close()
    path.chmod(0o644)
    Database(path, STEPS).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_root_leaves_a_new_database_to_the_owner_of_the_directory(path: Path) -> None:
    need_root()
    path.parent.mkdir()
    os.chown(path.parent, 12345, 12345)
    with closing(Database(path, STEPS)) as database:
        put(database, "a")
        assert {file.stat().st_uid for file in path.parent.iterdir()} == {12345}


def test_what_was_written_is_there_after_reopening(path: Path) -> None:
    with closing(Database(path, STEPS)) as database:
        put(database, "a", "b")
        assert things(database) == ["a", "b"]
    with closing(Database(path, STEPS)) as database:
        assert things(database) == ["a", "b"]


def test_each_transaction_is_flushed(path: Path) -> None:
    with closing(Database(path, STEPS)) as database, database.writing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_exception_takes_the_transaction_back(path: Path) -> None:
    with closing(Database(path, STEPS)) as database:
        with pytest.raises(sqlite3.IntegrityError), database.writing() as connection:
            connection.executemany("INSERT INTO things (thing) VALUES (?)", [("half",), (None,)])
        assert things(database) == []
        put(database, "a")
        assert things(database) == ["a"]


def test_a_reader_sees_one_state_while_others_write(path: Path) -> None:
    with closing(Database(path, STEPS)) as database:
        put(database, "a")
        with database.reading() as connection:
            assert connection.execute("SELECT count(*) FROM things").fetchone() == (1,)
            put(database, "b")
            assert connection.execute("SELECT count(*) FROM things").fetchone() == (1,)
        assert things(database) == ["a", "b"]


def test_a_reader_cannot_write(path: Path) -> None:
    with closing(Database(path, STEPS)) as database, pytest.raises(DiskError), database.reading() as connection:
        connection.execute("INSERT INTO things (thing) VALUES ('a')")


def test_many_threads_may_open_write_and_read_at_once(path: Path) -> None:
    def work(number: int) -> None:
        with closing(Database(path, STEPS)) as database:
            put(database, f"{number}")
            assert f"{number}" in things(database)

    with ThreadPoolExecutor(12) as threads:
        list(threads.map(work, range(36)))
    with closing(Database(path, STEPS)) as database:
        assert sorted(things(database), key=int) == [str(number) for number in range(36)]


def test_many_processes_may_make_it_at_once(path: Path) -> None:
    program = ("import sys; from pathlib import Path; from tests.store.test_database import *;"
               "sys.stdin.readline(); database = Database(Path(sys.argv[1]), STEPS); put(database, 'x');"
               "database.close()")
    children = [subprocess.Popen([sys.executable, "-c", program, path], cwd=PROJECT, stdin=subprocess.PIPE, text=True)
                for _ in range(4)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        child.communicate(timeout=120)
    assert [child.returncode for child in children] == [0, 0, 0, 0]
    with closing(Database(path, STEPS)) as database:
        assert things(database) == ["x"] * 4


# --- versions


def test_an_older_database_is_brought_up_and_keeps_its_rows(path: Path) -> None:
    with closing(Database(path, STEPS)) as database:
        put(database, "a")
    for _ in range(2):
        with closing(Database(path, NEXT_STEPS)) as database, database.reading() as connection:
            assert connection.execute("SELECT thing, size FROM things").fetchall() == [("a", 0)]


def test_a_step_that_fails_leaves_the_old_version(path: Path) -> None:
    with closing(Database(path, STEPS)) as database:
        put(database, "a")
    with pytest.raises(DiskError):
        Database(path, [*STEPS, ["CREATE TABLE more (id INTEGER PRIMARY KEY)", "NO SQL"]])
    with closing(Database(path, STEPS)) as database, database.reading() as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'more'").fetchone() == (0,)


def test_a_newer_database_is_refused_and_left_alone(path: Path) -> None:
    Database(path, NEXT_STEPS).close()
    before = path.read_bytes()
    with pytest.raises(DatabaseUnusable, match="version 2, and this program knows 1") as caught:
        Database(path, STEPS)
    assert caught.value.exit_code == 6
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(DatabaseUnusable, match="another program's"):
        Database(path, STEPS)
    assert path.read_bytes() == before


# --- damage


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(DatabaseUnusable, match="damaged"):
        Database(path, STEPS)
    assert path.read_bytes() == b"not a database" * 1000


def test_damage_within_is_said_and_nothing_is_written(path: Path) -> None:
    with closing(Database(path, STEPS)) as database:
        put(database, *("x" * 500 for _ in range(1000)))
    data = bytearray(path.read_bytes())
    data[4096 * 2:] = bytes(len(data) - 4096 * 2)
    path.write_bytes(data)
    with closing(Database(path, STEPS)) as database:
        with pytest.raises(DatabaseUnusable, match="damaged"):
            things(database)
        with pytest.raises(DatabaseUnusable, match="damaged"):
            put(database, "y")
    assert path.read_bytes() == data


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_that_was_removed_takes_nothing_more(path: Path, replace: bool) -> None:
    with closing(Database(path, STEPS)) as database:
        put(database, "a")
        path.rename(path.with_suffix(".away"))
        if replace:
            path.write_bytes(b"")
        with pytest.raises(DatabaseUnusable, match="removed or replaced"):
            put(database, "b")


def test_a_log_cut_off_anywhere_leaves_whole_transactions(path: Path, tmp_path: Path) -> None:
    with closing(Database(path, STEPS)) as database:
        with database.writing() as connection:
            connection.execute("INSERT INTO things (thing) VALUES ('first')")
        put(database, *("y" * 3000 for _ in range(5)))
        put(database, *("z" * 3000 for _ in range(5)))
        main, journal = path.read_bytes(), path.with_name("things.db-wal").read_bytes()
    counts = []
    for number, cut in enumerate([*range(0, len(journal), 1031), len(journal)]):
        copy = tmp_path / f"{number}.db"
        copy.write_bytes(main)
        copy.chmod(0o600)
        copy.with_name(f"{number}.db-wal").write_bytes(journal[:cut] + b"\xa5" * (number % 3 * 700))
        with closing(Database(copy, STEPS)) as database:
            counts.append(len(things(database)))
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 6, 11}


# --- the disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    with mounted(tmp_path / "disk", "tmpfs", 2 * MIB) as place:
        yield place


def _fill(database: Database, written: list[str]) -> None:
    for number in range(1000):
        put(database, f"{number}" + "x" * 5000)
        written.append(f"{number}" + "x" * 5000)


def test_a_full_disk_loses_nothing_and_is_got_over(disk: Path) -> None:
    filler = disk / "filler"
    filler.write_bytes(bytes(1_500_000))
    with closing(Database(disk / "things.db", STEPS)) as database:
        written: list[str] = []
        with pytest.raises(DiskFull) as caught:
            _fill(database, written)
        assert str(disk) in str(caught.value)
        assert len(written) > 10
        assert things(database) == written
        filler.unlink()
        put(database, "more")
        assert things(database) == [*written, "more"]


def test_a_disk_without_room_for_a_database_is_said_to_be_full(disk: Path) -> None:
    filler = disk / "filler"
    filler.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    with pytest.raises(DiskFull):
        Database(disk / "things.db", STEPS)
    filler.unlink()
    with closing(Database(disk / "things.db", STEPS)) as database:
        put(database, "a")


def test_a_read_only_disk_is_an_error_of_the_disk(disk: Path) -> None:
    mount = need_program("mount")
    with closing(Database(disk / "things.db", STEPS)) as database:
        put(database, "a")
    subprocess.run([mount, "-o", "remount,ro", disk], check=True)
    try:
        with pytest.raises(DiskError, match=r"things\.db"):
            Database(disk / "things.db", STEPS)
        with pytest.raises(DiskError, match="Read-only"):
            Database(disk / "others.db", STEPS)
    finally:
        subprocess.run([mount, "-o", "remount,rw", disk], check=True)
    with closing(Database(disk / "things.db", STEPS)) as database:
        assert things(database) == ["a"]


def test_a_writer_waits_for_another_process_and_not_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kachery_fast.store.database._BUSY_SECONDS", 0.05)
    with closing(Database(path, STEPS)) as database, subprocess.Popen(
            [sys.executable, "-c", FOREIGN, path], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert things(database) == []
        with pytest.raises(DiskError, match="another process has kept it locked"):
            put(database, "a")
        child.communicate(timeout=60)
        put(database, "a")
        assert things(database) == ["a"]


def test_a_closed_database_says_so(path: Path) -> None:
    database = Database(path, STEPS)
    database.close()
    database.close()
    with pytest.raises(DiskError, match="closed"):
        things(database)
    with pytest.raises(DiskError, match="closed"):
        put(database, "a")


def test_a_reader_outlives_the_closing(path: Path) -> None:
    database = Database(path, STEPS)
    put(database, "a")
    with database.reading() as connection:
        database.close()
        assert connection.execute("SELECT thing FROM things").fetchall() == [("a",)]


# --- many jobs, one flush


def _insert(thing: str, connection: sqlite3.Connection) -> int:
    row = connection.execute("INSERT INTO things (thing) VALUES (?)", (thing,)).lastrowid
    assert row is not None
    return row


class Busy:
    """A group writer whose thread is held until ``go``, so that what is submitted meanwhile goes together."""

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.writer = GroupWriter(database, monotonic=monotonic)
        self.commits = 0
        database._writer.set_trace_callback(self._trace)
        self._entered, self._gate = threading.Event(), threading.Event()
        self.writer.submit(self._wait)
        assert self._entered.wait(60)

    def _wait(self, _: sqlite3.Connection) -> None:
        self._entered.set()
        assert self._gate.wait(60)

    def _trace(self, statement: str) -> None:
        self.commits += statement == "COMMIT"

    def go(self) -> None:
        self._gate.set()


def test_jobs_that_wait_share_one_flush_and_keep_their_order(path: Path) -> None:
    database = Database(path, STEPS)
    busy = Busy(database)
    futures = [busy.writer.submit(partial(_insert, str(number))) for number in range(200)]
    busy.go()
    assert [future.result(60) for future in futures] == list(range(1, 201))
    assert busy.commits == 2
    assert things(database) == [str(number) for number in range(200)]
    busy.writer.close()


def test_a_transaction_of_long_jobs_ends_before_the_first_has_waited_long(path: Path) -> None:
    now = 0.0

    def work(connection: sqlite3.Connection) -> tuple[int, int]:
        nonlocal now
        now += 0.02
        return _insert("x", connection), busy.commits

    database = Database(path, STEPS)
    busy = Busy(database, lambda: now)
    futures = [busy.writer.submit(work) for _ in range(8)]
    busy.go()
    assert [future.result(60) for future in futures] == [
        (row, commits) for row, commits in enumerate([1, 1, 1, 2, 2, 2, 3, 3], 1)]
    busy.writer.close()


def test_a_job_that_refuses_fails_alone(path: Path) -> None:
    def refuse(_: sqlite3.Connection) -> None:
        raise InvalidArgument(what="no")

    database = Database(path, STEPS)
    busy = Busy(database)
    first = busy.writer.submit(partial(_insert, "a"))
    second = busy.writer.submit(refuse)
    third = busy.writer.submit(partial(_insert, "b"))
    busy.go()
    assert (first.result(60), third.result(60)) == (1, 2)
    with pytest.raises(InvalidArgument, match="no"):
        second.result(60)
    assert busy.commits == 2
    busy.writer.close()


def test_a_job_that_breaks_half_way_leaves_nothing_and_harms_no_other(path: Path) -> None:
    def break_off(connection: sqlite3.Connection) -> None:
        _insert("half", connection)
        raise ZeroDivisionError

    database = Database(path, STEPS)
    busy = Busy(database)
    first = busy.writer.submit(partial(_insert, "a"))
    second = busy.writer.submit(break_off)
    third = busy.writer.submit(partial(_insert, "b"))
    busy.go()
    assert (first.result(60), third.result(60)) == (1, 2)
    with pytest.raises(ZeroDivisionError):
        second.result(60)
    assert things(database) == ["a", "b"]
    busy.writer.close()


def test_a_job_that_needs_too_much_room_fails_alone(disk: Path) -> None:
    database = Database(disk / "things.db", STEPS)
    busy = Busy(database)
    first = busy.writer.submit(partial(_insert, "a"))
    second = busy.writer.submit(partial(_insert, "x" * 4_000_000))
    third = busy.writer.submit(partial(_insert, "b"))
    busy.go()
    assert (first.result(60), third.result(60)) == (1, 2)
    with pytest.raises(DiskFull):
        second.result(60)
    busy.writer.close()
    with closing(Database(disk / "things.db", STEPS)) as again:
        assert things(again) == ["a", "b"]


def test_a_job_may_be_cancelled_before_it_begins(path: Path) -> None:
    database = Database(path, STEPS)
    busy = Busy(database)
    futures = [busy.writer.submit(partial(_insert, str(number))) for number in range(3)]
    assert futures[1].cancel()
    busy.go()
    assert (futures[0].result(60), futures[2].result(60)) == (1, 2)
    assert things(database) == ["0", "2"]
    busy.writer.close()


def test_closing_does_what_was_submitted_and_takes_nothing_more(path: Path) -> None:
    database = Database(path, STEPS)
    busy = Busy(database)
    futures = [busy.writer.submit(partial(_insert, str(number))) for number in range(700)]
    busy.go()
    busy.writer.close()
    busy.writer.close()
    assert [future.result(0) for future in futures] == list(range(1, 701))
    with pytest.raises(DiskError, match="closed"):
        busy.writer.submit(partial(_insert, "late"))
    with closing(Database(path, STEPS)) as again:
        assert len(things(again)) == 700
