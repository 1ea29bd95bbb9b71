"""Nodes' ends of a channel, over the SDK of Ably or of NATS, as tests of both hold them."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from kachery_fast.config import load_settings
from kachery_fast.hub.engines.nats import NatsCredentials, NatsPubsub, NatsSettings
from kachery_fast.net.bands import NatsChannel
from kachery_fast.net.channel import AblyChannel, Channel, Message
from kachery_fast.protocol.nkeys import Nkey
from tests.embedded.broker_server import ALL, BANDS, until

BAND = BANDS[0]
P = TypeVar("P", bound="Peer")


class Peer(ABC):
    """One channel with what it has received, which states it went through, and its node's way to tokens.

    The next token is as ``capability`` and ``life_seconds`` say; it does not come while ``gate`` is cleared, and not at
    all with a ``fault``. ``calls`` counts. :param options: of ``open``.
    """

    channel: Channel

    def __init__(self, server: Any, client_id: str = "node-1", *, capability: Mapping[str, Sequence[str]] = ALL,
                 life_seconds: float = 300.0, **options: Any) -> None:
        self.server = server
        self.client_id = client_id
        self.capability = capability
        self.life_seconds = life_seconds
        self.calls = 0
        self.fault: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.states: list[tuple[bool, str]] = []
        self.got: asyncio.Queue[Message] = asyncio.Queue()
        self.channel = self.open(**options)

    @classmethod
    @asynccontextmanager
    async def joined(cls: type[P], server: Any, client_id: str = "node-1", *, listen: bool = True, **options: Any
                     ) -> AsyncIterator[P]:
        """One that is connected, and listens to BAND."""
        peer = cls(server, client_id, **options)
        try:
            await peer.channel.connect()
            if listen:
                await peer.channel.subscribe(BAND, peer.got.put_nowait)
            yield peer
        finally:
            await peer.channel.close()

    @abstractmethod
    def open(self, **options: Any) -> Any:
        """Make the channel, not connected yet."""

    @abstractmethod
    def issue(self) -> Any:
        """Make a token."""

    async def token(self) -> Any:
        self.calls += 1
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return self.issue()

    def note(self, up: bool, why: str) -> None:
        self.states.append((up, why))

    async def receive(self, timeout_seconds: float = 10.0) -> Message:
        return await asyncio.wait_for(self.got.get(), timeout_seconds)

    async def become(self, up: bool, timeout_seconds: float = 30.0) -> None:
        await until(lambda: self.channel.connected is up, timeout_seconds)


class AblyPeer(Peer):
    """With the broker of ``tests.embedded.broker_server``."""

    channel: AblyChannel

    def open(self, *, endpoint: str = "", **settings: float) -> AblyChannel:
        return AblyChannel("lab", endpoint=endpoint or self.server.endpoint, tls=False, token=self.token,
                           client_id=self.client_id, settings=load_settings({}, **settings), on_state=self.note)

    def issue(self) -> Any:
        return self.server.broker.issue_token(self.client_id, self.capability, self.life_seconds)


class NatsPeer(Peer):
    """With a NATS server."""

    channel: NatsChannel

    def open(self, *, scheme: str = "nats", url: str = "", address: str = "", signer: Nkey | None = None,
             **settings: float) -> NatsChannel:
        self.engine = NatsPubsub(NatsSettings(self.server.url(scheme), self.server.account.public),
                                 NatsCredentials((signer or self.server.signer).seed), time.time)
        return NatsChannel("lab", url=url or self.server.url(scheme), token=self.token, client_id=self.client_id,
                           address=address, settings=load_settings({}, **settings), on_state=self.note)

    def issue(self) -> Any:
        return self.engine.token(self.client_id, self.capability, self.life_seconds)
