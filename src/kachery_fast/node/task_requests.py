"""All tasks that clients of this node ask for: one request to the channel for each task, however many wait for it."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ..config import Settings
from ..errors import InvalidArgument, RateLimited, TaskFailed, TaskUnknown
from ..protocol.access import Permission
from ..protocol.tasks import check_function, check_kind, check_kwargs, check_task_id, task_id
from .link import ChannelLink
from .task_request import SharedTask

__all__ = ["TaskRequests"]

# Results of tasks that have ended are kept for who asks again, up to here; then the oldest tasks are forgotten.
_RESULTS_KEPT_BYTES = 64 * 1024 * 1024
# The arguments of tasks that are under way.
_ARGUMENTS_KEPT_BYTES = 64 * 1024 * 1024


@dataclass(eq=False)
class _Request:
    """What one client asked for. ``cached``: the task had ended before."""

    name: str
    shared: SharedTask
    asked_ms: int
    cached: bool


@dataclass(eq=False)
class _Place:
    """What is asked for on one channel. ``tasks``: the latest request for each task, which others may join."""

    tasks: dict[str, SharedTask] = field(default_factory=dict)
    last_heard: dict[str, float] = field(default_factory=dict)
    shared_count: int = 0

    def restored(self) -> None:
        for shared in [shared for shared in self.tasks.values() if not shared.ended]:
            shared.restored()

    def providers_changed(self) -> None:
        for shared in [shared for shared in self.tasks.values() if not shared.ended]:
            shared.providers_changed()


class TaskRequests:
    """Starts requests, lets further ones for the same task join them, and remembers how they ended for
    ``task_keep_seconds``. At most ``task_requests_max`` are remembered."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._requests: dict[str, _Request] = {}
        self._names: dict[SharedTask, list[str]] = {}
        self._places: dict[ChannelLink, _Place] = {}
        self._ended: deque[tuple[float, SharedTask]] = deque()
        self._kept_bytes = self._arguments_bytes = 0

    def request(self, link: ChannelLink, function: str, kwargs: Any, kind: str, task: str | None = None) -> str:
        """Ask for a task, and return the name of this request.

        :param task: the id of a query or an action: one that was asked for before is joined. Without it, it is new.
        :raises InvalidArgument: an argument is not as it must be, or the id is that of another task.
        :raises TooLarge: the arguments are too long. :raises RateLimited: too many tasks are under way.
        """
        check_function(function)
        check_kind(kind)
        data = check_kwargs(kwargs, self._settings.task_kwargs_size_bytes_max)
        if kind == "pure-calculation":
            name = task_id(function, data)
            if task not in (None, name):
                raise InvalidArgument(what=f"The id of this pure calculation is {name}: it follows from the function "
                                           "and the arguments. Leave the id out.")
        else:
            name = secrets.token_hex(16) if task is None else check_task_id(kind, task)
        self._make_room()
        place = self._places.get(link)
        shared = None if place is None else place.tasks.get(name)
        sha1 = hashlib.sha1(data, usedforsecurity=False).digest()
        if shared is not None and (shared.function, shared.kind, shared.arguments_sha1) != (function, kind, sha1):
            raise InvalidArgument(what=f"The id {name} is that of another task: the {shared.kind} {shared.function!r} "
                                       "with its arguments. Leave the id out to ask for a new one.")
        joined = shared is not None and self._may_join(shared)
        if shared is None or not joined:
            shared = self._begin(link, name, function, kind, data)
        cached = joined and shared.ended and kind == "pure-calculation"
        request = _Request(secrets.token_hex(16), shared, link.hub.now_ms(), cached)
        self._requests[request.name] = request
        self._names[shared].append(request.name)
        return request.name

    async def wait(self, request: str, seen: int, seconds: float) -> dict[str, Any]:
        """Return how a request stands, once it has changed since the revision ``seen``, has ended, or ``seconds`` have
        passed.

        :raises TaskUnknown: there is no such request, or it has ended too long ago.
        """
        found = self._find(request)
        await found.shared.changed(seen, seconds)
        return self._state(found)

    async def wait_to_end(self, request: str, seconds: float, *, look: bool = False) -> dict[str, Any]:
        """Return how a request stands, once it has ended or ``seconds`` have passed.

        :param look: or once the bucket has been looked into, and somebody has to run it.
        :raises TaskUnknown: as ``wait``.
        """
        found = self._find(request)
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not found.shared.ended and (found.shared.looking or not look) and loop.time() < end:
            await found.shared.changed(found.shared.revision, end - loop.time())
        return self._state(found)

    def cancel(self, request: str) -> dict[str, Any]:
        """Withdraw a request; the task goes on while others wait for it. Return how it stands, for the last time.

        :raises TaskUnknown: as ``wait``.
        """
        found = self._find(request)
        if found.shared.ended:
            return self._state(found)
        names = self._names[found.shared]
        if len(names) == 1:
            found.shared.cancel()
            return self._state(found)
        names.remove(request)
        del self._requests[request]
        return {**self._state(found), "status": "cancelled"}

    def list(self) -> list[dict[str, Any]]:
        """Return how all requests stand, the latest last; without the values of results, which may be long."""
        return [{**self._state(request), "result": None} for request in self._requests.values()]

    async def close(self) -> None:
        """Break everything off. Actions and calculations that others have begun go on there."""
        await asyncio.gather(*(shared.close() for shared in list(self._names)))
        for link in list(self._places):
            self._leave(link)
        self._requests.clear()
        self._names.clear()

    # --- the tasks

    def _may_join(self, shared: SharedTask) -> bool:
        """Whether a further request is answered by one that was made before."""
        view = shared.view
        if not shared.ended:
            return True
        if shared.kind == "pure-calculation":
            return view.status == "finished" and shared.link.member_may(view.node, Permission.PROVIDE_TASKS)
        return view.status == "finished" or isinstance(view.error, TaskFailed)

    def _begin(self, link: ChannelLink, task: str, function: str, kind: str, data: bytes) -> SharedTask:
        if self._arguments_bytes + len(data) > _ARGUMENTS_KEPT_BYTES:
            raise RateLimited(who="A client of this node", retry_seconds=1,
                              limit=f"the arguments of the tasks under way take {self._arguments_bytes} bytes")
        place = self._place(link)
        shared = SharedTask(link, task, function, kind, data, request_id=secrets.token_hex(16),
                            settings=self._settings, last_heard=place.last_heard, on_end=self._on_end)
        self._arguments_bytes += len(data)
        place.tasks[task] = shared
        place.shared_count += 1
        self._names[shared] = []
        shared.start()
        return shared

    def _on_end(self, shared: SharedTask) -> None:
        self._ended.append((asyncio.get_running_loop().time(), shared))
        self._arguments_bytes -= shared.arguments_size_bytes
        self._kept_bytes += shared.result_size_bytes

    def _make_room(self) -> None:
        """Forget what ended too long ago, and more when there is too much of it."""
        oldest = asyncio.get_running_loop().time() - self._settings.task_keep_seconds
        requests_max = self._settings.task_requests_max
        while self._ended and (self._ended[0][0] < oldest or self._kept_bytes > _RESULTS_KEPT_BYTES
                               or len(self._requests) >= requests_max):
            self._forget(self._ended.popleft()[1])
        if len(self._requests) >= requests_max:
            raise RateLimited(who="A client of this node", retry_seconds=1,
                              limit=f"{requests_max} requests for tasks are under way (task_requests_max)")

    def _forget(self, shared: SharedTask) -> None:
        self._kept_bytes -= shared.result_size_bytes
        for name in self._names.pop(shared):
            del self._requests[name]
        place = self._places[shared.link]
        if place.tasks.get(shared.task) is shared:
            del place.tasks[shared.task]
        place.shared_count -= 1
        if not place.shared_count:
            self._leave(shared.link)

    def _find(self, request: str) -> _Request:
        found = self._requests.get(request)
        if found is None:
            raise TaskUnknown(task=request)
        return found

    # --- the channels

    def _place(self, link: ChannelLink) -> _Place:
        place = self._places.get(link)
        if place is None:
            place = self._places[link] = _Place()
            link.on_restored.append(place.restored)
            link.on_members.append(place.providers_changed)
        return place

    def _leave(self, link: ChannelLink) -> None:
        place = self._places.pop(link)
        link.on_restored.remove(place.restored)
        link.on_members.remove(place.providers_changed)

    # --- what a client sees

    def _state(self, request: _Request) -> dict[str, Any]:
        shared = request.shared
        view = shared.view
        members = shared.link.info.members if view.node else []
        label = next((member.label for member in members if member.node_id == view.node), "")
        return {
            "request": request.name, "task": shared.task, "function": shared.function, "kind": shared.kind,
            "channel": shared.link.name, "asked": request.asked_ms, "status": view.status, "progress": view.progress,
            "text": view.text, "cached": view.cached or request.cached, "result": view.result,
            "resultTime": view.result_ms, "node": view.node, "nodeLabel": label,
            "error": None if view.error is None else view.error.to_dict(), "revision": shared.revision,
        }
