"""What is written down of channels that move from bucket to bucket, as others need it; ``bucket_moves`` moves them."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .tables import bucket_moves

__all__ = ["COPYING", "DONE", "FOLLOWING", "RUNNING", "STOPPED", "SWITCHED", "stop_move", "unfinished"]

# All that is there; what came, or was replaced, meanwhile; and, once nodes use the new bucket, what came to the old one
# until then, which replaces nothing that is newer.
COPYING, FOLLOWING, SWITCHED = RUNNING = ("copying", "following", "switched")
DONE, STOPPED = "done", "stopped"


def stop_move(connection: Connection, channel: str, why: str, now_ms: int) -> None:
    """Have a move that is under way be over; what was copied stays where it is."""
    connection.execute(bucket_moves.update().where(
        bucket_moves.c.channel == channel, bucket_moves.c.state.in_(RUNNING)).values(
            state=STOPPED, why=why, changed=now_ms))


def unfinished(connection: Connection, channel: str) -> list[str]:
    """The ids of the buckets, but for the hub's own, of a channel's move that is not done."""
    row = connection.execute(sa.select(bucket_moves.c.source, bucket_moves.c.target).where(
        bucket_moves.c.channel == channel, bucket_moves.c.state != DONE)).first()
    return [engine_id for engine_id in row or () if engine_id is not None]
