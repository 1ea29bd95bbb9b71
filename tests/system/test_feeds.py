"""Feeds between nodes: followed live, read whole, relayed, and what becomes of them when somebody dies."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab
from kachery_fast.errors import (
    ChannelUnknown,
    FeedForked,
    FeedNotWritable,
    FeedUnknown,
    InvalidArgument,
    InvalidFeedUri,
    InvalidName,
    NodeNotRunning,
    NotPermitted,
    SubfeedNotAvailable,
    TooLarge,
)
from kachery_fast.protocol.names import subfeed_object_name
from tests.cli.commands import PROGRAM
from tests.system.feed_support import LONG_MSEC, extra, lab, made, numbered, read, read_signed, seen
from tests.system.support import finish, objects, wait_until

__all__ = ["extra", "lab"]


# --- when all goes well


def test_a_reader_sees_what_there_was_and_then_what_comes(lab: Lab) -> None:
    source = made(lab.nodes["A"])
    source.append_messages(numbered(0, 3))
    reader = seen(lab.nodes["B"], source)
    assert not reader.is_writeable
    assert reader.get_next_messages(wait_msec=LONG_MSEC) == numbered(0, 3)
    for i in range(3, 13):
        source.append_message({"i": i})
        assert reader.get_next_messages(wait_msec=LONG_MSEC) == [{"i": i}]
    assert reader.num_messages == reader.get_num_local_messages() == 13
    again = seen(lab.nodes["B"], source, channel="*local*")
    assert again.get_next_messages(wait_msec=0) == numbered(0, 13)
    assert [message["body"]["messageNumber"] for message in read_signed(again)] == list(range(13))


def test_a_subfeed_is_followed_from_before_its_first_message_on(lab: Lab) -> None:
    source = made(lab.nodes["A"])
    reader = seen(lab.nodes["B"], source)
    assert reader.get_next_messages(wait_msec=4000) == []  # the owner says that nothing is there yet
    stream = reader.message_stream()
    timer = threading.Timer(0.3, source.append_messages, [numbered(0, 2)])
    timer.start()
    assert list(islice(stream, 2)) == numbered(0, 2)
    timer.join()


def test_an_async_iterator_follows_another_node(lab: Lab) -> None:
    source = made(lab.nodes["A"])
    reader = seen(lab.nodes["B"], source)

    async def follow() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        async for message in reader:
            found.append(message)
            if len(found) == 5:
                return found
            await asyncio.to_thread(source.append_message, {"i": len(found)})
        raise AssertionError("the feed ended")

    source.append_message({"i": 0})
    assert asyncio.run(asyncio.wait_for(follow(), 60)) == numbered(0, 5)


def test_a_watch_waits_for_subfeeds_of_both_nodes(lab: Lab) -> None:
    a, b = lab.nodes["A"], lab.nodes["B"]
    theirs, ours = made(a), made(b)
    with b.used():
        watches = {"theirs": seen(b, theirs), "ours": kf.load_subfeed(ours.uri)}
        for _ in range(3):
            theirs.append_message({"from": "A"})
            assert kf.watch_for_new_messages(watches, wait_msec=LONG_MSEC) == {"theirs": [{"from": "A"}]}
            ours.append_message({"from": "B"})
            assert kf.watch_for_new_messages(watches, wait_msec=LONG_MSEC) == {"ours": [{"from": "B"}]}


def test_nothing_is_uploaded_before_a_reader_asks_and_then_not_one_object_a_message(lab: Lab) -> None:
    before = set(objects(lab.bucket_dir))
    source = made(lab.nodes["A"])
    source.append_messages(numbered(0, 3000))
    assert set(objects(lab.bucket_dir)) == before
    assert read(lab.nodes["B"], source) == numbered(0, 3000)
    assert len(set(objects(lab.bucket_dir)) - before) <= 3  # a segment or two, and the index


# Measured on two cores that others kept busy (load 5): 1.6 to 2.5 s, the first message after 0.4 to 0.6 s.
NEW_READER_SECONDS = 20


def test_ten_thousand_messages_reach_a_new_reader_in_seconds(lab: Lab) -> None:
    source = made(lab.nodes["A"])
    messages = [{"i": i, "text": f"spike {i} on electrode {i % 32}"} for i in range(10_000)]
    for start in range(0, 10_000, 1000):
        source.append_messages(messages[start:start + 1000])
    begun = time.monotonic()
    stream = seen(lab.nodes["B"], source).message_stream()
    assert list(islice(stream, 10_000)) == messages
    seconds = time.monotonic() - begun
    assert seconds < NEW_READER_SECONDS


def test_messages_too_long_for_a_band_arrive_live_all_the_same(lab: Lab) -> None:
    source = made(lab.nodes["A"])
    reader = seen(lab.nodes["B"], source)
    source.append_message({"i": 0})
    assert reader.get_next_messages(wait_msec=LONG_MSEC) == [{"i": 0}]
    for i in range(1, 4):
        long = {"i": i, "text": "x" * 900_000}
        source.append_message(long)
        assert reader.get_next_messages(wait_msec=LONG_MSEC) == [long]
        source.append_message({"i": i, "short": True})
        assert reader.get_next_messages(wait_msec=LONG_MSEC) == [{"i": i, "short": True}]


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b c?#%&é", "", "x" * 3000, {"type": "x", "n": [1, None]}])
def test_any_name_of_a_subfeed_travels(lab: Lab, name: Any) -> None:
    source = made(lab.nodes["A"], name)
    source.append_message({"name": str(name)[:10]})
    assert read(lab.nodes["B"], source) == [{"name": str(name)[:10]}]


def test_subfeeds_of_one_feed_are_apart(lab: Lab) -> None:
    source = made(lab.nodes["A"], "a")
    other = source.feed.load_subfeed("b")
    source.append_message({"in": "a"})
    other.append_message({"in": "b"})
    assert read(lab.nodes["B"], other) == [{"in": "b"}]
    assert read(lab.nodes["B"], source) == [{"in": "a"}]


# --- snapshots


def test_a_snapshot_loads_on_another_node_and_needs_no_node_afterwards(lab: Lab, extra: Any) -> None:
    a, reader = lab.nodes["A"], extra("snapshot-reader")
    source = made(a)
    source.append_messages(numbered(0, 5))
    with a.used():
        uri = source.feed.create_snapshot(["main"]).uri
    source.append_message({"i": 5})
    with reader.used():
        assert kf.load_feed(uri).load_subfeed("main").get_next_messages() == numbered(0, 5)
        reader.program.stop()
        found = kf.load_feed(uri)
        assert found.feed_id == source.feed.feed_id
        assert found.load_subfeed("main").get_next_messages(signed=True) == read_signed(source)[:5]


def test_a_copy_is_snapshot_and_exported_by_who_followed_it(lab: Lab, tmp_path: Path) -> None:
    b = lab.nodes["B"]
    source = made(lab.nodes["A"])
    source.append_messages(numbered(0, 5))
    reader = seen(b, source)
    assert reader.get_next_messages(wait_msec=LONG_MSEC) == numbered(0, 5)
    with b.used():
        assert reader.feed.create_snapshot(["main"]).load_subfeed("main").get_next_messages() == numbered(0, 5)
    export = tmp_path / "export.json"
    b.json("feed", "export", str(source.feed.feed_id), f"~{source.subfeed_hash}", "--dest", str(export))
    [row] = b.json("feed", "verify", str(export))
    assert (row["count"], row["forks"]) == (5, [])


# --- somebody dies


def test_a_copy_is_passed_on_when_the_owner_is_gone(lab: Lab, extra: Any) -> None:
    owner = extra("doomed")
    source = made(owner)
    source.append_messages(numbered(0, 500))
    assert read(lab.nodes["B"], source) == numbered(0, 500)
    source.append_message({"i": 500})
    reader = seen(lab.nodes["B"], source, position=500)
    assert reader.get_next_messages(wait_msec=LONG_MSEC) == [{"i": 500}]
    owner.program.kill()
    (lab.bucket_dir / "feeds").rename(lab.bucket_dir / "gone")  # so that the bucket has nothing of it
    assert read(extra("late-reader"), source) == numbered(0, 501)
    with pytest.raises(FeedNotWritable):
        reader.append_message({"i": 501})


def test_what_was_shared_is_read_with_no_provider_alive(lab: Lab, extra: Any) -> None:
    owner, first = extra("mortal"), extra("first-reader")
    source = made(owner)
    source.append_messages(numbered(0, 2000))
    assert read(first, source) == numbered(0, 2000)
    # The reader has the messages a moment before the index tells later readers of them.
    index = subfeed_object_name(lab.channel, str(source.feed.feed_id), source.subfeed_hash)
    wait_until((lab.bucket_dir.parent / index).exists, "all of it is shared")
    owner.program.kill()
    first.program.kill()
    assert read(extra("second-reader"), source) == numbered(0, 2000)


def test_an_owner_killed_between_append_and_share_loses_nothing(lab: Lab, extra: Any) -> None:
    owner = extra("killed")
    source = made(owner)
    source.append_messages(numbered(0, 10))
    owner.program.kill()
    with pytest.raises(SubfeedNotAvailable) as caught:
        read(lab.nodes["B"], source, wait_msec=4000)
    assert "bucket" in str(caught.value)
    assert caught.value.exit_code == 3
    owner.start()
    assert read(lab.nodes["B"], source) == numbered(0, 10)
    with owner.used():
        assert kf.load_subfeed(source.uri).append_message({"i": 10}) == 10
    assert seen(lab.nodes["B"], source, position=10).get_next_messages(wait_msec=LONG_MSEC) == [{"i": 10}]


def test_what_an_owner_acknowledged_before_it_was_killed_is_there_once_and_in_order(lab: Lab, extra: Any) -> None:
    owner = extra("busy")
    source = made(owner)
    acknowledged: list[list[int]] = [[] for _ in range(4)]
    in_doubt: list[str] = []

    def append(who: int) -> None:
        mine = source.feed.load_subfeed("main")
        try:
            for i in range(100_000):
                mine.append_message({"who": who, "i": i})
                acknowledged[who].append(i)
        except NodeNotRunning as error:
            in_doubt.append(str(error))

    threads = [threading.Thread(target=append, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(map(len, acknowledged)) >= 25, "every client has appended")
    owner.program.kill()
    for thread in threads:
        thread.join(30)
    assert len(in_doubt) == 4
    owner.start()
    with owner.used():
        found = kf.load_subfeed(source.uri).get_next_messages()
        assert found == read(lab.nodes["B"], source)
    for who, numbers in enumerate(acknowledged):
        mine = [message["i"] for message in found if message["who"] == who]
        assert mine in (numbers, [*numbers, len(numbers)])  # at most the one whose answer was lost, and that once


def test_a_reader_goes_on_when_the_owner_was_killed_in_mid_follow(lab: Lab, extra: Any) -> None:
    owner = extra("stumbling")
    source = made(owner)
    source.append_message({"i": 0})
    stream = seen(lab.nodes["B"], source).message_stream()
    assert next(stream) == {"i": 0}
    owner.program.kill()
    owner.start()
    with owner.used():
        source = kf.load_subfeed(source.uri)
    for i in range(1, 5):
        source.append_message({"i": i})
        assert next(stream) == {"i": i}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_follower_outlives_its_own_node(lab: Lab, extra: Any, number: int) -> None:
    node = extra("restarted")
    source = made(lab.nodes["A"])
    source.append_messages(numbered(0, 3))
    found: list[dict[str, Any]] = []
    subfeed = seen(node, source)

    def follow() -> None:
        for message in subfeed.message_stream():
            found.append(message)
            if len(found) == 9:
                return

    thread = threading.Thread(target=follow)
    thread.start()
    wait_until(lambda: len(found) == 3, "the first messages are there")
    if number == signal.SIGKILL:
        node.program.kill()
    else:
        node.program.stop()
    source.append_messages(numbered(3, 6))
    node.start()
    wait_until(lambda: len(found) == 6, "what was appended meanwhile is there", 60)
    source.append_messages(numbered(6, 9))
    thread.join(60)
    assert not thread.is_alive()
    assert found == numbered(0, 9)


# --- forks


def test_an_owner_that_signs_two_histories_is_found_out(lab: Lab, extra: Any, tmp_path: Path) -> None:
    """As when a backup of the owner's storage directory is used beside the original."""
    owner, twin = extra("owner"), extra("twin", start=False)
    reader = extra("witness")
    source = made(owner)
    source.append_message({"i": 0})
    owner.program.stop()
    twin.storage_dir.mkdir(exist_ok=True)
    for file in owner.storage_dir.glob("kachery-fast-feeds.db*"):
        shutil.copy2(file, twin.storage_dir)
    owner.start()
    twin.start()
    follower = seen(reader, source)
    assert follower.get_next_messages(wait_msec=LONG_MSEC) == [{"i": 0}]
    with owner.used():
        kf.load_subfeed(source.uri).append_message({"said by": "the owner"})
    with twin.used():
        kf.load_subfeed(source.uri).append_message({"said by": "the twin"})

    def forked() -> bool:
        try:
            seen(reader, source, position=1).get_next_messages(wait_msec=1000)
        except FeedForked:
            return True
        return False

    wait_until(forked, "the reader sees both", 60)
    prefix = seen(reader, source)
    assert prefix.get_next_messages(wait_msec=2000) == [{"i": 0}]
    with pytest.raises(FeedForked):
        prefix.get_next_messages(wait_msec=2000)
    done = reader.run("feed", "verify", source.feed.uri, "main")
    assert done.returncode == 6
    assert "signed two different messages number 1" in done.stderr.decode()
    assert "said by" in done.stdout.decode()
    evidence = json.loads(reader.run("feed", "verify", source.feed.uri, "main", "--json").stdout)[0]
    assert evidence["count"] == 1
    [fork] = evidence["forks"]
    assert {fork[which]["body"]["message"]["said by"] for which in ("first", "second")} == {"the owner", "the twin"}


