"""What a channel's owner does with its bucket: see what is in it and what moves, and remove objects."""

from __future__ import annotations

import asyncio
from datetime import date
from functools import partial
from typing import Annotated, Literal

from msgspec import Meta
from sqlalchemy.engine import Connection

from ..errors import CredentialsUnreadable, InvalidArgument
from . import channels, grants
from .actions import Act, Actor, Answer, At, Done, Outside, Request, Scope
from .buckets import EngineRow, find_bucket
from .engines import BucketEngine, BucketTotals
from .usage import KEPT_DAYS, Moved, day_of

__all__ = ["BUCKET_ACTS"]

OBJECTS_LISTED_MAX = 1000
OBJECTS_REMOVED_MAX = 1000
_EPOCH = date(1970, 1, 1).toordinal()


# --- requests


class ListObjects(Request, tag="listObjects"):
    """The objects of ``channel`` in its bucket, in the order of their names, at most ``limit``.

    ``after``: only those whose names come after it, for the next page. ``kind``: only those of this one; ``sha1`` are
    files with their chunks and manifests.
    """

    channel: str
    after: Annotated[str, Meta(max_length=1000)] = ""
    limit: Annotated[int, Meta(ge=1, le=OBJECTS_LISTED_MAX)] = 100
    kind: Literal["", "sha1", "feeds", "task_results"] = ""


class RemoveObjects(Request, tag="removeObjects"):
    """Remove objects of ``channel`` by their names, as ``listObjects`` tells them. Nodes that still have what was in
    them upload it again when asked."""

    channel: str
    names: Annotated[list[str], Meta(min_length=1, max_length=OBJECTS_REMOVED_MAX)]


class ShowUsage(Request, tag="showUsage"):
    """What has moved through the bucket of ``channel`` in the last ``days`` days (UTC), today included."""

    channel: str
    days: Annotated[int, Meta(ge=1, le=KEPT_DAYS)] = 30


# --- answers


class KindStored(Answer):
    """How many objects of a kind there are, and of how many bytes together."""

    kind: str
    objects: int
    size_bytes: int


class ObjectLine(Answer):
    """An object. Times are in ms; ``last_read`` is to the hour, and null where the bucket does not know."""

    name: str
    size_bytes: int
    created: int
    last_read: int | None


class ObjectList(Answer):
    """A page of objects. ``next``: what ``after`` is for the next page, null at the end.

    ``stored``: all there is of the channel, by kind; not ``counted``: as much as was counted since the hub's start.
    """

    channel: str
    objects: list[ObjectLine]
    next: str | None
    stored: list[KindStored]
    counted: bool


class ObjectsRemoved(Answer):
    """How many objects were removed, of how many bytes; ``missing``: names of what was not there."""

    channel: str
    removed: int
    size_bytes: int
    missing: list[str]


class DayLine(Answer):
    """What has moved in a day, ``date`` as 2026-01-31. A download is one answer with bytes of an object."""

    date: str
    uploads: int
    upload_bytes: int
    downloads: int
    download_bytes: int


class NodeLine(Answer):
    """What a node has moved in all of these days; ``node`` is "" for what cannot be told, as reads are public."""

    node: str
    label: str
    uploads: int
    upload_bytes: int
    downloads: int
    download_bytes: int


class UsageView(Answer):
    """What has moved, day by day and node by node, and what is stored now (as of ``ObjectList``)."""

    channel: str
    days: list[DayLine]
    nodes: list[NodeLine]
    stored: list[KindStored]
    counted: bool
    size_bytes_max: int | None


# --- how they are performed: who may is decided in the registry, the rest happens in the bucket


def _list(connection: Connection, actor: Actor, request: ListObjects, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "list its objects")
    return Done(partial(_list_page, request, find_bucket(connection, request.channel)))


