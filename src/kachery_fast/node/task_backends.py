"""The task backends that are connected to this node, and what runs on them.

A backend is a user's process that has registered functions and is told, line by line on one HTTP answer, what to run.
``TaskBackends`` drives the one ``protocol.task_providing.TaskProvider`` of the node: what backends and channels report
goes in, what comes out is handed to the backend or the channel (``task_providing.TaskProviding``) that it is for.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from ..config import Settings
from ..errors import TaskUnknown
from ..protocol.task_events import (
    BackendGone,
    BackendInfo,
    BackendReady,
    CancelRun,
    Effect,
    Event,
    FunctionInfo,
    PlaceGone,
    Report,
    RunFunction,
    Tick,
)
from ..protocol.task_providing import TaskProvider
from ..protocol.task_workers import TaskProvideLimits

__all__ = ["Backend", "TaskBackends", "TaskPlace"]

log = logging.getLogger("kachery_fast.node")

_ALIVE_SECONDS = 5.0


class TaskPlace(Protocol):
    """A channel, as far as the backends are concerned."""

    place: str

    @property
    def channel(self) -> str:
        """The channel's name."""

    def perform(self, effect: Effect) -> None:
        """Do what the machine asks for on this channel."""


class Backend:
    """One connected backend: what it is to be told, and the runs that it may report on."""

    def __init__(self, info: BackendInfo, name: str, close: Callable[[], None]) -> None:
        self.info = info
        self.name = name
        self.runs: set[str] = set()
        self._lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._close = close

    def tell(self, line: dict[str, Any]) -> None:
        """Queue a line for it."""
        self._lines.put_nowait(line)

    async def next_line(self) -> dict[str, Any]:
        """Return what it is to be told next, and each few seconds that the node is alive."""
        alarm = asyncio.get_running_loop().call_later(_ALIVE_SECONDS, self.tell, {"type": "alive"})
        try:
            return await self._lines.get()
        finally:
            alarm.cancel()

    def close(self) -> None:
        """Its connection has ended."""
        self._close()


class TaskBackends:
    """All backends of a node, and its channels."""

    def __init__(self, settings: Settings) -> None:
        self._machine = TaskProvider(TaskProvideLimits(
            requests_max=settings.task_requests_max,
            kwargs_size_bytes_max=settings.task_kwargs_size_bytes_max,
            progress_interval_seconds=settings.progress_interval_seconds,
            keep_seconds=settings.task_lease_seconds / 3))
        self._backends: dict[str, Backend] = {}
        self._places: dict[str, TaskPlace] = {}
        self._timer: asyncio.TimerHandle | None = None

    # --- backends

    def register(self, name: str, functions: list[FunctionInfo], workers: int, places: set[str] | None) -> Backend:
        """Take a backend on, whose connection ends with ``Backend.close``.

        :param workers: how many functions it runs at once. :param places: the channels that it serves; None for all.
        """
        info = BackendInfo(secrets.token_hex(16), workers, {function.id: function for function in functions},
                           None if places is None else frozenset(places))
        backend = self._backends[info.id] = Backend(info, name, lambda: self._gone(info.id))
        log.info("task backend %s: connected, with %s", name or info.id, ", ".join(info.functions) or "no functions")
        self.post(BackendReady(info))
        return backend

    def report(self, backend_id: str, report: Report) -> None:
        """A backend tells of one of its runs.

        :raises TaskUnknown: the backend is not connected, or has no such run, or it has ended.
        """
        backend = self._backends.get(backend_id)
        if backend is None or report.run not in backend.runs:
            raise TaskUnknown(task=report.run)
        if report.status != "running":
            backend.runs.discard(report.run)
        self.post(report)

    def describe(self) -> dict[str, Any]:
        """Return what runs here, as plain JSON."""
        return {"queued": self._machine.queued, "running": self._machine.running, "backends": [{
            "name": backend.name, "workers": backend.info.workers, "runs": len(backend.runs),
            "functions": [{"id": function.id, "kind": function.kind} for function in backend.info.functions.values()],
        } for backend in self._backends.values()]}

    def _gone(self, backend_id: str) -> None:
        backend = self._backends.pop(backend_id, None)
        if backend is not None:
            log.info("task backend %s: gone", backend.name or backend_id)
            self.post(BackendGone(backend_id))

    # --- channels

    def attach(self, place: TaskPlace) -> None:
        """Serve a channel."""
        self._places[place.place] = place

    def detach(self, place: TaskPlace) -> None:
        """Serve a channel no more."""
        if self._places.get(place.place) is place:
            del self._places[place.place]
            self.post(PlaceGone(place.place))

    # --- the machine

    def post(self, event: Event) -> None:
        """Tell the machine of something, and do what it asks for."""
        loop = asyncio.get_running_loop()
        for effect in self._machine.handle(event, loop.time()):
            if isinstance(effect, CancelRun):
                self._tell(effect.backend, {"type": "cancel", "run": effect.run})
                continue
            place = self._places.get(effect.place)
            if isinstance(effect, RunFunction) and place is not None:
                self._run(effect, place)
            if place is not None:
                place.perform(effect)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._machine.deadline
        if deadline is not None:
            self._timer = loop.call_at(deadline, self.post, Tick())

    def close(self) -> None:
        """Stop the clock; for when all channels and backends have gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _run(self, effect: RunFunction, place: TaskPlace) -> None:
        backend = self._backends.get(effect.backend)
        if backend is not None:
            backend.runs.add(effect.run)
        self._tell(effect.backend, {"type": "run", "run": effect.run, "task": effect.task,
                                    "function": effect.function, "kind": effect.kind, "kwargs": effect.kwargs,
                                    "channel": place.channel})

    def _tell(self, backend_id: str, line: dict[str, Any]) -> None:
        backend = self._backends.get(backend_id)
        if backend is not None:
            backend.tell(line)
