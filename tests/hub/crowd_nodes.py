"""Many nodes of one hub in one process: those that nodes really are, and light ones that do the same for less.

A tenth of a millisecond of a message's way is the ``ably`` SDK, and each of its clients takes 25 ms to make, most of it
for TLS that is not used here: with thousands in one process it would be that process that is measured. A light node
does the same with a tenth of the work: its tokens come from ``HubClient``, its websocket says and hears what the SDK's
does, and it comes back after the same pauses (``AblyClient``, ``AblyChannel``).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import random
import secrets
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.engine import Connection

from kachery_fast.config import Settings
from kachery_fast.embedded.broker_wire import Action
from kachery_fast.errors import BandUnreachable, KacheryError
from kachery_fast.hub import channels, identity, invitations
from kachery_fast.net.ably_client import RECONNECT_JITTER_SECONDS, RECONNECT_SECONDS
from kachery_fast.net.channel import AblyChannel, Message
from kachery_fast.net.hub import HubClient
from kachery_fast.protocol.access import Permission
from kachery_fast.protocol.bodies import Want
from kachery_fast.protocol.messages import encode_band
from kachery_fast.protocol.names import band_name
from kachery_fast.protocol.signing import private_key, public_id

__all__ = ["BANDS", "Heard", "LightNode", "Place", "RealNode", "channel_of", "crowd_key", "register", "sent_at"]

# What a node says and hears that may request and provide files, as the invitation lets it that a hub prints first.
PERMISSIONS = frozenset({Permission.REQUEST_FILES, Permission.PROVIDE_FILES})
BANDS = ("requestFiles", "provideFiles")

_WAIT_SECONDS = 30.0

Heard = Callable[["RealNode | LightNode", bytes], None]
"""Called with each message that a node hears."""


class Place(msgspec.Struct, frozen=True):
    """Which hub the nodes are at, and how many of them are on each channel."""

    url: str
    per_channel: int
    settings: Settings


def crowd_key(number: int) -> Ed25519PrivateKey:
    """The key of a node, the same in every process."""
    return private_key(hashlib.sha256(f"crowd {number}".encode()).digest())


def channel_of(number: int, per_channel: int) -> str:
    """The channel that a node is on."""
    return f"lab-{number // per_channel}"


def register(connection: Connection, owner: str, count: int, per_channel: int, *, private: bool = False) -> None:
    """Make the channels of ``owner`` and their nodes in a registry, all in one transaction."""
    now_ms = int(time.time() * 1000)
    identity.ensure_owner(connection, owner, now_ms, admin=True)
    code = ""
    for number in range(count):
        name = channel_of(number, per_channel)
        if number % per_channel == 0:
            channels.create_channel(connection, name, owner, now_ms)
            channels.change_channel(connection, name, {"private": private})
            day_ms = 24 * 3600 * 1000
            code = invitations.create_invitation(connection, name, owner, PERMISSIONS, None, now_ms + day_ms, now_ms)
        invitations.join_channel(
            connection, public_id(crowd_key(number)), code, f"node-{number}", PERMISSIONS, now_ms)


def sent_at(data: bytes) -> float:
    """When a message was sent that ``wish`` made, by ``time.monotonic``."""
    begin = data.index(b'"request":"') + 11
    return float(data[begin:data.index(b'"', begin)])


class _Refused(Exception):
    """The broker does not take the token."""


class _Node:
    def __init__(self, number: int, place: Place) -> None:
        self.key = crowd_key(number)
        self.id = public_id(self.key)
        self.channel_name = channel_of(number, place.per_channel)
        self.hub = HubClient(place.url, self.key, place.settings)

    def wish(self) -> bytes:
        """Return a signed wish for a file, as a node would send it; its request's id tells when it was made."""
        body = Want(channel=self.channel_name, time=int(time.time() * 1000), id=secrets.token_hex(16),
                    request=f"{time.monotonic():.6f}", sha1=secrets.token_hex(20), manifest=secrets.token_hex(20))
        return encode_band([body], self.key)

    async def _token(self) -> dict[str, Any]:
        plain: dict[str, Any] = msgspec.to_builtins(await self.hub.pubsub_token(self.channel_name))
        return plain


class RealNode(_Node):
    """A node's own way to its channel."""

    def __init__(self, number: int, place: Place, heard: Heard) -> None:
        super().__init__(number, place)
        self._heard = heard
        self._channel = AblyChannel(
            self.channel_name, endpoint=urlsplit(place.url).netloc, tls=False, token=self._token, client_id=self.id,
            settings=place.settings)

    async def connect(self) -> None:
        """Connect, and listen."""
        await self._channel.connect()
        for band in BANDS:
            await self._channel.subscribe(band_name(self.channel_name, band), self._receive)

    def _receive(self, message: Message) -> None:
        self._heard(self, message.data)

    async def say(self) -> None:
        """Publish a wish; returns when it is acknowledged."""
        await self._channel.publish(band_name(self.channel_name, BANDS[0]), self.wish())

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()
        await self.hub.close()


