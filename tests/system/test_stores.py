"""A channel on its owner's bucket, in real processes: hub, nodes, and either store, which checks each signature."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab
from kachery_fast.errors import KacheryError
from tests.store_server import BUCKET, StoreServer
from tests.system.stores import IMPATIENT, lab_on, owner_command, stored, upload
from tests.system.support import CHUNK_SIZE_BYTES, make_recording, objects

SIZE = 5 * CHUNK_SIZE_BYTES + 17
BOTH = ("s3", "gcs")
FORBIDDEN = {"s3": "AccessDenied", "gcs": "storage.objects.create"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, store: StoreServer) -> Iterator[Lab]:
    with lab_on(store, tmp_path_factory.mktemp("lab"), **IMPATIENT) as lab:
        found = store.use_bucket(lab, "--prefix", "kf", "--test")
        assert found["name"] == BUCKET
        assert found["test"]["ok"], found
        for name in ("A", "B"):
            lab.add_node(name)
        yield lab


@pytest.fixture(autouse=True)
def fresh(store: StoreServer) -> None:
    store.reset()


@pytest.mark.parametrize("option", ["--public", "--private"])
def test_a_file_goes_from_node_to_node_through_the_owner_s_bucket(
    lab: Lab, store: StoreServer, tmp_path: Path, option: str
) -> None:
    store.set(strict=True)  # which is Google's
    lab.owner("set", "demo", option)
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=len(option))
    uri = stored(lab, recording)
    with lab.nodes["B"].used():
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()
    asked = store.requests()
    assert sum(line.startswith(f"PUT /{BUCKET}/kf/demo/sha1/") for line in asked) == 7, "six chunks and the manifest"
    assert sum(line.startswith(f"GET /{BUCKET}/kf/demo/sha1/") for line in asked) >= 7
    assert not [line for line in asked if line.startswith("POST")], "none is long"
    assert not lab.bucket_dir.exists() or not objects(lab.bucket_dir), "the hub's own bucket has nothing of it"
    listed = lab.owner("objects", "demo")["objects"]
    assert sorted(line["sizeBytes"] for line in listed)[-5:] == [CHUNK_SIZE_BYTES] * 5
    assert len(listed) == 7
    upload(lab, uri)
    assert len(lab.owner("objects", "demo")["objects"]) == 7


@pytest.mark.parametrize(("state", "said"), [
    ({"bucket": False}, dict.fromkeys(BOTH, ("NoSuchBucket", "does not exist"))),
    ({"uploads_max": 0}, {"s3": ("AccessDenied", "Access Denied"), "gcs": ("AccessDenied", "storage.objects.create")}),
    ({"offset": 700}, {"s3": ("Request has expired", "clocks"), "gcs": ("ExpiredToken", "clocks")}),
    ({"offset": -1000}, dict.fromkeys(BOTH, ("AccessDenied", "not valid yet"))),
    ({"fault": 503, "faulty": "PUT", "retry_after": ""}, dict.fromkeys(BOTH, ("SlowDown", "503"))),
    ({"fault": 429, "faulty": "PUT", "retry_after": ""}, dict.fromkeys(BOTH, ("SlowDown", "429"))),
], ids=["no bucket", "forbidden", "expired", "not valid yet", "503", "429"])
def test_what_the_bucket_refuses_is_said_with_its_cause(
    lab: Lab, store: StoreServer, tmp_path: Path, state: dict[str, Any], said: dict[str, tuple[str, str]]
) -> None:
    recording = make_recording(tmp_path / "recording.dat", 1000, seed=len(f"{state} {said}"))
    refuse(lab, store, recording, state, *said[store.kind])


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_another_region_is_named(lab: Lab, store: StoreServer, tmp_path: Path) -> None:
    refuse(lab, store, make_recording(tmp_path / "recording.dat", 1000, seed=1), {"region": "us-west-2"},
           "AuthorizationQueryParametersError", "expecting 'us-west-2'")


def refuse(lab: Lab, store: StoreServer, recording: Path, state: dict[str, Any], code: str, advice: str) -> None:
    """An upload is refused with this said, and goes well when the store is as it was."""
    uri = stored(lab, recording)
    store.set(**state)
    with pytest.raises(KacheryError) as refused:
        upload(lab, uri)
    assert code in refused.value.message
    assert advice in refused.value.message
    assert not [secret for secret in store.secrets if secret in refused.value.message]
    store.reset()
    upload(lab, uri)


@pytest.mark.parametrize("uploads_max", [0, 3])
def test_a_load_whose_upload_is_refused_says_why_and_ends_well_when_the_permission_is_back(
    lab: Lab, store: StoreServer, tmp_path: Path, uploads_max: int
) -> None:
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=100 + uploads_max)
    uri = stored(lab, recording)
    store.set(uploads_max=uploads_max)
    with lab.nodes["B"].used():
        with pytest.raises(KacheryError, match=FORBIDDEN[store.kind].replace(".", r"\.")):
            kf.load_file(uri)
        assert len(lab.owner("objects", "demo")["objects"]) == uploads_max
        store.deny()
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()


def test_the_commands_say_what_a_channel_uses_and_what_is_wrong_with_it(lab: Lab, store: StoreServer) -> None:
    assert owner_command(lab, "bucket", "demo").stdout == f"demo: the bucket '{BUCKET}'\n"
    assert f"  in the bucket '{BUCKET}'\n" in owner_command(lab, "show", "demo").stdout
    assert owner_command(lab, "engines").stdout == f"{BUCKET}  {store.url}/{BUCKET}/kf  used by demo\n"
    well = owner_command(lab, "test", "demo")
    assert (well.exit_code, len(well.stdout.splitlines())) == (0, 7)
    store.deny("upload")
    wrong = owner_command(lab, "test", "demo")
    assert wrong.exit_code == 5
    assert "upload an object: FAILED, HTTP 403, AccessDenied: Access " in wrong.stdout
    assert {"s3": "s3:PutObject", "gcs": "storage.objects.create, to upload"}[store.kind] in wrong.stdout
    refused = owner_command(lab, "engines", "--remove", BUCKET)
    assert (refused.exit_code, "is used by demo" in refused.stderr) == (2, True)
    keys = store.write_credentials(lab.directory)
    for arguments in (("engines", "--renew", BUCKET), ("bucket", "demo", "--own", "--use", BUCKET),
                      ("bucket", "demo", f"--{store.kind}", BUCKET), ("bucket", "demo", "--region", "x"),
                      ("engines", "--renew", BUCKET, *keys[:-2])):  # without the profile
        assert owner_command(lab, *arguments).exit_code == 2, arguments
    assert "other credentials" in owner_command(lab, "engines", "--renew", BUCKET, *keys).stdout
    try:
        assert owner_command(lab, "bucket", "demo", "--own").stdout == "demo: the hub's own bucket\n"
    finally:
        assert owner_command(lab, "bucket", "demo", "--use", BUCKET).exit_code == 0
