"""Joining a hub without an invitation: the node shows a code, and waits until somebody says that it is his."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from .._version import __version__
from ..config import Settings
from ..errors import HubError, HubUnreachable, NotApproved
from ..net.hub import HubClient, check_hub_url
from ..protocol.hub_bodies import ApprovalAsked, ApprovalState
from .identity import load_identity
from .membership import read_node_file, remember_hub

__all__ = ["Joined", "join_hub"]

_log = logging.getLogger("kachery_fast.node")


class Joined(NamedTuple):
    """A node that is somebody's.

    ``standing``: on the channel that was named, "asked", "member", "removed", or empty for none. ``channels``: what it
    may do on each channel that it is a member of.
    """

    hub: str
    node_id: str
    owner: str
    standing: str
    channels: dict[str, list[str]]


def join_hub(
    settings: Settings, url: str, *, label: str | None, channel: str | None, permissions: list[str] | None,
    show: Callable[[ApprovalAsked, float], None],
) -> Joined:
    """Become somebody's node at a hub, and remember the hub; with ``channel`` also ask to be let in there.

    What was decided since an earlier call that was broken off counts, and no new code is made then.

    :param permissions: what to ask for on the channel; the six when None.
    :param show: called with the code that is to be entered at the hub, and the seconds for which it holds.
    :raises NotApproved: the code was denied, or has expired. :raises NotOnHub: there is no such channel.
    :raises KacheryError: the address is malformed, or the hub out of reach.
    """
    url = check_hub_url(url)
    identity = load_identity(settings.storage_dir, settings.node_private_key)
    name = label if label is not None else read_node_file(settings.storage_dir).label
    wanted = (permissions or ["all"]) if channel else []

    async def ask() -> Joined:
        async with HubClient(url, identity.key, settings) as hub:
            found = await hub.find_approval(channel or "")
            if not found.owner or (channel and found.standing not in ("asked", "member")):
                asked = await hub.ask_approval(name, __version__, channel or "", wanted)
                life_seconds = max(60.0, (asked.expires - hub.now_ms()) / 1000)
                show(asked, life_seconds)
                found = await _decided(hub, channel or "", asked.interval, life_seconds)
            config = await hub.node_config(name, __version__)
        return Joined(url, identity.node_id, config.owner, found.standing,
                      {info.name: info.permissions for info in config.channels})

    joined = asyncio.run(ask())
    remember_hub(settings, name, url)
    return joined


async def _decided(hub: HubClient, channel: str, interval_seconds: float, life_seconds: float) -> ApprovalState:
    """Ask until somebody has decided. A hub that is away for a while is waited for."""
    end = time.monotonic() + life_seconds
    while True:
        await asyncio.sleep(interval_seconds)
        try:
            found = await hub.find_approval(channel)
        except (HubUnreachable, HubError) as error:
            if time.monotonic() > end:
                raise
            _log.info("still waiting to be approved: %s", error)
            continue
        if found.state == "approved" and found.owner:
            return found
        if found.state != "waiting":
            why = "whoever entered the code denied it" if found.state == "denied" else "nobody entered the code in time"
            raise NotApproved(hub=hub.url, why=why)
