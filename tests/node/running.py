"""Whole nodes on the loop of the test, beside a real hub, and a client that sends what it is told."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from kachery_fast.config import Settings
from kachery_fast.net.hub import HubClient
from kachery_fast.node.identity import load_identity
from kachery_fast.node.node import Node
from tests.hub.support import CHANNEL, World
from tests.node.support import ALL, settings_for, until


def node_settings(storage_dir: Path, **overrides: Any) -> Settings:
    return settings_for(storage_dir, **{"node_port": 0, "channel": CHANNEL, "retry_attempts_max": 2,
                                        "retry_cap_seconds": 0.5, **overrides})


async def enroll(world: World, settings: Settings, permissions: list[str] | None = None) -> None:
    """Make a node a member of the channel, as ``kachery-fast node join`` does."""
    name = settings.storage_dir.name
    async with HubClient(world.url, load_identity(settings.storage_dir).key, settings) as hub:
        await hub.join(await world.invite(permissions), name, ALL)
    (settings.storage_dir / "kachery-fast.json").write_text(json.dumps({"label": name, "hubs": [{"url": world.url}]}))


class Client:
    """A client of a node's API."""

    def __init__(self, node: Node, session: aiohttp.ClientSession) -> None:
        self.node = node
        self.session = session
        self.url = f"http://127.0.0.1:{node.port}"

    def headers(self, **headers: str) -> dict[str, str]:
        return {"KACHERY-CLIENT-AUTH-CODE": self.node.client_auth.path.read_text(), **headers}

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Send JSON, or bytes as they stand; return the status and the decoded answer."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        # aiohttp warns of sending long bytes as they are.
        sent = io.BytesIO(data) if len(data) > 2**20 else data
        async with self.session.request(method, self.url + path, data=sent, headers=self.headers(**headers)) as answer:
            content = await answer.read()
            assert answer.content_type in ("application/json", "application/x-ndjson"), content
            if answer.content_type == "application/json":
                return answer.status, json.loads(content)
            return answer.status, [json.loads(line) for line in content.splitlines()]

    async def load(self, uri: str) -> dict[str, Any]:
        """Load a file; return the last line."""
        _, lines = await self.ask("POST", "/api/load", {"uri": uri})
        last: dict[str, Any] = lines[-1]
        return last

    async def read(self, uri: str, start: int = 0, end: int | None = None) -> bytes:
        body = {"uri": uri, "start": start, "end": end}
        async with self.session.post(f"{self.url}/api/read", json=body, headers=self.headers()) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.read()


@asynccontextmanager
async def running_node(settings: Settings, *, connected: bool = True) -> AsyncIterator[Client]:
    """Start a node; with ``connected``, wait until it is on every channel of its hubs."""
    node = Node(settings)
    try:
        await node.start()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            if connected:
                await until(lambda: node.links() and all(link.connected for link in node.links()))
            yield Client(node, session)
    finally:
        await node.stop()
