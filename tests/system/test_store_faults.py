"""A store that answers as stores do on a bad day: a transfer ends well all the same, or names the cause."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from kachery_fast.cli.lab import Lab
from kachery_fast.errors import KacheryError, NotPermitted
from tests.store_server import StoreServer
from tests.system.stores import lab_on, stored
from tests.system.support import CHUNK_SIZE_BYTES, finish, load, make_recording, wait_until

CHUNKS = 24
SIZE = CHUNKS * CHUNK_SIZE_BYTES
_SEEDS = count(1)
# What the hub does is the same for either store, and takes its time.
on_one_store = pytest.mark.parametrize("store", ["s3"], indirect=True)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, store: StoreServer) -> Iterator[Lab]:
    with lab_on(store, tmp_path_factory.mktemp("lab"), KACHERY_CHANNEL_REFRESH_SECONDS="0.3",
                KACHERY_URL_LIFE_SECONDS="3") as lab:
        store.use_bucket(lab)
        for name in ("A", "B"):
            lab.add_node(name)
        yield lab


@pytest.fixture
def recording(tmp_path: Path, store: StoreServer) -> Path:
    store.reset()
    return make_recording(tmp_path / "recording.dat", SIZE, seed=next(_SEEDS))


@pytest.mark.parametrize(("fault", "every"), [(0, 10), (429, 7), (503, 7)], ids=["reset", "429", "503"])
def test_what_fails_now_and_then_is_tried_again(
    lab: Lab, store: StoreServer, recording: Path, fault: int, every: int
) -> None:
    uri = stored(lab, recording)
    store.set(fault=fault, every=every)
    begun = time.monotonic()
    assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()
    assert len(store.requests()) > 2 * CHUNKS, "each chunk went there and came from there"
    if fault:
        assert time.monotonic() - begun >= 1, "Retry-After was heeded"


@on_one_store
def test_urls_that_expire_while_a_transfer_waits_for_them_are_signed_anew(
    lab: Lab, store: StoreServer, recording: Path
) -> None:
    uri = stored(lab, recording)
    store.set(slow=0.8)  # with a life of 3 seconds, for 25 objects
    assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()


@on_one_store
def test_a_permission_that_is_withdrawn_on_the_way_ends_the_transfer_with_the_cause(
    lab: Lab, store: StoreServer, recording: Path
) -> None:
    uri = stored(lab, recording)
    store.set(slow=0.8)
    node = lab.nodes["B"].connection.info()["nodeId"]
    loading = lab.nodes["B"].begin("load", uri, "--json")
    try:
        wait_until(lambda: any(line.startswith("GET") and "/sha1/" in line for line in store.requests()[10:]),
                   "it moves")
        lab.owner("revoke", "demo", node, "requestFiles")
        with pytest.raises(NotPermitted, match="requestFiles"):
            finish(loading)
    finally:
        lab.owner("grant", "demo", node, "requestFiles")
        loading.kill()
        loading.wait()
    store.set(slow=0)
    wait_until(lambda: "requestFiles" in lab.nodes["B"].connection.info()["hubs"][0]["channels"][0]["permissions"],
               "the node knows of it")
    assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == recording.read_bytes()


def test_a_bucket_that_goes_away_on_the_way_is_named(lab: Lab, store: StoreServer, recording: Path) -> None:
    uri = stored(lab, recording)
    store.set(slow=0.4)
    loading = lab.nodes["B"].begin("load", uri, "--json")
    try:
        wait_until(lambda: len(store.requests()) > 12, "it moves")
        store.remove_bucket()
        with pytest.raises(KacheryError, match="NoSuchBucket"):
            finish(loading)
    finally:
        loading.kill()
        loading.wait()
