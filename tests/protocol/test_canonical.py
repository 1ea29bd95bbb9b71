"""Canonical JSON as the network of 2022 made it."""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.errors import BadMessage
from kachery_fast.protocol.canonical import _quick_bytes, canonical_bytes, object_sha1

VECTORS = [json.loads(line) for line in
           (Path(__file__).parent.parent / "vectors" / "signing.jsonl").read_text("utf-8").strip().split("\n")]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6), inner, max_size=4),
    max_leaves=12)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["sha1"][:8])
def test_golden_vectors(vector: dict[str, str]) -> None:
    value = json.loads(vector["canonical"])
    assert canonical_bytes(value).decode() == vector["canonical"]
    assert object_sha1(value) == vector["sha1"]


def test_keys_are_ordered_by_utf16_code_unit_not_by_code_point() -> None:
    assert canonical_bytes({"～": 2, "😀": 1}).decode() == '{"😀":1,"～":2}'
    assert sorted(["～", "😀"]) == ["～", "😀"]  # which is not how Python would order them


@pytest.mark.parametrize(("value", "text"), [
    (1.0, "1"), (-0.0, "0"), (1e21, "1e+21"), (1e-7, "1e-7"), (2**53, "9007199254740992"),
    (123456789012345678901, "123456789012345680000"), ("\u001f\b\"\\/é", '"\\u001f\\b\\"\\\\/é"'),
    (True, "true"), ([], "[]"), ({}, "{}"), ((1, 2), "[1,2]"),
])
def test_values_are_written_as_javascript_writes_them(value: object, text: str) -> None:
    assert canonical_bytes(value).decode() == text


@pytest.mark.parametrize("value", [
    float("nan"), float("inf"), "\ud800", {1: 2}, {"a": object()}, b"bytes", {"\udfff": 1}, 10**400,
])
def test_what_is_not_json_is_refused(value: object) -> None:
    with pytest.raises(BadMessage):
        canonical_bytes(value)


def test_a_bottomless_value_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(BadMessage):
        canonical_bytes(value)


@given(json_values)
def test_it_reads_back_as_the_same_value_and_is_canonical_at_once(value: object) -> None:
    data = canonical_bytes(value)
    assert json.loads(data, parse_int=float) == value  # every number is a double
    assert canonical_bytes(json.loads(data)) == data


# --- the quick way


def by_the_rules(value: Any) -> bytes:
    return rfc8785.dumps(value)


finite = st.floats(allow_nan=False, allow_infinity=False)
scaled = st.builds(lambda digits, power: digits * 10.0**power, st.integers(-10**6, 10**6), st.integers(-30, 30))


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_the_quick_way_writes_what_the_rules_say_or_leaves_it(value: object) -> None:
    assert canonical_bytes(value) == by_the_rules(value)
    assert _quick_bytes(value) in (None, by_the_rules(value))


@settings(max_examples=300, deadline=None)
@given(st.lists(finite | scaled, max_size=5))
def test_numbers_are_written_alike_by_both_ways(numbers: list[float]) -> None:
    assert canonical_bytes({"a": numbers}) == by_the_rules({"a": numbers})


@pytest.mark.parametrize("value", [
    {"i": 5, "s": "e\"\\\n\u007f\u2028é～", "f": -12.5, "l": [True, False, None, {"b": 0.1, "a": 9007199254740.99}]},
    {"hash": "3e10" * 32, "body": {"time": 1795175653433, "z": {}, "y": []}}, [1, 2],
])
def test_what_is_common_goes_the_quick_way(value: object) -> None:
    assert _quick_bytes(value) == by_the_rules(value)


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.parametrize("value", [
    5, "text", None, {"a": 1.0}, {"a": -0.0}, {"a": [2**53]}, {"a": -(2**60)}, {"a": 1e21}, {"a": 1e-7},
    {"😀": 1, "～": 2}, {"a": (1, 2)}, {"a": float("nan")}, {"a": float("-inf")}, {1: 2}, {"a": b"bytes"},
    {"a": "\ud800"}, {"a": {1, 2}}, {"a": datetime.datetime(2026, 11, 20)}, {"a": decimal.Decimal("1.5")},
    {"a": uuid.UUID(int=1)}, {"a": Colour.RED}, {"a": 10**400}, {"a": object()},
], ids=lambda value: str(value).partition(" at 0x")[0])
def test_what_is_doubtful_is_left_to_the_rules(value: object) -> None:
    assert _quick_bytes(value) is None
