"""Dying at any point: never wrong bytes under a right name, and nothing left after cleaning."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from kachery_fast.errors import NotInStore
from kachery_fast.store import FileStore

from .children import CHUNK_SIZE_BYTES, OPERATIONS, run_child, start_child
from .data import counter_stream, files_below, sha1_of, sound

DAY_SECONDS = 86400.0


def _source(tmp_path: Path, size: int = 300_000) -> Path:
    source = tmp_path / "source.dat"
    source.write_bytes(counter_stream(size))
    source.with_suffix(".small").write_bytes(b"small")
    return source


def _check(root: Path, source: Path) -> bool:
    """Check a store after a crash, clean it, and check that it works; whether it had the file."""
    data = source.read_bytes()
    sha1 = sha1_of(data)
    sound(root)
    store = FileStore(root, chunk_size_bytes=CHUNK_SIZE_BYTES)
    try:
        with store.open(sha1) as file:
            assert file.read() == data
        held = True
    except NotInStore:
        held = False
    store.clean(now=time.time() + 30 * DAY_SECONDS, partial_keep_days=1.0)
    assert [name for name in files_below(root) if name.startswith("tmp/") or name.endswith(".part")] == []
    if held:
        name, manifest = store.manifest_for(sha1)
        assert manifest is not None
        assert manifest.size == len(data)
        assert name == sha1_of(manifest.encode())
    stored = store.put_file(source)
    assert stored.sha1 == sha1
    assert store.manifest_for(sha1)[0] == stored.manifest_sha1
    store.verify(sha1)
    return held


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_death_at_each_system_call_leaves_nothing_or_the_right_bytes(tmp_path: Path, operation: str) -> None:
    source = _source(tmp_path)
    (tmp_path / "roots").mkdir()
    lines = run_child("stages", operation, tmp_path / "roots", source)
    held = [_check(Path(line.split()[0]), source) for line in lines]
    assert [line.split()[1] for line in lines] == ["killed"] * (len(lines) - 1) + ["done"]
    assert len(lines) > 15
    assert not held[0]
    assert held[-1] == (operation not in ("remove", "evict"))


@pytest.mark.parametrize("operation", ["put_file", "put_files", "link_file"])
def test_sigkill_at_any_moment_leaves_nothing_or_the_right_bytes(tmp_path: Path, operation: str) -> None:
    source = _source(tmp_path, 4_000_000)
    chance = random.Random(operation)
    for number in range(6):
        root = tmp_path / str(number)
        with start_child("loop", operation, root, source) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            # Real time on purpose: the moment of death is what is tried.
            time.sleep(chance.uniform(0.0, 0.05))
            child.kill()
        _check(root, source)


def test_cleaning_spares_a_file_that_is_being_written(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with start_child("hold", root) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        store = FileStore(root)
        cleaned = store.clean(now=time.time() + 30 * DAY_SECONDS, partial_keep_days=1.0)
        assert cleaned.temp_files == 0
        assert len(files_below(root / "tmp")) == 2
        output, _ = child.communicate("go on\n", timeout=30)
    assert output.strip() == sha1_of(b"half of it")
    assert store.has(sha1_of(b"half of it"))


def test_cleaning_removes_what_a_dead_writer_left(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with start_child("hold", root) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.kill()
        child.wait()
    assert len(files_below(root)) == 2
    cleaned = FileStore(root).clean(now=time.time(), partial_keep_days=1.0)
    assert (cleaned.temp_files, cleaned.bytes) == (2, len(b"half of it"))
    assert files_below(root) == []


def test_cleaning_removes_leftovers_of_2022_after_a_day(tmp_path: Path) -> None:
    left = tmp_path / "store.file.abcdefghij.tmp"
    left.write_bytes(b"12345")
    keep = tmp_path / "mutables.db"
    keep.write_bytes(b"")
    store = FileStore(tmp_path)
    assert store.clean(now=time.time(), partial_keep_days=1.0).temp_files == 0
    assert store.clean(now=time.time() + 2 * DAY_SECONDS, partial_keep_days=1.0) == (1, 0, 5)
    assert files_below(tmp_path) == ["mutables.db"]


def test_cleaning_a_store_that_was_never_written_to_does_nothing(tmp_path: Path) -> None:
    assert FileStore(tmp_path / "absent").clean(now=time.time(), partial_keep_days=1.0) == (0, 0, 0)
    assert not (tmp_path / "absent").exists()
