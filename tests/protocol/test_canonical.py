"""Canonical JSON as the network of 2022 made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_fast.errors import BadMessage
from kachery_fast.protocol.canonical import canonical_bytes, object_sha1

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
