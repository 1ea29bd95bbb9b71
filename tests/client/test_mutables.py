"""kf.get, kf.set, kf.delete: directly on one's own store, through the node on another's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast.client import mutables
from kachery_fast.errors import InvalidArgument, KacheryError, NodeNotRunning, TooLarge
from tests.cli.commands import Program


@pytest.fixture
def stranger(node: Program, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The module's node; the test is another user, one who can read its client-auth."""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    return node


def test_a_value_is_set_read_and_deleted(store_dir: Path) -> None:
    assert kf.set({"b": 1, "a": [2]}, {"x": 1.5})
    assert kf.get({"a": [2], "b": 1}) == {"x": 1.5}
    assert not kf.set({"a": [2], "b": 1}, 0, update=False)
    assert kf.set({"a": [2], "b": 1}, 0)
    assert kf.get({"a": [2], "b": 1}, default="none") == 0
    assert kf.delete({"a": [2], "b": 1})
    assert not kf.delete({"a": [2], "b": 1})
    assert kf.get({"a": [2], "b": 1}) is None
    assert kf.get({"a": [2], "b": 1}, "none") == "none"


FIRST_SETTER = """
import json, os, sys
import kachery_fast as kf
number = int(sys.argv[1])
if sys.argv[2] == "by the node":
    os.geteuid = lambda: 54321
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps([kf.set(["key", key], number, update=False) for key in range(20)]))
"""


@pytest.mark.parametrize("by", ["the owner", "the node", "both"])
def test_of_many_processes_that_set_a_key_first_one_does(node: Program, by: str) -> None:
    ways = {"the owner": ["directly"], "the node": ["by the node"], "both": ["directly", "by the node"]}[by]
    setters = [subprocess.Popen([sys.executable, "-c", FIRST_SETTER, str(number), ways[number % len(ways)]],
                                env=node.env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for number in range(4)]
    try:
        for setter in setters:
            assert setter.stdout is not None
            assert setter.stdout.readline() == "ready\n"
        for setter in setters:
            assert setter.stdin is not None
            setter.stdin.write("go\n")
            setter.stdin.flush()
        told = [json.loads(setter.communicate(timeout=60)[0]) for setter in setters]
    finally:
        for setter in setters:
            setter.kill()
            setter.communicate()
    for key in range(20):
        answers = [found[key] for found in told]
        assert answers.count(True) == 1, (key, answers)
        assert answers.count(False) == 3
        assert kf.get(["key", key]) == answers.index(True)
        assert kf.delete(["key", key])


def test_a_null_is_a_value_and_not_the_default(store_dir: Path) -> None:
    kf.set("key", None)
    assert kf.get("key", "default") is None
    assert mutables.find("key") == (True, None)


def test_asking_makes_no_store(store_dir: Path) -> None:
    assert kf.get("key") is None
    assert not kf.delete("key")
    assert mutables.items() == []
    assert not store_dir.exists()


def test_the_names_are_there_and_the_builtin_ones_too(store_dir: Path) -> None:
    assert callable(kf.set)
    assert {"get", "set", "delete"} <= {*dir(kf)}
    assert {*dir(kf)} >= {*kf.__all__}


def test_the_node_answers_whom_the_file_is_closed_to(stranger: Program) -> None:
    big = 2**70 + 1
    assert kf.set({"b": 1, "a": 2}, [big, 1.0, "ü", None])
    assert kf.get({"a": 2, "b": 1}) == [big, 1.0, "ü", None]
    assert not kf.set({"a": 2, "b": 1}, 0, update=False)
    assert mutables.items() == [({"a": 2, "b": 1}, [big, 1.0, "ü", None])]
    assert kf.delete({"a": 2, "b": 1})
    assert not kf.delete({"a": 2, "b": 1})
    assert mutables.find({"a": 2, "b": 1}) == (False, None)
    assert mutables.items() == []


def test_node_and_owner_see_the_same(node: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    kf.set("mine", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 54321)
        assert kf.get("mine") == 1
        kf.set("mine", 2)
    assert kf.get("mine") == 2
    assert kf.delete("mine")


@pytest.mark.parametrize("by_node", [False, True])
def test_wrong_values_are_the_same_errors_either_way(node: Program, monkeypatch: pytest.MonkeyPatch,
                                                     by_node: bool) -> None:
    if by_node:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
    wrong: list[tuple[Callable[[], Any], type[KacheryError]]] = [
        (lambda: kf.set("key", float("nan")), InvalidArgument), (lambda: kf.set({1}, 1), InvalidArgument),
        (lambda: kf.get({1: 2}), InvalidArgument), (lambda: kf.delete(b"x"), InvalidArgument),
        (lambda: kf.set("key", "x" * 1024 * 1024), TooLarge)]
    for call, error in wrong:
        with pytest.raises(error):
            call()
    assert kf.get("key") is None


def test_another_users_store_without_a_node_says_so(store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kf.set("key", 1)
    (store_dir / "client-auth").write_text("code")
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(NodeNotRunning, match="is not yours"):
        kf.get("key")
