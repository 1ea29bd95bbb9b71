"""Bytes from one file into another."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from kachery_fast.splice import FileRefused, copy_span


@pytest.mark.parametrize("elsewhere", [False, True], ids=["one file system", "two"])
def test_bytes_are_copied_from_file_to_file_up_to_the_end_of_the_source(tmp_path: Path, elsewhere: bool) -> None:
    data = os.urandom(3 * 1024 * 1024 + 5)
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source, tempfile.TemporaryFile(
            dir="/dev/shm" if elsewhere and Path("/dev/shm").is_dir() else tmp_path) as target:
        assert copy_span(source.fileno(), 10, target.fileno(), 7, len(data)) == len(data) - 10
        assert target.read() == bytes(7) + data[10:]
        assert copy_span(source.fileno(), len(data), target.fileno(), 0, 5) == 0


def test_a_file_that_is_not_for_writing_refuses_what_is_copied(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"data")
    with (tmp_path / "source").open("rb") as source, pytest.raises(FileRefused):
        copy_span(source.fileno(), 0, source.fileno(), 4, 4)


def test_a_file_that_is_not_for_reading_is_not_taken_for_one_that_refuses(tmp_path: Path) -> None:
    with (tmp_path / "source").open("wb") as source, (tmp_path / "target").open("wb") as target:
        source.write(b"data")
        source.flush()
        with pytest.raises(OSError, match="Bad file descriptor"):
            copy_span(source.fileno(), 0, target.fileno(), 0, 4)
