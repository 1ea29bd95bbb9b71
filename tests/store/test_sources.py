"""Files that cannot be stored, and files with unusual names."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kachery_fast.errors import (
    FileChanged,
    KacheryError,
    LocalFileMissing,
    LocalFileUnreadable,
    NotADataFile,
)
from kachery_fast.store import FileStore, Stored

from .data import counter_stream, files_below, sha1_of

MIB = 1024 * 1024


def _put_files(store: FileStore, path: Path) -> Stored:
    answer = store.put_files([path])[0]
    if isinstance(answer, KacheryError):
        raise answer
    return answer


Way = Callable[[FileStore, Path], Stored]
WAYS: list[Way] = [FileStore.put_file, FileStore.link_file, _put_files]
each_way = pytest.mark.parametrize("way", WAYS, ids=["put_file", "link_file", "put_files"])


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store", chunk_size_bytes=MIB)


@each_way
def test_a_missing_file_is_named(store: FileStore, tmp_path: Path, way: Way) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in ("absent", "absent/below", "file/below", "dangling", "zero\0byte"):
        with pytest.raises(LocalFileMissing) as caught:
            way(store, tmp_path / path)
        assert str(tmp_path) in str(caught.value)
    assert not store.root.exists()


@each_way
def test_what_is_no_regular_file_is_refused_without_waiting(store: FileStore, tmp_path: Path, way: Way) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    kinds = {tmp_path / "pipe": "pipe", tmp_path / "directory": "directory", Path("/dev/zero"): "device"}
    for path, kind in kinds.items():
        with pytest.raises(NotADataFile, match=kind):
            way(store, path)
    assert not store.root.exists()


@each_way
def test_a_socket_cannot_be_stored(way: Way) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as server:
        server.bind(short + "/s")
        with pytest.raises(KacheryError):
            way(FileStore(Path(short) / "store"), Path(short) / "s")


@pytest.fixture
def as_another_user() -> Iterator[None]:
    """Give up root's right to read everything for as long as the test runs."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    yield
    os.seteuid(mine)


@each_way
def test_an_unreadable_file_is_named(way: Way, request: pytest.FixtureRequest) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        secret = Path(directory) / "secret"
        secret.write_bytes(b"x")
        secret.chmod(0)
        request.getfixturevalue("as_another_user")
        try:
            with pytest.raises(LocalFileUnreadable, match="Permission denied") as caught:
                way(FileStore(Path(directory) / "store"), secret)
        finally:
            os.seteuid(os.getuid())
        assert str(secret) in str(caught.value)


@each_way
@pytest.mark.parametrize(
    "name", [b"with space", b"new\nline", b"\xff\xfe not utf-8", "µ-électrode.dat".encode(), b"-rf"], ids=repr
)
def test_any_file_name_will_do(store: FileStore, tmp_path: Path, way: Way, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    data = counter_stream(MIB + 1)
    with open(path, "wb") as file:
        file.write(data)
    stored = way(store, Path(os.fsdecode(path)))
    assert stored.sha1 == sha1_of(data)
    with store.open(stored.sha1) as file:
        assert file.read() == data
    os.unlink(path)
    with pytest.raises(LocalFileMissing) as caught:
        way(store, Path(os.fsdecode(path)))
    str(caught.value).encode()


@each_way
def test_a_symbolic_link_stands_for_its_file(store: FileStore, tmp_path: Path, way: Way) -> None:
    (tmp_path / "real").write_bytes(b"the bytes")
    (tmp_path / "alias").symlink_to("real")
    stored = way(store, tmp_path / "alias")
    with store.open(stored.sha1) as file:
        assert file.read() == b"the bytes"
    assert (tmp_path / "alias").is_symlink()


@pytest.mark.parametrize("way", [FileStore.put_file, FileStore.link_file], ids=["put_file", "link_file"])
@pytest.mark.parametrize("change", ["append", "truncate", "overwrite", "replace", "remove", "chmod"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    store: FileStore, tmp_path: Path, way: Callable[..., Stored], change: str
) -> None:
    path = tmp_path / "growing"
    path.write_bytes(counter_stream(20 * MIB))
    before = path.stat()

    def act(_size: int) -> None:
        if change == "append":
            with path.open("ab") as file:
                file.write(b"more")
        elif change == "truncate":
            os.truncate(path, 10 * MIB)
        elif change == "overwrite":
            # Also behind the back of the modification time.
            with path.open("r+b") as file:
                file.write(b"other")
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif change == "replace":
            (tmp_path / "new").write_bytes(counter_stream(20 * MIB))
            (tmp_path / "new").replace(path)
        elif change == "remove":
            path.unlink(missing_ok=True)
        else:
            path.chmod(0o600)

    with pytest.raises(FileChanged, match="growing"):
        way(store, path, progress=act)
    assert files_below(store.root) == []


def test_a_file_under_constant_writing_is_refused_or_stored_under_its_own_digest(
    store: FileStore, tmp_path: Path
) -> None:
    path = tmp_path / "busy"
    path.write_bytes(bytes(8 * MIB))
    stop = threading.Event()

    def write() -> None:
        with path.open("r+b", buffering=0) as file:
            number = 0
            while not stop.is_set():
                number += 1
                os.pwrite(file.fileno(), number.to_bytes(8, "little") * 512, (number * 40_961) % (8 * MIB - 4096))

    writer = threading.Thread(target=write)
    writer.start()
    refused = 0
    try:
        for _ in range(10):
            try:
                store.verify(store.put_file(path).sha1)
            except FileChanged:
                refused += 1
    finally:
        stop.set()
        writer.join()
    assert refused > 0
    assert store.verify_all().damaged == 0
    stored = store.put_file(path)
    assert stored.sha1 == sha1_of(path.read_bytes())


def test_a_file_whose_size_does_not_say_its_length_is_refused(store: FileStore) -> None:
    if not Path("/proc/self/status").exists():
        with pytest.raises(LocalFileMissing):
            store.put_file("/proc/self/status")
        return
    with pytest.raises(FileChanged, match="0 bytes"):
        store.put_file("/proc/self/status")
    assert not store.root.exists()
