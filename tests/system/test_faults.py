"""Processes killed, bytes spoilt, disks full: the transfer ends well, or the error names the cause."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_fast.cli.lab import Lab
from kachery_fast.errors import DiskFull, HubUnreachable, KacheryError, NodeNotRunning, NotAvailable
from tests.native.disks import MIB, mounted
from tests.system.support import (
    CHUNK_SIZE_BYTES,
    QUICK,
    finish,
    load,
    make_recording,
    objects,
    received,
    store,
    traffic,
    wait_until,
)

SIZE = 60 * CHUNK_SIZE_BYTES + 12345
RATE_BYTES = 24 * CHUNK_SIZE_BYTES  # a second: a transfer takes about three seconds, and can be met in the middle


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path / "lab", environ={**QUICK, "KACHERY_BUCKET_RATE_BYTES_MAX": str(RATE_BYTES)}) as lab:
        lab.start_hub()
        lab.add_node("A")
        lab.add_node("B")
        yield lab


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return make_recording(tmp_path / "recording.dat", SIZE)


def begin_load(lab: Lab, uri: str) -> subprocess.Popen[bytes]:
    """Begin a load at B and return when a part of it has arrived."""
    b = lab.nodes["B"]
    process = b.begin("load", uri, "--json")
    wait_until(lambda: received(b) > 8 * CHUNK_SIZE_BYTES, "a part of the file has arrived")
    return process


def test_a_provider_that_is_killed_and_comes_back_finishes_its_work(lab: Lab, recording: Path) -> None:
    a = lab.nodes["A"]
    uri = store(a, recording)
    process = begin_load(lab, uri)
    a.program.kill()
    a.start()
    assert Path(finish(process)["path"]).read_bytes() == recording.read_bytes()


def test_another_provider_takes_over_when_one_is_killed(lab: Lab, recording: Path) -> None:
    second = lab.add_node("second")
    uri = store(lab.nodes["A"], recording)
    process = begin_load(lab, uri)
    lab.nodes["A"].program.kill()
    store(second, recording)
    assert Path(finish(process)["path"]).read_bytes() == recording.read_bytes()
    assert traffic(second)["uploaded_objects"] > 0


def test_a_killed_provider_without_a_substitute_is_named(tmp_path: Path, recording: Path) -> None:
    environ = {**QUICK, "KACHERY_BUCKET_RATE_BYTES_MAX": str(RATE_BYTES), "KACHERY_PATIENCE_SECONDS": "4"}
    with Lab(tmp_path / "lab", environ=environ) as lab:
        lab.start_hub()
        lab.add_node("A")
        lab.add_node("B")
        uri = store(lab.nodes["A"], recording)
        process = begin_load(lab, uri)
        lab.nodes["A"].program.kill()
        with pytest.raises(NotAvailable) as caught:
            finish(process)
        assert "A (" in str(caught.value)
        assert "fell silent after uploading" in str(caught.value)
        lab.nodes["A"].start()
        assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()


def test_a_provider_that_is_killed_in_the_middle_of_a_read_is_named(tmp_path: Path, recording: Path) -> None:
    environ = {**QUICK, "KACHERY_BUCKET_RATE_BYTES_MAX": str(RATE_BYTES), "KACHERY_PATIENCE_SECONDS": "4"}
    with Lab(tmp_path / "lab", environ=environ) as lab:
        lab.start_hub()
        lab.add_node("A")
        b = lab.add_node("B")
        process = b.begin("cat", store(lab.nodes["A"], recording))
        assert process.stdout is not None
        begin = process.stdout.read(8 * CHUNK_SIZE_BYTES)
        lab.nodes["A"].program.kill()
        rest, err = process.communicate(timeout=90)
        out = begin + rest
        assert process.returncode == NotAvailable.exit_code
        assert 0 < len(out) < SIZE, "it was met in the middle"
        assert recording.read_bytes().startswith(out)
        assert b"A (" in err
        assert b"fell silent" in err


def test_a_requester_that_is_killed_resumes_with_what_it_has(lab: Lab, recording: Path) -> None:
    b = lab.nodes["B"]
    uri = store(lab.nodes["A"], recording)
    process = begin_load(lab, uri)
    b.program.kill()
    with pytest.raises(KacheryError):
        finish(process)
    b.start()
    assert Path(load(b, uri)["path"]).read_bytes() == recording.read_bytes()
    assert traffic(b)["downloaded_objects"] < 61  # 61 in all; at least one was sound on the disk
    assert not list(b.storage_dir.rglob("*.part"))


def test_the_hub_killed_in_the_middle_and_started_again_costs_time_only(lab: Lab, recording: Path) -> None:
    uri = store(lab.nodes["A"], recording)
    process = begin_load(lab, uri)
    lab.hub.kill()
    lab.start_hub()
    assert Path(finish(process)["path"]).read_bytes() == recording.read_bytes()


def test_damaged_objects_are_removed_and_only_they_are_fetched_again(lab: Lab, recording: Path) -> None:
    uri = store(lab.nodes["A"], recording)
    load(lab.nodes["B"], uri)
    third = lab.add_node("third")
    victims = [path for path in objects(lab.bucket_dir) if path.stat().st_size == CHUNK_SIZE_BYTES][:2]
    for victim in victims:
        victim.write_bytes(bytes(CHUNK_SIZE_BYTES))
    before = traffic(lab.nodes["A"])["uploaded_objects"] + traffic(lab.nodes["B"])["uploaded_objects"]
    assert Path(load(third, uri)["path"]).read_bytes() == recording.read_bytes()
    after = traffic(lab.nodes["A"])["uploaded_objects"] + traffic(lab.nodes["B"])["uploaded_objects"]
    assert after - before == 2
    assert traffic(third)["downloaded_objects"] == 61 + 2
    assert all(victim.read_bytes() != bytes(CHUNK_SIZE_BYTES) for victim in victims)


def test_a_damaged_object_that_nobody_can_replace_is_reported_as_such(lab: Lab, recording: Path) -> None:
    uri = store(lab.nodes["A"], recording)
    load(lab.nodes["B"], uri)
    third = lab.add_node("third", permissions=["requestFiles"])
    lab.nodes["A"].program.stop()
    lab.nodes["B"].program.stop()
    victim = next(path for path in objects(lab.bucket_dir) if path.stat().st_size == CHUNK_SIZE_BYTES)
    victim.write_bytes(bytes(CHUNK_SIZE_BYTES))
    third.environ["KACHERY_PATIENCE_SECONDS"] = "2"
    third.program.stop()
    third.start()
    with pytest.raises(NotAvailable) as caught:
        load(third, uri)
    assert "no answer from" in str(caught.value) or "none came back" in str(caught.value)
    assert not victim.exists()


def test_a_full_disk_is_an_error_up_front_and_leaves_nothing(lab: Lab, recording: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "tmpfs", 6 * MIB) as small:
        uri = store(lab.nodes["A"], recording)
        crowded = lab.add_node("crowded", KACHERY_STORAGE_DIR=str(small / "storage"))
        before = traffic(lab.nodes["A"])["uploaded_objects"]
        with pytest.raises(DiskFull) as caught:
            load(crowded, uri)
        assert str(SIZE) in str(caught.value)
        assert crowded.run("load", uri).returncode == 7
        assert not list(small.rglob("*.part"))
        # Only the manifest has travelled: the room is looked for before chunks are asked for.
        assert traffic(lab.nodes["A"])["uploaded_objects"] - before <= 1
        crowded.program.stop()


def test_a_revoked_node_is_refused_at_once(tmp_path: Path, recording: Path) -> None:
    # So slow that the transfer is under way for ten seconds: revoking takes the time of a command.
    with Lab(tmp_path / "lab", environ={**QUICK, "KACHERY_BUCKET_RATE_BYTES_MAX": str(RATE_BYTES // 4)}) as lab:
        lab.start_hub()
        a, b = lab.add_node("A"), lab.add_node("B")
        uri = store(a, recording)
        ids = [str(node.connection.info()["nodeId"]) for node in (a, b)]
        process = begin_load(lab, uri)
        lab.owner("revoke", "demo", ids[0], "provideFiles")
        with pytest.raises(KacheryError) as caught:
            finish(process)
        assert "A (" in str(caught.value) or "no other node" in str(caught.value)
        lab.owner("revoke", "demo", ids[1], "all")
        wait_until(lambda: b.run("load", uri).returncode in (3, 4), "the revocation has reached B")


def test_a_withdrawn_load_leaves_nothing_running_and_resumes_later(lab: Lab, recording: Path) -> None:
    b = lab.nodes["B"]
    uri = store(lab.nodes["A"], recording)
    process = begin_load(lab, uri)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    wait_until(lambda: not b.connection.info()["transfers"], "the node has let go")
    assert Path(load(b, uri)["path"]).read_bytes() == recording.read_bytes()


def test_a_node_starts_without_its_hub_and_finds_it_later(lab: Lab, recording: Path) -> None:
    a, b = lab.nodes["A"], lab.nodes["B"]
    uri = store(a, recording)
    for node in (a, b):
        node.program.stop()
    lab.hub.stop()
    for node in (a, b):
        node.start(connected=False)
    assert Path(load(a, uri)["path"]).read_bytes() == recording.read_bytes()
    done = b.run("load", uri)
    assert done.returncode == HubUnreachable.exit_code == 5
    assert lab.hub_url in done.stderr.decode()
    lab.start_hub()
    wait_until(lambda: all(c["connected"] for node in (a, b) for hub in node.connection.info()["hubs"]
                           for c in hub["channels"] or [{"connected": False}]), "both are back")
    assert Path(load(b, uri)["path"]).read_bytes() == recording.read_bytes()


def test_without_a_node_the_error_says_how_to_start_one(lab: Lab) -> None:
    b = lab.nodes["B"]
    b.program.stop()
    with pytest.raises(NodeNotRunning, match="kachery-fast node start"):
        load(b, "sha1://" + "ab" * 20)
    assert b.run("load", "sha1://" + "ab" * 20).returncode == 5


def test_a_second_node_on_the_port_is_refused(lab: Lab) -> None:
    done = lab.nodes["A"].run("node", "start")
    assert done.returncode != 0
    assert b"stop" in done.stderr.lower()
