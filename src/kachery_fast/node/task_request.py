"""Performs what ``protocol.task_requesting`` decides for one task: look into the bucket, ask the band and the hub."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ..config import Settings
from ..errors import KacheryError, NodeError, ObjectMissing, ResultRefused, TooLarge
from ..protocol.access import Permission
from ..protocol.names import result_object_name
from ..protocol.task_bodies import TaskCancel, TaskRequest
from ..protocol.task_request_events import (
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
    TaskRequestLimits,
    Tick,
    Withdraw,
)
from ..protocol.task_requesting import TaskRequester
from ..protocol.task_view import Phase, TaskView
from ..protocol.tasks import RESULT_FRAME_SIZE_BYTES, TaskResult, canonical_kwargs, check_result, result_id
from .ending import begin_task, end_tasks
from .faults import logged_fault
from .link import ChannelLink

__all__ = ["SharedTask", "request_limits"]

log = logging.getLogger("kachery_fast.node")


def request_limits(settings: Settings) -> TaskRequestLimits:
    """Return the requester's share of the settings."""
    return TaskRequestLimits(settings.offer_wait_seconds, settings.want_rounds_max, settings.patience_seconds,
                             settings.provider_silence_seconds, settings.retry_base_seconds)


class SharedTask:
    """One task that this node asks for on one channel, whoever waits for it here.

    :param data: the canonical JSON of the arguments.
    :param last_heard: when each node of the channel was last heard of; this writes to it.
    :param on_end: is called once when it is over.
    """

    def __init__(self, link: ChannelLink, task: str, function: str, kind: str, data: bytes, *, request_id: str,
                 settings: Settings, last_heard: dict[str, float], on_end: Callable[[SharedTask], None]) -> None:
        self.link, self.task, self.function, self.kind = link, task, function, kind
        self.arguments_sha1 = hashlib.sha1(data, usedforsecurity=False).digest()
        self.arguments_size_bytes = len(data)
        self.result_size_bytes = 0
        self._data = data
        self._request_id = request_id
        self._last_heard = last_heard
        self._on_end = on_end
        self._limit_bytes = settings.task_result_size_bytes_max + len(data) + RESULT_FRAME_SIZE_BYTES
        self._machine = TaskRequester(
            channel=link.name, task=task, function=function, kind=kind, kwargs_sha1=self.arguments_sha1.hex(),
            request_id=request_id,
            asked_ms=link.hub.now_ms(), limits=request_limits(settings), last_heard=last_heard)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._changed: set[asyncio.Future[None]] = set()
        self._told_revision = 0
        self._closed = False

    @property
    def view(self) -> TaskView:
        """How it stands."""
        return self._machine.view

    @property
    def revision(self) -> int:
        """Grows with each change of ``view``."""
        return self._machine.revision

    @property
    def looking(self) -> bool:
        """Whether the bucket is looked into, before anybody is asked."""
        return self._machine.phase is Phase.CACHE

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._machine.ended

    def start(self) -> None:
        """Begin."""
        self.link.listen(self.task, self._heard)
        providers, self_may = self._providers()
        self._perform(self._machine.start(providers, self_may, asyncio.get_running_loop().time()))

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._post(Cancel())

    def providers_changed(self) -> None:
        """The members of the channel, or their permissions, have changed."""
        self._post(ProvidersChanged(*self._providers()))

    def restored(self) -> None:
        """Messages flow again."""
        self._post(BandRestored())

    async def changed(self, seen: int, seconds: float) -> None:
        """Wait until ``revision`` is beyond ``seen``, it is over, or so many seconds have passed."""
        if self.revision > seen or self.ended or seconds <= 0:
            return
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()
        self._changed.add(waiting)
        alarm = loop.call_later(seconds, _wake, waiting)
        try:
            await waiting
        finally:
            alarm.cancel()
            self._changed.discard(waiting)

    async def close(self) -> None:
        """Break off, without a word to anybody."""
        self._closed = True
        self._let_go()
        await end_tasks(self._tasks)

    # --- events and effects

    def _providers(self) -> tuple[dict[str, str], bool]:
        return self.link.providers(Permission.PROVIDE_TASKS), self.link.may(Permission.PROVIDE_TASKS)

    def _heard(self, body: Any, sender: str) -> None:
        self._last_heard[sender] = asyncio.get_running_loop().time()
        self._post(Heard(body, sender))

    def _post(self, event: Event) -> None:
        if not self.ended and not self._closed:
            self._perform(self._machine.handle(event, asyncio.get_running_loop().time()))

    def _perform(self, effects: list[Effect]) -> None:
        loop = asyncio.get_running_loop()
        for effect in effects:
            if isinstance(effect, Ask):
                self.link.say(TaskRequest, {"request": self._request_id, "task": self.task, "function": self.function,
                                            "kind": self.kind, "kwargs": canonical_kwargs(self._data)},
                              lambda error: self._post(SayFailed(error)))
            elif isinstance(effect, Withdraw):
                self.link.say(TaskCancel, {"request": self._request_id, "task": self.task})
            elif isinstance(effect, Look):
                begin_task(self._answer(partial(self._look_up, effect.fresh), Looked), self._tasks)
            elif isinstance(effect, Find):
                begin_task(self._answer(self._find, Found), self._tasks)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.ended:
            self._let_go()
            self._data = b""
            self._on_end(self)
        elif self._machine.deadline is not None:
            self._timer = loop.call_at(self._machine.deadline, self._post, Tick())
        if self.revision != self._told_revision:
            self._told_revision = self.revision
            for waiting in self._changed:
                _wake(waiting)
            self._changed.clear()

    def _let_go(self) -> None:
        self.link.unlisten(self.task, self._heard)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _answer(self, work: Callable[[], Awaitable[Looked | Found]], kind: type[Looked | Found]) -> None:
        """Tell the machine what became of something, in any case: it would wait for ever."""
        try:
            event = await work()
        except KacheryError as error:
            event = kind(error=error)
        except Exception as error:
            doing = f"channel {self.link.name}: a step of the request for {self.task}"
            event = kind(error=NodeError(what=logged_fault(error, doing)))
        self._post(event)

    async def _look_up(self, fresh: bool) -> Looked:
        """Get the result, and check it: a result that nobody may have made is reported, and as good as absent.

        :raises TooLarge: it is good, and longer than this node takes.
        """
        found_as = self.task if self.kind == "pure-calculation" else result_id(self.kind, self.function, self._data)
        removed = False
        try:
            data = await self.link.bucket.get_small(result_object_name(self.link.name, found_as), self._limit_bytes,
                                                    fresh=fresh)
            found = check_result(data, found_as, self.link.name)
            await self._check_provider(found, found_as)
        except ObjectMissing:
            return Looked()
        except (ResultRefused, TooLarge) as refused:
            log.warning("channel %s: %s", self.link.name, refused)
            try:
                removed = await self.link.hub.report_bad_result(self.link.name, found_as)
            except KacheryError as error:
                log.warning("channel %s: a bad result could not be reported: %s", self.link.name, error)
            if isinstance(refused, TooLarge) and not removed:
                raise
            return Looked(why=refused.message)
        self.result_size_bytes = len(data)
        return Looked(found)

    async def _check_provider(self, found: TaskResult, found_as: str) -> None:
        if not await self.link.check_member(found.node_id, Permission.PROVIDE_TASKS):
            raise ResultRefused(task=found_as, why=f"it was made by the node {found.node_id[:16]}, which may not "
                                                   f"provide tasks on the channel {self.link.name!r}")

    async def _find(self) -> Found:
        return Found(await self.link.hub.find_task(self.link.name, self.task))


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
