"""Feeds under trouble and under load: services killed, many writers at once, feeds deleted, leave taken away."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab, LabNode
from kachery_fast.errors import FeedUnknown, NodeNotRunning, SubfeedNotAvailable
from kachery_fast.protocol.canonical import canonical_bytes
from kachery_fast.protocol.names import subfeed_hash, subfeed_object_name
from kachery_fast.protocol.signing import verify, verify_2022
from kachery_fast.store import feed_rows
from kachery_fast.store.feeds import DATABASE_NAME, FeedLog
from tests.protocol.chains import FEED, KEY, TIME_MS, of_2022, plain
from tests.protocol.test_canonical import VECTORS
from tests.system.feed_support import LONG_MSEC, extra, lab, made, numbered, read, read_signed, seen
from tests.system.support import objects, wait_until

__all__ = ["extra", "lab"]


@contextmanager
def followed(subfeed: kf.Subfeed, found: list[dict[str, Any]], count: int) -> Iterator[None]:
    """Within this, ``found`` is given each message as it comes, up to ``count``."""
    def follow() -> None:
        for message in subfeed.message_stream():
            found.append(message)
            if len(found) == count:
                return

    thread = threading.Thread(target=follow, daemon=True)  # one that is never given so many would wait for ever
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive(), f"{len(found)} of {count} messages came"


# --- somebody dies


def test_a_hub_killed_while_a_feed_is_followed_costs_time_only(lab: Lab) -> None:
    source = made(lab.nodes["A"])
    source.append_messages(numbered(0, 3))
    found: list[dict[str, Any]] = []
    with followed(seen(lab.nodes["B"], source), found, 15):
        wait_until(lambda: len(found) == 3, "what was there before it is followed has come")
        for i in range(3, 6):
            source.append_message({"i": i})
        wait_until(lambda: len(found) == 6, "what was appended live has come")
        lab.hub.kill()  # and with it the broker and the bucket
        for i in range(6, 9):
            source.append_message({"i": i})
        assert len(found) == 6
        lab.start_hub()
        for i in range(9, 12):
            source.append_message({"i": i})
        wait_until(lambda: len(found) == 12, "what was appended meanwhile has come", 60)
        for i in range(12, 15):
            source.append_message({"i": i})
    assert found == numbered(0, 15)
    assert seen(lab.nodes["B"], source, channel="*local*").get_next_messages(wait_msec=0) == numbered(0, 15)


def test_a_batch_is_there_whole_or_not_at_all_when_its_owner_is_killed(lab: Lab, extra: Any) -> None:
    size, rounds, clients = 50, 3, 2
    owner = extra("killed-in-batches")
    source = made(owner)
    acknowledged: list[tuple[int, int, int]] = []
    in_doubt: list[tuple[int, int, int]] = []

    def append(key: tuple[int, int], begun: threading.Event) -> None:
        mine = source.feed.load_subfeed("main")
        for batch in range(100_000):
            try:
                mine.append_messages([{"batch": [*key, batch], "i": i} for i in range(size)])
            except NodeNotRunning:
                in_doubt.append((*key, batch))
                return
            acknowledged.append((*key, batch))
            if batch == 5:
                begun.set()

    for turn in range(rounds):
        events = [threading.Event() for _ in range(clients)]
        threads = [threading.Thread(target=append, args=((turn, client), event)) for client, event in enumerate(events)]
        for thread in threads:
            thread.start()
        assert all(event.wait(30) for event in events)
        owner.program.kill()
        for thread in threads:
            thread.join(30)
        owner.start()
    with owner.used():
        found = kf.load_subfeed(source.uri).get_next_messages()
    assert len(found) % size == 0
    batches = [found[start:start + size] for start in range(0, len(found), size)]
    names = [tuple(batch[0]["batch"]) for batch in batches]
    assert batches == [[{"batch": list(name), "i": i} for i in range(size)] for name in names]
    assert len(set(names)) == len(names)
    assert len(in_doubt) == rounds * clients
    assert set(acknowledged) <= set(names) <= {*acknowledged, *in_doubt}
    assert read(lab.nodes["B"], source) == found


# --- many messages, many writers


@pytest.mark.parametrize(("count", "text", "objects_max", "objects_a_second"), [
    # What fits is sent over the channel. For who asks there is an index, and what there is then.
    (200, "", 5, 0),
    # What is too long for a band comes by the bucket, that of a second together; two segments are full meanwhile.
    (60, "x" * 40_000, 10, 1),
], ids=["short", "long"])
def test_single_messages_followed_live_are_not_an_object_each(
        lab: Lab, count: int, text: str, objects_max: int, objects_a_second: int) -> None:
    before = set(objects(lab.bucket_dir))
    source = made(lab.nodes["A"])
    found: list[dict[str, Any]] = []
    begun = time.monotonic()
    with followed(seen(lab.nodes["B"], source), found, count):
        for i in range(count):
            source.append_message({"i": i, "text": text})
            if i % 20 == 19:
                wait_until(lambda i=i: len(found) == i + 1, "the message has come live", 60)  # type: ignore[misc]
    assert found == [{"i": i, "text": text} for i in range(count)]
    shared = len(set(objects(lab.bucket_dir)) - before)
    assert shared <= objects_max + objects_a_second * (time.monotonic() - begun)


# Appends one message, then two together, and so on, until its input ends; then prints the numbers that they were given.
WRITER = """
import json, sys, threading
import kachery_fast as kf

