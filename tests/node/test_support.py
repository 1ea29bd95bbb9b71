"""What looks for leaks must see them, on every system."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from tests.node.support import open_files


@pytest.mark.parametrize("process", [Path("/proc/self"), Path("/absent")], ids=["proc", "psutil"])
def test_a_file_that_is_open_is_seen(tmp_path: Path, process: Path) -> None:
    path = tmp_path / "left"
    with path.open("wb"):
        assert open_files(tmp_path, process) == [str(path)]
    assert open_files(tmp_path, process) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_a_file_that_is_mapped_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "left"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
    with mapped:
        assert str(path) in open_files(tmp_path)
    assert open_files(tmp_path) == []
