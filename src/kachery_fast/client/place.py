"""Where a client stores: in a directory of this machine, or through the node that has another one.

A store that the node does not know is found by nobody else. So when a node answers, its id is compared with the one
that stands in the local storage directory, as the client of 2022 does. Where they are the same, the directory is the
node's store, whatever path it has here, and is used directly. Where they differ, files and mutables go through the
node's API; but where KACHERY_STORAGE_DIR is not set, and the node's own directory is on this machine, that one is used.
This is found out once for a process, and again from time to time only while no node answers.
"""

from __future__ import annotations

import enum
import ipaddress
import math
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config import Settings, load_settings
from ..errors import KacheryError
from .connection import NodeConnection

__all__ = ["Place", "PlaceKind", "client_settings", "find_place", "is_this_machine", "local_settings"]

# Where no node answered, it is asked for again after this, but no more than a twentieth of the time is spent on that.
_ALONE_SECONDS = 10.0
_ALONE_FACTOR = 20.0
_NODE_ID_SIZE_BYTES_MAX = 200


class PlaceKind(enum.Enum):
    """Whose the local storage directory is: nobody's but the client's, the node's, or another than the node's."""

    ALONE = "alone"
    SHARED = "shared"
    APART = "apart"


class Place(NamedTuple):
    """Where this process stores. ``settings`` are those of the environment, with the storage directory that is used
    and where its node's code is; ``text`` says for people how that came; ``store`` is where the store of a node is
    that has another one; ``machine`` is the node's where that is another one, and the storage directory is, or may
    be, the node's: its databases must not be opened here (https://sqlite.org/wal.html)."""

    settings: Settings
    kind: PlaceKind
    text: str
    store: str = ""
    machine: str = ""

    def why_node(self, otherwise: str) -> str:
        """Return why the node is needed to store, as part of a sentence; ``otherwise``: in the node's own directory."""
        own = self.settings.storage_dir
        if self.kind is PlaceKind.APART:
            return f"{own} is not its store"
        return f"{own} is its store, on {self.machine}" if self.machine else otherwise


_kept: tuple[tuple[Settings, bool, bool], Place, float] | None = None


def find_place(*, anew: bool = False) -> Place:
    """Return where this process stores, by the environment of now.

    :param anew: ask the node also where the answer is known already.
    """
    global _kept
    settings = load_settings()
    kept, now = _kept, time.monotonic()
    # The very same settings are of the same environment; looking that up costs more than all the rest.
    if (kept is not None and not anew and now < kept[2]
            and (settings is kept[0][0] or _key(settings) == kept[0])):
        return kept[1]
    key = _key(settings)
    place = _decide(*key)
    took = time.monotonic() - now
    again = max(_ALONE_SECONDS, _ALONE_FACTOR * took) if place.kind is PlaceKind.ALONE else math.inf
    _kept = key, place, now + took + again
    return place


def client_settings() -> Settings:
    """Return the settings with which the node is called: its storage directory is the one that ``find_place`` found.

    Where a directory is named, and the node's code is at hand, nothing has to be found out.
    """
    settings = load_settings()
    if settings.offline_storage_dir or (os.environ.get("KACHERY_STORAGE_DIR") and _has_code(settings)):
        return settings
    return find_place().settings


def local_settings() -> Settings:
    """Return the settings with the storage directory to look in, which is the node's where none is named.

    Where one is named, no node is asked.
    """
    settings = load_settings()
    if settings.offline_storage_dir or os.environ.get("KACHERY_STORAGE_DIR"):
        return settings
    return find_place().settings


def is_this_machine(host: str) -> bool:
    """Whether a host's name or address is one of this machine."""
    try:
        found = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    return any(_is_own(family, address) for family, _, _, _, address in found)


def _is_own(family: int, address: Any) -> bool:
    number = ipaddress.ip_address(address[0].partition("%")[0])
    if number.is_loopback or number.is_unspecified:
        return True
    try:
        # What is sent to oneself comes from the same address; nothing is sent here.
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return bool(probe.getsockname()[0] == address[0])
    except OSError:
        return False


def _has_code(settings: Settings) -> bool:
    return bool(settings.client_auth_code) or os.access(
        settings.client_auth_file or settings.storage_dir / "client-auth", os.R_OK)


def _key(settings: Settings) -> tuple[Settings, bool, bool]:
    """Return what a decision depends on: also whether a storage directory, and whether a node, was named."""
    environ = os.environ
    return (settings, bool(environ.get("KACHERY_STORAGE_DIR")),
            bool(environ.get("KACHERY_DAEMON_HOST") or environ.get("KACHERY_DAEMON_PORT")))


def _decide(settings: Settings, has_directory: bool, has_node: bool) -> Place:
    own = settings.storage_dir
    if settings.offline_storage_dir:
        return Place(settings, PlaceKind.ALONE, f"in {own}, offline")
    connection = NodeConnection(settings)
    try:
        probed = connection.probe()
    except KacheryError:
        probed = {}
    node_id, theirs = probed.get("nodeId"), str(probed.get("kacheryStorageDir"))
    if not isinstance(node_id, str) or not node_id:
        # Without an answer nobody knows whose a directory is in which a node has been.
        machine = settings.node_host if _id_in(own) and not is_this_machine(settings.node_host) else ""
        return Place(settings, PlaceKind.ALONE, f"in {own}: no node answers at {connection.url}", machine=machine)
    if _id_in(own) == node_id:
        if is_this_machine(settings.node_host):
            return Place(settings, PlaceKind.SHARED, f"in {own}, the store of the node")
        return Place(settings, PlaceKind.SHARED, f"in {own}, the store of the node, which is on {settings.node_host} "
                                                 "and keeps the mutables", machine=settings.node_host)
    here = is_this_machine(settings.node_host)
    is_at_hand = here and Path(theirs).is_absolute() and _id_in(Path(theirs)) == node_id
    code_file = Path(theirs) / "client-auth"
    has_code = is_at_hand and os.access(code_file, os.R_OK)
    is_client = has_code or bool(settings.client_auth_code or settings.client_auth_file)
    if is_at_hand and is_client and not has_directory:
        return Place(replace(settings, storage_dir=Path(theirs)), PlaceKind.SHARED,
                     f"in {theirs}, the store of the node, as KACHERY_STORAGE_DIR is not set")
    if not is_client and not has_node:
        # Another user's node, at the port where all nodes are: what is stored here does not concern it.
        return Place(settings, PlaceKind.ALONE, f"in {own}: the node at {connection.url} has another store, and you "
                                                "have no code of that node")
    if has_code and not (settings.client_auth_code or settings.client_auth_file):
        settings = replace(settings, client_auth_file=str(code_file))
    store = theirs if here else f"{theirs} on {settings.node_host}"
    return Place(settings, PlaceKind.APART, f"through the node at {connection.url}, whose store is {store}", store)


def _id_in(directory: Path) -> str | None:
    """Return the id of the node whose storage directory this is, None when that is not known."""
    try:
        with (directory / "kachery-node-id").open("rb") as file:
            return file.read(_NODE_ID_SIZE_BYTES_MAX).decode("ascii", "replace").strip()
    except (OSError, ValueError):
        return None
