"""Channels and their settings. The functions run inside ``Registry.call``."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from ..errors import AlreadyExists, InvalidArgument, NotOnHub, NotPermitted
from ..protocol.names import check_channel_name
from .actions import Answer
from .grants import MEMBER, in_force
from .tables import bucket_moves, channels, invitations, memberships, nodes, task_claims, usage

__all__ = [
    "CHANGEABLE", "ChannelLine", "ChannelSettings", "change_channel", "create_channel", "delete_channel",
    "find_settings", "list_channels", "list_public", "require_channel", "unknown_channel",
]

CHANNELS_PER_OWNER_MAX = 1_000
DESCRIPTION_LENGTH_MAX = 1_000
# What the database can hold.
_NUMBER_MAX = 2**53
CHANGEABLE = ("description", "listed", "private", "inviters", "size_bytes_max", "unread_days_max", "node_day_bytes_max")


class ChannelLine(Answer):
    """A channel in a list: its name, when it was made (ms), and how many nodes are on it."""

    name: str
    created: int
    members: int


class ChannelSettings(Answer):
    """A channel and what its owner has set; null: no limit."""

    channel: str
    owner: str
    created: int
    description: str
    listed: bool
    private: bool
    inviters: str
    size_bytes_max: int | None
    unread_days_max: int | None
    node_day_bytes_max: int | None

    def fields(self) -> dict[str, Any]:
        """By name, for an answer that says more."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


def create_channel(connection: Connection, name: str, owner: str, now_ms: int) -> None:
    """Make a channel.

    :raises InvalidName: the name cannot be one. :raises AlreadyExists: it is taken, in whichever case.
    :raises InvalidArgument: the owner has too many.
    """
    check_channel_name(name)
    taken = connection.execute(sa.select(channels.c.name).where(channels.c.folded == name.lower())).scalar()
    if taken is not None:
        raise AlreadyExists(what=f"The channel {taken!r}", advice="Choose another name.")
    count = connection.execute(
        sa.select(sa.func.count()).select_from(channels).where(channels.c.owner == owner)).scalar_one()
    if count >= CHANNELS_PER_OWNER_MAX:
        raise InvalidArgument(what=f"{owner} has {count} channels already; {CHANNELS_PER_OWNER_MAX} are allowed.")
    connection.execute(channels.insert().values(name=name, folded=name.lower(), owner=owner, created=now_ms))


def require_channel(connection: Connection, name: str, owner: str, action: str) -> ChannelSettings:
    """Return the settings of a channel that ``owner`` owns.

    :raises NotOnHub: there is no such channel. :raises NotPermitted: it is another owner's.
    """
    found = find_settings(connection, name)
    if found.owner != owner:
        raise NotPermitted(who=owner, action=action, channel=name, why="it belongs to another owner")
    return found


def find_settings(connection: Connection, name: str) -> ChannelSettings:
    """Return the settings of a channel. :raises NotOnHub: there is no such channel."""
    row = connection.execute(sa.select(channels).where(channels.c.name == name)).first()
    if row is None:
        raise unknown_channel(name)
    return _settings(row)


def list_channels(connection: Connection, owner: str) -> list[ChannelLine]:
    """Return the channels of ``owner``, by name."""
    count = sa.select(sa.func.count()).select_from(memberships.join(nodes, in_force)).where(
        memberships.c.channel == channels.c.name).scalar_subquery()
    rows = connection.execute(
        sa.select(channels.c.name, channels.c.created, count.label("members"))
        .where(channels.c.owner == owner).order_by(channels.c.name))
    return [ChannelLine(name=row.name, created=row.created, members=row.members) for row in rows]


def list_public(connection: Connection) -> frozenset[str]:
    """Return the names, in lower case, of the channels that everybody may read."""
    return frozenset(connection.execute(sa.select(channels.c.folded).where(~channels.c.private)).scalars())


def change_channel(connection: Connection, name: str, changed: dict[str, Any]) -> ChannelSettings:
    """Set what is in ``changed`` (of ``CHANGEABLE``); return all settings.

    :raises InvalidArgument: a limit is not a positive number, or the description too long.
    """
    for field in ("size_bytes_max", "unread_days_max", "node_day_bytes_max"):
        value = changed.get(field)
        if value is not None and not 1 <= value <= (_NUMBER_MAX if field.endswith("bytes_max") else 36_500):
            raise InvalidArgument(what=f"{field} is a positive number, or null for no limit; not {value}.")
    description = changed.get("description", "")
    if len(description) > DESCRIPTION_LENGTH_MAX:
        raise InvalidArgument(what=f"A description has up to {DESCRIPTION_LENGTH_MAX} characters, not "
                                   f"{len(description)}.")
    if changed:
        connection.execute(channels.update().where(channels.c.name == name).values(**changed))
    return find_settings(connection, name)


def delete_channel(connection: Connection, name: str) -> list[str]:
    """Remove a channel and all that is kept about it; return the ids of the nodes that were on it."""
    members = [str(row.node) for row in connection.execute(
        sa.select(memberships.c.node).where(memberships.c.channel == name, memberships.c.state == MEMBER))]
    for table in (memberships, invitations, task_claims, usage, bucket_moves):
        connection.execute(table.delete().where(table.c.channel == name))
    connection.execute(channels.delete().where(channels.c.name == name))
    return members


def _settings(row: Row[Any]) -> ChannelSettings:
    return ChannelSettings(channel=row.name, owner=row.owner, created=row.created,
                           **{name: getattr(row, name) for name in CHANGEABLE})


def unknown_channel(name: str) -> NotOnHub:
    """What is said of a channel that is not there, or that somebody is not to know of."""
    return NotOnHub(kind="channel", name=name, advice="See: kachery-fast channel list")
