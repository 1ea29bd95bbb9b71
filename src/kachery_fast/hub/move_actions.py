"""What people do to have a channel move to another bucket with what is in it (``bucket_moves`` does it)."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from ..errors import AlreadyExists, InvalidArgument, NotOnHub
from . import channels
from .actions import Act, Actor, Answer, At, Done, Outside, Request, Scope
from .engine_actions import check_readers, require_bucket
from .move_rows import COPYING, RUNNING, stop_move
from .tables import bucket_moves, engines
from .tables import channels as channels_table

__all__ = ["MOVE_ACTS", "ShowMove"]


class MigrateBucket(Request, tag="migrateBucket"):
    """Have ``channel`` move to the bucket ``engine`` (the name or id of one of yours; null: the hub's own).

    The hub copies what is in the old one, which is used until then; then the channel has the new one. ``bucketMove``
    tells how far it has come. URIs stay the same; what is in the old bucket stays there.
    """

    channel: str
    engine: str | None = None


class ShowMove(Request, tag="bucketMove"):
    """How far ``channel`` has come on its way to another bucket, or how that ended."""

    channel: str


class StopMove(Request, tag="stopMove"):
    """Leave ``channel`` in the bucket that it has now; what was copied stays where it is."""

    channel: str


class BucketMove(Answer):
    """A move. ``state``: "copying", "following" (what came meanwhile is copied), "switched" (the channel has the new
    bucket, and what still came to the old one is copied), "done", or "stopped". ``objects`` and ``sizeBytes`` were
    copied; ``damaged`` objects stayed behind. ``why``: what holds it up, or has stopped it. ``source`` and ``target``:
    names of buckets; null: the hub's own. Times in ms."""

    channel: str
    source: str | None
    target: str | None
    state: str
    objects: int
    size_bytes: int
    damaged: int
    why: str
    started: int
    changed: int


def _migrate(connection: Connection, actor: Actor, request: MigrateBucket, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "set its bucket")
    target = None if request.engine is None else require_bucket(connection, actor.owner, request.engine)
    row = _find(connection, request.channel)
    if row is not None and row.state in RUNNING:
        raise AlreadyExists(what=f"A move of the channel {request.channel!r}", advice="See how far it has come, or "
                            f"stop it: kachery-fast channel migrate {request.channel} --status, or --stop")
    source = connection.execute(
        sa.select(channels_table.c.bucket).where(channels_table.c.name == request.channel)).scalar_one()
    if source == (None if target is None else target.id):
        raise InvalidArgument(what=f"The channel {request.channel!r} has that bucket already.")
    check_readers(connection, request.channel, None if target is None else target.id)
    connection.execute(bucket_moves.delete().where(bucket_moves.c.channel == request.channel))
    connection.execute(bucket_moves.insert().values(
        channel=request.channel, owner=actor.owner, source=source, target=None if target is None else target.id,
        state=COPYING, after="", objects=0, size_bytes=0, damaged=0, why="", started=at.now_ms, changed=at.now_ms))
    answer = _answer(connection, request.channel)

    async def wake(outside: Outside) -> BucketMove:
        outside.wake_mover()
        return answer

    return Done(wake)


def _show(connection: Connection, actor: Actor, request: ShowMove, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "see where it moves")
    return Done(_answer(connection, request.channel))


def _stop(connection: Connection, actor: Actor, request: StopMove, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "set its bucket")
    stop_move(connection, request.channel, f"{actor.owner} has stopped it", at.now_ms)
    return Done(_answer(connection, request.channel))


MOVE_ACTS = (
    Act(MigrateBucket, BucketMove, Scope.MANAGE, _migrate),
    Act(ShowMove, BucketMove, Scope.READ, _show, changes=False),
    Act(StopMove, BucketMove, Scope.MANAGE, _stop),
)


def _find(connection: Connection, channel: str) -> Row[tuple[object, ...]] | None:
    return connection.execute(sa.select(bucket_moves).where(bucket_moves.c.channel == channel)).first()


def _answer(connection: Connection, channel: str) -> BucketMove:
    row = _find(connection, channel)
    if row is None:
        raise NotOnHub(kind="move of the channel", name=channel,
                       advice=f"Begin one: kachery-fast channel migrate {channel} --to BUCKET")
    return BucketMove(source=_name(connection, row.source), target=_name(connection, row.target), **{
        name: getattr(row, name) for name in ("channel", "state", "objects", "size_bytes", "damaged", "why", "started",
                                              "changed")})


def _name(connection: Connection, engine_id: str | None) -> str | None:
    """What its owner calls a bucket; one that is known no more goes by its id."""
    if engine_id is None:
        return None
    return connection.execute(
        sa.select(engines.c.name).where(engines.c.id == engine_id)).scalar_one_or_none() or engine_id
