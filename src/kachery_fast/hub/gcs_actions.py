"""What people do with buckets of Google Cloud Storage: have the hub know them, and set them up."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

from msgspec import Meta
from sqlalchemy.engine import Connection

from ..errors import EngineUnusable, InvalidArgument, KacheryError
from .actions import Act, Actor, Answer, At, Done, Outside, Request, Scope
from .buckets import EngineRow
from .engine_actions import AddedBucket, EngineLine, KeyFile, Secret, add_bucket, require_bucket
from .engines.gcs_settings import GCS, GcsSettings, check_gcs_credentials, check_gcs_settings, is_google

__all__ = ["GCS_ACTS"]


class AddGcsBucket(Request, tag="addGcsBucket"):
    """Have the hub know a bucket of Google Cloud Storage as ``name``; ``setBucket`` then lets a channel use it.

    ``serviceAccount``: the text of a service account's key file (JSON), of which its name and key are used, and no
    address. ``accessKey`` and ``secretKey``: an HMAC key, by which URLs are signed faster; one of the two is enough.
    ``endpoint``: another address of Google's, or a server that the hub's admin trusts, which speaks as Google's.
    ``prefix``: before the names of all objects. ``publicReads``: everybody may read there who knows a name, so nodes
    need no signed URLs. ``expireDays``: ``setUpBucket`` has objects below the prefix go at that age. The credentials
    are kept encrypted, and never shown.
    """

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    bucket: str
    service_account: KeyFile = ""
    access_key: Secret = ""
    secret_key: Secret = ""
    endpoint: str = ""
    prefix: str = ""
    public_reads: bool = False
    expire_days: int = 0

    def __repr__(self) -> str:
        return f"AddGcsBucket(name={self.name!r}, …)"


class SetUpBucket(Request, tag="setUpBucket"):
    """Set in the bucket of Google's ``engine`` (its name or id) what is set once for the whole: that browsers may read
    (CORS), and its ``expireDays`` (lifecycle), below its prefix alone. Rules that are there stay."""

    engine: str


class SetUpStep(Answer):
    """One thing that was set. ``why``: what is wrong, "" where nothing is; ``advice``: what to do about it."""

    name: str
    ok: bool
    why: str = ""
    advice: str = ""


class BucketSetUp(Answer):
    """What came of it. ``ok``: whether every step went well."""

    name: str
    ok: bool
    steps: list[SetUpStep]


async def _check_address(request: AddGcsBucket, outside: Outside) -> None:
    """Nodes are sent there from the first signed URL on, so that it is looked at before there is one."""
    settings, outbound = _settings_of(request), outside.buckets.outbound
    if not request.endpoint:
        return
    if not is_google(settings.endpoint) and not outbound.trusts(settings.endpoint):
        raise InvalidArgument(what=f"{settings.endpoint} is neither Google's nor trusted by this hub's admin "
                                   "(KACHERY_HUB_ENGINE_HOSTS).")
    await asyncio.get_running_loop().run_in_executor(None, outbound.check, settings.bucket_url)


def _add(connection: Connection, actor: Actor, request: AddGcsBucket, at: At) -> Done:
    credentials = check_gcs_credentials(request.service_account, request.access_key.strip(), request.secret_key.strip())
    settings = _settings_of(request)
    if settings.expire_days and not credentials.private_key:
        raise InvalidArgument(what="Only by a service account's key can objects be made to expire.")
    return add_bucket(connection, actor, at, AddedBucket(request.name, GCS, settings, credentials))


def _set_up(connection: Connection, actor: Actor, request: SetUpBucket, at: At) -> Done:
    row = require_bucket(connection, actor.owner, request.engine)
    if row.kind != GCS:
        raise InvalidArgument(what=f"The bucket {row.name!r} is not one of Google's: nothing has to be set there.")
    return Done(partial(_set, EngineRow(*(getattr(row, name) for name in EngineRow._fields))))


async def _set(row: EngineRow, outside: Outside) -> Answer:
    steps = await outside.buckets.run(_steps, row, outside, own=False)
    return BucketSetUp(name=row.name, ok=all(step.ok for step in steps), steps=steps)


def _steps(row: EngineRow, outside: Outside) -> list[SetUpStep]:
    from .engines.gcs import GcsBucket

    bucket, steps = outside.buckets.use(row), []
    assert isinstance(bucket, GcsBucket), "the row is of that kind"
    for name, work in bucket.set_up():
        try:
            work()
        except EngineUnusable as error:
            steps.append(SetUpStep(name=name, ok=False, why=str(error.details["why"]),
                                   advice=str(error.details["advice"])))
        except KacheryError as error:
            steps.append(SetUpStep(name=name, ok=False, why=error.message))
        else:
            steps.append(SetUpStep(name=name, ok=True))
    return steps


def _settings_of(request: AddGcsBucket) -> GcsSettings:
    return check_gcs_settings(GcsSettings(
        bucket=request.bucket, endpoint=request.endpoint, prefix=request.prefix, public_reads=request.public_reads,
        expire_days=request.expire_days))


GCS_ACTS = (
    Act(AddGcsBucket, EngineLine, Scope.MANAGE, _add, first=_check_address),
    Act(SetUpBucket, BucketSetUp, Scope.MANAGE, _set_up),
)
