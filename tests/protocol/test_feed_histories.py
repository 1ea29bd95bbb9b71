"""Whatever is sent of a feed, in whatever order and however spoiled: the true prefix, or a named error.

A machine keeps a log and shows it batch after batch to ``extend``, as a node does: batches of the true chain (right,
repeated, reordered, truncated, with gaps, at a wrong place) and batches that liars make of it.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.errors import FeedChainBroken, FeedInvalid
from kachery_fast.protocol.feeds import Extension, Fork, Tail, extend, tail_after
from kachery_fast.protocol.signing import sign, sign_2022, verify, verify_2022

from .chains import ELSEWHERE, FEED, KEY, OTHER, START, SUBFEED, mixed, of_2022, ours, plain
from .test_canonical import json_values

LENGTH = 8
TRUE = {old: mixed(old, LENGTH - old) for old in (0, 3, LENGTH)}
MOVED = ours([{"i": number} for number in range(LENGTH)], Tail(FEED, ELSEWHERE))
FORGED = ours([{"i": number} for number in range(LENGTH)], key=OTHER)


def flip(text: str, at: int) -> str:
    at %= len(text)
    return text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1:]


@st.composite
def spoils(draw: st.DrawFn, message: Any) -> Any:
    """One message as a liar without the feed's key could show it."""
    message = json.loads(json.dumps(message))
    body = message["body"]
    kind = draw(st.integers(0, 8))
    if kind == 0:
        return draw(json_values)
    if kind == 1:
        message["signature"] = flip(message["signature"], draw(st.integers(0, 200)))
    elif kind == 2:
        message["signature"] = message["signature"].upper()
    elif kind == 3:
        body[draw(st.sampled_from(sorted(body)))] = draw(json_values)
    elif kind == 4:
        del body[draw(st.sampled_from(sorted(body)))]
    elif kind == 5:
        body[draw(st.sampled_from(["version", "subfeed", "metaData", "extra"]))] = draw(json_values)
    elif kind == 6:
        message["signature"] = sign(body, OTHER)
    elif kind == 7:
        message["signature"] = sign_2022(body, OTHER)
    else:
        return draw(st.sampled_from(plain(MOVED + FORGED)))
    return message


@st.composite
def batches(draw: st.DrawFn, chain: list[bytes]) -> tuple[int, list[Any]]:
    """Where it claims to begin, and the messages: a part of the chain that somebody may have worked on."""
    start = draw(st.integers(0, LENGTH))
    batch = plain(chain[start:draw(st.integers(start, LENGTH))])
    first = start + draw(st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1, 5]))
    work = draw(st.integers(0, 4))
    if work == 1 and batch:
        batch = draw(st.permutations(batch))
    elif work == 2 and batch:
        del batch[draw(st.integers(0, len(batch) - 1))]
    elif work == 3 and batch:
        at = draw(st.integers(0, len(batch) - 1))
        batch[at] = draw(spoils(batch[at]))
    elif work == 4:
        batch = batch + batch
    return first, batch


def grow(log: list[bytes], first: int, batch: list[Any]) -> Extension | Fork:
    """Show a batch to the log as a node would, and hold what must hold whatever it was."""
    tail = tail_after(FEED, SUBFEED, log[-1]) if log else START
    found = extend(tail, first, batch, log.__getitem__)
    extension = found.extension if isinstance(found, Fork) else found
    log += extension.new
    assert extension.tail == (tail_after(FEED, SUBFEED, log[-1]) if log else START)
    assert extension.error is None or isinstance(extension.error, FeedInvalid)
    return found


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(sorted(TRUE)))
def test_any_sequence_of_batches_leaves_the_true_prefix_or_a_named_error(data: st.DataObject, old: int) -> None:
    true, log = TRUE[old], list[bytes]()
    for first, batch in data.draw(st.lists(batches(true), max_size=8)):
        before = len(log)
        found = grow(log, first, batch)
        assert isinstance(found, Extension)  # the owner signed one history, so nobody can show a fork
        assert log == true[:len(log)]
        assert len(log) >= before
        if found.error is None:
            assert len(log) == max(before, first + len(batch)) or not batch
    # However it was treated before, the true chain completes it.
    found = grow(log, 0, plain(true))
    assert isinstance(found, Extension)
    assert found.error is None
    assert log == true


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(0, LENGTH - 1), st.booleans(), st.booleans())
def test_of_two_histories_one_is_kept_up_to_where_the_fork_is_proven(
        data: st.DataObject, at: int, old: bool, old_too: bool) -> None:
    make = of_2022 if old else ours
    one = make([{"i": number} for number in range(LENGTH)])
    past = tail_after(FEED, SUBFEED, one[at - 1]) if at else START
    remake = of_2022 if old and old_too else ours
    two = one[:at] + remake([{"other": number} for number in range(LENGTH - at)], past)
    log: list[bytes] = []
    for true in data.draw(st.lists(st.sampled_from([one, two]), max_size=8)):
        first, batch = data.draw(batches(true))
        found = grow(log, first, batch)
        assert log in (one[:len(log)], two[:len(log)])
        if isinstance(found, Fork):
            assert found.number >= at
            assert found.first == log[found.number]
            assert found.first != found.second
            for evidence in (json.loads(found.first), json.loads(found.second)):
                assert evidence["body"]["messageNumber"] == found.number
                holds = verify if "version" in evidence["body"] else verify_2022
                assert holds(evidence["body"], evidence["signature"], FEED)
            return
        if isinstance(found.error, FeedChainBroken):
            assert found.error.details["number"] > at
    other = two if log[at:] == one[at:len(log)] else one
    if len(log) > at and (at or b'"version":2' in other[0]):
        # Shown from where they part, it is always seen; a first message of 2022 alone says not where it belongs.
        assert isinstance(grow(log, at, plain(other[at:])), Fork)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_nobody_but_the_owner_can_show_a_fork(data: st.DataObject) -> None:
    """All that the owner signed in two subfeeds, in messages of both forms, proves no fork in either."""
    here = TRUE[data.draw(st.sampled_from(sorted(TRUE)))]
    elsewhere = of_2022([{"elsewhere": number} for number in range(LENGTH)]) + MOVED
    log = list(here[:data.draw(st.integers(0, LENGTH))])
    batch = data.draw(st.lists(st.sampled_from(plain(elsewhere + here)), max_size=6))
    first = data.draw(st.integers(0, LENGTH))
    if log:  # the first message of 2022 alone says nothing of where it belongs
        assert isinstance(grow(log, first, batch), Extension)
        assert log == here[:len(log)]


def test_the_key_of_these_histories_is_the_owners() -> None:
    assert sign({}, KEY) != sign({}, OTHER)
    assert isinstance(grow([], 0, plain(TRUE[0])), Extension)
