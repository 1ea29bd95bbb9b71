"""import, in processes of its own: everything of a directory of 2022 comes, with an account of it."""

from __future__ import annotations

import json
import sqlite3
import threading
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.store.mutables import ADMITTED_KEY, MutableStore
from tests.cli.commands import Program
from tests.store.legacy_directory import (
    NODE,
    OWN_FEED,
    Legacy,
    legacy_directory,
    put,
    set_mutable,
    sha1_of,
    snapshot,
)


@pytest.fixture
def old(tmp_path: Path) -> Legacy:
    return legacy_directory(tmp_path / "old", tmp_path / "elsewhere", large_size_bytes=21_000_000)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path / "store")


def tree(root: Path) -> list[Any]:
    return snapshot(*(path for path in sorted(root.rglob("*")) if path.is_file())) if root.exists() else []


def counts(found: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {kind: (found[kind]["taken"], found[kind]["alreadyHere"])
            for kind in ("files", "links", "mutables", "feeds", "messages")}


WHOLE = {"files": (3, 0), "links": (1, 0), "mutables": (3, 0), "feeds": (2, 0), "messages": (704, 0)}


def test_everything_is_taken_and_the_other_directory_is_left_as_it_is(program: Program, old: Legacy) -> None:
    before = tree(old.root)
    dry = program.json("import", str(old.root), "--dry-run")
    assert counts(dry) == WHOLE
    assert not program.storage_dir.exists()
    found = program.json("import", str(old.root))
    assert counts(found) == WHOLE
    assert {**found, "dryRun": True} == dry
    assert found["files"]["takenBytes"] == sum(map(len, (old.small, old.large, old.manifest)))
    assert found["refused"] == []
    assert tree(old.root) == before
    for data in (old.small, old.large, old.manifest, old.target.read_bytes()):
        path = program.ok("load", f"sha1://{sha1_of(data)}/x").strip()
        assert Path(path).read_bytes() == data
    assert Path(path) == old.target
    assert program.json("mutable", "get", "greeting") == "grüß dich 😀"
    with program.node() as node:
        assert node["nodeId"] != NODE
        program.ok("feed", "append", f"feed://{OWN_FEED}/main", '{"new": 1}')


def test_a_second_import_takes_nothing_and_a_dry_run_changes_nothing(program: Program, old: Legacy) -> None:
    program.ok("import", str(old.root))
    before = tree(program.storage_dir)
    found = program.json("import", str(old.root), "--dry-run")
    assert tree(program.storage_dir) == before
    again = program.json("import", str(old.root))
    here = {"files": (0, 3), "links": (0, 1), "mutables": (0, 3), "feeds": (0, 2), "messages": (0, 704)}
    assert counts(found) == counts(again) == here
    assert "704 here already" in program.ok("import", str(old.root))


def test_a_damaged_file_that_is_here_is_told_of_and_replaced(program: Program, old: Legacy) -> None:
    put(program.storage_dir, bytes(len(old.small)), sha1_of(old.small))
    uri = f"sha1://{sha1_of(old.small)}"
    assert f"to replace: {uri}: the file here is damaged" in program.ok("import", str(old.root), "--dry-run")
    found = program.json("import", str(old.root))
    assert counts(found) == WHOLE
    assert found["replaced"] == [sha1_of(old.small)]
    assert program.ok("cat", uri) == old.small.decode()


def test_what_is_damaged_is_refused_and_the_rest_is_taken(program: Program, old: Legacy) -> None:
    put(old.root, b"other bytes", sha1_of(b"small and damaged"))
    put(old.root, b"x" * 300_000, sha1_of(b"large and damaged"))
    old.target.write_bytes(b"written to after it was linked")
    for options in (["--dry-run"], []):
        done = program.run("import", str(old.root), "--json", *options)
        found = json.loads(done.stdout)
        assert done.returncode == 6
        assert counts(found) == {**WHOLE, "links": (0, 0)}
        assert {refusal["what"] for refusal in found["refused"]} == {
            f"sha1://{sha1_of(data)}" for data in (b"small and damaged", b"large and damaged", b"linked" * 50)}
    stored = [path.name for path in (program.storage_dir / "sha1").rglob("*") if path.is_file()]
    assert sha1_of(b"other bytes") not in stored
    assert sha1_of(b"x" * 300_000) not in stored


def test_codes_that_another_node_admitted_let_nobody_in_here(program: Program, old: Legacy) -> None:
    set_mutable(old.root, ADMITTED_KEY, ["code-of-2022"])
    done = program.run("import", str(old.root))
    assert done.returncode == 6
    assert "Admit codes anew by: kachery-fast mutable set --parse" in done.stdout
    with program.node():
        asked = urllib.request.Request(f"http://127.0.0.1:{program.port}/api/info",
                                       headers={"KACHERY-CLIENT-AUTH-CODE": "code-of-2022"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked, timeout=30)
        with refused.value as answer:
            assert answer.code == 403


def test_a_running_node_keeps_its_feeds_and_the_rest_is_taken(program: Program, old: Legacy) -> None:
    with program.node():
        done = program.run("import", str(old.root))
    assert done.returncode == 6
    assert "kachery-fast node stop" in done.stdout
    assert "mutables: 3 taken" in done.stdout
    assert counts(program.json("import", str(old.root)))["messages"] == (704, 0)


def test_keys_whose_feeds_are_not_taken_are_refused_though_there_is_no_feeds_db(program: Program, old: Legacy) -> None:
    old.databases[1].unlink()
    with program.node():
        for options in ([], ["--dry-run"]):
            done = program.run("import", str(old.root), "--json", *options)
            assert done.returncode == 6
            (refusal,) = json.loads(done.stdout)["refused"]
            assert refusal["what"] == str(old.databases[1])
            assert "the keys of 1 of them, were not taken" in refusal["why"]
            assert "kachery-fast node stop" in refusal["why"]


def test_a_dry_run_reads_the_databases_of_one_moment_while_others_write(program: Program, old: Legacy) -> None:
    with closing(sqlite3.connect(old.databases[0])) as connection, connection:
        connection.executemany("INSERT INTO mutables VALUES (?, ?, ?)", (
            (str(number), f'"{number}"', '"theirs"') for number in range(2000)))
    program.ok("import", str(old.root))
    stop = threading.Event()

    def write() -> None:
        with MutableStore(program.storage_dir, value_size_bytes_max=10_000) as store:
            number = 0
            while not stop.is_set():
                store.set(str(number % 2000), "ours" * (number % 2000))
                number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            found = program.json("import", str(old.root), "--dry-run")
            assert counts(found)["mutables"] == (0, 2003)
            assert found["refused"] == []
    finally:
        stop.set()
        writer.join()


def test_what_is_no_directory_of_2022_is_refused(program: Program, old: Legacy, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert program.run("import", str(tmp_path / "missing")).returncode == 3
    assert program.run("import", str(tmp_path / "empty")).returncode == 2
    here = Program(old.root)
    done = here.run("import", str(old.root))
    assert done.returncode == 2
    assert "node start" in done.stderr
