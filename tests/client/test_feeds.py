"""Feeds through the Python API, on a node of their own that is on no channel."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client.feed_checks import check_subfeed
from kachery_fast.client.feed_sources import Pauses
from kachery_fast.client.keeping import NoAnswer
from kachery_fast.protocol.names import subfeed_hash
from tests.cli.commands import Program

STRANGER = "ab" * 32


@pytest.fixture
def feed(node: Program) -> kf.Feed:
    """A fresh feed of the module's node."""
    return kf.create_feed()


@pytest.fixture
def main(feed: kf.Feed) -> kf.Subfeed:
    """A fresh subfeed, in which nothing is yet."""
    return feed.load_subfeed("main")


# --- feeds by name


def test_a_feed_is_found_by_its_name_its_uri_and_its_id(node: Program) -> None:
    made = kf.create_feed("experiment 7/öffentlich")
    assert made.is_writeable
    assert not made.is_snapshot
    assert made.uri == f"feed://{made.feed_id}"
    assert made.feed_id is not None
    for name in ("experiment 7/öffentlich", made.uri, made.feed_id):
        found = kf.load_feed(name)
        assert (found.feed_id, found.uri, found.is_writeable) == (made.feed_id, made.uri, True)
    assert kf.get_feed_id("experiment 7/öffentlich") == made.feed_id


def test_the_same_name_gives_the_same_feed(node: Program) -> None:
    first = kf.create_feed("twice")
    first.load_subfeed("main").append_message({"i": 0})
    assert kf.create_feed("twice").feed_id == kf.create_feed(feed_name="twice").feed_id == first.feed_id
    assert kf.load_feed("twice", create=True).load_subfeed("main").num_messages == 1
    assert kf.get_feed_id("twice", create=True) == first.feed_id
    assert kf.create_feed().feed_id != kf.create_feed().feed_id


def test_a_name_that_is_not_known_is_an_error_or_made(node: Program) -> None:
    for ask in (kf.load_feed, kf.get_feed_id, kf.delete_feed):
        with pytest.raises(errors.FeedUnknown, match="kachery-fast feed list"):
            ask("never made")
    assert kf.load_feed("made now", create=True).is_writeable
    assert kf.get_feed_id("made too", create=True) == kf.load_feed("made too").feed_id


@pytest.mark.parametrize("name", ["", "feed://x", "http://x", "ab" * 32, "sha1://" + "0" * 40, 7, "x" * 2000, "\ud800"])
def test_what_could_be_taken_for_something_else_is_no_name(node: Program, name: Any) -> None:
    for make in (kf.create_feed, lambda name: kf.get_feed_id(name, create=True)):
        with pytest.raises(errors.InvalidArgument):
            make(name)


def test_a_feed_is_named_by_a_text(node: Program) -> None:
    names: list[Any] = [None, 7, b"bytes", Path("x")]
    for ask in (kf.load_feed, kf.load_subfeed, kf.delete_feed, kf.get_feed_id):
        for name in names:
            with pytest.raises(errors.InvalidArgument):
                ask(name)


@pytest.mark.parametrize("uri", ["feed://", "feed://xyz", "feed://" + "AB" * 32, "http://" + STRANGER,
                                 f"feed://{STRANGER}/main", f"feed://{STRANGER}/~xyz"])
def test_a_malformed_uri_of_a_feed_is_a_usage_error(node: Program, uri: str) -> None:
    with pytest.raises(errors.InvalidFeedUri):
        kf.load_feed(uri)


def test_a_deleted_feed_is_gone_for_ever(node: Program) -> None:
    feed = kf.create_feed("short-lived")
    feed.load_subfeed("main").append_message({"i": 0})
    feed.delete()
    for again in ("short-lived", feed.uri):
        with pytest.raises(errors.FeedUnknown):
            kf.delete_feed(again)
    assert not kf.load_feed(feed.uri).is_writeable
    with pytest.raises((errors.FeedUnknown, errors.FeedNotWritable)):
        feed.load_subfeed("main").append_message({"i": 1})
    assert kf.create_feed("short-lived").feed_id != feed.feed_id


