"""How much a channel may hold and a node may upload in a day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import NotPermitted, QuotaExceeded
from kachery_fast.hub.quotas import RECENT_SECONDS, Promises
from kachery_fast.net.hub import HubClient

from ..network import LOOPS, run_on
from .support import CHANNEL, Clock, World, running_world, sha1_of

DAY = 24 * 3600.0


def content(number: int, size: int = 100) -> bytes:
    return (b"%d " % number).ljust(size, b".")


async def limit(world: World, **limits: int | None) -> None:
    await world.owner.call("changeChannel", channel=CHANNEL, **limits)


async def ask(client: HubClient, *data: bytes) -> int:
    """Ask for URLs and use none; return how many there were."""
    return len(await client.sign_uploads(CHANNEL, [(sha1_of(one), len(one)) for one in data]))


async def stored(world: World) -> int:
    answer = await world.owner.call("showUsage", channel=CHANNEL)
    return sum(kind["sizeBytes"] for kind in answer["stored"])


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_what_would_take_a_channel_over_its_quota_is_refused(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            await limit(world, sizeBytesMax=350)
            for number in range(3):
                assert await world.upload(a, content(number)) == 200
            with pytest.raises(QuotaExceeded) as refused:
                await world.upload(a, content(3))
            for part in ("'lab'", "350 bytes", "300 are stored", "100 more", "channel set lab",
                         "channel objects lab"):
                assert part in refused.value.message
            assert await world.upload(a, content(4, 50)) == 200  # what fits goes in
            assert await world.upload(a, content(0)) == 412  # and what is there takes no room
            await limit(world, sizeBytesMax=450)
            assert await world.upload(a, content(3)) == 200
            assert await stored(world) == 450

    run_on(loop_kind, scenario())


def test_urls_that_may_still_be_used_count_until_they_expire(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a, b = await world.member("a"), await world.member("b")
            await limit(world, sizeBytesMax=300)
            assert await ask(a, content(0), content(1)) == 2
            assert await ask(b, content(0), content(1)) == 2  # the same two again
            with pytest.raises(QuotaExceeded):
                await ask(b, content(2), content(3))
            assert await world.upload(b, content(0)) == 200
            assert await ask(b, content(2)) == 1  # what has arrived is not counted twice
            with pytest.raises(QuotaExceeded):
                await ask(b, content(3))
            world.clock.now += world.settings.url_life_seconds + 1
            assert await ask(b, content(3), content(4)) == 2

    run_on("uvloop", scenario())


def test_a_quota_holds_for_its_channel_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            await world.owner.call("createChannel", name="other")
            await a.join(await world.invite(channel="other"), "a")
            await limit(world, sizeBytesMax=10)
            with pytest.raises(QuotaExceeded):
                await ask(a, content(0))
            assert len(await a.sign_uploads("other", [(sha1_of(content(0)), 100)])) == 1

    run_on("uvloop", scenario())


def test_feeds_and_results_count_too_and_replacing_counts_the_difference(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            await limit(world, sizeBytesMax=250)
            result = "1" * 40

            async def put(size: int) -> int:
                signed = await a.sign_task_result(CHANNEL, result, size, replace=True)
                async with world.session.put(signed.url, data=b"x" * size, headers=signed.headers) as response:
                    return response.status

            assert await put(150) == 200
            assert await put(250) == 200
            with pytest.raises(QuotaExceeded):
                await put(251)
            with pytest.raises(QuotaExceeded):
                await a.sign_feed_uploads(CHANNEL, "a" * 64, "b" * 40, [("c" * 40, 1)], 10)
            assert await put(100) == 200
            assert len(await a.sign_feed_uploads(CHANNEL, "a" * 64, "b" * 40, [("c" * 40, 1)], 10)) == 2

    run_on("uvloop", scenario())


def test_what_is_unread_for_longest_makes_room_where_the_owner_lets_objects_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            await limit(world, sizeBytesMax=400)
            for number in range(4):
                assert await world.upload(a, content(number)) == 200
                world.clock.now += RECENT_SECONDS
            world.clock.now += RECENT_SECONDS
            assert await world.download(sha1_of(content(0))) is not None
            with pytest.raises(QuotaExceeded) as refused:
                await world.upload(a, content(4))
            assert "do not expire" in refused.value.message
            await limit(world, unreadDaysMax=30)
            assert await world.upload(a, content(4)) == 200
            there = [await world.download(sha1_of(content(number))) is not None for number in range(5)]
            assert there == [True, False, False, True, True]  # one more than was needed went, so that it lasts

    run_on("uvloop", scenario())


def test_what_was_used_lately_makes_no_room(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            await limit(world, sizeBytesMax=100, unreadDaysMax=1)
            assert await world.upload(a, content(0)) == 200
            for _ in range(2):
                with pytest.raises(QuotaExceeded) as refused:
                    await world.upload(a, content(1))
                assert "used lately" in refused.value.message
            assert await world.download(sha1_of(content(0))) is not None

    run_on("uvloop", scenario())


def test_a_node_may_upload_so_much_a_day(tmp_path: Path) -> None:
    async def scenario() -> None:
        clock = Clock()
        clock.now -= clock.now % DAY - 3600
        async with running_world(tmp_path, clock) as world:
            a, b = await world.member("a"), await world.member("b")
            await limit(world, nodeDayBytesMax=250)
            assert await world.upload(a, content(0)) == 200
            assert await ask(a, content(1)) == 1
            with pytest.raises(QuotaExceeded) as refused:
                await ask(a, content(2))
            for part in ("today", "250 bytes", "200 are stored or on their way", "00:00 UTC", "channel set lab"):
                assert part in refused.value.message
            assert await world.upload(a, content(1)) == 200
            assert await world.upload(a, content(0)) == 412  # what is there is nothing that it brings
            assert await world.upload(b, content(2)) == 200  # each node has its own
            await world.owner.call("showUsage", channel=CHANNEL)  # writes what was counted
            with pytest.raises(QuotaExceeded):
                await ask(a, content(3))
            clock.now += DAY
            assert await world.upload(a, content(3)) == 200

    run_on("uvloop", scenario())


def test_a_quota_is_no_way_round_a_permission_that_was_taken_away_meanwhile(tmp_path: Path) -> None:
    """The hub looks at the bucket between two readings of the grant; the second one counts."""
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            await limit(world, sizeBytesMax=100)
            assert await world.upload(a, content(0)) == 200
            quotas: Any = world.hub._node_api._quotas
            make_room = quotas.make_room

            async def revoked_meanwhile(*args: Any) -> None:
                await world.owner.call("revoke", channel=CHANNEL, node="a", permissions=["all"])
                await make_room(*args)

            quotas.make_room = revoked_meanwhile
            with pytest.raises(NotPermitted) as refused:
                await world.upload(a, content(1))
            assert not isinstance(refused.value, QuotaExceeded)

    run_on("uvloop", scenario())


def test_promises_are_kept_once_for_each_object() -> None:
    clock = Clock()
    promises = Promises(300, clock)
    promises.add("a", {"ch/x": 10, "ch/y": 20, "other/x": 5})
    clock.now += 200
    promises.add("b", {"ch/x": 12})
    assert (promises.bytes("ch"), promises.bytes("ch", "a"), promises.bytes("ch", "b")) == (32, 20, 12)
    assert promises.new_bytes({"ch/x": 15, "ch/y": 1, "ch/z": 7}) == 10
    clock.now += 100
    assert (promises.bytes("ch"), promises.bytes("other")) == (12, 0)
    promises.release("ch/x")
    promises.release("ch/x")
    assert promises.bytes("ch") == promises.bytes("ch", "b") == 0
