"""Unfinished downloads, and making them files of the store."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kachery_fast._chunker import Reassembly, chunk_ranges
from kachery_fast._core import digest_buffer
from kachery_fast.errors import DiskError, ManifestInvalid
from kachery_fast.protocol.manifest import make_manifest
from kachery_fast.store import FileStore

from .data import counter_stream, files_below, sha1_of

CHUNK_SIZE_BYTES = 64 * 1024
DAY_SECONDS = 86400.0


@pytest.fixture(params=[True, False], ids=["durable", "quick"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> FileStore:
    return FileStore(tmp_path / "store", chunk_size_bytes=CHUNK_SIZE_BYTES, durable=request.param)


def _manifest(data: bytes) -> bytes:
    size, sha1, chunk_sha1s = digest_buffer(data, CHUNK_SIZE_BYTES)
    return make_manifest(size, sha1, chunk_sha1s, CHUNK_SIZE_BYTES).encode()


def test_a_verified_download_becomes_a_file_with_its_manifest(store: FileStore) -> None:
    data = counter_stream(300_000)
    sha1 = sha1_of(data)
    part = store.part_path(sha1)
    assert part.name == sha1 + ".part"
    part.write_bytes(data)
    assert not store.has(sha1)
    located = store.adopt(part, sha1, manifest=_manifest(data))
    assert located == store.find(sha1) == store.verify(sha1)
    assert store.manifest_for(sha1)[0] == sha1_of(_manifest(data))
    assert [name for name in files_below(store.root) if "part" in name] == []


def test_a_download_of_one_chunk_needs_no_manifest(store: FileStore) -> None:
    part = store.part_path(sha1_of(b"small"))
    part.write_bytes(b"small")
    assert store.adopt(part, sha1_of(b"small"), manifest=None).size == 5
    assert store.manifest_for(sha1_of(b"small")) == (None, None)


def test_a_download_of_what_was_stored_meanwhile_is_dropped(store: FileStore) -> None:
    data = counter_stream(300_000)
    part = store.part_path(sha1_of(data))
    part.write_bytes(data)
    before = store.find(store.put_bytes(data).sha1).path.stat()
    located = store.adopt(part, sha1_of(data), manifest=_manifest(data))
    assert located.path.stat().st_ino == before.st_ino
    assert not part.exists()


@pytest.mark.parametrize("manifest", [b"", b"{}", _manifest(counter_stream(300_001))], ids=["empty", "none", "other"])
def test_a_manifest_of_another_file_is_refused(store: FileStore, manifest: bytes) -> None:
    data = counter_stream(300_000)
    part = store.part_path(sha1_of(data))
    part.write_bytes(data)
    with pytest.raises(ManifestInvalid):
        store.adopt(part, sha1_of(data), manifest=manifest)
    assert part.exists()
    assert not store.has(sha1_of(data))


def test_adopting_nothing_is_an_error(store: FileStore) -> None:
    with pytest.raises(DiskError):
        store.adopt(store.part_path("0" * 40), "0" * 40, manifest=None)


def test_a_reassembled_file_has_the_mode_of_any_other(store: FileStore) -> None:
    data = counter_stream(300_000)
    size, sha1, chunk_sha1s = digest_buffer(data, CHUNK_SIZE_BYTES)
    part = store.part_path(sha1)
    assembly = Reassembly(str(part), size, chunk_ranges(size, CHUNK_SIZE_BYTES), list(chunk_sha1s), reserve=True)
    assembly.close()
    with part.open("r+b") as file:
        file.write(data)
    located = store.adopt(part, sha1, manifest=_manifest(data))
    store.verify(sha1)
    other = store.find(store.put_bytes(b"x").sha1)
    assert located.path.stat().st_mode == other.path.stat().st_mode


def test_downloads_are_kept_for_their_days_and_then_cleaned(store: FileStore) -> None:
    now = time.time()
    part = store.part_path("0" * 40)
    part.write_bytes(b"12345")
    marker = store.root / "tmp" / ("0" * 40 + ".part-of")
    for days in (0.0, 6.9):
        assert store.clean(now=now + days * DAY_SECONDS, partial_keep_days=7.0).parts == 0
    os.utime(part, (now, now + 5 * DAY_SECONDS))
    assert store.clean(now=now + 8 * DAY_SECONDS, partial_keep_days=7.0).parts == 0
    assert part.exists()
    assert marker.exists()
    assert store.clean(now=now + 13 * DAY_SECONDS, partial_keep_days=7.0) == (0, 1, 5)
    assert files_below(store.root) == []


def test_a_marker_without_a_download_goes_too(store: FileStore) -> None:
    store.part_path("0" * 40)
    assert store.clean(now=time.time(), partial_keep_days=7.0) == (0, 0, 0)
    assert len(files_below(store.root)) == 1
    store.clean(now=time.time() + 8 * DAY_SECONDS, partial_keep_days=7.0)
    assert files_below(store.root) == []


def test_a_download_begun_again_is_marked_anew(store: FileStore) -> None:
    store.part_path("0" * 40)
    marker = store.root / "tmp" / ("0" * 40 + ".part-of")
    os.utime(marker, (1, 1))
    store.part_path("0" * 40)
    assert marker.stat().st_mtime > 1000