def test_feeds_are_listed_and_described(node: Program) -> None:
    feed = kf.create_feed("listed")
    feed.load_subfeed("main").append_messages([{"i": 0}, {"i": 1}])
    feed.load_subfeed({"type": "x", "n": 1}).append_message({})
    found = {row["feedId"]: row for row in kf.list_feeds()}[feed.feed_id]
    assert found == feed.describe()
    assert (found["name"], found["writable"]) == ("listed", True)
    counts = {row["subfeed"]: (row["name"], row["count"], row["forkedAt"]) for row in found["subfeeds"]}
    assert counts == {subfeed_hash("main"): ("main", 2, None),
                      subfeed_hash({"n": 1, "type": "x"}): ({"type": "x", "n": 1}, 1, None)}


# --- subfeeds


@pytest.mark.parametrize("name", ["main", "", "a/b", "../..", " spaces ", "ü?#&%", "~" + "ab" * 20, "x" * 5000, "\0",
                                  {"type": "x", "k": [1, {"y": None}]}, {}])
def test_any_text_or_dict_names_a_subfeed_and_its_uri_leads_there(feed: kf.Feed, name: Any) -> None:
    subfeed = feed.load_subfeed(name)
    assert (subfeed.name, subfeed.subfeed_name, subfeed.feed) == (name, name, feed)
    assert subfeed.subfeed_hash == subfeed_hash(name)
    assert subfeed.append_message({"here": 1}) == 0
    again = kf.load_subfeed(subfeed.uri)
    assert again.get_next_messages() == [{"here": 1}]
    assert again.is_writeable
    assert feed.load_subfeed(f"~{subfeed.subfeed_hash}").num_messages == 1
    assert feed.load_subfeed("other").num_messages == 0


@pytest.mark.parametrize("name", [None, 7, ["main"], "~short", "~" + "AB" * 20, "\ud800", {"x": math.nan}, {"x": {1}}])
def test_nothing_else_names_one(feed: kf.Feed, name: Any) -> None:
    with pytest.raises(errors.InvalidName, match="the name of a subfeed"):
        feed.load_subfeed(name)


def test_a_uri_that_names_no_subfeed_is_refused(feed: kf.Feed) -> None:
    with pytest.raises(errors.InvalidFeedUri, match="names a feed"):
        kf.load_subfeed(feed.uri)
    with pytest.raises(errors.InvalidName, match="channel"):
        feed.load_subfeed("main", channel="no such/channel")


# --- appending and reading


def test_messages_come_back_as_they_were_appended(main: kf.Subfeed) -> None:
    messages: list[dict[str, Any]] = [
        {}, {"text": "é\u2028\0\U0001f600"}, {"deep": [[[[]]]]},
        {"n": [1, 1.5, -0.0, 1e300, 2**53 - 1, None, True, {"": {}}]}]
    assert main.append_message(messages[0]) == 0
    assert main.append_messages(messages[1:]) == range(1, 4)
    assert main.get_next_messages() == messages
    assert (main.position, main.num_messages, main.get_num_local_messages()) == (4, 4, 4)
    assert main.get_next_messages() == []
    assert main.get_next_message(wait_msec=0) is None


def test_the_position_says_what_is_read_next(main: kf.Subfeed) -> None:
    main.append_messages([{"i": i} for i in range(10)])
    assert main.get_next_messages(max_num_messages=3) == [{"i": 0}, {"i": 1}, {"i": 2}]
    assert main.get_next_message() == {"i": 3}
    assert main.position == 4
    assert main.get_next_messages(advance_position=False, max_num_messages=1) == [{"i": 4}]
    assert main.get_next_message(advance_position=False) == {"i": 4}
    main.position = 8
    assert main.get_next_messages(max_num_messages=0) == [{"i": 8}, {"i": 9}]
    main.set_position(0)
    assert len(main.get_next_messages()) == 10
    assert main.feed.load_subfeed("main", position=9).get_next_messages() == [{"i": 9}]
    main.position = 1000
    assert main.get_next_messages() == []
    assert main.position == 1000


