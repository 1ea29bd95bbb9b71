"""The part of the node's local API that task backends use.

``POST /api/backend {"channels": [names] | null, "functions": [{"id", "kind", "timeoutSeconds", "idempotent"}], "name",
"workers"}`` registers a backend for as long as the connection lasts. The answer is a stream of JSON lines::

    {"type": "registered", "backend": ID, "channels": [names]}
    {"type": "run", "run": ID, "task", "function", "kind", "kwargs", "channel"}     call the function
    {"type": "cancel", "run": ID}          nobody needs it any more; report how it ends all the same
    {"type": "alive"}                      each 5 s

``POST /api/backend/report {"backend", "run", "status", "progress", "text", "error": {"type", "message", "traceback"},
"result": {"json": value} | {"file": URI, "format"}}``: how a run stands, or ended. ``status`` is ``running``,
``finished``, ``error``, ``hung``, ``crashed``, or ``cancelled`` (it never began, or was broken off; how an action ended
that is not idempotent nobody knows then). Functions are held to their ``timeoutSeconds`` by the backend itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from aiohttp import web

from ..errors import InvalidArgument
from ..protocol.access import Permission
from ..protocol.task_events import FunctionInfo, Report
from ..protocol.tasks import check_function, check_kind, check_result_value
from .api_parts import permitted_link, read_body, write_line
from .task_providing import place_of

if TYPE_CHECKING:
    from .node import Node

__all__ = ["BackendApi"]

_FUNCTIONS_MAX = 10_000
_WORKERS_MAX = 10_000


class _Function(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    id: str
    kind: str
    timeout_seconds: float | None = None
    idempotent: bool = False


class _Register(msgspec.Struct, forbid_unknown_fields=True):
    functions: Annotated[list[_Function], msgspec.Meta(max_length=_FUNCTIONS_MAX)]
    channels: list[str] | None = None
    name: str = ""
    workers: Annotated[int, msgspec.Meta(ge=1, le=_WORKERS_MAX)] = 1


class _Error(msgspec.Struct):
    type: str = ""
    message: str = ""
    traceback: str = ""


class _Report(msgspec.Struct, forbid_unknown_fields=True):
    backend: str
    run: str
    status: Literal["running", "finished", "error", "hung", "crashed", "cancelled"]
    progress: float | None = None
    text: str = ""
    error: _Error | None = None
    result: dict[str, Any] | None = None


class BackendApi:
    """The routes for one ``Node``."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def routes(self) -> list[web.RouteDef]:
        """Return what is to be served."""
        return [web.post("/api/backend", self._register), web.post("/api/backend/report", self._report)]

    async def _register(self, request: web.Request) -> web.StreamResponse:
        asked = await read_body(request, _Register)
        functions = _functions(asked.functions)
        links = None if asked.channels is None else [
            await permitted_link(self._node, f"the channel {name}", name, Permission.PROVIDE_TASKS)
            for name in asked.channels]
        served = [link for link in self._node.links() if link.may(Permission.PROVIDE_TASKS)] if links is None else links
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        backend = self._node.task_backends.register(
            asked.name, functions, asked.workers, None if links is None else {place_of(link) for link in links})
        try:
            await write_line(response, {"type": "registered", "backend": backend.info.id,
                                        "channels": [link.name for link in served]})
            while True:
                await write_line(response, await backend.next_line())
        finally:
            backend.close()

    async def _report(self, request: web.Request) -> web.Response:
        told = await read_body(request, _Report)
        error = None if told.error is None else msgspec.to_builtins(told.error)
        if told.result is not None:
            check_result_value(told.result)
        self._node.task_backends.report(told.backend, Report(
            told.run, told.status, told.progress, told.text, error, told.result))
        return web.json_response({})


def _functions(asked: list[_Function]) -> list[FunctionInfo]:
    found: dict[str, FunctionInfo] = {}
    for function in asked:
        if function.id in found:
            raise InvalidArgument(what=f"the function {function.id!r} is registered twice")
        found[check_function(function.id)] = FunctionInfo(function.id, check_kind(function.kind), function.idempotent)
    return list(found.values())
