"""The running side of tasks: what a node does with the task backends that are connected to it.

A pure state machine beside ``task_requesting``: ``TaskProvider.handle(event, now)`` returns the effects. One machine
serves all channels of a node, since its backends' workers are shared by them.

A task is claimed at the hub only when a worker is free for it, so that of several nodes the one that can start first
gets it; who is refused leaves it to the one that has it. With the claim in hand a calculation is looked for in the
cache once more, an action is noted on the disk, and only then the function is called. Nothing that may have started is
started again, but for calculations, queries, and actions declared idempotent.

A node without a backend for a channel keeps silent there; one whose backends do not do what is asked says why.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from .hub_bodies import TaskClaim
from .task_bodies import TaskCancel, TaskDeclined, TaskRequest, TaskStatus
from .task_errors import error_report
from .task_events import (
    Asked,
    BackendGone,
    BackendReady,
    CancelRun,
    Claim,
    Claimed,
    Effect,
    Event,
    Finish,
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
from .task_workers import Job, Refusal, TaskProvideLimits, TurnQueue, Workers, admit, error_of, is_same

__all__ = ["TaskProvideLimits", "TaskProvider"]

# Who waits for one task is remembered up to here; beyond, a withdrawal is not noticed, which costs at most a run.
_WAITERS_MAX = 1000
# Tasks that ended lately, for those who ask again because the answer was lost.
_ENDED_MAX = 1000
# How often a task goes back into the queue when backends give it back, before somebody else is to try.
_RETURNS_MAX = 3
# Results that wait for their upload; beyond, nothing new is begun, as each may be megabytes long.
_ENDING_MAX = 32
# What is said each second about tasks that wait, however many they are.
_QUEUED_STATUSES_PER_SECOND = 50
_TEXT_LENGTH_MAX = 200


class TaskProvider:
    """Runs tasks of all channels of one node on its backends."""

    def __init__(self, limits: TaskProvideLimits) -> None:
        self._limits = limits
        self._workers = Workers()
        self._jobs: dict[tuple[str, str], Job] = {}  # by place and task
        self._kwargs_size_bytes = 0  # of all of them
        self._runs: dict[str, Job] = {}
        self._active: dict[tuple[str, str], Job] = {}
        self._waiting: OrderedDict[tuple[str, str], float] = OrderedDict()  # queued -> when it was said
        self._queue = TurnQueue()
        self._ended: OrderedDict[tuple[str, str], tuple[str, set[tuple[str, str]], dict[str, Any]]] = OrderedDict()
        self._keep_at = float("-inf")
        self._runs_begun = 0
        self._effects: list[Effect] = []

    @property
    def queued(self) -> int:
        """Tasks that wait for a worker."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Tasks that are being claimed, run or brought to an end."""
        return len(self._active)

    @property
    def deadline(self) -> float | None:
        """When a ``Tick`` is due, or None."""
        times = [job.said_at + self._limits.progress_interval_seconds for job in self._active.values()]
        if any(job.held for job in self._active.values()):
            times.append(self._keep_at)
        if self._waiting:
            times.append(next(iter(self._waiting.values())) + self._queued_interval_seconds())
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` (seconds, monotonic) and return what to do."""
        if isinstance(event, Asked):
            if isinstance(event.body, TaskCancel):
                self._on_cancel(event.place, event.body, event.sender)
            else:
                self._on_request(event.place, event.body, event.sender, now)
        elif isinstance(event, Report):
            self._on_report(event, now)
        elif isinstance(event, BackendReady):
            self._workers.add(event.backend)
        elif isinstance(event, BackendGone):
            self._on_backend_gone(event.backend, now)
        elif isinstance(event, PlaceGone):
            self._on_place_gone(event.place)
        elif not isinstance(event, Tick):
            self._on_answer(event, now)
        self._start_jobs()
        self._speak(now)
        effects, self._effects = self._effects, []
        return effects

    # --- what is asked

    def _on_request(self, place: str, body: TaskRequest, sender: str, now: float) -> None:
        key, waiter = (place, body.task), (sender, body.request)
        job = self._jobs.get(key)
        ended = self._ended.get(key)
        if job is not None:
            if not is_same(job, body, self._limits.kwargs_size_bytes_max):
                self._decline(place, body.task, [waiter], "bad-arguments", "another task has this id")
                return
            if len(job.waiters) < _WAITERS_MAX:
                job.waiters.add(waiter)
            self._say_status(job, now)
        elif ended is not None and (waiter in ended[1] or ended[0] == "action"):
            self._effects.append(Said(place, TaskStatus, ended[2]))
        else:
            self._take(place, body, waiter, now)

    def _take(self, place: str, body: TaskRequest, waiter: tuple[str, str], now: float) -> None:
        functions = self._workers.functions(place)
        if functions is None:
            return
        data = admit(body, functions, self._limits, len(self._jobs), self._kwargs_size_bytes)
        if isinstance(data, Refusal):
            self._decline(place, body.task, [waiter], data.reason, data.detail)
            return
        job = Job(place, body.task, body.function, body.kind, data, waiters={waiter})
        self._jobs[job.key] = job
        self._kwargs_size_bytes += len(data)
        self._ended.pop(job.key, None)
        self._enqueue(job)
        self._say_status(job, now)

    def _on_cancel(self, place: str, body: TaskCancel, sender: str) -> None:
        job = self._jobs.get((place, body.task))
        if job is None:
            return
        job.waiters.discard((sender, body.request))
        if job.waiters:
            return
        if job.stage == "queued":
            self._drop(job)
        elif job.stage == "running" and job.kind != "action" and not job.cancelled and job.backend is not None:
            job.cancelled = True
            self._effects.append(CancelRun(job.backend, job.run))

    # --- backends

    def _on_backend_gone(self, backend: str, now: float) -> None:
        if not self._workers.remove(backend):
            return
        self._runs = {run: job for run, job in self._runs.items() if job.backend != backend or job.stage != "gone"}
        for job in [job for job in self._active.values() if job.backend == backend]:
            self._workers.free(job)
            if job.stage != "running":
                continue  # nothing has begun: decided when the answer comes that it waits for
            self._break_off(job, "the task backend that ran it has gone", now)
        for job in [self._jobs[key] for key in self._waiting]:
            if self._workers.find(job) is None:
                self._give_up(job, "unregistered", "the task backend that runs it has gone")

    def _on_place_gone(self, place: str) -> None:
        for job in [job for job in self._jobs.values() if job.place == place]:
            if job.stage != "running":
                self._workers.free(job)
            elif job.backend is not None and job.kind != "action":
                self._effects.append(CancelRun(job.backend, job.run))
            self._forget(job)  # the worker of one that runs is free when its end is reported

    # --- the way of a task

    def _enqueue(self, job: Job) -> None:
        job.stage = "queued"
        self._queue.put(job)
        self._waiting[job.key] = job.said_at
        self._active.pop(job.key, None)

    def _start_jobs(self) -> None:
        """Claim what workers are free for."""
        moved = sum(job.stage == "ending" for job in self._active.values()) < _ENDING_MAX and bool(self._waiting)
        while moved and self._workers.any_free:
            moved = False
            for job in self._queue.first():
                found = self._workers.find(job)
                if found is not None and found[2] > 0:
                    moved = True
                    job.stage, job.idempotent = "claiming", found[1].idempotent
                    self._workers.take(job, found[0].id)
                    self._waiting.pop(job.key, None)
                    self._active[job.key] = job
                    self._effects.append(Claim(job.place, job.task, job.kind, job.function, job.idempotent))

    def _on_answer(self, event: Claimed | LookedUp | Noted | Stored | SignedReceipt, now: float) -> None:
        job = self._jobs.get((event.place, event.task))
        if job is None:
            return
        if isinstance(event, Claimed) and job.stage == "claiming":
            if event.claim is None:
                self._give_up(job, "hub", event.why)
            elif event.claim.granted:
                self._on_granted(job, now)
            else:
                self._on_refused(job, event.claim)
        elif isinstance(event, LookedUp) and job.stage == "checking":
            if event.found:
                self._finish(job, "finished")
                self._end(job, "finished")
            else:
                self._run(job, now)
        elif isinstance(event, Noted) and job.stage == "noting":
            if event.why:
                self._finish(job, "released")
                self._give_up(job, "busy", event.why)
            else:
                self._run(job, now)
        elif isinstance(event, Stored) and job.stage == "ending":
            self._finish(job, "released" if event.error else "finished")
            self._end(job, "error" if event.error else "finished", error=event.error)
        elif isinstance(event, SignedReceipt) and job.stage == "ending":
            error = event.receipt["body"]["error"]
            self._end(job, "error" if error else "finished", error=error, receipt=event.receipt)

    def _on_granted(self, job: Job, now: float) -> None:
        if not any(other.held for other in self._active.values()):
            self._keep_at = now + self._limits.keep_seconds
        if job.kind == "pure-calculation":
            job.stage = "checking"
            self._effects.append(LookUp(job.place, job.task))
        elif job.kind == "action":
            job.stage = "noting"
            self._effects.append(Note(job.place, job.task))
        else:
            self._run(job, now)

    def _on_refused(self, job: Job, claim: TaskClaim) -> None:
        """Somebody else runs it, who speaks for himself; or it has ended, which only the hub still knows."""
        if claim.state == "claimed":
            self._drop(job)
        elif claim.state == "finished":
            self._end(job, "finished", receipt=claim.receipt)
        elif claim.state == "failed":
            told = claim.receipt.get("body", {}).get("error") if claim.receipt else None
            error = told if isinstance(told, dict) else error_report("TaskFailed", "it has failed before")
            self._end(job, "error", error=error, receipt=claim.receipt)
        elif claim.state == "unknown":
            self._end(job, "unknown")
        else:
            self._give_up(job, "hub", f"the hub did not give it to this node ({claim.state})")

    def _run(self, job: Job, now: float) -> None:
        """Call the function, if its worker and somebody who waits are still there: until now nothing has begun."""
        if not job.waiters:
            self._finish(job, "released")
            self._drop(job)
        elif job.backend is None:
            self._return(job, now)
        else:
            self._runs_begun += 1
            job.stage, job.run = "running", str(self._runs_begun)
            self._runs[job.run] = job
            self._effects.append(RunFunction(job.backend, job.run, job.place, job.task, job.function, job.kind,
                                             job.kwargs))
            self._say_status(job, now)

    def _on_report(self, report: Report, now: float) -> None:
        job = self._runs.get(report.run)
        if job is None:
            return
        if report.status == "running":
            job.progress = None if report.progress is None else min(1.0, max(0.0, report.progress))
            job.text = report.text[:_TEXT_LENGTH_MAX]
            return
        self._workers.free(job)
        del self._runs[report.run]
        if job.stage == "gone":
            return  # its channel has gone
        job.stage = "ending"
        error = error_of(report)
        if report.status == "cancelled":
            self._break_off(job, (error or {}).get("message") or "its task backend broke it off", now)
        elif job.kind == "action":
            self._effects.append(SignReceipt(job.place, job.task, job.run, job.function, job.kwargs, error))
        elif error is None and report.result is not None:
            self._effects.append(Store(job.place, job.task, job.run, job.function, job.kind, job.kwargs,
                                       report.result))
        else:
            self._finish(job, "failed")
            self._end(job, "error", error=error or error_report("TaskFailed", "it returned nothing"))

    def _break_off(self, job: Job, why: str, now: float) -> None:
        """A run has ended without an outcome: what may have begun is not begun again, unless it does no harm."""
        if job.kind == "action" and not job.idempotent:
            self._finish(job, "unknown")
            self._end(job, "unknown", text=why)
        else:
            self._return(job, now)

    def _return(self, job: Job, now: float) -> None:
        """A claimed task did not get done: give the claim back, and the task to another backend or node."""
        self._finish(job, "released")
        self._workers.free(job)
        self._runs.pop(job.run, None)
        job.returns += 1
        job.cancelled, job.progress, job.text = False, None, ""
        if not job.waiters:
            self._drop(job)
        elif self._workers.find(job) is None:
            self._give_up(job, "unregistered", "the task backend that ran it has gone")
        elif job.returns > _RETURNS_MAX:
            self._give_up(job, "busy", f"its task backends gave it back {job.returns} times")
        else:
            self._enqueue(job)
            self._say_status(job, now)

    # --- the end of a task

    def _finish(self, job: Job, state: str) -> None:
        self._effects.append(Finish(job.place, job.task, job.kind, state))

    def _end(self, job: Job, status: str, **fields: Any) -> None:
        told = {"task": job.task, "status": status, **{name: value for name, value in fields.items() if value}}
        self._effects.append(Said(job.place, TaskStatus, told))
        self._ended[job.key] = job.kind, job.waiters, told
        if len(self._ended) > _ENDED_MAX:
            self._ended.popitem(last=False)
        self._drop(job)

    def _give_up(self, job: Job, reason: str, detail: str) -> None:
        self._decline(job.place, job.task, job.waiters, reason, detail)
        self._drop(job)

    def _drop(self, job: Job) -> None:
        self._workers.free(job)
        self._runs.pop(job.run, None)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        job.stage = "gone"
        self._kwargs_size_bytes -= len(job.kwargs_json) if self._jobs.get(job.key) is job else 0
        for known in (self._jobs, self._active, self._waiting):
            known.pop(job.key, None)

    # --- what is said

    def _speak(self, now: float) -> None:
        for job in self._active.values():
            if now >= job.said_at + self._limits.progress_interval_seconds:
                self._say_status(job, now)
        interval_seconds = self._queued_interval_seconds()
        while self._waiting and now >= next(iter(self._waiting.values())) + interval_seconds:
            self._say_status(self._jobs[next(iter(self._waiting))], now)
        if now >= self._keep_at:
            held: dict[str, list[str]] = {}
            for job in self._active.values():
                if job.held:
                    held.setdefault(job.place, []).append(job.task)
            self._effects.extend(Keep(place, tasks) for place, tasks in held.items())
            self._keep_at = now + self._limits.keep_seconds

    def _queued_interval_seconds(self) -> float:
        return max(self._limits.progress_interval_seconds, len(self._waiting) / _QUEUED_STATUSES_PER_SECOND)

    def _say_status(self, job: Job, now: float) -> None:
        job.said_at = now
        if job.key in self._waiting:
            self._waiting[job.key] = now
            self._waiting.move_to_end(job.key)
        fields: dict[str, Any] = {"task": job.task, "status": "running" if job.held else "queued"}
        if job.progress is not None:
            fields["progress"] = job.progress
        if job.text:
            fields["text"] = job.text
        self._effects.append(Said(job.place, TaskStatus, fields))

    def _decline(self, place: str, task: str, waiters: Any, reason: str, detail: str) -> None:
        for _, request in sorted(waiters):
            self._effects.append(Said(place, TaskDeclined, {"request": request, "task": task, "reason": reason,
                                                            "detail": detail}))
