"""A channel that moves to another bucket while nodes use it, in real processes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.errors import InvalidArgument, NodeError, NotOnHub
from tests.store_server import BUCKET, StoreServer
from tests.system.stores import lab_on
from tests.system.support import CHUNK_SIZE_BYTES, finish, load, make_recording, received, store, wait_until

SIZE = 4 * CHUNK_SIZE_BYTES + 5


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, s3: StoreServer) -> Iterator[Lab]:
    with lab_on(s3, tmp_path_factory.mktemp("lab"), KACHERY_CHANNEL_REFRESH_SECONDS="600") as lab:
        s3.use_bucket(lab, "--as", "store")
        lab.owner("bucket", "demo", "--own")
        yield lab


def test_a_channel_moves_there_and_back_and_its_uris_hold(lab: Lab, s3: StoreServer, tmp_path: Path) -> None:
    owner = lab.add_node("owner")
    recording = make_recording(tmp_path / "recording.dat", SIZE)
    uri = store(owner, recording)
    owner.json("upload", uri)
    assert not bucket_of(owner).startswith(s3.url)
    moved = lab.owner("migrate", "demo", "--to", "store")
    assert (moved["state"], moved["objects"], moved["damaged"]) == ("done", 6, 0)
    wait_until(lambda: bucket_of(owner).startswith(s3.url), "the node was told, and has not just looked")
    owner.program.stop()
    reader = lab.add_node("reader")
    assert Path(load(reader, uri)["path"]).read_bytes() == recording.read_bytes(), "nobody else has it any more"
    assert any(line.startswith(f"GET /{BUCKET}/demo/sha1/") for line in s3.requests())
    assert lab.owner("migrate", "demo", "--status") == moved
    said = subprocess.run([sys.executable, "-m", "kachery_fast", "channel", "migrate", "demo", "--status", "--hub",
                           lab.hub_url], env={**lab.environ, "KACHERY_HUB_TOKEN": lab.owner_token}, text=True,
                          capture_output=True, timeout=60, check=True).stdout
    assert re.fullmatch(r"demo: the bucket 'store' is used now \(6 objects, 1\.\d+ MB copied\)\n", said), said

    s3.deny("list")  # what is in either bucket already is not read
    begun = lab.owner("migrate", "demo", "--own", "--detach")
    assert begun["state"] == "copying"
    assert lab.owner("migrate", "demo", "--stop")["state"] == "stopped"
    with pytest.raises(NodeError, match="ended with exit code 5"):
        lab.owner("migrate", "demo", "--status")
    s3.deny()
    shown = lab.owner("migrate", "demo", "--own", "--switch")
    assert shown["name"] is None
    assert lab.owner("bucket", "demo")["name"] is None
    wait_until(lambda: not bucket_of(reader).startswith(s3.url), "that was told too")


def bucket_of(node: LabNode) -> str:
    """Where a node reads and writes the channel's objects just now."""
    (channel,) = node.connection.info()["hubs"][0]["channels"]
    return str(channel["bucketUrl"])


@pytest.mark.parametrize("options", [[], ["--to", "store", "--own"], ["--status", "--switch"]])
def test_what_says_too_much_or_too_little_is_refused(lab: Lab, options: list[str]) -> None:
    with pytest.raises(InvalidArgument, match=r"Choose one of|--switch goes with"):
        lab.owner("migrate", "demo", *options)


def test_a_bucket_that_the_hub_does_not_know_is_named(lab: Lab) -> None:
    with pytest.raises(NotOnHub, match=re.escape("nobody's")):
        lab.owner("migrate", "demo", "--to", "nobody's")


@pytest.mark.parametrize("to_store", [True, False], ids=["to the store", "to the hub's own"])
@pytest.mark.parametrize("action", ["bucket", "migrate"])
def test_a_load_goes_on_while_the_channel_moves(tmp_path: Path, s3: StoreServer, action: str,
                                                to_store: bool) -> None:
    with lab_on(s3, tmp_path / "lab", KACHERY_BUCKET_RATE_BYTES_MAX=str(24 * CHUNK_SIZE_BYTES)) as lab:
        s3.use_bucket(lab, "--as", "store")
        s3.set(slow=0.15)
        if to_store:
            lab.owner("bucket", "demo", "--own")
        a, b = lab.add_node("A"), lab.add_node("B")
        recording = make_recording(tmp_path / "recording.dat", 60 * CHUNK_SIZE_BYTES + 5)
        uri = store(a, recording)
        loading = b.begin("load", uri, "--json")
        wait_until(lambda: received(b) > 8 * CHUNK_SIZE_BYTES, "a part of the file has arrived")
        if action == "migrate":
            lab.owner("migrate", "demo", *(["--to", "store"] if to_store else ["--own"]), "--switch")
        else:
            lab.owner("bucket", "demo", *(["--use", "store"] if to_store else ["--own"]))
        assert received(b) < 50 * CHUNK_SIZE_BYTES, "it was met in the middle"
        assert Path(finish(loading)["path"]).read_bytes() == recording.read_bytes()
