"""Files from one node to another, when all goes well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kachery_fast.cli.lab import Lab
from kachery_fast.errors import ChannelUnknown, InvalidUri, LinkInvalid, NoChannel, NotAvailable, NotPermitted
from tests.system.support import (
    CHUNK_SIZE_BYTES,
    QUICK,
    load,
    make_recording,
    objects,
    store,
    traffic,
    wait_until,
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ=QUICK) as lab:
        lab.start_hub()
        lab.add_node("A")
        lab.add_node("B")
        yield lab


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE_BYTES - 1, CHUNK_SIZE_BYTES, CHUNK_SIZE_BYTES + 1,
                                  20 * CHUNK_SIZE_BYTES + 17])
def test_a_stored_file_arrives_whole_at_the_other_node(lab: Lab, tmp_path: Path, size: int) -> None:
    file = make_recording(tmp_path / "recording.dat", size, seed=size + 1)
    uri = store(lab.nodes["A"], file)
    found = load(lab.nodes["B"], uri)
    assert Path(found["path"]).read_bytes() == file.read_bytes()
    assert found["source"] == "channel"
    assert ("manifest=" in uri) == (size > CHUNK_SIZE_BYTES)


def test_nothing_is_uploaded_before_it_is_asked_for(lab: Lab, tmp_path: Path) -> None:
    before = set(objects(lab.bucket_dir))
    uri = store(lab.nodes["A"], make_recording(tmp_path / "quiet.dat", 3 * CHUNK_SIZE_BYTES, seed=71))
    lab.nodes["B"].json("why", uri)
    assert set(objects(lab.bucket_dir)) == before
    load(lab.nodes["B"], uri)
    assert len(set(objects(lab.bucket_dir)) - before) == 4  # three chunks and the manifest


def test_a_file_that_fits_one_chunk_moves_as_one_object(lab: Lab, tmp_path: Path) -> None:
    before = set(objects(lab.bucket_dir))
    uri = store(lab.nodes["A"], make_recording(tmp_path / "small.dat", 1000, seed=72))
    load(lab.nodes["B"], uri)
    assert [path.name for path in set(objects(lab.bucket_dir)) - before] == [uri[7:47]]


def test_the_uri_needs_neither_label_nor_manifest(lab: Lab, tmp_path: Path) -> None:
    file = make_recording(tmp_path / "plain.dat", 5 * CHUNK_SIZE_BYTES + 3, seed=73)
    sha1 = store(lab.nodes["A"], file)[7:47]
    assert Path(load(lab.nodes["B"], sha1)["path"]).read_bytes() == file.read_bytes()


def test_what_the_bucket_has_needs_no_provider(lab: Lab, tmp_path: Path) -> None:
    file = make_recording(tmp_path / "cached.dat", 6 * CHUNK_SIZE_BYTES + 1, seed=74)
    uri = store(lab.nodes["A"], file)
    load(lab.nodes["B"], uri)
    other = lab.add_node("cached-reader", permissions=["requestFiles"])
    lab.nodes["A"].program.stop()
    try:
        assert Path(load(other, uri)["path"]).read_bytes() == file.read_bytes()
    finally:
        lab.nodes["A"].start()
        other.program.stop()


def test_many_clients_asking_for_one_file_cost_one_transfer(lab: Lab, tmp_path: Path) -> None:
    b = lab.nodes["B"]
    uri = store(lab.nodes["A"], make_recording(tmp_path / "popular.dat", 30 * CHUNK_SIZE_BYTES, seed=75))
    before = traffic(b)["downloaded_objects"]
    with ThreadPoolExecutor(6) as pool:
        paths = {found["path"] for found in pool.map(lambda _: load(b, uri), range(6))}
    assert len(paths) == 1
    assert traffic(b)["downloaded_objects"] - before == 30


def test_a_slice_moves_only_the_chunks_that_hold_it(lab: Lab, tmp_path: Path) -> None:
    b = lab.nodes["B"]
    file = make_recording(tmp_path / "sliced.dat", 40 * CHUNK_SIZE_BYTES, seed=76)
    uri = store(lab.nodes["A"], file)
    before = traffic(b)["downloaded_objects"]
    start = 17 * CHUNK_SIZE_BYTES + 1000
    done = b.run("cat", uri, "--start", str(start), "--end", str(start + 4096))
    assert done.stdout == file.read_bytes()[start:start + 4096]
    assert traffic(b)["downloaded_objects"] - before == 1
    across = b.run("cat", uri, "--start", str(20 * CHUNK_SIZE_BYTES - 5), "--end", str(20 * CHUNK_SIZE_BYTES + 5))
    assert across.stdout == file.read_bytes()[20 * CHUNK_SIZE_BYTES - 5:20 * CHUNK_SIZE_BYTES + 5]
    assert traffic(b)["downloaded_objects"] - before == 3
    assert Path(load(b, uri)["path"]).read_bytes() == file.read_bytes()
    assert traffic(b)["downloaded_objects"] - before == 40  # what the slices brought is not fetched again


def test_a_linked_file_is_served_from_its_place_and_refused_once_changed(lab: Lab, tmp_path: Path) -> None:
    file = make_recording(tmp_path / "linked.dat", 4 * CHUNK_SIZE_BYTES, seed=77)
    a, b = lab.nodes["A"], lab.nodes["B"]
    uri = a.json("link", str(file))[0]["uri"]
    assert Path(load(b, uri)["path"]).read_bytes() == file.read_bytes()
    other = make_recording(tmp_path / "linked2.dat", 4 * CHUNK_SIZE_BYTES, seed=78)
    uri = a.json("link", str(other))[0]["uri"]
    make_recording(other, 4 * CHUNK_SIZE_BYTES, seed=79)
    with pytest.raises(NotAvailable, match="changed-on-disk") as caught:
        load(b, uri)
    assert "A (" in str(caught.value)
    with pytest.raises(LinkInvalid):
        a.json("load", uri, "--channel", "")


def test_what_nobody_has_is_reported_with_who_was_asked(lab: Lab) -> None:
    uri = "sha1://" + "ab" * 20
    with pytest.raises(NotAvailable) as caught:
        load(lab.nodes["B"], uri)
    text = str(caught.value)
    assert "bucket: does not have it" in text
    assert "asked 1 node 2 times" in text
    assert "no answer from A (" in text
    done = lab.nodes["B"].run("load", uri)
    assert done.returncode == 3
    assert done.stderr.decode().startswith("Error: ")
    why = lab.nodes["B"].json("why", uri)
    assert why["verdict"] == "It cannot be loaded now."


def test_why_names_who_has_it(lab: Lab, tmp_path: Path) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "why.dat", 2 * CHUNK_SIZE_BYTES, seed=80))
    found = lab.nodes["B"].json("why", uri)
    assert "a node offers it" in found["verdict"]
    assert found["channels"][0]["answers"][0]["label"] == "A"


def test_a_channel_that_the_node_is_not_on_is_named(lab: Lab) -> None:
    with pytest.raises(ChannelUnknown, match="it is on: demo"):
        load(lab.nodes["B"], "sha1://" + "cd" * 20, "--channel", "elsewhere")


def test_without_any_channel_the_error_says_how_to_name_one(lab: Lab) -> None:
    b = lab.nodes["B"]
    former = b.environ.pop("KACHERY_CHANNEL")
    try:
        with pytest.raises(NoChannel):
            load(b, "sha1://" + "cd" * 20)
    finally:
        b.environ["KACHERY_CHANNEL"] = former


def test_a_malformed_uri_is_a_usage_error(lab: Lab) -> None:
    with pytest.raises(InvalidUri):
        load(lab.nodes["B"], "sha1://not-a-digest/x")
    assert lab.nodes["B"].run("load", "http://x").returncode == 2


def test_a_node_without_the_permission_may_not_load(lab: Lab, tmp_path: Path) -> None:
    uri = store(lab.nodes["A"], make_recording(tmp_path / "secret.dat", 100, seed=81))
    writer = lab.add_node("writer", permissions=["provideFiles"])
    try:
        with pytest.raises(NotPermitted, match="requestFiles") as caught:
            load(writer, uri)
        assert "channel grant demo" in str(caught.value)
        lab.owner("grant", "demo", json.loads(writer.run("node", "info", "--json").stdout)["nodeId"], "requestFiles")
        wait_until(lambda: _loads(lab, uri), "the grant takes effect")
    finally:
        writer.program.stop()


def _loads(lab: Lab, uri: str) -> bool:
    return lab.nodes["writer"].run("load", uri).returncode == 0


def test_a_node_without_provide_files_is_not_asked(lab: Lab, tmp_path: Path) -> None:
    reader = lab.add_node("reader", permissions=["requestFiles"])
    try:
        uri = store(reader, make_recording(tmp_path / "kept.dat", 5000, seed=82))
        with pytest.raises(NotAvailable) as caught:
            load(lab.nodes["B"], uri)
        assert "reader" not in str(caught.value)
    finally:
        reader.program.stop()


def test_two_providers_share_the_work(lab: Lab, tmp_path: Path) -> None:
    file = make_recording(tmp_path / "striped.dat", 150 * CHUNK_SIZE_BYTES, seed=83)
    second = lab.add_node("second")
    try:
        uri = store(lab.nodes["A"], file)
        store(second, file)
        before = traffic(lab.nodes["A"])["uploaded_objects"]
        assert Path(load(lab.nodes["B"], uri)["path"]).read_bytes() == file.read_bytes()
        first_share = traffic(lab.nodes["A"])["uploaded_objects"] - before
        second_share = traffic(second)["uploaded_objects"]
        assert first_share + second_share == 151
        assert min(first_share, second_share) >= 30
    finally:
        second.program.stop()


def test_a_provider_that_joined_a_moment_ago_is_not_overlooked(tmp_path: Path) -> None:
    with Lab(tmp_path / "lab", environ={**QUICK, "KACHERY_CHANNEL_REFRESH_SECONDS": "600"}) as lab:
        lab.start_hub()
        reader = lab.add_node("reader")
        with pytest.raises(NotAvailable, match="no other node on the channel may provide files"):
            load(reader, "sha1://" + "ab" * 20)
        file = make_recording(tmp_path / "new.dat", 3 * CHUNK_SIZE_BYTES, seed=90)
        uri = store(lab.add_node("newcomer"), file)
        assert Path(load(reader, uri)["path"]).read_bytes() == file.read_bytes()
