"""A channel on a bucket of Google Cloud Storage, in real processes: what that store alone does and asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.cloud import storage

import kachery_fast as kf
from kachery_fast.cli.lab import Lab
from kachery_fast.protocol.names import object_name, parse_file_uri
from tests.google import google_client
from tests.store_server import BUCKET, StoreServer
from tests.system.feed_support import made, numbered, read
from tests.system.stores import IMPATIENT, lab_on, owner_command, stored, upload
from tests.system.support import CHUNK_SIZE_BYTES, make_recording, wait_until
from tests.system.task_backends import ALL, backend, be

SIZE = 5 * CHUNK_SIZE_BYTES + 17
PERMISSIONS = [*ALL, "requestFeeds", "provideFeeds"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, gcs: StoreServer) -> Iterator[Lab]:
    with lab_on(gcs, tmp_path_factory.mktemp("lab"), **IMPATIENT, KACHERY_FEED_RENEW_SECONDS="2") as lab:
        found = gcs.use_bucket(lab, "--prefix", "kf", "--expire-days", "30", "--test")
        assert found["setUp"]["ok"], found
        assert found["test"]["ok"], found
        for name in ("A", "B"):
            lab.add_node(name, permissions=PERMISSIONS)
        yield lab


@pytest.fixture(autouse=True)
def fresh(gcs: StoreServer) -> None:
    gcs.reset()


def test_everybody_reads_where_that_is_said(lab: Lab, gcs: StoreServer, tmp_path: Path) -> None:
    gcs.set(public=True)
    lab.owner("set", "demo", "--public")
    try:
        lab.owner("bucket", "demo", "--gcs", BUCKET, "--endpoint", gcs.url, "--prefix", "open", "--public-reads",
                  "--as", "open", "--hmac", str(lab.directory / "hmac"), "--profile", "lab", "--test")
        recording = make_recording(tmp_path / "recording.dat", SIZE, seed=40)
        uri = stored(lab, recording)
        upload(lab, uri)
        with lab.nodes["B"].used():
            assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()
        assert not [line for line in gcs.requests() if line.startswith("JSON")]
    finally:
        lab.owner("bucket", "demo", "--use", BUCKET)


def test_googles_own_client_reads_what_nodes_wrote_and_nodes_read_what_it_wrote(
    lab: Lab, gcs: StoreServer, tmp_path: Path
) -> None:
    google = google_client(gcs.url).bucket(BUCKET)
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=50)
    uri = stored(lab, recording)
    upload(lab, uri)
    with lab.nodes["A"].used():
        manifest = json.loads(google.blob(f"kf/{object_name('demo', str(parse_file_uri(uri).manifest_sha1))}")
                              .download_as_bytes())
    chunks = [google.blob(f"kf/{object_name('demo', chunk['sha1'])}") for chunk in manifest["chunks"]]
    assert b"".join(blob.download_as_bytes() for blob in chunks) == recording.read_bytes()
    assert all(blob.crc32c for blob in chunks)
    copies = {blob.name: blob.download_as_bytes() for blob in google.client.list_blobs(BUCKET)}
    gcs.reset()
    for name, data in copies.items():
        google.blob(name).upload_from_string(data, "application/octet-stream")
    with lab.nodes["B"].used():
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()
    assert not [line for line in gcs.requests() if line.startswith("PUT")], "nothing was uploaded again"


def test_damage_is_found_removed_and_uploaded_again(lab: Lab, gcs: StoreServer, tmp_path: Path) -> None:
    google: storage.Bucket = google_client(gcs.url).bucket(BUCKET)
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=60)
    uri = stored(lab, recording)
    upload(lab, uri)
    (blob, *_) = [found for found in google.client.list_blobs(BUCKET) if found.size == CHUNK_SIZE_BYTES]
    blob.upload_from_string(bytes(CHUNK_SIZE_BYTES), "application/octet-stream")
    with lab.nodes["B"].used():
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()
    blob.reload()
    assert blob.download_as_bytes() != bytes(CHUNK_SIZE_BYTES)


def test_bytes_that_change_on_the_way_up_are_not_taken_but_sent_again(
    lab: Lab, gcs: StoreServer, tmp_path: Path
) -> None:
    recording = make_recording(tmp_path / "recording.dat", 1000, seed=70)
    uri = stored(lab, recording)
    gcs.set(flip=True)
    upload(lab, uri)
    assert [line.split()[0] for line in gcs.requests() if line.startswith("P")] == ["PUT", "PUT"]
    (blob,) = google_client(gcs.url).list_blobs(BUCKET)
    assert blob.download_as_bytes() == recording.read_bytes()


def test_a_long_result_goes_on_where_it_broke_off(
    lab: Lab, gcs: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcs.set(cut=280_000)
    with backend(lab.nodes["A"], tmp_path):
        be(monkeypatch, lab.nodes["B"])
        task = kf.request_task("lab/text", {"n": 150_000}, channel="demo")  # longer than a chunk here, and yet no file
        assert task.wait(90), task
        assert task.result == "é" * 150_000
    asked = [line.split()[0] for line in gcs.requests() if "/task_results/" in line and line.startswith("P")]
    assert asked == ["POST", "PUT", "PUT", "PUT"], "begun, broken off, asked how far it got, gone on"
    ((size, crc32c),) = [(blob.size, blob.crc32c) for blob in google_client(gcs.url).list_blobs(BUCKET)]
    assert size > 300_000
    assert crc32c


def test_a_feed_goes_through_the_owner_s_bucket(lab: Lab, gcs: StoreServer) -> None:
    gcs.set(strict=True)
    subfeed = made(lab.nodes["A"])
    with lab.nodes["A"].used():
        subfeed.append_messages(numbered(0, 200))
    assert read(lab.nodes["B"], subfeed) == numbered(0, 200)
    wait_until(lambda: any(line.startswith("PUT") and line.endswith("/subfeed.json") for line in gcs.requests()),
               "the index of the feed is there")
    feeds = [blob for blob in google_client(gcs.url).list_blobs(BUCKET) if "/feeds/" in blob.name]
    assert len(feeds) >= 2, "the index and a segment"


def test_the_commands_say_what_google_does_not_permit_and_what_goes_together(lab: Lab, gcs: StoreServer) -> None:
    account, keys = str(lab.directory / "account.json"), str(lab.directory / "hmac")
    gcs.set(denied=["storage.buckets.update"])
    added = owner_command(lab, "bucket", "demo", "--gcs", BUCKET, "--endpoint", gcs.url, "--as", "second",
                          "--credentials", account)
    assert added.exit_code == 5
    assert "let browsers read (CORS): FAILED, HTTP 403" in added.stdout
    assert "Storage Admin" in added.stdout
    assert owner_command(lab, "bucket", "demo", "--use", BUCKET).exit_code == 0
    for arguments in (("demo", "--gcs", "x", "--credentials", account, "--region", "here"),
                      ("demo", "--gcs", "x", "--hmac", keys), ("demo", "--expire-days", "5"),
                      ("demo", "--gcs", "x", "--credentials", keys),
                      ("demo", "--s3", "x", "--credentials", keys, "--hmac", keys),
                      ("demo", "--gcs", "x", "--s3", "y", "--credentials", account)):
        assert owner_command(lab, "bucket", *arguments).exit_code == 2, arguments
    for options in (("--credentials", account), ("--hmac", keys, "--profile", "lab")):
        assert "other credentials" in owner_command(lab, "engines", "--renew", BUCKET, *options).stdout