def test_an_owner_that_goes_on_from_an_old_backup_is_found_out(lab: Lab, extra: Any, tmp_path: Path) -> None:
    """The reader holds more than the backup had, and hears of no message again that it holds."""
    owner, reader = extra("backup-owner"), extra("backup-reader")
    source = made(owner)
    source.append_messages(numbered(0, 3))
    owner.program.stop()
    for file in owner.storage_dir.glob("kachery-fast-feeds.db*"):
        shutil.copy2(file, tmp_path)
    owner.start()
    source.append_messages(numbered(3, 6))
    follower = seen(reader, source)
    found: list[Any] = []
    while len(found) < 6:
        found += follower.get_next_messages(wait_msec=LONG_MSEC)
    owner.program.stop()
    for file in owner.storage_dir.glob("kachery-fast-feeds.db*"):
        file.unlink()
    for file in tmp_path.glob("kachery-fast-feeds.db*"):
        shutil.copy2(file, owner.storage_dir)
    owner.start()
    source.append_messages(numbered(100, 107))

    def forked() -> bool:
        try:
            follower.get_next_messages(wait_msec=1000)
        except FeedForked:
            return True
        return False

    wait_until(forked, "the reader sees the other history", 120)
    [fork] = json.loads(reader.run("feed", "verify", source.feed.uri, "main", "--json").stdout)[0]["forks"]
    assert fork["number"] == 5
    assert (fork["first"]["body"]["message"], fork["second"]["body"]["message"]) == ({"i": 5}, {"i": 102})


