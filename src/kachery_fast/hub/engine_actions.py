"""What people do with buckets of their own: add them, say which channel uses which, and take them away again.

Credentials go one way: into the vault. No answer, log, audit entry or error has them.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any

import msgspec
import sqlalchemy as sa
from msgspec import Meta
from sqlalchemy.engine import Connection, Row

from ..errors import AlreadyExists, InvalidArgument, NotOnHub
from . import channels
from .actions import Act, Actor, Answer, At, Done, Outside, Request, Scope
from .engines.s3_settings import S3Settings, check_credentials, check_settings
from .tables import channels as channels_table
from .tables import engines

__all__ = ["ENGINE_ACTS", "check_readers"]

ENGINES_PER_OWNER_MAX = 100
S3 = "s3"
_Secret = Annotated[str, Meta(max_length=300)]


# --- requests


class AddS3Bucket(Request, tag="addS3Bucket"):
    """Have the hub know a bucket of yours that speaks S3 as ``name``; ``setBucket`` then lets a channel use it.

    ``endpoint``: its server's address (``https://HOST[:PORT]``), "" for Amazon's. ``region``: needed for Amazon's.
    ``prefix``: before the names of all objects. ``pathStyle``: whether URLs name the bucket in their path; null: for
    all but Amazon's. ``publicReads``: everybody may read there who knows a name, so nodes need no signed URLs.
    ``createOnly``: the store heeds ``If-None-Match: *``. The credentials are kept encrypted, and never shown.
    """

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    bucket: str
    access_key: _Secret
    secret_key: _Secret
    endpoint: str = ""
    region: str = ""
    prefix: str = ""
    path_style: bool | None = None
    public_reads: bool = False
    create_only: bool = True

    def __repr__(self) -> str:
        return f"AddS3Bucket(name={self.name!r}, …)"


class ListEngines(Request, tag="listEngines"):
    """My buckets, without their credentials, and the channels that use them."""


class ChangeCredentials(Request, tag="changeCredentials"):
    """Give the bucket ``engine`` (its name or id) other credentials; the old ones are gone."""

    engine: str
    access_key: _Secret
    secret_key: _Secret

    def __repr__(self) -> str:
        return f"ChangeCredentials(engine={self.engine!r}, …)"


class RemoveEngine(Request, tag="removeEngine"):
    """Have the hub forget the bucket ``engine`` (its name or id) and its credentials. What is in it stays. Refused
    while a channel uses it."""

    engine: str


class SetBucket(Request, tag="setBucket"):
    """Have ``channel`` use the bucket ``engine`` (the name or id of one of yours; null: the hub's own).

    It begins empty, as far as the channel is concerned; nodes upload again what is asked for.
    """

    channel: str
    engine: str | None = None


# --- answers


class EngineLine(Answer):
    """A bucket. ``channels``: those that use it. Times are in ms."""

    id: str
    name: str
    kind: str
    created: int
    bucket: str
    endpoint: str
    region: str
    prefix: str
    path_style: bool
    public_reads: bool
    create_only: bool
    url: str
    channels: list[str]


class EngineList(Answer):
    """Somebody's buckets, by name."""

    owner: str
    engines: list[EngineLine]


class EngineRemoved(Answer):
    """A bucket that the hub does not know any more."""

    name: str
    removed: bool = True


class BucketSet(Answer):
    """Which bucket a channel uses now; null: the hub's own."""

    channel: str
    engine: str | None
    name: str | None


# --- how they are performed


async def _check_address(request: AddS3Bucket, outside: Outside) -> None:
    """Nodes are sent there from the first signed URL on, so that it is looked at before there is one."""
    url = _settings_of(request).bucket_url
    if request.endpoint:  # Amazon's are no secret
        await asyncio.get_running_loop().run_in_executor(None, outside.buckets.outbound.check, url)


def _add_s3(connection: Connection, actor: Actor, request: AddS3Bucket, at: At) -> Done:
    settings = msgspec.json.encode(_settings_of(request)).decode()
    mine = _of_owner(connection, actor.owner)
    name = request.name.strip()
    if not name or not name.isprintable():
        raise InvalidArgument(what="Give the bucket a name, of printable characters.")
    if any(name in (row.name, row.id) for row in mine):
        raise AlreadyExists(what=f"Your bucket {name!r}", advice=f"Have a channel use it: kachery-fast channel "
                            f"bucket CHANNEL --use {name}. Or choose another name.")
    if len(mine) >= ENGINES_PER_OWNER_MAX:
        raise InvalidArgument(what=f"You have {len(mine)} buckets already; {ENGINES_PER_OWNER_MAX} are allowed.")
    engine_id = secrets.token_hex(8)
    connection.execute(engines.insert().values(
        id=engine_id, owner=actor.owner, kind=S3, name=name, settings=settings,
        secret=_sealed(at, engine_id, settings, request), created=at.now_ms))
    return Done(_line(connection, _require(connection, actor.owner, engine_id)))


def _list(connection: Connection, actor: Actor, request: ListEngines, at: At) -> Done:
    return Done(EngineList(owner=actor.owner, engines=[_line(connection, row)
                                                       for row in _of_owner(connection, actor.owner)]))


def _change_credentials(connection: Connection, actor: Actor, request: ChangeCredentials, at: At) -> Done:
    row = _require(connection, actor.owner, request.engine)
    secret = _sealed(at, row.id, row.settings, request)
    connection.execute(engines.update().where(engines.c.id == row.id).values(secret=secret))
    return Done(_line(connection, row))


def _remove(connection: Connection, actor: Actor, request: RemoveEngine, at: At) -> Done:
    row = _require(connection, actor.owner, request.engine)
    users = _users(connection, row.id)
    if users:
        raise InvalidArgument(what=f"The bucket {row.name!r} is used by {', '.join(users)}. Set another one first: "
                                   f"kachery-fast channel bucket {users[0]} --own")
    connection.execute(engines.delete().where(engines.c.id == row.id))
    return Done(EngineRemoved(name=row.name))


def _set_bucket(connection: Connection, actor: Actor, request: SetBucket, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "set its bucket")
    row = None if request.engine is None else _require(connection, actor.owner, request.engine)
    connection.execute(channels_table.update().where(channels_table.c.name == request.channel).values(
        bucket=None if row is None else row.id))
    check_readers(connection, request.channel)
    return Done(BucketSet(channel=request.channel, engine=None if row is None else row.id,
                          name=None if row is None else row.name))


ENGINE_ACTS = (
    Act(AddS3Bucket, EngineLine, Scope.MANAGE, _add_s3, first=_check_address),
    Act(ListEngines, EngineList, Scope.READ, _list, changes=False),
    Act(ChangeCredentials, EngineLine, Scope.MANAGE, _change_credentials),
    Act(RemoveEngine, EngineRemoved, Scope.MANAGE, _remove),
    Act(SetBucket, BucketSet, Scope.MANAGE, _set_bucket),
)


def check_readers(connection: Connection, channel: str) -> None:
    """Make sure that a private channel is not in a bucket that everybody may read.

    :raises InvalidArgument: it would be.
    """
    row = connection.execute(
        sa.select(channels_table.c.private, engines.c.name, engines.c.settings)
        .select_from(channels_table.join(engines, channels_table.c.bucket == engines.c.id))
        .where(channels_table.c.name == channel)).first()
    if row is not None and row.private and _decoded(row.settings).public_reads:
        raise InvalidArgument(what=f"The channel {channel!r} would be private, and everybody may read in the bucket "
                                   f"{row.name!r}. Choose another bucket, or make the channel public.")


def _settings_of(request: AddS3Bucket) -> S3Settings:
    path_style = bool(request.endpoint) if request.path_style is None else request.path_style
    return check_settings(S3Settings(
        bucket=request.bucket, endpoint=request.endpoint, region=request.region, prefix=request.prefix,
        path_style=path_style, public_reads=request.public_reads, create_only=request.create_only))


def _sealed(at: At, engine_id: str, settings: str, request: AddS3Bucket | ChangeCredentials) -> bytes:
    credentials = check_credentials(request.access_key.strip(), request.secret_key.strip())
    return at.vault.seal(engine_id, settings, msgspec.json.encode(credentials))


def _of_owner(connection: Connection, owner: str) -> list[Row[Any]]:
    return list(connection.execute(sa.select(engines).where(engines.c.owner == owner).order_by(engines.c.name)))


def _require(connection: Connection, owner: str, named: str) -> Row[Any]:
    """An engine of this owner's; another's is as if it were not there."""
    for row in _of_owner(connection, owner):
        if named in (row.id, row.name):
            return row
    raise NotOnHub(kind="bucket of yours", name=named, advice="See: kachery-fast channel engines")


def _users(connection: Connection, engine_id: str) -> list[str]:
    return list(connection.execute(sa.select(channels_table.c.name).where(channels_table.c.bucket == engine_id)
                                   .order_by(channels_table.c.name)).scalars())


def _decoded(settings: str) -> S3Settings:
    return msgspec.json.decode(settings, type=S3Settings)


def _line(connection: Connection, row: Row[Any]) -> EngineLine:
    settings = _decoded(row.settings)
    return EngineLine(id=row.id, name=row.name, kind=row.kind, created=row.created, url=settings.url_base,
                      channels=_users(connection, row.id), **msgspec.structs.asdict(settings))
