"""The client and another node: slices through fsspec, what a terminal shows, and taking a request back."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.client.fs import KacheryFileSystem
from tests.cli.test_file_commands import on_terminal
from tests.system.support import CHUNK_SIZE_BYTES, QUICK, make_recording, objects, store, wait_until

# A transfer of 40 chunks takes two seconds, and can be met in the middle.
RATE_BYTES = 20 * CHUNK_SIZE_BYTES


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    environ = {**QUICK, "KACHERY_BUCKET_RATE_BYTES_MAX": str(RATE_BYTES)}
    with Lab(tmp_path_factory.mktemp("lab"), environ=environ) as lab:
        lab.start_hub()
        lab.add_node("A")
        lab.add_node("B")
        yield lab


@pytest.fixture
def b(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> LabNode:
    """The node B, whose environment is also that of the test."""
    node = lab.nodes["B"]
    for name, value in node.environ.items():
        if name.startswith("KACHERY_"):
            monkeypatch.setenv(name, value)
    KacheryFileSystem.clear_instance_cache()
    return node


def transfers(node: LabNode) -> list[dict]:
    return list(node.connection.info()["transfers"])


def test_a_slice_through_fsspec_moves_one_chunk(lab: Lab, b: LabNode, tmp_path: Path) -> None:
    path = make_recording(tmp_path / "long.dat", 40 * CHUNK_SIZE_BYTES + 5, seed=11)
    uri = store(lab.nodes["A"], path)
    before = set(objects(lab.bucket_dir))
    with fsspec.open(uri, channel=lab.channel, block_size=CHUNK_SIZE_BYTES) as file:
        assert file.size == path.stat().st_size
        file.seek(20 * CHUNK_SIZE_BYTES + 1000)
        assert file.read(4096) == path.read_bytes()[20 * CHUNK_SIZE_BYTES + 1000 :][:4096]
    assert len(set(objects(lab.bucket_dir)) - before) == 2  # the chunk and the manifest
    fs = fsspec.filesystem("sha1")  # the channel of KACHERY_CHANNEL
    assert fs.info(uri)["size"] == path.stat().st_size
    assert fs.exists(uri)
    assert fs.cat_file(uri, -5) == path.read_bytes()[-5:]
    assert fs.tail(uri, 3) == path.read_bytes()[-3:]
    with pytest.raises(errors.NotInStore):
        kf.load_file(uri, local_only=True)


def test_a_manifest_of_another_file_is_not_believed(lab: Lab, b: LabNode, tmp_path: Path) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "x.dat", 3 * CHUNK_SIZE_BYTES, seed=12))
    manifest = uri.partition("?")[2]
    with pytest.raises(errors.InvalidArgument, match="another file"):
        fsspec.filesystem("sha1").size(f"sha1://{'1' * 40}?{manifest}")


def test_a_range_of_a_remote_file_must_lie_within_it(lab: Lab, b: LabNode, tmp_path: Path) -> None:
    path = make_recording(tmp_path / "y.dat", 3 * CHUNK_SIZE_BYTES, seed=13)
    uri = store(lab.nodes["A"], path)
    assert kf.load_bytes(uri, 10, 20) == path.read_bytes()[10:20]
    size = path.stat().st_size
    assert kf.load_bytes(uri, size) == kf.load_bytes(uri, size, size) == kf.load_bytes(uri, 0, 0) == b""
    outside = [(10, size + 1), (0, size + 1), (size, size + 1), (size + 1, None), (size + 1, size + 1), (10**9, None),
               (10**9, 2 * 10**9)]
    remote = [refusal(uri, start, end) for start, end in outside]
    assert not [text for text in remote if f"which has {size} bytes" not in text]
    done = b.run("cat", uri, "--start", str(10 * size))
    assert (done.returncode, done.stdout) == (2, b"")
    kf.load_file(uri)
    assert [refusal(uri, start, end) for start, end in outside] == remote


def refusal(uri: str, start: int, end: int | None) -> str:
    with pytest.raises(errors.InvalidArgument, match="not within") as caught:
        kf.load_bytes(uri, start, end)
    return str(caught.value)


def test_an_empty_or_small_file_elsewhere_has_its_length_too(lab: Lab, b: LabNode, tmp_path: Path) -> None:
    for size in (0, 5):
        uri = store(lab.nodes["A"], make_recording(tmp_path / f"{size}.dat", size, seed=18))
        assert kf.load_bytes(uri, size) == b""
        for start, end in ((size + 1, None), (0, size + 1)):
            assert f"which has {size} bytes" in refusal(uri, start, end)


def test_a_terminal_shows_how_far_a_load_is(lab: Lab, b: LabNode, tmp_path: Path) -> None:
    path = make_recording(tmp_path / "shown.dat", 30 * CHUNK_SIZE_BYTES, seed=14)
    uri = store(lab.nodes["A"], path)
    code, out, shown = on_terminal(b.environ, "load", uri)
    assert code == 0
    assert Path(out.rstrip("\n")).read_bytes() == path.read_bytes()
    assert "shown.dat" in shown
    assert "7.9 MB" in shown
    assert re.search(r"\d\.\d MB/s", shown)
    assert re.search(r"0:00:0[1-9]", shown)  # the time that is left
    assert re.search(r"looking in the bucket|asking \d nodes?|waiting for A|downloading", shown)


def test_progress_tells_of_the_load(lab: Lab, b: LabNode, tmp_path: Path) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "told.dat", 30 * CHUNK_SIZE_BYTES, seed=15))
    told: list[kf.Progress] = []
    loaded = kf.load(uri, progress=told.append)
    assert (loaded.source, loaded.size) == ("channel", 30 * CHUNK_SIZE_BYTES)
    assert [step.done_bytes for step in told] == sorted(step.done_bytes for step in told)
    assert {step.total_bytes for step in told} - {None} == {30 * CHUNK_SIZE_BYTES}
    assert any(step.waiting for step in told)


def test_ctrl_c_takes_the_request_back(lab: Lab, b: LabNode, tmp_path: Path) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "long2.dat", 200 * CHUNK_SIZE_BYTES, seed=16))
    process = b.begin("load", uri)
    wait_until(lambda: any(transfer["received"] for transfer in transfers(b)), "the load has begun")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"Interrupted.\n")
    wait_until(lambda: not transfers(b), "the node has given the request up")


def test_leaving_a_load_in_python_takes_the_request_back(lab: Lab, b: LabNode, tmp_path: Path) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "long3.dat", 200 * CHUNK_SIZE_BYTES, seed=17))

    def leave(step: kf.Progress) -> None:
        if step.done_bytes:
            assert transfers(b)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kf.load_file(uri, progress=leave)
    wait_until(lambda: not transfers(b), "the node has given the request up")
