"""The local API of 2022 (WIRE-2022.md, part B), so that scripts written for kachery-client 1.2 go on working.

It stands beside the API of our own client (``/api/…``) on the same port and behind the same border. ``/probe`` is
served by ``api``, for both.
"""

from __future__ import annotations

import asyncio
import html
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .deposits import DEPOSIT_PREFIX
from .legacy_backends import LegacyBackends
from .legacy_feeds import LegacyFeeds
from .legacy_files import LegacyFiles
from .legacy_parts import answer_success
from .legacy_tasks import RESULT_PREFIX, LegacyTasks

if TYPE_CHECKING:
    from .node import Node

__all__ = ["POST_PROBE", "LegacyApi"]

# In the place of a path: that one as 2022 knew it, which wants a code. Clients of today get the same path without.
POST_PROBE = "POST /probe"

_HALT_SECONDS = 0.05


class LegacyApi:
    """The routes for one ``Node``; ``close`` when it stops."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._backends = LegacyBackends(node)
        self._files = LegacyFiles(node)
        tasks = LegacyTasks(node)
        self._closed = [web.get("/halt", self._halt), web.get("/stats", self._stats),
                        *self._files.routes(), *LegacyFeeds(node).routes(), *self._backends.routes(),
                        *tasks.routes()]
        self._paths = frozenset((POST_PROBE, *(route.path for route in self._closed)))
        self._open = [web.put(DEPOSIT_PREFIX + "{name}", node.deposits.put), *tasks.open_routes()]

    def routes(self) -> list[web.RouteDef]:
        """Return what is to be served."""
        return [*self._closed, *self._open]

    def speaks(self, path: str) -> bool:
        """Whether errors at this path are told as in 2022, as plain text."""
        return path in self._paths or self.is_open(path)

    def is_open(self, path: str) -> bool:
        """Whether a path is served without a client code, since who knows it was told it by this node."""
        return path.startswith((DEPOSIT_PREFIX, RESULT_PREFIX))

    async def close(self) -> None:
        """Let go of what polls, and of what reads files."""
        await self._backends.close()
        await asyncio.to_thread(self._files.close)

    async def _halt(self, request: web.Request) -> web.Response:
        asyncio.get_running_loop().call_later(_HALT_SECONDS, self._node.stopped.set)
        return answer_success()

    async def _stats(self, request: web.Request) -> web.Response:
        traffic = self._node.describe()["traffic"]
        stats: dict[str, Any] = {
            "nodeId": self._node.identity.node_id, "totalBytesSent": traffic["uploaded_bytes"],
            "totalBytesReceived": traffic["downloaded_bytes"], "totalMessagesSent": 0}
        if request.query.get("format") == "html":
            rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
                           for name, value in stats.items())
            return web.Response(text=f"<!DOCTYPE html><title>Node</title><table>{rows}</table>",
                                content_type="text/html")
        return answer_success(format="json", stats=stats)
