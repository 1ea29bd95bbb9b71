"""Asking for a task, event by event, and in a world where messages get lost and nodes die."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.errors import (
    BandUnreachable,
    BucketUnreachable,
    HubUnreachable,
    InvalidArgument,
    KacheryError,
    NotPermitted,
    TaskCrashed,
    TaskFailed,
    TaskNotTaken,
    TaskOutcomeUnknown,
)
from kachery_fast.protocol.canonical import object_sha1
from kachery_fast.protocol.hub_bodies import TaskClaim
from kachery_fast.protocol.signing import public_id
from kachery_fast.protocol.task_bodies import TaskDeclined, TaskStatus
from kachery_fast.protocol.task_request_events import (
    Ask,
    BandRestored,
    Cancel,
    Effect,
    Event,
    Find,
    Found,
    Heard,
    Look,
    Looked,
    ProvidersChanged,
    SayFailed,
    Tick,
    Withdraw,
)
from kachery_fast.protocol.task_requesting import TaskRequester
from kachery_fast.protocol.task_view import Phase
from kachery_fast.protocol.tasks import TaskResult, sign_receipt
from tests.protocol.task_world import CHANNEL, FUNCTION, LIMITS, REQUEST, TASK, World, key_of

A, B = public_id(key_of("a")), public_id(key_of("b"))
STAMP: dict[str, Any] = {"time": 0, "id": "i"}
ASKED_MS = 1000
HUB_DOWN = HubUnreachable(url="http://hub", why="connection refused")


class Rig:
    """A requester, its clock, and what it asked for since one last looked."""

    def __init__(self, kind: str = "pure-calculation", providers: dict[str, str] | None = None, *,
                 self_may: bool = False) -> None:
        self.now = 100.0
        self.kind = kind
        self.task = "cd" * 20 if kind == "pure-calculation" else TASK
        self.last_heard: dict[str, float] = {}
        self.machine = TaskRequester(channel=CHANNEL, task=self.task, function=FUNCTION, kind=kind,
                                     kwargs_sha1=object_sha1({}), request_id=REQUEST,
                                     asked_ms=ASKED_MS, limits=LIMITS, last_heard=self.last_heard)
        self.effects: list[Effect] = self.machine.start({A: "rig", B: "lab"} if providers is None else providers,
                                                        self_may, self.now)

    def do(self, event: Event, after: float = 0.0) -> list[Effect]:
        """What the event makes it ask for."""
        self.now += after
        before = self.machine.revision, self.machine.view
        effects = self.machine.handle(event, self.now)
        assert (self.machine.revision != before[0]) == (self.machine.view != before[1])
        return effects

    def says(self, sender: str, status: str, **fields: Any) -> list[Effect]:
        self.last_heard[sender] = self.now
        return self.do(Heard(TaskStatus(**STAMP, task=self.task, status=status, **fields), sender))

    def declines(self, sender: str, reason: str, detail: str = "", request: str = REQUEST) -> list[Effect]:
        return self.do(Heard(TaskDeclined(**STAMP, request=request, task=self.task, reason=reason, detail=detail),
                             sender))

    def has(self, result: Any, **fields: Any) -> Looked:
        return Looked(TaskResult(**{"node_id": A, "task": self.task, "function": FUNCTION, "kind": self.kind,
                                    "kwargs": {}, "result": {"json": result}, "started_ms": 1, "finished_ms": 2,
                                    **fields}))

    def claim(self, state: str, **fields: Any) -> Found:
        node = {} if state == "none" else {"node_id": A, "function": FUNCTION, "kind": self.kind}
        return Found(TaskClaim(self.task, state, **{**node, **fields}))

    def receipt(self, name: str = "a", error: dict[str, str] | None = None, **changed: Any) -> dict[str, Any]:
        return sign_receipt(**{"channel": CHANNEL, "task": self.task, "function": FUNCTION, "kwargs": {},
                               "outcome": "error" if error else "finished", "error": error, "started_ms": 1,
                               "finished_ms": 77, "key": key_of(name), **changed})

    def miss(self) -> list[Effect]:
        """The bucket has no result: the channel is asked."""
        return self.do(Looked())

    def tick(self) -> list[Effect]:
        """Wait until something is due."""
        deadline = self.machine.deadline
        assert deadline is not None, "it waits for ever"
        self.now = max(self.now, deadline)
        effects = self.do(Tick())
        assert self.machine.deadline is None or self.machine.deadline > self.now, "it would spin"
        return effects

    def until(self, effect: Effect, seconds: float = 100.0) -> None:
        """Let time pass until it asks for this."""
        end = self.now + seconds
        while effect not in self.tick():
            assert self.now < end, f"{effect} is not asked for"

    def failure(self, kind: type[KacheryError], status: str = "error") -> KacheryError:
        view = self.machine.view
        assert (view.status, type(view.error)) == (status, kind), view
        assert self.machine.deadline is None
        assert self.do(Tick(), 1000) == self.says(A, "running") == []
        assert view.error is not None
        return view.error

    @property
    def status(self) -> str:
        return self.machine.view.status


# --- calculations


def test_a_result_in_the_bucket_needs_nobody() -> None:
    rig = Rig(providers={})
    assert rig.effects == [Look(fresh=False)]
    assert rig.do(rig.has([1])) == []
    view = rig.machine.view
    assert (view.status, view.cached, view.result, view.node, view.result_ms) == ("finished", True, {"json": [1]}, A, 2)


def test_a_miss_is_asked_for_and_the_result_is_believed_from_the_bucket_alone() -> None:
    rig = Rig()
    assert rig.status == "waiting"
    assert rig.miss() == [Ask()]
    assert rig.says(A, "queued") == []
    assert rig.status == "queued"
    assert rig.says(A, "running", progress=1.7, text="a\x1b[2Jb") == []
    assert (rig.machine.view.progress, rig.machine.view.text, rig.machine.view.node) == (1.0, "a [2Jb", A)
    assert rig.says(B, "queued") == []
    assert rig.status == "running"
    assert rig.says(A, "finished") == [Look(fresh=True)]
    assert rig.says(A, "finished") == []  # said twice
    assert rig.status == "running"
    assert rig.do(rig.has(1, node_id=B)) == []
    assert (rig.status, rig.machine.view.cached, rig.machine.view.node) == ("finished", False, B)


def test_what_was_said_before_it_was_asked_for_is_about_somebody_elses_run() -> None:
    rig = Rig()
    for status in ("running", "error", "finished"):
        assert rig.says(A, status) == []
    assert rig.status == "waiting"
    assert rig.miss() == [Ask()]


def test_a_function_that_raises_is_an_error_with_its_traceback() -> None:
    rig = Rig()
    rig.miss()
    rig.says(A, "error", error={"type": "ValueError", "message": "bad", "traceback": "Traceback"})
    error = rig.failure(TaskFailed)
    assert error.details["traceback"] == "Traceback"
    assert (error.details["node"], error.details["task"]) == (A, rig.task)
    rig = Rig()
    rig.miss()
    rig.says(A, "error", error={"type": "TaskCrashed", "message": "signal 9"})
    assert "signal 9" in rig.failure(TaskCrashed).message


def test_with_nobody_to_ask_it_fails_at_once() -> None:
    rig = Rig(providers={})
    assert rig.miss() == []
    error = rig.failure(TaskNotTaken)
    assert "no node there may provide tasks" in error.message
    assert "Asked: nobody; bucket: absent" in error.message


def test_the_node_itself_may_run_it() -> None:
    rig = Rig(providers={}, self_may=True)
    assert rig.miss() == [Ask()]
    rig.says(A, "running")
    assert rig.status == "running"
    rig = Rig(providers={}, self_may=True)
    rig.miss()
    assert rig.declines(A, "unregistered") == [Withdraw()]
    rig.failure(TaskNotTaken)


def test_silence_ends_after_the_rounds_and_names_who_was_asked() -> None:
    rig = Rig()
    rig.miss()
    begun = rig.now
    rig.until(Ask())
    rig.until(Withdraw())
    assert rig.now - begun == pytest.approx(2 * LIMITS.offer_wait_seconds + 0.5)
    error = rig.failure(TaskNotTaken)
    assert f"no answer from rig ({A[:8]}), lab ({B[:8]})" in error.message
    assert "2 nodes, 2 times" in error.message
    assert error.details["account"]["rounds"] == 2


def test_when_everybody_declines_for_good_nobody_waits() -> None:
    rig = Rig()
    rig.miss()
    assert rig.declines(A, "unregistered", "it runs other.1", request="of somebody else") == []
    assert rig.declines(A, "unregistered", "it runs other.1") == []
    assert rig.declines(B, "bad-arguments", "no n") == [Withdraw()]
    error = rig.failure(TaskNotTaken)
    assert f"rig ({A[:8]}): declines, unregistered: it runs other.1" in error.message
    assert f"lab ({B[:8]}): declines, bad-arguments: no n" in error.message
    assert "its arguments were refused and no task backend there has registered it" in error.message


def test_who_is_busy_is_asked_again_for_as_long_as_patience_lasts() -> None:
    rig = Rig(providers={A: "rig"})
    rig.miss()
    begun, rounds = rig.now, 0
    while not rig.machine.ended:
        rounds += 1
        if not rig.declines(A, "busy", "64 tasks wait"):
            rig.tick()
    assert LIMITS.patience_seconds <= rig.now - begun < LIMITS.patience_seconds + 4
    assert 10 < rounds < 30
    assert "busy: 64 tasks wait" in rig.failure(TaskNotTaken).message
    rig = Rig(providers={A: "rig"})
    rig.miss()
    rig.declines(A, "hub", "the hub is down")
    rig.until(Ask())
    rig.says(A, "running")
    assert rig.status == "running"


def test_an_unknown_reason_is_no_reason_to_despair() -> None:
    rig = Rig(providers={A: "rig"})
    rig.miss()
    rig.declines(A, "solar-eclipse")
    rig.until(Ask())


@pytest.mark.parametrize(("state", "then"), [
    ("none", Ask()), ("released", Ask()), ("unknown", Ask()), ("failed", Ask()), ("finished", Look(fresh=True))])
def test_who_falls_silent_is_looked_up_at_the_hub(state: str, then: Effect) -> None:
    rig = Rig()
    rig.miss()
    rig.says(A, "running")
    begun = rig.now
    rig.until(Find())
    assert rig.now - begun == LIMITS.provider_silence_seconds
    if then not in rig.do(rig.claim(state)):
        rig.until(then)
    assert rig.now - begun < LIMITS.provider_silence_seconds + 1


def test_while_somebody_holds_the_claim_it_waits_and_lets_him_speak() -> None:
    rig = Rig()
    rig.miss()
    rig.says(A, "running", progress=0.5)
    for _ in range(100):
        rig.until(Find())
        assert rig.do(rig.claim("claimed")) == [Ask()]
        assert (rig.status, rig.machine.view.progress) == ("running", 0.5)


def test_a_queue_speaks_rarely_and_is_believed_as_long_as_its_node_is_heard_of() -> None:
    rig = Rig()
    rig.miss()
    rig.says(A, "queued")
    begun = rig.now
    while rig.now < begun + 100:
        rig.last_heard[A] = rig.now
        assert Find() not in rig.do(Tick(), 1.0)
    rig.until(Find())
    assert rig.now - begun < 100 + 1 + LIMITS.provider_silence_seconds
    assert rig.status == "queued"
    rig.do(rig.claim("none"))
    rig.until(Ask())  # the queue is gone


def test_the_executor_is_missed_though_others_chat() -> None:
    rig = Rig()
    rig.miss()
    rig.says(A, "running")
    effects: list[Effect] = []
    for _ in range(9):
        effects += rig.do(Tick(), 1.0)
        effects += rig.says(B, "queued")
    assert effects == [Find()]
    assert rig.do(rig.claim("released")) == []
    assert rig.status == "queued"  # at the other's


def test_lost_and_found_and_lost_again_comes_to_an_end() -> None:
    rig = Rig(providers={A: "rig"})
    rig.miss()
    for _ in range(20):
        rig.says(A, "running")
        rig.says(A, "unknown")
        if rig.machine.ended:
            break
        rig.until(Ask())
    assert "has lost it" in rig.failure(TaskNotTaken).message


def test_what_is_lost_in_a_queue_is_asked_for_as_long_as_somebody_would_take_it() -> None:
    for patient in (True, False):
        rig = Rig(providers={A: "rig"})
        rig.miss()
        begun, losses = rig.now, 0
        while not rig.machine.ended and (not patient or rig.now - begun < LIMITS.patience_seconds - 4):
            losses += 1
            rig.says(A, "queued")
            if not rig.declines(A, "hub", "the hub is down"):
                rig.until(Ask())
        assert 10 < losses < 30  # not in a frenzy
        if patient:
            rig.says(A, "running")
            assert rig.status == "running"
        else:
            assert rig.now - begun < LIMITS.patience_seconds + 4
            assert "gave it back" in rig.failure(TaskNotTaken).message


def test_who_gives_it_back_is_not_waited_for() -> None:
    rig = Rig()
    rig.miss()
    rig.says(A, "running")
    rig.declines(A, "unregistered", "the backend has gone")
    rig.until(Ask())
    assert rig.status == "waiting"
    rig.says(B, "running")
    assert rig.machine.view.node == B


def test_a_backend_that_goes_has_its_time_to_come_back() -> None:
    for status in ("queued", "running"):
        rig = Rig(providers={A: "rig"})
        rig.miss()
        rig.says(A, status)
        rig.declines(A, "unregistered", "the backend has gone")
        for _ in range(5):
            rig.until(Ask())
            rig.declines(A, "unregistered", "it runs nothing")
        rig.until(Ask())
        rig.says(A, "running")
        assert rig.status == "running"
        begun = rig.now
        rig.declines(A, "unregistered", "the backend has gone")
        while not rig.machine.ended:
            if Ask() in rig.do(Tick(), 0.1):
                rig.declines(A, "unregistered", "it runs nothing")
        assert LIMITS.patience_seconds <= rig.now - begun < LIMITS.patience_seconds + 4
        assert "has lost it, and nobody else took it" in rig.failure(TaskNotTaken).message


def test_what_is_refused_by_who_had_it_is_refused_for_good() -> None:
    rig = Rig(providers={A: "rig"})
    rig.miss()
    rig.says(A, "queued")
    rig.declines(A, "unregistered", "the backend has gone")
    rig.until(Ask())
    rig.declines(A, "wrong-type", "here it is of the type query")
    assert "another kind of task" in rig.failure(TaskNotTaken).message


def test_a_result_that_is_said_to_be_there_and_is_not_is_computed_anew() -> None:
    rig = Rig()
    rig.miss()
    rig.says(A, "finished")
    for _ in range(2):
        assert rig.do(Looked()) == []
        rig.until(Look(fresh=True))
    assert rig.do(Looked()) == []
    rig.until(Ask())
    rig.says(B, "finished")
    rig.do(rig.has(5))
    assert rig.machine.view.result == {"json": 5}


def test_a_liar_cannot_keep_it_going_for_ever() -> None:
    rig = Rig()
    rig.miss()
    begun = rig.now
    while not rig.machine.ended:
        for effect in rig.tick():
            if isinstance(effect, Ask):
                rig.says(A, "finished")
        rig.do(Looked(why="refused"))
    assert rig.now - begun < 60
    assert "bucket: refused" in rig.failure(TaskNotTaken).message


def test_trouble_with_the_bucket_passes_or_is_told() -> None:
    trouble = BucketUnreachable(object="o", why="HTTP 503", attempts=5)
    rig = Rig()
    rig.do(Looked(error=trouble))
    assert rig.failure(BucketUnreachable) is trouble
    rig = Rig()
    rig.miss()
    rig.says(A, "finished")
    rig.do(Looked(error=trouble))
    rig.until(Look(fresh=True))
    rig.do(rig.has(1))
    assert rig.status == "finished"
    rig = Rig()
    rig.miss()
    rig.says(A, "finished")
    begun = rig.now
    while not rig.machine.ended:
        rig.do(Looked(error=trouble))
        if not rig.machine.ended:
            rig.until(Look(fresh=True))
    assert LIMITS.patience_seconds < rig.now - begun < LIMITS.patience_seconds + 4
    rig.failure(BucketUnreachable)


def test_that_it_failed_and_nobody_heard_why_is_told_in_the_end() -> None:
    rig = Rig(providers={A: "rig"})
    rig.miss()
    rig.says(A, "running")
    rig.until(Find())
    rig.do(rig.claim("failed"))
    rig.until(Withdraw())
    assert "not heard" in rig.failure(TaskFailed).message


def test_when_bands_and_hub_are_silent_it_ends() -> None:
    rig = Rig(providers={A: "rig"})
    rig.miss()
    rig.says(A, "running")
    begun = rig.now
    while not rig.machine.ended:
        if Find() in rig.tick():
            rig.do(Found(error=HUB_DOWN))
    assert rig.now - begun < LIMITS.patience_seconds + 4
    message = rig.failure(TaskNotTaken).message
    assert "who had it fell silent" in message
    assert "connection refused" in message


def test_who_may_not_ask_is_told_so() -> None:
    refused = NotPermitted(who="This node", action="request tasks", channel=CHANNEL, why="it was revoked")
    rig = Rig()
    rig.miss()
    rig.do(SayFailed(refused))
    assert rig.failure(NotPermitted) is refused
    rig = Rig()
    rig.miss()
    rig.says(A, "running")
    rig.until(Find())
    rig.do(Found(error=refused))
    rig.failure(NotPermitted)


def test_bands_that_are_down_end_it_unless_somebody_has_it_already() -> None:
    down = BandUnreachable(channel=CHANNEL, why="no route")
    rig = Rig()
    rig.miss()
    rig.do(SayFailed(down))
    assert rig.failure(BandUnreachable) is down
    rig = Rig()
    rig.miss()
    rig.says(A, "running")
    assert rig.do(SayFailed(down)) == []
    assert rig.status == "running"


def test_after_an_interruption_it_asks_at_once() -> None:
    rig = Rig()
    rig.miss()
    assert rig.do(BandRestored(), 1.0) == [Ask()]
    rig.says(A, "running")
    assert rig.do(BandRestored()) == [Ask()]
    rig.says(A, "finished")
    assert rig.do(BandRestored()) == []


def test_who_joins_while_it_asks_is_counted() -> None:
    rig = Rig(providers={A: "rig"})
    rig.miss()
    rig.do(ProvidersChanged({A: "rig", B: "new"}))
    assert rig.declines(A, "unregistered") == []
    rig.says(B, "running")
    assert rig.status == "running"


def test_it_can_be_withdrawn_at_any_time() -> None:
    rig = Rig()
    assert rig.do(Cancel()) == []
    assert rig.status == "cancelled"
    assert rig.miss() == []
    rig = Rig()
    rig.miss()
    rig.says(A, "running")
    assert rig.do(Cancel()) == [Withdraw()]
    assert rig.machine.phase is Phase.ENDED


# --- queries


def test_a_query_is_run_though_there_is_an_earlier_result() -> None:
    rig = Rig("query")
    assert rig.effects == [Ask()]
    rig.says(A, "running")
    assert rig.says(A, "finished") == [Look(fresh=True)]
    rig.do(rig.has("mine"))
    assert (rig.machine.view.result, rig.machine.view.cached) == ({"json": "mine"}, False)


def test_without_anybody_the_earlier_result_is_given_with_its_time() -> None:
    for providers in ({}, {A: "rig"}):
        for finished_ms in (ASKED_MS - 500, ASKED_MS):
            rig = Rig("query", providers)
            if providers:
                rig.until(Look(fresh=True))
            else:
                assert rig.effects == [Look(fresh=True)]
            rig.do(rig.has("old", task="ee" * 16, finished_ms=finished_ms))
            view = rig.machine.view
            assert (view.status, view.cached, view.result_ms, view.result) == (
                "finished", True, finished_ms, {"json": "old"})


def test_without_anybody_and_any_result_both_are_told() -> None:
    rig = Rig("query", {})
    rig.miss()
    assert "bucket: absent" in rig.failure(TaskNotTaken).message
    rig = Rig("query")
    rig.do(SayFailed(BandUnreachable(channel=CHANNEL, why="no route")))
    rig.do(rig.has("old", task="ee" * 16))
    assert rig.machine.view.cached


def test_who_turns_up_late_runs_the_query() -> None:
    rig = Rig("query")
    rig.until(Look(fresh=True))
    rig.says(A, "running")
    assert rig.do(rig.has("old", task="ee" * 16)) == []
    assert rig.status == "running"


def test_a_finished_query_is_not_answered_by_an_earlier_result() -> None:
    rig = Rig("query")
    rig.says(A, "finished")
    assert rig.do(rig.has("old", task="ee" * 16, finished_ms=ASKED_MS - 1)) == []
    assert rig.status == "running"
    rig.until(Look(fresh=True))
    rig.do(rig.has("newer, asked for by another", task="ee" * 16, finished_ms=ASKED_MS))
    assert (rig.status, rig.machine.view.cached) == ("finished", False)


# --- actions


def test_an_action_is_believed_from_its_receipt() -> None:
    rig = Rig("action")
    assert rig.effects == [Ask()]
    rig.says(A, "running")
    assert rig.says(A, "finished", receipt=rig.receipt()) == []
    assert (rig.status, rig.machine.view.result, rig.machine.view.result_ms) == ("finished", None, 77)
    rig = Rig("action")
    error = {"type": "OSError", "message": "disk full", "traceback": "tb"}
    rig.says(A, "error", error=error, receipt=rig.receipt(error=error))
    assert rig.failure(TaskFailed).details["traceback"] == "tb"


@pytest.mark.parametrize("status", ["finished", "error", "unknown"])
@pytest.mark.parametrize("receipt", [
    "none", "another's", "of another task", "of another function", "of other arguments", "broken"])
def test_without_a_receipt_of_its_own_a_node_is_not_believed_about_an_action(status: str, receipt: str) -> None:
    rig = Rig("action")
    given: Any = {"none": None, "another's": rig.receipt("b"), "of another task": rig.receipt(task="ee" * 16),
                  "of another function": rig.receipt(function="other"), "broken": {"body": {}},
                  "of other arguments": rig.receipt(kwargs={"to": "you"})}[receipt]
    rig.says(A, "running")
    assert rig.says(A, status, receipt=given) == [Find()]
    assert rig.status == "running"
    rig.do(rig.claim("finished", receipt=rig.receipt()))
    assert rig.status == "finished"


def test_the_word_of_the_hub_ends_an_action() -> None:
    def found(state: str, **fields: Any) -> Rig:
        rig = Rig("action")
        rig.says(A, "running")
        rig.until(Find())
        rig.do(rig.claim(state, **fields))
        return rig

    assert found("finished").status == "finished"
    error = {"type": "OSError", "message": "disk full", "traceback": "tb"}
    assert "disk full" in found("failed", receipt=Rig("action").receipt(error=error)).failure(TaskFailed).message
    assert found("failed", receipt=Rig("action").receipt("b", error=error)).status == "error"  # not the claimer's
    unknown = found("unknown").failure(TaskOutcomeUnknown, "unknown")
    assert f"rig ({A[:8]}) began it" in unknown.message
    assert "never started twice" in unknown.message


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_an_action_that_was_done_with_other_arguments_is_not_this_one(state: str) -> None:
    """The hub knows ids alone; what was run under this one is in the receipt."""
    rig = Rig("action")
    rig.says(A, "finished", receipt=rig.receipt(kwargs={"to": "you"}))
    rig.do(rig.claim(state, receipt=rig.receipt(kwargs={"to": "you"})))
    assert "another task" in rig.failure(InvalidArgument).message


def test_before_an_action_is_given_up_the_hub_is_asked() -> None:
    rig = Rig("action")
    rig.until(Find())
    assert rig.do(rig.claim("none")) == [Withdraw()]
    rig.failure(TaskNotTaken)
    rig = Rig("action", {})  # who ran it has left the channel since
    assert rig.effects == [Find()]
    rig.do(rig.claim("finished", receipt=rig.receipt()))
    assert rig.status == "finished"
    rig = Rig("action")
    rig.until(Find())
    assert rig.do(rig.claim("claimed")) == [Ask()]
    assert rig.status == "running"


def test_when_the_hub_is_silent_too_nobody_knows() -> None:
    rig = Rig("action")
    rig.until(Find())
    rig.do(Found(error=HUB_DOWN))
    message = rig.failure(TaskOutcomeUnknown, "unknown").message
    assert "nobody has answered, and the hub could not be asked" in message
    assert "no answer from rig" in message
    rig = Rig("action")
    rig.says(A, "running")
    while not rig.machine.ended:
        if Find() in rig.tick():
            rig.do(Found(error=HUB_DOWN))
    assert "who had it fell silent" in rig.failure(TaskOutcomeUnknown, "unknown").message
    rig = Rig("action", {})  # nothing was asked: it cannot have begun
    rig.do(Found(error=HUB_DOWN))
    rig.failure(TaskNotTaken)


def test_a_told_end_of_which_the_hub_does_not_know_yet_is_asked_for_again_soon() -> None:
    rig = Rig("action")
    rig.says(A, "running")
    assert rig.says(A, "unknown") == [Find()]
    rig.do(rig.claim("claimed"))
    begun = rig.now
    rig.says(B, "queued")
    rig = Rig("action")
    rig.says(A, "finished")
    rig.do(rig.claim("claimed"))
    rig.until(Find())
    assert rig.now - begun < 1
    rig.do(rig.claim("unknown"))
    rig.failure(TaskOutcomeUnknown, "unknown")


def test_the_id_of_another_task_is_refused() -> None:
    rig = Rig("action")
    rig.until(Find())
    rig.do(rig.claim("finished", function="other.1"))
    assert "'other.1'" in rig.failure(InvalidArgument).message


# --- a whole world


def test_worlds_without_faults_end_well_with_little_ado() -> None:
    for kind in ("pure-calculation", "query", "action"):
        world = World(kind)
        world.add("a", run_seconds=30.0)
        world.add("b", wait_seconds=0.2)
        world.start()
        world.run()
        assert world.machine.view.status == "finished"
        assert (world.begun, world.asked, world.finds) == (1, 1, 1)  # "b" let it go: looked up once


@pytest.mark.parametrize("kind", ["pure-calculation", "query", "action"])
@pytest.mark.parametrize("death", [0.05, 0.15, 5.0, 10.15, 10.4])
def test_a_node_that_dies_at_any_step(kind: str, death: float) -> None:
    """Before the claim, right after it, while running, before the result is out, after it is."""
    world = World(kind)
    doomed = world.add("a", run_seconds=10.0)
    world.at(death, doomed.die)

    def join() -> None:
        world.add("b", run_seconds=2.0)
        world.do(ProvidersChanged({each.node_id: name for name, each in world.executors.items()}))

    world.at(12.0, join)
    world.start()
    world.run()
    status = world.machine.view.status
    if kind != "action" or death < 0.1:
        assert status == "finished"
    elif death > 10.2:
        assert status == "finished"  # it lived to tell the hub
    else:
        assert status == "unknown"
        assert world.begun <= 1
        assert world.now < 100 + death + 20 + 2 * LIMITS.provider_silence_seconds


def test_an_idempotent_action_is_done_by_the_next() -> None:
    world = World("action", idempotent=True)
    world.at(5.0, world.add("a", run_seconds=10.0).die)
    world.add("b", wait_seconds=0.5)
    world.start()
    world.run()
    assert (world.machine.view.status, world.begun, world.done) == ("finished", 2, 1)


def test_an_action_whose_node_comes_back_is_unknown_and_not_begun_again() -> None:
    world = World("action")
    node = world.add("a", run_seconds=10.0)
    world.at(5.0, node.die)
    world.at(7.0, node.wake)
    world.start()
    world.run()
    assert (world.machine.view.status, world.begun) == ("unknown", 1)
    assert world.now < 100 + 5 + 2 * LIMITS.provider_silence_seconds


executors = st.fixed_dictionaries({
    "wait_seconds": st.floats(0.0, 5.0), "run_seconds": st.floats(0.0, 20.0), "raises": st.booleans(),
    "declines": st.sampled_from(["", "", "", "busy", "unregistered"]), "silent": st.booleans()})
lives = st.lists(st.floats(0.0, 40.0), max_size=3)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["pure-calculation", "query", "action"]), idempotent=st.booleans(),
       seed=st.integers(0, 2**32), loss=st.floats(0.0, 0.7), repeats=st.floats(0.0, 0.5),
       delay=st.sampled_from([0.01, 0.5, 4.0]), nodes=st.lists(st.tuples(executors, lives), max_size=3),
       outages=st.lists(st.floats(0.0, 40.0), max_size=2))
def test_whatever_gets_lost_or_dies_it_ends_with_the_truth(
        kind: str, idempotent: bool, seed: int, loss: float, repeats: float, delay: float,
        nodes: list[tuple[dict[str, Any], list[float]]], outages: list[float]) -> None:
    world = World(kind, seed=seed, loss=loss, repeats=repeats, delay_seconds=delay, idempotent=idempotent)
    raises = bool(nodes) and nodes[0][0]["raises"]
    for name, (manner, life) in zip("abc", nodes, strict=False):
        executor = world.add(name, **{**manner, "raises": raises})
        for number, at in enumerate(sorted(life)):
            world.at(at, executor.wake if number % 2 else executor.die)
    for number, at in enumerate(sorted(outages)):
        world.at(at, partial(setattr, world, "hub_down", number % 2 == 0))
    world.start()
    world.run(2000.0)
    assert world.machine.ended
    assert world.asked < 200


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["pure-calculation", "query"]), repeats=st.floats(0.0, 0.5),
       deaths=st.lists(st.floats(0.0, 30.0), max_size=3), run_seconds=st.floats(0.0, 20.0))
def test_while_one_lives_calculations_get_done(seed: int, kind: str, repeats: float, deaths: list[float],
                                               run_seconds: float) -> None:
    world = World(kind, seed=seed, repeats=repeats, delay_seconds=0.5)
    for name, death in zip("abc", deaths, strict=False):
        world.at(death, world.add(name, run_seconds=run_seconds).die)
    world.add("survivor", wait_seconds=1.0, run_seconds=run_seconds)
    world.start()
    world.run(2000.0)
    assert world.machine.view.status == "finished"
