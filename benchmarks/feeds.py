"""Feeds: durable appends beside SQLite, signed batches, the way of a message from node A to node B, and a replay.

All of it goes through real processes (hub, node A, node B) and the Python client, on loopback, both cores shared, on
the file system of ``directory``. A durable append waits for the disk: ``fsync`` costs what it costs there.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from benchmarks.lab import CHANNEL, running_lab
from benchmarks.measure import Figure, Ratio, figure, pairs
from kachery_fast.cli.lab import LabNode
from kachery_fast.client.feeds import Feed, create_feed, load_feed
from kachery_fast.client.subfeeds import Subfeed
from kachery_fast.config import load_settings
from kachery_fast.protocol.feeds import Tail, sign_messages, signature_of
from kachery_fast.protocol.names import subfeed_hash
from kachery_fast.protocol.signing import private_key, public_id
from kachery_fast.store.feeds import FeedLog

__all__ = [
    "append_versus_sqlite", "append_versus_sqlite_as_it_comes", "appended_to_seen_median", "appended_to_seen_tail",
    "batches_of_appends", "log_append_versus_sqlite", "replay_versus_signatures",
]

SUBFEED = "trials"
BATCH_MESSAGES = 1000
BATCH_RATE = 5000.0
MEDIAN_MS = 10.0
TAIL_MS = 40.0


def message(number: int) -> dict[str, Any]:
    """What a rig might say of a trial: about 170 bytes of JSON."""
    return {"trial": number, "stimulus": "grating-045", "outcome": "hit", "latency_ms": 312.5 + number % 100,
            "licks": [12.5, 80.25, 311.0], "session": "2026-11-20_mouse-17", "note": None}


def append_versus_sqlite(directory: Path, appends: int = 300, count: int = 5, *, journal: str = "WAL") -> Figure:
    """One message a call from a client, durable, beside as many inserts into SQLite, one a transaction."""
    with running_lab(directory, "A") as lab, _Plain(directory / "plain.db", journal) as plain:
        subfeed = _own_feed(lab.nodes["A"]).load_subfeed(SUBFEED)

        def ours() -> float:
            begun = time.perf_counter()
            for number in range(appends):
                subfeed.append_message(message(number))
            return appends / (time.perf_counter() - begun)

        measured = pairs(ours, lambda: _inserts(plain, appends), count)
        _verify_length(subfeed, appends * (count + 1))
    return figure(f"feed append, one a call / SQLite insert, one a transaction, journal {journal}", measured,
                  unit="msg/s", bar=">= 0.5",
                  note=f"{appends} messages each, synchronous=FULL; ours WAL, signed, by HTTP to the node")


def append_versus_sqlite_as_it_comes(directory: Path, appends: int = 300, count: int = 5) -> Figure:
    """The same beside SQLite with the journal that it has unless told otherwise."""
    return append_versus_sqlite(directory, appends, count, journal="DELETE")


def log_append_versus_sqlite(directory: Path, appends: int = 300, count: int = 5) -> Figure:
    """The same without the client and the node's HTTP: the node's feed log alone, with its writing thread."""
    with _Plain(directory / "plain.db") as plain:
        log = FeedLog(directory, message_size_bytes_max=load_settings({}).feed_message_size_bytes_max)
        try:
            feed_id, _ = log.create()
            subfeed = subfeed_hash(SUBFEED)

            def ours() -> float:
                begun = time.perf_counter()
                for number in range(appends):
                    log.append(feed_id, subfeed, [message(number)]).result()
                return appends / (time.perf_counter() - begun)

            measured = pairs(ours, lambda: _inserts(plain, appends), count)
            if log.tail(feed_id, subfeed).count != appends * (count + 1):
                raise AssertionError("messages are missing")
        finally:
            log.close()
    return figure("feed log, one message / SQLite insert, one a transaction", measured, unit="msg/s", bar=">= 0.5",
                  note=f"{appends} messages each; both WAL, synchronous=FULL; ours signed and chained")


def batches_of_appends(directory: Path, batches: int = 5, count: int = 5) -> Figure:
    """Messages a second in batches of 1,000 a call, each signed, durable."""
    with running_lab(directory, "A") as lab:
        subfeed = _own_feed(lab.nodes["A"]).load_subfeed(SUBFEED)
        batch = [message(number) for number in range(BATCH_MESSAGES)]

        def ours() -> float:
            begun = time.perf_counter()
            for _ in range(batches):
                subfeed.append_messages(batch)
            return batches * BATCH_MESSAGES / (time.perf_counter() - begun)

        measured = pairs(ours, lambda: BATCH_RATE, count)
        _verify_length(subfeed, batches * BATCH_MESSAGES * (count + 1))
    return figure(f"feed append in batches of {BATCH_MESSAGES:,} / {BATCH_RATE:,.0f} messages a second", measured,
                  unit="msg/s", bar=">= 1", note=f"{batches} batches each, signed and durable, by HTTP to the node")


def appended_to_seen_median(directory: Path, messages: int = 400) -> Figure:
    """From the call that appends at A to the return of the call that reads at B; the median of single messages."""
    times_ms = _appended_to_seen(directory, messages)
    return _limit_of("from append on A to seen on B, p50", statistics.median(times_ms), MEDIAN_MS, times_ms)


def appended_to_seen_tail(directory: Path, messages: int = 400) -> Figure:
    """The same, p99."""
    times_ms = _appended_to_seen(directory, messages)
    return _limit_of("from append on A to seen on B, p99", statistics.quantiles(times_ms, n=100)[98], TAIL_MS, times_ms)


def replay_versus_signatures(directory: Path, messages: int = 10_000, count: int = 5) -> Figure:
    """Seconds until a new reader on B has all messages of a feed of A, beside checking as many signatures alone."""
    key = private_key(secrets.token_bytes(32))
    start = Tail(public_id(key), subfeed_hash(SUBFEED))
    signed, _ = sign_messages(start, [message(number) for number in range(messages)], key, 0)
    with running_lab(directory, "A", "B") as lab:
        a, b = lab.nodes["A"], lab.nodes["B"]

        def ours() -> float:
            feed = _own_feed(a)
            feed.load_subfeed(SUBFEED).append_messages([message(number) for number in range(messages)])
            reader = _feed_at(b, feed.uri).load_subfeed(SUBFEED)
            begun = time.perf_counter()
            while reader.position < messages:
                reader.get_next_messages(wait_msec=20_000)
            return time.perf_counter() - begun

        measured = pairs(ours, lambda: _check_signatures(signed, start.feed_id), count)
    return figure(f"{messages:,} messages to a new reader / checking {messages:,} signatures", measured, unit="s",
                  bar="shown", note="nothing in the bucket before; upload, download, every signature checked, durable")


def _check_signatures(signed: list[bytes], feed_id: str) -> float:
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(feed_id))
    rows = [(bytes.fromhex(signature_of(row)), row[len(b'{"body":'):-len(b',"signature":""}') - 128]) for row in signed]
    begun = time.perf_counter()
    for signature, body in rows:
        key.verify(signature, body)
    return time.perf_counter() - begun


def _appended_to_seen(directory: Path, messages: int) -> list[float]:
    """Append one message after the other at A, at uneven times, and return for each when B had it, in milliseconds."""
    with running_lab(directory, "A", "B") as lab:
        feed = _own_feed(lab.nodes["A"])
        writer = feed.load_subfeed(SUBFEED)
        reader = _feed_at(lab.nodes["B"], feed.uri).load_subfeed(SUBFEED)
        seen: dict[int, float] = {}

        def follow() -> None:
            while reader.position < messages + 1:
                for found in reader.get_next_messages(wait_msec=10_000):
                    seen[found["trial"]] = time.perf_counter()

        follower = threading.Thread(target=follow, name="follower")
        writer.append_message(message(0))
        follower.start()
        _wait_for(lambda: 0 in seen)
        appended: dict[int, float] = {}
        for number in range(1, messages + 1):
            # Steps of 20 to 60 ms that no timer of a node can fall in with.
            time.sleep(0.02 + 0.04 * (number * 0.618034 % 1.0))
            appended[number] = time.perf_counter()
            writer.append_message(message(number))
        _wait_for(lambda: len(seen) > messages)
        follower.join()
    return [(seen[number] - begun) * 1000 for number, begun in appended.items()]


def _limit_of(name: str, found_ms: float, limit_ms: float, times_ms: list[float]) -> Figure:
    ratio = found_ms / limit_ms
    note = (f"{len(times_ms)} single messages, 20 to 60 ms apart; fastest {min(times_ms):.1f}, "
            f"slowest {max(times_ms):.1f} ms")
    return figure(f"{name} / {limit_ms:.0f} ms", Ratio(found_ms, limit_ms, ratio, ratio, ratio), unit="ms", bar="<= 1",
                  note=note)


class _Plain:
    """A table in SQLite, synchronous=FULL, as somebody would write it who wants no message lost."""

    def __init__(self, path: Path, journal: str = "WAL") -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute(f"PRAGMA journal_mode={journal}")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("CREATE TABLE messages (id INTEGER PRIMARY KEY, message BLOB NOT NULL)")

    def insert(self, content: dict[str, Any]) -> None:
        """Insert a message, in a transaction of its own."""
        self._connection.execute("INSERT INTO messages (message) VALUES (?)", (json.dumps(content).encode(),))

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _inserts(plain: _Plain, appends: int) -> float:
    begun = time.perf_counter()
    for number in range(appends):
        plain.insert(message(number))
    return appends / (time.perf_counter() - begun)


def _own_feed(node: LabNode) -> Feed:
    with node.used():
        return create_feed()


def _feed_at(node: LabNode, uri: str) -> Feed:
    with node.used():
        return load_feed(uri, channel=CHANNEL)


def _verify_length(subfeed: Subfeed, expected: int) -> None:
    if subfeed.num_messages != expected:
        raise AssertionError(f"the feed has {subfeed.num_messages} messages, not {expected}")


def _wait_for(happened: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise AssertionError("a message did not arrive")
        time.sleep(0.001)
