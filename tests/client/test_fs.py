"""Reading through fsspec what is in the local store; tests/cli/test_lab.py reads from another node."""

from __future__ import annotations

import hashlib
import importlib.metadata
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client.fs import KacheryFileSystem

DATA = hashlib.shake_128(b"fsspec").digest(300_000)


@pytest.fixture
def uri(store_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KACHERY_CHUNK_SIZE_BYTES", "65536")
    KacheryFileSystem.clear_instance_cache()
    path = tmp_path / "recording.dat"
    path.write_bytes(DATA)
    uri = kf.store_file(path)
    assert "?manifest=" in uri
    return uri


@pytest.fixture
def fs(uri: str) -> Any:
    return fsspec.filesystem("sha1")


def test_the_protocol_is_known_wherever_the_package_is_installed() -> None:
    entries = {entry.name: entry.value for entry in importlib.metadata.entry_points(group="fsspec.specs")}
    assert entries["sha1"] == "kachery_fast.client.fs:KacheryFileSystem"


def test_a_file_is_opened_by_its_uri(uri: str) -> None:
    with fsspec.open(uri) as file:
        file.seek(100_000)
        assert file.read(50) == DATA[100_000:100_050]
        file.seek(-10, 2)
        assert file.read() == DATA[-10:]


def test_text_is_decoded(store_dir: Path) -> None:
    with fsspec.open(kf.store_text("Grüße\n"), "rt", encoding="utf-8") as file:
        assert file.read() == "Grüße\n"


def test_a_file_has_a_length_and_no_directory(fs: Any, uri: str) -> None:
    found = fs.info(uri)
    assert (found["size"], found["type"]) == (300_000, "file")
    assert fs.size(uri) == 300_000
    assert fs.isfile(uri)
    assert not fs.isdir(uri)
    assert fs.glob(uri) == fs.ls(uri, detail=False) == [uri.removeprefix("sha1://")]
    assert fs.ukey(uri) == hashlib.sha1(DATA).hexdigest()


@pytest.mark.parametrize(("start", "end"), [(None, None), (5, 10), (-10, None), (0, -299_990), (None, 7)])
def test_ranges_count_from_either_end(fs: Any, uri: str, start: int | None, end: int | None) -> None:
    assert fs.cat_file(uri, start, end) == DATA[start:end]


def test_a_file_is_copied_out(fs: Any, uri: str, tmp_path: Path) -> None:
    fs.get(uri, str(tmp_path / "out.dat"))
    assert (tmp_path / "out.dat").read_bytes() == DATA
    (tmp_path / "into").mkdir()
    fs.get([uri], str(tmp_path / "into"))
    assert (tmp_path / "into" / "recording.dat").read_bytes() == DATA


def test_what_is_not_here_does_not_exist(fs: Any) -> None:
    assert not fs.exists("sha1://" + "0" * 40)
    with pytest.raises(errors.NoChannel):
        fs.info("sha1://" + "0" * 40)
    with pytest.raises(errors.InvalidUri):
        fs.info("sha1://nonsense")


def test_nothing_is_written(fs: Any, uri: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="'rb'"):
        fs.open(uri, "wb")


def test_it_travels_to_other_processes(uri: str) -> None:
    fs = fsspec.filesystem("sha1", channel="lab")
    assert pickle.loads(pickle.dumps(fs)).channel == "lab"
