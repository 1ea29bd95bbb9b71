"""mutable get, set, delete, list, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Program


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path / "store")


def test_a_value_is_set_shown_listed_and_deleted(program: Program) -> None:
    assert program.ok("mutable", "set", "key", "some text") == "set\n"
    assert program.ok("mutable", "get", "key") == "some text\n"
    assert program.json("mutable", "get", "key") == "some text"
    assert program.ok("mutable", "set", "key", "more", "--no-update") == "left as it was\n"
    assert program.json("mutable", "set", "key", "more", "--no-update") == {"changed": False}
    assert program.json("mutable", "list") == [{"key": "key", "value": "some text"}]
    assert program.ok("mutable", "list") == '"key"\t"some text"\n'
    assert program.ok("mutable", "delete", "key") == "deleted\n"
    assert program.json("mutable", "list") == []


def test_keys_and_values_may_be_json(program: Program) -> None:
    program.ok("mutable", "set", '{"b": 1, "a": 2}', '{"x": [1, null]}', "--parse")
    assert program.ok("mutable", "get", '{"a":2,"b":1}', "--parse") == '{"x": [1, null]}\n'
    program.ok("mutable", "set", "1", "1")
    program.ok("mutable", "set", "1", "2", "--parse")
    assert program.json("mutable", "get", "1") == "1"
    assert program.json("mutable", "get", "1", "--parse") == 2


@pytest.mark.parametrize("command", ["get", "delete"])
def test_a_key_without_a_value_is_not_found(program: Program, command: str) -> None:
    done = program.run("mutable", command, "key")
    assert (done.returncode, done.stdout) == (3, "")
    assert "no mutable with the key key" in done.stderr
    done = program.run("mutable", command, '{"a": 1}', "--parse", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"] == "MutableMissing"


def test_what_is_not_json_is_a_wrong_call(program: Program) -> None:
    for arguments in (("get", "{", "--parse"), ("set", "key", "NaN", "--parse"), ("set", "1", "x", "--parse")):
        done = program.run("mutable", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert len(done.stderr.splitlines()) == 1


def test_a_damaged_file_is_one_line_and_its_exit_code(program: Program) -> None:
    program.storage_dir.mkdir()
    path = program.storage_dir / "kachery-fast-mutables.db"
    path.write_bytes(b"nonsense" * 1000)
    path.chmod(0o600)
    done = program.run("mutable", "get", "key")
    assert (done.returncode, done.stdout) == (6, "")
    assert "damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1
