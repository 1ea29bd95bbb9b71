"""JSON that anybody may have written."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.protocol.plain_json import decode, decode_lines, has_extreme_numbers

# What msgspec is slow to read, in all ways of writing it.
EXTREMES = ["1e300", "-1.5e308", "5e-324", "2.2E-308", "1e+295", "1e-0300", "12.25e299"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(st.characters(exclude_categories=["Cs"]))
    | st.floats(allow_nan=False, allow_infinity=False), lambda inner: st.lists(inner) | st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), inner), max_leaves=10)


def many(*texts: str) -> bytes:
    return ("[" + ", ".join(text for _ in range(400) for text in texts) + "]").encode()


@pytest.mark.parametrize("text", EXTREMES)
def test_many_extreme_numbers_are_noticed_and_read_as_they_stand(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (many(text), many(text).replace(b", ", b","), b'{"a":' + many(text) + b"}"):
        assert has_extreme_numbers(data)
    monkeypatch.setattr(msgspec.json, "decode", lambda _data: pytest.fail("it takes too long"))
    assert decode(many(text)) == [float(text)] * 400


def test_what_is_common_is_read_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (many("1e22", "1e-200", "6.02e23", "0.1", "12345678901234567890", '"3e300"', '"1e300f"'), b"[1e300]",
                 b"[" + b",".join([b"1e300"] * 300) + b"]"):
        assert not has_extreme_numbers(data)
    monkeypatch.setattr(json, "loads", lambda *_arguments, **_named: pytest.fail("it takes longer"))
    assert decode(b'{"a": [1e300]}') == {"a": [1e300]}


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_both_ways_read_the_same(value: Any) -> None:
    data = json.dumps([value, [1e300] * 400]).encode()
    assert decode(data) == [*msgspec.json.decode(json.dumps([value]).encode()), [1e300] * 400]


def test_many_short_lines_are_read_as_one_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode_lines(b'{"a":1}\n[2]') == [{"a": 1}, [2]]
    monkeypatch.setattr(msgspec.json, "decode", lambda _data: pytest.fail("it takes too long"))
    assert decode_lines(b"\n".join([b"[1e300,2]"] * 400)) == [[1e300, 2]] * 400


@pytest.mark.parametrize("broken", [
    b"1e400", b"NaN", b"-Infinity", b"[", b"01", b"'a'", b'"\x01"', b'"\xff"', b"[" * 10**5],
    ids=lambda data: repr(data[:20]))
def test_what_is_no_json_is_refused_by_both_ways(broken: bytes) -> None:
    for data in (broken, b"[" + many("1e300") + b"," + broken + b"]"):
        with pytest.raises((msgspec.DecodeError, UnicodeDecodeError, RecursionError)):
            decode(data)
