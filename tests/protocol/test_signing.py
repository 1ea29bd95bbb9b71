"""Signatures of today and of 2022, and the guard against replay."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.errors import StaleMessage
from kachery_fast.protocol.canonical import canonical_bytes
from kachery_fast.protocol.signing import (
    FreshnessGuard,
    private_key,
    public_id,
    sign,
    sign_2022,
    verify,
    verify_2022,
)

from .test_canonical import VECTORS, json_values

KEY = private_key(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
ID = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
NOW = 1_800_000_000.0


def test_the_id_is_the_public_key() -> None:
    assert public_id(KEY) == ID


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["sha1"][:8])
def test_golden_signatures_of_2022(vector: dict[str, str]) -> None:
    body = json.loads(vector["canonical"])
    assert sign_2022(body, KEY) == vector["sig"]
    assert verify_2022(body, vector["sig"], ID)


def test_each_form_holds_where_it_is_accepted_and_nowhere_else() -> None:
    body = {"a": 1}
    assert verify(body, sign(body, KEY), ID)
    assert not verify(body, sign_2022(body, KEY), ID)  # only as strong as SHA-1
    assert verify_2022(body, sign(body, KEY), ID)
    assert verify_2022(body, sign_2022(body, KEY), ID)
    assert KEY.sign(canonical_bytes(body)).hex() == sign(body, KEY)


@pytest.mark.parametrize(("signature", "signer"), [
    ("", ID), ("00" * 64, ID), ("xy" * 64, ID), ("é", ID), (None, ""), (None, "00" * 31), (None, "zz" * 32),
    (None, "ff" * 32), (None, "00" * 32),
])
def test_malformed_input_is_simply_not_valid(signature: str | None, signer: str) -> None:
    body = {"a": 1}
    assert not verify(body, sign(body, KEY) if signature is None else signature, signer)
    assert not verify_2022(body, sign_2022(body, KEY) if signature is None else signature, signer)


@settings(max_examples=30)
@given(json_values, json_values)
def test_a_signature_holds_for_its_body_alone(body: object, other: object) -> None:
    assert verify(body, sign(body, KEY), ID)
    assert verify(other, sign(body, KEY), ID) == (canonical_bytes(body) == canonical_bytes(other))


# --- freshness


def test_a_message_is_accepted_once() -> None:
    guard = FreshnessGuard(120.0)
    guard.check("a", "1", int(NOW * 1000), NOW)
    guard.check("a", "2", int(NOW * 1000), NOW)
    guard.check("b", "1", int(NOW * 1000), NOW)
    with pytest.raises(StaleMessage, match="received before"):
        guard.check("a", "1", int(NOW * 1000), NOW + 1)


@pytest.mark.parametrize(("offset", "accepted"), [
    (-120.0, True), (-120.01, False), (120.0, True), (120.01, False), (0.0, True), (-1e9, False), (1e9, False)])
def test_the_window_is_as_wide_before_as_after(offset: float, accepted: bool) -> None:
    guard = FreshnessGuard(120.0)
    time_ms = int((NOW + offset) * 1000)
    if accepted:
        guard.check("a", "1", time_ms, NOW)
    else:
        with pytest.raises(StaleMessage, match="old" if offset < 0 else "future"):
            guard.check("a", "1", time_ms, NOW)


@given(st.floats(-120.0, 120.0), st.lists(st.floats(0.0, 130.0), max_size=6))
def test_a_replay_is_never_accepted_however_long_one_waits(offset: float, waits: list[float]) -> None:
    guard = FreshnessGuard(120.0)
    now, time_ms = NOW, int((NOW + offset) * 1000)
    try:
        guard.check("a", "1", time_ms, now)
    except StaleMessage:
        return  # rounded over the edge of the window
    for number, wait in enumerate(waits):
        now += wait
        guard.check("b", str(number), int(now * 1000), now)
        with pytest.raises(StaleMessage):
            guard.check("a", "1", time_ms, now)


def test_a_flood_is_refused_rather_than_remembered_without_end_and_opens_no_window() -> None:
    guard = FreshnessGuard(120.0, entries_max=80)
    for signer in range(8):
        for number in range(10):
            guard.check(f"s{signer}", str(number), int(NOW * 1000), NOW)
    with pytest.raises(StaleMessage, match="too many"):
        guard.check("s9", "0", int(NOW * 1000), NOW)
    with pytest.raises(StaleMessage, match="received before"):
        guard.check("s0", "0", int(NOW * 1000), NOW)
    later = NOW + 241.0
    guard.check("s9", "0", int(later * 1000), later)


def test_the_flood_of_one_shuts_out_that_one_alone() -> None:
    guard = FreshnessGuard(120.0, entries_max=80)
    for number in range(10):
        guard.check("flooder", str(number), int(NOW * 1000), NOW)
    with pytest.raises(StaleMessage, match="too many"):
        guard.check("flooder", "10", int(NOW * 1000), NOW)
    guard.check("honest", "0", int(NOW * 1000), NOW)
    later = NOW + 241.0
    guard.check("flooder", "again", int(later * 1000), later)


def test_a_guard_of_one_signer_gives_it_all_the_room() -> None:
    guard = FreshnessGuard(120.0, entries_max=80, signer_entries_max=80)
    for number in range(80):
        guard.check("only", str(number), int(NOW * 1000), NOW)
    with pytest.raises(StaleMessage, match="too many"):
        guard.check("only", "80", int(NOW * 1000), NOW)
