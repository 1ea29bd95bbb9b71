"""A channel, a hub and nodes that run tasks, simulated around one requester: messages get lost, come twice or late,
nodes die at any step."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

from kachery_fast.errors import HubUnreachable, TaskNotTaken
from kachery_fast.protocol import claims
from kachery_fast.protocol.canonical import object_sha1
from kachery_fast.protocol.hub_bodies import ClaimTask, FinishTask
from kachery_fast.protocol.signing import private_key, public_id
from kachery_fast.protocol.task_bodies import TaskDeclined, TaskStatus
from kachery_fast.protocol.task_errors import error_report
from kachery_fast.protocol.task_request_events import (
    Ask,
    Effect,
    Event,
    Find,
    Found,
    Heard,
    Look,
    Looked,
    TaskRequestLimits,
    Tick,
    Withdraw,
)
from kachery_fast.protocol.task_requesting import TaskRequester
from kachery_fast.protocol.tasks import TaskResult, sign_receipt

CHANNEL, FUNCTION, REQUEST = "lab", "spikes.sort", "r1"
TASK = "ab" * 16
LIMITS = TaskRequestLimits(offer_wait_seconds=3.0, want_rounds_max=2, patience_seconds=45.0,
                           provider_silence_seconds=8.0, retry_base_seconds=0.25)
LEASE_MS, KEEP_SECONDS, STATUS_SECONDS = 20_000, 6.0, 1.0
EPOCH_MS = 1_795_000_000_000


def key_of(name: str) -> Any:
    return private_key(hashlib.sha256(name.encode()).digest())


class Executor:
    """A node that runs the task: slowly, and perhaps not to the end."""

    def __init__(self, world: World, name: str, *, wait_seconds: float = 0.1, run_seconds: float = 1.0,
                 raises: bool = False, declines: str = "", silent: bool = False) -> None:
        self.world, self.name = world, name
        self.key = key_of(name)
        self.node_id = public_id(self.key)
        self.wait_seconds, self.run_seconds, self.raises = wait_seconds, run_seconds, raises
        self.declines, self.silent = declines, silent
        self.life = 0  # odd: dead; what was begun in another life is forgotten
        self.stage = ""
        self.last: dict[str, Any] = {}

    @property
    def alive(self) -> bool:
        return self.life % 2 == 0

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        life = self.life
        self.world.at(seconds, lambda: work() if self.life == life else None)

    def say(self, **fields: Any) -> None:
        self.last = fields
        self.world.say(TaskStatus(time=0, id="i", task=self.world.task, **fields), self.node_id)

    def die(self) -> None:
        self.life += 1 if self.alive else 0

    def wake(self) -> None:
        """Start anew: an action that had begun is told to the hub as unknown."""
        if not self.alive:
            self.life += 1
            if self.stage == "running" and self.world.kind == "action":
                self.world.finish(self.node_id, "unknown")
            self.stage = ""

    def asked(self) -> None:
        if not self.alive or self.silent:
            return
        if self.declines:
            self.world.say(TaskDeclined(time=0, id="i", request=REQUEST, task=self.world.task, reason=self.declines,
                                        detail=f"{self.name} declines"), self.node_id)
        elif self.stage in ("queued", "running") or (self.stage == "ended" and self.world.kind == "action"):
            self.say(**self.last)
        else:
            self.stage = "queued"
            self.say(status="queued")
            self.after(self.wait_seconds, self.claim)

    def withdrawn(self) -> None:
        if self.alive and self.stage == "queued":
            self.stage = ""

    def claim(self) -> None:
        if self.stage != "queued":
            return
        if self.world.hub_down:
            self.stage = ""
            self.world.say(TaskDeclined(time=0, id="i", request=REQUEST, task=self.world.task, reason="hub"),
                           self.node_id)
            return
        standing, granted = self.world.claim(self.node_id)
        if granted:
            self.after(self.world.random.uniform(0.0, 0.1), self.begin)
        elif standing.state == "claimed":
            self.stage = ""
        elif standing.state == "finished":
            self.stage = "ended"
            self.say(status="finished", receipt=standing.receipt)
        elif standing.state == "unknown":
            self.stage = "ended"
            self.say(status="unknown")
        else:
            self.stage = ""

    def begin(self) -> None:
        if self.world.kind == "pure-calculation" and self.world.result is not None:
            self.end()
            return
        self.stage = "running"
        self.world.begun += 1
        self.after(self.run_seconds, self.end)
        self.keep()
        self.speak()

    def keep(self) -> None:
        if self.stage == "running":
            self.world.keep(self.node_id)
            self.after(KEEP_SECONDS, self.keep)

    def speak(self) -> None:
        if self.stage == "running":
            self.say(status="running", progress=0.5)
            self.after(STATUS_SECONDS, self.speak)

    def end(self) -> None:
        world = self.world
        self.stage = "ended"
        error = error_report("ValueError", "bad") if self.raises else None
        world.done += 1
        if world.kind == "action":
            receipt = sign_receipt(
                channel=CHANNEL, task=world.task, function=FUNCTION, kwargs={}, error=error, key=self.key,
                outcome="error" if error else "finished", started_ms=world.now_ms, finished_ms=world.now_ms)
            self.after(0.02, lambda: self.tell("failed" if error else "finished", receipt, error))
        elif error is not None:
            self.after(0.02, lambda: self.tell("failed", None, error))
        else:
            self.after(world.random.uniform(0.0, 0.2), self.upload)

    def upload(self) -> None:
        world = self.world
        if world.result is None or world.kind == "query":
            world.result = TaskResult(self.node_id, world.task, FUNCTION, world.kind, {}, {"json": self.name},
                                      world.now_ms, world.now_ms)
        self.after(0.02, lambda: self.tell("finished", None, None))

    def tell(self, state: str, receipt: dict[str, Any] | None, error: dict[str, str] | None) -> None:
        self.world.finish(self.node_id, state, receipt)
        self.say(status="error" if error else "finished", error=error, receipt=receipt)


class World:
    """One requester, and all that is around it. ``random`` decides what befalls each message."""

    def __init__(self, kind: str, *, seed: int = 0, loss: float = 0.0, repeats: float = 0.0,
                 delay_seconds: float = 0.01, idempotent: bool = False) -> None:
        self.kind, self.idempotent = kind, idempotent
        self.task = TASK if kind != "pure-calculation" else "cd" * 20
        self.random = random.Random(seed)
        self.loss, self.repeats, self.delay_seconds = loss, repeats, delay_seconds
        self.now = 100.0
        self.hub_down = False
        self.hub_claim: claims.Claim | None = None
        self.result: TaskResult | None = None
        self.begun = self.done = self.granted = self.asked = self.finds = 0
        self.last_found: Found | None = None
        self.executors: dict[str, Executor] = {}
        self.last_heard: dict[str, float] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.machine = TaskRequester(channel=CHANNEL, task=self.task, function=FUNCTION, kind=kind,
                                     kwargs_sha1=object_sha1({}), request_id=REQUEST,
                                     asked_ms=self.now_ms, limits=LIMITS, last_heard=self.last_heard)

    @property
    def now_ms(self) -> int:
        return EPOCH_MS + int(self.now * 1000)

    def add(self, name: str, **manner: Any) -> Executor:
        executor = self.executors[name] = Executor(self, name, **manner)
        return executor

    def at(self, seconds: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), work))

    # --- the hub

    def claim(self, node_id: str) -> tuple[claims.Claim, bool]:
        asked = ClaimTask(time=0, id="i", task=self.task, kind=self.kind, function=FUNCTION, attempt=str(self.granted),
                          idempotent=self.idempotent)
        self.hub_claim, granted = claims.claim(self.hub_claim, asked, node_id, self.now_ms, LEASE_MS)
        self.granted += granted
        return self.hub_claim, granted

    def keep(self, node_id: str) -> None:
        if self.hub_claim is not None and not self.hub_down:
            self.hub_claim = claims.keep(self.hub_claim, node_id, self.now_ms, LEASE_MS) or self.hub_claim

    def finish(self, node_id: str, state: str, receipt: dict[str, Any] | None = None) -> None:
        if self.hub_down:
            self.at(1.0, lambda: self.finish(node_id, state, receipt))
        else:
            asked = FinishTask(channel=CHANNEL, time=0, id="i", task=self.task, state=state, receipt=receipt)
            self.hub_claim = claims.finish(self.hub_claim, asked, node_id)

    def find(self) -> None:
        self.finds += 1
        if self.hub_down:
            self.last_found = Found(error=HubUnreachable(url="http://hub", why="connection refused"))
        else:
            self.hub_claim = self.hub_claim and claims.look(self.hub_claim, self.now_ms)
            self.last_found = Found(claims.describe(self.hub_claim, self.task))
        found = self.last_found
        self.at(0.02, lambda: self.do(found))

    def look(self) -> None:
        found = Looked(self.result)
        self.at(0.02, lambda: self.do(found))

    # --- the bands

    def carry(self, deliver: Callable[[], None]) -> None:
        copies = 0 if self.random.random() < self.loss else 2 if self.random.random() < self.repeats else 1
        for _ in range(copies):
            self.at(self.random.uniform(0.0, self.delay_seconds), deliver)

    def say(self, body: Any, sender: str) -> None:
        def deliver() -> None:
            self.last_heard[sender] = self.now
            self.do(Heard(body, sender))

        self.carry(deliver)

    # --- the requester

    def start(self) -> None:
        self.perform(self.machine.start({executor.node_id: executor.name for executor in self.executors.values()},
                                        False, self.now))

    def do(self, event: Event) -> None:
        self.perform(self.machine.handle(event, self.now))

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Ask):
                self.asked += 1
                for executor in self.executors.values():
                    self.carry(executor.asked)
            elif isinstance(effect, Withdraw):
                for executor in self.executors.values():
                    self.carry(executor.withdrawn)
            elif isinstance(effect, Look):
                self.at(0.02, self.look)
            elif isinstance(effect, Find):
                self.at(0.02, self.find)

    def run(self, seconds: float = 1000.0) -> None:
        """Let time pass until the request has ended, or for so long."""
        end = self.now + seconds
        for _ in range(100_000):
            if self.machine.ended:
                self.check()
                return
            deadline = self.machine.deadline
            event_at = self._events[0][0] if self._events else float("inf")
            if min(deadline if deadline is not None else float("inf"), event_at) > end:
                assert deadline is not None or self._events, "nothing will ever happen"
                self.now = end
                return
            if deadline is not None and deadline <= event_at:
                assert deadline >= self.now or self.machine.deadline is not None
                self.now = max(self.now, deadline)
                self.do(Tick())
                assert self.machine.deadline is None or self.machine.deadline > self.now, "it would spin"
            else:
                at, _, work = heapq.heappop(self._events)
                self.now = max(self.now, at)
                work()
        raise AssertionError("it never comes to rest")

    def check(self) -> None:
        """What holds at the end, whatever happened."""
        view = self.machine.view
        if self.kind == "action":
            assert self.begun <= 1 or self.idempotent
            raised = any(executor.raises for executor in self.executors.values())
            if view.status == "finished" or (view.status == "error" and not isinstance(view.error, TaskNotTaken)):
                assert self.done >= 1
                assert (view.status == "error") == raised
            elif view.status == "error" and not self.asked:
                assert not self.begun
            elif view.status == "error":
                assert self.last_found is not None
                assert self.last_found.claim is not None
                assert self.last_found.claim.state in ("none", "released")
            else:
                assert view.status == "unknown"
                assert self.granted or self.hub_down
        elif view.status == "finished":
            assert self.result is not None
            assert view.result == self.result.result
            assert view.node == self.result.node_id
        else:
            assert view.status == "error"
            assert view.error is not None
