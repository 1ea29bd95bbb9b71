"""The rules of claims: who may run a task, whatever happens in whichever order."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.errors import BadMessage, InvalidArgument, NotPermitted, SignatureInvalid
from kachery_fast.protocol.claims import Claim, claim, describe, finish, keep, look
from kachery_fast.protocol.hub_bodies import ClaimTask, FinishTask
from kachery_fast.protocol.signing import private_key, public_id
from kachery_fast.protocol.tasks import sign_receipt

KEYS = [private_key(bytes([number]) * 32) for number in (1, 2, 3)]
A, B, C = (public_id(key) for key in KEYS)
TASK = "7a" * 16
PURE = "5b" * 20
LEASE = 20_000
Kind = Literal["action", "query", "pure-calculation"]


def asks(kind: str = "action", attempt: str = "1" * 32, *, idempotent: bool = False) -> ClaimTask:
    return ClaimTask(channel="lab", time=0, id="", task=PURE if kind == "pure-calculation" else TASK, kind=kind,
                     function="f", idempotent=idempotent, attempt=attempt)


def claimed(kind: str = "action", *, idempotent: bool = False, state: str = "claimed") -> Claim:
    """What A claimed at time 0."""
    made, granted = claim(None, asks(kind, idempotent=idempotent), A, 0, LEASE)
    assert granted
    return Claim(**{**made.__dict__, "state": state})


def receipt(number: int = 0, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"channel": "lab", "task": TASK, "function": "f", "kwargs": {}, "outcome": "finished",
                              "error": None, "started_ms": 1, "finished_ms": 2, "key": KEYS[number]}
    return sign_receipt(**{**fields, **changes})


def ends(state: str, proof: dict[str, Any] | None = None) -> FinishTask:
    return FinishTask(channel="lab", time=0, id="", task=TASK, state=state, receipt=proof)


# --- who is told yes


@pytest.mark.parametrize("kind", ["action", "query", "pure-calculation"])
def test_what_one_node_holds_no_other_gets(kind: str) -> None:
    found = claimed(kind)
    assert (found.node_id, found.expires_ms) == (A, LEASE)
    for attempt in ("1" * 32, "2" * 32, ""):
        assert claim(found, asks(kind, attempt, idempotent=True), B, LEASE - 1, LEASE) == (found, False)


# kind, both idempotent, state -> whether another node is told yes after the lease is over
AFTERWARDS = [
    ("action", False, "claimed", False), ("action", True, "claimed", True),
    ("action", False, "unknown", False), ("action", True, "unknown", True),
    ("action", False, "finished", False), ("action", True, "finished", False),
    ("action", False, "failed", False), ("action", True, "failed", False),
    ("action", False, "released", True), ("action", True, "released", True),
    ("query", False, "claimed", True), ("query", False, "unknown", True), ("query", False, "released", True),
    ("query", False, "finished", False), ("query", False, "failed", False),
    ("pure-calculation", False, "claimed", True), ("pure-calculation", False, "unknown", True),
    ("pure-calculation", False, "released", True), ("pure-calculation", False, "finished", True),
    ("pure-calculation", False, "failed", True),
]


@pytest.mark.parametrize(("kind", "idempotent", "state", "expected"), AFTERWARDS)
def test_what_has_ended_or_lapsed_starts_again_only_where_that_does_no_harm(
    kind: str, idempotent: bool, state: str, expected: bool
) -> None:
    found = claimed(kind, idempotent=idempotent, state=state)
    standing, granted = claim(found, asks(kind, "2" * 32, idempotent=idempotent), B, LEASE, LEASE)
    assert granted == expected
    if granted:
        assert (standing.node_id, standing.state, standing.expires_ms) == (B, "claimed", 2 * LEASE)
    else:
        assert standing.node_id == A
        assert standing.state == ("unknown" if state == "claimed" else state)


@pytest.mark.parametrize("first", [True, False])
def test_both_claims_must_declare_an_action_idempotent(first: bool) -> None:
    found = claimed(idempotent=first)
    standing, granted = claim(found, asks(attempt="2" * 32, idempotent=not first), B, LEASE, LEASE)
    assert (granted, standing.state) == (False, "unknown")
    for idempotent in (True, False):
        again, granted = claim(standing, asks(attempt="3" * 32, idempotent=idempotent), C, LEASE, LEASE)
        assert (granted, again.state) == (False, "unknown"), "it stays so, whoever asks"


def test_an_action_that_is_claimed_again_as_something_else_is_still_an_action() -> None:
    found = claimed(idempotent=True)
    asked = asks("query", "2" * 32)
    assert not claim(found, asked, B, LEASE, LEASE)[1]
    assert not claim(found, asked, A, 1, LEASE)[1]


def test_only_the_same_attempt_gets_an_action_twice() -> None:
    found = claimed()
    again, granted = claim(found, asks(), A, 5000, LEASE)
    assert granted
    assert again.expires_ms == 5000 + LEASE
    assert not claim(found, asks(attempt="2" * 32), A, 5000, LEASE)[1], "it may have begun the first time"
    assert not claim(found, asks(), A, LEASE, LEASE)[1]
    nameless, _ = claim(None, asks(attempt=""), A, 0, LEASE)
    assert not claim(nameless, asks(attempt=""), A, 0, LEASE)[1]
    assert claim(claimed("pure-calculation"), asks("pure-calculation", "2" * 32), A, 0, LEASE)[1]
    assert claim(claimed(idempotent=True), asks(attempt="2" * 32, idempotent=True), A, 0, LEASE)[1]


# --- how it stands, and stays


def test_a_claim_that_nobody_kept_is_seen_as_lapsed() -> None:
    assert look(claimed(), LEASE - 1).state == "claimed"
    assert look(claimed(), LEASE).state == "unknown"
    assert look(claimed(idempotent=True), LEASE).state == "released"
    assert look(claimed("query"), LEASE).state == "released"
    assert look(claimed(state="finished"), 10 * LEASE).state == "finished"


def test_a_claim_is_kept_alive_by_its_node_alone() -> None:
    kept = keep(claimed(), A, 15_000, LEASE)
    assert kept is not None
    assert look(kept, 15_000 + LEASE - 1).state == "claimed"
    assert keep(claimed(), B, 15_000, LEASE) is None
    for state in FinishTask.STATES:
        assert keep(claimed(state=state), A, 15_000, LEASE) is None
    late = keep(claimed(), A, 3 * LEASE, LEASE)
    assert late is not None, "nobody has been told that it lapsed"


def test_the_end_of_an_action_needs_its_receipt() -> None:
    error = {"type": "ValueError", "message": "no", "traceback": ""}
    failed = receipt(outcome="error", error=error)
    assert finish(claimed(), ends("finished", receipt()), A).receipt == receipt()
    assert finish(claimed(), ends("failed", failed), A).state == "failed"
    other_function, other_outcome = receipt(function="g"), failed
    for proof, kind in (
        (None, InvalidArgument), (receipt(1), InvalidArgument), (other_function, InvalidArgument),
        (other_outcome, InvalidArgument), (receipt(task="8b" * 16), BadMessage), (receipt(channel="lab2"), BadMessage),
        ({**receipt(), "signature": "0" * 128}, SignatureInvalid), ({}, BadMessage), ({"body": 1}, BadMessage),
    ):
        with pytest.raises(kind):
            finish(claimed(), ends("finished", proof), A)


def test_only_who_holds_a_task_says_how_it_ended() -> None:
    for state in FinishTask.STATES:
        with pytest.raises(NotPermitted, match="has claimed it"):
            finish(claimed(), ends(state, receipt()), B)
        with pytest.raises(NotPermitted, match="nobody has claimed it"):
            finish(None, ends(state, receipt()), A)


def test_the_first_end_that_is_known_holds() -> None:
    finished = finish(claimed(), ends("finished", receipt()), A)
    for state in FinishTask.STATES:
        proof = receipt(outcome="error", error={}) if state == "failed" else receipt()
        assert finish(finished, ends(state, proof), A) == finished
    unknown = finish(claimed(), ends("unknown"), A)
    assert unknown.state == "unknown"
    assert finish(unknown, ends("released"), A) == unknown
    assert finish(unknown, ends("finished", receipt()), A).state == "finished", "a late receipt is knowledge"
    assert finish(claimed("query"), ends("finished"), A).state == "finished"
    assert finish(claimed("query", state="finished"), ends("released"), A).state == "finished"


def test_what_is_given_back_is_the_claim_that_was_meant() -> None:
    """A request may be on its way for long, or be repeated by another hub: by then the node may have begun."""
    given_back = FinishTask(channel="lab", time=0, id="", task=TASK, state="released", attempt="1" * 32)
    free = finish(claimed(), given_back, A)
    assert free.state == "released"
    anew, granted = claim(free, asks(attempt="2" * 32), A, 1, LEASE)
    assert granted
    for late in (given_back, ends("released")):
        assert finish(anew, late, A) == anew
    assert not claim(anew, asks(attempt="3" * 32), B, 2, LEASE)[1]
    assert finish(claimed("query"), ends("released"), A).state == "released"


def test_what_nodes_are_told() -> None:
    assert describe(None, TASK).state == "none"
    told = describe(claimed(), TASK, granted=True)
    assert (told.granted, told.node_id, told.kind, told.function, told.claimed, told.expires) == (
        True, A, "action", "f", 0, LEASE)


# --- any order


step = st.tuples(
    st.sampled_from(["claim", "repeat", "keep", "look", "finished", "unknown", "wait", "crash"]),
    st.sampled_from([0, 1, 2]), st.booleans())


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(step, max_size=30))
def test_an_action_begins_at_most_once_in_any_order_of_events(steps: list[tuple[str, int, bool]]) -> None:
    """Nodes claim, repeat lost answers, keep, crash and come back; a node begins with the first yes of an attempt."""
    found: Claim | None = None
    now, serial, told_unknown = 0, 0, False
    begun: set[str] = set()
    attempts: dict[int, str] = {}
    for what, node, long in steps:
        now += 1
        if what == "wait":
            now += 2 * LEASE if long else LEASE // 3
        elif what in ("claim", "repeat"):
            serial += 1
            if what == "claim" or node not in attempts:
                attempts[node] = f"{serial:032x}"
            found, granted = claim(found, asks(attempt=attempts[node]), (A, B, C)[node], now, LEASE)
            if granted:
                begun.add(attempts[node])
        elif what == "crash":
            attempts.pop(node, None)
        elif found is not None and what == "look":
            found = look(found, now)
        elif found is not None and what == "keep":
            found = keep(found, (A, B, C)[node], now, LEASE) or found
        elif found is not None and found.node_id == (A, B, C)[node]:
            found = finish(found, ends(what, receipt(node)), found.node_id)
        assert len(begun) <= 1
        told_unknown = told_unknown or (found is not None and found.state == "unknown")
        assert not told_unknown or (found is not None and found.state in ("unknown", "finished"))
