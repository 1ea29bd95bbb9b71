"""Which pub/sub service a channel's messages go by: its owner's, or the hub's own broker.

As of buckets, what a channel has is read from the registry within the transaction that decides. Nothing is kept of a
row: to open its credentials takes some microseconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..config import Settings
from ..errors import KacheryError
from ..net.bands import open_bands
from ..net.channel import Channel
from ..protocol.hub_bodies import PubsubInfo, PubsubToken
from .buckets import EngineRow
from .engines import PubsubEngine
from .engines.ably import AblyCredentials, AblyPubsub, AblySettings
from .engines.embedded import EmbeddedPubsub
from .engines.nats import NatsCredentials, NatsPubsub, NatsSettings
from .outbound import Outbound
from .tables import channels, engines
from .vault import Vault

__all__ = ["ABLY", "NATS", "PUBSUB_KINDS", "Pubsubs", "find_pubsub", "find_pubsubs", "settings_of"]

_log = logging.getLogger("kachery_fast.hub")

ABLY, NATS = "ably", "nats"
PUBSUB_KINDS = (ABLY, NATS)
# How long an action waits for a service to take back tokens; they end by themselves soon after.
REVOCATION_SECONDS_MAX = 10.0
# Who the hub is on the bands.
_CLIENT = "the-hub"
_ROW = [engines.c[name] for name in EngineRow._fields]


def find_pubsub(connection: Connection, channel: str) -> EngineRow | None:
    """Return the pub/sub service of a channel, None for the hub's own broker; runs inside ``Registry.call``."""
    row = connection.execute(sa.select(*_ROW).select_from(channels.join(engines, channels.c.pubsub == engines.c.id))
                             .where(channels.c.name == channel)).first()
    return None if row is None else EngineRow(*row)


def find_pubsubs(connection: Connection, names: Iterable[str]) -> set[EngineRow | None]:
    """Return the pub/sub services of channels."""
    return {find_pubsub(connection, name) for name in names}


def settings_of(row: EngineRow | sa.Row[Any]) -> AblySettings | NatsSettings:
    """What its owner said of a service."""
    if row.kind == ABLY:
        return msgspec.json.decode(row.settings, type=AblySettings)
    return msgspec.json.decode(row.settings, type=NatsSettings)


class Pubsubs:
    """The pub/sub services of one hub.

    :param own: the hub's own. :param clock: seconds since the epoch.
    """

    def __init__(self, own: EmbeddedPubsub, vault: Vault, outbound: Outbound, clock: Callable[[], float]) -> None:
        self.own = own
        self._vault = vault
        self._outbound = outbound
        self._clock = clock

    def use(self, row: EngineRow | None) -> PubsubEngine:
        """Return the service of a row that ``find_pubsub`` returned.

        :raises CredentialsUnreadable: they were encrypted with another key.
        """
        if row is None:
            return self.own
        opened = self._vault.open(row.id, row.settings, row.secret, row.name)
        settings = settings_of(row)
        if isinstance(settings, AblySettings):
            return AblyPubsub(settings, msgspec.json.decode(opened, type=AblyCredentials), self._outbound, self._clock)
        return NatsPubsub(settings, msgspec.json.decode(opened, type=NatsCredentials), self._clock)

    def of(self, connection: Connection, channel: str) -> PubsubEngine:
        """Return the service of a channel; runs inside ``Registry.call``. Raises as ``use`` does."""
        return self.use(find_pubsub(connection, channel))

    def info(self, row: EngineRow | None) -> PubsubInfo:
        """Return what nodes are told of a service, which takes no credentials."""
        return self.own.info() if row is None else settings_of(row).info

    def address(self, row: EngineRow) -> str:
        """Return the IP address of a service, to which the hub may connect. Blocks. Raises as ``Outbound.check``."""
        return self._outbound.address(*settings_of(row).server)

    async def open(
        self, channel: str, row: EngineRow | None, capability: Mapping[str, Sequence[str]], hub_url: str,
        settings: Settings,
    ) -> Channel:
        """Return the hub's own way to bands of a channel, not connected yet: to the address of the service that was
        looked at, and no other.

        :param capability: what the hub is to do there. :param hub_url: where its own broker is.
        :raises AddressRefused, EngineUnusable: the hub does not connect there. Else as ``use``.
        """
        engine = self.use(row)

        async def token() -> PubsubToken:
            return engine.token(_CLIENT, capability, settings.token_life_seconds)

        address = "" if row is None else await asyncio.get_running_loop().run_in_executor(None, self.address, row)
        return open_bands(channel, self.info(row), hub_url=hub_url, token=token, client_id=_CLIENT, settings=settings,
                          address=address)

    async def revoke(self, rows: Iterable[EngineRow | None], node_ids: tuple[str, ...]) -> None:
        """Take back the tokens of nodes at these services: at the hub's own for sure, elsewhere as well as can be."""
        await asyncio.gather(*(self._revoke(row, node_ids) for row in rows if node_ids))

    async def _revoke(self, row: EngineRow | None, node_ids: tuple[str, ...]) -> None:
        if row is None:
            await self.own.revoke(node_ids)
            return
        try:
            await asyncio.wait_for(self.use(row).revoke(node_ids), REVOCATION_SECONDS_MAX)
        except (KacheryError, asyncio.TimeoutError) as error:
            _log.warning("the tokens of %d nodes hold at %s until they end: %s", len(node_ids), row.name,
                         error or "no answer in time")
