"""Channels that move to another bucket with what is in it, while they are used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

from kachery_fast.errors import AlreadyExists, InvalidArgument, NotOnHub, NotPermitted
from kachery_fast.hub import bucket_moves

from ..network import LOOPS, run_on
from ..store_server import BUCKET, StoreServer
from .support import CHANNEL, Clock, World, sha1_of, world_on

CONTENTS = [b"chunk %d" % number for number in range(9)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bucket refuses is tried again soon."""
    monkeypatch.setattr(bucket_moves, "RETRY_SECONDS_MAX", 0.05)


async def until(world: World, *states: str, why: str = "") -> dict[str, Any]:
    """Wait until a move has come so far, and return what is said of it."""
    async def look() -> dict[str, Any]:
        while True:
            found: dict[str, Any] = await world.owner.call("bucketMove", channel=CHANNEL)
            if found["state"] in states and why in found["why"]:
                return found
            await asyncio.sleep(0.01)

    return await asyncio.wait_for(look(), 60)


async def names(world: World) -> set[str]:
    listed = await world.owner.call("listObjects", channel=CHANNEL)
    return {line["name"].rpartition("/")[2] for line in listed["objects"]}


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_what_is_in_a_bucket_comes_along_and_what_is_damaged_stays(
    tmp_path: Path, s3: StoreServer, loop_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_moves, "PAGE", 4)

    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            await world.owner.call("addS3Bucket", name="mine", **s3.settings)
            a = await world.member("a")
            for data in CONTENTS:
                assert await world.upload(a, data) == 200
            assert await world.upload(a, b"not what it is called", "f" * 40) == 200
            result = await a.sign_task_result(CHANNEL, "e" * 40, 6)
            async with world.session.put(result.url, data=b"result", headers=result.headers) as answer:
                assert answer.status == 200
            begun = await world.owner.call("migrateBucket", channel=CHANNEL, engine="mine")
            assert (begun["source"], begun["target"], begun["state"]) == (None, "mine", "copying")
            done = await until(world, "done")
            sizes = [*map(len, CONTENTS), 6]
            assert (done["objects"], done["sizeBytes"], done["damaged"], done["why"]) == (10, sum(sizes), 1, "")
            assert (await a.node_config()).channels[0].bucket_url.startswith(s3.url)
            assert await names(world) == {*map(sha1_of, CONTENTS), "e" * 40}
            assert await world.upload(a, CONTENTS[0]) == 412, "it is there"

            assert await world.upload(a, b"made there") == 200
            await world.owner.call("migrateBucket", channel=CHANNEL)
            back = await until(world, "done")
            assert (back["source"], back["target"], back["objects"]) == ("mine", None, 1)
            assert await world.download(sha1_of(b"made there")) == b"made there"

    run_on(loop_kind, scenario())


def test_a_move_outlives_the_hub(tmp_path: Path, s3: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_moves, "PAGE", 1)

    async def first() -> int:
        async with world_on(tmp_path, s3) as world:
            await world.owner.call("addS3Bucket", name="mine", **s3.settings)
            a = await world.member("a")
            for data in CONTENTS:
                assert await world.upload(a, data) == 200
            await world.owner.call("migrateBucket", channel=CHANNEL, engine="mine")
            while True:
                found = await world.owner.call("bucketMove", channel=CHANNEL)
                if found["objects"]:
                    return int(found["objects"])

    async def then() -> None:
        async with world_on(tmp_path, s3) as world:
            done = await until(world, "done")
            # A page that was under way is copied, and not counted.
            assert len(CONTENTS) - 1 <= done["objects"] <= len(CONTENTS)
            assert await names(world) == {*map(sha1_of, CONTENTS)}

    assert 0 < run_on("uvloop", first()) < len(CONTENTS)
    run_on("uvloop", then())


@asynccontextmanager
async def held_up(tmp_path: Path, s3: StoreServer, **fields: Any) -> AsyncIterator[World]:
    """A hub whose channel, with one object, is to move to a bucket that refuses it so far."""
    async with world_on(tmp_path, s3) as world:
        await world.owner.call("addS3Bucket", name="mine", **s3.settings, **fields)
        assert await world.upload(await world.member("a"), b"x") == 200
        s3.deny("upload")
        await world.owner.call("migrateBucket", channel=CHANNEL, engine="mine")
        held = await until(world, "copying", why="AccessDenied")
        assert held["objects"] == 0
        yield world


