"""What a channel's owner sees of its bucket, and removes from it; and what is removed because nobody reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import InvalidArgument, InvalidName, NotOnHub, NotPermitted
from kachery_fast.hub import audit
from kachery_fast.protocol.names import object_name

from ..network import LOOPS, run_on
from ..node.support import until
from .support import CHANNEL, OWNER, Clock, World, running_world

DAY = 24 * 3600.0


def name_of(data: bytes, channel: str = CHANNEL) -> str:
    return object_name(channel, hashlib.sha1(data).hexdigest())


async def listed(world: World, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = await world.owner.call("listObjects", channel=CHANNEL, **fields)
    return answer


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_objects_are_listed_page_by_page_with_what_is_known_of_them(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            contents = [b"x" * number for number in range(1, 8)]
            for data in contents:
                assert await world.upload(a, data) == 200
            result = await a.sign_task_result(CHANNEL, "1" * 40, 9)
            async with world.session.put(result.url, data=b"a result.", headers=result.headers) as response:
                assert response.status == 200
            sizes = {name_of(data): len(data) for data in contents}
            pages = [await listed(world, limit=3)]
            while pages[-1]["next"] is not None:
                pages.append(await listed(world, limit=3, after=pages[-1]["next"]))
            assert len(pages) == 3
            page, found = pages[-1], [line for page in pages for line in page["objects"]]
            names = [line["name"] for line in found]
            assert names == sorted([*sizes, f"{CHANNEL}/task_results/11/11/11/{'1' * 40}"])
            for line in found[:-1]:
                assert line["sizeBytes"] == sizes[line["name"]]
                assert abs(line["created"] - world.clock.now * 1000) < 600_000
                assert abs(line["lastRead"] - world.clock.now * 1000) < 600_000
            assert page["stored"] == [{"kind": "feeds", "objects": 0, "sizeBytes": 0},
                                      {"kind": "sha1", "objects": 7, "sizeBytes": 28},
                                      {"kind": "task_results", "objects": 1, "sizeBytes": 9}]
            of_kind = await listed(world, kind="task_results")
            assert [line["sizeBytes"] for line in of_kind["objects"]] == [9]
            assert of_kind["next"] is None

    run_on(loop_kind, scenario())


def test_the_owner_removes_objects_by_name_and_that_is_written_down(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            for data in (b"one", b"three", b"kept"):
                assert await world.upload(a, data) == 200
            names = [name_of(b"one"), name_of(b"three"), name_of(b"never there")]
            answer = await world.owner.call("removeObjects", channel=CHANNEL, names=names)
            assert answer == {"channel": CHANNEL, "removed": 2, "sizeBytes": 8, "missing": names[2:]}
            assert [line["name"] for line in (await listed(world))["objects"]] == [name_of(b"kept")]
            registry = world.registry()
            await registry.open()
            (entry, *_) = await registry.call(audit.entries_of, channel=CHANNEL)
            await registry.close()
            assert (entry.owner, entry.action) == (OWNER, "removeObjects")
            assert names[0] in entry.detail

    run_on("uvloop", scenario())


@pytest.mark.parametrize(("names", "error"), [
    ([f"other/sha1/aa/bb/cc/aabbcc{'0' * 34}"], InvalidArgument), ([f"{CHANNEL}/../other/x"], InvalidName),
    ([f"{CHANNEL}/sha1/../../hub.db"], InvalidName), ([""], InvalidArgument), ([f"{CHANNEL}2/sha1/x"], InvalidArgument),
])
def test_a_name_that_is_no_object_of_the_channel_removes_nothing(
        tmp_path: Path, names: list[str], error: type[Exception]) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            assert await world.upload(a, b"kept") == 200
            with pytest.raises(error):
                await world.owner.call("removeObjects", channel=CHANNEL, names=[name_of(b"kept"), *names])
            assert len((await listed(world))["objects"]) == 1

    run_on("uvloop", scenario())


def test_a_bucket_is_its_owner_s_to_look_into(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            other = await world.person("second@lab.org")
            for kind, fields in (("listObjects", {}), ("removeObjects", {"names": [name_of(b"x")]})):
                with pytest.raises(NotPermitted):
                    await other.call(kind, channel=CHANNEL, **fields)
                with pytest.raises(NotOnHub):
                    await world.owner.call(kind, channel="nowhere", **fields)

    run_on("uvloop", scenario())


# --- expiry


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_what_nobody_has_read_for_as_long_as_the_owner_says_goes(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, expiry_seconds=0.01) as world:
            a = await world.member("a")
            await world.owner.call("createChannel", name="for-ever")
            await a.join(await world.invite(channel="for-ever"), "a")
            (leave,) = await a.sign_uploads("for-ever", [(hashlib.sha1(b"kept").hexdigest(), 4)])
            async with world.session.put(leave.url, data=b"kept", headers=leave.headers) as response:
                assert response.status == 200
            await world.owner.call("changeChannel", channel=CHANNEL, unreadDaysMax=30)
            assert await world.upload(a, b"read") == 200
            assert await world.upload(a, b"unread") == 200
            world.clock.now += 20 * DAY
            assert await world.download(hashlib.sha1(b"read").hexdigest()) == b"read"
            world.clock.now += 11 * DAY
            await until_gone(world, b"unread")
            assert [line["name"] for line in (await listed(world))["objects"]] == [name_of(b"read")]
            there = await world.owner.call("listObjects", channel="for-ever")
            assert [line["name"] for line in there["objects"]] == [name_of(b"kept", "for-ever")]

    run_on(loop_kind, scenario())


async def until_gone(world: World, data: bytes) -> None:
    path = world.settings.hub_dir / "bucket" / name_of(data)
    await until(lambda: not path.exists())


def test_expiry_goes_through_a_channel_page_by_page(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with running_world(tmp_path, clock) as world:
            await world.owner.call("changeChannel", channel=CHANNEL, unreadDaysMax=1)
            for number in range(1201):
                path = world.settings.hub_dir / "bucket" / name_of(b"%d" % number)
                path.parent.mkdir(parents=True)
                path.write_bytes(b"%d" % number)
        clock.now += 2 * DAY
        async with running_world(tmp_path, clock) as world:  # looks at its start
            bucket = world.settings.hub_dir / "bucket"
            await until(lambda: not (bucket / CHANNEL).exists())
            assert (await listed(world))["objects"] == []

    run_on("uvloop", scenario())
