"""Which manifest a file of the store has."""

from __future__ import annotations

from pathlib import Path

import pytest

from kachery_fast._core import digest_buffer
from kachery_fast.errors import CorruptFile
from kachery_fast.protocol.manifest import Chunk, Manifest, make_manifest
from kachery_fast.store import FileStore

from .data import counter_stream, sha1_of

CHUNK_SIZE_BYTES = 64 * 1024
SIZE_BYTES = 300_000


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store", chunk_size_bytes=CHUNK_SIZE_BYTES)


def _sidecar(store: FileStore, sha1: str) -> Path:
    return store.find(sha1).path.with_name(sha1 + ".manifest")


def _manifest(data: bytes, chunk_size_bytes: int) -> Manifest:
    size, sha1, chunk_sha1s = digest_buffer(data, chunk_size_bytes)
    return make_manifest(size, sha1, chunk_sha1s, chunk_size_bytes)


def test_a_file_of_one_chunk_has_none(store: FileStore) -> None:
    for size in (0, 1, CHUNK_SIZE_BYTES):
        stored = store.put_bytes(counter_stream(size))
        assert stored.manifest_sha1 is None
        assert store.manifest_for(stored.sha1) == (None, None)
        assert store.manifest_for(stored.sha1, "0" * 40) == (None, None)


@pytest.mark.parametrize("content", [None, "", "f" * 40, "torn", "\n\n", "é" * 40])
def test_a_missing_torn_or_foreign_sidecar_is_made_again(store: FileStore, content: str | None) -> None:
    data = counter_stream(SIZE_BYTES)
    stored = store.put_bytes(data)
    sidecar = _sidecar(store, stored.sha1)
    sidecar.unlink()
    if content is not None:
        sidecar.write_text(content)
    expected = _manifest(data, CHUNK_SIZE_BYTES)
    assert store.manifest_for(stored.sha1) == (expected.name, expected)
    assert sidecar.read_text() == stored.manifest_sha1


def test_a_sidecar_of_another_file_is_not_believed(store: FileStore) -> None:
    stored = store.put_bytes(counter_stream(SIZE_BYTES))
    other = store.put_bytes(counter_stream(SIZE_BYTES + 1))
    assert other.manifest_sha1 is not None
    _sidecar(store, stored.sha1).write_text(other.manifest_sha1)
    assert store.manifest_for(stored.sha1)[0] == stored.manifest_sha1


def test_a_damaged_manifest_is_written_again(store: FileStore) -> None:
    stored = store.put_bytes(counter_stream(SIZE_BYTES))
    assert stored.manifest_sha1 is not None
    path = store.find(stored.manifest_sha1).path
    path.write_bytes(path.read_bytes()[:-5])
    name, manifest = store.manifest_for(stored.sha1)
    assert manifest is not None
    assert name == sha1_of(manifest.encode()) == sha1_of(path.read_bytes())


def test_a_wanted_manifest_of_other_chunks_is_used_when_it_is_true(store: FileStore) -> None:
    data = counter_stream(SIZE_BYTES)
    stored = store.put_bytes(data)
    # 2022 cut at 20,000,000 bytes: another length, a multiple of 64 too.
    wanted = _manifest(data, 20_032)
    assert store.manifest_for(stored.sha1, wanted.name)[0] == stored.manifest_sha1
    store.put_bytes(wanted.encode())
    assert store.manifest_for(stored.sha1, wanted.name) == (wanted.name, wanted)
    assert store.manifest_for(stored.sha1)[0] == stored.manifest_sha1


def test_a_wanted_manifest_becomes_the_noted_one_where_there_was_none(store: FileStore) -> None:
    data = counter_stream(SIZE_BYTES)
    wanted = _manifest(data, 20_032)
    stored = store.put_bytes(data)
    _sidecar(store, stored.sha1).unlink()
    store.put_bytes(wanted.encode())
    assert store.manifest_for(stored.sha1, wanted.name) == (wanted.name, wanted)
    assert FileStore(store.root, chunk_size_bytes=CHUNK_SIZE_BYTES).manifest_for(stored.sha1) == (wanted.name, wanted)


def test_a_wanted_manifest_that_lies_is_refused(store: FileStore) -> None:
    data = counter_stream(SIZE_BYTES)
    stored = store.put_bytes(data)
    true = _manifest(data, CHUNK_SIZE_BYTES)
    swapped = true._replace(chunks=(true.chunks[0]._replace(sha1="1" * 40), *true.chunks[1:]))
    uneven = true._replace(chunks=(Chunk(0, 64, sha1_of(data[:64])), Chunk(64, SIZE_BYTES, sha1_of(data[64:]))))
    odd = true._replace(chunks=(Chunk(0, 299_999, sha1_of(data[:-1])), Chunk(299_999, SIZE_BYTES, sha1_of(data[-1:]))))
    foreign = true._replace(sha1="2" * 40)
    for lie in (swapped, uneven, odd, foreign):
        store.put_bytes(lie.encode())
        for _ in range(2):
            assert store.manifest_for(stored.sha1, lie.name) == (true.name, true)


def test_a_damaged_file_gets_no_manifest(store: FileStore) -> None:
    stored = store.put_bytes(counter_stream(SIZE_BYTES))
    _sidecar(store, stored.sha1).unlink()
    with store.find(stored.sha1).path.open("r+b") as file:
        file.write(b"other")
    with pytest.raises(CorruptFile, match=stored.sha1):
        store.manifest_for(stored.sha1)
    assert not _sidecar(store, stored.sha1).exists()
