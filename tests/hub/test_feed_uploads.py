"""Leave to upload segments, indexes and results; and what becomes of bad ones."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import BadMessage, InvalidArgument, KacheryError, RateLimited, TooLarge
from kachery_fast.hub.damage import CHECKS_PER_NODE_MAX
from kachery_fast.hub.grants import DAMAGE_REPORTS_PER_CHANNEL_MAX, record_damage
from kachery_fast.hub.uploads import result_size_bytes_max
from kachery_fast.protocol.access import Grant
from kachery_fast.protocol.feed_segments import INDEX_SIZE_BYTES_MAX, SEGMENT_SIZE_BYTES_MAX
from kachery_fast.protocol.hub_bodies import ReportCorrupt, SignedObject
from kachery_fast.protocol.names import (
    object_name,
    result_object_name,
    segment_object_name,
    subfeed_object_name,
)
from kachery_fast.protocol.tasks import result_id, sign_result

from ..network import LOOPS, run_on
from .support import CHANNEL, World, node_id, node_key, running_world

FEED, SUBFEED = "4a" * 32, "0a" * 20
SEGMENT = b'{"body":{}}\n' * 100
SHA1 = hashlib.sha1(SEGMENT).hexdigest()
INDEX = b'{"messageCount":100}'
KWARGS = {"x": 1}
PURE = result_id("pure-calculation", "f", KWARGS)
QUERY = result_id("query", "f", KWARGS)


async def put(world: World, signed: SignedObject, data: bytes) -> int:
    async with world.session.put(signed.url, data=io.BytesIO(data), headers=signed.headers) as response:
        return response.status


async def get(world: World, name: str) -> bytes | None:
    async with world.session.get(f"{world.url}/bucket/{name}") as response:
        return await response.read() if response.status == 200 else None


def damage(world: World, name: str, data: bytes) -> None:
    path = world.settings.hub_dir / "bucket" / name
    path.chmod(0o600)
    path.write_bytes(data)


def result(name: str = "A", kind: str = "pure-calculation", value: Any = 1, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "channel": CHANNEL, "task": PURE if kind == "pure-calculation" else "7a" * 16, "function": "f", "kind": kind,
        "kwargs": KWARGS, "result": {"json": value}, "started_ms": 1, "finished_ms": 2, "key": node_key(name)}
    return sign_result(**{**fields, **changes})


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_segments_are_created_once_and_the_index_is_replaced(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            other = hashlib.sha1(b"other").hexdigest()
            uploads = await client.sign_feed_uploads(
                CHANNEL, FEED, SUBFEED, [(SHA1, len(SEGMENT)), (other, 5)], len(INDEX))
            names = [segment_object_name(CHANNEL, FEED, SUBFEED, SHA1),
                     segment_object_name(CHANNEL, FEED, SUBFEED, other), subfeed_object_name(CHANNEL, FEED, SUBFEED)]
            assert [(item.sha1, item.object) for item in uploads] == list(zip([SHA1, other, ""], names, strict=True))
            assert [await put(world, uploads[0], SEGMENT) for _ in range(2)] == [200, 412]
            for body in (INDEX, INDEX.replace(b"100", b"200")):
                assert await put(world, uploads[2], body) == 200
                assert await get(world, names[2]) == body
            assert await get(world, names[0]) == SEGMENT
            assert await get(world, names[1]) is None
            (alone,) = await client.sign_feed_uploads(CHANNEL, FEED, SUBFEED, [], 3)
            assert alone.object == names[2]
            assert await client.sign_feed_uploads(CHANNEL, FEED, SUBFEED, []) == []

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_result_is_replaced_only_where_that_was_asked_for(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            once = await client.sign_task_result(CHANNEL, PURE, 3)
            assert (once.sha1, once.object) == (PURE, result_object_name(CHANNEL, PURE))
            assert [await put(world, once, body) for body in (b"one", b"two")] == [200, 412]
            again = await client.sign_task_result(CHANNEL, PURE, 3, replace=True)
            assert [await put(world, again, body) for body in (b"two", b"six")] == [200, 200]
            assert await get(world, once.object) == b"six"

    run_on(loop_kind, scenario())


def test_what_was_signed_allows_nothing_else(tmp_path: Path) -> None:
    """One byte more, another object, another kind of object, another channel: refused, and nothing is there."""
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            segment, index = await client.sign_feed_uploads(CHANNEL, FEED, SUBFEED, [(SHA1, 3)], 3)
            result = await client.sign_task_result(CHANNEL, QUERY, 3, replace=True)
            for signed in (segment, index, result):
                assert await put(world, signed, b"abcd") == 413
                assert await put(world, signed, b"ab") == 400
                for wrong in (
                    signed.url.replace("Size=3", "Size=4"), signed.url.replace(f"/{CHANNEL}/", "/other/"),
                    signed.url.replace(signed.object, object_name(CHANNEL, SHA1)),
                    signed.url.replace(signed.object, result_object_name(CHANNEL, PURE)),
                    signed.url.replace(signed.object, segment_object_name(CHANNEL, FEED, SUBFEED, PURE)),
                    signed.url.replace(signed.object, subfeed_object_name(CHANNEL, FEED, PURE)),
                ):
                    assert wrong != signed.url
                    for headers in (segment.headers, index.headers):
                        async with world.session.put(wrong, data=b"abc", headers=headers) as response:
                            assert response.status == 403
                assert await get(world, signed.object) is None
            assert await put(world, segment, b"abc") == 200
            async with world.session.put(segment.url, data=b"xyz", headers=index.headers) as response:
                assert response.status == 403, "a URL that creates does not replace, whatever the headers say"
            assert await get(world, segment.object) == b"abc"

    run_on("asyncio-debug", scenario())


def test_uploads_of_feeds_and_results_are_bounded_in_size_number_and_rate(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, sign_batch_max=3, sign_rate_per_node_max=1) as world:
            client = await world.member("A")
            three = [(hashlib.sha1(bytes([n])).hexdigest(), 5) for n in range(3)]
            with pytest.raises(TooLarge, match="sign_batch_max"):
                await client.sign_feed_uploads(CHANNEL, FEED, SUBFEED, three, 5)
            for objects, index in (([(SHA1, SEGMENT_SIZE_BYTES_MAX + 1)], None), ([], INDEX_SIZE_BYTES_MAX + 1)):
                with pytest.raises(TooLarge):
                    await client.sign_feed_uploads(CHANNEL, FEED, SUBFEED, objects, index)
            longest = result_size_bytes_max(world.settings)
            with pytest.raises(TooLarge, match="task_result_size_bytes_max"):
                await client.sign_task_result(CHANNEL, PURE, longest + 1)
            await client.sign_task_result(CHANNEL, PURE, longest)
            await client.sign_feed_uploads(CHANNEL, FEED, SUBFEED, three)
            await client.sign_feed_uploads(CHANNEL, FEED, SUBFEED, three)
            await client.sign_uploads(CHANNEL, three)
            with pytest.raises(RateLimited):
                await client.sign_task_result(CHANNEL, PURE, 1)

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize(("feed_id", "subfeed", "sha1", "size", "index"), [
    ("", SUBFEED, SHA1, 1, 1), ("../" + FEED, SUBFEED, SHA1, 1, 1), (FEED.upper(), SUBFEED, SHA1, 1, 1),
    (FEED, "", SHA1, 1, 1), (FEED, "x" * 40, SHA1, 1, 1), (FEED, SUBFEED, "subfeed.json", 1, 1),
    (FEED, SUBFEED, SHA1, -1, 1), (FEED, SUBFEED, SHA1, 1, -1),
])
def test_names_that_are_none_are_not_signed(
    tmp_path: Path, feed_id: str, subfeed: str, sha1: str, size: int, index: int
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            with pytest.raises(BadMessage):
                await client.sign_feed_uploads(CHANNEL, feed_id, subfeed, [(sha1, size)], index)
            for result_name in ("", "x" * 40, f"../{PURE}"):
                with pytest.raises(BadMessage):
                    await client.sign_task_result(CHANNEL, result_name, 1)

    run_on("asyncio-debug", scenario())


# --- bad objects


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_damaged_segment_is_removed_and_a_sound_one_is_not(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            (signed,) = await client.sign_feed_uploads(CHANNEL, FEED, SUBFEED, [(SHA1, len(SEGMENT))])
            assert await put(world, signed, SEGMENT) == 200
            named = {"feed_id": FEED, "subfeed": SUBFEED}
            assert not await client.report_corrupt(CHANNEL, SHA1, "0" * 40, **named)
            damage(world, signed.object, b"damaged")
            assert not await client.report_corrupt(CHANNEL, SHA1, ""), "as a file, there is no such object"
            assert await client.report_corrupt(CHANNEL, SHA1, "", **named)
            assert await get(world, signed.object) is None
            assert not await client.report_corrupt(CHANNEL, SHA1, "", **named)
            shown = await world.owner.call("showChannel", channel=CHANNEL)
            assert [item["sha1"] for item in shown["damage"]] == [SHA1]
            for half in ({"feed_id": FEED}, {"subfeed": SUBFEED}):
                with pytest.raises((InvalidArgument, BadMessage)):
                    await client.report_corrupt(CHANNEL, SHA1, "", **half)

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("kind", ["pure-calculation", "query"])
def test_a_good_result_outlives_reports(tmp_path: Path, kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            data, name = result(kind=kind), result_id(kind, "f", KWARGS)
            signed = await client.sign_task_result(CHANNEL, name, len(data))
            assert not await client.report_bad_result(CHANNEL, name), "there is none yet"
            assert await put(world, signed, data) == 200
            assert not await client.report_bad_result(CHANNEL, name)
            assert await get(world, signed.object) == data

    run_on("asyncio-debug", scenario())


BAD: dict[str, Any] = {
    "no result": lambda: b"{}",
    "of another task": lambda: result(kwargs={"x": 2}, task=result_id("pure-calculation", "f", {"x": 2})),
    "of another channel": lambda: result(channel="other"),
    "of a query": lambda: result(kind="query"),
    "changed": lambda: result().replace(b'"json":1', b'"json":2'),
    "by who may not": lambda: result("reader"),
    "by a stranger": lambda: result("stranger"),
    "in another's name": lambda: result("stranger").replace(node_id("stranger").encode(), node_id("A").encode()),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_result_is_removed_when_it_is_reported(tmp_path: Path, case: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            provider = await world.member("A")
            reader = await world.member("reader", granted=["requestTasks"])
            data = BAD[case]()
            signed = await provider.sign_task_result(CHANNEL, PURE, len(data))
            assert await put(world, signed, data) == 200
            assert await reader.report_bad_result(CHANNEL, PURE)
            assert await get(world, signed.object) is None
            assert not await reader.report_bad_result(CHANNEL, PURE)
            shown = await world.owner.call("showChannel", channel=CHANNEL)
            assert [(item["sha1"], item["actual"], item["reportedBy"]) for item in shown["damage"]] == [
                (PURE, hashlib.sha1(data).hexdigest(), node_id("reader"))]
            assert await put(world, await provider.sign_task_result(CHANNEL, PURE, len(result())), result()) == 200

    run_on("asyncio-debug", scenario())


def test_results_of_a_node_that_may_no_longer_provide_tasks_go_when_they_are_met(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            provider, reader = await world.member("A"), await world.member("reader")
            signed = await provider.sign_task_result(CHANNEL, PURE, len(result()))
            assert await put(world, signed, result()) == 200
            assert not await reader.report_bad_result(CHANNEL, PURE)
            await world.owner.call("revoke", channel=CHANNEL, node="A", permissions=["provideTasks"])
            assert await reader.report_bad_result(CHANNEL, PURE)
            assert await get(world, signed.object) is None

    run_on("asyncio-debug", scenario())


def test_a_result_too_long_to_be_one_is_removed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, task_result_size_bytes_max=1000) as world:
            client = await world.member("A")
            signed = await client.sign_task_result(CHANNEL, PURE, 1)
            assert await put(world, signed, b"x") == 200
            damage(world, signed.object, bytes(result_size_bytes_max(world.settings) + 1))
            assert await client.report_bad_result(CHANNEL, PURE)
            assert await get(world, signed.object) is None

    run_on("asyncio-debug", scenario())


def test_a_result_that_replaces_the_reported_one_meanwhile_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client = await world.member("A")
            good = result(kind="query")
            signed = await client.sign_task_result(CHANNEL, QUERY, 3, replace=True)
            assert await put(world, signed, b"bad") == 200
            damages = world.hub._node_api._damage
            judge = damages._why_bad

            async def slow_judge(*arguments: Any) -> str:
                why = await judge(*arguments)
                assert why
                again = await client.sign_task_result(CHANNEL, QUERY, len(good), replace=True)
                assert await put(world, again, good) == 200
                return why

            damages._why_bad = slow_judge  # type: ignore[assignment, method-assign]
            assert not await client.report_bad_result(CHANNEL, QUERY)
            assert await get(world, signed.object) == good

    run_on("asyncio-debug", scenario())


def test_reports_of_one_node_are_judged_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            client, other = await world.member("A"), await world.member("B")
            signed = await client.sign_task_result(CHANNEL, PURE, len(result()))
            assert await put(world, signed, result()) == 200
            damages = world.hub._node_api._damage
            bucket = world.hub._node_api._buckets.own
            read, judged = bucket.read, threading.Event()

            def slow_read(*arguments: Any) -> tuple[bytes, str]:
                assert judged.wait(60)
                return read(*arguments)

            monkeypatch.setattr(bucket, "read", slow_read)
            waiting = [asyncio.ensure_future(client.report_bad_result(CHANNEL, PURE))
                       for _ in range(CHECKS_PER_NODE_MAX)]
            while damages._checking[node_id("A")] < CHECKS_PER_NODE_MAX:
                await asyncio.sleep(0.001)
            for request in (client.report_bad_result(CHANNEL, PURE), client.report_corrupt(CHANNEL, SHA1, "")):
                with pytest.raises(RateLimited):
                    await request
            others = asyncio.ensure_future(other.report_bad_result(CHANNEL, PURE))
            judged.set()
            assert not any(await asyncio.gather(*waiting, others))
            assert not await client.report_bad_result(CHANNEL, PURE), "the count went down again"

    run_on("asyncio-debug", scenario())


def test_reports_of_damage_do_not_fill_the_registry(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            grant = Grant(node_id("A"), "", CHANNEL, frozenset(), frozenset())

            def record(connection: Any) -> int:
                for number in range(DAMAGE_REPORTS_PER_CHANNEL_MAX + 5):
                    record_damage(connection, grant, f"{number:040x}", "", None, number)
                return int(connection.exec_driver_sql("SELECT count(*) FROM damage_reports").scalar())

            assert await world.hub._registry.call(record) == DAMAGE_REPORTS_PER_CHANNEL_MAX
            shown = await world.owner.call("showChannel", channel=CHANNEL)
            assert shown["damage"][0]["sha1"] == f"{DAMAGE_REPORTS_PER_CHANNEL_MAX + 4:040x}"

    run_on("asyncio-debug", scenario())


def test_a_report_by_a_member_is_told_apart_by_what_it_reports(tmp_path: Path) -> None:
    """Half a name of a segment is no report of a file: it must not pass the gate of the other permission."""
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            reader = await world.member("reader", granted=["requestFiles"])
            for fields in ({"feed_id": FEED}, {"subfeed": SUBFEED}, {"feed_id": FEED, "subfeed": SUBFEED}):
                with pytest.raises(KacheryError, match="damaged segment"):
                    await reader._call(ReportCorrupt, dict, channel=CHANNEL, sha1=SHA1, found="", **fields)

    run_on("asyncio-debug", scenario())
