"""A full disk is said to be full, and nothing is left on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_fast._core import copy_file
from kachery_fast.errors import DiskFull
from kachery_fast.store import FileStore

from ..native.disks import MIB, mounted
from .data import counter_stream, files_below


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    with mounted(tmp_path / "disk", "tmpfs", 8 * MIB) as place:
        yield place


def test_what_cannot_fit_is_refused_before_it_is_copied(disk: Path, tmp_path: Path) -> None:
    store = FileStore(disk / "store")
    source = tmp_path / "source"
    source.write_bytes(counter_stream(9 * MIB))
    done: list[int] = []
    with pytest.raises(DiskFull) as caught:
        store.put_file(source, progress=done.append)
    assert caught.value.details["needed"] == 9 * MIB
    assert caught.value.details["free"] <= 8 * MIB
    assert done == []
    with pytest.raises(DiskFull):
        store.put_bytes(bytes(9 * MIB))
    with pytest.raises(DiskFull):
        store.stream_writer(expected_size_bytes=9 * MIB)
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_left_clean(disk: Path, tmp_path: Path) -> None:
    store = FileStore(disk / "store")
    source = tmp_path / "source"
    source.write_bytes(counter_stream(7 * MIB))
    with pytest.raises(DiskFull) as caught:
        store.put_stream([bytes(MIB)] * 9)
    assert "free" in str(caught.value)
    assert files_below(disk) == []
    (disk / "filler").write_bytes(bytes(2 * MIB))
    with pytest.raises(DiskFull):
        store.put_file(source)
    (disk / "filler").unlink()

    def fill() -> Iterator[bytes]:
        yield bytes(3 * MIB)
        (disk / "filler").write_bytes(bytes(4 * MIB))
        yield bytes(3 * MIB)

    with pytest.raises(DiskFull):
        store.put_stream(fill())
    (disk / "filler").unlink()
    assert files_below(disk) == []
    assert store.put_file(source).size == 7 * MIB


def test_a_copy_that_runs_out_of_space_is_left_clean(disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(counter_stream(7 * MIB))
    store = FileStore(disk / "store")

    def fill_first(*arguments: object, **options: object) -> object:
        (disk / "filler").write_bytes(bytes(5 * MIB))
        return copy_file(*arguments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kachery_fast.store.files.copy_file", fill_first)
        with pytest.raises(DiskFull):
            store.put_file(source)
    assert files_below(disk) == ["filler"]


def test_a_batch_says_for_each_file_whether_it_fitted(disk: Path, tmp_path: Path) -> None:
    store = FileStore(disk / "store")
    paths = []
    for number in range(20):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * 600_000)
        paths.append(path)
    answers = store.put_files(paths)
    fitted = [answer for answer in answers if not isinstance(answer, DiskFull)]
    assert 5 <= len(fitted) < 20
    assert len(fitted) + sum(isinstance(answer, DiskFull) for answer in answers) == 20
    assert store.verify_all() == (len(fitted), 0, 600_000 * len(fitted))
    assert files_below(disk / "store" / "tmp") == []
