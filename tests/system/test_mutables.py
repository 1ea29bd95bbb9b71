"""Mutables belong to one node: another on the same channel neither sees nor changes them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab, LabNode
from tests.system.support import QUICK
from tests.system.task_backends import be


def test_mutables_of_one_node_are_not_those_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(tmp_path / "lab", environ=QUICK) as lab:
        lab.start_hub()
        a, b = lab.add_node("A"), lab.add_node("B")
        for by_node in (False, True):  # directly, and as another user by the node
            if by_node:
                monkeypatch.setattr(os, "geteuid", lambda: 54321)
            key = ["probe", by_node]
            _set(monkeypatch, a, key, "of A")
            be(monkeypatch, b)
            assert kf.get(key) is None
            assert not kf.delete(key)
            assert kf.set(key, "of B", update=False)
            assert _shown(b, key) == "of B"
            assert _shown(a, key) == "of A"
            be(monkeypatch, a)
            assert kf.get(key) == "of A"
            assert kf.delete(key)
            assert _shown(b, key) == "of B"


def _set(monkeypatch: pytest.MonkeyPatch, node: LabNode, key: object, value: str) -> None:
    be(monkeypatch, node)
    assert kf.set(key, value)


def _shown(node: LabNode, key: object) -> object:
    """What the command line tells of a mutable."""
    return node.json("mutable", "get", "--parse", json.dumps(key))
