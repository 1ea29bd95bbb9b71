"""Feeds under trouble and under load: services killed, many writers at once, feeds deleted, leave taken away."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab
from kachery_fast.errors import NodeNotRunning
from kachery_fast.protocol.signing import verify
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