subfeed, who = kf.load_subfeed(sys.argv[1]), int(sys.argv[2])
ended = threading.Event()
sys.stdin.readline()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
numbers = []
while not ended.is_set():
    numbers.append(subfeed.append_message({"who": who, "i": len(numbers)}))
    numbers += subfeed.append_messages([{"who": who, "i": len(numbers) + k} for k in range(2)])
print(json.dumps(numbers))
"""


def test_processes_that_append_at_once_make_one_chain_in_the_order_of_each(lab: Lab) -> None:
    a = lab.nodes["A"]
    source = made(a)
    writers = [subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, source.uri, str(who)], env=a.environ,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for who in range(4)]
    try:
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        counts = [0] * len(writers)

        def all_have_appended() -> bool:
            for message in source.get_next_messages(wait_msec=100):
                counts[message["who"]] += 1
            return min(counts) >= 30

        wait_until(all_have_appended, "every process has appended", 60)
        numbers = [json.loads(writer.communicate(timeout=60)[0]) for writer in writers]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    [row] = a.json("feed", "verify", source.feed.uri, "main")
    assert (row["count"], row["forks"]) == (sum(map(len, numbers)), [])
    messages = read(lab.nodes["B"], source)
    assert sorted(number for mine in numbers for number in mine) == list(range(len(messages)))
    for who, mine in enumerate(numbers):
        assert mine == sorted(mine)
        assert [messages[number] for number in mine] == [{"who": who, "i": i} for i in range(len(mine))]
        assert all(mine[i + 1] + 1 == mine[i + 2] for i in range(0, len(mine), 3))  # nobody came between two of a batch


# --- reading signed messages, and some of them


def test_signed_messages_and_some_of_them_are_read_from_another_node(lab: Lab) -> None:
    source = made(lab.nodes["A"])
    source.append_messages(numbered(0, 25))
    signed = read_signed(source)
    reader = seen(lab.nodes["B"], source)
    assert reader.get_next_messages(wait_msec=LONG_MSEC, signed=True, max_num_messages=10) == signed[:10]
    assert reader.position == 10
    assert reader.get_next_messages(wait_msec=LONG_MSEC, max_num_messages=10) == numbered(10, 20)
    assert reader.get_next_message(wait_msec=LONG_MSEC, signed=True) == signed[20]
    assert reader.get_next_messages(wait_msec=LONG_MSEC, signed=True, max_num_messages=10) == signed[21:]
    assert reader.position == 25
    for number, message in enumerate(signed):
        assert message["body"]["messageNumber"] == number
        assert verify(message["body"], message["signature"], str(source.feed.feed_id))
    # What comes live, too: the reader asks before there is anything.
    timer = threading.Timer(0.3, source.append_messages, [numbered(25, 30)])
    timer.start()
    live = reader.get_next_messages(wait_msec=LONG_MSEC, signed=True, max_num_messages=2)
    timer.join()
    signed = read_signed(source)
    assert live == signed[25:27]
    with lab.nodes["B"].used():
        watched = kf.watch_for_new_messages({"it": reader}, wait_msec=LONG_MSEC, signed=True, max_num_messages=2)
    assert watched == {"it": signed[27:29]}
    stream = seen(lab.nodes["B"], source, position=28).message_stream(signed=True)
    assert [next(stream), next(stream)] == signed[28:]
    source.append_message({"i": 30})
    assert next(stream) == read_signed(source)[30]


# --- what its owner takes away


@contextmanager
def empty_of_feeds(lab: Lab) -> Iterator[None]:
    """Within this, the bucket has nothing of any feed."""
    kept = lab.bucket_dir / "feeds-that-were"
    (lab.bucket_dir / "feeds").rename(kept)
    try:
        yield
    finally:
        kept.rename(lab.bucket_dir / "feeds")


def test_a_deleted_feed_stays_with_who_followed_it_and_reaches_nobody_new(lab: Lab, extra: Any) -> None:
    source = made(lab.nodes["A"])
    source.append_messages(numbered(0, 3))
    follower = extra("keeps-its-copy", permissions=["requestFeeds"])  # which it may not pass on
    reader = seen(follower, source)
    assert reader.get_next_messages(wait_msec=LONG_MSEC) == numbered(0, 3)
    wait_until(index_of(lab, source).exists, "all of it is shared")
    with lab.nodes["A"].used():
        kf.delete_feed(source.feed.uri)
    with pytest.raises(FeedUnknown):
        source.append_message({"i": 3})
    assert reader.get_next_messages(wait_msec=2000) == []
    assert seen(follower, source).get_next_messages(wait_msec=LONG_MSEC) == numbered(0, 3)
    newcomer = extra("comes-too-late")
    with empty_of_feeds(lab):
        with pytest.raises(SubfeedNotAvailable, match="nobody answered for it") as caught:
            read(newcomer, source, wait_msec=3000)
        assert "bucket: has no index of it" in str(caught.value)
    assert read(newcomer, source) == numbered(0, 3)  # what was shared in the bucket is not taken back


def index_of(lab: Lab, subfeed: kf.Subfeed) -> Path:
    """Where the bucket keeps the index of a subfeed."""
    return lab.bucket_dir.parent / subfeed_object_name(lab.channel, str(subfeed.feed.feed_id), subfeed.subfeed_hash)


def test_an_owner_that_may_not_provide_feeds_any_more_is_followed_no_further(lab: Lab, extra: Any) -> None:
    quick = {"KACHERY_CHANNEL_REFRESH_SECONDS": "0.5", "KACHERY_FEED_RENEW_SECONDS": "0.5"}
    owner, reader = extra("silenced", **quick), extra("listener", **quick)
    owner_id = str(owner.connection.info()["nodeId"])
    source = made(owner)
    source.append_message({"i": 0})
    follower = seen(reader, source)
    for i in range(2):
        assert follower.get_next_messages(wait_msec=LONG_MSEC) == [{"i": i}]
        source.append_message({"i": i + 1})
    assert follower.get_next_messages(wait_msec=LONG_MSEC) == [{"i": 2}]
    wait_until(index_of(lab, source).exists, "all of it is shared")
    lab.owner("revoke", lab.channel, owner_id, "provideFeeds")
    wait_until(lambda: not any("provideFeeds" in permissions_of(node, owner_id) for node in (owner, reader)),
               "both know of it", 60)
    before = content(lab)
    source.append_message({"i": 3})
    assert follower.get_next_messages(wait_msec=2000) == []  # though the question has been asked again
    assert f"silenced ({owner_id[:8]}): may not provide it any more" in follower.read_page().why
    assert content(lab) == before
    lab.owner("grant", lab.channel, owner_id, "provideFeeds")
    assert follower.get_next_messages(wait_msec=LONG_MSEC) == [{"i": 3}]
    assert "any more" not in follower.read_page().why


def permissions_of(node: LabNode, node_id: str) -> list[str]:
    """What a member of the channel may do, as far as a node knows."""
    [channel] = [channel for hub in node.connection.info()["hubs"] for channel in hub["channels"]]
    return [permission for member in channel["members"] if member["node"] == node_id
            for permission in member["permissions"]]


def content(lab: Lab) -> dict[Path, bytes]:
    """All that the bucket has of feeds."""
    return {path: path.read_bytes() for path in objects(lab.bucket_dir / "feeds")}


def test_messages_that_are_known_of_and_cannot_be_had_are_not_taken_for_none(
        lab: Lab, extra: Any, caplog: pytest.LogCaptureFixture) -> None:
    owner, first = extra("damaged"), extra("alone-with-it", permissions=["requestFeeds"])
    source = made(owner)
    source.append_messages([{"i": i, "text": "x" * 400} for i in range(3000)])
    assert len(read(first, source)) == 3000
    index = subfeed_object_name(lab.channel, str(source.feed.feed_id), source.subfeed_hash)
    wait_until((lab.bucket_dir.parent / index).exists, "all of it is shared")
    owner.program.kill()
    segments = [path for path in objects(lab.bucket_dir / "feeds") if str(source.feed.feed_id) in str(path)
                and path.name != Path(index).name]
    assert len(segments) > 1
    first_messages = next(path for path in segments if b'"messageNumber":0,' in path.read_bytes())
    later = [path for path in segments if path != first_messages]
    for path in later:
        path.write_bytes(b"another text"[:path.stat().st_size])
    some = extra("reads-some", permissions=["requestFeeds"]).run("feed", "read", source.uri, "--wait", "3")
    count = some.stdout.count(b"\n")
    assert 0 < count < 3000
    assert (some.returncode, some.stderr.count(b"\n")) == (SubfeedNotAvailable.exit_code, 1)
    assert f"its messages from number {count} to 2999 are known of, and none came within 3 s" in some.stderr.decode()
    first_messages.write_bytes(b"another text")
    newcomer = extra("reads-none")
    none = newcomer.run("feed", "read", source.uri, "--wait", "3")
    assert (none.returncode, none.stdout) == (SubfeedNotAvailable.exit_code, b"")
    assert "its messages from number 0 to 2999 are known of" in none.stderr.decode()
    assert re.search(r"asked \d+ nodes \d times; no answer from ", none.stderr.decode())
    reader = seen(newcomer, source)
    for _ in range(2):  # it may yet come, so a client is not stopped by it; it is told once
        assert reader.get_next_messages(wait_msec=3000) == []
    [line] = [record.getMessage() for record in caplog.records if record.name == "kachery_fast.client"]
    assert line.startswith(f"{source.uri} is waited for: nobody has brought its messages from number 0 to 2999 yet.")
    owner.start()
    assert len(read(newcomer, source)) == 3000


# --- feeds of 2022


def test_a_feed_begun_in_2022_is_read_and_extended_over_the_channel(lab: Lab, extra: Any) -> None:
    """Its owner keeps it in the log of today; the first message is that of the golden vectors."""
    owner = extra("since-2022", start=False)
    owner.storage_dir.mkdir(exist_ok=True)
    chains = {"main": of_2022([{"i": 1}, {"i": 2}, {"i": 3}]),
              "older": of_2022(numbered(0, 3), legacy=True, meta={"by": "rig"})}
    vectors = {vector["canonical"]: vector["sig"] for vector in VECTORS}
    first = json.loads(chains["main"][0])
    assert vectors[canonical_bytes(first["body"]).decode()] == first["signature"]
    with closing(FeedLog(owner.storage_dir, message_size_bytes_max=1000)):
        pass
    with closing(sqlite3.connect(owner.storage_dir / DATABASE_NAME)) as connection, connection:
        feed_rows.insert_feed(connection, FEED, "from 2022", KEY.private_bytes_raw(), TIME_MS)
    with closing(FeedLog(owner.storage_dir, message_size_bytes_max=1000)) as log:
        for name, chain in chains.items():
            assert log.extend(FEED, subfeed_hash(name), 0, plain(chain)).error is None
    owner.start()
    for name, chain in chains.items():
        with owner.used():
            source = kf.load_feed("from 2022").load_subfeed(name)
        reader = seen(lab.nodes["B"], source)
        assert reader.get_next_messages(wait_msec=LONG_MSEC, signed=True) == plain(chain)
        source.append_messages([{"new": i} for i in range(2)])
        signed = [*plain(chain), *reader.get_next_messages(wait_msec=LONG_MSEC, signed=True)]
        assert signed == read_signed(source)
        assert [message["body"].get("version") for message in signed] == [None] * 3 + [2, 2]
        assert signed[3]["body"]["previousSignature"] == signed[2]["signature"]
        for message in signed:
            form = verify if message["body"].get("version") else verify_2022
            assert form(message["body"], message["signature"], FEED)
        [row] = lab.nodes["B"].json("feed", "verify", f"feed://{FEED}", name)
        assert (row["count"], row["forks"]) == (5, [])
    # A reader that comes later, from the beginning.
    assert list(islice(seen(extra("reads-both"), source).message_stream(signed=True), 5)) == signed
