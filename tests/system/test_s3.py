"""A channel on a bucket that speaks S3, in real processes: hub, nodes, and a store that checks each signature."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kachery_fast as kf
from kachery_fast.cli import program
from kachery_fast.cli.lab import Lab
from kachery_fast.errors import KacheryError
from tests.s3_server import BUCKET, SECRET_KEY, S3Server, running_s3, use_bucket
from tests.system.support import CHUNK_SIZE_BYTES, QUICK, make_recording, objects

SIZE = 5 * CHUNK_SIZE_BYTES + 17


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("lab")
    with Lab(directory, environ={**QUICK, "KACHERY_HUB_ENGINE_HOSTS": s3.host, "KACHERY_RETRY_ATTEMPTS_MAX": "2",
                                 "KACHERY_CHANNEL_REFRESH_SECONDS": "0.2", "KACHERY_PATIENCE_SECONDS": "2"}) as lab:
        lab.start_hub()
        found = use_bucket(lab, s3, "--prefix", "kf", "--test", profile="lab")
        assert found["name"] == BUCKET
        assert found["test"]["ok"], found
        for name in ("A", "B"):
            lab.add_node(name)
        yield lab


@pytest.mark.parametrize("option", ["--public", "--private"])
def test_a_file_goes_from_node_to_node_through_the_owner_s_bucket(
    lab: Lab, s3: S3Server, tmp_path: Path, option: str
) -> None:
    s3.reset()
    lab.owner("set", "demo", option)
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=len(option))
    uri = stored(lab, recording)
    with lab.nodes["B"].used():
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()
    asked = s3.requests()
    assert sum(line.startswith(f"PUT /{BUCKET}/kf/demo/sha1/") for line in asked) == 7, "six chunks and the manifest"
    assert sum(line.startswith(f"GET /{BUCKET}/kf/demo/sha1/") for line in asked) >= 7
    assert not lab.bucket_dir.exists() or not objects(lab.bucket_dir), "the hub's own bucket has nothing of it"
    listed = lab.owner("objects", "demo")["objects"]
    assert sorted(line["sizeBytes"] for line in listed)[-5:] == [CHUNK_SIZE_BYTES] * 5
    assert len(listed) == 7
    upload(lab, uri)
    assert len(lab.owner("objects", "demo")["objects"]) == 7


@pytest.mark.parametrize(("state", "code", "advice"), [
    ({"bucket": False}, "NoSuchBucket", "does not exist"),
    ({"region": "us-west-2"}, "AuthorizationQueryParametersError", "expecting 'us-west-2'"),
    ({"denied": ["PutObject"]}, "AccessDenied", "Access Denied"),
    ({"offset": 700}, "Request has expired", "clocks"),
    ({"offset": -1000}, "AccessDenied", "not valid yet"),
])
def test_what_the_bucket_refuses_is_said_with_its_cause(
    lab: Lab, s3: S3Server, tmp_path: Path, state: dict[str, Any], code: str, advice: str
) -> None:
    s3.reset()
    uri = stored(lab, make_recording(tmp_path / "recording.dat", 1000, seed=len(code + advice)))
    s3.set(**state)
    with pytest.raises(KacheryError) as refused:
        upload(lab, uri)
    assert code in refused.value.message
    assert advice in refused.value.message
    assert SECRET_KEY not in refused.value.message
    s3.reset()
    upload(lab, uri)


def test_a_load_whose_upload_is_refused_says_why_and_ends_well_when_the_permission_is_back(
    lab: Lab, s3: S3Server, tmp_path: Path
) -> None:
    s3.reset()
    recording = make_recording(tmp_path / "recording.dat", SIZE, seed=5)
    uri = stored(lab, recording)
    s3.set(denied=["PutObject"])
    with lab.nodes["B"].used():
        with pytest.raises(KacheryError) as refused:
            kf.load_file(uri)
        assert "AccessDenied" in refused.value.message
        s3.set(denied=[])
        assert Path(kf.load_file(uri)).read_bytes() == recording.read_bytes()


def command(lab: Lab, *arguments: str) -> Result:
    """Run ``kachery-fast channel ...`` on the hub's machine, within this process."""
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("KACHERY_")}
    return CliRunner().invoke(program, ["channel", *arguments], env={**clean, "KACHERY_HUB_DIR": str(lab.hub_dir)})


def test_the_commands_say_what_a_channel_uses_and_what_is_wrong_with_it(lab: Lab, s3: S3Server) -> None:
    s3.reset()
    assert command(lab, "bucket", "demo").stdout == f"demo: the bucket '{BUCKET}'\n"
    assert f"  in the bucket '{BUCKET}'\n" in command(lab, "show", "demo").stdout
    assert command(lab, "engines").stdout == f"{BUCKET}  {s3.url}/{BUCKET}/kf  used by demo\n"
    well = command(lab, "test", "demo")
    assert (well.exit_code, len(well.stdout.splitlines())) == (0, 7)
    s3.set(denied=["PutObject"])
    wrong = command(lab, "test", "demo")
    assert wrong.exit_code == 5
    assert "upload an object: FAILED, HTTP 403, AccessDenied: Access Denied" in wrong.stdout
    assert "s3:PutObject" in wrong.stdout
    refused = command(lab, "engines", "--remove", BUCKET)
    assert (refused.exit_code, "is used by demo" in refused.stderr) == (2, True)
    credentials = str(lab.directory / "credentials")
    for arguments in (("engines", "--renew", BUCKET), ("bucket", "demo", "--own", "--use", BUCKET),
                      ("bucket", "demo", "--s3", BUCKET), ("bucket", "demo", "--region", "x"),
                      ("engines", "--renew", BUCKET, "--credentials", credentials)):
        assert command(lab, *arguments).exit_code == 2, arguments
    assert "other credentials" in command(
        lab, "engines", "--renew", BUCKET, "--credentials", credentials, "--profile", "lab").stdout
    try:
        assert command(lab, "bucket", "demo", "--own").stdout == "demo: the hub's own bucket\n"
    finally:
        assert command(lab, "bucket", "demo", "--use", BUCKET).exit_code == 0


def stored(lab: Lab, path: Path) -> str:
    with lab.nodes["A"].used():
        return kf.store_file(path)


def upload(lab: Lab, uri: str) -> None:
    with lab.nodes["A"].used():
        kf.upload_file(uri, channel="demo")
