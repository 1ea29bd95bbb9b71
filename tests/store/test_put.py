"""Putting files, bytes, arrays and streams."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kachery_fast.errors import DiskError, InvalidArgument, InvalidName, NotInStore
from kachery_fast.store import FileStore

from .children import run_child
from .data import counter_stream, files_below, sha1_of, sound

MIB = 1024 * 1024
VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "manifests.jsonl"


@pytest.fixture(scope="module")
def stream_bytes() -> bytes:
    return counter_stream(62_914_560)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store", chunk_size_bytes=MIB)


@pytest.mark.parametrize("line", VECTORS.read_text().splitlines(), ids=lambda line: str(json.loads(line)["size"]))
@pytest.mark.parametrize("way", ["file", "bytes", "stream", "link"])
def test_digests_and_manifests_are_those_of_the_golden_vectors(
    tmp_path: Path, stream_bytes: bytes, line: str, way: str
) -> None:
    vector = json.loads(line)
    data = memoryview(stream_bytes)[: vector["size"]]
    store = FileStore(tmp_path / "store", durable=False)
    if way in ("file", "link"):
        source = tmp_path / "source"
        source.write_bytes(data)
        stored = store.put_file(source) if way == "file" else store.link_file(source)
    elif way == "bytes":
        stored = store.put_bytes(data)
    else:
        stored = store.put_stream(io.BytesIO(data))
    assert tuple(stored) == (vector["sha1"], vector["size"], vector.get("manifest_sha1_20MiB"))
    with store.open(stored.sha1) as file:
        assert file.read() == data
    if stored.manifest_sha1 is not None:
        manifest = store.manifest_for(stored.sha1)[1]
        assert manifest is not None
        with store.open(stored.manifest_sha1) as file:
            assert file.read() == manifest.encode()
        assert len(manifest.chunks) == vector["chunks_20MiB"]


def test_the_layout_is_that_of_2022(store: FileStore, tmp_path: Path) -> None:
    data = counter_stream(2 * MIB + 1)
    source = tmp_path / "source.dat"
    source.write_bytes(data)
    sha1, _, manifest_sha1 = store.put_file(source)
    assert manifest_sha1 is not None
    place = f"sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"
    other = f"sha1/{manifest_sha1[:2]}/{manifest_sha1[2:4]}/{manifest_sha1[4:6]}/{manifest_sha1}"
    assert files_below(store.root) == sorted([place, place + ".manifest", other])
    assert (store.root / (place + ".manifest")).read_text() == manifest_sha1


def test_nothing_is_created_before_something_is_written(store: FileStore) -> None:
    assert not store.has("0" * 40)
    assert list(store.list()) == []
    assert store.totals() == (0, 0, 0, True)
    with pytest.raises(NotInStore):
        store.remove("0" * 40)
    assert not store.root.exists()


@pytest.mark.parametrize("size", [0, 1, 262_144, 262_145, MIB, MIB + 1, 9 * MIB + 5])
@pytest.mark.parametrize("durable", [True, False])
def test_what_was_put_comes_out(tmp_path: Path, size: int, durable: bool) -> None:
    store = FileStore(tmp_path / "store", chunk_size_bytes=MIB, durable=durable)
    data = counter_stream(size)
    source = tmp_path / "source"
    source.write_bytes(data)
    done: list[int] = []
    stored = store.put_file(source, progress=done.append)
    assert stored[:2] == (sha1_of(data), size)
    assert (stored.manifest_sha1 is None) == (size <= MIB)
    assert done[-1] == size
    assert done == sorted(done)
    assert store.put_bytes(data) == store.put_stream([data]) == store.put_file(source) == stored
    assert files_below(store.root / "tmp") == []
    located = store.find(stored.sha1)
    assert (located.path.read_bytes(), located.size, located.linked) == (data, size, False)


def test_a_file_that_is_there_is_not_written_again(store: FileStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for size in (1000, 3 * MIB):
        source.write_bytes(counter_stream(size))
        path = store.find(store.put_file(source).sha1).path
        before = path.stat()
        store.put_file(source)
        store.put_bytes(source.read_bytes())
        store.put_files([source])
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_truncated_file_is_replaced(store: FileStore) -> None:
    data = counter_stream(5000)
    path = store.find(store.put_bytes(data).sha1).path
    path.write_bytes(data[:100])
    store.put_bytes(data)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10, dtype="<i2"),
        np.arange(10, dtype=">f8"),
        np.zeros(3, dtype="M8[ns]"),
        np.zeros(3, dtype=[("a", "i4"), ("b", "f8")]),
        np.zeros((0, 3)),
        np.array(5.0),
        np.arange(24, dtype=np.complex64).reshape(2, 3, 4),
        np.arange(2_500_000, dtype=np.int32),
        np.ones(5, dtype=bool),
    ],
    ids=lambda array: f"{array.dtype}-{array.size}",
)
def test_arrays_are_stored_as_their_memory(store: FileStore, array: np.ndarray) -> None:
    stored = store.put_bytes(array)
    assert stored[:2] == (sha1_of(array.tobytes()), array.nbytes)
    with store.open(stored.sha1) as file:
        assert file.read() == array.tobytes()


def test_a_large_array_is_not_copied(store: FileStore) -> None:
    import tracemalloc

    array = np.frombuffer(counter_stream(64 * 1024) * 1024, dtype=">f4")
    tracemalloc.start()
    try:
        store.put_bytes(array)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB


@pytest.mark.parametrize(
    "thing",
    [np.zeros(8)[::2], np.asfortranarray(np.zeros((3, 4))), np.array([object()]), "text", 5, None,
     np.array([(1, None)], dtype=[("a", "i4"), ("b", "O")])],
    ids=lambda thing: str(thing).partition(" at 0x")[0],
)
def test_what_has_no_bytes_in_a_row_is_refused(store: FileStore, thing: Any) -> None:
    with pytest.raises(InvalidArgument):
        store.put_bytes(thing)
    assert not store.root.exists()


def test_a_stream_of_pieces_of_any_size(store: FileStore) -> None:
    data = counter_stream(3 * MIB + 17)
    pieces = [data[:1], b"", bytearray(data[1:70]), memoryview(data)[70:MIB], data[MIB:]]
    done: list[int] = []
    stored = store.put_stream(pieces, progress=done.append)
    assert stored[:2] == (sha1_of(data), len(data))
    assert done[-1] == len(data)
    store.verify(stored.sha1)


def test_a_stream_that_fails_leaves_nothing(store: FileStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"some"
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        store.put_stream(broken())
    assert files_below(store.root) == []


def test_an_aborted_stream_leaves_nothing_and_takes_no_more(store: FileStore) -> None:
    writer = store.stream_writer()
    writer.write(b"some")
    writer.abort()
    writer.abort()
    assert files_below(store.root) == []
    with pytest.raises(InvalidArgument):
        writer.write(b"more")
    with pytest.raises(InvalidArgument):
        writer.commit()


def test_a_reader_that_reuses_its_memory_is_stored_right(store: FileStore) -> None:
    memory = bytearray(1000)
    with store.stream_writer() as writer:
        for number in range(5):
            memory[:] = bytes([number]) * 1000
            writer.write(memory)
        stored = writer.commit()
    assert stored.sha1 == sha1_of(b"".join(bytes([number]) * 1000 for number in range(5)))


def test_what_progress_raises_ends_the_call_and_leaves_nothing(store: FileStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(counter_stream(20 * MIB))

    def stop(_size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put_file(source, progress=stop)
    assert files_below(store.root) == []


@pytest.mark.parametrize("operation", ["put_file", "put_bytes", "put_stream", "put_files", "link_file"])
def test_several_processes_may_store_the_same_file_at_once(tmp_path: Path, operation: str) -> None:
    source = tmp_path / "source.dat"
    source.write_bytes(counter_stream(700_000))
    source.with_suffix(".small").write_bytes(b"small")
    for number in range(5):
        root = tmp_path / f"store{number}"
        assert run_child("together", operation, root, source, "4") == ["True"]
        assert sound(root) >= 1
        assert files_below(root / "tmp") == []
        assert FileStore(root).has(sha1_of(source.read_bytes()))


@pytest.mark.parametrize("name", ["", "abc", "A" * 40, "0" * 39 + "\n", "../../../../etc/passwd", "0" * 41])
def test_a_name_that_is_no_digest_is_refused_everywhere(store: FileStore, name: str) -> None:
    for call in (store.find, store.has, store.open, store.verify, store.remove, store.part_path, store.manifest_for):
        with pytest.raises(InvalidName):
            call(name)


def test_a_store_below_a_file_or_a_dangling_link_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    for root in (tmp_path / "file", tmp_path / "dangling"):
        with pytest.raises(DiskError):
            FileStore(root).put_bytes(b"x")


def test_an_open_file_survives_its_removal(store: FileStore) -> None:
    stored = store.put_bytes(b"some bytes")
    with store.open(stored.sha1) as file:
        assert store.remove(stored.sha1) == 10
        assert file.read() == b"some bytes"
        assert os.fstat(file.fileno()).st_size == 10