# --- permissions


def test_a_node_that_may_not_request_feeds_is_told_how_it_could(lab: Lab, extra: Any) -> None:
    source = made(lab.nodes["A"])
    source.append_message({"i": 0})
    stranger = extra("no-requests", permissions=["provideFeeds", "requestFiles", "requestTasks"])
    for wait_msec in (0, 2000):
        with pytest.raises(NotPermitted, match="requestFeeds") as caught:
            read(stranger, source, wait_msec)
        assert f"channel grant {lab.channel}" in str(caught.value)
    assert stranger.run("feed", "read", source.uri).returncode == 4
    node_id = str(stranger.connection.info()["nodeId"])
    lab.owner("grant", lab.channel, node_id, "requestFeeds")
    wait_until(lambda: stranger.run("feed", "read", source.uri).returncode == 0, "the grant takes effect", 60)


def test_a_node_that_may_not_provide_feeds_keeps_its_own_to_itself(lab: Lab, extra: Any) -> None:
    secretive = extra("no-providing", permissions=["requestFeeds", "provideFiles", "provideTasks"])
    source = made(secretive)
    source.append_message({"i": 0})
    before = set(objects(lab.bucket_dir))
    with pytest.raises(SubfeedNotAvailable):
        read(lab.nodes["B"], source, 4000)
    assert set(objects(lab.bucket_dir)) == before
    assert read(secretive, source) == [{"i": 0}]  # reading its own needs no permission
    node_id = str(secretive.connection.info()["nodeId"])
    lab.owner("grant", lab.channel, node_id, "provideFeeds")

    def readable() -> bool:
        try:
            return read(lab.nodes["B"], source, 4000) == [{"i": 0}]
        except SubfeedNotAvailable:
            return False

    wait_until(readable, "the grant takes effect", 60)


