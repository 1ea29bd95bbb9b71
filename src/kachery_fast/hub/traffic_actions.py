"""What moves on a channel's bands, for its owner to watch."""

from __future__ import annotations

from functools import partial

from sqlalchemy.engine import Connection

from ..protocol.names import BAND_KINDS, band_name
from . import channels, grants
from .actions import Act, Actor, Answer, At, Done, Outside, Request, Scope
from .pubsubs import find_pubsub

__all__ = ["TRAFFIC_ACTS", "ShowTraffic", "TrafficView"]


class ShowTraffic(Request, tag="showTraffic"):
    """What was published on the bands of ``channel`` in the last minute, and who listens."""

    channel: str


class Listener(Answer):
    """A node that is connected."""

    node: str
    label: str


class BandLine(Answer):
    """A band, by its kind. ``messages``: how many in each of the last 60 seconds, the oldest first; ``size_bytes``: of
    the payloads of all these; ``listeners``: how many nodes receive what is published, at this hub."""

    band: str
    messages: list[int]
    size_bytes: int
    listeners: int


class TrafficView(Answer):
    """The bands of a channel; none where its pub/sub service does not tell. ``nodes``: those that listen to any."""

    channel: str
    bands: list[BandLine]
    nodes: list[Listener]


def _show(connection: Connection, actor: Actor, request: ShowTraffic, at: At) -> Done:
    settings = channels.require_channel(connection, request.channel, actor.owner, "see its traffic")
    members = grants.list_members(connection, settings.channel)
    if find_pubsub(connection, settings.channel) is not None:
        return Done(TrafficView(channel=settings.channel, bands=[], nodes=[]))
    return Done(partial(_measure, settings.channel, {member.grant.node_id: member.label for member in members}))


async def _measure(channel: str, labels: dict[str, str], outside: Outside) -> TrafficView:
    lines: list[BandLine] = []
    nodes: set[str] = set()
    for kind in BAND_KINDS:
        traffic = outside.pubsubs.own.traffic(band_name(channel, kind))
        lines.append(BandLine(band=kind, messages=list(traffic.messages), size_bytes=traffic.size_bytes,
                              listeners=len(traffic.listeners)))
        nodes |= traffic.listeners
    listeners = [Listener(node=node, label=labels.get(node, "")) for node in nodes]
    return TrafficView(channel=channel, bands=lines, nodes=sorted(listeners, key=lambda one: (one.label, one.node)))


TRAFFIC_ACTS = (Act(ShowTraffic, TrafficView, Scope.READ, _show, changes=False),)
