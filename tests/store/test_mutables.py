"""Mutables in their file: JSON by JSON keys, whole or not there."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kachery_fast.errors import DatabaseUnusable, DiskError, DiskFull, InvalidArgument, TooLarge
from kachery_fast.store.mutables import MutableStore, encode_value

from .children import PROJECT
from .test_database import disk

__all__ = ["disk"]

WRITER = """
import sys
from pathlib import Path
from kachery_fast.store.mutables import MutableStore
with MutableStore(Path(sys.argv[1]), value_size_bytes_max=1 << 20) as mutables:
    number = 0
    while True:
        number += 1
        mutables.set("key", [number] * 5000)
        print(number, flush=True)
"""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)


def open_store(root: Path) -> MutableStore:
    return MutableStore(root, value_size_bytes_max=1000)


@pytest.fixture
def mutables(tmp_path: Path) -> Iterator[MutableStore]:
    with open_store(tmp_path / "store") as mutables:
        yield mutables


def test_a_value_is_there_until_it_is_deleted(mutables: MutableStore) -> None:
    assert mutables.get("key") == (False, None)
    assert mutables.set("key", {"x": [1, 2.5, None, True, "ü"]})
    assert mutables.get("key") == (True, {"x": [1, 2.5, None, True, "ü"]})
    assert mutables.set("key", None)
    assert mutables.get("key") == (True, None)
    assert mutables.delete("key")
    assert not mutables.delete("key")
    assert mutables.get("key") == (False, None)


def test_without_update_the_first_value_stays(mutables: MutableStore) -> None:
    assert mutables.set("key", 1, update=False)
    assert not mutables.set("key", 2, update=False)
    assert mutables.get("key") == (True, 1)
    assert mutables.set("key", 3)
    assert mutables.get("key") == (True, 3)


def test_of_many_that_set_a_key_first_one_does(mutables: MutableStore, tmp_path: Path) -> None:
    def work(number: int) -> bool:
        with open_store(tmp_path / "store") as own:
            return own.set("key", number, update=False)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(work, range(24)))
    assert answers.count(True) == 1
    assert mutables.get("key") == (True, answers.index(True))


def test_a_key_is_known_by_what_it_says_not_how_it_is_written(mutables: MutableStore) -> None:
    mutables.set({"a": 1, "b": [1.0, "x"]}, "dict")
    assert mutables.get({"b": [1, "x"], "a": 1.0}) == (True, "dict")
    for number, key in enumerate(["1", 1, [1], {"1": 1}, True, None, "", [], {}]):
        assert mutables.set(key, number, update=False)
    for number, key in enumerate(["1", 1, [1], {"1": 1}, True, None, "", [], {}]):
        assert mutables.get(key) == (True, number)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values)
def test_any_json_comes_back_as_it_was(mutables: MutableStore, value: Any) -> None:
    try:
        assert MutableStore.set(mutables, "key", value)
    except TooLarge:
        assert len(json.dumps(value)) > 1000 / 6
        return
    found, back = mutables.get("key")
    assert found
    assert json.dumps(back) == json.dumps(value)


@pytest.mark.parametrize("bad", [
    float("nan"), float("inf"), {1: 2}, {1, 2}, b"bytes", "\ud800", object(), [[{"x": 1j}]],
])
def test_what_is_not_json_is_refused_as_key_and_as_value(mutables: MutableStore, bad: Any) -> None:
    for call in (lambda: mutables.set("key", bad), lambda: mutables.set(bad, 1), lambda: mutables.get(bad),
                 lambda: mutables.delete(bad)):
        with pytest.raises(InvalidArgument):
            call()
    assert list(mutables.items()) == []


def test_a_large_integer_is_exact_as_a_value_and_refused_as_a_key(mutables: MutableStore) -> None:
    mutables.set("key", 2**60 + 1)
    assert mutables.get("key") == (True, 2**60 + 1)
    with pytest.raises(InvalidArgument):
        mutables.set(2**60 + 1, 1)


def test_what_is_nested_too_deep_to_be_written_is_refused_however_little_too_deep() -> None:
    deep: list[Any] = []
    for depth in range(1, sys.getrecursionlimit() + 20):
        deep = [deep]
        with suppress(InvalidArgument):
            assert encode_value(deep, 1 << 20) == b"[" * (depth + 1) + b"]" * (depth + 1)


def test_nesting_without_end_is_refused(mutables: MutableStore) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for call in (lambda: mutables.set("key", deep), lambda: mutables.get(deep)):
        with pytest.raises(InvalidArgument):
            call()


def test_what_is_too_long_is_refused_with_its_limit(mutables: MutableStore) -> None:
    mutables.set("key", "x" * 998)
    with pytest.raises(TooLarge, match="1001 bytes; the limit is 1000") as caught:
        mutables.set("key", "x" * 999)
    assert caught.value.details["setting"] == "mutable_size_bytes_max"
    mutables.set("x" * (16 * 1024 - 2), 1)
    with pytest.raises(TooLarge):
        mutables.set("x" * (16 * 1024 - 1), 1)
    assert mutables.get("key") == (True, "x" * 998)


def test_all_are_listed_in_order(mutables: MutableStore) -> None:
    for key in ("b", "a", {"z": 1}, 3):
        mutables.set(key, [key])
    assert list(mutables.items()) == [("a", ["a"]), ("b", ["b"]), (3, [3]), ({"z": 1}, [{"z": 1}])]


def test_the_file_is_for_its_owner_alone_and_that_of_2022_stays(tmp_path: Path) -> None:
    (tmp_path / "mutables.db").write_bytes(b"2022")
    with open_store(tmp_path) as mutables:
        mutables.set("key", 1)
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("kachery-fast-mutables.db*")} == {0o600}
    assert (tmp_path / "mutables.db").read_bytes() == b"2022"


def test_each_change_is_flushed(mutables: MutableStore) -> None:
    with mutables._database.writing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    statements: list[str] = []
    mutables._database._writer.set_trace_callback(statements.append)
    mutables.set("key", 1)
    mutables.set("key", 2)
    mutables.delete("key")
    assert statements.count("COMMIT") == 3


def test_kill_at_any_moment_leaves_the_last_acknowledged_value_or_a_later_one(tmp_path: Path) -> None:
    for number in range(4):
        root = tmp_path / str(number)
        with subprocess.Popen([sys.executable, "-c", WRITER, root], cwd=PROJECT, stdout=subprocess.PIPE,
                              text=True) as child:
            assert child.stdout is not None
            first = child.stdout.readline()
            # Real time on purpose: the moment of death is what is tried.
            time.sleep(number * 0.013)
            child.kill()
            output = first + child.stdout.read()
        acknowledged = int(output[:output.rindex("\n")].split("\n")[-1])
        with closing(MutableStore(root, value_size_bytes_max=1 << 20)) as mutables:
            found, value = mutables.get("key")
            assert found
            assert value == [value[0]] * 5000
            assert value[0] in (acknowledged, acknowledged + 1)


def test_a_full_disk_keeps_the_old_value(disk: Path) -> None:
    with MutableStore(disk / "store", value_size_bytes_max=10_000_000) as mutables:
        mutables.set("key", "old")
        with pytest.raises(DiskFull):
            mutables.set("key", "x" * 3_000_000)
        assert mutables.get("key") == (True, "old")
        assert mutables.set("key", "new")
        assert mutables.get("key") == (True, "new")


def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "kachery-fast-mutables.db"
    path.write_bytes(b"\xff" * 8192)
    with pytest.raises(DatabaseUnusable):
        open_store(tmp_path)
    assert path.read_bytes() == b"\xff" * 8192


def test_a_directory_in_its_place_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "kachery-fast-mutables.db").mkdir(mode=0o700)
    with pytest.raises(DiskError):
        open_store(tmp_path)
