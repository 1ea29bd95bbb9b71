"""Owners' own buckets: who may add, use and test them, and what S3 has alone."""

from __future__ import annotations

import asyncio
import contextlib
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
from kachery_fast.protocol.names import object_name

from ..network import LOOPS, run_on
from ..s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from .support import CHANNEL, STEPS, running_world, sha1_of, use_bucket, world_on

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


# --- objects


def test_quotas_hold_for_what_was_signed(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            await use_bucket(world, s3)
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


def test_what_its_owner_removes_makes_room(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            await use_bucket(world, s3)
            a = await world.member("a")
            assert await world.upload(a, b"x" * 100) == 200
            await world.owner.call("changeChannel", channel=CHANNEL, sizeBytesMax=150)
            while not (await world.owner.call("showUsage", channel=CHANNEL))["counted"]:
                pass
            world.clock.now += world.settings.url_life_seconds + 1  # what was signed does not come any more
            with pytest.raises(QuotaExceeded):
                await a.sign_uploads(CHANNEL, [("1" * 40, 100)])
            await world.owner.call("removeObjects", channel=CHANNEL, names=[object_name(CHANNEL, sha1_of(b"x" * 100))])
            while True:
                with contextlib.suppress(QuotaExceeded):
                    await a.sign_uploads(CHANNEL, [("1" * 40, 100)])
                    break

    run_on("uvloop", scenario())


def test_owners_slow_stores_hold_up_nothing_but_themselves(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            await use_bucket(world, s3)
            await world.owner.call("createChannel", name="second")
            s3.set(slow=2.0)
            slow = [asyncio.create_task(world.owner.call("listObjects", channel=CHANNEL)) for _ in range(9)]
            while len(s3.requests()) < 6:  # as many as asyncio's own threads at the least
                await asyncio.sleep(0.01)
            assert (await world.owner.call("listObjects", channel="second"))["objects"] == []
            assert not any(task.done() for task in slow)
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
            s3.set(slow=0)

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
        async with world_on(tmp_path, s3) as world:
            added = await use_bucket(world, s3)
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


def test_with_another_key_one_channel_says_what_to_do_and_the_others_go_on(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            await use_bucket(world, s3)
            await world.owner.call("createChannel", name="own")
            await world.member("a")
            await world.node("a").join(await world.invite(channel="own"))
        for key in tmp_path.glob("hub/*-key"):
            if key.name in ("engine-key", "hub-key"):
                key.unlink()
        async with world_on(tmp_path, s3) as world:
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


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("private", [False, True])
def test_the_hub_s_own_bucket_is_found_to_work(tmp_path: Path, loop_kind: str, private: bool) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.owner.call("changeChannel", channel=CHANNEL, private=private)
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert tried["ok"], tried
            assert [step["name"] for step in tried["steps"]] == STEPS
            assert tried["bucket"] is None
            assert (await world.owner.call("listObjects", channel=CHANNEL))["objects"] == []

    run_on(loop_kind, scenario())


def test_a_store_that_replaces_objects_is_found_out_unless_its_owner_knows(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            await use_bucket(world, s3, createOnly=False)
            assert (await world.owner.call("testChannel", channel=CHANNEL))["ok"]
            await world.owner.call("addS3Bucket", **s3.settings, name="other", prefix="x")
            await world.owner.call("setBucket", channel=CHANNEL, engine="other")
            s3.set(forgetful=True)
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert "--no-create-only" in tried["steps"][2]["advice"]

    run_on("uvloop", scenario())


def test_tests_are_rare(tmp_path: Path, s3: S3Server) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            for _ in range(TRIALS_PER_MINUTE_MAX):
                await world.owner.call("testChannel", channel=CHANNEL)
            with pytest.raises(RateLimited):
                await world.owner.call("testChannel", channel=CHANNEL)

    run_on("uvloop", scenario())
