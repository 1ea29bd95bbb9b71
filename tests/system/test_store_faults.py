"""A store that answers as stores do on a bad day: a transfer ends well all the same, or names the cause."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from kachery_fast.cli.lab import Lab
from kachery_fast.errors import KacheryError, NotPermitted
from tests.s3_server import S3Server, running_s3, use_bucket
from tests.system.support import CHUNK_SIZE_BYTES, QUICK, finish, load, make_recording, store, wait_until

CHUNKS = 24
SIZE = CHUNKS * CHUNK_SIZE_BYTES
_SEEDS = count(1)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("lab")
    with Lab(directory, environ={**QUICK, "KACHERY_HUB_ENGINE_HOSTS": s3.host, "KACHERY_CHANNEL_REFRESH_SECONDS": "0.3",
                                 "KACHERY_URL_LIFE_SECONDS": "3"}) as lab:
        lab.start_hub()
        use_bucket(lab, s3)
        for name in ("A", "B"):
            lab.add_node(name)
        yield lab


@pytest.fixture
def recording(tmp_path: Path, s3: S3Server) -> Path:
    s3.reset()
    return make_recording(tmp_path / "recording.dat", SIZE, seed=next(_SEEDS))


@pytest.mark.parametrize(("fault", "every"), [(0, 10), (429, 7), (503, 7)], ids=["reset", "429", "503"])
def test_what_fails_now_and_then_is_tried_again(
    lab: Lab, s3: S3Server, recording: Path, fault: int, every: int
) -> None:
    uri = store(lab.nodes["A"], recording)
    s3.set(fault=fault, every=every)
    begun = time.monotonic()
    assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()
    assert len(s3.requests()) > 2 * CHUNKS, "each chunk went there and came from there"
    if fault:
        assert time.monotonic() - begun >= 1, "Retry-After was heeded"


def test_urls_that_expire_while_a_transfer_waits_for_them_are_signed_anew(
    lab: Lab, s3: S3Server, recording: Path
) -> None:
    uri = store(lab.nodes["A"], recording)
    s3.set(slow=0.8)  # with a life of 3 seconds, for 25 objects
    assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()


def test_a_permission_that_is_withdrawn_on_the_way_ends_the_transfer_with_the_cause(
    lab: Lab, s3: S3Server, recording: Path
) -> None:
    uri = store(lab.nodes["A"], recording)
    s3.set(slow=0.8)
    node = lab.nodes["B"].connection.info()["nodeId"]
    loading = lab.nodes["B"].begin("load", uri, "--json")
    try:
        wait_until(lambda: any(line.startswith("GET") and "/sha1/" in line for line in s3.requests()[10:]), "it moves")
        lab.owner("revoke", "demo", node, "requestFiles")
        with pytest.raises(NotPermitted, match="requestFiles"):
            finish(loading)
    finally:
        lab.owner("grant", "demo", node, "requestFiles")
        loading.kill()
        loading.wait()
    s3.set(slow=0)
    wait_until(lambda: "requestFiles" in lab.nodes["B"].connection.info()["hubs"][0]["channels"][0]["permissions"],
               "the node knows of it")
    assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()


def test_a_bucket_that_goes_away_on_the_way_is_named(lab: Lab, s3: S3Server, recording: Path) -> None:
    uri = store(lab.nodes["A"], recording)
    s3.set(slow=0.4)
    loading = lab.nodes["B"].begin("load", uri, "--json")
    try:
        wait_until(lambda: len(s3.requests()) > 12, "it moves")
        s3.remove_bucket()
        with pytest.raises(KacheryError, match="NoSuchBucket"):
            finish(loading)
    finally:
        loading.kill()
        loading.wait()
