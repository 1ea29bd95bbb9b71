"""Performs for one channel what ``protocol.task_providing`` decides: claim, look up, note, upload results, deliver
receipts, say how it stands."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

from ..config import Settings
from ..errors import HubError, HubUnreachable, KacheryError, RateLimited, StaleMessage
from ..protocol.access import Permission
from ..protocol.hub_bodies import TaskClaim
from ..protocol.task_errors import error_report
from ..protocol.task_events import (
    Asked,
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
    RunFunction,
    Said,
    SignedReceipt,
    SignReceipt,
    Store,
    Stored,
)
from ..protocol.tasks import sign_receipt
from ..store.tasks import ActionEntry, TaskLedger
from .ending import begin_task, end_tasks
from .faults import logged_fault
from .identity import Identity
from .link import ChannelLink
from .task_backends import TaskBackends
from .task_results import TaskResults
from .uploading import Uploader

__all__ = ["TaskProviding", "place_of"]

log = logging.getLogger("kachery_fast.node")

# A node that stops tells the hub what became of its tasks, if that takes no longer.
_LAST_WORD_SECONDS = 2.0
# What may pass; another refusal is the hub's last word on a task.
_PASSING = (HubUnreachable, HubError, RateLimited, StaleMessage)
_RETRY_SECONDS_MIN = 0.05

E = TypeVar("E", Claim, LookUp, Note, Store)


def place_of(link: ChannelLink) -> str:
    """Return what a channel is called among the channels of a node: two hubs may have one of the same name."""
    return f"{link.hub.url} {link.name}"


class TaskProviding:
    """Runs tasks of one channel.

    :param threads: runs what reads and writes the disk.
    """

    def __init__(self, link: ChannelLink, identity: Identity, settings: Settings, backends: TaskBackends,
                 ledger: TaskLedger, uploader: Uploader, threads: Executor) -> None:
        self.place = place_of(link)
        self._link = link
        self._identity = identity
        self._backends = backends
        self._ledger = ledger
        self._uploader = uploader
        self._results = TaskResults(link, identity, settings, uploader)
        self._threads = threads
        self._retry_base_seconds = settings.retry_base_seconds
        self._retry_cap_seconds = settings.retry_cap_seconds
        self._started_ms: dict[str, int] = {}
        self._attempts: dict[str, str] = {}  # of the claims on actions
        self._renew_ms: dict[str, int] = {}  # when half of the time is over for which an action was claimed
        self._latest: dict[str, asyncio.Task[None]] = {}
        self._undelivered: dict[str, ActionEntry] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_words: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None
        self._try_again = asyncio.Event()
        self._link.on_restored.append(self._try_again.set)
        self._backends.attach(self)
        self._reading = begin_task(self._read_left(), self._tasks)

    @property
    def channel(self) -> str:
        """The channel's name."""
        return self._link.name

    def heard(self, body: Any, sender: str) -> None:
        """A node asks for something."""
        self._backends.post(Asked(self.place, body, sender))

    async def close(self) -> None:
        """Stop; what became of the tasks is told to the hub, if it listens."""
        self._backends.detach(self)
        with contextlib.suppress(ValueError):  # closed before
            self._link.on_restored.remove(self._try_again.set)
        self._uploader.close()
        if self._last_words:
            await asyncio.wait(self._last_words, timeout=_LAST_WORD_SECONDS)
        await end_tasks([*self._tasks, *self._last_words])

    def perform(self, effect: Effect) -> None:
        """Do what the machine asks for on this channel."""
        if isinstance(effect, Said):
            self._link.say(effect.kind, effect.fields)
        elif isinstance(effect, RunFunction):
            self._started_ms[effect.task] = self._link.hub.now_ms()
        elif isinstance(effect, Claim):
            self._answer(effect, self._claim, lambda why: Claimed(self.place, effect.task, None, why))
        elif isinstance(effect, LookUp):
            self._answer(effect, self._look_up, lambda _: LookedUp(self.place, effect.task, False))
        elif isinstance(effect, Note):
            self._answer(effect, self._note, lambda why: Noted(self.place, effect.task, why))
        elif isinstance(effect, Store):
            self._answer(effect, self._store, lambda why: Stored(self.place, effect.task,
                                                                 error_report("NodeError", why)))
        elif isinstance(effect, SignReceipt):
            self._in_turn(effect.task, partial(self._sign_receipt, effect), self._last_words)
        elif isinstance(effect, Finish):
            self._started_ms.pop(effect.task, None)
            self._in_turn(effect.task, partial(self._finish, effect), self._last_words)
        elif isinstance(effect, Keep) and (self._keeping is None or self._keeping.done()):
            self._keeping = begin_task(self._keep(effect), self._tasks)

    # --- one thing after the other, for each task

    def _answer(self, effect: E, work: Callable[[E], Awaitable[Event]], failed: Callable[[str], Event]) -> None:
        """Do something for a task, and tell the machine of it in any case: it would wait for ever."""
        async def answer() -> None:
            try:
                event = await work(effect)
            except KacheryError as error:
                event = failed(error.message)
            except Exception as error:
                event = failed(logged_fault(error, f"channel {self.channel}: a step of the task {effect.task}"))
            self._backends.post(event)

        self._in_turn(effect.task, answer, self._tasks)

    def _in_turn(self, task: str, work: Callable[[], Awaitable[None]], among: set[asyncio.Task[None]]) -> None:
        """What was asked for first is over before the next begins: a claim is given back, then taken again."""
        before = self._latest.get(task)

        async def turn() -> None:
            if before is not None:
                await asyncio.wait([before])
            try:
                await work()
            except Exception:
                log.exception("channel %s: a step of the task %s failed", self.channel, task)

        mine = self._latest[task] = begin_task(turn(), among)
        mine.add_done_callback(lambda done: self._latest.pop(task) if self._latest.get(task) is done else None)

    async def _on_disk(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: work(self._link.hub.url, self.channel, *arguments))

    # --- before the run

    async def _claim(self, effect: Claim) -> Claimed:
        attempt = secrets.token_hex(16)
        if effect.kind == "action":
            await asyncio.wait([self._reading])
            known = await self._on_disk(self._ledger.begin, effect.task, effect.function, attempt)
            if known is not None:
                return self._recalled(known)
            self._attempts[effect.task] = attempt
        try:
            claim = await self._link.hub.claim_task(self.channel, effect.task, effect.kind, effect.function,
                                                    idempotent=effect.idempotent, attempt=attempt)
        except _PASSING:
            # The hub may have said yes, and nobody have heard it: it is given back.
            self._in_turn(effect.task, partial(self._finish, Finish(self.place, effect.task, effect.kind, "released")),
                          self._last_words)
            raise
        except KacheryError:
            if effect.kind == "action":
                await self._forget(effect.task)
            raise
        if effect.kind == "action":
            self._renew_ms[effect.task] = (claim.claimed + claim.expires) // 2
            if not claim.granted:
                await self._forget(effect.task)
        return Claimed(self.place, effect.task, claim)

    async def _forget(self, task: str) -> None:
        """The hub has not given that action to this node."""
        self._attempts.pop(task, None)
        self._renew_ms.pop(task, None)
        await self._on_disk(self._ledger.remove, task)

    def _recalled(self, entry: ActionEntry) -> Claimed:
        """This node has had that action before, and the hub may not know yet how it ended."""
        if entry.state in ("claiming", "released"):
            return Claimed(self.place, entry.task, None, "an earlier claim of this node has yet to be given back")
        state = "unknown" if entry.state == "started" else entry.state
        return Claimed(self.place, entry.task, TaskClaim(entry.task, state, receipt=entry.receipt))

    async def _look_up(self, effect: LookUp) -> LookedUp:
        return LookedUp(self.place, effect.task, await self._results.has(effect.task))

    async def _note(self, effect: Note) -> Noted:
        await self._on_disk(self._ledger.set, effect.task, "started")
        # This machine may have slept since the claim, and whoever asked been told that nobody knows what became of it.
        if self._link.hub.now_ms() >= self._renew_ms.pop(effect.task, 0) and await self._link.hub.keep_tasks(
                self.channel, [effect.task]):
            return Noted(self.place, effect.task, "its claim lapsed before it began")
        return Noted(self.place, effect.task)

    # --- after the run

    async def _store(self, effect: Store) -> Stored:
        try:
            await self._results.share(effect, self._started_ms.pop(effect.task, 0))
        except KacheryError as error:
            log.warning("channel %s: the result of %s could not be shared: %s", self.channel, effect.function, error)
            return Stored(self.place, effect.task, error_report(
                type(error).__name__, f"its result could not be shared: {error.message}"))
        return Stored(self.place, effect.task)

    async def _sign_receipt(self, effect: SignReceipt) -> None:
        started_ms = self._started_ms.pop(effect.task, 0)
        receipt = sign_receipt(channel=self.channel, task=effect.task, function=effect.function, kwargs=effect.kwargs,
                               outcome="error" if effect.error else "finished", error=effect.error,
                               started_ms=started_ms, finished_ms=max(started_ms, self._link.hub.now_ms()),
                               key=self._identity.key)
        state = "failed" if effect.error else "finished"
        self._attempts.pop(effect.task, None)
        await self._keep_word(ActionEntry(effect.task, effect.function, state, receipt),
                              lambda: self._backends.post(SignedReceipt(self.place, effect.task, receipt)))

    async def _finish(self, effect: Finish) -> None:
        if effect.kind == "action":
            self._renew_ms.pop(effect.task, None)
            await self._keep_word(ActionEntry(effect.task, "", effect.state, None,
                                              self._attempts.pop(effect.task, "")))
            return
        try:
            await self._link.hub.finish_task(self.channel, effect.task, effect.state)
        except KacheryError as error:  # its claim lapses, which is as good
            log.info("channel %s: %s", self.channel, error)

    async def _keep(self, effect: Keep) -> None:
        try:
            lost = await self._link.hub.keep_tasks(self.channel, effect.tasks)
        except KacheryError as error:
            log.warning("channel %s: the claims of %d tasks could not be kept alive: %s", self.channel,
                        len(effect.tasks), error)
            return
        for task in sorted(lost & set(effect.tasks)):
            log.warning("channel %s: the claim of the task %s has lapsed while it runs", self.channel, task)

    # --- what the hub has to hear, sooner or later

    async def _keep_word(self, entry: ActionEntry, kept: Callable[[], None] = lambda: None) -> None:
        """Write down how an action ended, call ``kept``, and tell the hub."""
        try:
            await self._on_disk(self._ledger.set, entry.task, entry.state, entry.receipt)
        except KacheryError as error:
            log.error("channel %s: how the action %s ended could not be written down: %s", self.channel, entry.task,
                      error)
        kept()
        await self._deliver(entry)

    async def _deliver(self, entry: ActionEntry) -> None:
        """Tell the hub how an action ended, or have it told later."""
        if await self._told(entry):
            return
        if not self._undelivered:
            begin_task(self._deliver_later(), self._tasks)
        self._undelivered[entry.task] = entry

    async def _told(self, entry: ActionEntry) -> bool:
        try:
            await self._link.hub.finish_task(self.channel, entry.task, entry.state, entry.receipt,
                                             attempt=entry.attempt)
        except KacheryError as error:
            # Without the permission it may come back; with it, another refusal is the hub's last word.
            if isinstance(error, _PASSING) or not self._link.may(Permission.PROVIDE_TASKS):
                log.warning("channel %s: how the action %s ended could not be told yet: %s", self.channel, entry.task,
                            error)
                return False
            log.warning("channel %s: the hub does not take this node's word on the action %s: %s", self.channel,
                        entry.task, error)
        try:
            await self._on_disk(self._ledger.remove, entry.task)
        except KacheryError as error:  # it is told once more by the next run of this node, which does no harm
            log.error("channel %s: the action %s could not be forgotten: %s", self.channel, entry.task, error)
        return True

    async def _deliver_later(self) -> None:
        """Try again and again, and at once when the bands are back."""
        pause = first = max(self._retry_base_seconds, _RETRY_SECONDS_MIN)
        while self._undelivered:
            self._try_again.clear()
            alarm = asyncio.get_running_loop().call_later(pause, self._try_again.set)
            try:
                await self._try_again.wait()
            finally:
                alarm.cancel()
            pause = min(2 * pause, self._retry_cap_seconds)
            for entry in list(self._undelivered.values()):
                if not await self._told(entry):
                    break
                del self._undelivered[entry.task]
                pause = first

    async def _read_left(self) -> None:
        """What an earlier run of this node began, and did not live to tell. Nothing new is begun before it is read."""
        try:
            left = await self._on_disk(self._ledger.left)
        except KacheryError as error:
            log.error("channel %s: what earlier runs of this node have left cannot be read: %s", self.channel, error)
            return
        known = {"claiming": "released", "started": "unknown"}
        for entry in left:
            begin_task(self._deliver(entry._replace(state=known.get(entry.state, entry.state))), self._tasks)
