"""A real hub on a port of the system's choice, and the people around it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.engine import Connection

from kachery_fast.config import Settings, load_settings
from kachery_fast.hub import identity
from kachery_fast.hub.app import EXPIRY_SECONDS, Hub
from kachery_fast.hub.registry import Registry, registry_url
from kachery_fast.net.hub import HubClient, OwnerClient
from kachery_fast.protocol.access import Permission
from kachery_fast.protocol.signing import private_key, public_id

from ..store_server import StoreServer

OWNER = "owner@lab.org"
CHANNEL = "lab"
ALL = [permission.value for permission in Permission]
# Of a test of a channel.
STEPS = ["look for an object that is not there", "upload an object", "find that it is there already", "read it",
         "list it", "remove it", "echo a message"]


class Clock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def node_key(name: str) -> Ed25519PrivateKey:
    """The same key for the same name, in every test."""
    return private_key(hashlib.sha256(name.encode()).digest())


def node_id(name: str) -> str:
    return public_id(node_key(name))


def hub_settings(tmp_path: Path, **overrides: Any) -> Settings:
    """Settings of a hub below ``tmp_path``; its registry is where the fixture ``database`` says."""
    return load_settings({}, **{
        "hub_dir": tmp_path / "hub", "hub_port": 0, "hub_database": os.environ.get("KACHERY_HUB_DATABASE", ""),
        "retry_attempts_max": 1, "retry_base_seconds": 0.01, **overrides})


class World:
    """A running hub, its owner, and nodes by name."""

    def __init__(self, hub: Hub, settings: Settings, clock: Clock, session: aiohttp.ClientSession) -> None:
        self.hub = hub
        self.settings = settings
        self.clock = clock
        self.session = session
        self.url = hub.local_url
        self.token = (settings.hub_dir / "owner-token").read_text().strip()
        self.owner = OwnerClient(self.url, self.token, settings, session=session)

    def registry(self) -> Registry:
        """The hub's registry from beside it, not opened yet."""
        return Registry(registry_url(self.settings.hub_database, self.settings.hub_dir))

    async def person(self, owner: str, *, admin: bool = False) -> OwnerClient:
        """Return another person with an account, written into the registry from beside."""
        registry = self.registry()

        def add(connection: Connection) -> str:
            identity.ensure_owner(connection, owner, 1, admin=admin)
            return identity.issue_owner_token(connection, owner, 1)

        await registry.open()
        token = await registry.call(add)
        await registry.close()
        return OwnerClient(self.url, token, self.settings, session=self.session)

    async def approved(self, name: str, person: OwnerClient) -> HubClient:
        """Return a node that ``person`` has taken for his."""
        client = self.node(name)
        asked = await client.ask_approval(name, "1.0")
        await person.call("approveNode", code=asked.code)
        return client

    def node(self, name: str, **options: Any) -> HubClient:
        options = {"session": self.session, "clock": self.clock, **options}
        return HubClient(self.url, node_key(name), self.settings, **options)

    async def invite(self, granted: list[str] | None = None, **fields: Any) -> str:
        """Return the code of a fresh invitation."""
        permissions = ALL if granted is None else granted
        answer = await self.owner.call("invite", **{"channel": CHANNEL, "permissions": permissions, **fields})
        return str(answer["code"])

    async def member(
        self, name: str, granted: list[str] | None = None, requested: list[str] | None = None
    ) -> HubClient:
        """Return a node that has joined the channel."""
        client = self.node(name)
        await client.join(await self.invite(granted), name, ALL if requested is None else requested)
        return client

    async def post(self, path: str, data: bytes, **headers: str) -> tuple[int, Any]:
        """POST bytes as they stand; return status and decoded answer."""
        async with self.session.post(self.url + path, data=data, headers=headers) as response:
            return response.status, json.loads(await response.read())

    async def ask(self, data: bytes, token: str | None = None) -> tuple[int, Any]:
        """POST to the owner API."""
        return await self.post("/api/owner", data, Authorization=f"Bearer {self.token if token is None else token}")

    async def upload(self, client: HubClient, content: bytes, sha1: str | None = None) -> int:
        """Upload bytes under their own name, or a wrong one; return the bucket's status."""
        sha1 = sha1 or hashlib.sha1(content).hexdigest()
        (signed,) = await client.sign_uploads(CHANNEL, [(sha1, len(content))])
        async with self.session.put(signed.url, data=io.BytesIO(content), headers=signed.headers) as response:
            return response.status

    async def download(self, sha1: str) -> bytes | None:
        """Return an object of the channel, None when the bucket has none."""
        path = f"/bucket/{CHANNEL}/sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as response:
            return await response.read() if response.status == 200 else None