def test_a_bucket_that_refuses_is_named_and_tried_again(tmp_path: Path, s3: StoreServer, impatient: None) -> None:
    async def scenario() -> None:
        async with held_up(tmp_path, s3) as world:
            assert await world.download(sha1_of(b"x")) == b"x"
            s3.deny()
            done = await until(world, "done")
            assert (done["objects"], done["why"]) == (1, "")

    run_on("uvloop", scenario())


def test_a_move_is_stopped_and_another_choice_of_the_owner_holds(
    tmp_path: Path, s3: StoreServer, impatient: None
) -> None:
    async def scenario() -> None:
        async with held_up(tmp_path, s3) as world:
            await world.owner.call("addS3Bucket", **{**s3.settings, "name": "second", "prefix": "second"})
            with pytest.raises(AlreadyExists, match="--status"):
                await world.owner.call("migrateBucket", channel=CHANNEL, engine="second")
            stopped = await world.owner.call("stopMove", channel=CHANNEL)
            assert (stopped["state"], "has stopped it" in stopped["why"]) == ("stopped", True)

            await world.owner.call("migrateBucket", channel=CHANNEL, engine="mine")
            await until(world, "copying", why="AccessDenied")
            await world.owner.call("setBucket", channel=CHANNEL)  # which it has
            assert (await world.owner.call("bucketMove", channel=CHANNEL))["state"] == "copying"
            await world.owner.call("setBucket", channel=CHANNEL, engine="second")
            ended = await world.owner.call("bucketMove", channel=CHANNEL)
            assert (ended["state"], "another bucket meanwhile" in ended["why"]) == ("stopped", True)
            s3.deny()
            assert "/second" in (await world.node("a").node_config()).channels[0].bucket_url

            await world.owner.call("migrateBucket", channel=CHANNEL, engine="mine")
            s3.remove_bucket()
            await until(world, "copying", why="NoSuchBucket")
            await world.owner.call("removeEngine", engine="mine")
            assert "forget" in (await until(world, "stopped"))["why"]

    run_on("uvloop", scenario())


def test_a_channel_that_became_private_on_the_way_stays(tmp_path: Path, s3: StoreServer, impatient: None) -> None:
    async def scenario() -> None:
        async with held_up(tmp_path, s3, publicReads=True) as world:
            await world.owner.call("changeChannel", channel=CHANNEL, private=True)
            assert "everybody may read" in (await until(world, "stopped"))["why"], "before anything is copied there"
            s3.deny()
            assert (await world.node("a").node_config()).channels[0].bucket_url.startswith(world.url)

    run_on("uvloop", scenario())