def test_a_permission_that_is_taken_away_ends_the_following(lab: Lab, extra: Any) -> None:
    reader = extra("demoted")
    source = made(lab.nodes["A"])
    source.append_message({"i": 0})
    stream = seen(reader, source).message_stream()
    assert next(stream) == {"i": 0}
    lab.owner("revoke", lab.channel, str(reader.connection.info()["nodeId"]), "requestFeeds")
    with pytest.raises(NotPermitted, match="requestFeeds"):
        next(stream)
    assert seen(reader, source, channel="*local*").get_next_messages() == [{"i": 0}]  # what it has, it has


# --- what users do wrong


def test_a_feed_that_nobody_has_is_reported_with_what_was_tried(lab: Lab) -> None:
    b = lab.nodes["B"]
    uri = "feed://" + "ab" * 32 + "/main"
    with b.used(), pytest.raises(SubfeedNotAvailable, match=r"asked \d+ nodes? \d times") as caught:
        kf.load_subfeed(uri).get_next_messages(wait_msec=4000)
    assert "bucket" in str(caught.value)
    done = b.run("feed", "read", uri, "--wait", "4")
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.decode().startswith(f"Error: {uri} could not be read from the channel 'demo'")
    with pytest.raises(ChannelUnknown, match="it is on: demo"):
        b.json("feed", "read", uri, "--channel", "elsewhere")
    with b.used():
        assert kf.load_subfeed(uri).get_next_messages(wait_msec=10) == []  # no time for an answer


