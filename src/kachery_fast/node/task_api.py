"""The part of the node's local API for asking for tasks.

    POST /api/task/request  {"function", "kwargs", "kind", "channel": str|null, "id": str|null, "waitMsec", "waitFor"}
                            -> STATE, once it has ended ("waitFor": "end"), or somebody has to run it ("look"), or the
                               time is over
    POST /api/task/wait     {"request", "seen": revision, "waitMsec"}  -> STATE, once it is beyond that revision, has
                                                                          ended, or the time is over
    POST /api/task/cancel   {"request"}                                -> STATE
    POST /api/task/list     {}                                         -> {"tasks": [STATE]}, without results

STATE is ``{"request", "task", "function", "kind", "channel", "asked": ms, "status", "progress", "text", "cached",
"result": {"json": value} | {"file": URI, "format"} | null, "resultTime": ms|null, "node", "nodeLabel", "error":
error|null, "revision"}``; ``status`` is ``waiting``, ``queued``, ``running``, ``finished``, ``error``, ``unknown`` or
``cancelled``.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from aiohttp import web

from ..errors import TaskUnknown
from ..protocol.access import Permission
from .api_parts import Nothing, answer_with, permitted_link, read_body
from .link import ChannelLink

if TYPE_CHECKING:
    from .node import Node

__all__ = ["TaskApi", "has_provider"]

_WaitMsec = Annotated[float, msgspec.Meta(ge=0, le=24 * 3600 * 1000)]


class _Ask(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    function: str
    kwargs: dict[str, Any] = {}
    kind: str = "pure-calculation"
    channel: str | None = None
    id: str | None = None
    wait_msec: _WaitMsec = 0
    wait_for: Literal["end", "look"] = "end"


class _Wait(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    request: str
    seen: int = 0
    wait_msec: _WaitMsec = 0


class _Cancel(msgspec.Struct, forbid_unknown_fields=True):
    request: str


class TaskApi:
    """The routes for one ``Node``."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def routes(self) -> list[web.RouteDef]:
        """Return what is to be served."""
        return [web.post("/api/task/request", self._request), web.post("/api/task/wait", self._wait),
                web.post("/api/task/cancel", self._cancel), web.post("/api/task/list", self._list)]

    async def _request(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Ask)
        link = await permitted_link(self._node, f"The result of {asked.function[:100]!r}", asked.channel,
                                    Permission.REQUEST_TASKS, suffices=has_provider)
        tasks = self._node.task_requests
        name = tasks.request(link, asked.function, asked.kwargs, asked.kind, asked.id)
        try:
            return answer_with(await tasks.wait_to_end(name, asked.wait_msec / 1000, look=asked.wait_for == "look"))
        except asyncio.CancelledError:
            with contextlib.suppress(TaskUnknown):
                tasks.cancel(name)  # who asked has gone, and never learns the name of the request
            raise

    async def _wait(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Wait)
        return answer_with(await self._node.task_requests.wait(asked.request, asked.seen, asked.wait_msec / 1000))

    async def _cancel(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Cancel)
        return answer_with(self._node.task_requests.cancel(asked.request))

    async def _list(self, request: web.Request) -> web.Response:
        await read_body(request, Nothing)
        return answer_with({"tasks": self._node.task_requests.list()})


def has_provider(link: ChannelLink) -> bool:
    """Whether somebody on a channel, as it is known here, may run tasks."""
    return link.may(Permission.PROVIDE_TASKS) or bool(link.providers(Permission.PROVIDE_TASKS))
