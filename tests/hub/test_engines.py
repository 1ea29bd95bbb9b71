"""Owners' own buckets: who may add and use them, what they are used for, and what a test of a channel finds."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import botocore.config
import pytest

from kachery_fast.errors import (
    AddressRefused,
    AlreadyExists,
    CredentialsUnreadable,
    EngineUnusable,
    InvalidArgument,
    NotOnHub,
    NotPermitted,
    QuotaExceeded,
    RateLimited,
)
from kachery_fast.hub.engines.s3 import S3Bucket
from kachery_fast.hub.engines.s3_settings import S3Credentials, S3Settings, check_settings
from kachery_fast.hub.outbound import Outbound
from kachery_fast.hub.trying import TRIALS_PER_MINUTE_MAX
from kachery_fast.protocol.names import ObjectName, object_name

from ..network import LOOPS, run_on
from ..s3_server import ACCESS_KEY, BUCKET, REGION, SECRET_KEY, S3Server, running_s3
from .browsing import browser, sign_in
from .support import CHANNEL, Clock, World, running_world

parametrized = pytest.mark.parametrize("loop_kind", LOOPS)
FILES = ObjectName(CHANNEL, "file", "", "", "")


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture
def s3(running: S3Server) -> S3Server:
    running.reset()
    return running


def world_of(tmp_path: Path, s3: S3Server, clock: Clock | None = None, **overrides: Any) -> Any:
    return running_world(tmp_path, clock, hub_engine_hosts=s3.host, **overrides)


async def use_s3(world: World, s3: S3Server, **fields: Any) -> dict[str, Any]:
    added = await world.owner.call("addS3Bucket", **{"name": "mine", **s3.settings, **fields})
    await world.owner.call("setBucket", channel=CHANNEL, engine="mine")
    return added


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


# --- signing


@pytest.mark.parametrize("settings", [
    S3Settings("lab-bucket", region="eu-central-1"),
    S3Settings("lab-bucket", region="us-east-1"),
    S3Settings("lab-bucket", region="cn-north-1"),
    S3Settings("lab.bucket", region="us-west-2"),
    S3Settings("lab-bucket", "http://127.0.0.1:9000", path_style=True),
    S3Settings("lab-bucket", "https://s3.example.org", "auto", prefix="a/b"),
])
def test_urls_are_those_of_botocore_to_the_byte(settings: S3Settings) -> None:
    settings = check_settings(settings)
    now = 1_795_175_123.7
    bucket = S3Bucket(settings, S3Credentials(ACCESS_KEY, SECRET_KEY), mock.Mock(), mock.Mock(), lambda: now)
    client = boto3.client(
        "s3", region_name=settings.region, endpoint_url=settings.endpoint or None, aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY, config=botocore.config.Config(signature_version="s3v4", s3={
            "addressing_style": "path" if settings.path_style else "virtual",
            "us_east_1_regional_endpoint": "regional"}))
    name = object_name(CHANNEL, "ab" * 20)
    place = {"Bucket": settings.bucket, "Key": f"{settings.prefix}/{name}" if settings.prefix else name}
    moment = datetime.fromtimestamp(int(now), timezone.utc).replace(tzinfo=None)

    def theirs(operation: str, **fields: Any) -> str:
        with mock.patch("botocore.auth.get_current_datetime", return_value=moment):
            return str(client.generate_presigned_url(operation, Params={**place, **fields}, ExpiresIn=300))

    created = bucket.sign_put(name, 1234, 300)
    assert created.url == theirs("put_object", ContentLength=1234, IfNoneMatch="*")
    assert created.headers == {"if-none-match": "*"}
    assert bucket.sign_put(name, 7, 300, replace=True)[:2] == (theirs("put_object", ContentLength=7), {})
    assert bucket.sign_get(name, 300) == (theirs("get_object"), (int(now) + 300) * 1000)
    assert bucket.sign_get(name, 300, head=True).url == theirs("head_object")
    assert bucket.sign_get(name, 300).url.startswith(f"{bucket.url_base}/{name}?")


@pytest.mark.parametrize("fields", [
    {"bucket": "a"}, {"bucket": "../x"}, {"bucket": "a..b"}, {"bucket": "x/y"}, {"bucket": "a b c"}, {"region": "EU"},
    {"region": ""}, {"region": "x.evil.example"}, {"prefix": "a/../b"}, {"prefix": "a//b"}, {"prefix": "ä"},
    {"prefix": "a?b"}, {"endpoint": "https://user@s3.example.org"}, {"endpoint": "https://s3.example.org/x"},
])
def test_settings_that_could_lead_elsewhere_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        check_settings(S3Settings(**{"bucket": "lab", "region": "eu-central-1", **fields}))


# --- objects


@parametrized
def test_a_signed_upload_creates_one_object_of_its_length_in_its_time(
    tmp_path: Path, s3: S3Server, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            await use_s3(world, s3)
            a = await world.member("a")
            assert await world.upload(a, b"a chunk") == 200
            assert await world.upload(a, b"a chunk") == 412
            sha1 = sha1_of(b"another")
            (signed,) = await a.sign_uploads(CHANNEL, [(sha1, 7)])
            for data, headers in ((b"longer than it", signed.headers), (b"short", signed.headers), (b"another", {})):
                async with world.session.put(signed.url, data=data, headers=headers) as answer:
                    assert answer.status == 403
                    assert b"SignatureDoesNotMatch" in await answer.read()
            s3.set(offset=301)
            async with world.session.put(signed.url, data=b"another", headers=signed.headers) as answer:
                assert (answer.status, b"expired" in await answer.read()) == (403, True)
            s3.set(offset=0)
            reads = await a.sign_downloads(FILES, [sha1_of(b"a chunk"), sha1])
            for url, status, body in zip(reads.urls, (200, 404), (b"a chunk", None), strict=True):
                async with world.session.get(url) as answer:
                    assert answer.status == status
                    assert body is None or await answer.read() == body
                async with world.session.get(url.partition("?")[0]) as answer:
                    assert answer.status == 403
                async with world.session.head(url) as answer:
                    assert answer.status == 403, "it was signed for GET"

    run_on(loop_kind, scenario())


def test_nodes_are_told_where_the_bucket_is_and_that_reads_are_signed(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            a = await world.member("a")

            async def told() -> list[tuple[str, bool]]:
                (info,) = (await a.node_config()).channels
                _, answer = await world.post("/api/getChannelBucketBaseUrl", b'{"channelName": "lab"}')
                return [(info.bucket_url.rstrip("/"), info.private), (answer["url"], answer["private"])]

            own = await told()
            assert own == [(f"{world.url}/bucket", False)] * 2
            await use_s3(world, s3, prefix="deep/er")
            assert await told() == [(f"{s3.url}/{BUCKET}/deep/er", True)] * 2
            await world.owner.call("addS3Bucket", **{**s3.settings, "name": "open"}, publicReads=True)
            await world.owner.call("setBucket", channel=CHANNEL, engine="open")
            assert await told() == [(f"{s3.url}/{BUCKET}", False)] * 2
            with pytest.raises(InvalidArgument, match="everybody may read"):
                await world.owner.call("changeChannel", channel=CHANNEL, private=True)
            await world.owner.call("setBucket", channel=CHANNEL, engine="mine")
            await world.owner.call("changeChannel", channel=CHANNEL, private=True)
            with pytest.raises(InvalidArgument, match="everybody may read"):
                await world.owner.call("setBucket", channel=CHANNEL, engine="open")
            await world.owner.call("setBucket", channel=CHANNEL, engine=None)
            assert [url for url, _ in await told()] == [url for url, _ in own]

    run_on("uvloop", scenario())


def test_the_owner_looks_into_his_bucket_and_empties_it(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            await use_s3(world, s3, prefix="p")
            a = await world.member("a")
            contents = [b"x" * number for number in range(1, 6)]
            for data in contents:
                assert await world.upload(a, data) == 200
            names = sorted(object_name(CHANNEL, sha1_of(data)) for data in contents)
            page = await world.owner.call("listObjects", channel=CHANNEL, limit=3)
            assert [line["name"] for line in page["objects"]] == names[:3]
            rest = await world.owner.call("listObjects", channel=CHANNEL, limit=3, after=page["next"])
            assert [line["name"] for line in rest["objects"]] == names[3:]
            assert rest["next"] is None
            assert (await world.owner.call("listObjects", channel=CHANNEL, kind="feeds"))["objects"] == []

            async def counted() -> bool:
                stored = (await world.owner.call("showUsage", channel=CHANNEL))["stored"]
                return {"kind": "sha1", "objects": 5, "sizeBytes": 15} in stored

            while not await counted():
                pass
            today = (await world.owner.call("showUsage", channel=CHANNEL))["days"][-1]
            assert (today["uploads"], today["uploadBytes"]) == (5, 15), "what was signed counts"
            removed = await world.owner.call("removeObjects", channel=CHANNEL, names=names[:2] + names[:1])
            assert (removed["removed"], len(removed["missing"])) == (2, 0)
            gone = await world.owner.call("deleteChannel", channel=CHANNEL)
            assert (gone["objectsRemoved"], gone["left"]) == (3, "")

    run_on("uvloop", scenario())


def test_damage_is_looked_at_and_removed_there(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            await use_s3(world, s3)
            a = await world.member("a")
            good, bad = sha1_of(b"good"), sha1_of(b"what it should be")
            assert await world.upload(a, b"good") == 200
            assert await world.upload(a, b"something else", bad) == 200
            assert not await a.report_corrupt(CHANNEL, good, "0" * 40)
            assert await a.report_corrupt(CHANNEL, bad, "0" * 40)
            names = [line["name"] for line in (await world.owner.call("listObjects", channel=CHANNEL))["objects"]]
            assert names == [object_name(CHANNEL, good)]

    run_on("uvloop", scenario())


def test_quotas_hold_for_what_was_signed(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            await use_s3(world, s3)
            a, b = await world.member("a"), await world.member("b")
            await world.owner.call("changeChannel", channel=CHANNEL, nodeDayBytesMax=100, sizeBytesMax=150)
            for _ in range(2):
                await a.sign_uploads(CHANNEL, [("1" * 40, 60)])
            with pytest.raises(QuotaExceeded, match="today"):
                await a.sign_uploads(CHANNEL, [("2" * 40, 60)])
            await b.sign_uploads(CHANNEL, [("3" * 40, 80)])
            with pytest.raises(QuotaExceeded, match="bucket of the channel"):
                await b.sign_uploads(CHANNEL, [("4" * 40, 20)])

    run_on("uvloop", scenario())


def test_a_hostile_list_of_objects_is_refused_or_ends(tmp_path: Path) -> None:
    outbound = mock.Mock(spec=Outbound)
    settings = check_settings(S3Settings("lab-bucket", region="eu-central-1"))
    bucket = S3Bucket(settings, S3Credentials("a", "b"), outbound, mock.Mock(), lambda: 0.0)

    def listing(*names: str, more: bool = True, begin: str = "") -> bytes:
        items = "".join(f"<Contents><Key>{name}</Key><LastModified>2026-01-31T10:00:00.000Z</LastModified>"
                        "<Size>1</Size></Contents>" for name in names)
        return (f"{begin}<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{items}"
                "</ListBucketResult>").encode()

    def answering(body: bytes) -> None:
        outbound.request.return_value = mock.Mock(status=200, headers={}, body=body)

    answering(listing("other/sha1/x", "lab/sha1/b", "lab/sha1/a", "lab"))
    assert [found.name for found in bucket.objects("lab", limit=10)] == ["lab/sha1/b"], "and asked no further"
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    for body in (listing("lab/&b;", begin=bomb), b"<x", b"\xff\xfe<\x00x\x00", b"<html>sign in</html>x",
                 listing("lab/x").replace(b">1<", b">-1<"), listing("lab/x").replace(b"2026-01", b"2026-99")):
        answering(body)
        with pytest.raises(EngineUnusable) as refused:
            bucket.objects("lab", limit=10)
        assert len(refused.value.message) < 400


# --- who may do what


def test_engines_are_their_owner_s_alone(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            added = await use_s3(world, s3)
            other = await world.person("second@lab.org")
            await other.call("createChannel", name="theirs")
            assert (await other.call("listEngines"))["engines"] == []
            for named in ("mine", added["id"]):
                with pytest.raises(NotOnHub):
                    await other.call("setBucket", channel="theirs", engine=named)
                with pytest.raises(NotOnHub):
                    await other.call("removeEngine", engine=named)
                with pytest.raises(NotOnHub):
                    await other.call("changeCredentials", engine=named, accessKey="a", secretKey="b")
            for kind in ("setBucket", "testChannel"):
                with pytest.raises(NotPermitted):
                    await other.call(kind, channel=CHANNEL)
            with pytest.raises(AlreadyExists):
                await world.owner.call("addS3Bucket", **s3.settings, name="mine")
            with pytest.raises(InvalidArgument, match=f"is used by {CHANNEL}"):
                await world.owner.call("removeEngine", engine="mine")
            await world.owner.call("setBucket", channel=CHANNEL)
            await world.owner.call("removeEngine", engine="mine")
            assert (await world.owner.call("listEngines"))["engines"] == []

    run_on("uvloop", scenario())


@pytest.mark.parametrize("endpoint", [
    "http://127.0.0.1:9", "http://169.254.169.254", "http://localhost:20440", "http://[::ffff:127.0.0.1]", "http://0",
    "http://2130706433", "http://192.168.1.10:9000",
])
def test_a_bucket_on_a_private_address_is_refused_before_any_node_is_sent_there(tmp_path: Path, endpoint: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            with pytest.raises((AddressRefused, EngineUnusable)):
                await world.owner.call("addS3Bucket", name="inner", bucket="latest", endpoint=endpoint, accessKey="a",
                                       secretKey="b")
            assert (await world.owner.call("listEngines"))["engines"] == []

    run_on("uvloop", scenario())


def test_credentials_are_in_no_answer_log_audit_entry_file_or_page(
    tmp_path: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world, browser(world) as mine:
            await use_s3(world, s3)
            await world.owner.call("changeCredentials", engine="mine", accessKey=ACCESS_KEY, secretKey=SECRET_KEY)
            for kind in ("listEngines", "showAudit"):
                seen.append(json.dumps(await world.owner.call(kind)))
            for kind in ("showChannel", "testChannel", "showAudit"):
                seen.append(json.dumps(await world.owner.call(kind, channel=CHANNEL)))
            assert "addS3Bucket" in seen[1]
            assert BUCKET in seen[1]
            wrong: list[dict[str, Any]] = [
                {"secretKey": 5}, {"accessKey": None}, {"accessKey": "with a space"}, {"more": 1},
                {"secretKey": SECRET_KEY + " x"}, {"name": ""}, {"region": "?"}, {"name": "mine"}]
            for fields in wrong:
                status, answer = await world.ask(json.dumps(
                    {"type": "addS3Bucket", "name": "other", **s3.settings, **fields}).encode())
                assert status >= 400
                seen.append(json.dumps(answer))
            a = await world.member("a")
            seen.append(str(await a.node_config()))
            s3.remove_bucket()
            with pytest.raises(EngineUnusable) as gone:
                await world.owner.call("listObjects", channel=CHANNEL)
            seen.append(gone.value.message)
            assert "NoSuchBucket" in gone.value.message
            await sign_in(world, mine)
            for path in (f"/channels/{CHANNEL}", "/buckets", "/audit", "/api"):
                seen.append((await mine.get(path)).text)

    run_on("asyncio-debug", scenario())
    files = b"".join(path.read_bytes() for path in (tmp_path / "hub").glob("hub.db*"))
    for text in [*seen, caplog.text]:
        assert SECRET_KEY not in text
        assert ACCESS_KEY not in text
    assert SECRET_KEY.encode() not in files
    assert ACCESS_KEY.encode() not in files
    assert repr(S3Credentials(ACCESS_KEY, SECRET_KEY)) == "S3Credentials(…)"


def test_with_another_key_one_channel_says_what_to_do_and_the_others_go_on(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            await use_s3(world, s3)
            await world.owner.call("createChannel", name="own")
            await world.member("a")
            await world.node("a").join(await world.invite(channel="own"))
        for key in tmp_path.glob("hub/*-key"):
            if key.name in ("engine-key", "hub-key"):
                key.unlink()
        async with world_of(tmp_path, s3) as world:
            a = world.node("a")
            assert {info.name for info in (await a.node_config()).channels} == {CHANNEL, "own"}
            await a.sign_uploads("own", [("1" * 40, 5)])
            with pytest.raises(CredentialsUnreadable):
                await a.sign_uploads(CHANNEL, [("1" * 40, 5)])
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert not tried["ok"]
            assert "--renew mine" in tried["steps"][0]["why"]
            await world.owner.call("showUsage", channel=CHANNEL)
            await world.owner.call("changeCredentials", engine="mine", accessKey=ACCESS_KEY, secretKey=SECRET_KEY)
            assert (await world.owner.call("testChannel", channel=CHANNEL))["ok"]

    run_on("uvloop", scenario())


# --- trying it out


@parametrized
@pytest.mark.parametrize(("own", "private"), [(True, False), (True, True), (False, True)])
def test_a_channel_that_works_is_found_to(
    tmp_path: Path, s3: S3Server, loop_kind: str, own: bool, private: bool
) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            await world.owner.call("changeChannel", channel=CHANNEL, private=private)
            if not own:
                await use_s3(world, s3)
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert tried["ok"], tried
            assert [step["name"] for step in tried["steps"]] == [
                "look for an object that is not there", "upload an object", "find that it is there already", "read it",
                "list it", "remove it", "echo a message"]
            assert tried["bucket"] == (None if own else "mine")
            assert (await world.owner.call("listObjects", channel=CHANNEL))["objects"] == []
            if not own:
                methods = [line.split()[0] for line in s3.requests()]
                assert methods[:7] == ["GET", "PUT", "PUT", "GET", "GET", "HEAD", "DELETE"]

    run_on(loop_kind, scenario())


@pytest.mark.parametrize(("state", "fields", "step", "why", "advice"), [
    ({"bucket": False}, {}, 0, "NoSuchBucket", "Make the bucket"),
    ({"region": "us-west-2"}, {}, 0, "expecting 'us-west-2'", "region"),
    ({"denied": ["PutObject"]}, {}, 1, "AccessDenied", "s3:PutObject"),
    ({"denied": ["DeleteObject"]}, {}, 5, "AccessDenied", "s3:DeleteObject"),
    ({"denied": ["ListBucket"]}, {}, 4, "AccessDenied", "s3:ListBucket"),
    ({"denied": ["GetObject"]}, {}, 0, "AccessDenied", "s3:ListBucket"),
    ({}, {"accessKey": "AKIAUNKNOWN"}, 0, "InvalidAccessKeyId", "not known"),
    ({}, {"secretKey": "wrong"}, 0, "SignatureDoesNotMatch", "does not belong"),
    ({}, {"bucket": "another-bucket"}, 0, "NoSuchBucket", "correct its name"),
])
def test_what_is_wrong_is_named_with_what_to_do(
    tmp_path: Path, s3: S3Server, state: dict[str, Any], fields: dict[str, Any], step: int, why: str, advice: str
) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            await use_s3(world, s3, **fields)
            s3.set(**state)
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert not tried["ok"]
            found = tried["steps"][step]
            assert not found["ok"]
            assert why in found["why"]
            assert advice in found["advice"]
            assert tried["steps"][-1]["ok"], "the messages flow all the same"

    run_on("uvloop", scenario())


def test_clocks_that_differ_are_named(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with world_of(tmp_path, s3, clock) as world:
            await use_s3(world, s3)
            clock.now += 600
            first = (await world.owner.call("testChannel", channel=CHANNEL))["steps"][0]
            assert "its clock is -600 s from the hub's" in first["why"] or "its clock is -601 s" in first["why"]

    run_on("uvloop", scenario())


def test_a_store_that_replaces_objects_is_found_out_unless_its_owner_knows(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            await use_s3(world, s3, createOnly=False)
            assert (await world.owner.call("testChannel", channel=CHANNEL))["ok"]
            await world.owner.call("addS3Bucket", **s3.settings, name="other", prefix="x")
            await world.owner.call("setBucket", channel=CHANNEL, engine="other")
            s3.set(forgetful=True)
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert "--no-create-only" in tried["steps"][2]["advice"]

    run_on("uvloop", scenario())


def test_tests_are_rare(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world:
            for _ in range(TRIALS_PER_MINUTE_MAX):
                await world.owner.call("testChannel", channel=CHANNEL)
            with pytest.raises(RateLimited):
                await world.owner.call("testChannel", channel=CHANNEL)

    run_on("uvloop", scenario())


@pytest.mark.live
def test_a_real_bucket_works(tmp_path: Path) -> None:
    """``KACHERY_TEST_S3``: the fields of ``addS3Bucket``, as JSON."""
    fields = os.environ.get("KACHERY_TEST_S3")
    if not fields:
        pytest.skip("KACHERY_TEST_S3 names no bucket")

    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.owner.call("addS3Bucket", name="real", **json.loads(fields))
            await world.owner.call("setBucket", channel=CHANNEL, engine="real")
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert tried["ok"], tried
            await world.owner.call("deleteChannel", channel=CHANNEL)

    run_on("uvloop", scenario())


# --- the website


@parametrized
def test_a_bucket_is_added_chosen_and_tested_on_the_website_without_a_script(
    tmp_path: Path, s3: S3Server, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, s3) as world, browser(world) as mine:
            await sign_in(world, mine)
            page = await mine.get("/buckets")
            page = await mine.submit(
                page.form("/do/addS3Bucket"), name="mine <b>", bucket=BUCKET, endpoint=s3.url, region=REGION,
                accessKey=ACCESS_KEY, secretKey=SECRET_KEY)
            assert "mine &lt;b&gt;" in page.text
            assert "mine <b>" not in page.text
            (line,) = (await world.owner.call("listEngines"))["engines"]
            assert (line["pathStyle"], line["createOnly"], line["publicReads"]) == (True, True, False)
            page = await mine.get(f"/channels/{CHANNEL}")
            assert "Objects are in the hub's own bucket" in page.text
            page = await mine.submit(page.form("/do/setBucket"), engine=line["id"])
            assert "The bucket of lab was changed." in page.text
            tested = await mine.submit(page.form("/do/testChannel"))
            assert "Everything works." in tested.text
            s3.remove_bucket()
            tested = await mine.submit(page.form("/do/testChannel"))
            assert "Something is wrong." in tested.text
            assert "NoSuchBucket" in tested.text
            page = await mine.submit(page.form("/do/setBucket"), engine="")
            page = await mine.submit((await mine.get("/buckets")).form("/do/removeEngine"))
            assert "The hub has forgotten mine" in page.text

    run_on(loop_kind, scenario())
