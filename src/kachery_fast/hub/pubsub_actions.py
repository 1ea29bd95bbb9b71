"""What people do with pub/sub services of their own: add them, say which channel uses which, and renew their
credentials, which go one way, into the vault. ``engine_actions`` takes them away again."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from sqlalchemy.engine import Connection, Row

from ..errors import InvalidArgument
from . import channels, grants
from .actions import Act, Actor, Answer, At, Done, Outside, Request, Scope
from .engine_actions import check_name, engines_of, require_engine, users_of
from .engines.ably import AblyCredentials, AblySettings, check_ably
from .engines.nats import NatsCredentials, NatsSettings, check_nats
from .pubsubs import ABLY, NATS, PUBSUB_KINDS, find_pubsub, settings_of
from .tables import channels as channels_table
from .tables import engines

__all__ = ["PUBSUB_ACTS"]

_Name = Annotated[str, Meta(min_length=1, max_length=100)]
_Secret = Annotated[str, Meta(max_length=300)]
_Settings = AblySettings | NatsSettings
_Credentials = AblyCredentials | NatsCredentials


# --- requests


class AddAbly(Request, tag="addAbly"):
    """Have the hub know an account of yours at Ably as ``name``; ``setPubsub`` then lets a channel use it.

    ``apiKey``: an API key that may publish and subscribe (``APP.KEY:SECRET``); kept encrypted, and never shown.
    ``endpoint``: the address of another server that speaks Ably's protocol, "" for Ably's.
    """

    name: _Name
    api_key: _Secret
    endpoint: Annotated[str, Meta(max_length=300)] = ""

    def __repr__(self) -> str:
        return f"AddAbly(name={self.name!r}, …)"


class AddNats(Request, tag="addNats"):
    """Have the hub know an account of yours at a NATS server as ``name``; ``setPubsub`` then lets a channel use it.

    ``url``: the server's (``nats://``, ``tls://``, ``ws://`` or ``wss://``). ``account``: the account's id (``A…``).
    ``seed``: that of the account's key, or better of a signing key of it (``SA…``); kept encrypted, and never shown.
    """

    name: _Name
    url: Annotated[str, Meta(max_length=300)]
    account: Annotated[str, Meta(max_length=100)]
    seed: _Secret

    def __repr__(self) -> str:
        return f"AddNats(name={self.name!r}, …)"


class ListPubsubs(Request, tag="listPubsubs"):
    """My pub/sub services, without their credentials, and the channels that use them."""


class ChangePubsubCredentials(Request, tag="changePubsubCredentials"):
    """Give the pub/sub service ``engine`` (its name or id) another API key of the same name, or another seed; the old
    one is gone."""

    engine: str
    secret: _Secret

    def __repr__(self) -> str:
        return f"ChangePubsubCredentials(engine={self.engine!r}, …)"


class SetPubsub(Request, tag="setPubsub"):
    """Have the messages of ``channel`` go by the pub/sub service ``engine`` (the name or id of one of yours; null: the
    hub's own broker). Its nodes move there by themselves."""

    channel: str
    engine: str | None = None


# --- answers


class PubsubLine(Answer):
    """A pub/sub service. ``account``: the part of the credentials that is no secret: the name of Ably's key, the id of
    NATS's account. ``channels``: those that use it. Times are in ms."""

    id: str
    name: str
    kind: str
    created: int
    url: str
    account: str
    channels: list[str]


class PubsubList(Answer):
    """Somebody's pub/sub services, by name."""

    owner: str
    engines: list[PubsubLine]


class PubsubSet(Answer):
    """By which pub/sub service a channel's messages go now; null: the hub's own broker."""

    channel: str
    engine: str | None
    name: str | None


# --- how they are performed


async def _check_address(request: AddAbly | AddNats, outside: Outside) -> None:
    """Nodes are sent there as soon as a channel uses it."""
    settings, _ = _checked(request)
    if isinstance(settings, NatsSettings) or settings.endpoint:  # Ably's own are no secret
        await asyncio.get_running_loop().run_in_executor(None, outside.buckets.outbound.address, *settings.server)


def _checked(request: AddAbly | AddNats) -> tuple[_Settings, _Credentials]:
    if isinstance(request, AddAbly):
        return check_ably(request.api_key, request.endpoint.strip())
    return check_nats(request.url, request.account, request.seed)


def _add(connection: Connection, actor: Actor, request: AddAbly | AddNats, at: At) -> Done:
    found, credentials = _checked(request)
    name = check_name(connection, actor.owner, request.name)
    engine_id, settings = secrets.token_hex(8), msgspec.json.encode(found).decode()
    connection.execute(engines.insert().values(
        id=engine_id, owner=actor.owner, kind=ABLY if isinstance(request, AddAbly) else NATS, name=name,
        settings=settings, secret=at.vault.seal(engine_id, settings, msgspec.json.encode(credentials)),
        created=at.now_ms))
    return Done(_line(connection, require_engine(connection, actor.owner, engine_id, PUBSUB_KINDS)))


def _list(connection: Connection, actor: Actor, request: ListPubsubs, at: At) -> Done:
    return Done(PubsubList(owner=actor.owner, engines=[
        _line(connection, row) for row in engines_of(connection, actor.owner, PUBSUB_KINDS)]))


def _change_credentials(connection: Connection, actor: Actor, request: ChangePubsubCredentials, at: At) -> Done:
    row = require_engine(connection, actor.owner, request.engine, PUBSUB_KINDS)
    settings = settings_of(row)
    credentials: _Credentials
    if isinstance(settings, AblySettings):
        found, credentials = check_ably(request.secret, settings.endpoint)
        if found != settings:
            raise InvalidArgument(what=f"The key of {row.name!r} is {settings.key_name}, not {found.key_name}. Add "
                                       "another one under another name.")
    else:
        _, credentials = check_nats(settings.url, settings.account, request.secret)
    connection.execute(engines.update().where(engines.c.id == row.id).values(
        secret=at.vault.seal(row.id, row.settings, msgspec.json.encode(credentials))))
    return Done(_line(connection, row))


def _set(connection: Connection, actor: Actor, request: SetPubsub, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "set its pub/sub service")
    row = None if request.engine is None else require_engine(connection, actor.owner, request.engine, PUBSUB_KINDS)
    before = find_pubsub(connection, request.channel)
    changed = (None if before is None else before.id) != (None if row is None else row.id)
    connection.execute(channels_table.update().where(channels_table.c.name == request.channel).values(
        pubsub=None if row is None else row.id))
    # Who is cut off asks for a token, and learns by it that there is another place. Some services do not cut off.
    members = [member.grant.node_id for member in grants.list_members(connection, request.channel)] if changed else []
    answer = PubsubSet(channel=request.channel, engine=None if row is None else row.id,
                       name=None if row is None else row.name)

    async def tell(outside: Outside) -> PubsubSet:
        if changed and before is not None:
            outside.tell_nodes(request.channel, at=before)
        return answer

    return Done(tell, cut=tuple(members))


def _line(connection: Connection, row: Row[Any]) -> PubsubLine:
    settings = settings_of(row)
    return PubsubLine(
        id=row.id, name=row.name, kind=row.kind, created=row.created, channels=users_of(connection, row.id),
        url=settings.url, account=settings.key_name if isinstance(settings, AblySettings) else settings.account)


PUBSUB_ACTS = (
    Act(AddAbly, PubsubLine, Scope.MANAGE, _add, first=_check_address),
    Act(AddNats, PubsubLine, Scope.MANAGE, _add, first=_check_address),
    Act(ListPubsubs, PubsubList, Scope.READ, _list, changes=False),
    Act(ChangePubsubCredentials, PubsubLine, Scope.MANAGE, _change_credentials),
    Act(SetPubsub, PubsubSet, Scope.MANAGE, _set),
)
