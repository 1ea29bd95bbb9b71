"""ls, gc, pin, unpin, rm and trash, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.store.test_cache import age, fetch

from .commands import Program


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path / "store")


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def fetched(program: Program, data: bytes) -> str:
    sha1 = fetch(program.storage_dir, data)
    age(program.storage_dir, sha1, 7200)
    return f"sha1://{sha1}"


def test_only_copies_go_and_a_dry_run_changes_nothing(program: Program, tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"own")
    own = program.ok("store", str(tmp_path / "own")).strip().rpartition("/")[0]
    copy, kept = fetched(program, b"a copy"), fetched(program, b"a copy to keep")
    program.ok("pin", kept)
    assert {row["uri"]: (row["kind"], row["pinned"]) for row in rows(program.ok("ls", "--json"))} == {
        own: ("original", False), copy: ("cached", False), kept: ("cached", True)}
    assert program.ok("ls", "--originals").split() == [own]
    assert program.ok("ls", "--cached", "--pinned").split() == [kept]
    assert "pinned" in program.ok("ls", "--pinned", "--long")
    assert copy in program.ok("gc", "--to", "0", "--dry-run")
    assert program.json("gc", "--to", "0", "--dry-run")["files"] == 1
    done = program.json("gc", "--to", "0")
    assert (done["files"], done["bytes"], done["cachedBytes"]) == (1, 6, 14)
    assert program.run("load", copy).returncode != 0
    assert [row["uri"] for row in rows(program.ok("trash", "list", "--json"))] == [copy]
    program.ok("trash", "restore", copy)
    assert Path(program.ok("load", copy).strip()).read_bytes() == b"a copy"
    program.ok("unpin", kept)
    assert program.json("gc", "--to", "0", "--now")["files"] == 1
    assert program.ok("trash", "list") == ""


def test_without_a_bound_nothing_goes_and_that_of_2022_counts(program: Program) -> None:
    fetched(program, b"x" * 2000)
    assert "No bound is set" in program.ok("gc")
    (program.storage_dir / "kachery.yaml").write_text("maxCacheSizeGiB: 0.000001\n")
    assert program.json("gc")["files"] == 1
    (program.storage_dir / "kachery.yaml").write_text("maxCacheSizeGiB: much\n")
    failed = program.run("gc")
    assert (failed.returncode, "maxCacheSizeGiB" in failed.stderr) == (2, True)
    assert program.run("gc", "--to", "some").returncode == 2


def test_removing_refuses_what_is_pinned_and_what_is_only_here(program: Program, tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"own")
    own = program.ok("store", str(tmp_path / "own")).strip()
    refused = program.run("rm", own)
    assert (refused.returncode, "only machine" in refused.stderr) == (9, True)
    program.ok("pin", own)
    assert "unpin" in program.run("rm", own, "--force").stderr
    program.ok("unpin", own)
    program.ok("rm", own, "--force")
    assert program.run("rm", own).returncode == 3
    assert program.run("pin", own).returncode == 3
    assert program.json("trash", "empty", "--older-than-days", "1") == {"files": 0, "bytes": 0}
    assert program.json("trash", "empty") == {"files": 1, "bytes": 3}
    assert program.run("trash", "restore", own).returncode == 3


def test_removing_a_link_leaves_its_file(program: Program, tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"own")
    own = program.ok("link", str(tmp_path / "own")).strip()
    assert program.ok("ls", "--linked", "--long").split()[1:3] == ["-", "linked"]
    program.ok("rm", own)
    assert (tmp_path / "own").read_bytes() == b"own"
    assert program.ok("ls") == ""
