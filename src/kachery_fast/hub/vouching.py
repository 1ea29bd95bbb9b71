"""Whether a token for the bands from before the hub's start would still be given.

So nodes that come back after a restart, thousands at once, need no new token for it, which costs twice what the
connection does. What the hub revoked before is known by what it kept: what is granted now, and when that was decided.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..embedded.tokens import Claims
from ..errors import KacheryError
from ..protocol.access import Grant, band_capability
from .grants import in_force, to_grant
from .registry import Registry
from .tables import memberships, nodes

__all__ = ["make_vouch"]

_FIND = sa.select(memberships).select_from(memberships.join(nodes, in_force)).where(
    memberships.c.node == sa.bindparam("node_id"), memberships.c.channel == sa.bindparam("of"),
    memberships.c.decided < sa.bindparam("issued_ms"))


def make_vouch(registry: Registry) -> Callable[[Claims], Awaitable[bool]]:
    """Return what the broker asks about a token from before its start."""

    async def vouch(claims: Claims) -> bool:
        of = {band.rpartition("-")[0] for band in claims.capability}
        if len(of) != 1:
            return False
        try:
            grant = await registry.call(_find_undisputed, claims.client_id, of.pop(), int(claims.issued * 1000))
        except KacheryError:  # the node asks for a new one, and is told what is wrong
            return False
        granted = band_capability(grant)
        return all(operations <= set(granted.get(band, ())) for band, operations in claims.capability.items())

    return vouch


def _find_undisputed(connection: Connection, node_id: str, channel: str, issued_ms: int) -> Grant | None:
    """Return a node's grant if the channel's owner has not changed his mind since."""
    row = connection.execute(_FIND, {"node_id": node_id, "of": channel, "issued_ms": issued_ms}).first()
    return None if row is None else to_grant(row)
