"""The feed log: appends in one order, verified copies, forks as evidence, segments that owner and relay make alike."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.errors import (
    DatabaseUnusable,
    DiskError,
    DiskFull,
    FeedChainBroken,
    FeedForked,
    FeedInvalid,
    FeedNotWritable,
    FeedUnknown,
    HeadInvalid,
    InvalidArgument,
    InvalidName,
    TooLarge,
)
from kachery_fast.protocol import feed_segments
from kachery_fast.protocol import feeds as rules
from kachery_fast.protocol.feed_bodies import Segment
from kachery_fast.protocol.feed_segments import cut
from kachery_fast.protocol.feeds import Tail
from kachery_fast.protocol.names import subfeed_hash
from kachery_fast.protocol.signing import private_key, public_id
from kachery_fast.store.feeds import Appended, FeedInfo, FeedLog, SubfeedInfo

from .test_database import disk

__all__ = ["disk"]

MAIN = subfeed_hash("main")
TIME_MS = 1_700_000_000_000
MANY = 1 << 40
KEY = private_key(b"k" * 32)
FEED = public_id(KEY)


def open_log(root: Path) -> FeedLog:
    return FeedLog(root, message_size_bytes_max=1000, clock=lambda: TIME_MS / 1000)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[FeedLog]:
    with closing(open_log(tmp_path / "owner")) as log:
        yield log


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[FeedLog]:
    """The log of another node."""
    with closing(open_log(tmp_path / "relay")) as log:
        yield log


def append(log: FeedLog, feed_id: str, *messages: dict[str, Any], subfeed: str = MAIN) -> Appended:
    return log.append(feed_id, subfeed, list(messages)).result(60)


def signed(log: FeedLog, feed_id: str, subfeed: str = MAIN, position: int = 0) -> list[dict[str, Any]]:
    return [json.loads(message) for message in log.read(feed_id, subfeed, position, MANY, MANY)]


def payloads(log: FeedLog, feed_id: str, subfeed: str = MAIN) -> list[Any]:
    return [rules.payload(message) for message in signed(log, feed_id, subfeed)]


def check_chain(log: FeedLog, feed_id: str, subfeed: str = MAIN) -> int:
    """Verify a subfeed from its first message; return how many there are."""
    found = rules.extend(Tail(feed_id, subfeed), 0, signed(log, feed_id, subfeed), lambda _: None)
    assert isinstance(found, rules.Extension)
    assert found.error is None
    assert found.tail == log.tail(feed_id, subfeed)
    return found.tail.count


def history(*texts: str, tail: Tail | None = None) -> list[dict[str, Any]]:
    """Signed messages of FEED."""
    made, _ = rules.sign_messages(tail or Tail(FEED, MAIN), [{"text": text} for text in texts], KEY, TIME_MS)
    return [json.loads(message) for message in made]


# --- feeds


def test_a_name_stands_for_one_feed(log: FeedLog) -> None:
    feed_id, made = log.create("recordings")
    assert made
    assert log.create("recordings") == (feed_id, False)
    assert log.find("recordings") == feed_id
    other, made = log.create()
    assert made
    assert other != feed_id
    assert log.create()[0] != other


def test_what_is_not_here_is_unknown(log: FeedLog) -> None:
    calls: list[Callable[[], object]] = [
        lambda: log.find("none"), lambda: log.find("\ud800"), lambda: log.info(FEED), lambda: log.delete(FEED),
        lambda: append(log, FEED, {})]
    for call in calls:
        with pytest.raises(FeedUnknown):
            call()
    assert log.tail(FEED, MAIN) == Tail(FEED, MAIN)
    assert (log.read(FEED, MAIN, 0, 10, 10), log.head(FEED, MAIN), log.forks(FEED, MAIN),
            log.segments(FEED, MAIN), log.feeds()) == ([], None, [], [], [])


@pytest.mark.parametrize("name", ["", "x" * 1001, "\ud800"])
def test_a_name_that_cannot_be_one_is_refused(log: FeedLog, name: str) -> None:
    with pytest.raises(InvalidName):
        log.create(name)


def test_feeds_are_listed_with_their_subfeeds(log: FeedLog, relay: FeedLog) -> None:
    feed_id, _ = log.create("a")
    other, _ = log.create()
    log.append(feed_id, MAIN, [{"x": 1}], "main").result(60)
    named = {"b": 1, "a": 2}
    log.append(feed_id, subfeed_hash(named), [{}, {}], named).result(60)
    log.append(feed_id, "0" * 40, [{}], "~" + "0" * 40).result(60)
    subfeeds = [SubfeedInfo(MAIN, "main", 1, None), SubfeedInfo(subfeed_hash(named), named, 2, None),
                SubfeedInfo("0" * 40, None, 1, None)]
    assert log.feeds() == [FeedInfo(feed_id, "a", True, subfeeds), FeedInfo(other, None, True, [])]
    assert log.info(feed_id) == log.feeds()[0]
    relay.extend(feed_id, MAIN, 0, signed(log, feed_id))
    assert relay.feeds() == [FeedInfo(feed_id, None, False, [SubfeedInfo(MAIN, None, 1, None)])]


def test_a_name_that_comes_later_is_noted(log: FeedLog) -> None:
    feed_id, _ = log.create()
    append(log, feed_id, {})
    assert log.info(feed_id).subfeeds[0].name is None
    log.append(feed_id, MAIN, [{}], "another").result(60)
    assert log.info(feed_id).subfeeds[0].name is None
    log.append(feed_id, MAIN, [{}], "main").result(60)
    assert log.info(feed_id).subfeeds[0].name == "main"


def test_the_file_with_the_keys_is_for_its_owner_alone(log: FeedLog, tmp_path: Path) -> None:
    log.create()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "owner").glob("kachery-fast-feeds.db*")}
    assert modes == {0o600}


def test_files_of_2022_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("feeds.db", "mutables.db"):
        (tmp_path / name).write_bytes(b"2022")
    with closing(open_log(tmp_path)) as log:
        append(log, log.create()[0], {})
    assert (tmp_path / "feeds.db").read_bytes() == (tmp_path / "mutables.db").read_bytes() == b"2022"


# --- appending


def test_what_was_appended_is_signed_chained_and_there_after_reopening(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        feed_id, _ = log.create("a")
        first = append(log, feed_id, {"n": 0})
        second = append(log, feed_id, {"n": 1}, {"n": 2})
        assert (first.first, first.tail.count, second.first, second.tail.count) == (0, 1, 1, 3)
        assert [*first.signed, *second.signed] == log.read(feed_id, MAIN, 0, 10, MANY)
        head = rules.read_head(second.head, feed_id, MAIN)
        assert (head.count, head.signature, head.time_ms) == (3, second.tail.signature, TIME_MS)
    with closing(open_log(tmp_path)) as log:
        assert log.tail(feed_id, MAIN) == second.tail
        assert append(log, log.find("a"), {"n": 3}).first == 3
        assert payloads(log, feed_id) == [{"n": number} for number in range(4)]
        assert check_chain(log, feed_id) == 4


def test_subfeeds_do_not_meet(log: FeedLog) -> None:
    feed_id, _ = log.create()
    other = subfeed_hash("other")
    for number in range(3):
        append(log, feed_id, {"main": number})
        append(log, feed_id, {"other": number}, subfeed=other)
    assert payloads(log, feed_id) == [{"main": number} for number in range(3)]
    assert payloads(log, feed_id, other) == [{"other": number} for number in range(3)]


def test_no_messages_are_no_change(log: FeedLog) -> None:
    feed_id, _ = log.create()
    done = append(log, feed_id)
    assert (done.first, done.tail.count, done.signed) == (0, 0, [])
    assert log.info(feed_id).subfeeds == []


@pytest.mark.parametrize(("bad", "error"), [
    ({"x": "y" * 1000}, TooLarge), ({"x": float("nan")}, InvalidArgument), ({1: 2}, InvalidArgument),
    ({"x": {1, 2}}, InvalidArgument), ("text", InvalidArgument), (["list"], InvalidArgument),
])
def test_a_batch_with_one_bad_message_leaves_nothing(log: FeedLog, bad: Any, error: type[Exception]) -> None:
    feed_id, _ = log.create()
    append(log, feed_id, {"n": 0})
    with pytest.raises(error):
        append(log, feed_id, {"n": 1}, bad, {"n": 3})
    assert append(log, feed_id, {"n": 1}).first == 1
    assert payloads(log, feed_id) == [{"n": 0}, {"n": 1}]


def test_the_longest_message_is_counted_without_its_signature(log: FeedLog) -> None:
    feed_id, _ = log.create()
    append(log, feed_id, {"x": "y" * 992})
    with pytest.raises(TooLarge) as caught:
        append(log, feed_id, {"x": "y" * 993})
    assert (caught.value.details["size"], caught.value.details["limit"]) == (1001, 1000)


def test_a_copy_cannot_be_appended_to(relay: FeedLog) -> None:
    relay.extend(FEED, MAIN, 0, history("a"))
    with pytest.raises(FeedNotWritable):
        append(relay, FEED, {})
    with pytest.raises(FeedNotWritable):
        append(relay, FEED, {}, subfeed="0" * 40)


def test_appends_of_many_threads_make_one_chain_in_the_order_of_each(log: FeedLog) -> None:
    feed_id, _ = log.create()
    threads, each = 8, 40

    def work(thread: int) -> list[Appended]:
        return [append(log, feed_id, *({"thread": thread, "n": number, "part": part} for part in range(3)))
                for number in range(each)]

    with ThreadPoolExecutor(threads) as pool:
        done = [appended for made in pool.map(work, range(threads)) for appended in made]
    assert sorted(appended.first for appended in done) == list(range(0, threads * each * 3, 3))
    assert check_chain(log, feed_id) == threads * each * 3
    found = payloads(log, feed_id)
    for start in range(0, len(found), 3):  # batches stay together
        thread, number = found[start]["thread"], found[start]["n"]
        assert found[start:start + 3] == [{"thread": thread, "n": number, "part": part} for part in range(3)]
    for thread in range(threads):
        assert [message["n"] for message in found[::3] if message["thread"] == thread] == list(range(each))


def test_two_logs_on_one_file_never_give_one_number_twice(log: FeedLog, tmp_path: Path) -> None:
    feed_id, _ = log.create()
    with closing(open_log(tmp_path / "owner")) as second, ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda which: [append(which, feed_id, {}).first for _ in range(60)], (log, second)))
        assert append(second, feed_id, {}).first == 120
    assert sorted(done[0] + done[1]) == list(range(120))
    assert check_chain(log, feed_id) == 121


# --- deleting


def wait_until_gone(root: Path) -> None:
    gone = threading.Event()
    with closing(sqlite3.connect(root / "kachery-fast-feeds.db")) as connection:
        for _ in range(6000):
            counts = [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                      for table in ("feeds", "subfeeds", "messages", "segments", "forks")]
            if not any(counts):
                return
            gone.wait(0.01)
    raise AssertionError(counts)


def test_a_deleted_feed_is_gone_and_its_name_is_free(log: FeedLog, tmp_path: Path) -> None:
    feed_id, _ = log.create("a")
    append(log, feed_id, *({"n": number} for number in range(1200)))
    append(log, feed_id, {}, subfeed="0" * 40)
    log.segments(feed_id, MAIN)
    log.delete(feed_id)
    assert (log.feeds(), log.has(feed_id, MAIN), log.read(feed_id, MAIN, 0, 10, 10)) == ([], False, [])
    with pytest.raises(FeedUnknown):
        append(log, feed_id, {})
    with pytest.raises(FeedUnknown):
        log.delete(feed_id)
    wait_until_gone(tmp_path / "owner")
    assert log.create("a")[0] != feed_id


def test_what_a_deletion_left_at_the_end_goes_at_the_next_start(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        feed_id, _ = log.create()
        append(log, feed_id, *({"n": number} for number in range(3000)))
        log.delete(feed_id)
    open_log(tmp_path).close()
    with closing(open_log(tmp_path)):
        wait_until_gone(tmp_path)


def test_a_deletion_by_another_process_is_noticed(log: FeedLog, tmp_path: Path) -> None:
    feed_id, _ = log.create("a")
    append(log, feed_id, {})
    with closing(open_log(tmp_path / "owner")) as second:
        second.delete(feed_id)
    with pytest.raises(FeedUnknown):
        append(log, feed_id, {})


def test_appends_while_the_feed_is_deleted_are_durable_or_refused(log: FeedLog) -> None:
    feed_id, _ = log.create()
    futures: list[Future[Appended]] = [log.append(feed_id, MAIN, [{}]) for _ in range(50)]
    log.delete(feed_id)
    futures += [log.append(feed_id, MAIN, [{}]) for _ in range(50)]
    assert [future.result(60).first for future in futures[:50]] == list(range(50))
    for future in futures[50:]:
        with pytest.raises(FeedUnknown):
            future.result(60)


def test_copies_that_come_while_feeds_are_deleted_are_known(relay: FeedLog) -> None:
    places = [f"{number:040x}" for number in range(400)]
    batches = {place: history("a", tail=Tail(FEED, place)) for place in places}

    def copy(place: str) -> None:
        assert relay.extend(FEED, place, 0, batches[place]).error is None

    def come_and_go() -> None:
        while not over.is_set():
            feed_id, _ = relay.create()
            relay.delete(feed_id)
            assert not relay.owns(feed_id)

    over = threading.Event()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for place in places[:200]:
                copy(place)
            deleting = [pool.submit(come_and_go) for _ in range(4)]
            copying = [pool.submit(copy, place) for place in places[200:]]
            wait(copying)
            over.set()
        for done in (*copying, *deleting):
            done.result(0)
    finally:
        sys.setswitchinterval(interval)
    assert [place for place in places if not relay.has(FEED, place)] == []


def test_a_closed_log_takes_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    feed_id, _ = log.create()
    waiting = [log.append(feed_id, MAIN, [{}]) for _ in range(20)]
    log.close()
    log.close()
    assert [future.result(0).first for future in waiting] == list(range(20))
    with pytest.raises(DiskError, match="closed"):
        log.append(feed_id, MAIN, [{}])
    with pytest.raises(DiskError, match="closed"):
        log.tail(feed_id, MAIN)


# --- reading


def test_reading_is_bounded_by_count_and_size(log: FeedLog) -> None:
    feed_id, _ = log.create()
    made = append(log, feed_id, *({"n": number, "x": "y" * 100} for number in range(10))).signed
    assert log.read(feed_id, MAIN, 3, 4, MANY) == made[3:7]
    assert log.read(feed_id, MAIN, 8, 4, MANY) == made[8:]
    assert log.read(feed_id, MAIN, 10, 4, MANY) == log.read(feed_id, MAIN, 99, 4, MANY) == []
    assert log.read(feed_id, MAIN, 2, 10, len(made[2]) + len(made[3])) == made[2:4]
    assert log.read(feed_id, MAIN, 2, 10, len(made[2]) + len(made[3]) - 1) == made[2:3]
    assert log.read(feed_id, MAIN, 2, 10, 0) == made[2:3]


def test_it_is_known_from_memory_what_is_held(log: FeedLog, relay: FeedLog, tmp_path: Path) -> None:
    feed_id, _ = log.create()
    assert log.has(feed_id, MAIN)
    assert not relay.has(feed_id, MAIN)
    append(log, feed_id, {})
    relay.extend(feed_id, MAIN, 0, signed(log, feed_id))
    for _ in range(2):
        assert relay.has(feed_id, MAIN)
        assert not relay.has(feed_id, "0" * 40)
        relay.close()
        relay = open_log(tmp_path / "relay")
    relay.close()


# --- copies


def test_a_copy_takes_in_what_is_true_and_new(log: FeedLog, relay: FeedLog) -> None:
    feed_id, _ = log.create()
    append(log, feed_id, *({"n": number} for number in range(10)))
    batch = signed(log, feed_id)
    assert relay.extend(feed_id, MAIN, 0, batch[:4]).count == 4
    done = relay.extend(feed_id, MAIN, 2, batch[2:7])
    assert (done.new_count, done.count, done.error) == (3, 7, None)
    done = relay.extend(feed_id, MAIN, 0, batch[:5])
    assert (done.new_count, done.count, done.error) == (0, 7, None)
    done = relay.extend(feed_id, MAIN, 9, batch[9:])
    assert (done.new_count, done.count) == (0, 7)
    assert isinstance(done.error, FeedInvalid)
    relay.extend(feed_id, MAIN, 7, batch[7:])
    assert relay.read(feed_id, MAIN, 0, 99, MANY) == log.read(feed_id, MAIN, 0, 99, MANY)
    assert relay.tail(feed_id, MAIN) == log.tail(feed_id, MAIN)


def test_a_forged_message_ends_the_batch_and_what_is_good_before_it_is_kept(relay: FeedLog) -> None:
    batch = history("a", "b", "c")
    batch[2]["body"]["message"] = {"text": "forged"}
    done = relay.extend(FEED, MAIN, 0, batch)
    assert (done.new_count, done.count) == (2, 2)
    assert isinstance(done.error, FeedInvalid)
    assert payloads(relay, FEED) == [{"text": "a"}, {"text": "b"}]


def test_nothing_true_makes_no_copy(relay: FeedLog) -> None:
    assert relay.extend(FEED, MAIN, 0, ["nonsense"]).error is not None
    assert relay.extend(FEED, MAIN, 0, []).error is None
    assert relay.feeds() == []
    assert not relay.has(FEED, MAIN)


def test_copies_extended_at_once_by_many_are_the_same(relay: FeedLog) -> None:
    batch = history(*map(str, range(60)))
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda end: relay.extend(FEED, MAIN, 0, batch[:end]), range(4, 61, 4)))
    assert all(extended.error is None for extended in done)
    assert sum(extended.new_count for extended in done) == 60
    assert check_chain(relay, FEED) == 60


def test_an_owner_whose_backup_was_restored_takes_its_own_later_messages_back(tmp_path: Path) -> None:
    with closing(open_log(tmp_path / "owner")) as log:
        feed_id, _ = log.create()
        append(log, feed_id, {"n": 0})
    shutil.copytree(tmp_path / "owner", tmp_path / "restored")
    with closing(open_log(tmp_path / "owner")) as log:
        append(log, feed_id, {"n": 1}, {"n": 2})
        later = signed(log, feed_id, position=1)
    with closing(open_log(tmp_path / "restored")) as log:
        assert log.extend(feed_id, MAIN, 1, later).new_count == 2
        assert append(log, feed_id, {"n": 3}).first == 3
        assert check_chain(log, feed_id) == 4


# --- forks


def test_a_fork_is_kept_as_evidence_and_the_prefix_stays(relay: FeedLog) -> None:
    batch = history("a", "b", "c", "d")
    _, tail = rules.sign_messages(Tail(FEED, MAIN), [{"text": "a"}, {"text": "b"}], KEY, TIME_MS)
    other = history("other", "more", tail=tail)
    relay.extend(FEED, MAIN, 0, batch)
    relay.segments(FEED, MAIN)
    done = relay.extend(FEED, MAIN, 2, other)
    assert (done.new_count, done.count) == (0, 2)
    assert isinstance(done.error, FeedForked)
    assert done.error.details["number"] == 2
    (fork,) = relay.forks(FEED, MAIN)
    assert (fork.number, json.loads(fork.first), json.loads(fork.second), fork.time_ms) == (
        2, batch[2], other[0], TIME_MS)
    assert payloads(relay, FEED) == [{"text": "a"}, {"text": "b"}]
    assert relay.tail(FEED, MAIN) == tail
    assert [(part.first, part.end) for part in relay.segments(FEED, MAIN)] == [(0, 2)]
    for position in (2, 3, 99):
        with pytest.raises(FeedForked):
            relay.read(FEED, MAIN, position, 1, 1)
    for again in (batch, other):
        done = relay.extend(FEED, MAIN, 2 if again is other else 0, again)
        assert (done.count, type(done.error)) == (2, FeedForked)
    assert relay.info(FEED).subfeeds[0].forked_at == 2
    assert len(relay.forks(FEED, MAIN)) == 1


def test_an_earlier_fork_shows_later(relay: FeedLog) -> None:
    batch = history("a", "b", "c", "d")
    tails = [rules.sign_messages(Tail(FEED, MAIN), [{"text": text} for text in "abcd"[:count]], KEY, TIME_MS)[1]
             for count in range(4)]
    relay.extend(FEED, MAIN, 0, batch)
    for number in (3, 1, 0):
        done = relay.extend(FEED, MAIN, number, history("other", tail=tails[number]))
        assert (done.count, type(done.error)) == (number, FeedForked)
    assert [fork.number for fork in relay.forks(FEED, MAIN)] == [0, 1, 3]
    assert relay.tail(FEED, MAIN) == Tail(FEED, MAIN)
    with pytest.raises(FeedForked):
        relay.read(FEED, MAIN, 0, 1, 1)


def test_a_fork_outlives_a_restart(relay: FeedLog, tmp_path: Path) -> None:
    relay.extend(FEED, MAIN, 0, history("a"))
    relay.extend(FEED, MAIN, 0, history("b"))
    relay.close()
    with closing(open_log(tmp_path / "relay")) as again:
        assert again.has(FEED, MAIN)
        assert len(again.forks(FEED, MAIN)) == 1
        assert isinstance(again.extend(FEED, MAIN, 0, history("a")).error, FeedForked)


def test_an_owner_that_sees_its_own_fork_appends_no_more(log: FeedLog) -> None:
    feed_id, _ = log.create()
    append(log, feed_id, {"n": 0})
    copy = signed(log, feed_id)
    path = next(Path(str(log._database.path)).parent.glob("*.db"))
    with closing(sqlite3.connect(path)) as connection:
        seed = connection.execute("SELECT seed FROM feeds").fetchone()[0]
    made, _ = rules.sign_messages(Tail(feed_id, MAIN), [{"n": "other"}], private_key(seed), TIME_MS)
    assert isinstance(log.extend(feed_id, MAIN, 0, [json.loads(made[0])]).error, FeedForked)
    with pytest.raises(FeedForked):
        append(log, feed_id, {"n": 1})
    assert log.head(feed_id, MAIN) is None
    assert json.loads(log.forks(feed_id, MAIN)[0].first) == copy[0]


def test_a_message_that_does_not_follow_its_predecessor_is_refused(relay: FeedLog) -> None:
    relay.extend(FEED, MAIN, 0, history("a"))
    _, tail = rules.sign_messages(Tail(FEED, MAIN), [{"text": "b"}], KEY, TIME_MS)
    done = relay.extend(FEED, MAIN, 1, history("c", tail=tail))
    assert (done.count, type(done.error)) == (1, FeedChainBroken)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 5), st.integers(0, 6)), max_size=12))
def test_any_batches_of_two_histories_leave_a_true_prefix_or_a_fork(tmp_path_factory: pytest.TempPathFactory,
                                                                     batches: list[tuple[str, int, int]]) -> None:
    _, tail = rules.sign_messages(Tail(FEED, MAIN), [{"text": "a"}, {"text": "b"}, {"text": "c"}], KEY, TIME_MS)
    common = history("a", "b", "c")
    branches = {name: [*common, *history(name, name + name, tail=tail)] for name in "xy"}
    with closing(open_log(tmp_path_factory.mktemp("any"))) as log:
        for name, first, end in batches:
            log.extend(FEED, MAIN, first, branches[name][first:end])
            found = signed(log, FEED)
            forks = log.forks(FEED, MAIN)
            assert found in [branch[:len(found)] for branch in branches.values()]
            if forks:
                assert len(found) == min(fork.number for fork in forks) >= 3
            for fork in forks:
                assert {json.loads(fork.first)["signature"], json.loads(fork.second)["signature"]} == {
                    branch[fork.number]["signature"] for branch in branches.values()}
            assert check_chain(log, FEED) == len(found)


# --- heads


def test_an_owner_signs_a_head_when_asked(log: FeedLog) -> None:
    feed_id, _ = log.create()
    assert rules.read_head(log.head(feed_id, MAIN), feed_id, MAIN).count == 0
    append(log, feed_id, {}, {})
    assert rules.read_head(log.head(feed_id, MAIN), feed_id, MAIN).count == 2


def test_a_relay_keeps_the_newest_head_of_what_it_holds(relay: FeedLog) -> None:
    batch = history("a", "b", "c")
    tails = [rules.sign_messages(Tail(FEED, MAIN), [{"text": text} for text in "abc"[:count]], KEY, TIME_MS)[1]
             for count in range(4)]
    heads = [rules.sign_head(tail, KEY, TIME_MS + tail.count) for tail in tails]
    relay.keep_head(FEED, MAIN, heads[1])
    assert relay.head(FEED, MAIN) is None
    relay.extend(FEED, MAIN, 0, batch[:2])
    for given_count, kept_count in ((3, None), (1, 1), (2, 2), (1, 2), (0, 2), (3, 2)):
        relay.keep_head(FEED, MAIN, heads[given_count])
        assert relay.head(FEED, MAIN) == (None if kept_count is None else heads[kept_count])
    later = rules.sign_head(tails[2], KEY, TIME_MS + 100)
    relay.keep_head(FEED, MAIN, later)
    relay.keep_head(FEED, MAIN, heads[2])
    assert relay.head(FEED, MAIN) == later
    relay.extend(FEED, MAIN, 0, history("x"))
    assert relay.head(FEED, MAIN) is None


def test_a_head_that_is_not_the_owners_or_of_another_history_is_refused(relay: FeedLog) -> None:
    relay.extend(FEED, MAIN, 0, history("a"))
    _, other = rules.sign_messages(Tail(FEED, MAIN), [{"text": "b"}], KEY, TIME_MS)
    with pytest.raises(HeadInvalid):
        relay.keep_head(FEED, MAIN, rules.sign_head(other, KEY, TIME_MS))
    with pytest.raises(HeadInvalid):
        relay.keep_head(FEED, MAIN, rules.sign_head(relay.tail(FEED, MAIN), private_key(b"x" * 32), TIME_MS))
    assert relay.head(FEED, MAIN) is None


# --- segments


def cut_whole(log: FeedLog, feed_id: str) -> list[tuple[int, int, int]]:
    sizes = [len(message) for message in log.read(feed_id, MAIN, 0, MANY, MANY)]
    return [part[:3] for part in cut(sizes, 0)]


def test_owner_and_relay_make_the_same_segments_however_they_got_there(tmp_path: Path, relay: FeedLog) -> None:
    log = FeedLog(tmp_path / "long", message_size_bytes_max=2_000_000)
    feed_id, _ = log.create()
    last: list[Segment] = []
    for lengths in ([300_000, 200_000], [700_000, 1_500_000, 10], [500_000] * 5, [10] * 50):
        append(log, feed_id, *({"x": "y" * length} for length in lengths))
        parts = log.segments(feed_id, MAIN)
        assert parts == log.segments(feed_id, MAIN)
        assert [(part.first, part.end, part.size) for part in parts] == cut_whole(log, feed_id)
        assert parts[:len(last) - 1] == last[:-1]
        last = parts
    relay.extend(feed_id, MAIN, 0, signed(log, feed_id))
    assert relay.segments(feed_id, MAIN) == last
    log.close()
    with closing(open_log(tmp_path / "long")) as again:
        assert again.segments(feed_id, MAIN) == last


def test_closed_segments_are_not_read_again(log: FeedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    feed_id, _ = log.create()
    append(log, feed_id, *({"x": "y" * 900} for _ in range(2000)))
    parts = log.segments(feed_id, MAIN)
    assert len(parts) == 3
    encoded: list[int] = []
    encode = feed_segments.encode_segment

    def watched(messages: Sequence[bytes]) -> bytes:
        encoded.append(len(messages))
        return encode(messages)

    monkeypatch.setattr(feed_segments, "encode_segment", watched)
    append(log, feed_id, {})
    assert log.segments(feed_id, MAIN)[:2] == parts[:2]
    assert log.segments(feed_id, MAIN)[:2] == parts[:2]
    assert encoded == [parts[2].end - parts[2].first + 1]


# --- the disk


def test_a_full_disk_loses_nothing_that_was_acknowledged(disk: Path) -> None:
    filler = disk / "filler"
    filler.write_bytes(bytes(1_500_000))
    with closing(open_log(disk / "store")) as log:
        feed_id, _ = log.create()
        ends, failed = [], 0
        for future in [log.append(feed_id, MAIN, [{"x": "y" * 900}] * 10) for _ in range(80)]:
            try:
                ends.append(future.result(60).tail.count)
            except DiskFull:
                failed += 1
        assert ends == list(range(10, len(ends) * 10 + 1, 10))
        assert failed > 0
        assert check_chain(log, feed_id) == ends[-1]
        filler.unlink()
        assert append(log, feed_id, {"n": "on"}).first == ends[-1]
    with closing(open_log(disk / "store")) as log:
        assert check_chain(log, feed_id) == ends[-1] + 1


def test_a_read_only_disk_is_an_error_of_the_disk(disk: Path) -> None:
    with closing(open_log(disk / "store")) as log:
        append(log, log.create("a")[0], {})
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        with pytest.raises(DiskError):
            open_log(disk / "store")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    with closing(open_log(disk / "store")) as log:
        assert check_chain(log, log.find("a")) == 1


def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    with closing(open_log(tmp_path)) as log:
        append(log, log.create()[0], *({"x": "y" * 900} for _ in range(50)))
    path = tmp_path / "kachery-fast-feeds.db"
    data = bytearray(path.read_bytes())
    data[:4096] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.raises(DatabaseUnusable, match="damaged"):
        open_log(tmp_path)
    assert path.read_bytes() == data


def test_many_keys_and_names_are_adopted_in_few_transactions(log: FeedLog, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = {public_id(private_key(seed)): seed for seed in (number.to_bytes(32, "big") for number in range(1, 1501))}
    pairs = [(f"name {number}", feed_id) for number, feed_id in enumerate(seeds)]
    calls, write = [], FeedLog._write

    def count(log: FeedLog, job: Callable[[sqlite3.Connection], Any]) -> Any:
        calls.append(job)
        return write(log, job)

    monkeypatch.setattr(FeedLog, "_write", count)
    refused = log.adopt(seeds, [*pairs, ("", FEED), ("name 0", FEED), ("nobody's", "0" * 64)])
    assert len(calls) == 4
    assert [(feed_id, type(error)) for feed_id, error in refused] == [(FEED, InvalidName)]
    assert {(info.name, info.feed_id) for info in log.feeds() if info.writable} == set(pairs)
    assert append(log, pairs[0][1], {"a": 1}).first == 0
