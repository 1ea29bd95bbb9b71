"""A channel on a bucket of Google Cloud Storage, in real processes: hub, nodes, and a store that checks signatures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from google.cloud import storage

import kachery_fast as kf
from kachery_fast.cli import program
from kachery_fast.cli.lab import Lab
from kachery_fast.errors import KacheryError
from kachery_fast.protocol.names import object_name, parse_file_uri
from tests.gcs_server import ACCESS_KEY, BUCKET, SECRET_KEY, GcsServer, running_gcs, service_account
from tests.hub.test_gcs import googles_client
from tests.system.feed_support import made, numbered, read
from tests.system.support import CHUNK_SIZE_BYTES, QUICK, make_recording, objects, wait_until
from tests.system.task_backends import ALL, backend, be

SIZE = 5 * CHUNK_SIZE_BYTES + 17
PERMISSIONS = [*ALL, "requestFeeds", "provideFeeds"]


@pytest.fixture(scope="module")
def gcs() -> Iterator[GcsServer]:
    with running_gcs() as server:
        yield server


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, gcs: GcsServer) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("lab")
    with Lab(directory, environ={**QUICK, "KACHERY_HUB_ENGINE_HOSTS": gcs.host, "KACHERY_RETRY_ATTEMPTS_MAX": "2",
                                 "KACHERY_CHANNEL_REFRESH_SECONDS": "0.2", "KACHERY_PATIENCE_SECONDS": "2",
                                 "KACHERY_FEED_RENEW_SECONDS": "2"}) as lab:
        lab.start_hub()
        (directory / "account.json").write_text(service_account())
        (directory / "hmac").write_text(
            f"[lab]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key={SECRET_KEY}\n")
        found = lab.owner("bucket", "demo", "--gcs", BUCKET, "--endpoint", gcs.url, "--prefix", "kf", "--credentials",
                          str(directory / "account.json"), "--hmac", str(directory / "hmac"), "--profile", "lab",
                          "--expire-days", "30", "--test")
        assert found["name"] == BUCKET
        assert found["setUp"]["ok"], found
        assert found["test"]["ok"], found
        for name in ("A", "B"):
            lab.add_node(name, permissions=PERMISSIONS)
        yield lab


@pytest.mark.parametrize("option", ["--public", "--private"])
def test_a_file_goes_from_node_to_node_through_the_owner_s_bucket(
    lab: Lab, gcs: GcsServer, tmp_path: Path, option: str
) -> None:
    gcs.reset()
    gcs.set(strict=True)
    lab.owner("set", "demo", option)
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=len(option))
    uri = stored(lab, recording)
    with lab.nodes["B"].used():
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()
    asked = gcs.requests()
    assert sum(line.startswith(f"PUT /{BUCKET}/kf/demo/sha1/") for line in asked) == 7, "six chunks and the manifest"
    assert sum(line.startswith(f"GET /{BUCKET}/kf/demo/sha1/") for line in asked) >= 7
    assert not [line for line in asked if line.startswith("POST")], "none is long"
    assert not lab.bucket_dir.exists() or not objects(lab.bucket_dir), "the hub's own bucket has nothing of it"
    listed = lab.owner("objects", "demo")["objects"]
    assert sorted(line["sizeBytes"] for line in listed)[-5:] == [CHUNK_SIZE_BYTES] * 5
    assert len(listed) == 7
    upload(lab, uri)
    assert len(lab.owner("objects", "demo")["objects"]) == 7


def test_everybody_reads_where_that_is_said(lab: Lab, gcs: GcsServer, tmp_path: Path) -> None:
    gcs.reset()
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
    lab: Lab, gcs: GcsServer, tmp_path: Path
) -> None:
    gcs.reset()
    google = googles_client(gcs).bucket(BUCKET)
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


def test_damage_is_found_removed_and_uploaded_again(lab: Lab, gcs: GcsServer, tmp_path: Path) -> None:
    gcs.reset()
    google: storage.Bucket = googles_client(gcs).bucket(BUCKET)
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
    lab: Lab, gcs: GcsServer, tmp_path: Path
) -> None:
    gcs.reset()
    recording = make_recording(tmp_path / "recording.dat", 1000, seed=70)
    uri = stored(lab, recording)
    gcs.set(flip=True)
    upload(lab, uri)
    assert [line.split()[0] for line in gcs.requests() if line.startswith("P")] == ["PUT", "PUT"]
    (blob,) = googles_client(gcs).list_blobs(BUCKET)
    assert blob.download_as_bytes() == recording.read_bytes()


def test_a_long_result_goes_on_where_it_broke_off(
    lab: Lab, gcs: GcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcs.reset()
    gcs.set(cut=280_000)
    with backend(lab.nodes["A"], tmp_path):
        be(monkeypatch, lab.nodes["B"])
        task = kf.request_task("lab/text", {"n": 150_000}, channel="demo")  # longer than a chunk here, and yet no file
        assert task.wait(90), task
        assert task.result == "é" * 150_000
    asked = [line.split()[0] for line in gcs.requests() if "/task_results/" in line and line.startswith("P")]
    assert asked == ["POST", "PUT", "PUT", "PUT"], "begun, broken off, asked how far it got, gone on"
    ((size, crc32c),) = [(blob.size, blob.crc32c) for blob in googles_client(gcs).list_blobs(BUCKET)]
    assert size > 300_000
    assert crc32c


@pytest.mark.parametrize(("state", "code", "advice"), [
    ({"bucket": False}, "NoSuchBucket", "does not exist"),
    ({"denied": ["storage.objects.create"]}, "AccessDenied", "storage.objects.create"),
    ({"offset": 700}, "ExpiredToken", "clocks"),
    ({"offset": -1000}, "AccessDenied", "not valid yet"),
    ({"faults": [["PUT", 503, ""]] * 9}, "SlowDown", "503"),
    ({"faults": [["PUT", 429, ""]] * 9}, "SlowDown", "429"),
])
def test_what_the_bucket_refuses_is_said_with_its_cause(
    lab: Lab, gcs: GcsServer, tmp_path: Path, state: dict[str, Any], code: str, advice: str
) -> None:
    gcs.reset()
    uri = stored(lab, make_recording(tmp_path / "recording.dat", 1000, seed=len(code + advice)))
    gcs.set(**state)
    with pytest.raises(KacheryError) as refused:
        upload(lab, uri)
    assert code in refused.value.message
    assert advice in refused.value.message
    assert SECRET_KEY not in refused.value.message
    gcs.reset()
    upload(lab, uri)


@pytest.mark.parametrize("status", [429, 503])
def test_a_store_that_asks_to_wait_is_waited_for(lab: Lab, gcs: GcsServer, tmp_path: Path, status: int) -> None:
    gcs.reset()
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=status)
    uri = stored(lab, recording)
    gcs.set(faults=[["PUT", status, "0"], ["GET", status, "0"]])
    with lab.nodes["B"].used():
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()


def test_a_load_whose_upload_is_refused_says_why_and_ends_well_when_the_permission_is_back(
    lab: Lab, gcs: GcsServer, tmp_path: Path
) -> None:
    gcs.reset()
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=5)
    uri = stored(lab, recording)
    gcs.set(denied=["storage.objects.create"])
    with lab.nodes["B"].used():
        with pytest.raises(KacheryError) as refused:
            kf.load_file(uri)
        assert "storage.objects.create" in refused.value.message
        gcs.set(denied=[])
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()


def test_a_permission_that_is_withdrawn_in_mid_transfer_is_named(lab: Lab, gcs: GcsServer, tmp_path: Path) -> None:
    gcs.reset()
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=80)
    uri = stored(lab, recording)
    gcs.set(uploads_max=3)
    with lab.nodes["B"].used():
        with pytest.raises(KacheryError, match=r"storage\.objects\.create"):
            kf.load_file(uri)
        assert len(lab.owner("objects", "demo")["objects"]) == 3
        gcs.set(denied=[])
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()


def test_a_connection_that_is_reset_now_and_then_hinders_nothing(lab: Lab, gcs: GcsServer, tmp_path: Path) -> None:
    gcs.reset()
    recording = make_recording(tmp_path / "recording.dat", 4 * SIZE, seed=90)
    uri = stored(lab, recording)
    gcs.set(reset_every=10)
    with lab.nodes["B"].used():
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()


def test_a_feed_goes_through_the_owner_s_bucket(lab: Lab, gcs: GcsServer) -> None:
    gcs.reset()
    gcs.set(strict=True)
    subfeed = made(lab.nodes["A"])
    with lab.nodes["A"].used():
        subfeed.append_messages(numbered(0, 200))
    assert read(lab.nodes["B"], subfeed) == numbered(0, 200)
    wait_until(lambda: any(line.startswith("PUT") and line.endswith("/subfeed.json") for line in gcs.requests()),
               "the index of the feed is there")
    feeds = [blob for blob in googles_client(gcs).list_blobs(BUCKET) if "/feeds/" in blob.name]
    assert len(feeds) >= 2, "the index and a segment"


def command(lab: Lab, *arguments: str) -> Result:
    """Run ``kachery-fast channel ...`` on the hub's machine, within this process."""
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("KACHERY_")}
    return CliRunner().invoke(program, ["channel", *arguments], env={**clean, "KACHERY_HUB_DIR": str(lab.hub_dir)})