@pytest.mark.parametrize("position", [-1, 1.5, "0", None, True])
def test_a_position_is_a_number_of_a_message(main: kf.Subfeed, position: Any) -> None:
    with pytest.raises(errors.InvalidArgument, match="position"):
        main.position = position
    with pytest.raises(errors.InvalidArgument, match="position"):
        main.feed.load_subfeed("main", position=position)


@pytest.mark.parametrize("arguments", [{"wait_msec": -1}, {"wait_msec": math.nan}, {"wait_msec": "5"},
                                       {"max_num_messages": -1}, {"max_num_messages": "3"}])
def test_a_wait_and_a_limit_are_numbers_from_0_on(main: kf.Subfeed, arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidArgument, match=r"number|count"):
        main.get_next_messages(**arguments)
    with pytest.raises(errors.InvalidArgument, match=r"number|count"):
        kf.watch_for_new_messages({"w": main}, **{"wait_msec": 0, **arguments})


def test_signed_messages_say_when_and_in_which_order(main: kf.Subfeed) -> None:
    before = time.time() * 1000
    main.append_messages([{"i": 0}, {"i": 1}])
    first, second = main.get_next_messages(signed=True)
    assert (first["body"]["message"], first["body"]["messageNumber"], first["body"]["version"]) == ({"i": 0}, 0, 2)
    assert before - 1 <= first["body"]["timestamp"] <= time.time() * 1000 + 1
    assert second["body"]["previousSignature"] == first["signature"]
    assert second["body"]["subfeed"] == main.subfeed_hash
    assert check_subfeed(main.feed, "main")[1] == 2


def test_more_than_one_answer_holds_is_read_whole(main: kf.Subfeed) -> None:
    messages = [{"i": i, "text": "x" * 500_000} for i in range(25)]
    main.append_messages(messages)
    assert main.get_next_messages() == messages
    main.position = 0
    assert main.get_next_messages(max_num_messages=20) == messages[:20]
    assert check_subfeed(main.feed, "main")[1] == 25


@pytest.mark.parametrize("message", ["text", None, 7, [1], {"x": math.nan}, {"x": math.inf}, {"x": b"bytes"},
                                     {"x": {1, 2}}, {"x": 2**53}, {"x": "\ud800"}, {(1, 2): 3}])