def test_a_watch_of_what_nobody_has_says_so_and_waits(lab: Lab) -> None:
    b = lab.nodes["B"]
    uri = "feed://" + "ac" * 32 + "/main"
    watcher = b.begin("feed", "watch", uri)
    assert watcher.stderr is not None
    line = watcher.stderr.readline().decode()
    assert line.startswith(f"{uri} is waited for: nobody on the channel has answered for it yet. Tried: bucket: ")
    assert watcher.poll() is None
    watcher.send_signal(signal.SIGINT)
    assert watcher.wait(20) == 130
    watcher.communicate()


def test_only_the_owner_appends(lab: Lab) -> None:
    b = lab.nodes["B"]
    source = made(lab.nodes["A"])
    source.append_message({"i": 0})
    assert read(b, source) == [{"i": 0}]
    with pytest.raises(FeedNotWritable, match="Only the node that made a feed extends it"):
        b.json("feed", "append", source.uri, '{"i": 1}')
    answer = b.connection
    with pytest.raises(FeedNotWritable):  # the node itself refuses, whatever a client says
        answer.call("/api/feed/append", {"feedId": source.feed.feed_id, "subfeed": "main", "messages": [{"i": 1}]})
    with pytest.raises(FeedUnknown):
        answer.call("/api/feed/append", {"feedId": "ab" * 32, "subfeed": "main", "messages": [{"i": 1}]})
    assert source.num_messages == 1


@pytest.mark.parametrize(("message", "error"), [
    ("text", InvalidArgument), ("7", InvalidArgument), ("[{}]", InvalidArgument), ("{", InvalidArgument),
    ('{"x": NaN}', InvalidArgument), ('{"x": Infinity}', InvalidArgument),
    ('{"x": 1' + "0" * 400 + "}", InvalidArgument),
    ("{" + '"x": {' * 5000, InvalidArgument), ('{"x": "\\ud800"}', InvalidArgument),
])
def test_malformed_messages_are_usage_errors(lab: Lab, message: str, error: type[Exception]) -> None:
    source = made(lab.nodes["A"])
    with pytest.raises(error) as caught:
        lab.nodes["A"].json("feed", "append", source.uri, '{"i": 0}', message)
    assert getattr(caught.value, "exit_code", None) == 2
    assert source.num_messages == 0


def test_a_message_that_is_too_long_is_refused_and_the_setting_named(lab: Lab, tmp_path: Path) -> None:
    a = lab.nodes["A"]
    source = made(a)
    text = tmp_path / "long.json"
    text.write_text('{"i": 0}\n{"x": "' + "y" * (1024 * 1024) + '"}\n')
    with text.open("rb") as lines:
        done = subprocess.run([*PROGRAM, "feed", "append", source.uri], env=a.environ, stdin=lines, capture_output=True,
                              timeout=60, check=False)
    assert done.returncode == TooLarge.exit_code
    assert b"feed_message_size_bytes_max" in done.stderr


