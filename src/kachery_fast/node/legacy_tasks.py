"""The local API of 2022 for asking for tasks.

    POST /task/requestTask        {"channelName", "taskFunctionId", "taskKwargs", "taskFunctionType", "timeoutMsec"}
                                  -> {"success", "taskId", "status", "taskResultUrl", "errorMessage"}
    POST /task/waitForTaskResult  {"channelName", "taskId", "taskResultUrl", "taskFunctionType", "timeoutMsec"}
                                  -> {"success", "status", "errorMessage"}
    GET  /task-result/NAME        the result as JSON: what ``taskResultUrl`` leads to. A result in a bucket is signed,
                                  and a client of 2022 would take all of it for the result. The name is a secret.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from aiohttp import web

from ..errors import InvalidArgument, TaskUnknown
from ..protocol.access import Permission
from ..protocol.names import parse_file_uri
from .api_parts import permitted_link
from .legacy_parts import answer_success, read_legacy_body, tell_in_text, wait_seconds_of
from .link import ChannelLink
from .receiving import send_stored
from .task_api import has_provider

if TYPE_CHECKING:
    from .node import Node

__all__ = ["RESULT_PREFIX", "LegacyTasks"]

RESULT_PREFIX = "/task-result/"
_ASKED_MAX = 10_000

_Msec = Annotated[float, msgspec.Meta(ge=0)]


class _Request(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    channel_name: str
    task_function_id: str
    task_kwargs: dict[str, Any]
    task_function_type: str
    timeout_msec: _Msec
    backend_id: str | None = None


class _Wait(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    channel_name: str
    task_id: str
    task_function_type: str
    timeout_msec: _Msec
    task_result_url: str | None = None  # which is null for an action; in 2022 that was refused


class LegacyTasks:
    """The routes for one ``Node``."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._asked: OrderedDict[tuple[str, str], str] = OrderedDict()

    def routes(self) -> list[web.RouteDef]:
        """Return what is to be served."""
        return [web.post("/task/requestTask", self._request), web.post("/task/waitForTaskResult", self._wait)]

    def open_routes(self) -> list[web.RouteDef]:
        """Return what is served without a client code."""
        return [web.get(RESULT_PREFIX + "{name}", self._result)]

    async def _request(self, request: web.Request) -> web.Response:
        asked = await read_legacy_body(request, _Request, self._node.settings.api_body_size_bytes_max)
        if asked.backend_id is not None:
            raise InvalidArgument(what="A task cannot be asked of one backend (backendId): every backend of a channel "
                                       "that offers the function may run it. Give the function an id of its own")
        link = await permitted_link(self._node, f"The result of {asked.task_function_id[:100]!r}", asked.channel_name,
                                    Permission.REQUEST_TASKS, suffices=has_provider)
        tasks = self._node.task_requests
        name = tasks.request(link, asked.task_function_id, asked.task_kwargs, asked.task_function_type)
        state = await tasks.wait_to_end(name, wait_seconds_of(asked.timeout_msec))
        self._asked[asked.channel_name, state["task"]] = name
        self._asked.move_to_end((asked.channel_name, state["task"]))
        while len(self._asked) > _ASKED_MAX:
            self._asked.popitem(last=False)
        url = {} if state["kind"] == "action" else {
            "taskResultUrl": f"http://{request.headers['Host']}{RESULT_PREFIX}{name}"}
        return answer_success(taskId=state["task"], **_status(state), **url)

    async def _wait(self, request: web.Request) -> web.Response:
        asked = await read_legacy_body(request, _Wait, self._node.settings.api_body_size_bytes_max)
        name = self._asked.get((asked.channel_name, asked.task_id))
        if name is None:
            raise TaskUnknown(task=asked.task_id[:100])
        seconds = wait_seconds_of(asked.timeout_msec)
        return answer_success(**_status(await self._node.task_requests.wait_to_end(name, seconds)))

    async def _result(self, request: web.Request) -> web.StreamResponse:
        state = await self._node.task_requests.wait(request.match_info["name"], -1, 0.0)
        result = state["result"]
        if result is None:
            return tell_in_text(f"The task is {state['status']}, and has no result.", 404)
        if "json" in result:
            return web.json_response(result["json"])
        if result["format"] != "json":
            # An array or bytes, which a client of 2022 loads by its URI.
            return web.json_response(result["file"])
        return await self._send_file(request, result["file"], state["channel"])

    async def _send_file(self, request: web.Request, text: str, channel: str) -> web.StreamResponse:
        uri = parse_file_uri(text)
        link = await permitted_link(self._node, uri, channel, Permission.REQUEST_FILES, suffices=ChannelLink.providers)
        located = await self._node.transfers.load(uri, link)
        return await send_stored(self._node, request, uri.sha1, 0, located.size, "application/json")


def _status(state: dict[str, Any]) -> dict[str, Any]:
    """Return status and error as 2022 knew them: what is over without a result is an error."""
    status = state["status"]
    if status not in ("unknown", "cancelled", "error"):
        return {"status": status}
    message = f"The task was {status}." if state["error"] is None else state["error"]["message"]
    return {"status": "error", "errorMessage": message}
