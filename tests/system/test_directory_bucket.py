"""A channel on a folder that hub and nodes share, in real processes: nothing goes by HTTP but words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_fast.cli.lab import Lab
from tests.system.support import CHUNK_SIZE_BYTES, QUICK, load, make_recording, store, wait_until

SIZE = 6 * CHUNK_SIZE_BYTES + 5


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("lab")
    (directory / "shared" / "lab").mkdir(parents=True)
    with Lab(directory, environ={**QUICK, "KACHERY_HUB_BUCKET_FOLDERS": str(directory / "shared"),
                                 "KACHERY_CHANNEL_REFRESH_SECONDS": "0.3"}) as lab:
        lab.start_hub()
        assert lab.owner("bucket", "demo", "--folder", str(directory / "shared" / "lab"))["test"]["ok"]
        assert "test" not in lab.owner("bucket", "demo", "--use", "lab"), "it is known, and was tested"
        assert lab.owner("bucket", "demo", "--use", "lab", "--test")["test"]["ok"]
        for name in ("A", "B"):
            lab.add_node(name)
        yield lab


def test_a_file_goes_from_node_to_node_through_the_folder(lab: Lab, tmp_path: Path) -> None:
    folder = lab.directory / "shared" / "lab"
    recording = make_recording(tmp_path / "recording.dat", SIZE)
    uri = store(lab.nodes["A"], recording)
    assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()
    assert len(lab.owner("objects", "demo")["objects"]) == 8, "seven chunks and the manifest"
    assert len([path for path in folder.rglob("*") if path.is_file() and "sha1" in path.parts]) == 8
    assert not lab.bucket_dir.exists(), "the hub's own bucket has nothing of it"


def test_what_is_damaged_in_the_folder_is_removed_and_written_again(lab: Lab, tmp_path: Path) -> None:
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=2)
    uri = store(lab.nodes["A"], recording)
    before = {path for path in (lab.directory / "shared" / "lab").rglob("*") if path.is_file()}
    lab.nodes["A"].json("upload", uri)
    objects = {path for path in (lab.directory / "shared" / "lab").rglob("*") if path.is_file()} - before
    chunk = next(path for path in objects if path.stat().st_size == CHUNK_SIZE_BYTES)
    chunk.chmod(0o600)
    with chunk.open("r+b") as file:
        file.write(b"damage")
    assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()
    assert not chunk.read_bytes().startswith(b"damage")


def test_a_node_that_is_killed_while_it_writes_leaves_no_half_object(lab: Lab, tmp_path: Path) -> None:
    recording = make_recording(tmp_path / "recording.dat", 200 * CHUNK_SIZE_BYTES, seed=3)
    uri = store(lab.nodes["A"], recording)
    uploading = lab.nodes["A"].begin("upload", uri, "--json")
    folder = lab.directory / "shared" / "lab" / "demo"
    before = sum(path.is_file() for path in folder.rglob("*"))
    wait_until(lambda: sum(path.is_file() for path in folder.rglob("*")) > before + 5, "objects arrive")
    lab.nodes["A"].program.kill()
    uploading.communicate(timeout=60)
    assert uploading.returncode != 0
    lab.nodes["A"].start()
    assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()


def test_a_folder_that_is_not_there_is_named_and_no_empty_one_is_taken_for_it(lab: Lab, tmp_path: Path) -> None:
    folder = lab.directory / "shared" / "lab"
    uri = store(lab.nodes["A"], make_recording(tmp_path / "recording.dat", SIZE, seed=4))
    folder.rename(folder.with_name("away"))
    folder.mkdir()
    try:
        refused = lab.nodes["A"].run("upload", uri)
        assert refused.returncode == 5
        assert b"is its file system mounted on this machine" in refused.stderr
        assert list(folder.iterdir()) == []
    finally:
        folder.rmdir()
        folder.with_name("away").rename(folder)
    lab.nodes["A"].json("upload", uri)