def test_the_commands_say_what_a_channel_uses_and_what_is_wrong_with_it(lab: Lab, gcs: GcsServer) -> None:
    gcs.reset()
    account, keys = str(lab.directory / "account.json"), str(lab.directory / "hmac")
    assert command(lab, "bucket", "demo").stdout == f"demo: the bucket '{BUCKET}'\n"
    assert f"{BUCKET}  {gcs.url}/{BUCKET}/kf  used by demo\n" in command(lab, "engines").stdout
    gcs.set(denied=["storage.objects.create", "storage.buckets.update"])
    wrong = command(lab, "test", "demo")
    assert wrong.exit_code == 5
    assert "storage.objects.create, to upload" in wrong.stdout
    added = command(lab, "bucket", "demo", "--gcs", BUCKET, "--endpoint", gcs.url, "--as", "second", "--credentials",
                    account)
    assert added.exit_code == 5
    assert "let browsers read (CORS): FAILED, HTTP 403" in added.stdout
    assert "Storage Admin" in added.stdout
    assert command(lab, "bucket", "demo", "--use", BUCKET).exit_code == 0
    for arguments in (("engines", "--renew", BUCKET), ("bucket", "demo", "--gcs", BUCKET),
                      ("bucket", "demo", "--gcs", "x", "--credentials", account, "--region", "here"),
                      ("bucket", "demo", "--gcs", "x", "--hmac", keys), ("bucket", "demo", "--expire-days", "5"),
                      ("bucket", "demo", "--gcs", "x", "--credentials", keys),
                      ("bucket", "demo", "--s3", "x", "--credentials", keys, "--hmac", keys),
                      ("bucket", "demo", "--gcs", "x", "--s3", "y", "--credentials", account)):
        assert command(lab, *arguments).exit_code == 2, arguments
    for options in (("--credentials", account), ("--hmac", keys, "--profile", "lab"),
                    ("--credentials", account, "--hmac", keys, "--profile", "lab")):
        assert "other credentials" in command(lab, "engines", "--renew", BUCKET, *options).stdout


def stored(lab: Lab, path: Path) -> str:
    with lab.nodes["A"].used():
        return kf.store_file(path)


def upload(lab: Lab, uri: str) -> str:
    with lab.nodes["A"].used():
        return str(kf.upload_file(uri, channel="demo"))