class Peer:
    """A bare client of the broker, speaking its protocol in JSON."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse[Any]) -> None:
        self._websocket = websocket
        self.received: list[str] = []

    @classmethod
    async def connect(cls, world: World, token: str) -> Peer:
        url = world.url.replace("http", "ws", 1) + f"/?access_token={token}&v=5"
        peer = cls(await world.session.ws_connect(url))
        first = await peer._until(4)
        assert first["action"] == 4, first
        return peer

    async def attach(self, band: str) -> bool:
        await self._websocket.send_json({"action": 10, "channel": band})
        return bool((await self._until(11, 9))["action"] == 11)

    async def publish(self, band: str, serial: int) -> bool:
        """Whether the broker took the message."""
        message = {"name": "m", "data": band}
        await self._websocket.send_json(
            {"action": 15, "channel": band, "msgSerial": serial, "messages": [message]})
        return bool((await self._until(1, 2))["action"] == 1)

    async def ping(self) -> None:
        """Wait until everything that the broker sent before now was received."""
        await self._websocket.send_json({"action": 0, "id": "ping"})
        while (await self._until(0)).get("id") != "ping":
            pass

    async def closed_by_broker(self) -> dict[str, Any]:
        return await self._until(6, 9)

    async def close(self) -> None:
        await self._websocket.close()

    async def _until(self, *actions: int) -> dict[str, Any]:
        while True:
            frame: dict[str, Any] = json.loads(await self._websocket.receive_str(timeout=20))
            if frame["action"] in actions:
                return frame
            if frame["action"] == 15:
                self.received.append(frame["channel"])


@asynccontextmanager
async def running_world(
    tmp_path: Path, clock: Clock | None = None, *, channel: bool = True, public_url: str | None = None,
    expiry_seconds: float = EXPIRY_SECONDS, **overrides: Any,
) -> AsyncIterator[World]:
    """Start a hub with an owner and, unless told otherwise, the channel ``lab``; stop it at the end."""
    clock = clock or Clock()
    settings = hub_settings(tmp_path, **overrides)
    hub = Hub(settings, clock=clock, public_url=public_url, expiry_seconds=expiry_seconds)
    await hub.start()
    try:
        assert await hub.ensure_owner(OWNER) == OWNER
        # A connection for each request: the hub's one port sorts connections, not requests, to API or bucket.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            world = World(hub, settings, clock, session)
            if channel and not (await world.owner.call("listChannels"))["channels"]:
                await world.owner.call("createChannel", name=CHANNEL)
            yield world
    finally:
        await hub.stop()


def world_on(tmp_path: Path, store: StoreServer, clock: Clock | None = None, **overrides: Any) -> Any:
    """A hub whose administrator trusts the store."""
    return running_world(tmp_path, clock, hub_engine_hosts=store.host, **overrides)


async def use_bucket(world: World, store: StoreServer, **fields: Any) -> dict[str, Any]:
    """Have the channel use the bucket of the store, as the engine ``mine``."""
    added = await world.owner.call(store.action, **{"name": "mine", **store.settings, **fields})
    await world.owner.call("setBucket", channel=CHANNEL, engine="mine")
    return added


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def hub_process(directory: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A hub of its own process; killed, in the end, if that was not done before."""
    process = subprocess.Popen([sys.executable, "-m", "kachery_fast", "hub", "--dir", str(directory), "--port", "0",
                                "--owner", OWNER], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, **environment})
    try:
        address, end = directory / "address", time.monotonic() + 120
        while not address.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        yield process, address.read_text().strip()
    finally:
        process.kill()
        process.wait()
