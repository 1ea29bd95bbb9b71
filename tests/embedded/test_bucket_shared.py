"""Objects in a folder that other users and machines share, by a file system that answers as NFS does."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.embedded.bucket_files import ObjectFiles
from tests.embedded.bucket_server import NAME
from tests.embedded.test_bucket import INDEX


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    made.mkdir()
    made.chmod(0o2770)
    return made


@pytest.fixture
def files(root: Path) -> ObjectFiles:
    return ObjectFiles(root, shared=True)


def test_an_object_that_was_removed_elsewhere_is_there_no_more(
    root: Path, files: ObjectFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS knows until its folder is opened only what it remembers."""
    path = root / NAME
    path.parent.mkdir(parents=True)
    remembered: set[Path] = set()
    real_open, real_link, real_lstat = os.open, os.link, Path.lstat

    def look(of: Any, flags: int, *arguments: int) -> int:
        if flags & os.O_DIRECTORY:
            remembered.difference_update([known for known in remembered if known.parent == Path(of)])
        return real_open(of, flags, *arguments)

    def link(source: Path, target: Path) -> None:
        if target in remembered:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        real_link(source, target)

    monkeypatch.setattr(os, "open", look)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(Path, "lstat", lambda of: real_lstat(root if of in remembered else of))
    remembered.add(path)
    assert not files.offered(NAME)
    remembered.add(path)
    assert files.write(NAME, b"new")
    assert path.read_bytes() == b"new"
    assert files.offered(NAME)
    assert not files.write(NAME, b"newer")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("replace", [False, True])
def test_a_name_that_was_given_counts_though_the_answer_was_lost(
    root: Path, files: ObjectFiles, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    """NFS 3 sends a request again whose answer did not come, and tells how the second one went."""
    call, error = ("rename", errno.ENOENT) if replace else ("link", errno.EEXIST)
    real = getattr(os, call)

    def twice(source: Path, target: Path) -> None:
        real(source, target)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, call, twice)
    assert files.write(INDEX, b"whole", replace=replace)
    assert (root / INDEX).read_bytes() == b"whole"
    assert list((root / ".incoming").iterdir()) == []


def test_folders_that_others_remove_meanwhile_are_made_again(
    root: Path, files: ObjectFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = Path.rename, 0

    def rename(made: Path, to: Path) -> Path:
        nonlocal removed
        if not removed and to.parent.parent == root:  # the one above is empty still
            to.parent.rmdir()
            removed += 1
        return real(made, to)

    monkeypatch.setattr(Path, "rename", rename)
    assert files.write(NAME, b"x")
    assert removed == 1
    assert (root / NAME).read_bytes() == b"x"
    assert list((root / ".incoming").iterdir()) == []


def test_no_folder_is_there_without_the_permissions_that_others_need(
    root: Path, files: ObjectFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_path: Path, _mode: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "chmod", killed)
        with pytest.raises(KeyboardInterrupt):
            files.write(NAME, b"x")
    assert [path.name for path in root.iterdir()] == [".incoming"]
    (left,) = (root / ".incoming").iterdir()
    assert left.is_dir()
    ObjectFiles(root, shared=True)
    assert left.exists()  # it may be another process's
    os.utime(left, (0, 0))
    assert ObjectFiles(root, shared=True).write(NAME, b"x")
    assert list((root / ".incoming").iterdir()) == []
    assert {stat.S_IMODE(above.stat().st_mode) for above in (root / NAME).parents[:5]} == {0o2770}


def test_a_close_that_fails_hides_no_cause_and_leaves_nothing(
    root: Path, files: ObjectFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, closed = os.close, []

    def fails(fd: int) -> None:
        real(fd)
        closed.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fill(_fd: int) -> None:
        monkeypatch.setattr(os, "close", fails)
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        files.make(NAME, 3, fill)
    monkeypatch.setattr(os, "close", real)
    assert len(closed) == 1
    assert list((root / ".incoming").iterdir()) == []
