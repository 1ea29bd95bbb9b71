"""Segments and the index of a subfeed: owner and relays cut alike; what is hostile is refused."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_fast.errors import BadMessage
from kachery_fast.protocol.feed_bodies import Segment
from kachery_fast.protocol.feed_segments import (
    SEGMENT_MESSAGES_MAX,
    SEGMENT_SIZE_BYTES_MAX,
    Index,
    cut,
    encode_index,
    encode_segment,
    parse_index,
    parse_segment,
)
from kachery_fast.protocol.feeds import Extension, extend, sign_head, tail_after

from .chains import FEED, KEY, START, SUBFEED, TIME_MS, mixed

MIB = 1024 * 1024
SHA1 = "da39a3ee5e6b4b0d3255bfef95601890afd80709"
CHAIN = mixed(2, 3)


# --- cutting


@pytest.mark.parametrize(("sizes", "expected"), [
    ([], []),
    ([10], [(0, 1, 11, False)]),
    ([MIB - 1], [(0, 1, MIB, True)]),
    ([MIB - 2], [(0, 1, MIB - 1, False)]),
    ([MIB - 2, 1], [(0, 1, MIB - 1, True), (1, 2, 2, False)]),
    ([MIB - 3, 1], [(0, 2, MIB, True)]),
    ([MIB - 4, 1], [(0, 2, MIB - 1, False)]),
    ([5, 3 * MIB, 5], [(0, 1, 6, True), (1, 2, 3 * MIB + 1, True), (2, 3, 6, False)]),
    ([1] * 10_000, [(0, 10_000, 20_000, True)]),
    ([1] * 10_001, [(0, 10_000, 20_000, True), (10_000, 10_001, 2, False)]),
])
def test_segments_are_cut_greedily(sizes: list[int], expected: list[Any]) -> None:
    assert list(cut(sizes, 0)) == expected


message_sizes = st.lists(st.integers(1, 400_000) | st.sampled_from([MIB - 1, MIB, 3 * MIB]), max_size=40)


@given(message_sizes, message_sizes)
def test_what_is_closed_stays_as_it_is_whatever_is_appended(sizes: list[int], more: list[int]) -> None:
    before, after = list(cut(sizes, 0)), list(cut(sizes + more, 0))
    closed = [part for part in before if part[3]]
    assert after[:len(closed)] == closed
    assert [part[0] for part in after] == [0, *(part[1] for part in after)][:len(after)]
    assert sum(part[2] for part in after) == sum(sizes + more) + len(sizes + more)
    for first, end, size, is_closed in after:
        assert size == sum((sizes + more)[first:end]) + end - first
        assert size <= MIB or end == first + 1
        assert is_closed or end == len(sizes + more)
    # Cutting may go on where a closed segment ended.
    position = closed[-1][1] if closed else 0
    assert closed + list(cut((sizes + more)[position:], position)) == after


# --- segments


def test_a_segment_comes_back() -> None:
    data = encode_segment(CHAIN)
    assert len(data) == sum(len(message) + 1 for message in CHAIN) == next(iter(cut(map(len, CHAIN), 0)))[2]
    assert data.split(b"\n") == [*CHAIN, b""]
    assert extend(START, 0, parse_segment(data), CHAIN.__getitem__) == Extension(
        CHAIN, tail_after(FEED, SUBFEED, CHAIN[-1]))


@pytest.mark.parametrize("data", [
    b"", b"\n", b"{}", b"{}\n{}", b"5\n", b"[]\n", b"null\n", b"{\n", b"\xff\n", b'{"a":"\xff"}\n', b"{}\n5\n",
    b"{}\n" * (SEGMENT_MESSAGES_MAX + 1), b"[" * 100_000 + b"\n", b'{"a":' * 100_000 + b"\n", b"{}{}\n", b"{},\n",
    b'{"a":1e999}\n',
], ids=lambda data: repr(data[:20]))
def test_what_is_no_segment_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage, match="segment"):
        parse_segment(data)


@given(st.binary(max_size=200), st.integers(0, 2**16))
def test_a_damaged_segment_is_refused_or_shows_no_message_that_was_not_signed(noise: bytes, at: int) -> None:
    data = encode_segment(CHAIN)
    at %= len(data)
    try:
        messages = parse_segment(data[:at] + noise + data[at + len(noise):])
    except BadMessage:
        return
    found = extend(START, 0, messages, CHAIN.__getitem__)
    assert isinstance(found, Extension)
    assert found.new == CHAIN[:len(found.new)]
    assert found.error is not None or len(found.new) == len(messages)


def test_the_worst_segment_stays_within_the_bound_of_a_node() -> None:
    worst = b'{"a":[' + b"{}," * ((SEGMENT_SIZE_BYTES_MAX - 20) // 3) + b"{}]}\n"
    assert SEGMENT_SIZE_BYTES_MAX - 20 < len(worst) <= SEGMENT_SIZE_BYTES_MAX
    tracemalloc.start()
    try:
        parse_segment(worst)
        assert tracemalloc.get_traced_memory()[1] < 300 * MIB
    finally:
        tracemalloc.stop()


# --- the index


def test_an_index_comes_back() -> None:
    head = json.loads(json.dumps(sign_head(tail_after(FEED, SUBFEED, CHAIN[-1]), KEY, TIME_MS)))
    segments = (Segment(0, 3, 700, SHA1), Segment(3, 5, 500, SHA1))
    data = encode_index(5, head, segments)
    assert parse_index(data) == Index(5, head, segments)
    assert json.loads(data) == {"messageCount": 5, "head": head, "segments": [[0, 3, 700, SHA1], [3, 5, 500, SHA1]]}
    assert parse_index(encode_index(0, None, [])) == Index(0, None, ())


def test_an_index_of_2022_has_a_count_alone() -> None:
    assert parse_index(b'{"messageCount":2}') == parse_index(b'{"messageCount":2,"extra":[1]}') == Index(2, None, ())


def index_of(*segments: Any, count: Any = 5, **others: Any) -> bytes:
    return msgspec.json.encode({"messageCount": count, "segments": segments, **others})


@pytest.mark.parametrize("data", [
    b"", b"5", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"messageCount":"2"}', b'{"messageCount":-1}',
    b'{"messageCount":1e300}', b'{"messageCount":9007199254740992}',
    index_of(5), index_of([0, 5, 10]), index_of([0, 5, 10, SHA1, 1]), index_of([0, 5, 10, 5]),
    index_of([0, 5, 10, SHA1.upper()]), index_of([0, 5, 10, "../../../etc/passwd"]), index_of([1, 5, 10, SHA1]),
    index_of([0, 0, 10, SHA1], [0, 5, 10, SHA1]), index_of([0, 2, 10, SHA1], [3, 5, 10, SHA1]),
    index_of([0, 3, 10, SHA1], [2, 5, 10, SHA1]), index_of([0, 6, 10, SHA1]), index_of([0, 4, 10, SHA1]),
    index_of([0, 5, 0, SHA1]), index_of([0, 5, -1, SHA1]), index_of([0, 5, SEGMENT_SIZE_BYTES_MAX + 1, SHA1]),
    index_of([0, 10_001, 10, SHA1], count=10_001), index_of([0, 5, 10, SHA1], head=5),
    index_of([0, 5, 10, SHA1], head={"body": "x" * 3000}),
], ids=lambda data: repr(data[:60]))
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage, match="index"):
        parse_index(data)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_index_or_refused(data: bytes) -> None:
    try:
        found = parse_index(data)
    except BadMessage:
        return
    assert found.count >= 0


def test_numbers_that_take_long_to_read_are_read_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    message = {"body": {"message": {"x": [1e300] * 100}}, "signature": "0"}
    data = encode_segment([json.dumps(message).encode()] * 1000)
    monkeypatch.setattr(msgspec.json, "decode", lambda *_arguments, **_named: pytest.fail("3 s"))
    assert parse_segment(data) == [message] * 1000
    with pytest.raises(BadMessage, match="something else"):
        parse_segment(data + b"[]\n")
