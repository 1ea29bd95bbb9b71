"""Feeds through the node's local API, between whole nodes over the real hub, broker and bucket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.net.hub import HubClient
from kachery_fast.protocol.feeds import Tail, extend
from kachery_fast.protocol.names import subfeed_hash, subfeed_object_name
from tests.hub.support import CHANNEL, World, running_world
from tests.network import LOOPS, run_on
from tests.node.running import Client, alone, enrolled, running_node, together
from tests.node.support import ALL, until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
FEEDS: dict[str, Any] = {"feed_relay_wait_seconds": 0.1, "feed_renew_seconds": 1.0}
NOBODY = "ab" * 32
EACH = {"create": {"name": 5}, "find": {}, "list": {"x": 1}, "info": {"feedId": 5}, "delete": {},
        "append": {"feedId": NOBODY, "subfeed": "s", "messages": {}}, "read": {"feedId": NOBODY},
        "watch": {"watches": []}, "forks": {"feedId": NOBODY, "subfeed": 3}}


async def ask(client: Client, what: str, **body: Any) -> Any:
    status, answer = await client.ask("POST", f"/api/feed/{what}", body)
    assert status == 200, answer
    return answer


async def refused(client: Client, what: str, **body: Any) -> tuple[int, str, str]:
    status, answer = await client.ask("POST", f"/api/feed/{what}", body)
    assert status != 200, answer
    return status, answer["error"], answer["message"]


async def append(client: Client, feed_id: str, count: int, first: int = 0, size: int = 10) -> None:
    await ask(client, "append", feedId=feed_id, subfeed="main",
              messages=[{"i": first + number, "text": "x" * size} for number in range(count)])


async def read_to(client: Client, feed_id: str, end: int, position: int = 0, wait_msec: int = 20_000) -> list[Any]:
    found: list[Any] = []
    while position < end:
        answer = await ask(client, "read", feedId=feed_id, subfeed="main", position=position, waitMsec=wait_msec)
        assert answer["messages"], answer
        assert answer["position"] == position + len(answer["messages"])
        found += answer["messages"]
        position = answer["position"]
    assert [message["i"] for message in found] == list(range(end - len(found), end))
    return found


async def shared(a: Client, b: Client, count: int = 5) -> str:
    """Make a feed on a whose messages b has read, and follows; return its id."""
    feed_id: str = (await ask(a, "create"))["feedId"]
    await append(a, feed_id, count)
    await read_to(b, feed_id, count)
    return feed_id


# --- a node by itself


def test_a_feed_is_made_found_listed_and_deleted(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        made = await ask(client, "create", name="log")
        feed_id = made["feedId"]
        assert made == {"feedId": feed_id, "name": "log", "created": True}
        assert await ask(client, "create", name="log") == {"feedId": feed_id, "name": "log", "created": False}
        assert await ask(client, "find", name="log") == {"feedId": feed_id}
        other = (await ask(client, "create"))["feedId"]
        assert other != feed_id
        assert await ask(client, "append", feedId=feed_id, subfeed={"b": 1, "a": 2}, messages=[{"x": 1}]) == {
            "first": 0, "end": 1}
        described = {"feedId": feed_id, "name": "log", "writable": True, "subfeeds": [
            {"subfeed": subfeed_hash({"a": 2, "b": 1}), "name": {"a": 2, "b": 1}, "count": 1, "forkedAt": None}]}
        assert await ask(client, "info", feedId=feed_id) == described
        listed = (await ask(client, "list"))["feeds"]
        assert [feed["feedId"] for feed in listed] == [feed_id, other]
        assert listed[0] == described
        assert await ask(client, "delete", feedId=feed_id) == {"deleted": True}
        for what in ("info", "delete"):
            assert (await refused(client, what, feedId=feed_id))[:2] == (404, "FeedUnknown")
        assert (await refused(client, "find", name="log"))[:2] == (404, "FeedUnknown")
        assert (await refused(client, "append", feedId=feed_id, subfeed="x", messages=[{}]))[:2] == (404, "FeedUnknown")
    alone(loop_kind, tmp_path, work)


def test_what_was_appended_is_read_by_position_number_and_signature(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        feed_id = (await ask(client, "create"))["feedId"]
        messages = [{"i": 0}, {"é": [1.5, None, True, "\u2028"]}, {}, {"deep": {"~": "😀"}}]
        assert await ask(client, "append", feedId=feed_id, subfeed="main", messages=messages[:2]) == {
            "first": 0, "end": 2}
        assert await ask(client, "append", feedId=feed_id, subfeed="main", messages=messages[2:]) == {
            "first": 2, "end": 4}
        place = {"feedId": feed_id, "subfeed": "main"}
        assert await ask(client, "read", **place) == {
            "messages": messages, "position": 4, "count": 4, "why": "", "known": True}
        assert (await ask(client, "read", **place, position=1, maxMessages=2))["messages"] == messages[1:3]
        assert await ask(client, "read", **place, position=4) == {
            "messages": [], "position": 4, "count": 4, "why": "", "known": True}
        by_hash = {**place, "subfeed": "~" + subfeed_hash("main")}
        signed = (await ask(client, "read", **by_hash, signed=True))["messages"]
        found = extend(Tail(feed_id, subfeed_hash("main")), 0, signed, lambda number: None)
        assert len(found.new) == 4  # type: ignore[union-attr]
    alone(loop_kind, tmp_path, work)


def test_a_reader_waits_for_the_next_message_and_no_longer_than_it_said(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        feed_id = (await ask(client, "create"))["feedId"]
        reading = asyncio.ensure_future(read_to(client, feed_id, 1))
        watching = asyncio.ensure_future(ask(client, "watch", waitMsec=20_000, watches={
            name: {"feedId": feed_id, "subfeed": name} for name in ("main", "other")}))
        await asyncio.sleep(0.1)
        await append(client, feed_id, 1)
        await reading
        assert await watching == {"messages": {"main": [{"i": 0, "text": "x" * 10}]}}
        assert (await ask(client, "read", feedId=feed_id, subfeed="main", position=1, waitMsec=100))["messages"] == []
        assert await ask(client, "watch", watches={}) == {"messages": {}}
    alone(loop_kind, tmp_path, work)


def test_a_reader_that_hangs_up_leaves_nothing(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        feed_id = (await ask(client, "create"))["feedId"]
        reading = asyncio.ensure_future(read_to(client, feed_id, 1))
        await until(lambda: client.node.feeds._readers)
        reading.cancel()
        await until(lambda: not client.node.feeds._readers and client.node.feeds._waiting == 0)
    alone(loop_kind, tmp_path, work)


def test_a_long_subfeed_is_read_in_pieces(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        feed_id = (await ask(client, "create"))["feedId"]
        await append(client, feed_id, 30, size=300_000)
        answer = await ask(client, "read", feedId=feed_id, subfeed="main")
        assert 10 < len(answer["messages"]) < 16
        await read_to(client, feed_id, 30)
        watches = {str(start): {"feedId": feed_id, "subfeed": "main", "position": start} for start in (0, 20, 29)}
        found = (await ask(client, "watch", watches=watches))["messages"]
        assert len(json.dumps(found)) < 5_000_000
        assert found
    alone(loop_kind, tmp_path, work)


@pytest.mark.parametrize("what", sorted(EACH))
def test_bodies_that_are_not_as_documented_are_refused(what: str, loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        for body in (b"{", b"[]", b"\xff", json.dumps(EACH[what]).encode()):
            status, answer = await client.ask("POST", f"/api/feed/{what}", body)
            assert (status, answer["error"]) == (400, "BadMessage"), (body, answer)
    alone(loop_kind, tmp_path, work)


def test_what_cannot_be_appended_is_refused_and_changes_nothing(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        feed_id = (await ask(client, "create"))["feedId"]
        place = {"feedId": feed_id, "subfeed": "main"}
        await append(client, feed_id, 1)
        assert (await refused(client, "append", **place, messages=[{"i": 1}, {"text": "x" * 3000}]))[:2] == (
            413, "TooLarge")
        assert (await refused(client, "append", **place, messages=[{"i": 2**60}]))[0] == 400
        assert (await refused(client, "append", **{**place, "subfeed": "~x"}, messages=[{}]))[:2] == (
            400, "InvalidName")
        assert (await refused(client, "append", **{**place, "feedId": "x"}, messages=[{}]))[:2] == (400, "InvalidName")
        assert (await refused(client, "append", **{**place, "feedId": NOBODY}, messages=[{}]))[:2] == (
            404, "FeedUnknown")
        status, error, text = await refused(client, "append", **place, messages=[{"x": "y" * 1000}] * 70)
        assert (status, error) == (413, "TooLarge")
        assert "feed_batch_size_bytes_max" in text
        chunks = [b'{"feedId": "', b" " * 70_000]

        async def in_chunks() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        async with client.session.post(f"{client.url}/api/feed/append", data=in_chunks(),
                                       headers=client.headers()) as answer:
            assert answer.status == 413
            assert "feed_batch_size_bytes_max" in await answer.text()
        assert (await ask(client, "read", **place))["count"] == 1
    alone(loop_kind, tmp_path, work, feed_message_size_bytes_max=2048, feed_batch_size_bytes_max=64_000)


def test_a_batch_of_too_many_messages_is_refused_whole(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        place = {"feedId": (await ask(client, "create"))["feedId"], "subfeed": "main"}
        status, error, text = await refused(client, "append", **place, messages=[{}] * 100_001)
        assert (status, error) == (400, "InvalidArgument")
        assert "100000" in text
        assert (await ask(client, "read", **place))["count"] == 0
    alone(loop_kind, tmp_path, work)


def test_a_batch_may_be_longer_than_other_bodies(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        feed_id = (await ask(client, "create"))["feedId"]
        await append(client, feed_id, 100, size=1000)
        assert (await ask(client, "read", feedId=feed_id, subfeed="main"))["count"] == 100
    alone(loop_kind, tmp_path, work, api_body_size_bytes_max=20_000)


def test_a_feed_of_others_needs_a_channel(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        place = {"feedId": NOBODY, "subfeed": "main", "waitMsec": 20_000}
        assert (await refused(client, "read", **place))[:2] == (404, "NoChannel")
        assert (await refused(client, "read", **place, channel="lab"))[:2] == (404, "ChannelUnknown")
        watches = {"w": {"feedId": NOBODY, "subfeed": "main", "channel": "lab"}}
        assert (await refused(client, "watch", watches=watches))[:2] == (404, "ChannelUnknown")
        many = {str(number): watches["w"] for number in range(1001)}
        assert (await refused(client, "watch", watches=many))[:2] == (400, "InvalidArgument")
        assert await ask(client, "forks", feedId=NOBODY, subfeed="main") == {"forks": []}
    alone(loop_kind, tmp_path, work)


# --- over the real hub, broker and bucket


def test_ten_thousand_messages_reach_a_new_reader(loop_kind: str, tmp_path: Path) -> None:
    count = 2_000 if loop_kind == "asyncio-debug" else 10_000  # in debug mode the same takes long

    async def work(world: World, a: Client, b: Client) -> None:
        feed_id = (await ask(a, "create", name="f"))["feedId"]
        for first in range(0, count, 1000):
            await append(a, feed_id, 1000, first, 100)
        await read_to(b, feed_id, count)
        traffic = (await a.ask("GET", "/api/info"))[1]["traffic"]
        assert traffic["uploaded_objects"] < 8
        assert (await ask(b, "info", feedId=feed_id))["writable"] is False
    together(loop_kind, tmp_path, work, **FEEDS)


def test_messages_are_followed_live_long_ones_too(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        feed_id = await shared(a, b, 1)
        for number in range(1, 6):
            reading = asyncio.ensure_future(read_to(b, feed_id, number + 1, number))
            await asyncio.sleep(0.02)
            await append(a, feed_id, 1, number)
            await reading
        reading = asyncio.ensure_future(read_to(b, feed_id, 106, 6))
        await append(a, feed_id, 100, 6, 1500)
        await reading
        assert (await refused(b, "append", feedId=feed_id, subfeed="main", messages=[{}]))[:2] == (
            403, "FeedNotWritable")
    together(loop_kind, tmp_path, work, **{**FEEDS, "feed_renew_seconds": 20.0})


def test_a_feed_is_read_with_nobody_alive(loop_kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with running_world(tmp_path) as world:
            of_a, of_b, of_c = await enrolled(world, tmp_path, dict.fromkeys("abc"), **FEEDS)
            async with running_node(of_a) as a:
                feed_id = (await ask(a, "create"))["feedId"]
                await append(a, feed_id, 50)
                async with running_node(of_b) as b:
                    await read_to(b, feed_id, 50)
                index = (tmp_path / "hub" / "bucket").joinpath(
                    subfeed_object_name(CHANNEL, feed_id, subfeed_hash("main")))
                await until(lambda: list((tmp_path / "hub").rglob("subfeed.json")), 10)
                assert index.name == "subfeed.json"
            async with running_node(of_c) as c:
                await read_to(c, feed_id, 50)
                answer = await ask(c, "read", feedId=feed_id, subfeed="main", position=50, waitMsec=500)
                assert (answer["messages"], answer["count"], answer["known"]) == ([], 50, True)
                assert "has an index of 50 messages" in answer["why"]
    run_on(loop_kind, run(), 100)


def test_a_relay_serves_while_the_owner_is_away(loop_kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with running_world(tmp_path) as world:
            of_a, of_b, of_c = await enrolled(world, tmp_path, dict.fromkeys("abc"), **FEEDS)
            async with running_node(of_b) as b:
                async with running_node(of_a) as a:
                    feed_id = (await ask(a, "create"))["feedId"]
                    await append(a, feed_id, 5)
                    await read_to(b, feed_id, 5)
                    await append(a, feed_id, 3, 5)  # these the bucket has not
                    await read_to(b, feed_id, 8, 5)
                async with running_node(of_c) as c:
                    await read_to(c, feed_id, 8)
    run_on(loop_kind, run(), 100)


def test_a_node_needs_the_permission_to_read(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        feed_id = (await ask(a, "create"))["feedId"]
        await append(a, feed_id, 5)
        status, error, text = await refused(b, "read", feedId=feed_id, subfeed="main", waitMsec=20_000)
        assert (status, error) == (403, "NotPermitted")
        assert "requestFeeds" in text
        assert not list((tmp_path / "hub").rglob("subfeed.json"))
    together(loop_kind, tmp_path, work, {"a": None, "b": [name for name in ALL if name != "requestFeeds"]}, **FEEDS)


def test_a_node_needs_the_permission_to_share(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        feed_id = (await ask(a, "create"))["feedId"]
        await append(a, feed_id, 5)
        answer = await ask(b, "read", feedId=feed_id, subfeed="main", waitMsec=800)
        assert (answer["messages"], answer["known"]) == ([], False)
        assert not list((tmp_path / "hub").rglob("segments"))
    together(loop_kind, tmp_path, work, {"a": [name for name in ALL if name != "provideFeeds"], "b": None}, **FEEDS)


def test_a_permission_withdrawn_while_following_ends_the_following(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        feed_id = await shared(a, b)
        reading = asyncio.ensure_future(refused(b, "read", feedId=feed_id, subfeed="main", position=5,
                                                waitMsec=30_000))
        await asyncio.sleep(0.2)
        await world.owner.call("revoke", channel=CHANNEL, node=b.node.identity.node_id,
                               permissions=["requestFeeds"])
        await b.ask("POST", "/api/reload", {})
        assert (await reading)[:2] == (403, "NotPermitted")
        await a.ask("POST", "/api/reload", {})
        await append(a, feed_id, 1, 5)
        assert (await ask(b, "read", feedId=feed_id, subfeed="main"))["count"] == 5
        assert (await refused(b, "read", feedId=feed_id, subfeed="main", position=5))[:2] == (403, "NotPermitted")
    together(loop_kind, tmp_path, work, **FEEDS)


def test_a_provider_that_may_share_no_more_is_not_heard_any_more(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        feed_id = await shared(a, b)
        await world.owner.call("revoke", channel=CHANNEL, node=a.node.identity.node_id, permissions=["provideFeeds"])
        for client in (a, b):
            await client.ask("POST", "/api/reload", {})
        await append(a, feed_id, 1, 5)
        answer = await ask(b, "read", feedId=feed_id, subfeed="main", position=5, waitMsec=500)
        assert (answer["messages"], answer["count"]) == ([], 5)
        await world.owner.call("grant", channel=CHANNEL, node=a.node.identity.node_id, permissions=["provideFeeds"])
        for client in (a, b):
            await client.ask("POST", "/api/reload", {})
        await read_to(b, feed_id, 6, 5)
    together(loop_kind, tmp_path, work, **FEEDS)


def test_a_reader_whose_node_leaves_the_channel_is_told(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        feed_id = await shared(a, b)
        reading = asyncio.ensure_future(refused(b, "read", feedId=feed_id, subfeed="main", position=5,
                                                waitMsec=30_000))
        await until(lambda: b.node.feeds._readers)
        async with HubClient(world.url, b.node.identity.key, b.node.settings) as hub:
            await hub.leave(CHANNEL)
        await b.ask("POST", "/api/reload", {})
        assert (await reading)[1] == "Cancelled"
        assert not b.node.feeds._followings
        assert (await refused(b, "read", feedId=feed_id, subfeed="main", position=5))[1] == "ChannelUnknown"
        assert (await ask(b, "read", feedId=feed_id, subfeed="main"))["count"] == 5
    together(loop_kind, tmp_path, work, **FEEDS)


def test_a_band_that_was_out_of_reach_is_caught_up_with(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        feed_id = await shared(a, b)
        link = b.node.links()[0]
        assert link._channel is not None
        await link._channel.close()
        await append(a, feed_id, 5, 5)
        reading = asyncio.ensure_future(read_to(b, feed_id, 10, 5))
        await asyncio.sleep(0.1)
        await link.connect()
        await reading
    together(loop_kind, tmp_path, work, **FEEDS)


_OWNER = """
import asyncio, sys
from kachery_fast.config import load_settings
from kachery_fast.node.node import Node

