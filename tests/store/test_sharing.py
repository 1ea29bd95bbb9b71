"""Stores that a group shares: modes, groups, several users."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kachery_fast.store import FileStore

from ..programs import need_root
from .children import run_child
from .data import counter_stream, files_below, sound

GROUP = 6123
MIB = 1024 * 1024


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077])
def test_modes_are_those_of_the_umask(tmp_path: Path, mask: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(counter_stream(2 * MIB))
    source.chmod(0o600)
    small = tmp_path / "small"
    small.write_bytes(b"small")
    small.chmod(0o600)
    linked = tmp_path / "linked"
    linked.write_bytes(b"linked")
    with umask(mask):
        store = FileStore(tmp_path / "store", chunk_size_bytes=MIB)
        store.put_file(source)
        store.put_file(small)
        store.put_files([small, source, linked])
        store.put_bytes(b"bytes")
        store.put_bytes(bytes(20 * MIB))
        store.put_stream([b"stream"])
        store.link_file(linked)
        store.part_path("0" * 40).touch()
    for directory, names, files in os.walk(store.root):
        for name in files:
            assert stat.S_IMODE((Path(directory) / name).stat().st_mode) == 0o666 & ~mask
        for name in [".", *names]:
            assert stat.S_IMODE((Path(directory) / name).stat().st_mode) == 0o777 & ~mask
    assert len(files_below(store.root)) >= 7


def test_a_setgid_directory_gives_its_group_to_everything(tmp_path: Path) -> None:
    need_root()
    root = tmp_path / "store"
    root.mkdir()
    os.chown(root, 0, GROUP)
    root.chmod(0o2775)
    source = tmp_path / "source"
    source.write_bytes(counter_stream(2 * MIB))
    (tmp_path / "small").write_bytes(b"small")
    with umask(0o002):
        store = FileStore(root, chunk_size_bytes=MIB)
        store.put_file(source)
        store.put_files([tmp_path / "small"])
    for directory, names, files in os.walk(root):
        for name in names + files:
            found = (Path(directory) / name).stat()
            assert found.st_gid == GROUP
            if name in names:
                assert stat.S_IMODE(found.st_mode) == 0o2775
            else:
                assert stat.S_IMODE(found.st_mode) == 0o664


def test_members_of_a_group_store_the_same_files_one_after_the_other() -> None:
    need_root()
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        root = Path(place) / "store"
        root.mkdir()
        os.chown(root, 0, GROUP)
        root.chmod(0o2775)
        source = Path(place) / "source"
        source.write_bytes(counter_stream(300_000))
        Path(str(source) + ".small").write_bytes(b"small")
        assert run_child("members", root, source, str(GROUP), "6001", "6002", "6003") == ["0", "0", "0"]
        assert sound(root) == 5
        assert {(root / name).stat().st_uid for name in files_below(root)} == {6001, 6002, 6003}
        assert {(root / name).stat().st_gid for name in files_below(root)} == {GROUP}