async def _list_page(request: ListObjects, row: EngineRow | None, outside: Outside) -> ObjectList:
    bucket = await _use(row, outside)
    page = await outside.buckets.run(lambda: bucket.objects(
        request.channel, kind=request.kind, after=request.after, limit=request.limit), own=row is None)
    totals = bucket.totals(request.channel)
    lines = [ObjectLine(name=found.name, size_bytes=found.size_bytes, created=int(found.created * 1000),
                        last_read=None if found.last_read is None else int(found.last_read * 1000)) for found in page]
    return ObjectList(channel=request.channel, objects=lines,
                      next=page[-1].name if len(page) == request.limit else None, stored=_stored(totals),
                      counted=totals.counted)


def _remove(connection: Connection, actor: Actor, request: RemoveObjects, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "remove objects")
    for name in request.names:
        if not name.startswith(f"{request.channel}/"):
            raise InvalidArgument(what=f"{name!r} is not the name of an object of {request.channel!r}, which begins "
                                       f"with {request.channel}/.")
    return Done(partial(_remove_names, request, find_bucket(connection, request.channel)))


async def _remove_names(request: RemoveObjects, row: EngineRow | None, outside: Outside) -> ObjectsRemoved:
    bucket = await _use(row, outside)
    return await outside.buckets.run(_remove_each, request, bucket, own=row is None)


def _remove_each(request: RemoveObjects, bucket: BucketEngine) -> ObjectsRemoved:
    # All are looked up first: a name that no object can have stops it before anything is gone.
    sizes = {name: bucket.size(name) for name in request.names}
    missing, removed, removed_bytes = [], 0, 0
    for name, size in sizes.items():
        if size is not None and bucket.remove(name):
            removed, removed_bytes = removed + 1, removed_bytes + size
        else:
            missing.append(name)
    return ObjectsRemoved(channel=request.channel, removed=removed, size_bytes=removed_bytes, missing=missing)


def _show(connection: Connection, actor: Actor, request: ShowUsage, at: At) -> Done:
    settings = channels.require_channel(connection, request.channel, actor.owner, "see its usage")
    members = grants.list_members(connection, request.channel)
    labels = {member.grant.node_id: member.label for member in members}
    row = find_bucket(connection, request.channel)
    return Done(partial(_show_usage, request, settings, labels, row, day_of(at.now_ms / 1000)))


async def _show_usage(
    request: ShowUsage, settings: channels.ChannelSettings, labels: dict[str, str], row: EngineRow | None, today: int,
    outside: Outside,
) -> UsageView:
    first_day = today - request.days + 1
    days = {day: Moved() for day in range(first_day, today + 1)}
    nodes: dict[str, Moved] = {}
    for place, moved in (await outside.usage.since(request.channel, first_day)).items():
        days[place.day] = days.get(place.day, Moved()).plus(moved)
        nodes[place.node] = nodes.get(place.node, Moved()).plus(moved)
    totals = await _totals(request.channel, row, outside)
    ordered = sorted(nodes.items(), key=lambda item: (-item[1].upload_bytes - item[1].download_bytes, item[0]))
    return UsageView(
        channel=request.channel,
        days=[DayLine(date=date.fromordinal(_EPOCH + day).isoformat(), **moved._asdict())
              for day, moved in sorted(days.items())],
        nodes=[NodeLine(node=node, label=labels.get(node, ""), **moved._asdict()) for node, moved in ordered],
        stored=_stored(totals), counted=totals.counted, size_bytes_max=settings.size_bytes_max)


async def _use(row: EngineRow | None, outside: Outside) -> BucketEngine:
    return await asyncio.get_running_loop().run_in_executor(None, outside.buckets.use, row)


async def _totals(channel: str, row: EngineRow | None, outside: Outside) -> BucketTotals:
    try:
        return (await _use(row, outside)).totals(channel)
    except CredentialsUnreadable:  # the page on which its owner gives them anew shows what is stored, too
        return BucketTotals({}, False)


def _stored(totals: BucketTotals) -> list[KindStored]:
    return [KindStored(kind=kind, objects=total.objects, size_bytes=total.size_bytes)
            for kind, total in sorted(totals.kinds.items())]


BUCKET_ACTS = (
    Act(ListObjects, ObjectList, Scope.READ, _list, changes=False),
    Act(RemoveObjects, ObjectsRemoved, Scope.MANAGE, _remove),
    Act(ShowUsage, UsageView, Scope.READ, _show, changes=False),
)
