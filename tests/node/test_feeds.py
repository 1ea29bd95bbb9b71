"""Feeds between nodes: replayed, followed live, relayed; what is uploaded and when; and whatever others lie or lose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import (
    BucketUnreachable,
    DatabaseUnusable,
    FeedForked,
    HubUnreachable,
    InvalidArgument,
    NotPermitted,
    UrlExpired,
)
from kachery_fast.node import feed_sharing as sharing_module
from kachery_fast.node import feeds as feeds_module
from kachery_fast.node.feeds import Watch
from kachery_fast.protocol.access import Permission
from kachery_fast.protocol.feed_bodies import FeedFailed, FeedMessages, FeedShared, FeedSubscribe, Segment
from kachery_fast.protocol.feed_segments import INDEX_SIZE_BYTES_MAX, encode_index, encode_segment, parse_index
from kachery_fast.protocol.feeds import Tail, sign_messages
from kachery_fast.protocol.names import subfeed_hash
from kachery_fast.protocol.signing import private_key
from tests.network import LOOPS, run_on
from tests.node.feed_support import (
    SUBFEED,
    FeedPeer,
    decoded,
    feed_peer,
    index_name,
    pair,
    put_segment,
    remove,
    seed_of,
    segments_in,
)
from tests.node.support import Network, fails, nothing_left, other_tasks, until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
Work = Callable[[Network, FeedPeer, FeedPeer, str], Awaitable[None]]
WITHOUT_REQUEST = [permission.value for permission in Permission if permission is not Permission.REQUEST_FEEDS]
WITHOUT_PROVIDE = [permission.value for permission in Permission if permission is not Permission.PROVIDE_FEEDS]


def between(loop_kind: str, root: Path, work: Work, **settings: Any) -> None:
    """Run ``work`` with an owner a, a reader b and a feed of a's."""
    async def run() -> None:
        async with pair(root, **settings) as (net, a, b, feed_id):
            await work(net, a, b, feed_id)
        await asyncio.sleep(0)
        assert not [task for task in other_tasks() if "feed" in task]
    with nothing_left(root):
        run_on(loop_kind, run(), 60)


# --- replay


def test_a_new_reader_gets_all_in_few_objects_and_nothing_is_uploaded_before(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 3000, 400)
        await asyncio.sleep(0.05)
        assert net.bucket.puts == []
        assert net.hub.signed == []
        messages = await b.read_to(feed_id, 3000)
        await until(lambda: index_name(feed_id) in net.bucket.objects)  # it comes after what the reader waits for
        assert messages == a.feeds.log.read(feed_id, SUBFEED, 0, 3000, 1 << 30)
        assert len(segments_in(net)) == 3  # of 1 MiB at most
        assert len(net.bucket.puts) == 4
        index = parse_index(net.bucket.objects[index_name(feed_id)])
        assert index.count == 3000
        assert [part.end for part in index.segments][-1] == 3000
        assert a.traffic.uploaded_objects == 4
        assert b.traffic.downloaded_objects == 3
        await until(lambda: b.feeds.log.head(feed_id, SUBFEED) is not None)
    between(loop_kind, tmp_path, work)


def test_a_reader_finds_a_feed_while_nobody_is_there(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 50)
        await b.read_to(feed_id, 50)
        await until(lambda: index_name(feed_id) in net.bucket.objects)
        await remove(net, a)
        await remove(net, b)
        c = await feed_peer(net, "c")
        await c.read_to(feed_id, 50)
        reading = await c.read_once(feed_id, 50, 0.3)
        assert (reading.messages, reading.count, reading.known) == ([], 50, True)
        assert "has an index of 50 messages" in reading.why
        assert "no answer from a" in reading.why
    between(loop_kind, tmp_path, work)


