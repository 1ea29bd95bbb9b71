"""Following a subfeed: what is asked and when, what is taken in which order, and that the true prefix is reached
whatever the network loses, repeats and reorders, and whoever lies."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.errors import BandUnreachable
from kachery_fast.protocol.feed_bodies import FeedFailed, FeedMessages, FeedShared, FeedSubscribe, Segment
from kachery_fast.protocol.feed_segments import Index, encode_segment
from kachery_fast.protocol.feeds import sign_head, tail_after
from kachery_fast.protocol.following import Follower
from kachery_fast.protocol.following_events import (
    BandRestored,
    End,
    Grown,
    Heard,
    IndexRead,
    KeepHead,
    Load,
    Loaded,
    LookAtIndex,
    Parted,
    SayFailed,
    Subscribe,
    Take,
    Taken,
    Tick,
    Wanted,
)
from kachery_fast.protocol.inquiry import Inquiry

from .chains import FEED, KEY, OTHER, SUBFEED, TIME_MS, ours, plain
from .feed_world import FOLLOW, Reading, Sharing, World

CHAIN = ours([{"i": number} for number in range(20)])


def follower(position: int = 0) -> Follower:
    return Follower(FEED, SUBFEED, position, "r-", Inquiry("feed://x", "lab"), FOLLOW)


def reading(world: World, name: str, held: list[bytes] | None = None, *, run: float, wanted: float = 60.0) -> Reading:
    """A node that has followed the subfeed for ``run`` seconds."""
    node = Reading(world, name, held)
    node.want(wanted)
    world.run(run)
    return node


def messages(first: int, end: int, request: str = "") -> Heard:
    return Heard(FeedMessages(time=0, id="", request=request, feed_id=FEED, subfeed=SUBFEED, first=first,
                              messages=plain(CHAIN[first:end])), "owner")


def shared(*segments: Segment, request: str = "", head: Any = None) -> Heard:
    return Heard(FeedShared(time=0, id="", request=request, feed_id=FEED, subfeed=SUBFEED, segments=list(segments),
                            head=head), "owner")


def segment(first: int, end: int, sha1: str = "ab" * 20) -> Segment:
    return Segment(first, end, 100, sha1)


def take(*parts: list[bytes], first: int = 0) -> Take:
    return Take(first, tuple(b"[%b]" % b",".join(part) for part in parts), "owner")


def head_at(count: int, key: Any = KEY) -> dict[str, Any]:
    return sign_head(tail_after(FEED, SUBFEED, CHAIN[count - 1]), key, TIME_MS)


def questions(effects: list[Any]) -> list[dict[str, Any]]:
    return [effect.fields for effect in effects if isinstance(effect, Subscribe)]


def asking(position: int = 0, now: float = 0.0) -> Follower:
    machine = follower(position)
    machine.handle(Wanted(now + 60), now)
    machine.handle(IndexRead(None, "no index"), now)
    return machine


# --- asking


def test_the_channel_and_the_bucket_are_asked_at_once() -> None:
    machine = follower(3)
    assert machine.handle(Tick(), 0.0) == [End()]  # nobody wants it
    machine = follower(3)
    effects = machine.handle(Wanted(60.0), 0.0)
    assert LookAtIndex() in effects
    (question,) = questions(effects)
    assert (question["position"], question["live"], question["feed_id"]) == (3, True, FEED)
    assert FeedSubscribe(time=0, id="", **question).request.startswith("r-")


def test_silence_is_asked_again_less_and_less_often() -> None:
    machine = follower()
    machine.handle(Wanted(1000.0), 0.0)
    times: list[float] = []
    while len(times) < 6:
        now = machine.deadline
        assert now is not None
        effects = machine.handle(Tick(), now)
        assert len(questions(effects)) == 1
        times.append(now)
    assert times == [3.0, 9.0, 21.0, 41.0, 61.0, 81.0]


def test_the_bucket_is_looked_at_again_when_nobody_answers_and_never_twice_at_once() -> None:
    machine = follower()
    assert LookAtIndex() in machine.handle(Wanted(1000.0), 0.0)
    assert LookAtIndex() not in machine.handle(Tick(), 3.0)
    machine.handle(IndexRead(None, "out of reach"), 4.0)
    assert LookAtIndex() in machine.handle(Tick(), 9.0)
    assert "out of reach" in machine.inquiry.tried()


def test_who_was_answered_asks_again_only_to_renew() -> None:
    machine = asking()
    assert machine.deadline == 3.0
    machine.handle(messages(0, 0, "r-1"), 1.0)
    assert machine.deadline == 20.0
    effects = machine.handle(Tick(), 20.0)
    assert len(questions(effects)) == 1
    assert LookAtIndex() not in effects
    machine.handle(messages(0, 0, "r-2"), 20.0)
    assert machine.deadline == 40.0


def test_an_answer_to_another_that_covers_this_reader_counts() -> None:
    machine = asking(5)
    machine.handle(messages(5, 5, "other"), 1.0)
    assert machine.deadline == 20.0
    machine = asking(5)
    machine.handle(messages(7, 7, "other"), 1.0)
    assert machine.deadline == 3.0  # it tells of more, and is no answer


def test_a_restored_band_is_asked_at_once() -> None:
    machine = asking()
    machine.handle(messages(0, 0, "r-1"), 1.0)
    assert len(questions(machine.handle(BandRestored(), 2.0))) == 1


def test_a_gap_is_asked_for_at_once_and_in_vain_less_and_less_often() -> None:
    machine = asking(2)
    machine.handle(messages(2, 2, "r-1"), 1.0)
    times = []
    effects = machine.handle(messages(5, 6), 2.0)  # 2 to 5 were lost
    now = 2.0
    for _ in range(6):
        (question,) = questions(effects)
        assert question["position"] == 2
        times.append(now)
        assert machine.handle(messages(2, 2, question["request"]), now) == []
        assert machine.deadline is not None
        now = machine.deadline
        effects = machine.handle(Tick(), now)
    assert [later - earlier for earlier, later in itertools.pairwise(times)] == [0.25, 0.5, 1.0, 2.0, 4.0]


def test_while_something_is_worked_on_nothing_is_asked() -> None:
    machine = asking()
    assert machine.handle(messages(0, 4), 1.0) == [take(CHAIN[:4])]
    assert machine.deadline is None
    assert questions(machine.handle(Tick(), 40.0)) == []
    assert len(questions(machine.handle(Taken(4), 41.0))) == 1


def test_it_ends_when_nobody_wants_it_any_more_and_not_in_the_middle() -> None:
    machine = asking()
    machine.handle(Wanted(30.0), 0.0)  # the longer wish holds
    machine.handle(messages(0, 1, "r-1"), 1.0)
    assert machine.handle(Tick(), 60.0) == []
    assert machine.handle(Taken(1), 61.0) == [End()]
    assert machine.over
    assert machine.deadline is None
    assert machine.handle(Wanted(1000.0), 62.0) == []


def test_what_hinders_the_question_is_told_until_somebody_answers() -> None:
    machine = asking()
    machine.handle(SayFailed(BandUnreachable(channel="lab", why="the broker is down")), 1.0)
    assert "the broker is down" in machine.inquiry.tried()
    machine.handle(messages(0, 0, "r-1"), 1.0)
    assert "the broker is down" not in machine.inquiry.tried()


def test_a_failure_is_noted_and_is_an_answer_to_its_question_alone() -> None:
    machine = asking()
    failed = FeedFailed(time=0, id="", request="other", feed_id=FEED, subfeed=SUBFEED, reason="hub", detail="no hub")
    machine.handle(Heard(failed, "owner"), 1.0)
    assert machine.deadline == 3.0
    failed.request = "r-1"
    machine.handle(Heard(failed, "owner"), 1.0)
    assert machine.deadline == 20.0
    assert "no hub" in machine.inquiry.tried()


# --- taking


def test_messages_are_taken_in_order_however_they_come() -> None:
    machine = asking()
    assert machine.handle(messages(4, 6), 1.0) == []
    assert machine.handle(messages(2, 4), 1.0) == []
    assert machine.handle(messages(0, 2), 1.0) == [take(CHAIN[:2], CHAIN[2:4], CHAIN[4:6])]
    assert machine.handle(messages(6, 7), 1.0) == []  # one at a time
    assert machine.handle(Taken(6), 1.0)[0] == take(CHAIN[6:7], first=6)


def test_what_is_held_already_is_looked_at_for_a_fork() -> None:
    machine = asking(5)
    assert machine.handle(messages(1, 3), 1.0) == [take(CHAIN[1:3], first=1)]


def test_after_a_fork_nothing_is_done_any_more() -> None:
    machine = asking()
    machine.handle(messages(0, 4), 1.0)
    machine.handle(messages(4, 6), 1.0)
    assert machine.handle(Taken(2, "forked", forked=True), 1.0) == []
    assert machine.handle(shared(segment(0, 9)), 1.0) == []
    assert machine.deadline == 60.0
    machine = asking()
    assert machine.handle(Grown(3, forked=True), 1.0) == []
    assert machine.handle(messages(3, 4), 1.0) == []


def test_where_the_owners_history_parts_from_what_is_held_the_other_message_is_asked_for_at_once_and_not_too_often(
        ) -> None:
    machine = asking(10)
    machine.handle(messages(10, 10, "r-1"), 1.0)
    (asked,) = questions(machine.handle(Parted(9), 2.0))
    assert asked["position"] == 9
    rival = ours([{"other": number} for number in range(10)])
    told = FeedMessages(time=0, id="", request=asked["request"], feed_id=FEED, subfeed=SUBFEED, first=9,
                        messages=plain(rival[9:]))
    assert machine.handle(Heard(told, "owner"), 2.1) == [take(rival[9:], first=9)]
    machine.handle(Taken(10, "it may be of another subfeed"), 2.2)
    assert questions(machine.handle(Parted(9), 2.3)) == []
    (later,) = questions(machine.handle(Tick(), 2.0 + FOLLOW.renew_seconds))
    assert later["position"] == 10
    (again,) = questions(machine.handle(Parted(0), 2.0 + FOLLOW.renew_seconds))
    assert again["position"] == 1
    assert questions(machine.handle(Parted(10), 100.0)) == []  # nothing is held there


def test_segments_are_loaded_one_by_one_the_farthest_reaching_first() -> None:
    machine = asking()
    assert machine.handle(shared(segment(4, 9, "cd" * 20), segment(0, 4), request="r-1"), 1.0) == [Load(segment(0, 4))]
    assert machine.handle(shared(segment(0, 6, "ef" * 20)), 1.0) == []
    assert machine.handle(Loaded(segment(0, 4), 4), 1.0) == [Load(segment(4, 9, "cd" * 20))]
    machine.handle(Loaded(segment(4, 9, "cd" * 20), 9), 1.0)
    assert machine.position == 9
    assert machine.deadline == 20.0


def test_a_segment_that_is_absent_is_asked_for_again() -> None:
    machine = asking()
    machine.handle(shared(segment(0, 4), request="r-1"), 1.0)
    effects = machine.handle(Loaded(segment(0, 4), 0, "lacks it"), 1.0)
    (question,) = questions(effects)
    assert question["position"] == 0
    assert machine.handle(shared(segment(0, 4), request=question["request"]), 1.1) == [Load(segment(0, 4))]


def test_a_segment_that_is_no_good_is_never_loaded_again() -> None:
    machine = asking()
    machine.handle(shared(segment(0, 4), request="r-1"), 1.0)
    (question,) = questions(machine.handle(Loaded(segment(0, 4), 2, "forged", useless=True), 1.0))
    assert question["position"] == 2
    effects = machine.handle(shared(segment(0, 4), request=question["request"]), 1.1)
    assert not any(isinstance(effect, Load) for effect in effects)
    assert machine.handle(shared(segment(0, 4, "cd" * 20)), 1.2) == [Load(segment(0, 4, "cd" * 20))]


@pytest.mark.parametrize("bad", [Segment(0, 5, 0, "ab" * 20), Segment(0, 5, 1 << 40, "ab" * 20),
                                 Segment(0, 1 << 30, 100, "ab" * 20), Segment(3, 5, 100, "ab" * 20)])
def test_segments_that_cannot_be_or_do_not_continue_are_not_loaded(bad: Segment) -> None:
    machine = asking()
    assert not any(isinstance(effect, Load) for effect in machine.handle(shared(bad), 1.0))


def test_what_waits_is_bounded_and_what_is_dropped_is_asked_for() -> None:
    machine = asking()
    machine.handle(messages(0, 0, "r-1"), 0.0)
    for number in range(1, 10_000):
        heard = messages(1, 2)
        heard.body.first = 2 * number  # type: ignore[union-attr]
        machine.handle(heard, 0.1)
    assert len(machine._pending) == 16
    machine = asking(1)
    machine.handle(shared(*(segment(first, first + 1) for first in range(2, 10_000))), 0.1)
    assert len(machine._segments) == 4096
    machine = asking(1)
    wide = "".join(f'{{"a": {n}}}, ' for n in range(1000))
    for number in range(2, 20):
        body = FeedMessages(time=0, id="", request="", feed_id=FEED, subfeed=SUBFEED, first=number,
                            messages=[{"text": wide}] * 4)
        machine.handle(Heard(body, "owner"), 0.1)
    assert 2 < len(machine._pending) < 10
    assert sum(len(known.data) for known in machine._pending) < 400 * 1024
    machine = asking(1)
    for number in range(5000):
        machine._refused.add(f"{number:040x}")
        machine.handle(Loaded(segment(2, 3, f"{number:040x}"), 1, "forged", useless=True), 0.1)
    assert len(machine._refused) <= 5000


def test_what_one_node_tells_crowds_out_nothing_of_another() -> None:
    def of_liar(first: int, end: int) -> Heard:
        return Heard(messages(first, end).body, "liar")

    machine = asking(10)
    for number in range(100):
        begin = 1000 + 256 * number
        parts = [segment(first, first + 1, f"{first:040x}") for first in range(begin, begin + 256)]
        machine.handle(Heard(shared(*parts).body, "liar"), 0.1)
    assert machine.handle(shared(segment(10, 12)), 0.2)[0] == Load(segment(10, 12))
    for number in range(100):  # while it works on that
        machine.handle(of_liar(number % 10, 11), 0.3)
    machine.handle(messages(12, 14), 0.4)
    effects = machine.handle(Loaded(segment(10, 12), 12), 0.5)
    for _ in range(20):
        taken = [effect for effect in effects if isinstance(effect, Take)]
        if taken and taken[0].sender == "owner":
            break
        effects = machine.handle(Taken(12, "forged"), 0.6)
    assert taken == [take(CHAIN[12:14], first=12)]


def test_segments_of_whom_told_of_what_is_not_there_are_tried_last() -> None:
    machine = asking()
    lies = [segment(0, 9, f"{number:040x}") for number in range(50)]
    assert machine.handle(Heard(shared(lies[0]).body, "liar"), 1.0)[0] == Load(lies[0])
    machine.handle(shared(segment(0, 4)), 1.0)
    for lie in lies[1:]:
        machine.handle(Heard(shared(lie).body, "liar"), 1.0)
    assert machine.handle(Loaded(lies[0], 0, "lacks it"), 1.0)[0] == Load(segment(0, 4))
    machine.handle(shared(segment(0, 3, "cd" * 20)), 1.0)
    effects = machine.handle(Loaded(segment(0, 4), 0, "the disk is full", trouble=True), 1.0)
    assert effects[0] == Load(segment(0, 3, "cd" * 20))


# --- heads


def test_a_head_is_kept_once_all_that_it_tells_of_is_held() -> None:
    machine = asking()
    effects = machine.handle(shared(segment(0, 4), request="r-1", head=head_at(8)), 1.0)
    assert not any(isinstance(effect, KeepHead) for effect in effects)
    assert machine.known
    assert machine.count == 8
    machine.handle(Loaded(segment(0, 4), 4), 1.0)
    machine.handle(shared(segment(4, 8)), 1.0)
    effects = machine.handle(Loaded(segment(4, 8), 8), 1.0)
    assert [effect.head.count for effect in effects if isinstance(effect, KeepHead)] == [8]


def test_the_head_of_a_push_is_kept_when_an_answer_repeats_it() -> None:
    machine = asking(8)
    machine.handle(Heard(FeedMessages(time=0, id="", request="", feed_id=FEED, subfeed=SUBFEED, first=8,
                                      head=head_at(8)), "owner"), 1.0)
    assert machine.handle(Tick(), 1.0) == []
    effects = machine.handle(shared(request="r-1", head=head_at(8)), 1.0)
    assert [effect.head.count for effect in effects if isinstance(effect, KeepHead)] == [8]
    assert machine.handle(shared(request="r-1", head=head_at(8)), 1.0) == []


def test_the_owners_word_that_there_is_more_is_asked_for() -> None:
    machine = asking()
    machine.handle(shared(segment(0, 4), request="r-1", head=head_at(8)), 1.0)
    assert [question["position"] for question in questions(machine.handle(Loaded(segment(0, 4), 4), 1.0))] == [4]


@pytest.mark.parametrize("head", [head_at(8, OTHER), {}, {"body": {"count": 99}, "signature": "x"},
                                  {"body": [], "signature": ""}, {"body": {"count": "99"}}])
def test_a_head_that_the_owner_did_not_sign_is_nothing(head: Any) -> None:
    machine = asking()
    machine.handle(shared(request="r-1", head=head), 1.0)
    assert not machine.known
    assert machine.count == 0
    machine.handle(IndexRead(Index(99, head, ())), 1.0)
    assert not machine.known


# --- whole readers with real providers


def test_a_new_reader_gets_everything_and_the_next_finds_it_in_the_bucket() -> None:
    world = World()
    owner = Sharing(world, "owner")
    owner.append(100, 100)
    assert world.puts == []
    reader = reading(world, "reader", run=1.0)
    assert reader.chain == owner.chain
    assert reader.heads[-1] == 100
    del world.nodes["owner"]
    later = reading(world, "later", run=1.0)
    assert later.chain == owner.chain
    assert len(world.puts) == 1


def test_new_messages_arrive_live_and_a_long_batch_by_the_bucket() -> None:
    world = World()
    owner = Sharing(world, "owner")
    owner.append(3)
    reader = reading(world, "reader", run=1.0, wanted=600)
    for _ in range(5):
        owner.append(2)
        world.run(0.1)
        assert reader.chain == owner.chain
    puts = len(world.puts)
    owner.append(50, 100)
    world.run(2.0)
    assert reader.chain == owner.chain
    assert len(world.puts) == puts + 1
    owner.append(1)
    world.run(60.0)
    owner.append(1)
    world.run(0.1)
    assert reader.chain == owner.chain
    assert len(world.puts) == puts + 1


def test_after_a_lost_push_the_reader_catches_up_with_the_next_or_when_it_renews() -> None:
    world = World()
    owner = Sharing(world, "owner")
    owner.append(3)
    reader = reading(world, "reader", run=1.0, wanted=600)
    world.passes = lambda body, sender, receiver: 0
    owner.append(1)
    world.run(0.1)
    world.passes = lambda body, sender, receiver: 1
    assert len(reader.chain) == 3
    owner.append(1)
    world.run(0.1)
    assert reader.chain == owner.chain
    world.passes = lambda body, sender, receiver: 0
    owner.append(1)
    world.run(0.1)
    world.passes = lambda body, sender, receiver: 1
    world.run(21.0)
    assert reader.chain == owner.chain


def test_a_relay_serves_while_the_owner_is_away_and_only_then() -> None:
    world = World()
    owner = Sharing(world, "owner")
    owner.append(30, 10)
    relay = Sharing(world, "relay", owner.chain, own=False, jitter=0.3)
    other = Sharing(world, "other", owner.chain[:20], own=False, jitter=0.6)
    first = reading(world, "first", owner.chain[:28], run=5.0)
    assert first.chain == owner.chain
    assert {by for by, body in world.said if not isinstance(body, FeedSubscribe)} == {"owner"}
    del world.nodes["owner"]
    second = reading(world, "second", owner.chain[:15], run=5.0)
    assert second.chain == relay.chain
    assert {by for by, body in world.said if not isinstance(body, FeedSubscribe)} == {"owner", "relay"}
    del world.nodes["relay"]
    world.index = None
    third = reading(world, "third", owner.chain[:15], run=5.0)
    assert third.chain == other.chain


def test_a_relay_with_more_is_heard_although_one_with_less_was_quicker() -> None:
    world = World()
    owner = Sharing(world, "owner")
    owner.append(30, 10)
    del world.nodes["owner"]
    Sharing(world, "little", owner.chain[:20], own=False, jitter=0.0)
    Sharing(world, "much", owner.chain, own=False, jitter=1.0)
    reader = reading(world, "reader", owner.chain[:15], run=5.0)
    assert reader.chain == owner.chain


def test_an_object_that_is_damaged_or_vanished_is_put_there_anew() -> None:
    world = World()
    owner = Sharing(world, "owner")
    owner.append(100, 100)
    reading(world, "first", run=1.0)
    (sha1,) = world.objects
    for harm in ("damaged", "gone"):
        if harm == "damaged":
            world.objects[sha1] = b"{}\n"
        else:
            del world.objects[sha1]
        reader = reading(world, harm, run=30.0, wanted=600)
        assert reader.chain == owner.chain, harm
        assert hashlib.sha1(world.objects[sha1]).hexdigest() == sha1


def test_a_liar_costs_a_few_questions_and_nothing_else() -> None:
    world = World()
    owner = Sharing(world, "owner")
    owner.append(40, 100)
    forged = encode_segment(ours([{"forged": True}], key=OTHER))
    sha1 = hashlib.sha1(forged).hexdigest()
    world.objects[sha1] = forged
    world.index = Index(10**6, {"body": {"count": 10**6}, "signature": "00"}, (Segment(0, 10_000, len(forged), sha1),))

    class Liar(Sharing):
        def hear(self, body: Any, sender: str) -> None:
            if isinstance(body, FeedSubscribe):
                fields = {"time": 0, "id": "", "request": body.request, "feed_id": FEED, "subfeed": SUBFEED}
                fake = json.loads(ours([{"forged": True}], key=OTHER)[0])
                self.world.say(self.name, FeedMessages(**fields, first=body.position, messages=[fake, 1, None]))  # type: ignore[arg-type, list-item]
                self.world.say(self.name, FeedShared(**fields, segments=[Segment(0, 10_000, len(forged), sha1)]))  # type: ignore[arg-type]
                self.world.say(self.name, FeedMessages(**fields, first=10**9, messages=[fake]))  # type: ignore[arg-type]

    Liar(world, "liar", own=False)
    reader = reading(world, "reader", run=300.0, wanted=600)
    assert reader.chain == owner.chain
    assert [part.sha1 for part in reader.loads].count(sha1) == 1
    assert len(world.spoken(FeedSubscribe)) < 40
    assert "refused" in reader.machine.inquiry.tried() or reader.errors


# What may become of one message on its way: how often it arrives.
fates = st.lists(st.sampled_from([0, 0, 1, 1, 1, 2]), max_size=200)
waits = st.lists(st.floats(0.0, 2.0), max_size=200)
steps = st.lists(st.one_of(
    st.tuples(st.just("append"), st.integers(1, 60), st.integers(0, 200)),
    st.tuples(st.just("wait"), st.floats(0.01, 30.0), st.none()),
    st.tuples(st.just("restored"), st.none(), st.none()),
    st.tuples(st.just("vanish"), st.none(), st.none()),
    st.tuples(st.just("damage"), st.none(), st.none()),
    st.tuples(st.just("away"), st.none(), st.none()),
    st.tuples(st.just("back"), st.none(), st.none()),
), max_size=12)


@settings(max_examples=60, deadline=None)
@given(steps, fates, waits)
def test_whatever_happens_on_the_way_the_reader_reaches_the_true_end(
        story: list[tuple[str, Any, Any]], arrivals: list[int], delays: list[float]) -> None:
    world = World()
    owner = Sharing(world, "owner")
    Sharing(world, "relay", [], own=False)
    reader = Reading(world, "reader")
    reader.want(1e6)
    fate, delay = iter(arrivals), iter(delays)
    world.passes = lambda body, sender, receiver: next(fate, 1)
    world.delays = lambda: next(delay, 0.001)
    for what, first, second in story:
        if what == "append":
            owner.append(first, second)
        elif what == "wait":
            world.run(first)
        elif what == "restored":
            reader.restored()
        elif what == "vanish":
            world.objects.clear()
        elif what == "damage":
            world.objects = {sha1: data[:-1] for sha1, data in world.objects.items()}
        elif what == "away":
            world.nodes.pop("owner", None)
        elif what == "back":
            world.nodes["owner"] = owner
        world.run(0.05)
        assert reader.chain == owner.chain[:len(reader.chain)]
    world.nodes["owner"] = owner
    fate, delay = iter([]), iter([])
    world.run(120.0)
    assert reader.chain == owner.chain
    assert reader.errors == []
