"""Buckets of Google Cloud Storage: what is signed, whom the hub talks to, and what is as at no other store."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qsl, urlsplit

import pytest
from google.cloud import storage
from google.oauth2 import service_account as google_accounts

from kachery_fast._checksum import crc32c
from kachery_fast.config import load_settings
from kachery_fast.errors import AddressRefused, EngineUnusable, InvalidArgument
from kachery_fast.hub.engines.gcs import GcsBucket
from kachery_fast.hub.engines.gcs_settings import GcsCredentials, GcsSettings, check_gcs_credentials, check_gcs_settings
from kachery_fast.hub.outbound import Outbound
from kachery_fast.protocol.names import object_name

from ..gcs_server import EMAIL, KEYS, GcsServer, credentials_of, rsa_key, service_account
from ..google import google_client
from ..network import LOOPS, run_on
from ..store_server import BUCKET
from .browsing import browser, sign_in
from .support import CHANNEL, running_world, sha1_of, use_bucket, world_on

parametrized = pytest.mark.parametrize("loop_kind", LOOPS)
every_key = pytest.mark.parametrize("gcs", KEYS, indirect=True)


# --- signing


@pytest.mark.parametrize("settings", [
    GcsSettings("lab-bucket"),
    GcsSettings("lab.bucket_1", prefix="a/b"),
    GcsSettings("lab-bucket", "http://127.0.0.1:9000", "kf"),
    GcsSettings("lab-bucket", "https://storage.me-central2.rep.googleapis.com"),
])
def test_urls_are_those_of_googles_library_to_the_byte(settings: GcsSettings) -> None:
    now = 1_795_175_123.7
    moment = datetime.fromtimestamp(int(now), timezone.utc)
    bucket = GcsBucket(check_gcs_settings(settings), check_gcs_credentials(service_account(), "", ""), mock.Mock(),
                       mock.Mock(), lambda: now, 1000)
    credentials = google_accounts.Credentials.from_service_account_info(
        {**json.loads(service_account()), "universe_domain": "googleapis.com"})
    client = storage.Client("lab", credentials)
    name = object_name(CHANNEL, "ab" * 20)
    blob = client.bucket(settings.bucket).blob(f"{settings.prefix}/{name}" if settings.prefix else name)

    def theirs(method: str, headers: dict[str, str] | None = None) -> str:
        with mock.patch("google.cloud.storage._signing._NOW", return_value=moment):
            return str(blob.generate_signed_url(timedelta(seconds=300), settings.server_url, method, headers=headers,
                                                version="v4"))

    created = bucket.sign_put(name, 999, 300, crc32c=0xE3069283)
    assert created.headers == {"x-goog-content-length-range": "999,999", "x-goog-if-generation-match": "0",
                               "x-goog-hash": "crc32c=4waSgw=="}
    assert created.url == theirs("PUT", created.headers)
    assert not created.resumable
    replaced = bucket.sign_put(name, 7, 300, replace=True)
    assert replaced == (theirs("PUT", {"x-goog-content-length-range": "7,7"}), {"x-goog-content-length-range": "7,7"},
                        False)
    assert not bucket.sign_put(name, 1001, 300).resumable, "for a node that knows no sessions"
    long = bucket.sign_put(name, 1001, 300, crc32c=1)
    assert long.resumable
    assert long.url == theirs("RESUMABLE", {
        "x-goog-content-length-range": "1001,1001", "x-goog-if-generation-match": "0",
        "x-goog-hash": "crc32c=AAAAAQ=="})
    assert long.headers["x-goog-resumable"] == "start"
    assert bucket.sign_get(name, 300) == (theirs("GET"), (int(now) + 300) * 1000)
    assert bucket.sign_get(name, 300, head=True).url == theirs("HEAD")


def test_a_hub_without_such_a_bucket_does_not_load_googles_library() -> None:
    code = ("import sys, kachery_fast.hub.app, kachery_fast.hub.engines.gcs as gcs\n"
            "from kachery_fast.hub.engines.gcs_settings import *\n"
            "bucket = gcs.GcsBucket(GcsSettings('lab'), GcsCredentials(access_key='a', secret_key='b'), None, None,"
            " lambda: 0.0, 1)\n"
            "bucket.sign_put('x', 1, 60)\n"
            "print([name for name in sys.modules if name.split('.')[0] in ('google', 'requests')])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_an_hmac_key_signs_as_google_documents_it() -> None:
    now = 1_795_175_123.7  # 2026-11-20T11:45:23Z
    bucket = GcsBucket(GcsSettings("lab-bucket"), GcsCredentials(access_key="GOOG1EX", secret_key="secret/of+it"),
                       mock.Mock(), mock.Mock(), lambda: now, 1000)
    signed = bucket.sign_put("lab/sha1/ab", 7, 300, crc32c=1)
    url, _, signature = signed.url.partition("&X-Goog-Signature=")
    query = ("X-Goog-Algorithm=GOOG4-HMAC-SHA256&X-Goog-Credential=GOOG1EX%2F20261120%2Fauto%2Fstorage%2Fgoog4_request"
             "&X-Goog-Date=20261120T114523Z&X-Goog-Expires=300&X-Goog-SignedHeaders=host%3Bx-goog-content-length-range"
             "%3Bx-goog-hash%3Bx-goog-if-generation-match")
    assert url == f"https://storage.googleapis.com/lab-bucket/lab/sha1/ab?{query}"
    canonical = ("PUT\n/lab-bucket/lab/sha1/ab\n" + query + "\nhost:storage.googleapis.com\n"
                 "x-goog-content-length-range:7,7\nx-goog-hash:crc32c=AAAAAQ==\nx-goog-if-generation-match:0\n\n"
                 "host;x-goog-content-length-range;x-goog-hash;x-goog-if-generation-match\nUNSIGNED-PAYLOAD")
    text = ("GOOG4-HMAC-SHA256\n20261120T114523Z\n20261120/auto/storage/goog4_request\n"
            + hashlib.sha256(canonical.encode()).hexdigest())
    key = b"GOOG4secret/of+it"
    for part in (b"20261120", b"auto", b"storage", b"goog4_request"):
        key = hmac.new(key, part, hashlib.sha256).digest()
    assert signature == hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


@pytest.mark.parametrize(("account", "access_key", "secret_key"), [
    ("", "", ""), ("", "GOOG1E", ""), ("", "", "secret"), ("", "with a space", "x"), ("{}", "", ""), ("[1]", "", ""),
    ("not JSON", "", ""), (json.dumps({**json.loads(service_account()), "type": "authorized_user"}), "", ""),
    (json.dumps({**json.loads(service_account()), "client_email": "a\nb@c"}), "", ""),
    (json.dumps({**json.loads(service_account()), "private_key": "-----BEGIN PRIVATE KEY-----"}), "", ""),
], ids=lambda _value: "")
def test_credentials_that_cannot_be_are_refused_and_not_shown(account: str, access_key: str, secret_key: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_gcs_credentials(account, access_key, secret_key)
    assert "PRIVATE" not in refused.value.message


@pytest.mark.parametrize("bits", [1024, 3200])
def test_keys_that_are_too_weak_or_take_the_hub_s_time_are_refused(bits: int) -> None:
    account = json.dumps({**json.loads(service_account()), "private_key": rsa_key(bits)})
    with pytest.raises(InvalidArgument, match="not the key of a service account"):
        check_gcs_credentials(account, "", "")


# --- objects


@parametrized
@every_key
def test_a_signed_upload_is_of_these_bytes_and_without_further_headers(
    tmp_path: Path, gcs: GcsServer, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, gcs) as world:
            await use_bucket(world, gcs)
            a = await world.member("a")
            (info,) = (await a.node_config()).channels
            assert info.crc32c
            (signed,) = await a.sign_uploads(CHANNEL, [(sha1_of(b"another"), 7, crc32c(b"another"))])
            for data, headers, code in (
                    (b"longer than it", signed.headers, b"EntityTooLarge"),
                    (b"anomaly", signed.headers, b"BadDigest"),
                    (b"another", {**signed.headers, "x-goog-if-generation-match": "1"}, b"SignatureDoesNotMatch"),
                    (b"another", {**signed.headers, "x-goog-acl": "public-read"}, b"SignatureDoesNotMatch")):
                async with world.session.put(signed.url, data=data, headers=headers) as answer:
                    assert code in await answer.read()
                    assert answer.status in (400, 403)

    run_on(loop_kind, scenario())


@every_key
def test_what_took_the_place_of_damage_is_not_removed(gcs: GcsServer) -> None:
    bucket = made(gcs)
    put(bucket, "lab/sha1/x", b"damaged")
    _, generation = bucket.read("lab/sha1/x", 100)
    put(bucket, "lab/sha1/x", b"repaired", replace=True)
    assert not bucket.remove("lab/sha1/x", etag=generation)
    assert bucket.read("lab/sha1/x", 100)[0] == b"repaired"
    assert bucket.size("lab/sha1/x") == 8
    assert bucket.remove("lab/sha1/x", etag=bucket.read("lab/sha1/x", 100)[1])
    assert not bucket.remove("lab/sha1/x")
    assert bucket.size("lab/sha1/x") is None


def made(gcs: GcsServer, **settings: Any) -> GcsBucket:
    """A bucket as a hub has it, without the hub."""
    credentials = check_gcs_credentials(*(gcs.credentials.get(name, "") for name in (
        "serviceAccount", "accessKey", "secretKey")))
    outbound = Outbound(load_settings({}, hub_engine_hosts=gcs.host))
    return GcsBucket(GcsSettings(BUCKET, gcs.url, **settings), credentials, outbound, mock.Mock(), time.time, 1000)


def put(bucket: GcsBucket, name: str, data: bytes, *, replace: bool = False) -> None:
    signed = bucket.sign_put(name, len(data), 300, replace=replace, crc32c=crc32c(data))
    assert bucket.outbound.request("PUT", signed.url, headers=signed.headers, body=data).status == 200


@every_key
def test_what_the_hub_writes_itself_is_created_once_and_compared(gcs: GcsServer) -> None:
    bucket, long = made(gcs), os.urandom(5000)
    assert bucket.write("lab/sha1/x", long)
    assert not bucket.write("lab/sha1/x", b"another")
    assert bucket.read("lab/sha1/x", 10_000)[0] == long
    gcs.set(flip=True)
    with pytest.raises(EngineUnusable, match="BadDigest"):
        bucket.write("lab/sha1/x", b"another", replace=True)
    assert bucket.write("lab/sha1/x", b"another", replace=True)
    assert bucket.read("lab/sha1/x", 10_000)[0] == b"another"


def test_more_objects_than_a_page_or_a_batch_are_listed_and_removed(gcs: GcsServer) -> None:
    bucket = made(gcs, prefix="p")
    for number in range(205):
        put(bucket, f"lab/sha1/{number:03}", b"x")
    assert [found.name for found in bucket.objects("lab", limit=300)] == [f"lab/sha1/{n:03}" for n in range(205)]
    assert [len(page) for page in bucket.pages("lab/", size=100)] == [100, 100, 5]
    assert bucket.remove_channel("lab") == 205
    assert bucket.objects("lab", limit=1) == []
    assert sum(line.startswith("JSON POST /batch/") for line in gcs.requests()) == 3


# --- who is talked to


def test_no_address_of_a_key_file_is_asked(tmp_path: Path, gcs: GcsServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        trap = f"http://127.0.0.1:{listener.getsockname()[1]}"
        account = json.dumps({**json.loads(service_account()), **{name: f"{trap}/{name}" for name in (
            "token_uri", "auth_uri", "auth_provider_x509_cert_url", "client_x509_cert_url")}})

        async def scenario() -> None:
            async with world_on(tmp_path, gcs) as world:
                with mock.patch.dict(os.environ, dict.fromkeys(
                        ("STORAGE_EMULATOR_HOST", "HTTP_PROXY", "HTTPS_PROXY"), trap)):
                    await use_bucket(world, gcs, serviceAccount=account, prefix="p", expireDays=5)
                    assert (await world.owner.call("testChannel", channel=CHANNEL))["ok"]
                    assert (await world.owner.call("setUpBucket", engine="mine"))["ok"]

        run_on("uvloop", scenario())
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(("endpoint", "error"), [
    ("http://127.0.0.1:9", InvalidArgument), ("https://storage.example.org", InvalidArgument),
    ("http://storage.googleapis.com", InvalidArgument), ("https://storage.googleapis.com.example.org", InvalidArgument),
    ("https://storage.googleapis.com:8443", InvalidArgument), ("http://169.254.169.254", InvalidArgument),
    ("https://no-such-name.googleapis.com", (EngineUnusable, AddressRefused)),
])
def test_only_google_and_whom_the_admin_trusts_are_servers(tmp_path: Path, endpoint: str, error: Any) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            with pytest.raises(error):
                await world.owner.call("addGcsBucket", name="x", bucket=BUCKET, endpoint=endpoint,
                                       **credentials_of("hmac"))
            assert (await world.owner.call("listEngines"))["engines"] == []

    run_on("uvloop", scenario())


# --- setting it up


def test_browsers_are_let_in_and_what_is_below_the_prefix_expires(tmp_path: Path, gcs: GcsServer) -> None:
    others = [{"action": {"type": "Delete"}, "condition": {"age": 1, "matchesPrefix": ["other/"]}},
              {"action": {"type": "Delete"}, "condition": {"age": 9, "matchesPrefix": ["kf/"], "numNewerVersions": 2}}]
    google = google_client(gcs.url).get_bucket(BUCKET)
    google.lifecycle_rules = others
    google.cors = [{"origin": ["https://lab.org"], "method": ["PUT"]}]
    google.patch()

    async def scenario() -> None:
        async with world_on(tmp_path, gcs) as world:
            await use_bucket(world, gcs, prefix="kf", expireDays=30)
            for days in (30, 7):
                if days != 30:
                    await world.owner.call("addGcsBucket", name="later", **gcs.settings, prefix="kf",
                                           expireDays=days)
                done = await world.owner.call("setUpBucket", engine="mine" if days == 30 else "later")
                assert [step["ok"] for step in done["steps"]] == [True, True], done
                google.reload()
                rule = {"action": {"type": "Delete"}, "condition": {"age": days, "matchesPrefix": ["kf/"]}}
                assert [dict(found) for found in google.lifecycle_rules] == [*others, rule]
                assert [found["method"] for found in google.cors] == [["PUT"], ["GET", "HEAD"]]
                assert "Content-Range" in google.cors[1]["responseHeader"]
            patches = sum(line.startswith("JSON PATCH") for line in gcs.requests())
            assert (await world.owner.call("setUpBucket", engine="later"))["ok"]
            assert sum(line.startswith("JSON PATCH") for line in gcs.requests()) == patches, "nothing was left to do"
            with pytest.raises(InvalidArgument, match="service account"):
                await world.owner.call("addGcsBucket", name="no", **gcs.place, **credentials_of("hmac"), prefix="x",
                                       expireDays=1)
            await world.owner.call("addGcsBucket", name="hmac", **gcs.place, **credentials_of("hmac"))
            with pytest.raises(EngineUnusable, match="no key of a service account"):
                await world.owner.call("setUpBucket", engine="hmac")
            gcs.set(denied=["storage.buckets.update"])
            await world.owner.call("addGcsBucket", name="again", **gcs.settings, prefix="x",
                                   expireDays=1)
            done = await world.owner.call("setUpBucket", engine="again")
            assert [step["ok"] for step in done["steps"]] == [True, False]
            assert "storage.buckets.update" in done["steps"][1]["why"]
            assert "Storage Admin" in done["steps"][1]["advice"]

    run_on("uvloop", scenario())


@parametrized
def test_a_bucket_is_set_up_on_the_website_without_a_script(tmp_path: Path, gcs: GcsServer, loop_kind: str) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, gcs) as world, browser(world) as mine:
            await sign_in(world, mine)
            page = await mine.get("/buckets")
            page = await mine.submit(page.form("/do/addGcsBucket"), name="mine", **gcs.settings, prefix="kf",
                                     expireDays="30", accessKey="", secretKey="")
            (line,) = (await world.owner.call("listEngines"))["engines"]
            assert line["expireDays"] == 30
            page = await mine.submit(page.form("/do/setUpBucket"))
            assert "let browsers read (CORS)" in page.text

    run_on(loop_kind, scenario())


def test_the_signature_is_of_this_account_and_day() -> None:
    bucket = GcsBucket(GcsSettings("lab-bucket"), check_gcs_credentials(service_account(), "", ""), mock.Mock(),
                       mock.Mock(), lambda: 1_795_175_123.7, 1000)
    query = dict(parse_qsl(urlsplit(bucket.sign_get("lab/sha1/x", 60).url).query))
    assert query["X-Goog-Credential"] == f"{EMAIL}/20261120/auto/storage/goog4_request"
