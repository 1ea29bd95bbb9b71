"""Storing many files in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import LocalFileMissing, NotADataFile
from kachery_fast.store import FileStore, Stored, batch

from .data import counter_stream, files_below, sha1_of

MIB = 1024 * 1024


@pytest.fixture(params=[True, False], ids=["durable", "quick"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> FileStore:
    return FileStore(tmp_path / "store", chunk_size_bytes=2 * MIB, durable=request.param)


def _tree(tmp_path: Path, count: int) -> list[Path]:
    stream = counter_stream(count * 100)
    paths = []
    for number in range(count):
        paths.append(tmp_path / f"{number}.dat")
        paths[-1].write_bytes(stream[number * 100 : number * 100 + 100])
    return paths


def test_answers_stand_in_the_order_of_the_files(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "BATCH_FILES_MAX", 7)
    paths = _tree(tmp_path, 40)
    large = tmp_path / "large"
    large.write_bytes(counter_stream(5 * MIB))
    paths[20:20] = [tmp_path / "absent", large, tmp_path, paths[3]]
    told: list[tuple[Any, Any]] = []
    answers = store.put_files(paths, on_done=lambda path, answer: told.append((path, answer)))
    for path, answer in zip(paths, answers, strict=True):
        if path.is_file():
            assert isinstance(answer, Stored)
            assert answer.sha1 == sha1_of(path.read_bytes())
            assert store.find(answer.sha1).path.read_bytes() == path.read_bytes()
    assert isinstance(answers[20], LocalFileMissing)
    assert isinstance(answers[22], NotADataFile)
    assert answers[23] == answers[3]
    assert sorted(map(str, told)) == sorted(map(str, zip(paths, answers, strict=True)))
    assert files_below(store.root / "tmp") == []
    assert list((store.root / "tmp").iterdir()) == []
    assert store.put_files(paths)[:20] == answers[:20]
    assert store.put_files([]) == []


def test_nothing_to_store_creates_nothing(store: FileStore, tmp_path: Path) -> None:
    assert store.put_files([]) == []
    assert isinstance(store.put_files([tmp_path / "absent"])[0], LocalFileMissing)
    assert not store.root.exists()


def test_what_on_done_raises_ends_the_call_cleanly(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "BATCH_FILES_MAX", 3)

    def stop(_path: object, _answer: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put_files(_tree(tmp_path, 20), on_done=stop)
    assert list((store.root / "tmp").iterdir()) == []
    assert store.verify_all().damaged == 0


def test_names_are_given_only_after_the_flush(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_at_flush: list[int] = []

    def look(_directory: Path) -> bool:
        named_at_flush.append(store.totals().files)
        return True

    monkeypatch.setattr(batch, "sync_file_system", look)
    store.put_files(_tree(tmp_path, 10))
    assert named_at_flush == ([0, 10] if store._writer.durable else [])


def test_without_syncfs_each_file_is_flushed(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "sync_file_system", lambda _directory: False)
    assert len(store.put_files(_tree(tmp_path, 10))) == 10
    assert store.verify_all() == (10, 0, 1000)
