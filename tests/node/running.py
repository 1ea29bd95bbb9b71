"""Whole nodes on the loop of the test, beside a real hub, and a client that sends what it is told."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from kachery_fast.config import Settings
from kachery_fast.net.hub import HubClient
from kachery_fast.node.identity import load_identity
from kachery_fast.node.node import Node
from tests.hub.support import CHANNEL, World, running_world
from tests.network import run_on
from tests.node.support import ALL, nothing_left, settings_for, until

A_AND_B: Mapping[str, list[str] | None] = {"a": None, "b": None}


def node_settings(storage_dir: Path, **overrides: Any) -> Settings:
    return settings_for(storage_dir, **{"node_port": 0, "channel": CHANNEL, "retry_attempts_max": 2,
                                        "retry_cap_seconds": 0.5, **overrides})


async def enroll(world: World, settings: Settings, permissions: list[str] | None = None) -> None:
    """Make a node a member of the channel, as ``kachery-fast node join`` does."""
    name = settings.storage_dir.name
    async with HubClient(world.url, load_identity(settings.storage_dir).key, settings) as hub:
        await hub.join(await world.invite(permissions), name, ALL)
    (settings.storage_dir / "kachery-fast.json").write_text(json.dumps({"label": name, "hubs": [{"url": world.url}]}))


async def enrolled(world: World, root: Path, nodes: Mapping[str, list[str] | None], **settings: Any) -> list[Settings]:
    """Make nodes members of the channel; return their settings. ``nodes``: their permissions, None for all."""
    found = [node_settings(root / name, **settings) for name in nodes]
    for of_node, permissions in zip(found, nodes.values(), strict=True):
        await enroll(world, of_node, permissions)
    return found


class Client:
    """A client of a node's API. ``end`` ends the node before its block does."""

    def __init__(self, node: Node, session: aiohttp.ClientSession, end: Callable[[], Awaitable[None]]) -> None:
        self.node = node
        self.session = session
        self.end = end
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
    async with AsyncExitStack() as life:
        life.push_async_callback(node.stop)
        await node.start()
        session = await life.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)))
        if connected:
            await until(lambda: node.links() and all(link.connected for link in node.links()))
        yield Client(node, session, life.aclose)


def alone(loop_kind: str, root: Path, work: Callable[[Client], Awaitable[None]], **settings: Any) -> None:
    """Run ``work`` with a node that has no hub."""
    async def run() -> None:
        of_node = node_settings(root / "n", **{"channel": "", **settings})
        async with running_node(of_node, connected=False) as client:
            await work(client)
    with nothing_left(root):
        run_on(loop_kind, run(), 60)


def together(loop_kind: str, root: Path, work: Callable[..., Awaitable[None]],
             nodes: Mapping[str, list[str] | None] = A_AND_B, **settings: Any) -> None:
    """Run ``work(world, *clients)`` with a hub and nodes on its channel. ``nodes``: their permissions, None for all."""
    async def run() -> None:
        async with AsyncExitStack() as stack:
            world = await stack.enter_async_context(running_world(root))
            clients: list[Client] = []
            for name, permissions in nodes.items():
                (of_node,) = await enrolled(world, root, {name: permissions}, **settings)
                clients.append(await stack.enter_async_context(running_node(of_node)))
            for client in clients[:-1]:  # which do not know of those that came after them
                await client.ask("POST", "/api/reload", {})
            await work(world, *clients)
    with nothing_left(root):
        run_on(loop_kind, run(), 100)
