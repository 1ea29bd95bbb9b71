"""What people do with buckets of their own: add them, say which channel uses which, and take them away again.

Credentials go one way: into the vault. No answer, log, audit entry or error has them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import sqlalchemy as sa
from msgspec import Meta
from sqlalchemy.engine import Connection, Row

from ..errors import AlreadyExists, InvalidArgument, NotOnHub
from . import channels
from .actions import Act, Actor, Answer, At, Done, Outside, Request, Scope
from .buckets import BucketSettings, decode_settings
from .engines.directory import DIRECTORY, DirectorySettings
from .engines.gcs_settings import GCS, GcsCredentials, check_gcs_credentials
from .engines.s3_settings import S3, S3Credentials, S3Settings, check_credentials, check_settings
from .move_rows import stop_move
from .tables import channels as channels_table
from .tables import engines

__all__ = [
    "BUCKET_KINDS", "ENGINE_ACTS", "AddedBucket", "EngineLine", "KeyFile", "Secret", "add_bucket", "check_name",
    "check_readers", "engines_of", "require_bucket", "require_engine", "users_of",
]

ENGINES_PER_OWNER_MAX = 100
BUCKET_KINDS = (S3, GCS, DIRECTORY)
Secret = Annotated[str, Meta(max_length=300)]
KeyFile = Annotated[str, Meta(max_length=20_000)]


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
    access_key: Secret
    secret_key: Secret
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
    """Give the bucket ``engine`` (its name or id) other credentials; the old ones are gone.

    ``serviceAccount``: for one of Google's, the text of a service account's key file; ``accessKey`` and ``secretKey``:
    its HMAC key, or that of a bucket that speaks S3.
    """

    engine: str
    access_key: Secret = ""
    secret_key: Secret = ""
    service_account: KeyFile = ""

    def __repr__(self) -> str:
        return f"ChangeCredentials(engine={self.engine!r}, …)"


class RemoveEngine(Request, tag="removeEngine"):
    """Have the hub forget the bucket, or the pub/sub service, ``engine`` (its name or id) and its credentials. What is
    in a bucket stays. Refused while a channel uses it."""

    engine: str


class SetBucket(Request, tag="setBucket"):
    """Have ``channel`` use the bucket ``engine`` (the name or id of one of yours; null: the hub's own).

    It begins empty, as far as the channel is concerned; nodes upload again what is asked for.
    """

    channel: str
    engine: str | None = None


# --- answers


class EngineLine(Answer):
    """A bucket. ``kind``: ``s3``, ``gcs`` or ``directory``. ``channels``: those that use it. ``expireDays``: objects
    below the prefix go at that age; 0: the hub knows of no such rule. Times are in ms."""

    id: str
    name: str
    kind: str
    created: int
    bucket: str
    endpoint: str
    prefix: str
    public_reads: bool
    url: str
    channels: list[str]
    region: str = ""
    path_style: bool = True
    create_only: bool = True
    expire_days: int = 0


class EngineList(Answer):
    """Somebody's buckets, by name."""

    owner: str
    engines: list[EngineLine]


class EngineRemoved(Answer):
    """A bucket, or a pub/sub service, that the hub does not know any more."""

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
    return add_bucket(connection, actor, at, AddedBucket(
        request.name, S3, _settings_of(request), _s3_credentials(request.access_key, request.secret_key)))


class AddedBucket(NamedTuple):
    """A bucket that an owner wants the hub to know."""

    name: str
    kind: str
    settings: BucketSettings
    credentials: S3Credentials | GcsCredentials | None


def add_bucket(connection: Connection, actor: Actor, at: At, added: AddedBucket) -> Done:
    """Have the hub know a bucket. :raises InvalidArgument, AlreadyExists: as of ``check_name``."""
    settings = msgspec.json.encode(added.settings).decode()
    name = check_name(connection, actor.owner, added.name)
    engine_id = secrets.token_hex(8)
    connection.execute(engines.insert().values(
        id=engine_id, owner=actor.owner, kind=added.kind, name=name, settings=settings,
        secret=at.vault.seal(engine_id, settings, msgspec.json.encode(added.credentials)), created=at.now_ms))
    return Done(_line(connection, require_bucket(connection, actor.owner, engine_id)))


def _list(connection: Connection, actor: Actor, request: ListEngines, at: At) -> Done:
    return Done(EngineList(owner=actor.owner, engines=[
        _line(connection, row) for row in engines_of(connection, actor.owner, BUCKET_KINDS)]))


def _change_credentials(connection: Connection, actor: Actor, request: ChangeCredentials, at: At) -> Done:
    row = require_bucket(connection, actor.owner, request.engine)
    keys = request.access_key.strip(), request.secret_key.strip()
    if row.kind == DIRECTORY:
        raise InvalidArgument(what=f"The bucket {row.name!r} is a folder, which has no credentials.")
    if row.kind == S3 and request.service_account:
        raise InvalidArgument(what=f"The bucket {row.name!r} speaks S3, which has no service accounts.")
    credentials = (check_gcs_credentials(request.service_account, *keys) if row.kind == GCS else _s3_credentials(*keys))
    secret = at.vault.seal(row.id, row.settings, msgspec.json.encode(credentials))
    connection.execute(engines.update().where(engines.c.id == row.id).values(secret=secret))
    return Done(_line(connection, row))


def _remove(connection: Connection, actor: Actor, request: RemoveEngine, at: At) -> Done:
    row = require_engine(connection, actor.owner, request.engine)
    users = users_of(connection, row.id)
    if users:
        what = "bucket" if row.kind in BUCKET_KINDS else "pubsub"
        raise InvalidArgument(what=f"{row.name!r} is used by {', '.join(users)}. Set another one first: "
                                   f"kachery-fast channel {what} {users[0]} --own")
    connection.execute(engines.delete().where(engines.c.id == row.id))
    return Done(EngineRemoved(name=row.name))


def _set_bucket(connection: Connection, actor: Actor, request: SetBucket, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "set its bucket")
    row = None if request.engine is None else require_bucket(connection, actor.owner, request.engine)
    engine = None if row is None else row.id
    check_readers(connection, request.channel, engine)
    changed = connection.execute(channels_table.update().where(
        channels_table.c.name == request.channel, channels_table.c.bucket.is_distinct_from(engine),
    ).values(bucket=engine)).rowcount
    if changed:
        stop_move(connection, request.channel, "the channel was given another bucket meanwhile", at.now_ms)
    answer = BucketSet(channel=request.channel, engine=engine, name=None if row is None else row.name)

    async def tell(outside: Outside) -> BucketSet:
        outside.tell_nodes(request.channel)
        return answer

    return Done(tell)


ENGINE_ACTS = (
    Act(AddS3Bucket, EngineLine, Scope.MANAGE, _add_s3, first=_check_address),
    Act(ListEngines, EngineList, Scope.READ, _list, changes=False),
    Act(ChangeCredentials, EngineLine, Scope.MANAGE, _change_credentials),
    Act(RemoveEngine, EngineRemoved, Scope.MANAGE, _remove),
    Act(SetBucket, BucketSet, Scope.MANAGE, _set_bucket),
)


def check_readers(connection: Connection, channel: str, engine_id: str | None) -> None:
    """Make sure that a private channel is not to be in a bucket that everybody may read.

    :param engine_id: the bucket; None: the hub's own, which is for both. :raises InvalidArgument: it would be.
    """
    row = connection.execute(
        sa.select(channels_table.c.private, engines.c.name, engines.c.kind, engines.c.settings)
        .select_from(channels_table.join(engines, engines.c.id == engine_id))
        .where(channels_table.c.name == channel)).first()
    if row is not None and row.private and decode_settings(row.kind, row.settings).public_reads:
        raise InvalidArgument(what=f"The channel {channel!r} would be private, and everybody may read in the bucket "
                                   f"{row.name!r}. Choose another bucket, or make the channel public.")


def _settings_of(request: AddS3Bucket) -> S3Settings:
    path_style = bool(request.endpoint) if request.path_style is None else request.path_style
    return check_settings(S3Settings(
        bucket=request.bucket, endpoint=request.endpoint, region=request.region, prefix=request.prefix,
        path_style=path_style, public_reads=request.public_reads, create_only=request.create_only))


def _s3_credentials(access_key: str, secret_key: str) -> S3Credentials:
    return check_credentials(access_key.strip(), secret_key.strip())


def check_name(connection: Connection, owner: str, text: str) -> str:
    """Return what the owner may call another bucket or service. :raises AlreadyExists, InvalidArgument: he may not."""
    mine, name = engines_of(connection, owner), text.strip()
    if not name or not name.isprintable():
        raise InvalidArgument(what="Give it a name, of printable characters.")
    if any(name in (row.name, row.id) for row in mine):
        raise AlreadyExists(what=f"{name!r} of yours", advice="Have a channel use it, with --use, or choose another "
                                                              "name. See: kachery-fast channel engines")
    if len(mine) >= ENGINES_PER_OWNER_MAX:
        raise InvalidArgument(what=f"You have {len(mine)} buckets and services already; {ENGINES_PER_OWNER_MAX} are "
                                   "allowed.")
    return name


def require_bucket(connection: Connection, owner: str, named: str) -> Row[Any]:
    """Return the row of a bucket of this owner's. Raises as ``require_engine`` does."""
    return require_engine(connection, owner, named, BUCKET_KINDS)


def engines_of(connection: Connection, owner: str, kinds: Sequence[str] = ()) -> list[Row[Any]]:
    """An owner's engines of some kinds, or of all, by name."""
    wanted = sa.select(engines).where(engines.c.owner == owner).order_by(engines.c.name)
    return list(connection.execute(wanted.where(engines.c.kind.in_(kinds)) if kinds else wanted))


def require_engine(connection: Connection, owner: str, named: str, kinds: Sequence[str] = ()) -> Row[Any]:
    """An engine of this owner's; another's is as if it were not there. :raises NotOnHub: there is none."""
    for row in engines_of(connection, owner, kinds):
        if named in (row.id, row.name):
            return row
    kind = "bucket" if kinds == BUCKET_KINDS else "pub/sub service" if kinds else "bucket or pub/sub service"
    raise NotOnHub(kind=f"{kind} of yours", name=named, advice="See: kachery-fast channel engines")


def users_of(connection: Connection, engine_id: str) -> list[str]:
    """The channels that use an engine."""
    return list(connection.execute(
        sa.select(channels_table.c.name)
        .where((channels_table.c.bucket == engine_id) | (channels_table.c.pubsub == engine_id))
        .order_by(channels_table.c.name)).scalars())


def _line(connection: Connection, row: Row[Any]) -> EngineLine:
    settings = decode_settings(row.kind, row.settings)
    shown = ({"bucket": settings.folder, "endpoint": "", "prefix": "", "public_reads": True, "url": settings.folder}
             if isinstance(settings, DirectorySettings)  # its mark is for nodes
             else {**msgspec.structs.asdict(settings), "url": settings.url_base})
    return EngineLine(id=row.id, name=row.name, kind=row.kind, created=row.created,
                      channels=users_of(connection, row.id), **shown)
