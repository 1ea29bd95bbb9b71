"""Task backends of 2022, which poll for what they are to run.

    POST /task/registerTaskFunctions  {"taskFunctions": [{"channelName", "taskFunctionId", "taskFunctionType"}],
                                       "backendId", "timeoutMsec"}  -> {"success", "requestedTasks": [TASK]}
    POST /task/updateTaskStatus       {"channelName", "taskId", "status", "errorMessage"}  -> {"success"}
    POST /task/createSignedTaskResultUploadUrl  {"channelName", "taskId", "size"}  -> {"success", "signedUrl"}

A backend of this node is one that stays connected (``backend_api``). One of 2022 comes back again and again with the
same functions, so it is taken for connected from its first poll until it has not polled for a while.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from aiohttp import web

from ..errors import InvalidArgument, TaskUnknown
from ..protocol.access import Permission
from ..protocol.names import FileUri
from ..protocol.task_events import FunctionInfo, Report
from ..protocol.tasks import check_function, check_kind, check_result_value
from .api_parts import permitted_link
from .ending import begin_task, end_tasks
from .legacy_parts import answer_success, read_legacy_body, wait_seconds_of
from .task_backends import Backend
from .task_providing import place_of
from .threads import in_thread

if TYPE_CHECKING:
    from .node import Node

__all__ = ["LegacyBackends"]

log = logging.getLogger("kachery_fast.node")

_BODY_SIZE_BYTES_MAX = 4 * 1024 * 1024
# A client polls anew at once, and 10 s after an error (kachery-client 1.2, _register_task_functions).
_GONE_SECONDS = 12.0
# A backend never breaks off a poll of its own, so one that did has died. But its runs may be those of another process
# with the same functions, which shows itself by its next poll.
_BROKEN_SECONDS = 2.0
# A backend of 2022 puts what it is given into a queue of its own.
_WORKERS = 100
_FUNCTIONS_MAX = 10_000
_RESULT_SIZE_BYTES_MAX = 64 * 1024 * 1024

_Msec = Annotated[float, msgspec.Meta(ge=0)]


class _Function(msgspec.Struct, forbid_unknown_fields=True, rename="camel", frozen=True):
    channel_name: str
    task_function_id: str
    task_function_type: str


class _Register(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    task_functions: Annotated[list[_Function], msgspec.Meta(max_length=_FUNCTIONS_MAX)]
    timeout_msec: _Msec
    backend_id: str | None = None


class _Update(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    channel_name: str
    task_id: str
    status: Literal["waiting", "pending", "queued", "running", "finished", "error"]
    error_message: str | None = None


class _SignResult(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    channel_name: str
    task_id: str
    size: Annotated[int, msgspec.Meta(ge=0, le=2**53)]


@dataclass(eq=False)
class _Run:
    """One call of a function. ``task_hash``: what the backend names its result by."""

    backend: Backend
    name: str
    channel: str
    kind: str
    task_hash: str
    description: dict[str, Any]
    result: dict[str, Any] | None = None


@dataclass(eq=False)
class _Poller:
    """One backend of 2022: a backend of this node for each channel, and what waits to be fetched."""

    backends: list[Backend] = field(default_factory=list)
    waiting: deque[_Run] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pumps: set[asyncio.Task[None]] = field(default_factory=set)
    polls: int = 0
    alarm: asyncio.TimerHandle | None = None


class LegacyBackends:
    """The routes for one ``Node``; ``close`` when it stops."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._pollers: dict[tuple[Any, ...], _Poller] = {}
        self._runs: dict[str, _Run] = {}

    def routes(self) -> list[web.RouteDef]:
        """Return what is to be served."""
        return [web.post("/task/registerTaskFunctions", self._register),
                web.post("/task/updateTaskStatus", self._update),
                web.post("/task/createSignedTaskResultUploadUrl", self._sign_result)]

    async def close(self) -> None:
        """Let every backend go."""
        pumps = [pump for poller in self._pollers.values() for pump in poller.pumps]
        for key in list(self._pollers):
            self._end(key)
        await end_tasks(pumps)

    # --- polling

    async def _register(self, request: web.Request) -> web.StreamResponse:
        asked = await read_legacy_body(request, _Register, _BODY_SIZE_BYTES_MAX)
        key = (asked.backend_id, *sorted(set(asked.task_functions), key=msgspec.structs.astuple))
        poller = self._pollers.get(key)
        if poller is None:
            poller = await self._begin(key, asked)
        poller.polls += 1
        if poller.alarm is not None:
            poller.alarm.cancel()
        gone_seconds = _BROKEN_SECONDS
        try:
            if not poller.waiting:
                poller.news.clear()
                news = asyncio.ensure_future(poller.news.wait())
                try:
                    await asyncio.wait([news], timeout=wait_seconds_of(asked.timeout_msec))
                finally:
                    news.cancel()
            response = await self._hand_over(request, poller)
            gone_seconds = _GONE_SECONDS
            return response
        finally:
            poller.polls -= 1
            if not poller.polls and self._pollers.get(key) is poller:
                poller.alarm = asyncio.get_running_loop().call_later(gone_seconds, self._end, key)

    async def _hand_over(self, request: web.Request, poller: _Poller) -> web.StreamResponse:
        runs = list(poller.waiting)
        poller.waiting.clear()
        response = answer_success(requestedTasks=[run.description for run in runs])
        try:
            await response.prepare(request)
            await response.write_eof()  # here, so that a connection that has ended is noticed
        except BaseException:  # the next poll, or another that waits already, is given them
            poller.waiting.extendleft(run for run in reversed(runs) if self._runs.get(run.name) is run)
            poller.news.set()
            raise
        return response

    async def _begin(self, key: tuple[Any, ...], asked: _Register) -> _Poller:
        by_channel: dict[str, dict[str, FunctionInfo]] = {}
        for function in asked.task_functions:
            by_channel.setdefault(function.channel_name, {})[check_function(function.task_function_id)] = FunctionInfo(
                function.task_function_id, check_kind(function.task_function_type), False)
        places = {channel: place_of(await permitted_link(self._node, f"the channel {channel}", channel,
                                                         Permission.PROVIDE_TASKS)) for channel in by_channel}
        poller = self._pollers.get(key)
        if poller is not None:  # another poll of the same functions was quicker
            return poller
        poller = self._pollers[key] = _Poller()
        for channel, functions in by_channel.items():
            backend = self._node.task_backends.register(asked.backend_id or "a backend of 2022",
                                                        list(functions.values()), _WORKERS, {places[channel]})
            poller.backends.append(backend)
            begin_task(self._pump(poller, backend), poller.pumps)
        return poller

    async def _pump(self, poller: _Poller, backend: Backend) -> None:
        while True:
            line = await backend.next_line()
            if line["type"] == "run":
                poller.waiting.append(self._keep(backend, line))
                poller.news.set()
            elif line["type"] == "cancel":
                run = self._runs.get(line["run"])
                if run is not None and run in poller.waiting:  # one that was fetched cannot be called back
                    poller.waiting.remove(run)
                    self._report(run, "cancelled")

    def _keep(self, backend: Backend, line: dict[str, Any]) -> _Run:
        name, kind, task = line["run"], line["kind"], line["task"]
        # The result of a query would have the name of another's with the same arguments.
        own_hash = hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
        task_hash = task if kind == "pure-calculation" else own_hash
        run = self._runs[name] = _Run(backend, name, line["channel"], kind, task_hash, {
            "channelName": line["channel"], "backendId": None, "taskId": name, "taskHash": task_hash,
            "taskFunctionId": line["function"], "kwargs": line["kwargs"], "taskFunctionType": kind})
        return run

    def _end(self, key: tuple[Any, ...]) -> None:
        poller = self._pollers.pop(key)
        if poller.alarm is not None:
            poller.alarm.cancel()
        for pump in poller.pumps:
            pump.cancel()
        for backend in poller.backends:
            backend.close()
        for name in [name for name, run in self._runs.items() if run.backend in poller.backends]:
            del self._runs[name]

    # --- what a backend tells

    async def _update(self, request: web.Request) -> web.Response:
        told = await read_legacy_body(request, _Update, _BODY_SIZE_BYTES_MAX)
        run = self._runs.get(told.task_id)
        if run is None or run.channel != told.channel_name:
            raise TaskUnknown(task=told.task_id[:100])
        if told.status == "error":
            self._report(run, "error", error={"type": "Exception", "message": told.error_message or "no reason given",
                                              "traceback": ""})
        elif told.status == "finished":
            if run.kind == "action":
                run.result = {"json": None}
            if run.result is None:
                raise InvalidArgument(what="A task that has finished needs its result, which was not uploaded")
            self._report(run, "finished", result=run.result)
        else:
            self._node.task_backends.report(run.backend.info.id, Report(run.name, "running", None, "", None, None))
        return answer_success()

    def _report(self, run: _Run, status: Literal["finished", "error", "cancelled"], *,
                error: dict[str, Any] | None = None, result: dict[str, Any] | None = None) -> None:
        self._runs.pop(run.name, None)
        self._node.task_backends.report(run.backend.info.id, Report(run.name, status, None, "", error, result))

    async def _sign_result(self, request: web.Request) -> web.Response:
        asked = await read_legacy_body(request, _SignResult, _BODY_SIZE_BYTES_MAX)
        run = next((run for run in self._runs.values()
                    if (run.channel, run.task_hash) == (asked.channel_name, asked.task_id)), None)
        if run is None:
            raise TaskUnknown(task=asked.task_id[:100])

        async def take(data: bytes) -> None:
            run.result = await self._encode(data)

        url = self._node.deposits.expect(request, asked.size, _RESULT_SIZE_BYTES_MAX, take)
        return answer_success(signedUrl=url)

    async def _encode(self, data: bytes) -> dict[str, Any]:
        """Return a result as this network knows it: short ones as they are, long ones as a file.

        :raises InvalidArgument: it is not JSON.
        """
        threads = self._node.api_threads
        if len(data) <= self._node.settings.task_result_size_bytes_max:
            return await in_thread(threads, _short_result, data)
        await in_thread(threads, _check_long_result, data)
        stored = await in_thread(threads, self._node.store.put_bytes, data)
        return {"file": str(FileUri(stored.sha1, "result.json", stored.manifest_sha1)), "format": "json"}


def _short_result(data: bytes) -> dict[str, Any]:
    try:
        return check_result_value({"json": json.loads(data)})
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(what=f"A result is JSON, and this is not ({error})") from None


def _check_long_result(data: bytes) -> None:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)  # which skips over it
    except msgspec.MsgspecError as error:
        raise InvalidArgument(what=f"A result is JSON, and this is not ({error})") from None