@pytest.mark.parametrize(("command", "error"), [
    (["read", "feed://nonsense/main"], InvalidFeedUri), (["read", "never-made/main"], FeedUnknown),
    (["read", "no-subfeed"], InvalidArgument), (["create", "feed://x"], InvalidName),
    (["append", "x/~short", "{}"], FeedUnknown), (["export", "never-made"], FeedUnknown),
    (["delete", "never-made", "--yes"], FeedUnknown), (["info", "feed://" + "cd" * 32], FeedUnknown),
    (["verify", "never-made"], FeedUnknown),
])
def test_names_that_lead_nowhere_are_errors_of_their_own_kind(
        lab: Lab, command: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        lab.nodes["A"].json("feed", *command)


# --- the command line


def test_one_appends_and_another_watches(lab: Lab) -> None:
    a, b = lab.nodes["A"], lab.nodes["B"]
    uri = a.json("feed", "create", "live")["uri"]
    assert a.json("feed", "append", "live/main", '{"i": 0}') == {"uri": f"{uri}/main", "first": 0, "end": 1}
    watcher = b.begin("feed", "watch", f"{uri}/main", "--max", "4")
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline()) == {"i": 0}
    writer = subprocess.Popen([*PROGRAM, "feed", "append", "live/main", "--json"], env=a.environ, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdin is not None
    for i in range(1, 4):
        writer.stdin.write(b'{"i": %d}\n' % i)
        writer.stdin.flush()
        assert json.loads(watcher.stdout.readline()) == {"i": i}  # each line goes at once, though more may come
    assert watcher.wait(30) == 0
    watcher.communicate()
    assert finish(writer) == {"uri": f"{uri}/main", "first": 1, "end": 4}
    assert b.json("feed", "read", f"{uri}/main", "--position", "2")["messages"] == numbered(2, 4)


def test_a_watch_of_several_outlives_a_restart_of_the_node(lab: Lab, extra: Any) -> None:
    node = extra("restarted-watcher")
    source = made(lab.nodes["A"], "a")
    other = source.feed.load_subfeed("b")
    source.append_message({"i": 0})
    watcher = node.begin("feed", "watch", source.uri, other.uri, "--max", "3")
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline()) == {"uri": source.uri, "number": 0, "message": {"i": 0}}
    node.program.kill()
    node.start()
    other.append_message({"j": 0})
    assert json.loads(watcher.stdout.readline()) == {"uri": other.uri, "number": 0, "message": {"j": 0}}
    source.append_message({"i": 1})
    assert json.loads(watcher.stdout.readline()) == {"uri": source.uri, "number": 1, "message": {"i": 1}}
    assert watcher.wait(30) == 0
    watcher.communicate()


def test_a_watch_ends_with_ctrl_c(lab: Lab) -> None:
    source = made(lab.nodes["A"])
    source.append_message({"i": 0})
    watcher = lab.nodes["B"].begin("feed", "watch", source.uri)
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline()) == {"i": 0}
    watcher.send_signal(signal.SIGINT)
    assert watcher.wait(20) == 130
    out, err = watcher.communicate()
    assert (out, err) == (b"", b"Interrupted.\n")


# --- the page


def test_what_the_page_shows_runs_in_the_order_it_is_shown(lab: Lab) -> None:
    page = (Path(__file__).parents[2] / "docs" / "feeds.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    [example] = set(re.findall(r"feed://([0-9a-f]{64})", page))
    a, b = lab.nodes["A"], lab.nodes["B"]
    feed_id = str(a.json("feed", "create", "rig 2")["feedId"])
    printed = []
    for number, block in enumerate(blocks):
        node = b if example in block or "async" in block else a
        code = block.replace(example, feed_id).replace('"lab"', f'"{lab.channel}"')
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=node.environ, capture_output=True,
                              text=True, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, ""), (number, done)
        printed.append(done.stdout)
    trials = [{"trial": 1, "outcome": "hit", "latency_ms": 412.5}, {"trial": 2, "outcome": "miss"},
              {"trial": 3, "outcome": "hit"}]
    assert printed[0] == f"feed://{feed_id}/trials\n"
    assert printed[1] == "1 hit\n2 miss\n3 hit\n"
    assert [ast.literal_eval(line) for line in printed[2].splitlines()] == trials
    lines = printed[3].splitlines()
    assert (lines[0], ast.literal_eval(lines[1]), lines[2].split()[0]) == ("3 3", trials[1], "2")
    name, _, messages = printed[4].partition(" ")
    assert (name, ast.literal_eval(messages)) == ("trials", trials)
    assert re.fullmatch(r"sha1://[0-9a-f]{40}/feed\.json\n.*\n", printed[5])
    assert ast.literal_eval(printed[5].splitlines()[1]) == trials
    assert len(printed) == 6
