"""Answering for feeds: who answers when, by a message or by the bucket, what is pushed, and what never is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kachery_fast.protocol.feed_bodies import FeedFailed, FeedMessages, FeedShared, FeedSubscribe, Segment
from kachery_fast.protocol.sharing import SEGMENTS_PER_MESSAGE_MAX, FeedSharer
from kachery_fast.protocol.sharing_events import (
    Appended,
    Asked,
    Forgotten,
    Listen,
    Overheard,
    ReadRest,
    RestRead,
    Said,
    Share,
    SharedSome,
    ShareEnded,
    Tick,
    Withdrawn,
)

from .chains import FEED, SUBFEED, ours
from .feed_world import PLACE, SHARE

CHAIN = ours([{"i": number} for number in range(8)])
LONG = ours([{"text": "x" * 2000} for _ in range(3)])
HEAD: dict[str, Any] = {"body": {"count": 8}}


def asked(position: int, sender: str = "b", *, live: bool = False, own: bool = True, count: int = 8,
          request: str = "", forked: bool = False, jitter: float = 0.0, feed: str = FEED) -> Asked:
    body = FeedSubscribe(time=0, id="", request=request or f"{sender}1", feed_id=feed, subfeed=SUBFEED,
                         position=position, live=live)
    return Asked(body, sender, own, count, forked, jitter)


def rest(position: int, messages: list[bytes] | None, **fields: Any) -> RestRead:
    return RestRead(PLACE, position, messages, HEAD, **fields)


def said(effects: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
    return [(effect.kind, effect.fields) for effect in effects if isinstance(effect, Said)]


def listening(now: float = 0.0, sender: str = "b") -> FeedSharer:
    """A sharer with one reader that listens and was answered."""
    machine = FeedSharer(SHARE)
    assert machine.handle(asked(8, sender, live=True), now) == [ReadRest(PLACE, 8)]
    (answer,) = said(machine.handle(rest(8, []), now))
    assert answer[0] is FeedMessages
    return machine


def appended(first: int, messages: list[bytes]) -> Appended:
    return Appended(PLACE, first, messages, HEAD)


# --- questions


def test_an_owner_answers_at_once_and_with_a_message_what_fits_one() -> None:
    machine = FeedSharer(SHARE)
    assert machine.handle(asked(5), 0.0) == [ReadRest(PLACE, 5)]
    (answer,) = said(machine.handle(rest(5, CHAIN[5:]), 0.0))
    kind, fields = answer
    assert kind is FeedMessages
    assert (fields["request"], fields["first"], fields["head"]) == ("b1", 5, HEAD)
    assert [message["body"]["messageNumber"] for message in fields["messages"]] == [5, 6, 7]
    assert machine.deadline is None


def test_who_is_at_the_end_is_told_so() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(8), 0.0)
    ((kind, fields),) = said(machine.handle(rest(8, []), 0.0))
    assert (kind, fields["first"], fields["messages"]) == (FeedMessages, 8, [])


def test_who_begins_at_the_beginning_gets_segments_however_short_it_is() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(0), 0.0)
    assert machine.handle(rest(0, CHAIN), 0.0) == [Share(PLACE, 0, False)]
    ((kind, fields),) = said(machine.handle(SharedSome(PLACE, ["part"], HEAD), 0.1))  # type: ignore[list-item]
    assert (kind, fields["request"], fields["segments"]) == (FeedShared, "b1", ["part"])
    assert machine.handle(ShareEnded(PLACE, 8), 0.2) == []


def test_numbers_that_take_long_to_read_do_not_hold_up_who_passes_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    (slow,) = ours([{"v": [1e300] * 350}])
    machine = listening()
    monkeypatch.setattr(msgspec.json, "decode", lambda _data: pytest.fail("it takes too long"))
    machine.handle(asked(5, "c", request="c1"), 0.0)
    answers = said([*machine.handle(rest(5, [slow]), 0.0), *machine.handle(appended(8, [slow]), 1.0)])
    assert [fields["messages"][0]["body"]["message"]["v"] for _, fields in answers] == [[1e300] * 350] * 2


def test_an_empty_subfeed_is_not_put_into_the_bucket() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(0, count=0), 0.0)
    ((kind, fields),) = said(machine.handle(rest(0, []), 0.0))
    assert (kind, fields["messages"]) == (FeedMessages, [])


def test_what_is_too_long_for_a_message_goes_by_the_bucket() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(3), 0.0)
    assert machine.handle(rest(3, None), 0.0) == [Share(PLACE, 3, False)]


def test_many_segments_are_told_of_in_several_messages() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(3), 0.0)
    machine.handle(rest(3, None), 0.0)
    told = said(machine.handle(SharedSome(PLACE, list(range(600)), None), 0.0))  # type: ignore[arg-type]
    assert [len(fields["segments"]) for _, fields in told] == [SEGMENTS_PER_MESSAGE_MAX, SEGMENTS_PER_MESSAGE_MAX, 88]


def test_questions_that_come_together_are_answered_together() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(4, "b"), 0.0)  # its rest is being read when the others come
    for sender, position in (("c", 5), ("d", 5), ("e", 7)):
        assert machine.handle(asked(position, sender), 0.0) == []
    effects = machine.handle(rest(4, CHAIN[4:]), 0.0)
    assert [effect for effect in effects if isinstance(effect, ReadRest)] == [ReadRest(PLACE, 5)]
    ((_, fields),) = said(machine.handle(rest(5, CHAIN[5:]), 0.0))
    assert fields["first"] == 5
    assert machine.deadline is None


def test_little_is_not_held_up_by_much() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(4, "x"), 0.0)
    machine.handle(asked(0, "b"), 0.0)
    machine.handle(asked(7, "c"), 0.0)
    assert ReadRest(PLACE, 0) in machine.handle(rest(4, CHAIN[4:]), 0.0)
    effects = machine.handle(rest(0, None), 0.0)
    assert effects == [ReadRest(PLACE, 7), Share(PLACE, 0, False)]
    ((kind, fields),) = said(machine.handle(rest(7, CHAIN[7:]), 0.0))
    assert (kind, fields["request"]) == (FeedMessages, "c1")


def test_who_asks_again_while_its_answer_is_made_is_answered_once_more_at_the_end() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(0), 0.0)
    machine.handle(rest(0, None), 0.0)
    for number in range(5):
        machine.handle(asked(0, request=f"again{number}"), 1.0 + number)
        machine.handle(rest(0, None), 1.0 + number)
    effects = machine.handle(ShareEnded(PLACE, 8), 7.0)
    assert effects == [Share(PLACE, 0, False)]
    assert machine.handle(ShareEnded(PLACE, 8), 8.0) == []


def test_who_missed_what_it_was_told_of_has_it_put_there_anew() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(0), 0.0)
    machine.handle(rest(0, None), 0.0)
    machine.handle(ShareEnded(PLACE, 8), 0.0)
    machine.handle(asked(0), 0.5)  # crossed the answer
    assert machine.handle(rest(0, None), 0.5) == [Share(PLACE, 0, False)]
    machine.handle(ShareEnded(PLACE, 8), 0.6)
    machine.handle(asked(2, "c"), 0.8)  # was told of nothing
    assert machine.handle(rest(2, None), 0.8) == [Share(PLACE, 2, False)]
    machine.handle(ShareEnded(PLACE, 8), 0.8)
    for now in (0.9, 1.05, 1.2):  # who asks often is not put off by that
        machine.handle(asked(3), now)
        assert machine.handle(rest(3, None), now) == [Share(PLACE, 3, now == 1.05)]
        machine.handle(ShareEnded(PLACE, 8), now)


@pytest.mark.parametrize("stage", ["reading", "sharing"])
def test_who_cannot_be_served_hears_why(stage: str) -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(0), 0.0)
    if stage == "reading":
        effects = machine.handle(rest(0, None, reason="disk-error", detail="torn"), 0.0)
    else:
        machine.handle(rest(0, None), 0.0)
        effects = machine.handle(ShareEnded(PLACE, 0, "hub", "no hub"), 0.0)
    ((kind, fields),) = said(effects)
    assert (kind, fields["request"]) == (FeedFailed, "b1")
    assert fields["reason"] in FeedFailed.REASONS


def test_of_a_forked_feed_the_part_before_is_served_and_the_fork_told() -> None:
    machine = FeedSharer(SHARE)
    effects = machine.handle(asked(3, count=5, forked=True), 0.0)
    assert [kind for kind, _ in said(effects)] == [FeedFailed]
    assert ReadRest(PLACE, 3) in effects
    effects = machine.handle(asked(5, "c", count=5, forked=True), 0.0)
    assert [fields["reason"] for _, fields in said(effects)] == ["forked"]
    assert len(effects) == 1


def test_four_subfeeds_are_put_into_the_bucket_at_once_the_others_wait() -> None:
    machine = FeedSharer(SHARE)
    begun: list[Any] = []
    for number in range(6):
        feed = f"{number:064x}"
        machine.handle(asked(0, feed=feed), 0.0)
        begun += machine.handle(RestRead((feed, SUBFEED), 0, None), 0.0)
    assert [effect.key[0][-1] for effect in begun] == list("0123")
    assert machine.handle(ShareEnded((f"{2:064x}", SUBFEED), 8), 0.0) == [Share((f"{4:064x}", SUBFEED), 0, False)]


def test_what_is_remembered_is_bounded() -> None:
    machine = FeedSharer(SHARE)
    for number in range(1100):
        machine.handle(asked(3, f"n{number}", own=False), 0.0)
    effects = machine.handle(asked(3, "last", own=False), 0.0)
    assert [(kind, fields["reason"]) for kind, fields in said(effects)] == [(FeedFailed, "busy")]
    machine = FeedSharer(SHARE)
    for number in range(10_050):
        feed = f"{number:064x}"
        machine.handle(asked(8, feed=feed, live=True), 0.0)
        machine.handle(RestRead((feed, SUBFEED), 8, []), 0.0)
    assert not machine.listened_to((f"{0:064x}", SUBFEED), 1.0)
    assert machine.listened_to((f"{10_049:064x}", SUBFEED), 1.0)


def test_subfeeds_that_somebody_makes_up_take_the_place_of_none_that_has_messages() -> None:
    machine = listening()
    for number in range(10_050):
        feed = f"{number:064x}"
        machine.handle(asked(0, "liar", feed=feed, live=True, count=0), 0.0)
        machine.handle(RestRead((feed, SUBFEED), 0, []), 0.0)
    assert machine.listened_to(PLACE, 1.0)


# --- relays


def test_a_relay_waits_for_the_owner_and_longer_by_the_jitter() -> None:
    machine = FeedSharer(SHARE)
    assert machine.handle(asked(5, own=False, jitter=1.0), 0.0) == [Listen(PLACE, True)]
    assert machine.deadline == 1.5
    assert machine.handle(Tick(), 1.4) == []
    assert machine.handle(Tick(), 1.5) == [ReadRest(PLACE, 5), Listen(PLACE, False)]


def test_a_relay_that_has_less_than_the_reader_keeps_silent() -> None:
    machine = FeedSharer(SHARE)
    assert machine.handle(asked(9, own=False), 0.0) == []
    assert machine.deadline is None


def answer_of(first: int, count: int, request: str = "b1") -> FeedMessages:
    return FeedMessages(time=0, id="", request=request, feed_id=FEED, subfeed=SUBFEED, first=first,
                        messages=[{}] * count)


def shared_to(end: int, head: Any = None) -> FeedShared:
    return FeedShared(time=0, id="", request="b1", feed_id=FEED, subfeed=SUBFEED,
                      segments=[Segment(0, end, 10, "ab" * 20)], head=head)


@pytest.mark.parametrize("body", [answer_of(5, 3), answer_of(2, 6, "other"), shared_to(8), shared_to(2, HEAD)])
def test_a_relay_leaves_the_answer_to_who_gives_as_much(body: Any) -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(5, own=False), 0.0)
    assert machine.handle(Overheard(body), 0.2) == [Listen(PLACE, False)]
    assert machine.deadline is None


@pytest.mark.parametrize("body", [answer_of(5, 1), answer_of(5, 0), answer_of(6, 9, "other"), shared_to(7)])
def test_a_relay_answers_where_another_gave_less(body: Any) -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(5, own=False), 0.0)
    assert machine.handle(Overheard(body), 0.2) == []
    assert ReadRest(PLACE, 5) in machine.handle(Tick(), 1.0)


def test_a_relay_is_silenced_once_by_an_answer_that_does_not_help() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(5, own=False), 0.0)
    machine.handle(Overheard(answer_of(5, 99)), 0.2)
    machine.handle(asked(5, own=False, request="b2"), 3.0)
    assert machine.handle(Overheard(answer_of(5, 99, "b2")), 3.2) == []
    assert ReadRest(PLACE, 5) in machine.handle(Tick(), 4.0)


def test_a_relay_pushes_nothing() -> None:
    machine = FeedSharer(SHARE)
    machine.handle(asked(5, own=False, live=True), 0.0)
    assert not machine.listened_to(PLACE, 0.1)


# --- pushes


def test_what_is_appended_is_pushed_at_once_and_what_follows_together() -> None:
    machine = listening()
    ((kind, fields),) = said(machine.handle(appended(8, CHAIN[:1]), 1.0))
    assert (kind, fields["request"], fields["first"], len(fields["messages"])) == (FeedMessages, "", 8, 1)
    assert machine.handle(appended(9, CHAIN[1:2]), 1.001) == []
    assert machine.handle(appended(10, CHAIN[2:4]), 1.002) == []
    assert machine.deadline == pytest.approx(1.02)
    ((_, fields),) = said(machine.handle(Tick(), 1.02))
    assert (fields["first"], len(fields["messages"])) == (9, 3)
    assert machine.deadline is None


def test_nothing_is_pushed_to_nobody() -> None:
    machine = FeedSharer(SHARE)
    assert machine.handle(appended(0, LONG), 0.0) == []
    machine = listening()
    assert not machine.listened_to(PLACE, 60.1)
    assert machine.handle(appended(8, CHAIN[:1]), 60.1) == []
    assert machine.deadline is None


def test_a_push_that_no_message_carries_goes_by_the_bucket_and_on_to_the_end() -> None:
    machine = listening()
    assert machine.handle(appended(8, LONG), 1.0) == [ReadRest(PLACE, 8)]
    assert machine.handle(appended(11, CHAIN[:1]), 1.0) == []  # the share will take it along, or what follows it
    assert machine.handle(rest(8, None), 1.0) == [Share(PLACE, 8, False)]
    ((kind, fields),) = said(machine.handle(SharedSome(PLACE, ["part"], HEAD), 1.1))  # type: ignore[list-item]
    assert (kind, fields["request"]) == (FeedShared, "")
    assert machine.handle(ShareEnded(PLACE, 11), 1.2) == []
    assert machine.deadline == pytest.approx(2.2)
    assert machine.handle(Tick(), 2.2) == [ReadRest(PLACE, 11)]
    ((kind, fields),) = said(machine.handle(rest(11, CHAIN[:1]), 2.2))
    assert (kind, fields["request"], fields["first"]) == (FeedMessages, "", 11)
    assert said(machine.handle(appended(12, CHAIN[:1]), 2.3))[0][1]["first"] == 12


def test_a_push_by_the_bucket_that_failed_is_tried_again_while_somebody_listens() -> None:
    machine = listening()
    machine.handle(appended(8, LONG), 1.0)
    machine.handle(rest(8, None), 1.0)
    assert machine.handle(ShareEnded(PLACE, 0, "bucket", "no bucket"), 2.0) == []
    assert machine.deadline == pytest.approx(7.0)
    assert machine.handle(Tick(), 7.0) == [ReadRest(PLACE, 8)]
    machine.handle(rest(8, None), 7.0)
    machine.handle(ShareEnded(PLACE, 0, "bucket", "no bucket"), 61.0)
    assert machine.deadline is None


def test_who_waits_for_the_bucket_is_named_in_the_answer_that_others_share() -> None:
    machine = listening()
    machine.handle(appended(8, LONG), 1.0)
    machine.handle(asked(0, "c"), 1.0)
    machine.handle(rest(8, None), 1.0)
    machine.handle(ShareEnded(PLACE, 11), 1.0)
    machine.handle(rest(0, None), 1.0)
    ((_, fields),) = said(machine.handle(SharedSome(PLACE, ["part"], HEAD), 1.1))  # type: ignore[list-item]
    assert fields["request"] == "c1"


def test_who_may_not_ask_any_more_gets_nothing() -> None:
    machine = listening()
    machine.handle(appended(8, CHAIN[:1]), 1.0)
    machine.handle(appended(9, CHAIN[:1]), 1.001)
    assert machine.handle(Withdrawn(frozenset({"c"})), 1.002) == []
    assert machine.deadline is None
    assert not machine.listened_to(PLACE, 1.002)
    machine.handle(asked(5, own=False), 2.0)
    assert machine.handle(Withdrawn(frozenset({"c"})), 2.1) == [Listen(PLACE, False)]
    assert machine.deadline is None


def test_who_waits_for_a_feed_that_is_deleted_is_told() -> None:
    machine = listening()
    machine.handle(asked(0, "c"), 1.0)
    machine.handle(rest(0, None), 1.0)
    machine.handle(asked(4, "d"), 1.0)
    told = said(machine.handle(Forgotten(FEED), 1.1))
    assert {(fields["request"], fields["reason"]) for _, fields in told} == {("c1", "deleted"), ("d1", "deleted")}
    assert machine.handle(ShareEnded(PLACE, 8), 1.2) == []
    assert not machine.listened_to(PLACE, 1.2)
