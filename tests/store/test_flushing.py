"""What is flushed, and in which order: a file's bytes, its name by rename, then the directory that holds the name.

Nothing here cuts the power; the sequence of system calls is recorded instead, and dropping one flush fails a test.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kachery_fast._core import digest_buffer
from kachery_fast.errors import DiskError
from kachery_fast.protocol.manifest import make_manifest
from kachery_fast.store import FileStore, batch

from .data import counter_stream, sha1_of

CHUNK = 64 * 1024
SMALL, LARGE = counter_stream(1000), counter_stream(9 * 1024 * 1024)
FULL_FSYNC = 51  # as on macOS


class Recorder:
    """The calls that were made, in their order: ``("flush", inode)``, ``("rename", to)`` and ``("mkdir", path)``.

    A download gets its name by a hard link, which replaces nothing; that counts as a rename here.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int | str]] = []
        rename, link, mkdir, fsync = os.rename, os.link, os.mkdir, os.fsync

        def watched_rename(source: str | Path, final: str | Path) -> None:
            rename(source, final)
            self.calls.append(("rename", str(final)))

        def watched_link(source: str | Path, final: str | Path) -> None:
            link(source, final)
            self.calls.append(("rename", str(final)))

        def watched_mkdir(path: str | Path, mode: int = 0o777) -> None:
            mkdir(path, mode)
            self.calls.append(("mkdir", str(path)))

        def watched_fsync(fd: int) -> None:
            fsync(fd)
            self.calls.append(("flush", os.fstat(fd).st_ino))

        patch.setattr(os, "rename", watched_rename)
        patch.setattr(os, "link", watched_link)
        patch.setattr(os, "mkdir", watched_mkdir)
        patch.setattr(os, "fsync", watched_fsync)
        if hasattr(fcntl, "F_FULLFSYNC"):
            patch.delattr(fcntl, "F_FULLFSYNC")

    def assert_durable(self, final: Path) -> None:
        """``final`` was flushed, renamed, and its directory flushed after that."""
        named = self.calls.index(("rename", str(final)))
        assert ("flush", final.stat().st_ino) in self.calls[:named], f"{final} was named before it was flushed"
        assert ("flush", final.parent.stat().st_ino) in self.calls[named:], f"the name {final} was not flushed"

    def assert_directories_durable(self, but: str = "-") -> None:
        """Each new directory's own entry was flushed after it was made."""
        made = [(place, Path(str(path))) for place, (kind, path) in enumerate(self.calls)
                if kind == "mkdir" and not str(path).endswith(but)]
        assert len(made) > 1
        for place, path in made:
            assert ("flush", path.parent.stat().st_ino) in self.calls[place:], f"{path} was not flushed in its parent"


def put_file(store: FileStore, data: bytes, tmp_path: Path) -> str:
    source = tmp_path / "source"
    source.write_bytes(data)
    return store.put_file(source).sha1


def put_bytes(store: FileStore, data: bytes, tmp_path: Path) -> str:
    return store.put_bytes(data).sha1


def put_stream(store: FileStore, data: bytes, tmp_path: Path) -> str:
    return store.put_stream(io.BytesIO(data)).sha1


def link_file(store: FileStore, data: bytes, tmp_path: Path) -> str:
    source = tmp_path / "source"
    source.write_bytes(data)
    return store.link_file(source).sha1


def adopt(store: FileStore, data: bytes, tmp_path: Path) -> str:
    size, sha1, chunk_sha1s = digest_buffer(data, CHUNK)
    manifest = make_manifest(size, sha1, chunk_sha1s, CHUNK).encode() if len(chunk_sha1s) > 1 else None
    part = store.part_path(sha1)
    part.write_bytes(data)
    return store.adopt(part, sha1, manifest=manifest).sha1


WAYS = [put_file, put_bytes, put_stream, link_file, adopt]
Way = Callable[[FileStore, bytes, Path], str]


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_flushed_then_named_then_the_name_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way, data: bytes
) -> None:
    recorder = Recorder(monkeypatch)
    store = FileStore(tmp_path / "new" / "store", chunk_size_bytes=CHUNK)
    sha1 = way(store, data, tmp_path)
    file = store._layout.link(sha1) if way is link_file else store._layout.file(sha1)
    recorder.assert_durable(file)
    manifest_sha1 = store.manifest_for(sha1)[0]
    assert (manifest_sha1 is not None) == (data is LARGE)
    if manifest_sha1 is not None:
        recorder.assert_durable(store._layout.file(manifest_sha1))
        of_manifest = recorder.calls.index(("rename", str(store._layout.file(manifest_sha1))))
        assert of_manifest < recorder.calls.index(("rename", str(file)))
    recorder.assert_directories_durable()


@pytest.mark.parametrize("way", WAYS)
def test_a_store_that_need_not_last_flushes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    recorder = Recorder(monkeypatch)
    way(FileStore(tmp_path / "store", chunk_size_bytes=CHUNK, durable=False), LARGE, tmp_path)
    assert [kind for kind, _ in recorder.calls if kind == "flush"] == []


def test_without_syncfs_a_batch_flushes_each_file_name_and_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "sync_file_system", lambda _directory: False)
    recorder = Recorder(monkeypatch)
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"{number}.dat")
        paths[-1].write_bytes(b"%d" % number)
    store = FileStore(tmp_path / "new" / "store", chunk_size_bytes=CHUNK)
    store.put_files(paths)
    for path in paths:
        recorder.assert_durable(store._layout.file(sha1_of(path.read_bytes())))
    recorder.assert_directories_durable(but=".batch")


class Drive:
    """fcntl of macOS: ``F_FULLFSYNC`` flushes, or fails with ``error``."""

    def __init__(self, patch: pytest.MonkeyPatch, error: int = 0) -> None:
        self.flushed: list[int] = []
        self.error = error
        patch.setattr(fcntl, "F_FULLFSYNC", FULL_FSYNC, raising=False)
        patch.setattr(fcntl, "fcntl", self.call)

    def call(self, fd: int, command: int) -> int:
        assert command == FULL_FSYNC
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.flushed.append(os.fstat(fd).st_ino)
        return 0


def test_on_macos_the_drive_itself_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    drive = Drive(monkeypatch)
    store = FileStore(tmp_path / "store", chunk_size_bytes=CHUNK)
    path = store.find(store.put_bytes(SMALL).sha1).path
    assert {path.stat().st_ino, path.parent.stat().st_ino} <= set(drive.flushed)
    assert [kind for kind, _ in recorder.calls if kind == "flush"] == []


def test_a_disk_of_macos_that_cannot_flush_its_drive_gets_an_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    Drive(monkeypatch, errno.ENOTSUP)
    store = FileStore(tmp_path / "store", chunk_size_bytes=CHUNK)
    recorder.assert_durable(store.find(store.put_bytes(SMALL).sha1).path)


def test_a_drive_that_fails_to_flush_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Drive(monkeypatch, errno.EIO)
    store = FileStore(tmp_path / "store", chunk_size_bytes=CHUNK)
    with pytest.raises(DiskError):
        store.put_bytes(SMALL)
    assert not store.has(sha1_of(SMALL))