def test_a_message_that_is_no_json_object_is_refused_with_all_of_its_batch(main: kf.Subfeed, message: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        main.append_message(message)
    with pytest.raises(errors.InvalidArgument):
        main.append_messages([{"i": 0}, message, {"i": 2}])
    assert main.num_messages == 0
    assert main.append_message({"i": 0}) == 0


def test_the_message_that_is_wrong_is_named(main: kf.Subfeed) -> None:
    with pytest.raises(errors.InvalidArgument, match="Message 1 of these"):
        main.append_messages([{"i": 0}, {"x": math.nan}])
    with pytest.raises(errors.InvalidArgument, match="takes a list"):
        main.append_messages({"i": 0})  # type: ignore[arg-type]
    assert main.append_messages([]) == range(0)


def test_a_message_that_refers_to_itself_is_refused(main: kf.Subfeed) -> None:
    message: dict[str, Any] = {}
    message["self"] = message
    with pytest.raises(errors.InvalidArgument, match="cannot be written as JSON"):
        main.append_message(message)


def test_a_message_or_batch_that_is_too_long_is_refused_and_the_limit_named(main: kf.Subfeed) -> None:
    with pytest.raises(errors.TooLarge, match="feed_message_size_bytes_max"):
        main.append_messages([{"i": 0}, {"x": "y" * (1024 * 1024)}])
    with pytest.raises(errors.TooLarge, match="feed_batch_size_bytes_max"):
        main.append_messages([{"x": "y" * 900_000}] * 80)
    assert main.num_messages == 0
    assert main.append_message({"x": "y" * (1024 * 1024 - 8)}) == 0


def test_appends_of_many_threads_are_ordered_and_batches_stay_whole(main: kf.Subfeed) -> None:
    def work(who: int) -> list[range]:
        mine = main.feed.load_subfeed("main")
        return [mine.append_messages([{"who": who, "batch": batch, "i": i} for i in range(5)]) for batch in range(20)]

    with ThreadPoolExecutor(6) as pool:
        numbers = dict(enumerate(pool.map(work, range(6))))
    found = main.get_next_messages()
    assert len(found) == 600
    for who, ranges in numbers.items():
        assert [where.start for where in ranges] == sorted(where.start for where in ranges)
        for batch, where in enumerate(ranges):
            assert [found[number] for number in where] == [{"who": who, "batch": batch, "i": i} for i in range(5)]


def test_a_feed_of_another_node_is_not_written(node: Program) -> None:
    feed = kf.load_feed(f"feed://{STRANGER}")
    assert not feed.is_writeable
    with pytest.raises(errors.FeedNotWritable, match="does not own it") as caught:
        feed.load_subfeed("main").append_message({"i": 0})
    assert caught.value.exit_code == 4
    with pytest.raises(errors.FeedUnknown):
        feed.describe()
    with pytest.raises(errors.FeedUnknown):
        feed.delete()


def test_a_feed_of_another_node_needs_a_channel_and_is_not_silently_empty(node: Program) -> None:
    subfeed = kf.load_subfeed(f"feed://{STRANGER}/main")
    assert subfeed.channel is None
    with pytest.raises(errors.NoChannel, match="KACHERY_CHANNEL"):
        subfeed.get_next_messages(wait_msec=100)
    with pytest.raises(errors.ChannelUnknown, match="it is on: none"):
        kf.load_subfeed(f"feed://{STRANGER}/main", channel="lab").get_next_messages(wait_msec=100)
    local = kf.load_subfeed(f"feed://{STRANGER}/main", channel="*local*")
    assert local.get_next_messages(wait_msec=100) == []
    assert local.num_messages == local.get_num_local_messages() == 0
    with pytest.raises(errors.SubfeedNotAvailable, match="this node holds nothing of it"):
        local.feed.create_snapshot(["main"])


# --- waiting


def append_later(subfeed: kf.Subfeed, *messages: dict[str, Any]) -> threading.Timer:
    timer = threading.Timer(0.2, subfeed.append_messages, [list(messages)])
    timer.start()
    return timer


def test_a_reader_that_waits_gets_the_message_when_it_comes(main: kf.Subfeed) -> None:
    timer = append_later(main, {"i": 0}, {"i": 1})
    begun = time.monotonic()
    assert main.feed.load_subfeed("main").get_next_messages(wait_msec=1e12) == [{"i": 0}, {"i": 1}]
    assert time.monotonic() - begun < 30
    timer.join()
    begun = time.monotonic()
    assert main.feed.load_subfeed("main", position=2).get_next_messages(wait_msec=300) == []
    assert time.monotonic() - begun >= 0.29


def test_a_stream_yields_what_is_there_and_what_comes(main: kf.Subfeed) -> None:
    main.append_messages([{"i": 0}, {"i": 1}])
    reader = main.feed.load_subfeed("main")
    stream = reader.message_stream()
    assert list(islice(stream, 2)) == [{"i": 0}, {"i": 1}]
    assert reader.position == 2
    timer = append_later(main, {"i": 2}, {"i": 3})
    assert next(stream) == {"i": 2}
    assert reader.position == 3
    timer.join()
    reader.position = 1
    assert [next(stream) for _ in range(3)] == [{"i": 1}, {"i": 2}, {"i": 3}]
    signed = next(iter(main.feed.load_subfeed("main", position=3).message_stream(signed=True)))
    assert signed["body"]["messageNumber"] == 3


async def take(subfeed: kf.Subfeed, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async for message in subfeed:
        found.append(message)
        if len(found) == count:
            return found
    raise AssertionError("the feed ended")


def test_an_async_iterator_follows_many_subfeeds_at_once(feed: kf.Feed) -> None:
    """More of them than threads that a loop has for waiting."""
    async def follow() -> list[list[dict[str, Any]]]:
        tasks = [asyncio.create_task(take(feed.load_subfeed(f"s{i}"), 2)) for i in range(40)]
        await asyncio.sleep(0.2)  # most of them wait now
        await asyncio.to_thread(lambda: [feed.load_subfeed(f"s{i}").append_messages([{"i": i}, {}]) for i in range(40)])
        return await asyncio.gather(*tasks)

    begun = time.monotonic()
    assert asyncio.run(follow(), debug=True) == [[{"i": i}, {}] for i in range(40)]
    assert time.monotonic() - begun < 30


def test_a_cancelled_async_iterator_ends_at_once_and_loses_nothing(main: kf.Subfeed) -> None:
    reader = main.feed.load_subfeed("main")

    async def cancel() -> float:
        task = asyncio.create_task(take(reader, 1))
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - begun

    assert asyncio.run(cancel()) < 4  # what it had asked would have been answered after 5 s
    end = time.monotonic() + 20
    while any(thread.name == "kachery-fast feed" for thread in threading.enumerate()):
        assert time.monotonic() < end, "the thread that asked still waits"
        time.sleep(0.01)
    assert reader.position == 0
    main.append_message({"i": 0})
    assert asyncio.run(take(reader, 1)) == [{"i": 0}]


# --- watching


def test_a_watch_returns_those_that_have_news(feed: kf.Feed) -> None:
    a, b = feed.load_subfeed("a"), feed.load_subfeed("b")
    a.append_messages([{"i": 0}, {"i": 1}])
    assert kf.watch_for_new_messages({"a": a, "b": b}, wait_msec=0) == {"a": [{"i": 0}, {"i": 1}]}
    assert (a.position, b.position) == (2, 0)
    timer = append_later(b, {"j": 0})
    assert kf.watch_for_new_messages({"a": a, "b": b}, wait_msec=60_000) == {"b": [{"j": 0}]}
    timer.join()
    assert kf.watch_for_new_messages({"a": a, "b": b}, wait_msec=100) == {}
    assert kf.watch_for_new_messages({}, wait_msec=0) == {}


def test_a_watch_may_be_the_dict_of_2022(feed: kf.Feed) -> None:
    a = feed.load_subfeed("a")
    a.append_messages([{"i": i} for i in range(3)])
    watches = {"w1": {"feedId": feed.feed_id, "subfeedHash": a.subfeed_hash, "position": 2},
               "w2": {"feedId": feed.feed_id, "subfeedName": "a", "position": 0},
               "w3": {"feedId": feed.feed_id, "subfeedName": "b", "position": 0}}
    found = kf.watch_for_new_messages(watches, wait_msec=10, max_num_messages=2)
    assert found == {"w1": [{"i": 2}], "w2": [{"i": 0}, {"i": 1}]}
    signed = kf.watch_for_new_messages(watches, wait_msec=10, signed=True)
    assert signed["w1"][0]["body"]["messageNumber"] == 2


@pytest.mark.parametrize("watch", [None, {}, {"feedId": STRANGER}, {"feedId": "x", "subfeedName": "a"},
                                   {"feedId": STRANGER, "subfeedHash": "x"}])
def test_what_is_no_watch_is_refused(node: Program, watch: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        kf.watch_for_new_messages({"w": watch}, wait_msec=0)


# --- snapshots


def test_a_snapshot_is_what_was_there_and_stays_so(feed: kf.Feed) -> None:
    a, typed = feed.load_subfeed("a"), feed.load_subfeed({"type": "x"})
    a.append_messages([{"i": 0}, {"i": 1}])
    typed.append_message({"k": 1})
    snapshot = feed.create_snapshot(["a", {"type": "x"}, "never"])
    a.append_message({"i": 2})
    assert (snapshot.is_snapshot, snapshot.feed_id) == (True, feed.feed_id)
    again = kf.load_feed(snapshot.uri)
    assert again.load_subfeed("a").get_next_messages() == [{"i": 0}, {"i": 1}]
    assert again.load_subfeed({"type": "x"}).get_next_messages() == [{"k": 1}]
    assert again.load_subfeed("never").num_messages == 0
    a.position = 0
    assert again.load_subfeed("a").get_next_messages(signed=True) == a.get_next_messages(signed=True)[:2]
    assert check_subfeed(again, "a").error is None
    with pytest.raises(errors.InvalidArgument, match="in a list"):
        feed.create_snapshot("a")


# --- the node goes away


def test_what_needs_a_node_says_so_when_there_is_none(program: Program) -> None:
    for ask in (kf.list_feeds, kf.create_feed, lambda: kf.load_feed("x"), lambda: kf.get_feed_id("x"),
                lambda: kf.load_feed(f"feed://{STRANGER}"), lambda: kf.load_subfeed(f"feed://{STRANGER}/main"),
                lambda: kf.delete_feed("x"), lambda: kf.watch_for_new_messages({}, wait_msec=0)):
        with pytest.raises(errors.NodeNotRunning, match="kachery-fast node start"):
            ask()


@pytest.fixture
def restarting(program: Program) -> Iterator[Program]:
    """A node of a test's own."""
    with program.node():
        yield program


def restart(program: Program) -> None:
    program.ok("node", "stop")
    program.ok("node", "start", "--detach")


def test_a_stream_outlives_a_restart_of_the_node_and_nothing_is_lost_or_doubled(restarting: Program) -> None:
    feed = kf.create_feed("kept")
    main = feed.load_subfeed("main")
    main.append_messages([{"i": 0}, {"i": 1}])
    sync, found = feed.load_subfeed("main"), list[dict[str, Any]]()
    follower = threading.Thread(target=lambda: found.extend(islice(sync.message_stream(), 4)))
    follower.start()

    async def follow() -> list[dict[str, Any]]:
        return await take(feed.load_subfeed("main"), 4)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(asyncio.run, follow())
        while len(found) == 0 and sync.position < 2:
            time.sleep(0.01)
        restart(restarting)
        assert kf.load_feed("kept").load_subfeed("main").append_messages([{"i": 2}, {"i": 3}]) == range(2, 4)
        assert main.append_message({"i": 4}) == 4  # over a connection of before
        follower.join(60)
        assert not follower.is_alive()
        assert found == other.result(60) == [{"i": i} for i in range(4)]


def test_a_stream_gives_up_on_a_node_that_stays_away(restarting: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KACHERY_PATIENCE_SECONDS", "0.5")
    main = kf.create_feed("x").load_subfeed("main")
    main.append_message({"i": 0})
    stream = main.message_stream()
    assert next(stream) == {"i": 0}
    restarting.ok("node", "stop")
    with pytest.raises(errors.NodeNotRunning):
        next(stream)
    with pytest.raises(errors.NodeNotRunning):  # one that has never answered is not waited for
        next(main.message_stream())


def test_pauses_grow_and_end() -> None:
    error = errors.NodeNotRunning(url="x", why="y")
    pauses = Pauses(1000.0)
    with pytest.raises(errors.NodeNotRunning):
        pauses.after(error)
    pauses.answered()
    assert [pauses.after(error) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    pauses.answered()
    assert pauses.after(error) == 0.1
    pauses = Pauses(0.0)
    pauses.answered()
    pauses.after(error)
    with pytest.raises(errors.NodeNotRunning):
        pauses.after(error)


def test_an_append_without_an_answer_is_said_to_be_in_doubt(
        main: kf.Subfeed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node ends after it read the request and before it answered: nobody can know."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("KACHERY_DAEMON_PORT", str(listener.getsockname()[1]))
        asked = json.dumps({"feedId": main.feed.feed_id, "writable": True, "subfeeds": []}).encode()

        def serve() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.recv(65536)
                caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(asked) + asked)
                caller.recv(65536)

        thread = threading.Thread(target=serve)
        thread.start()
        doubtful = kf.load_feed(main.feed.uri).load_subfeed("main")
        with pytest.raises(errors.NodeNotRunning, match="whether the messages were appended is not known") as caught:
            doubtful.append_message({"i": 0})
        thread.join()
    assert isinstance(caught.value.__cause__, errors.NodeNotRunning)
    assert isinstance(caught.value.__cause__.__cause__, NoAnswer)


def test_feeds_are_in_the_front_room(store_dir: Path) -> None:
    assert {"Feed", "Subfeed", "create_feed", "load_feed", "load_subfeed", "get_feed_id", "delete_feed", "list_feeds",
            "watch_for_new_messages"} <= set(kf.__all__)
    assert not store_dir.exists()