class LightNode(_Node):
    """The same, for less."""

    def __init__(self, number: int, place: Place, heard: Heard) -> None:
        super().__init__(number, place)
        self._heard = heard
        self._address = urlsplit(place.url)
        self._pause_seconds = RECONNECT_SECONDS + random.uniform(0, RECONNECT_JITTER_SECONDS)
        self._attached = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._serial = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._life: asyncio.Task[None] | None = None
        self._seen: set[str] = set()

    async def connect(self) -> None:
        """Connect, and listen."""
        self._life = asyncio.create_task(self._live())
        await asyncio.wait_for(self._attached.wait(), _WAIT_SECONDS)

    async def say(self) -> None:
        """Publish a wish; returns when it is acknowledged."""
        if self._writer is None or not self._attached.is_set():
            raise BandUnreachable(channel=self.channel_name, why="not connected")
        serial, self._serial = self._serial, self._serial + 1
        acknowledged = self._waiting[serial] = asyncio.get_running_loop().create_future()
        self._send({"action": Action.MESSAGE, "channel": band_name(self.channel_name, BANDS[0]), "msgSerial": serial,
                    "messages": [{"id": secrets.token_urlsafe(12), "data": self.wish()}]})
        await acknowledged

    async def close(self) -> None:
        """Disconnect."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])
        await self.hub.close()

    async def _live(self) -> None:
        token: dict[str, Any] | None = None
        while True:
            try:
                token = token or await self._token()
                was_up = await self._be_connected(token["token"])
            except _Refused:
                was_up, token = True, None
                await asyncio.sleep(random.uniform(0, 0.25))
            except (KacheryError, OSError):
                was_up = False
            if not was_up:
                await asyncio.sleep(self._pause_seconds)

    async def _be_connected(self, token: str) -> bool:
        """Connect and listen until the connection ends. Returns whether messages flowed."""
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        try:
            query = urlencode({"clientId": self.id, "accessToken": token, "v": "5", "format": "msgpack"})
            key = base64.b64encode(os.urandom(16)).decode()
            writer.write((f"GET /?{query} HTTP/1.1\r\nHost: {self._address.netloc}\r\nUpgrade: websocket\r\n"
                          f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
                          ).encode())
            if not (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101"):
                return False
            self._writer, self._serial = writer, 0
            while True:
                self._act(await self._frame(reader))
        except asyncio.IncompleteReadError:
            return self._attached.is_set()
        finally:
            self._attached.clear()
            self._writer = None
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(BandUnreachable(channel=self.channel_name, why="the connection broke"))
                    waiting.exception()
            self._waiting.clear()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _act(self, body: dict[str, Any]) -> None:
        action = body.get("action")
        if action == Action.ERROR:
            raise _Refused
        if action == Action.CONNECTED:
            for band in BANDS:
                self._send({"action": Action.ATTACH, "channel": band_name(self.channel_name, band)})
        elif action == Action.ATTACHED:
            if body["channel"].endswith(BANDS[-1]):
                self._attached.set()
        elif action == Action.MESSAGE:
            for message in body["messages"]:
                if message["id"] not in self._seen:
                    self._seen.add(message["id"])
                    self._heard(self, message["data"])
        elif action == Action.ACK:
            waiting = self._waiting.pop(body["msgSerial"], None)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)

    def _send(self, body: dict[str, Any], kind: int = 0x82) -> None:
        assert self._writer is not None, "only what is connected sends"
        data = msgspec.msgpack.encode(body) if kind == 0x82 else b""
        # A mask of zeros is one (RFC 6455, 5.3), and spares the masking.
        size = bytes((0x80 | len(data),)) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big")
        self._writer.write(bytes((kind,)) + size + b"\0\0\0\0" + data)

    async def _frame(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        """Return the next protocol message; {} for what is none.

        :raises IncompleteReadError: the connection has ended.
        """
        first, size = await reader.readexactly(2)
        if size > 125:
            size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
        data = await reader.readexactly(size)
        if first == 0x88:
            raise asyncio.IncompleteReadError(b"", None)
        if first == 0x89:
            self._send({}, 0x8A)
        return dict(msgspec.msgpack.decode(data)) if first == 0x82 else {}
