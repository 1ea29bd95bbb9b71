"""Asking for tasks: functions that a node of the channel runs for us."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from ..config import Settings
from ..errors import Cancelled, InvalidArgument, KacheryError, NodeError, TaskPending, TaskUnknown
from ..protocol.names import check_channel_name
from ..protocol.tasks import check_kind, check_kwargs, check_task_id
from .connection import NodeConnection
from .functions import find_function
from .place import client_settings

__all__ = ["Task", "list_tasks", "request_task", "task_state"]

# The first answer waits so long for a look into the bucket: that of a calculation may have its result then.
_LOOK_SECONDS = 0.1
_SLICE_SECONDS = 10.0
# An awaited task holds a thread for so long; where there are more tasks than threads, each gets its turn sooner.
_AWAIT_SLICE_SECONDS = 1.0
_AWAITED_AT_ONCE = 64
_FRESH_SECONDS = 0.05
_ENDED = frozenset({"finished", "error", "unknown", "cancelled"})


def request_task(function: Callable[..., Any] | str, kwargs: dict[str, Any] | None = None, *,
                 channel: str | None = None, type: str | None = None,  # noqa: A002 - name of 2022
                 task_id: str | None = None) -> Task:
    """Ask for a task, and return it at once; ``wait`` for it, or ``await`` it.

    :param function: a function registered here by ``taskfunction``, or the id of one registered anywhere.
    :param kwargs: its arguments, a dict that is JSON, at most ``task_kwargs_size_bytes_max`` long.
    :param channel: the channel to ask on; without it the one of the setting KACHERY_CHANNEL.
    :param type: "pure-calculation", "query" or "action"; without it that of the function where it is registered here,
        else "pure-calculation".
    :param task_id: for a query or an action, the id of one that was asked for before, to learn how it stands; an
        action is not done again. Without it a new id is made.
    :raises InvalidArgument, InvalidName, TooLarge: the call is wrong; nothing was sent.
    :raises NodeNotRunning, ClientAuthRefused: there is no node to ask.
    :raises ChannelUnknown, NotPermitted, NoChannel: the node cannot ask on that channel.
    """
    settings = client_settings()
    function_id, known = find_function(function)
    kind = check_kind(type if type is not None else "pure-calculation" if known is None else known.kind)
    kwargs = {} if kwargs is None else kwargs
    check_kwargs(kwargs, settings.task_kwargs_size_bytes_max)
    if kind == "pure-calculation":
        if task_id is not None:
            raise InvalidArgument(what="The id of a pure calculation follows from its function and arguments; "
                                       "leave task_id out.")
    else:
        task_id = secrets.token_hex(16) if task_id is None else check_task_id(kind, task_id)
    chosen = (settings.channel if channel is None else channel) or None
    if chosen is not None:
        check_channel_name(chosen)
    return Task(settings, {"function": function_id, "kwargs": kwargs, "kind": kind, "channel": chosen, "id": task_id})


def list_tasks() -> list[dict[str, Any]]:
    """Return how the tasks stand that clients of this node have asked for lately.

    :raises NodeNotRunning, ClientAuthRefused: there is no node to ask.
    """
    found = _connection(client_settings()).call("/api/task/list", {}).get("tasks")
    if not isinstance(found, list):
        raise NodeError(what="it does not tell its tasks")
    return found


def task_state(request_id: str) -> dict[str, Any]:
    """Return how one of ``list_tasks`` stands.

    :raises TaskUnknown: it is none of these.
    """
    return _connection(client_settings()).call("/api/task/wait", {"request": request_id, "seen": 0, "waitMsec": 0})


class Task:
    """A task that was asked for; made by ``request_task``. Threads may share one."""

    def __init__(self, settings: Settings, asked: dict[str, Any]) -> None:
        self._settings = settings
        self._connection = _connection(settings)
        self._asked = asked
        self._lock = threading.Lock()
        self._loaded: list[Any] = []
        self._state: dict[str, Any] = {}
        self._read_at = 0.0
        self._asked_at = time.monotonic()
        self._take(self._request(_LOOK_SECONDS, "look"))

    # --- what it is

    @property
    def function_id(self) -> str:
        """The id of the function."""
        return str(self._asked["function"])

    @property
    def task_id(self) -> str:
        """The id of the task: of a pure calculation the hash of its function and arguments, else random."""
        return str(self._state.get("task", ""))

    @property
    def request_id(self) -> str:
        """What the node knows this request by."""
        return str(self._state.get("request", ""))

    @property
    def state(self) -> dict[str, Any]:
        """Everything that the node last told of it."""
        return dict(self._state)

    # --- how it stands

    @property
    def status(self) -> str:
        """How it stands now: "waiting" (nobody has taken it yet), "queued", "running", and at the end "finished",
        "error", "unknown" (of an action: whether it was done) or "cancelled"."""
        self._refresh()
        return self._status

    @property
    def progress(self) -> float | None:
        """How far it is, 0 to 1, by the word of the function; None when it says nothing."""
        self._refresh()
        found = self._state.get("progress")
        return None if found is None else float(found)

    @property
    def text(self) -> str:
        """What the function says of its progress, or what the request is waiting for."""
        self._refresh()
        return str(self._state.get("text") or "")

    @property
    def cached(self) -> bool:
        """Whether the result is one from before. Of a query that is told apart by ``result_time``."""
        return bool(self._state.get("cached"))

    @property
    def result_time(self) -> datetime | None:
        """When the result was computed, in UTC; None while there is none."""
        found = self._state.get("resultTime")
        return None if found is None else datetime.fromtimestamp(found / 1000, timezone.utc)

    @property
    def node(self) -> str:
        """The id of the node that runs it or has run it, empty when it is not known."""
        return str(self._state.get("node") or "")

    @property
    def node_label(self) -> str:
        """The name for people of that node."""
        return str(self._state.get("nodeLabel") or "")

    # --- how it ends

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended, for at most ``timeout`` seconds, and return whether it has.

        How it ended is in ``status`` and ``result``; this raises nothing of that.

        :raises NodeNotRunning, ClientAuthRefused: the node is gone; wait again when it is back.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self._status not in _ENDED:
            left = _SLICE_SECONDS if end is None else min(_SLICE_SECONDS, end - time.monotonic())
            if left <= 0:
                return False
            self._wait_once(left)
        return True

    @property
    def result(self) -> Any:
        """The result; a file is loaded from the channel. Of an action it is None.

        :raises TaskPending: it has not ended; ``wait`` first.
        :raises TaskFailed: the function raised; TaskCrashed, TaskHung: its process died, or it took too long.
        :raises TaskNotTaken, TaskOutcomeUnknown, Cancelled and others: what went wrong.
        """
        self.raise_unless_finished()
        with self._lock:
            if not self._loaded:
                self._loaded.append(_load_result(self._state.get("result"), self._state.get("channel")))
            return self._loaded[0]

    def raise_unless_finished(self) -> None:
        """Do nothing when it is finished; raise what ``result`` raises when it is not."""
        self._refresh()
        if self._status not in _ENDED:
            raise TaskPending(task=self.task_id, function=self.function_id, status=self._status,
                              seconds=round(time.monotonic() - self._asked_at, 1))
        error = self.error
        if error is not None:
            raise error

    @property
    def error(self) -> KacheryError | None:
        """What went wrong; None while nothing has."""
        self._refresh()
        found = self._state.get("error")
        if isinstance(found, dict):
            return KacheryError.from_dict(found)
        if self._status == "cancelled":
            return Cancelled(what=f"The task {self.function_id!r}")
        if self._status in ("error", "unknown"):
            return NodeError(what=f"it does not say how the task {self.task_id} went wrong")
        return None

    @property
    def error_message(self) -> str | None:
        """What went wrong, in words; None while nothing has."""
        error = self.error
        return None if error is None else error.message

    @property
    def traceback(self) -> str:
        """Where the function raised, as Python tells it; empty when it did not."""
        error = self.error
        return "" if error is None else str(error.details.get("traceback") or "")

    def cancel(self) -> None:
        """Take the request back. A calculation or query that nobody else waits for is broken off; an action that has
        begun is not."""
        self._take(self._connection.call("/api/task/cancel", {"request": self.request_id}))

    def __await__(self) -> Generator[Any, None, Any]:
        return self._awaited().__await__()

    def __repr__(self) -> str:
        return f"<Task {self.task_id} of {self.function_id!r}: {self._status}>"

    # --- the node

    @property
    def _status(self) -> str:
        return str(self._state.get("status", "waiting"))

    def _request(self, wait_seconds: float, wait_for: str) -> dict[str, Any]:
        return self._connection.call("/api/task/request", {
            **self._asked, "waitMsec": round(wait_seconds * 1000), "waitFor": wait_for})

    def _wait_once(self, wait_seconds: float) -> None:
        body = {"request": self.request_id, "seen": self._state.get("revision", 0),
                "waitMsec": max(1, round(wait_seconds * 1000)) if wait_seconds else 0}
        try:
            state = self._connection.call("/api/task/wait", body, wait_seconds + self._settings.stall_seconds)
        except TaskUnknown:
            # The node was started anew. Asked by its id, an action is not done twice.
            state = self._request(wait_seconds, "end")
        self._take(state)

    def _refresh(self) -> None:
        if self._status not in _ENDED and time.monotonic() - self._read_at >= _FRESH_SECONDS:
            self._wait_once(0)

    def _take(self, state: dict[str, Any]) -> None:
        self._read_at = time.monotonic()
        with self._lock:
            if "status" in state and self._status not in _ENDED:
                self._state = state

    async def _awaited(self) -> Any:
        threads = _threads()
        with threads:
            while self._status not in _ENDED:
                await threads.run(self._wait_once, _AWAIT_SLICE_SECONDS / (20 if threads.crowded else 1))
            return await threads.run(lambda: self.result)


@lru_cache(maxsize=4)
def _connection(settings: Settings) -> NodeConnection:
    """The connections that all tasks of this process share; those kept by another thread are not touched."""
    return NodeConnection(settings)


class _WaitingThreads:
    """The threads in which awaited tasks are waited for; a context for each of these."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_AWAITED_AT_ONCE, "kachery-fast-task")
        self._lock = threading.Lock()
        self._awaited = 0

    @property
    def crowded(self) -> bool:
        return self._awaited > _AWAITED_AT_ONCE

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def __enter__(self) -> None:
        with self._lock:
            self._awaited += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._awaited -= 1


@lru_cache(maxsize=1)
def _threads() -> _WaitingThreads:
    return _WaitingThreads()


def _load_result(result: object, channel: str | None) -> Any:
    if result is None:
        return None
    if isinstance(result, dict) and "json" in result:
        return result["json"]
    if not isinstance(result, dict) or not isinstance(result.get("file"), str):
        raise NodeError(what="a result is neither JSON nor a file")
    uri, file_format = result["file"], result.get("format")
    from . import formats

    loads: dict[str, Callable[..., Any]] = {"npy": formats.load_npy, "bytes": formats.load_whole,
                                            "json": formats.load_json, "text": formats.load_text}
    load = loads.get(str(file_format))
    if load is None:
        raise NodeError(what=f"the result is a file of the unknown format {file_format!r}; it is {uri}")
    return load(uri, channel=channel)
