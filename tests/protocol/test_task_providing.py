"""What a node does with the tasks that are asked of its backends, step by step, without sockets or clocks."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.protocol import task_workers
from kachery_fast.protocol.hub_bodies import TaskClaim
from kachery_fast.protocol.task_bodies import TaskCancel, TaskDeclined, TaskRequest
from kachery_fast.protocol.task_events import (
    Asked,
    BackendGone,
    BackendInfo,
    BackendReady,
    CancelRun,
    Claim,
    Claimed,
    Effect,
    Event,
    Finish,
    FunctionInfo,
    Keep,
    LookedUp,
    LookUp,
    Note,
    Noted,
    PlaceGone,
    Report,
    RunFunction,
    Said,
    SignedReceipt,
    SignReceipt,
    Store,
    Stored,
    Tick,
)
from kachery_fast.protocol.task_providing import TaskProvider
from kachery_fast.protocol.task_workers import TaskProvideLimits
from kachery_fast.protocol.tasks import task_id

LAB = "http://hub lab"
B, C = "bb" * 32, "cc" * 32
LIMITS = TaskProvideLimits(requests_max=100, kwargs_size_bytes_max=1000, progress_interval_seconds=1.0,
                           keep_seconds=5.0)
FUNCTIONS = (FunctionInfo("sum.1", "pure-calculation"), FunctionInfo("now.1", "query"),
             FunctionInfo("mail.1", "action"), FunctionInfo("touch.1", "action", idempotent=True))
E = TypeVar("E")


class Rig:
    """A provider, its clock, and what it asked for since one last looked."""

    def __init__(self, *backends: tuple[str, int], limits: TaskProvideLimits = LIMITS) -> None:
        self.machine = TaskProvider(limits)
        self.now = 0.0
        self.effects: list[Effect] = []
        self.runs_begun = 0
        for name, workers in backends:
            self.connect(name, workers)

    def connect(self, name: str, workers: int = 1, functions: tuple[FunctionInfo, ...] = FUNCTIONS,
                places: frozenset[str] | None = None) -> None:
        self.do(BackendReady(BackendInfo(name, workers, {function.id: function for function in functions}, places)))

    def do(self, event: Event) -> None:
        self.effects += self.machine.handle(event, self.now)

    def take(self, kind: type[E]) -> list[E]:
        """The effects of a kind, which are then forgotten."""
        found: list[E] = [effect for effect in self.effects if isinstance(effect, kind)]
        self.effects = [effect for effect in self.effects if not isinstance(effect, kind)]
        return found

    def one(self, kind: type[E]) -> E:
        (found,) = self.take(kind)
        return found

    def ask(self, kind: str = "pure-calculation", function: str = "sum.1", kwargs: dict[str, Any] | None = None, *,
            sender: str = B, request: str = "r1", task: str = "", place: str = LAB) -> str:
        given = {"n": 1} if kwargs is None else kwargs
        task = task or (task_id(function, given) if kind == "pure-calculation" else "ab" * 16)
        self.do(Asked(place, TaskRequest(time=0, id="i", request=request, task=task, function=function, kind=kind,
                                         kwargs=given), sender))
        return task

    def cancel(self, task: str, *, sender: str = B, request: str = "r1") -> None:
        self.do(Asked(LAB, TaskCancel(time=0, id="i", request=request, task=task), sender))

    def grant(self, task: str) -> None:
        assert [claim.task for claim in self.take(Claim)] == [task]
        self.do(Claimed(LAB, task, TaskClaim(task, "claimed", granted=True)))

    def begin(self, task: str) -> RunFunction:
        """Let a task that is about to be claimed run."""
        self.grant(task)
        for look in self.take(LookUp):
            self.do(LookedUp(LAB, look.task, False))
        for note in self.take(Note):
            self.do(Noted(LAB, note.task))
        return self.one(RunFunction)

    def said(self) -> list[tuple[str, str]]:
        """What was said: (task's status or "declined", request or task)."""
        return [("declined", f"{each.fields['request']}: {each.fields['reason']}") if each.kind is TaskDeclined
                else (str(each.fields["status"]), str(each.fields["task"])) for each in self.take(Said)]

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with a tick whenever one is due."""
        end = self.now + seconds
        while (deadline := self.machine.deadline) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.do(Tick())
            assert self.machine.deadline is None or self.machine.deadline > self.now, "it would spin"
        self.now = end


# --- taking tasks


def test_a_node_without_a_backend_keeps_silent() -> None:
    rig = Rig()
    rig.ask()
    rig.connect("elsewhere", places=frozenset({"http://hub other"}))
    rig.ask()
    assert rig.effects == []


@pytest.mark.parametrize(("request_of", "reason", "detail"), [
    ({"function": "nobody.1"}, "unregistered", "mail.1, now.1, sum.1, touch.1"),
    ({"kind": "query"}, "wrong-type", "pure-calculation, not query"),
    ({"kwargs": {"text": "x" * 2000}}, "bad-arguments", "the limit is 1000"),
    ({"kwargs": {"n": 2**60}}, "bad-arguments", "an integer beyond"),
    ({"task": "ab" * 20}, "bad-arguments", "not that of its function"),
    ({"kind": "action", "function": "mail.1", "task": "mine"}, "bad-arguments", "32 hex digits"),
])
def test_what_cannot_be_run_is_declined_with_a_reason(request_of: dict[str, Any], reason: str, detail: str) -> None:
    rig = Rig(("a", 1))
    rig.ask(**request_of)
    said = rig.one(Said)
    assert (said.kind, said.fields["reason"], said.fields["request"]) == (TaskDeclined, reason, "r1")
    assert detail in said.fields["detail"]
    assert rig.effects == []


def test_the_ids_that_are_told_are_bounded() -> None:
    rig = Rig()
    rig.connect("many", functions=tuple(FunctionInfo(f"f{number:03}", "query") for number in range(60)))
    rig.ask()
    detail = rig.one(Said).fields["detail"]
    assert "f000" in detail
    assert detail.endswith("f049 and 10 more")


def test_a_full_queue_declines_as_busy_and_takes_tasks_again_when_there_is_room() -> None:
    rig = Rig(("a", 1), limits=TaskProvideLimits(3, 1000, 1.0, 5.0))
    tasks = [rig.ask(kwargs={"n": number}) for number in range(3)]
    rig.said()
    rig.ask(kwargs={"n": 9}, request="late")
    assert rig.said() == [("declined", "late: busy")]
    rig.cancel(tasks[2])
    rig.ask(kwargs={"n": 9}, request="late")
    assert [status for status, _ in rig.said()] == ["queued"]


def test_arguments_that_wait_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_workers, "_WAITING_SIZE_BYTES_MAX", 2000)
    rig = Rig(("a", 1))
    tasks = [rig.ask(kwargs={"text": letter * 900}) for letter in "abc"]
    assert [status for status, _ in rig.said()] == ["queued", "queued", "declined"]
    rig.cancel(tasks[1])
    rig.ask(kwargs={"text": "d" * 900})
    assert [status for status, _ in rig.said()] == ["queued"]


def test_results_that_wait_for_their_upload_hold_up_new_runs() -> None:
    rig = Rig(("a", 100))
    runs = [rig.begin(rig.ask(kwargs={"n": number})) for number in range(32)]
    for run in runs:
        rig.do(Report(run.run, "finished", result={"json": 1}))
    assert len(rig.take(Store)) == 32
    rig.ask(kwargs={"n": 99})
    assert rig.take(Claim) == []
    rig.do(Stored(LAB, runs[0].task))
    assert len(rig.take(Claim)) == 1


def test_arguments_reach_the_function_as_their_identity_has_them() -> None:
    rig = Rig(("a", 1))
    task = rig.ask(kwargs={"n": 2.0})
    run = rig.begin(task)
    assert (run.kwargs, type(run.kwargs["n"])) == ({"n": 2}, int)


# --- a calculation


def test_a_calculation_is_claimed_looked_for_run_stored_and_told() -> None:
    rig = Rig(("a", 1))
    task = rig.ask()
    assert rig.said() == [("queued", task)]
    assert rig.one(Claim) == Claim(LAB, task, "pure-calculation", "sum.1", False)
    rig.do(Claimed(LAB, task, TaskClaim(task, "claimed", granted=True)))
    assert rig.one(LookUp) == LookUp(LAB, task)
    assert rig.take(RunFunction) == []
    rig.do(LookedUp(LAB, task, False))
    run = rig.one(RunFunction)
    assert (run.backend, run.function, run.kwargs, run.place) == ("a", "sum.1", {"n": 1}, LAB)
    assert rig.said() == [("running", task)]
    rig.do(Report(run.run, "finished", result={"json": 3}))
    assert rig.one(Store) == Store(LAB, task, run.run, "sum.1", "pure-calculation", {"n": 1}, {"json": 3})
    assert rig.effects == []  # not finished before the result is in the bucket
    rig.do(Stored(LAB, task))
    assert rig.one(Finish) == Finish(LAB, task, "pure-calculation", "finished")
    assert rig.said() == [("finished", task)]
    assert rig.machine.deadline is None


def test_what_somebody_finished_a_moment_ago_is_not_run_again() -> None:
    rig = Rig(("a", 1))
    task = rig.ask()
    rig.grant(task)
    rig.do(LookedUp(LAB, task, True))
    assert rig.take(RunFunction) == []
    assert rig.one(Finish).state == "finished"
    assert rig.said()[-1] == ("finished", task)


def test_a_hundred_requesters_have_one_calculation() -> None:
    rig = Rig(("a", 4))
    tasks = {rig.ask(sender=f"{number:064x}", request=f"r{number}") for number in range(100)}
    (task,) = tasks
    run = rig.begin(task)
    rig.ask(sender=C, request="late")
    rig.do(Report(run.run, "finished", result={"json": 3}))
    rig.do(Stored(LAB, task))
    assert not rig.take(Claim)
    assert not rig.take(RunFunction)
    assert rig.said()[-1] == ("finished", task)


def test_a_failed_calculation_tells_its_error_and_may_be_asked_for_anew() -> None:
    rig = Rig(("a", 1))
    task = rig.ask()
    run = rig.begin(task)
    rig.do(Report(run.run, "error", error={"type": "ValueError", "message": "no", "traceback": "x" * 20_000}))
    assert rig.one(Finish).state == "failed"
    told = rig.take(Said)[-1].fields
    assert (told["status"], told["error"]["type"], told["error"]["message"]) == ("error", "ValueError", "no")
    assert len(told["error"]["traceback"]) <= 8000
    rig.ask()  # the same request: its answer was lost
    assert rig.said() == [("error", task)]
    rig.ask(request="r2")
    assert rig.said() == [("queued", task)]
    assert rig.one(Claim).task == task


@pytest.mark.parametrize(("status", "kind"), [("hung", "TaskHung"), ("crashed", "TaskCrashed")])
def test_hanging_and_dying_have_names_of_their_own(status: str, kind: str) -> None:
    rig = Rig(("a", 1))
    run = rig.begin(rig.ask())
    rig.do(Report(run.run, status, error={"type": "x", "message": "it did not end within 3 s"}))
    assert rig.take(Said)[-1].fields["error"]["type"] == kind


def test_a_result_that_cannot_be_stored_is_an_error_and_leaves_the_task_to_others() -> None:
    rig = Rig(("a", 1))
    task = rig.ask()
    run = rig.begin(task)
    rig.do(Report(run.run, "finished", result={"file": "sha1://" + "ab" * 20, "format": "npy"}))
    rig.do(Stored(LAB, task, error={"type": "NotPermitted", "message": "no", "traceback": ""}))
    assert rig.one(Finish).state == "released"
    assert rig.said()[-1] == ("error", task)


def test_a_calculation_without_a_result_is_an_error() -> None:
    rig = Rig(("a", 1))
    run = rig.begin(rig.ask())
    rig.do(Report(run.run, "finished"))
    assert rig.take(Store) == []
    assert rig.take(Said)[-1].fields["error"]["message"] == "it returned nothing"


# --- claims


def test_a_task_that_another_node_has_is_left_to_it() -> None:
    rig = Rig(("a", 1))
    task = rig.ask()
    rig.said()
    rig.one(Claim)
    rig.do(Claimed(LAB, task, TaskClaim(task, "claimed", node_id=C)))
    assert rig.effects == []
    rig.ask(kwargs={"n": 2})
    assert len(rig.take(Claim)) == 1  # the worker is free


@pytest.mark.parametrize(("state", "receipt", "status"), [
    ("finished", {"body": {"error": None}}, "finished"),
    ("failed", {"body": {"error": {"type": "T", "message": "m", "traceback": ""}}}, "error"),
    ("failed", None, "error"),
    ("unknown", None, "unknown"),
])
def test_what_only_the_hub_still_knows_is_told(state: str, receipt: dict[str, Any] | None, status: str) -> None:
    rig = Rig(("a", 1))
    task = rig.ask("action", "mail.1")
    rig.said()
    rig.do(Claimed(LAB, task, TaskClaim(task, state, receipt=receipt)))
    said = rig.one(Said).fields
    assert (said["status"], said.get("receipt")) == (status, receipt)
    assert not rig.take(RunFunction)
    assert not rig.take(Finish)


@pytest.mark.parametrize("claim", [None, TaskClaim("ab" * 16, "none")])
def test_a_hub_that_cannot_be_asked_is_named(claim: TaskClaim | None) -> None:
    rig = Rig(("a", 1))
    task = rig.ask("query", "now.1")
    rig.said()
    rig.do(Claimed(LAB, task, claim, "the hub is down"))
    assert rig.said() == [("declined", "r1: hub")]
    assert rig.machine.running == rig.machine.queued == 0


def test_only_what_a_worker_is_free_for_is_claimed() -> None:
    rig = Rig(("a", 2))
    for number in range(5):
        rig.ask(kwargs={"n": number})
    first, second = rig.take(Claim)
    assert (rig.machine.queued, rig.machine.running) == (3, 2)
    rig.do(Claimed(LAB, first.task, TaskClaim(first.task, "claimed", node_id=C)))
    third = rig.one(Claim)
    assert third.task not in (first.task, second.task)


def test_requesters_take_turns() -> None:
    rig = Rig(("a", 1))
    for number in range(10):
        rig.ask(kwargs={"n": number}, sender=B)
    other = rig.ask(kwargs={"n": 100}, sender=C)
    order = []
    for _ in range(4):
        claim = rig.one(Claim)
        order.append(claim.task)
        rig.do(Claimed(LAB, claim.task, TaskClaim(claim.task, "claimed", node_id=C)))
    assert other in order[:3]  # the first was taken before it came


def test_the_backend_with_most_free_workers_gets_the_task() -> None:
    rig = Rig(("small", 1), ("large", 3))
    runs = [rig.begin(rig.ask(kwargs={"n": number})) for number in range(4)]
    assert sorted(run.backend for run in runs) == ["large", "large", "large", "small"]
    rig.ask(kwargs={"n": 9})
    assert rig.take(Claim) == []


def test_claims_are_kept_alive_while_the_function_runs() -> None:
    rig = Rig(("a", 2))
    first = rig.ask(kwargs={"n": 1})
    rig.begin(first)
    rig.pass_time(4.0)
    assert rig.take(Keep) == []
    second = rig.ask(kwargs={"n": 2})
    rig.begin(second)
    rig.pass_time(11.5)
    assert [sorted(keep.tasks) for keep in rig.take(Keep)] == [sorted([first, second])] * 3


# --- actions


def test_an_action_is_noted_before_it_starts_and_its_receipt_is_kept_before_it_is_told() -> None:
    rig = Rig(("a", 1))
    task = rig.ask("action", "mail.1")
    rig.grant(task)
    assert rig.one(Note) == Note(LAB, task)
    assert rig.take(RunFunction) == []
    rig.do(Noted(LAB, task))
    run = rig.one(RunFunction)
    rig.said()
    rig.do(Report(run.run, "finished", result={"json": "is not wanted"}))
    assert rig.one(SignReceipt) == SignReceipt(LAB, task, run.run, "mail.1", {"n": 1}, None)
    assert rig.effects == []
    receipt = {"body": {"error": None}, "signature": "s"}
    rig.do(SignedReceipt(LAB, task, receipt))
    said = rig.one(Said).fields
    assert (said["status"], said["receipt"]) == ("finished", receipt)
    assert rig.take(Finish) == []  # the receipt goes to the hub with its signature
    for sender in (B, C):  # an action has one end, whoever asks
        rig.ask("action", "mail.1", sender=sender, request="again")
        assert rig.said() == [("finished", task)]
    assert rig.take(Claim) == []


def test_an_action_that_raised_has_a_receipt_of_that() -> None:
    rig = Rig(("a", 1))
    task = rig.ask("action", "mail.1")
    run = rig.begin(task)
    error = {"type": "OSError", "message": "no", "traceback": "tb"}
    rig.do(Report(run.run, "error", error=error))
    assert rig.one(SignReceipt).error == error
    rig.do(SignedReceipt(LAB, task, {"body": {"error": error}}))
    assert rig.take(Said)[-1].fields["error"] == error


def test_an_action_that_cannot_be_noted_does_not_start() -> None:
    rig = Rig(("a", 1))
    task = rig.ask("action", "mail.1")
    rig.grant(task)
    rig.do(Noted(LAB, task, "the disk is full"))
    assert rig.take(RunFunction) == []
    assert rig.one(Finish).state == "released"
    assert rig.said()[-1] == ("declined", "r1: busy")


def test_an_id_that_belongs_to_another_task_is_refused() -> None:
    rig = Rig(("a", 1))
    task = rig.ask("action", "mail.1", {"to": "x"})
    rig.said()
    for function, kwargs in (("mail.1", {"to": "y"}), ("touch.1", {"to": "x"}), ("mail.1", {"to": 2**60})):
        rig.ask("action", function, kwargs, sender=C, request="r2")
        assert rig.said() == [("declined", "r2: bad-arguments")]
    rig.ask("action", "mail.1", {"to": "x"}, sender=C, request="r2")
    assert rig.said() == [("queued", task)]


# --- backends that go


def test_an_action_whose_backend_goes_is_unknown_and_never_started_again() -> None:
    rig = Rig(("a", 1), ("b", 1))
    task = rig.ask("action", "mail.1")
    run = rig.begin(task)
    rig.said()
    rig.do(BackendGone(run.backend))
    assert rig.one(Finish).state == "unknown"
    assert rig.said() == [("unknown", task)]
    rig.ask("action", "mail.1", request="r2")
    assert rig.said() == [("unknown", task)]
    assert rig.take(Claim) == []


@pytest.mark.parametrize(("kind", "function"), [
    ("pure-calculation", "sum.1"), ("query", "now.1"), ("action", "touch.1")])
def test_what_may_run_twice_goes_to_another_backend(kind: str, function: str) -> None:
    rig = Rig(("a", 1), ("b", 1))
    task = rig.ask(kind, function)
    run = rig.begin(task)
    rig.effects.clear()
    rig.do(BackendGone(run.backend))
    assert [type(effect) for effect in rig.effects] == [Finish, Said, Claim]  # given back before it is taken again
    assert rig.one(Finish).state == "released"
    again = rig.begin(task)
    assert again.backend != run.backend
    rig.do(Report(run.run, "finished", result={"json": 1}))  # too late
    assert not rig.take(Store)
    assert not rig.take(SignReceipt)


def test_without_another_backend_those_who_wait_are_told() -> None:
    rig = Rig(("a", 1))
    running, queued = rig.ask(kwargs={"n": 1}), rig.ask(kwargs={"n": 2}, request="r2")
    rig.begin(running)
    rig.said()
    rig.do(BackendGone("a"))
    assert rig.one(Finish).task == running
    assert rig.said() == [("declined", "r1: unregistered"), ("declined", "r2: unregistered")]
    assert rig.machine.queued == rig.machine.running == 0
    assert queued not in str(rig.effects)


@pytest.mark.parametrize("function", ["mail.1", "sum.1"])
def test_a_backend_that_goes_before_the_start_leaves_an_action_startable(function: str) -> None:
    """Between the claim and the start nothing has happened, so nothing is unknown."""
    rig = Rig(("a", 1))
    kind = "action" if function == "mail.1" else "pure-calculation"
    task = rig.ask(kind, function)
    rig.one(Claim)
    rig.connect("b")
    rig.do(BackendGone("a"))
    rig.do(Claimed(LAB, task, TaskClaim(task, "claimed", granted=True)))
    rig.do(Noted(LAB, task) if kind == "action" else LookedUp(LAB, task, False))
    assert rig.one(Finish).state == "released"
    assert rig.begin(task).backend == "b"


def test_a_task_that_backends_keep_giving_back_is_left_to_others() -> None:
    rig = Rig(("a", 1))
    task = rig.ask()
    for _ in range(3):
        rig.do(Report(rig.begin(task).run, "cancelled"))
        assert rig.one(Finish).state == "released"
    rig.do(Report(rig.begin(task).run, "cancelled"))
    assert rig.said()[-1] == ("declined", "r1: busy")
    assert rig.machine.running == 0


# --- withdrawing


def test_what_nobody_waits_for_does_not_start() -> None:
    rig = Rig(("a", 1))
    claimed, queued = rig.ask(kwargs={"n": 1}), rig.ask(kwargs={"n": 2})
    rig.ask(kwargs={"n": 2}, sender=C)
    rig.cancel(queued, sender=C, request="r9")  # not a request of his
    rig.cancel(queued)
    assert rig.machine.queued == 1
    rig.cancel(queued, sender=C)
    assert rig.machine.queued == 0
    rig.cancel(claimed)
    rig.grant(claimed)
    rig.do(LookedUp(LAB, claimed, False))
    assert rig.take(RunFunction) == []
    assert rig.one(Finish).state == "released"


def test_a_calculation_that_runs_for_nobody_is_broken_off() -> None:
    rig = Rig(("a", 1))
    task = rig.ask()
    run = rig.begin(task)
    rig.cancel(task)
    rig.cancel(task)
    assert rig.one(CancelRun) == CancelRun("a", run.run)
    rig.said()
    rig.do(Report(run.run, "cancelled"))
    assert rig.one(Finish).state == "released"
    assert rig.effects == []


def test_who_asks_while_a_run_is_being_broken_off_gets_another() -> None:
    rig = Rig(("a", 1))
    task = rig.ask()
    run = rig.begin(task)
    rig.cancel(task)
    rig.ask(request="r2")
    rig.do(Report(run.run, "cancelled"))
    assert rig.begin(task).run != run.run


def test_an_action_that_runs_is_not_broken_off() -> None:
    rig = Rig(("a", 1))
    task = rig.ask("action", "mail.1")
    run = rig.begin(task)
    rig.cancel(task)
    assert rig.take(CancelRun) == []
    rig.do(Report(run.run, "finished"))
    assert rig.one(SignReceipt).task == task


@pytest.mark.parametrize(("function", "state"), [("mail.1", "unknown"), ("touch.1", "released")])
def test_an_action_that_its_backend_broke_off_may_have_begun(function: str, state: str) -> None:
    rig = Rig(("a", 1))
    run = rig.begin(rig.ask("action", function))
    rig.do(Report(run.run, "cancelled"))
    assert rig.one(Finish).state == state
    assert len(rig.take(Claim)) == (state == "released")


# --- channels that go


def test_a_channel_that_is_left_takes_its_tasks_with_it() -> None:
    rig = Rig(("a", 2))
    running = rig.begin(rig.ask(kwargs={"n": 1}))
    rig.ask(kwargs={"n": 2})
    rig.one(Claim)
    rig.ask(kwargs={"n": 3})
    rig.effects.clear()
    rig.do(PlaceGone(LAB))
    assert rig.effects == [CancelRun("a", running.run)]
    assert rig.machine.deadline is None
    rig.do(Report(running.run, "cancelled"))
    assert rig.effects == [CancelRun("a", running.run)]
    for number in (1, 2):
        rig.ask(kwargs={"n": number}, place="http://hub other")
    assert len(rig.take(Claim)) == 2  # both workers are free


def test_a_backend_that_goes_after_its_channel_leaves_nothing() -> None:
    rig = Rig(("a", 1))
    run = rig.begin(rig.ask("action", "mail.1"))
    rig.do(PlaceGone(LAB))
    rig.do(BackendGone("a"))
    rig.effects.clear()
    rig.do(Report(run.run, "finished"))
    assert rig.effects == []
    assert rig.machine._runs == {}


# --- status


def test_progress_is_told_at_a_pace() -> None:
    rig = Rig(("a", 1))
    task = rig.ask()
    run = rig.begin(task)
    rig.said()
    for step in range(100):
        rig.now += 0.05
        rig.do(Report(run.run, "running", progress=step / 50, text="t" * 1000))
    said = rig.take(Said)
    assert 4 <= len(said) <= 6
    assert said[-1].fields["progress"] == 1.0
    assert len(said[-1].fields["text"]) == 200
    rig.pass_time(10.0)
    assert 9 <= len(rig.said()) <= 11


def test_many_that_wait_are_spoken_of_rarely() -> None:
    rig = Rig(("a", 1), limits=TaskProvideLimits(10_000, 1000, 1.0, 5.0))
    for number in range(1000):
        rig.ask(kwargs={"n": number})
    rig.said()
    rig.pass_time(60.0)
    told = [task for status, task in rig.said() if status == "queued"]
    assert len(told) <= 61 * 51
    assert len(set(told)) == 1000  # but each is


# --- whatever happens


events = st.lists(st.tuples(st.sampled_from([
    "ask", "ask", "ask", "cancel", "claimed", "claimed", "refused", "hub", "looked", "found", "noted", "unnoted", "run",
    "finish", "finish", "error", "cancelled", "stored", "unstored", "receipt", "gone", "connect", "place", "time"]),
    st.integers(0, 3), st.integers(0, 2)), max_size=80)
KINDS = [("pure-calculation", "sum.1"), ("query", "now.1"), ("action", "mail.1"), ("action", "touch.1")]


@settings(max_examples=300, deadline=None)
@given(events)
def test_no_order_of_events_starts_an_action_twice_or_loses_a_worker(steps: list[tuple[str, int, int]]) -> None:
    rig = Rig(("a0", 2))
    started: dict[str, int] = {}
    runs: list[RunFunction] = []
    alive = {"a0"}
    granted: set[str] = set()

    def name(kind: str, which: int, number: int) -> str:
        return task_id("sum.1", {"n": number}) if kind == "pure-calculation" else f"{which}{number}" * 16

    for step, which, number in steps:
        kind, function = KINDS[which]
        task = name(kind, which, number)
        if step == "ask":
            rig.ask(kind, function, {"n": number}, task=task, sender=(B, C)[number % 2])
        elif step == "cancel":
            rig.cancel(task, sender=(B, C)[number % 2])
        elif step == "claimed" and (kind != "action" or task not in granted):
            if any(claim.task == task for claim in rig.effects if isinstance(claim, Claim)):
                granted.add(task)
            rig.do(Claimed(LAB, task, TaskClaim(task, "claimed", granted=True)))
        elif step == "refused":
            rig.do(Claimed(LAB, task, TaskClaim(task, "claimed", node_id=C)))
        elif step == "hub":
            rig.do(Claimed(LAB, task, None, "down"))
        elif step in ("looked", "found"):
            rig.do(LookedUp(LAB, task, step == "found"))
        elif step in ("noted", "unnoted"):
            rig.do(Noted(LAB, task, "" if step == "noted" else "full"))
        elif step in ("run", "finish", "error", "cancelled") and runs:
            run = runs[number % len(runs)]
            status = {"run": "running", "finish": "finished"}.get(step, step)
            rig.do(Report(run.run, status, result={"json": 1}))
        elif step in ("stored", "unstored"):
            rig.do(Stored(LAB, task, None if step == "stored" else {"type": "x", "message": "", "traceback": ""}))
        elif step == "receipt":
            rig.do(SignedReceipt(LAB, task, {"body": {"error": None}}))
        elif step == "gone":
            rig.do(BackendGone(f"a{number}"))
            alive.discard(f"a{number}")
        elif step == "connect" and f"a{number}" not in alive:
            rig.connect(f"a{number}", 2)
            alive.add(f"a{number}")
        elif step == "place" and number == 2:
            rig.do(PlaceGone(LAB))
        elif step == "time":
            rig.pass_time(1.0 + which)
        for begun in [effect for effect in rig.effects if isinstance(effect, RunFunction) and effect not in runs]:
            runs.append(begun)
            started[begun.task] = started.get(begun.task, 0) + 1
            assert begun.backend in alive
            if begun.function == "mail.1":
                assert started[begun.task] == 1
        granted -= {effect.task for effect in rig.effects if isinstance(effect, Finish) and effect.state == "released"}

    # Let everything end: every worker is free again, and nothing is due.
    for run in runs:
        rig.do(Report(run.run, "finished", result={"json": 1}))
    for which, (kind, _) in enumerate(KINDS):
        for number in range(3):
            task = name(kind, which, number)
            for event in (Claimed(LAB, task, None, "down"), LookedUp(LAB, task, True), Noted(LAB, task, "full"),
                          Stored(LAB, task), SignedReceipt(LAB, task, {"body": {"error": None}})):
                rig.do(event)
    rig.do(PlaceGone(LAB))
    for effect in list(rig.effects):
        if isinstance(effect, RunFunction):
            rig.do(Report(effect.run, "finished", result={"json": 1}))
    assert rig.machine.queued == rig.machine.running == 0
    assert rig.machine.deadline is None
    assert all(count == 0 for count in rig.machine._workers._busy.values())
    assert rig.machine._kwargs_size_bytes == 0
