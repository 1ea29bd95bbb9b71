"""Every test of the client has a store and an address of its own, and no channel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import Program


def _enter(program: Program, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Make the environment of ``program`` that of the test itself."""
    for name in list(os.environ):
        if name.startswith("KACHERY_") and name not in program.env:
            monkeypatch.delenv(name)
    for name, value in program.env.items():
        if name.startswith("KACHERY_"):
            monkeypatch.setenv(name, value)
    return program


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The command line on a fresh store, whose environment is also that of the test itself."""
    return _enter(Program(tmp_path / "store"), monkeypatch)


@pytest.fixture
def store_dir(program: Program) -> Path:
    """A storage directory that does not exist yet; no node runs."""
    return program.storage_dir


@pytest.fixture(scope="module")
def running_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A node for all tests of a module."""
    program = Program(tmp_path_factory.mktemp("node") / "store")
    with program.node():
        yield program


@pytest.fixture
def node(running_node: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """The node of the module, whose environment is also that of the test; a test may spoil its client-auth."""
    code = (running_node.storage_dir / "client-auth").read_text()
    yield _enter(running_node, monkeypatch)
    (running_node.storage_dir / "client-auth").write_text(code)
