"""A private channel in real processes: its nodes read files, feeds and results, and nobody else does."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab
from kachery_fast.errors import ChannelPrivate, KacheryError
from tests.programs import need_program
from tests.system.feed_support import made, numbered, read
from tests.system.support import (
    CHUNK_SIZE_BYTES,
    QUICK,
    finish,
    load,
    make_recording,
    objects,
    received,
    store,
    wait_until,
)
from tests.system.task_backends import backend, be

SIZE = 12 * CHUNK_SIZE_BYTES + 17


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ={**QUICK, "KACHERY_FEED_RENEW_SECONDS": "2"}) as lab:
        lab.start_hub()
        lab.owner("set", "demo", "--private")
        for name in ("A", "B", "C"):
            lab.add_node(name, permissions=["all"])
        yield lab


def curl(url: str, into: Path, *options: str) -> str:
    """Ask as a stranger does; return the status."""
    done = subprocess.run(["curl", "-s", "-o", str(into), "-w", "%{http_code}", *options, url], check=True,
                          capture_output=True, text=True, timeout=60)
    return done.stdout


def test_a_file_is_loaded_by_a_node_and_refused_to_a_stranger_who_knows_its_name(lab: Lab, tmp_path: Path) -> None:
    need_program("curl")
    recording = make_recording(tmp_path / "recording.dat", SIZE)
    uri = store(lab.nodes["A"], recording)
    found = load(lab.nodes["B"], uri)
    assert Path(found["path"]).read_bytes() == recording.read_bytes()
    there = [path.relative_to(lab.bucket_dir.parent) for path in objects(lab.bucket_dir)]
    assert len(there) >= 14
    absent = there[0].parent / ("0" * 40)
    for name in (*there, absent):
        assert curl(f"{lab.hub_url}/bucket/{name}", tmp_path / "got") == "403"
        assert b"AccessDenied" in (tmp_path / "got").read_bytes()
        assert curl(f"{lab.hub_url}/bucket/{name}", tmp_path / "got", "-I") == "403"
    chunk = recording.read_bytes()[:CHUNK_SIZE_BYTES]
    assert hashlib.sha1(chunk).hexdigest() in {path.name for path in there}, "it is a chunk that the stranger asked for"


def test_without_a_node_the_error_says_that_the_channel_is_private_and_what_to_do(lab: Lab, tmp_path: Path) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "recording.dat", 1000, seed=2))
    load(lab.nodes["B"], uri)
    stranger = lab.nodes["C"]
    with pytest.raises(ChannelPrivate) as refused:
        stranger.json("load", uri, "--direct", lab.hub_url, "--channel", "demo")
    assert "kachery-fast node join" in refused.value.message
    assert "kachery-fast channel set demo --public" in refused.value.message
    done = stranger.run("cat", uri, "--direct", lab.hub_url, "--channel", "demo")
    assert (done.returncode, done.stdout) == (4, b"")


def test_a_feed_is_read_from_the_bucket_when_its_owner_is_away(lab: Lab) -> None:
    owner = lab.add_node("owner", permissions=["all"])
    subfeed = made(owner)
    subfeed.append_messages(numbered(0, 3000))
    assert len(read(lab.nodes["B"], subfeed)) == 3000
    owner.program.kill()
    lab.nodes["B"].program.stop()
    try:
        assert read(lab.nodes["C"], subfeed) == numbered(0, 3000)
    finally:
        lab.nodes["B"].start()


def test_a_calculation_is_cached_in_the_bucket_for_nodes_alone(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with backend(lab.nodes["A"], tmp_path):
        be(monkeypatch, lab.nodes["B"])
        task = kf.request_task("lab/square", {"x": 12, "log": str(tmp_path / "log")})
        assert task.wait(90)
        assert task.result == {"square": 144, "offset": 100}
    be(monkeypatch, lab.nodes["C"])
    cached = kf.request_task("lab/square", {"x": 12, "log": str(tmp_path / "log")})
    assert (cached.wait(60), cached.cached, cached.result) == (True, True, {"square": 144, "offset": 100})


def test_a_revoked_node_gets_no_more_urls(lab: Lab, tmp_path: Path) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "recording.dat", SIZE, seed=3))
    load(lab.nodes["B"], uri)  # so that all of it is in the bucket
    revoked = lab.add_node("revoked", permissions=["all"])
    lab.owner("revoke", "demo", "revoked", "requestFiles")
    with pytest.raises(KacheryError) as refused:
        load(revoked, uri)
    assert refused.value.exit_code == 4
    assert not (revoked.storage_dir / "sha1").exists() or not list((revoked.storage_dir / "sha1").rglob(uri[7:47]))


def test_urls_that_expire_while_a_file_is_under_way_are_renewed(tmp_path: Path) -> None:
    """The transfer takes several times the second that a URL lives."""
    rate = 12 * CHUNK_SIZE_BYTES
    environ = {**QUICK, "KACHERY_URL_LIFE_SECONDS": "1", "KACHERY_BUCKET_RATE_BYTES_MAX": str(rate)}
    with Lab(tmp_path / "lab", environ=environ) as lab:
        lab.start_hub()
        lab.owner("set", "demo", "--private")
        a, b = lab.add_node("A"), lab.add_node("B")
        recording = make_recording(tmp_path / "recording.dat", 5 * rate)
        uri = store(a, recording)
        a.json("upload", uri)
        process = b.begin("load", uri, "--json")
        wait_until(lambda: received(b) > 2 * CHUNK_SIZE_BYTES, "a part of the file has arrived")
        assert Path(finish(process)["path"]).read_bytes() == recording.read_bytes()
