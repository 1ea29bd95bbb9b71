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

from ..errors import ChannelUnknown, HubUnreachable, NotPermitted, TaskUnknown
from ..protocol.access import Permission
from .api_parts import read_body
from .link import ChannelLink

if TYPE_CHECKING:
    from .node import Node

__all__ = ["TaskApi"]

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


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


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
        link = await self._requesting_link(asked.function, asked.channel)
        tasks = self._node.task_requests
        name = tasks.request(link, asked.function, asked.kwargs, asked.kind, asked.id)
        try:
            return _json(await tasks.wait_to_end(name, asked.wait_msec / 1000, look=asked.wait_for == "look"))
        except asyncio.CancelledError:
            with contextlib.suppress(TaskUnknown):
                tasks.cancel(name)  # who asked has gone, and never learns the name of the request
            raise

    async def _wait(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Wait)
        return _json(await self._node.task_requests.wait(asked.request, asked.seen, asked.wait_msec / 1000))

    async def _cancel(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Cancel)
        return _json(self._node.task_requests.cancel(asked.request))

    async def _list(self, request: web.Request) -> web.Response:
        await read_body(request, _Nothing)
        return _json({"tasks": self._node.task_requests.list()})

    async def _requesting_link(self, function: str, channel: str | None) -> ChannelLink:
        """Return the channel to ask on; who joined it, or was granted something, a moment ago is not overlooked."""
        what = f"The result of {function[:100]!r}"
        with contextlib.suppress(ChannelUnknown, HubUnreachable):
            link = self._node.link_for(what, channel)
            if link.may(Permission.REQUEST_TASKS) and (link.may(Permission.PROVIDE_TASKS)
                                                       or link.providers(Permission.PROVIDE_TASKS)):
                return link
        await self._node.look_again()
        link = self._node.link_for(what, channel)
        if not link.may(Permission.REQUEST_TASKS):
            raise NotPermitted(who="This node", action="request tasks", channel=link.name,
                               why="the permission requestTasks is not in force; the channel's owner grants it with: "
                                   f"kachery-fast channel grant {link.name} {self._node.identity.node_id} requestTasks")
        return link


def _json(answer: dict[str, Any]) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")
