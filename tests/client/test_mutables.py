"""kf.get, kf.set, kf.delete: directly on one's own store, through the node on another's."""

from __future__ import annotations

import os
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