def test_what_others_keep_there_and_what_the_hub_trips_over_hold_up_nobody_else(
    tmp_path: Path, s3: StoreServer, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = bucket_moves.Mover._copy

    def trip(mover: Any, state: str, found: Any, *buckets: Any) -> Any:
        if found.name.startswith("second/"):
            raise ZeroDivisionError
        return copy(mover, state, found, *buckets)

    monkeypatch.setattr(bucket_moves.Mover, "_copy", trip)

    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            await world.owner.call("addS3Bucket", name="mine", **s3.settings)
            a = await world.member("a")
            await world.owner.call("createChannel", name="second")
            await a.join(await world.invite(channel="second"), "a")
            (signed,) = await a.sign_uploads("second", [(sha1_of(b"x"), 1)])
            async with world.session.put(signed.url, data=b"x", headers=signed.headers) as answer:
                assert answer.status == 200
            await world.owner.call("migrateBucket", channel="second", engine="mine")
            await world.owner.call("setBucket", channel=CHANNEL, engine="mine")
            assert await world.upload(a, b"x") == 200
            put_object(s3, f"{CHANNEL}/", b"")
            put_object(s3, f"{CHANNEL}/README", b"mine, not the channel's")
            await world.owner.call("migrateBucket", channel=CHANNEL)
            assert (await until(world, "done"))["objects"] == 1
            held = await world.owner.call("bucketMove", channel="second")
            assert (held["state"], "error of its own" in held["why"]) == ("copying", True)

    run_on("uvloop", scenario())


def put_object(s3: StoreServer, key: str, data: bytes) -> None:
    """As somebody does who uses the bucket for other things, too."""
    keys = s3.credentials
    boto3.client("s3", endpoint_url=s3.url, region_name=s3.place["region"], aws_access_key_id=keys["accessKey"],
                 aws_secret_access_key=keys["secretKey"]).put_object(Bucket=BUCKET, Key=key, Body=data)


def test_nothing_of_a_deleted_channel_is_left_for_the_next_of_its_name(
    tmp_path: Path, s3: StoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_moves, "PAGE", 1)

    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            await world.owner.call("addS3Bucket", name="mine", **s3.settings)
            await world.owner.call("addS3Bucket", **{**s3.settings, "name": "second", "prefix": "second"})
            a = await world.member("a")
            for data in CONTENTS:
                assert await world.upload(a, data) == 200
            await world.owner.call("migrateBucket", channel=CHANNEL, engine="mine")
            await until(world, "done")  # the hub's own still has it, and the next bucket some of it
            await world.owner.call("migrateBucket", channel=CHANNEL, engine="second")
            while not (await world.owner.call("bucketMove", channel=CHANNEL))["objects"]:
                pass
            await world.owner.call("deleteChannel", channel=CHANNEL)
            await world.owner.call("createChannel", name="other")
            await world.owner.call("migrateBucket", channel="other", engine="mine")
            while (await world.owner.call("bucketMove", channel="other"))["state"] != "done":
                await asyncio.sleep(0.01)  # and what was under way is over
            other = await world.person("other@example.org")
            await other.call("createChannel", name=CHANNEL)
            assert (await other.call("listObjects", channel=CHANNEL))["objects"] == []
            await other.call("deleteChannel", channel=CHANNEL)
            await world.owner.call("createChannel", name=CHANNEL)
            for engine in ("mine", "second"):
                await world.owner.call("setBucket", channel=CHANNEL, engine=engine)
                assert await names(world) == set()

    run_on("uvloop", scenario())


def test_what_is_left_in_the_hub_s_own_bucket_goes_when_nobody_reads_it(tmp_path: Path, s3: StoreServer) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with world_on(tmp_path, s3, clock, expiry_seconds=0.01) as world:
            await world.owner.call("addS3Bucket", name="mine", **s3.settings)
            assert await world.upload(await world.member("a"), b"x") == 200
            await world.owner.call("migrateBucket", channel=CHANNEL, engine="mine")
            await until(world, "done")
            await world.owner.call("changeChannel", channel=CHANNEL, unreadDaysMax=30)
            clock.now += 31 * 24 * 3600
            while (world.settings.hub_dir / "bucket" / CHANNEL).exists():
                await asyncio.sleep(0.01)
            s3.set(offset=31 * 24 * 3600)
            assert await names(world) == {sha1_of(b"x")}

    run_on("uvloop", scenario())


def test_what_cannot_be_moved_is_refused_at_once(tmp_path: Path, s3: StoreServer) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, s3) as world:
            with pytest.raises(NotOnHub, match="move of the channel"):
                await world.owner.call("bucketMove", channel=CHANNEL)
            with pytest.raises(InvalidArgument, match="has that bucket already"):
                await world.owner.call("migrateBucket", channel=CHANNEL)
            with pytest.raises(NotOnHub):
                await world.owner.call("migrateBucket", channel=CHANNEL, engine="nobody's")
            await world.owner.call("addS3Bucket", **{**s3.settings, "name": "open"}, publicReads=True)
            await world.owner.call("changeChannel", channel=CHANNEL, private=True)
            with pytest.raises(InvalidArgument, match="everybody may read"):
                await world.owner.call("migrateBucket", channel=CHANNEL, engine="open")
            assert (await world.owner.call("showChannel", channel=CHANNEL))["private"]
            other = await world.person("other@example.org")
            for action in ("migrateBucket", "bucketMove", "stopMove"):
                with pytest.raises((NotPermitted, NotOnHub)):
                    await other.call(action, channel=CHANNEL)

    run_on("uvloop", scenario())