def test_what_was_read_once_is_read_here_afterwards(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 50)
        await b.read_to(feed_id, 50)
        gets = len(net.bucket.gets)
        (reading,) = await b.feeds.read([Watch(feed_id, SUBFEED, 10)], 0.0, 5)
        assert [json.loads(message)["body"]["messageNumber"] for message in reading.messages] == list(range(10, 15))
        assert len(net.bucket.gets) == gets
    between(loop_kind, tmp_path, work)


def test_an_unknown_subfeed_is_told_with_what_was_tried(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        reading = await b.read_once("ab" * 32, 0, 0.6)
        assert (reading.messages, reading.count, reading.known) == ([], 0, False)
        assert "has no index of it" in reading.why
        assert "no answer from a" in reading.why
        # A subfeed that its owner has written nothing to is known to be one.
        following = await b.feeds.follow(b.link, feed_id, SUBFEED)
        await until(lambda: following.known)
        reading = await b.read_once(feed_id, 0, 0.0)
        assert (reading.messages, reading.known) == ([], True)
    between(loop_kind, tmp_path, work)


# --- live


def test_new_messages_are_seen_as_they_come(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        await b.read_to(feed_id, 5)
        await until(lambda: index_name(feed_id) in net.bucket.objects)
        puts = len(net.bucket.puts)
        for end in range(6, 30):
            read = asyncio.ensure_future(b.read_to(feed_id, end, end - 1))
            await asyncio.sleep(0.001)
            await a.append(feed_id, 1)
            await read
        assert len(net.bucket.puts) == puts
    between(loop_kind, tmp_path, work, feed_renew_seconds=20.0)


def test_a_reader_that_comes_before_the_first_message_sees_it(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        read = asyncio.ensure_future(b.read_to(feed_id, 1))
        await until(lambda: a.sharing._machine.listened_to((feed_id, SUBFEED), asyncio.get_running_loop().time()))
        await a.append(feed_id, 1)
        await read
        assert net.bucket.puts == []
    between(loop_kind, tmp_path, work, feed_renew_seconds=20.0)


def test_what_no_message_of_a_band_carries_comes_by_the_bucket(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 1)
        await b.read_to(feed_id, 1)
        await until(lambda: index_name(feed_id) in net.bucket.objects)
        read = asyncio.ensure_future(b.read_to(feed_id, 201, 1))
        await a.append(feed_id, 1, 100_000)
        await a.append(feed_id, 198, 1000)
        await a.append(feed_id, 1)
        await read
        assert parse_index(net.bucket.objects[index_name(feed_id)]).count >= 2
    between(loop_kind, tmp_path, work, feed_renew_seconds=20.0)


def test_readers_wait_for_several_subfeeds_at_once(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        other = "cd" * 20
        watches = [Watch(feed_id, subfeed, 0, await b.feeds.follow(b.link, feed_id, subfeed))
                   for subfeed in (SUBFEED, other)]
        read = asyncio.ensure_future(b.feeds.read(watches, 20.0, 100))
        await asyncio.sleep(0.05)
        await a.append(feed_id, 2, subfeed=other)
        first, second = await read
        assert (len(first.messages), len(second.messages)) == (0, 2)
        assert not b.feeds._readers
    between(loop_kind, tmp_path, work)


def test_own_subfeeds_are_read_and_waited_for_without_a_channel(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        read = asyncio.ensure_future(a.feeds.read([Watch(feed_id, SUBFEED, 0)], 20.0, 100))
        await asyncio.sleep(0.01)
        await a.append(feed_id, 3)
        (reading,) = await read
        assert (len(reading.messages), reading.count, reading.known) == (3, 3, True)
        (reading,) = await a.feeds.read([Watch(feed_id, SUBFEED, 3)], 0.0, 100)
        assert (reading.messages, reading.why) == ([], "")
        assert net.broker.published == 0
    between(loop_kind, tmp_path, work)


def test_after_an_outage_of_the_bands_a_reader_catches_up(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        await b.read_to(feed_id, 5)
        net.broker.set_up(False)
        await a.append(feed_id, 5)
        following = await b.feeds.follow(b.link, feed_id, SUBFEED)
        await until(lambda: "could not be sent" in following.account())
        assert (await b.read_once(feed_id, 5, 0.0)).messages == []
        net.broker.set_up(True)
        await b.read_to(feed_id, 10, 5)
    between(loop_kind, tmp_path, work)


def test_nobody_is_followed_for_longer_than_somebody_reads(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        await b.read_to(feed_id, 5)
        assert len(b.feeds._followings) == 1
        await until(lambda: not b.feeds._followings)
        assert not b.link._listeners
        # The owner goes on for as long after it was last asked.
        loop = asyncio.get_running_loop()
        await until(lambda: not a.sharing._machine.listened_to((feed_id, SUBFEED), loop.time()))
        published = net.broker.published
        await a.append(feed_id, 1)
        await asyncio.sleep(0.1)
        assert net.broker.published == published
        await b.read_to(feed_id, 6, 5)
    between(loop_kind, tmp_path, work, feed_subscription_seconds=1.0, feed_renew_seconds=0.2)


def test_the_subfeed_that_nobody_has_read_for_the_longest_is_let_go(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        names = [f"{number:040x}" for number in range(4)]
        first = asyncio.ensure_future(b.read_once(feed_id, subfeed=names[0]))
        await until(lambda: b.feeds._readers)
        for name in names[1:]:
            await b.read_once(feed_id, 0, 0.0, subfeed=name)
        assert "feed_followed_max" in (await fails(InvalidArgument, first)).message
        assert [key[2] for key in b.feeds._followings] == names[1:]
    between(loop_kind, tmp_path, work, feed_followed_max=3)


def test_no_more_readers_wait_than_the_limit(loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds_module, "_READERS_MAX", 2)

    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        reads = [asyncio.ensure_future(a.feeds.read([Watch(feed_id, SUBFEED, 0)], 20.0, 1)) for _ in range(2)]
        await until(lambda: a.feeds._waiting == 2)
        await fails(InvalidArgument, a.feeds.read([Watch(feed_id, SUBFEED, 0)], 20.0, 1))
        await a.append(feed_id, 1)
        await asyncio.gather(*reads)
    between(loop_kind, tmp_path, work)


# --- relays


def test_a_relay_serves_what_it_holds_while_the_owner_is_away(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 20)
        await b.read_to(feed_id, 20)
        await a.append(feed_id, 5)
        await b.read_to(feed_id, 25, 20)  # by a message: the bucket's index tells of 20
        await until(lambda: (b.feeds.log.head(feed_id, SUBFEED) or {"body": {"count": 0}})["body"]["count"] == 25)
        await remove(net, a)
        c = await feed_peer(net, "c")
        await c.read_to(feed_id, 25)
        reading = await c.read_once(feed_id, 25, 0.3)
        assert reading.count == 25
    between(loop_kind, tmp_path, work)


def test_a_relay_puts_what_the_bucket_lacks(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 200, 1000)
        await b.read_to(feed_id, 200)
        await until(lambda: index_name(feed_id) in net.bucket.objects)
        await remove(net, a)
        shared = dict(net.bucket.objects)
        net.bucket.objects.clear()
        c = await feed_peer(net, "c")
        await c.read_to(feed_id, 200)
        await until(lambda: index_name(feed_id) in net.bucket.objects)
        assert {name for name in net.bucket.objects if "/segments/" in name} == {
            name for name in shared if "/segments/" in name}
    between(loop_kind, tmp_path, work)


# --- damage and lies


@pytest.mark.parametrize("harm", ["damaged", "absent", "cut short"])
def test_a_segment_that_is_damaged_is_reported_and_put_there_anew(harm: str, loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 50)
        await b.read_to(feed_id, 50)
        await until(lambda: index_name(feed_id) in net.bucket.objects)
        (name,) = segments_in(net)
        good = net.bucket.objects[name]
        if harm == "damaged":
            net.bucket.corrupt(name)
        elif harm == "absent":
            del net.bucket.objects[name]
        else:
            net.bucket.objects[name] = good[:len(good) // 2]
        c = await feed_peer(net, "c")
        await c.read_to(feed_id, 50)
        assert net.bucket.objects[name] == good
        assert bool(net.hub.reports) == (harm != "absent")
    between(loop_kind, tmp_path, work)


@pytest.mark.parametrize("index", [b"garbage", b"{}", b'{"messageCount": 1e99}', b'{"messageCount": 3}',
                                   b"[" * 100_000])
def test_an_index_that_is_no_good_hinders_nobody(index: bytes, loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        net.bucket.objects[index_name(feed_id)] = index
        await a.append(feed_id, 5)
        await b.read_to(feed_id, 5)
        await until(lambda: net.bucket.objects[index_name(feed_id)] != index)
        assert parse_index(net.bucket.objects[index_name(feed_id)]).count == 5
    between(loop_kind, tmp_path, work)


def test_long_indexes_that_somebody_put_are_read_one_at_a_time_and_forgotten(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = encode_index(2000, None, [Segment(i, i + 1, 9, f"{i:040x}") for i in range(2000)])
    subfeeds = [subfeed_hash(f"s{number}") for number in range(8)]
    reading, most = 0, 0

    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        read = net.bucket.get_small

        async def get_small(name: str, limit_bytes: int, *, fresh: bool = False, ahead: Iterable[str] = ()) -> bytes:
            nonlocal reading, most
            if limit_bytes < len(long) or not name.endswith("subfeed.json"):
                return await read(name, limit_bytes, fresh=fresh)
            reading += 1
            most = max(most, reading)
            await asyncio.sleep(0.01)
            reading -= 1
            return await read(name, limit_bytes, fresh=fresh)

        monkeypatch.setattr(net.bucket, "get_small", get_small)
        for subfeed in subfeeds:
            net.bucket.objects[index_name(feed_id, subfeed)] = long
            await a.append(feed_id, 3, subfeed=subfeed)
        net.bucket.objects[index_name(feed_id, subfeeds[0])] = b" " * (INDEX_SIZE_BYTES_MAX + 1)
        await asyncio.gather(*(b.read_to(feed_id, 3, subfeed=subfeed) for subfeed in subfeeds))
        assert 1 <= most <= 2  # one at each of the two nodes
        for subfeed in subfeeds:
            known = a.sharing._known[feed_id, subfeed]
            assert known.segments == {part.sha1 for part in a.feeds.log.segments(feed_id, subfeed)}
        await until(lambda: all(parse_index(net.bucket.objects[index_name(feed_id, subfeed)]).count == 3
                                for subfeed in subfeeds))
    between(loop_kind, tmp_path, work)


def forgeries(chain: list[bytes], feed_id: str) -> dict[str, bytes]:
    """Contents of segments that look like the subfeed's, and are not."""
    stranger = private_key(bytes(32))
    other, _ = sign_messages(Tail(feed_id, SUBFEED), [{"i": 0}, {"i": 1}], stranger, 1)
    elsewhere, _ = sign_messages(Tail(feed_id, "cd" * 20), [{"i": 0}], stranger, 1)
    changed = decoded(chain)
    changed[1]["body"]["message"]["i"] = 99
    return {
        "signed by another": encode_segment(other),
        "of another subfeed": encode_segment(elsewhere),
        "changed": b"".join(json.dumps(message).encode() + b"\n" for message in changed),
        "reordered": encode_segment([chain[1], chain[0]]),
        "not JSON": b"\x00\xff" * 100 + b"\n",
        "not lines": b'{"body":',
        "not messages": b"{}\n[]\n",
    }


@pytest.mark.parametrize("kind", ["signed by another", "of another subfeed", "changed", "reordered", "not JSON",
                                  "not lines", "not messages"])
def test_a_forged_segment_in_the_index_is_refused_and_the_owner_asked(kind: str, loop_kind: str,
                                                                     tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        chain = a.feeds.log.read(feed_id, SUBFEED, 0, 9, 1 << 20)
        sha1, size = put_segment(net, feed_id, forgeries(chain, feed_id)[kind])
        net.bucket.objects[index_name(feed_id)] = encode_index(9, None, [Segment(0, 9, size, sha1)])
        assert await b.read_to(feed_id, 5) == chain
        await until(lambda: parse_index(net.bucket.objects[index_name(feed_id)]).count == 5)
    between(loop_kind, tmp_path, work)


def test_forged_live_messages_are_refused(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        chain = await b.read_to(feed_id, 5)
        liar = await feed_peer(net, "liar")
        fields = {"request": "", "feed_id": feed_id, "subfeed": SUBFEED}
        fake, _ = sign_messages(Tail(feed_id, SUBFEED, 5, "ab" * 64), [{"i": 5}], private_key(bytes(32)), 1)
        bad: list[dict[str, Any]] = [
            {"first": 5, "messages": decoded(fake)}, {"first": 5, "messages": decoded(chain[:1])},
            {"first": 5, "messages": [{}]}, {"first": 10**6, "messages": decoded(fake)},
            {"first": 0, "messages": [{"body": {}}]}]
        for part in bad:
            liar.link.say(FeedMessages, {**fields, **part})
        liar.link.say(FeedShared, {**fields, "segments": [Segment(5, 9, 10, "ab" * 20)]})
        liar.link.say(FeedFailed, {**fields, "request": "x", "reason": "deleted"})
        await b.read_once(feed_id, 5, 0.5)
        await a.append(feed_id, 1)
        assert len(await b.read_to(feed_id, 6, 5)) == 1
        assert b.feeds.log.forks(feed_id, SUBFEED) == []
    between(loop_kind, tmp_path, work)


def test_two_histories_are_reported_with_both_as_evidence(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        chain = await b.read_to(feed_id, 5)
        key = private_key(seed_of(a.settings.storage_dir, feed_id))
        before = decoded(chain)[2]
        second, _ = sign_messages(Tail(feed_id, SUBFEED, 3, before["signature"], 2), [{"i": "other"}], key, 1)
        liar = await feed_peer(net, "liar")
        waiting = asyncio.ensure_future(b.read_once(feed_id, 5))
        await asyncio.sleep(0.05)
        liar.link.say(FeedMessages, {"request": "", "feed_id": feed_id, "subfeed": SUBFEED, "first": 3,
                                     "messages": decoded(second)})
        await fails(FeedForked, waiting)
        (fork,) = await b.feeds.forks(feed_id, SUBFEED)
        assert (fork.number, fork.first, fork.second) == (3, chain[3], second[0])
        reading = await b.read_once(feed_id, 1, 0.0)
        assert reading.messages == chain[1:3]
        await a.append(feed_id, 1)
        await fails(FeedForked, b.read_once(feed_id, 3, 0.2))
        # It says so to others, who still hear the rest from the owner.
        answers: list[Any] = []
        liar.link.listen(f"{feed_id}/{SUBFEED}", lambda body, sender: answers.append(body))
        await liar.read_once(feed_id, 0, 1.0)
        await until(lambda: any(isinstance(body, FeedFailed) and body.reason == "forked" for body in answers))
    between(loop_kind, tmp_path, work)


# --- permissions


def test_who_may_not_provide_feeds_shares_nothing(loop_kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with pair(tmp_path) as (net, _, b, _):
            mute = await feed_peer(net, "mute", WITHOUT_PROVIDE)
            feed_id = await mute.create()
            await mute.append(feed_id, 5)
            reading = await b.read_once(feed_id, 0, 0.6)
            assert (reading.messages, reading.known) == ([], False)
            assert net.bucket.puts == []
            # And what it says all the same is not heard.
            chain = mute.feeds.log.read(feed_id, SUBFEED, 0, 9, 1 << 20)
            mute.link.say(FeedMessages, {"request": "", "feed_id": feed_id, "subfeed": SUBFEED, "first": 0,
                                         "messages": decoded(chain)})
            assert (await b.read_once(feed_id, 0, 0.3)).messages == []
    run_on(loop_kind, run(), 60)


def test_who_may_not_request_feeds_is_not_answered(loop_kind: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with pair(tmp_path) as (net, a, _, feed_id):
            deaf = await feed_peer(net, "deaf", WITHOUT_REQUEST)
            await a.append(feed_id, 5)
            reading = await deaf.read_once(feed_id, 0, 0.6)
            assert (reading.messages, net.bucket.puts) == ([], [])
    run_on(loop_kind, run(), 60)


def test_a_permission_withdrawn_while_following_ends_it_on_both_sides(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        await b.read_to(feed_id, 5)
        waiting = asyncio.ensure_future(b.read_once(feed_id, 5))
        await asyncio.sleep(0.05)
        now = asyncio.get_running_loop().time
        assert a.sharing._machine.listened_to((feed_id, SUBFEED), now())
        net.members["b"] = WITHOUT_REQUEST
        for peer in net.peers:
            peer.link.update(net.info(peer.name))
        assert "requestFeeds" in (await fails(NotPermitted, waiting)).message
        assert not a.sharing._machine.listened_to((feed_id, SUBFEED), now())
        said = net.broker.published
        await a.append(feed_id, 1)
        await asyncio.sleep(0.05)
        assert net.broker.published == said
        assert len((await b.read_once(feed_id, 0, 0.0)).messages) == 5
    between(loop_kind, tmp_path, work)


# --- trouble


def test_an_owner_whose_log_cannot_be_read_says_so(loop_kind: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        await b.read_to(feed_id, 5)
        torn = DatabaseUnusable(path="feeds.db", why="it is damaged", advice="Restore it.")

        def tail(*_: str) -> Tail:
            raise torn

        monkeypatch.setattr(a.feeds.log, "tail", tail)
        following = await b.feeds.follow(b.link, feed_id, SUBFEED)
        await until(lambda: f"disk-error: {torn.message}" in following.account())
        monkeypatch.undo()
        await a.append(feed_id, 1)
        await b.read_to(feed_id, 6)
    between(loop_kind, tmp_path, work)


@pytest.mark.parametrize("trouble", ["hub", "bucket"])
def test_an_owner_that_cannot_share_says_why_and_shares_later(trouble: str, loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        if trouble == "hub":
            net.hub.down = True
            expected = HubUnreachable(url=net.hub.url, why="connection refused").message
        else:
            refusal = BucketUnreachable(object="x", why="refused", attempts=1)
            (part,) = a.feeds.log.segments(feed_id, SUBFEED)
            net.bucket.fail(index_name(feed_id).replace("subfeed.json", f"segments/{part.sha1}"), refusal)
            expected = refusal.message
        following = await b.feeds.follow(b.link, feed_id, SUBFEED)
        await until(lambda: expected in following.account())
        net.hub.down = False
        await b.read_to(feed_id, 5)
    between(loop_kind, tmp_path, work)


def test_a_deleted_feed_is_not_shared_any_more_and_readers_keep_what_they_have(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        await b.read_to(feed_id, 5)
        await a.feeds.delete(feed_id)
        assert not a.feeds.owns(feed_id)
        reading = await b.read_once(feed_id, 5, 0.6)
        assert (reading.messages, reading.known) == ([], True)
        await b.feeds.delete(feed_id)
        assert not b.feeds._followings
        assert (await b.feeds.read([Watch(feed_id, SUBFEED, 0)], 0.0, 9))[0].messages == []
    between(loop_kind, tmp_path, work)


def test_an_owner_that_stops_between_append_and_share_shares_when_it_is_back(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        net.bucket.gate.clear()
        waiting = asyncio.ensure_future(b.read_to(feed_id, 5))
        await a.append(feed_id, 5)
        await asyncio.sleep(0.05)
        await remove(net, a)
        net.bucket.gate.set()
        await feed_peer(net, "a")
        await waiting
    between(loop_kind, tmp_path, work)


def test_many_segments_are_uploaded_in_batches_and_announced_as_they_arrive(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        for _ in range(4):
            await a.append(feed_id, 10, 500_000)
        heard: list[FeedShared] = []
        b.link.listen(f"{feed_id}/{SUBFEED}", lambda body, _: heard.append(body))
        await b.read_to(feed_id, 40)
        await until(lambda: index_name(feed_id) in net.bucket.objects)
        assert len(segments_in(net)) == 20
        assert [len(body.segments) for body in heard if isinstance(body, FeedShared)][:2] == [16, 4]
        assert max(map(len, net.hub.signed)) == 7
        # What is there already is not put there again.
        puts = len(net.bucket.puts)
        c = await feed_peer(net, "c")
        await c.read_to(feed_id, 40)
        assert len(net.bucket.puts) == puts
    between(loop_kind, tmp_path, work, sign_batch_max=7)


def test_an_owner_that_was_restarted_puts_nothing_again_that_the_index_names(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 10, 500_000)
        await b.read_to(feed_id, 10)
        await until(lambda: index_name(feed_id) in net.bucket.objects)
        await remove(net, a)
        net.bucket.puts.clear()
        again = await feed_peer(net, "a")
        await again.append(feed_id, 1, 500_000)
        await b.read_to(feed_id, 11, 10)
        await until(lambda: parse_index(net.bucket.objects[index_name(feed_id)]).count == 11)
        assert len([name for name in net.bucket.puts if "/segments/" in name]) == 1
    between(loop_kind, tmp_path, work)


def test_a_copy_never_takes_the_place_of_an_index_that_tells_of_more(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 10)
        await b.read_to(feed_id, 10)
        await until(lambda: not b.feeds._followings)
        await a.append(feed_id, 10)
        c = await feed_peer(net, "c")
        await c.read_to(feed_id, 20)
        await until(lambda: parse_index(net.bucket.objects[index_name(feed_id)]).count == 20)
        await remove(net, a)
        await remove(net, c)
        index = net.bucket.objects[index_name(feed_id)]
        for name in segments_in(net):
            del net.bucket.objects[name]
        d = await feed_peer(net, "d")
        await d.read_to(feed_id, 10)  # b has that many
        await asyncio.sleep(0.05)
        assert net.bucket.objects[index_name(feed_id)] == index
    between(loop_kind, tmp_path, work, feed_subscription_seconds=0.3, feed_renew_seconds=0.1)


def test_an_upload_whose_leave_has_expired_is_signed_anew(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        (part,) = a.feeds.log.segments(feed_id, SUBFEED)
        net.bucket.fail(index_name(feed_id).replace("subfeed.json", f"segments/{part.sha1}"),
                        UrlExpired(object="x", why="it expired"))
        await b.read_to(feed_id, 5)
        assert sum(batch == [(part.sha1, part.size)] for batch in net.hub.signed) == 2
    between(loop_kind, tmp_path, work)


def test_a_flood_of_questions_is_bounded(loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_module, "_LOOKUPS_MAX", 3)

    async def work(net: Network, a: FeedPeer, b: FeedPeer, feed_id: str) -> None:
        await a.append(feed_id, 5)
        for number in range(50):
            b.link.say(FeedSubscribe, {"request": f"r{number}", "feed_id": feed_id, "subfeed": SUBFEED, "position": 1})
        await b.read_to(feed_id, 5)
        await until(lambda: a.sharing._lookups == 0)
        assert len(a.sharing._tasks) < 5
    between(loop_kind, tmp_path, work)
