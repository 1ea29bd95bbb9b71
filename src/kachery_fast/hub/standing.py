"""What is known of a node that asks for something, read in one transaction. The functions run inside ``Registry.call``.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy.engine import Connection

from ..protocol.access import Grant, Permission
from ..protocol.hub_bodies import (
    AskApproval,
    GetPubsubToken,
    HubBody,
    JoinChannel,
    PubsubInfo,
    ReportBadResult,
    ReportCorrupt,
    SignDownloads,
)
from . import channels, grants, identity, invitations, seen
from .buckets import BucketPlace, Buckets, find_engines
from .engines import BucketEngine, PubsubEngine
from .pubsubs import Pubsubs
from .quotas import Limits, find_limits
from .uploads import UploadBody
from .usage import Place

__all__ = [
    "ChannelPlace", "Standing", "find_allowance", "find_public", "find_standing", "join_once", "list_standings",
]

# What is about objects.
_BucketBody = UploadBody | SignDownloads | ReportCorrupt | ReportBadResult


class Standing(NamedTuple):
    """A node, its grant on the channel that it asks about, and what goes with it.

    ``limits``: of an upload. ``bucket``: that of the channel, where the request is about objects and there is a grant;
    ``pubsub``: its pub/sub service, where the request is for a token and there is a grant.
    ``repeated``: whether any hub has seen this request of it before.
    """

    node: identity.NodeRecord | None
    grant: Grant | None
    limits: Limits
    bucket: BucketEngine | None
    pubsub: PubsubEngine | None
    repeated: bool


class ChannelPlace(NamedTuple):
    """Where the objects of a channel are, and where its bands."""

    bucket: BucketPlace
    pubsub: PubsubInfo


def find_standing(
    connection: Connection, place: Place, body: HubBody, buckets: Buckets, pubsubs: Pubsubs, *, shared: bool
) -> Standing:
    """Return what is known of a node that asks for ``body``.

    :param shared: whether there may be other hubs.
    :raises CredentialsUnreadable: those of the channel's bucket, or of its pub/sub service.
    """
    grant, limits, bucket = find_allowance(
        connection, place, buckets if isinstance(body, _BucketBody) else None, limited=isinstance(body, UploadBody))
    pubsub = pubsubs.of(connection, place.channel) if grant is not None and isinstance(body, GetPubsubToken) else None
    node = identity.find_node(connection, place.node)
    # What strangers ask for is refused anyway, and would fill the table.
    counts = shared and node is not None and not isinstance(body, JoinChannel | AskApproval)
    repeated = counts and not seen.remember(connection, place.node, body.id, body.time)
    return Standing(node, grant, limits, bucket, pubsub, repeated)


def find_allowance(
    connection: Connection, place: Place, buckets: Buckets | None, *, limited: bool = True
) -> tuple[Grant | None, Limits, BucketEngine | None]:
    """Return a node's grant, the limits of its uploads, and the channel's bucket (with ``buckets``, for a grant)."""
    grant = grants.find_grant(connection, place.node, place.channel) if place.channel else None
    limits = find_limits(connection, place) if limited else Limits(None, None, None)
    return grant, limits, None if buckets is None or grant is None else buckets.of(connection, place.channel)


def find_public(
    connection: Connection, channel: str, buckets: Buckets, pubsubs: Pubsubs
) -> tuple[channels.ChannelSettings, ChannelPlace]:
    """Return a channel's settings, and where it is. :raises NotOnHub: there is no such channel."""
    return channels.find_settings(connection, channel), _place(connection, channel, buckets, pubsubs)


def list_standings(
    connection: Connection, node_id: str, buckets: Buckets, pubsubs: Pubsubs
) -> list[tuple[Grant, str, bool, ChannelPlace]]:
    """Return a node's grants, each with the channel's owner, whether it is private, and where it is."""
    return [(grant, owner, private, _place(connection, grant.channel, buckets, pubsubs))
            for grant, owner, private in grants.list_node_grants(connection, node_id)]


def _place(connection: Connection, channel: str, buckets: Buckets, pubsubs: Pubsubs) -> ChannelPlace:
    bucket, pubsub = find_engines(connection, channel)
    return ChannelPlace(buckets.place(bucket), pubsubs.info(pubsub))


def join_once(
    connection: Connection, body: JoinChannel, node_id: str, requested: frozenset[Permission], now_ms: int, *,
    shared: bool,
) -> Grant | None:
    """Join, unless any hub has seen this request before: None. A join that fails is not remembered."""
    if shared and not seen.remember(connection, node_id, body.id, body.time):
        return None
    return invitations.join_channel(connection, node_id, body.invitation, body.label, requested, now_ms)
