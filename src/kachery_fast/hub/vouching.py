"""Whether a token for the bands from before the hub's start would still be given.

So nodes that come back after a restart, thousands at once, need no new token for it, which costs twice what the
connection does. What the hub revoked before is known by what it kept: what is granted now, and when that was decided.
Those that come while others are looked up are looked up together, in one question to the registry.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..embedded.tokens import Claims
from ..errors import KacheryError
from ..protocol.access import Grant, band_capability
from .grants import in_force, to_grant
from .registry import Registry
from .tables import channels, memberships, nodes

__all__ = ["Voucher"]

_log = logging.getLogger("kachery_fast.hub")

_TOGETHER_MAX = 200
# A channel whose messages go by another service has no tokens of this hub's broker.
_FIND = sa.select(memberships).select_from(
    memberships.join(nodes, in_force).join(channels, memberships.c.channel == channels.c.name)).where(
    memberships.c.node.in_(sa.bindparam("node_ids", expanding=True)), channels.c.pubsub.is_(None))


class _Undisputed(NamedTuple):
    """A grant, and when the channel's owner last changed his mind about it, ms since the epoch."""

    grant: Grant
    decided_ms: int


class Voucher:
    """Answers the broker. One for each hub, used on its event loop."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._waiting: list[tuple[Claims, asyncio.Future[bool]]] = []
        self._looking: asyncio.Task[None] | None = None

    async def vouch(self, claims: Claims) -> bool:
        """Whether all that a token from before the start grants is granted now, by a decision from before the token."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((claims, answer))
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look_up())
        return await answer

    async def close(self) -> None:
        """Vouch for nobody any more."""
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking

    async def _look_up(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting[:_TOGETHER_MAX], self._waiting[_TOGETHER_MAX:]
            found: dict[tuple[str, str], _Undisputed] = {}
            try:
                found = await self._registry.call(_find, sorted({claims.client_id for claims, _ in asked}))
            except KacheryError:  # the nodes ask for new ones, and are told what is wrong
                pass
            except Exception:
                _log.exception("tokens from before the start could not be looked up")
            finally:
                for claims, answer in asked:
                    if not answer.done():  # its client may have gone
                        answer.set_result(_holds(claims, found))


def _holds(claims: Claims, found: dict[tuple[str, str], _Undisputed]) -> bool:
    channels = {band.rpartition("-")[0] for band in claims.capability}
    known = found.get((claims.client_id, channels.pop())) if len(channels) == 1 else None
    if known is None or known.decided_ms >= int(claims.issued * 1000):
        return False
    granted = band_capability(known.grant)
    return all(operations <= set(granted.get(band, ())) for band, operations in claims.capability.items())


def _find(connection: Connection, node_ids: list[str]) -> dict[tuple[str, str], _Undisputed]:
    """Return what is in force, by node and channel."""
    rows = connection.execute(_FIND, {"node_ids": node_ids})
    return {(row.node, row.channel): _Undisputed(to_grant(row), row.decided) for row in rows}
