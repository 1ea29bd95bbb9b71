"""The hubs that a node belongs to, kept in ``kachery-fast.json`` of its storage directory.

Which channels it is on, and with which permissions, is the hub's to say; the file only names the hubs.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ..config import Settings
from ..errors import ChannelUnknown, DiskError, InvalidArgument, NodeError
from ..net.hub import HubClient, check_hub_url, split_invitation
from ..protocol.access import Permission
from ..protocol.hub_bodies import ChannelInfo
from .identity import load_identity, write_whole

__all__ = ["NodeFile", "join", "leave", "read_node_file", "remember_hub", "set_label", "use_hub"]


class HubEntry(msgspec.Struct):
    """A hub that this node is registered at."""

    url: str


class NodeFile(msgspec.Struct):
    """What ``kachery-fast.json`` holds. ``label`` names the node for people."""

    label: str = ""
    hubs: list[HubEntry] = []


def read_node_file(storage_dir: Path) -> NodeFile:
    """Read the node's configuration; without a file, that of a node without hubs.

    :raises NodeError: the file is damaged. :raises DiskError: it cannot be read.
    """
    path = _path(storage_dir)
    try:
        node_file = msgspec.json.decode(path.read_bytes(), type=NodeFile)
        for entry in node_file.hubs:
            check_hub_url(entry.url)
        return node_file
    except FileNotFoundError:
        return NodeFile(label=socket.gethostname())
    except OSError as error:
        raise DiskError(action="the reading", path=str(path), why=error.strerror or str(error)) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, InvalidArgument) as error:
        raise NodeError(
            what=f"{path} is damaged ({error}). Mend it, or delete it and join the channels again.") from None


def join(settings: Settings, link: str, *, label: str | None = None,
         permissions: list[str] | None = None) -> dict[str, Any]:
    """Use an invitation: make this node a member of a channel, and remember the hub.

    :param permissions: what to ask for; the six when None. What is in force is what the channel's owner grants of it.
    :return: ``hub``, ``owner``, ``channel``, ``permissions`` (in force) and ``nodeId``.
    :raises KacheryError: the link is malformed, the hub out of reach, the invitation unknown, expired or used up.
    """
    url, code = split_invitation(link)
    identity = load_identity(settings.storage_dir, settings.node_private_key)
    name = label if label is not None else read_node_file(settings.storage_dir).label

    async def ask() -> ChannelInfo:
        hub = HubClient(url, identity.key, settings)
        try:
            return await hub.join(code, name, permissions or [permission.value for permission in Permission])
        finally:
            await hub.close()

    joined = asyncio.run(ask())
    remember_hub(settings, name, url)
    return {"hub": url, "owner": joined.owner, "channel": joined.name, "permissions": joined.permissions,
            "nodeId": identity.node_id}


def remember_hub(settings: Settings, label: str, url: str) -> None:
    """Note that this node is registered at a hub. :raises NodeError, DiskError: as ``read_node_file``."""
    with _changed(settings.storage_dir) as node_file:
        node_file.label = label
        if all(entry.url != url for entry in node_file.hubs):
            node_file.hubs.append(HubEntry(url))


def use_hub(settings: Settings, url: str, *, label: str | None = None) -> list[str]:
    """Remember a hub at which this node's key has been registered before, from another storage directory.

    :return: the names of its channels there.
    :raises KacheryError: the address is malformed, the hub out of reach, or the node not registered there.
    """
    url = check_hub_url(url)
    identity = load_identity(settings.storage_dir, settings.node_private_key)
    name = label if label is not None else read_node_file(settings.storage_dir).label

    async def ask() -> list[str]:
        hub = HubClient(url, identity.key, settings)
        try:
            return [info.name for info in (await hub.node_config(name, "")).channels]
        finally:
            await hub.close()

    found = asyncio.run(ask())
    remember_hub(settings, name, url)
    return found


def leave(settings: Settings, channel: str) -> None:
    """Take this node off a channel, at every hub where it is a member of one of that name.

    :raises ChannelUnknown: there is none.
    """
    identity = load_identity(settings.storage_dir, settings.node_private_key)
    hubs = read_node_file(settings.storage_dir).hubs

    async def ask() -> list[str]:
        known: list[str] = []
        left = False
        for entry in hubs:
            hub = HubClient(entry.url, identity.key, settings)
            try:
                names = [info.name for info in (await hub.node_config("", "")).channels]
                known += names
                if channel in names:
                    await hub.leave(channel)
                    left = True
            finally:
                await hub.close()
        return [] if left else (known or ["none"])

    known = asyncio.run(ask()) if hubs else ["none"]
    if known:
        raise ChannelUnknown(channel=channel, known=", ".join(known))


def set_label(storage_dir: Path, label: str) -> None:
    """Change the node's name for people. :raises NodeError, DiskError: as ``read_node_file``."""
    with _changed(storage_dir) as node_file:
        node_file.label = label


def _path(storage_dir: Path) -> Path:
    return storage_dir / "kachery-fast.json"


@contextmanager
def _changed(storage_dir: Path) -> Iterator[NodeFile]:
    """Change the file: read, yielded, and written, by one process at a time.

    :raises NodeError, DiskError: as ``read_node_file``; nothing was written.
    """
    lock = -1
    try:
        storage_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(storage_dir / ".kachery-fast.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        node_file = read_node_file(storage_dir)
        yield node_file
        data = msgspec.json.format(msgspec.json.encode(node_file), indent=2)
        write_whole(_path(storage_dir), data.decode() + "\n", 0o600)
    except OSError as error:
        raise DiskError(action="the writing", path=str(_path(storage_dir)),
                        why=error.strerror or str(error)) from None
    finally:
        if lock >= 0:
            os.close(lock)