async def main():
    node = Node(load_settings({}, storage_dir=sys.argv[1], node_port=0, channel="lab"))
    await node.start()
    feed_id, _ = await node.feeds.create("f")
    print(feed_id, flush=True)
    for line in sys.stdin:
        done = await node.feeds.append(feed_id, sys.argv[2], [{"i": int(line)}], None)
        print(done.first, flush=True)  # acknowledged; and nobody was told yet, as the loop does not go on

asyncio.run(main())
"""


def test_what_was_acknowledged_is_read_although_the_owner_was_killed_before_it_shared(
        loop_kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with running_world(tmp_path) as world:
            of_a, of_b = await enrolled(world, tmp_path, dict.fromkeys("ab"), **FEEDS)
            owner = subprocess.Popen([sys.executable, "-c", _OWNER, str(tmp_path / "a"), subfeed_hash("main")],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ})
            loop = asyncio.get_running_loop()

            async def line(text: str = "") -> str:
                assert owner.stdin is not None
                assert owner.stdout is not None
                owner.stdin.write(text)
                owner.stdin.flush()
                return (await loop.run_in_executor(None, owner.stdout.readline)).strip()

            try:
                feed_id = await line()
                async with running_node(of_b) as b:
                    for number in range(20):
                        assert await line(f"{number}\n") == str(number)
                    # Nobody asked before: while it makes an append durable, the owner answers whoever does.
                    reading = asyncio.ensure_future(read_to(b, feed_id, 20))
                    await until(lambda: b.node.feeds._followings)
                    owner.send_signal(signal.SIGKILL)
                    await loop.run_in_executor(None, owner.wait)
                    assert not list((tmp_path / "hub").rglob("segments"))
                    async with running_node(of_a):
                        await reading
            finally:
                owner.kill()
                owner.communicate()
    run_on(loop_kind, run(), 100)
