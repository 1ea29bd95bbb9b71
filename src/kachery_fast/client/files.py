"""Files by content URI: store, link, load, read a range, verify, ask why not.

What is in the local store is read from there, without a node. Whatever else is wanted comes from the node's store, or
by the node from a channel.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, TypeVar

from .._version import __version__
from ..config import Settings, load_settings
from ..errors import (
    DiskError,
    InvalidArgument,
    KacheryError,
    LinkInvalid,
    NoChannel,
    NodeNotRunning,
    NotInStore,
)
from ..protocol.names import check_channel_name, parse_file_uri
from ..store import FileStore, Located, Verified
from ..store.cache import note_use
from ..store.disk import translated
from .access import check_online
from .by_node import check_range, load_by_node, read_by_node
from .connection import NodeConnection
from .copies import SomePath, check_destination, copy_to
from .place import PlaceKind, client_settings, find_place, local_settings
from .progress import ProgressCallback
from .storing import open_store, with_total

__all__ = [
    "Loaded",
    "info",
    "load",
    "load_bytes",
    "load_file",
    "open_range",
    "verify",
    "verify_all",
    "why",
]

_SPAN_SIZE_BYTES = 8 * 1024 * 1024

T = TypeVar("T")


class Loaded(NamedTuple):
    """A file that is here now.

    ``path`` is where, ``size`` its bytes, ``source`` "store" when it was here already, "channel" when it was
    fetched, "bucket" when without a node, ``seconds`` how long that took.
    """

    uri: str
    path: str
    size: int
    sha1: str
    source: str
    seconds: float


# --- loading


def load_file(uri: str, dest: SomePath | None = None, local_only: bool = False, channel: str | None = None, *,
              progress: ProgressCallback | None = None, direct: str | None = None) -> str:
    """Return the path of a file, fetched when it is not in the local store: from the node's, or from a channel.

    :param uri: ``sha1://…``, or 40 hex digits.
    :param dest: where to put a copy, outside the store; it replaces a file of that name, at once and whole. Its path
        is returned then; without it the path of the store's own file, which must not be written to.
    :param local_only: look in the local store alone.
    :param channel: the channel to ask on; without it the one of the setting KACHERY_CHANNEL.
    :param progress: called about four times a second while the file comes in.
    :param direct: the address of a hub: read what is in the channel's bucket straight from there, without a node;
        without it the setting KACHERY_DIRECT_HUB. Nobody is asked to upload anything then.
    :raises InvalidUri, InvalidName: the URI or channel is malformed.
    :raises NotInStore: ``local_only``, and it is not there.
    :raises NoChannel: it is neither in the local store nor in that of the node, and no channel is named.
    :raises FileElsewhere: it is linked in place on another machine; ``dest`` takes a copy.
    :raises NodeNotRunning, ClientAuthRefused: there is no node to ask; ClientOffline: none may be asked.
    :raises NotAvailable, NotPermitted, ChannelUnknown and others: the node could not get it, and why.
    :raises DiskFull, DiskError, NotADataFile: ``dest`` cannot be written.
    :raises InvalidArgument: ``dest`` is within the store.
    """
    return load(uri, dest=dest, local_only=local_only, channel=channel, progress=progress,
                direct=direct).path


def load(uri: str, *, dest: SomePath | None = None, local_only: bool = False, channel: str | None = None,
         progress: ProgressCallback | None = None, direct: str | None = None) -> Loaded:
    """Do as ``load_file``, and return also the size, where it came from, and how long that took."""
    begun = time.monotonic()
    file_uri = parse_file_uri(uri)
    if dest is not None:
        check_destination(dest, local_settings().storage_dir)
    try:
        located = _look_here(lambda store: store.find(file_uri.sha1))
        if not located.linked:
            note_use(located.path, time.time())
        path, size, source = str(located.path), located.size, "store"
    except (NotInStore, LinkInvalid) as error:
        if local_only:
            raise
        settings = client_settings()
        hub_url = settings.direct_hub if direct is None else direct
        asked = _chosen_channel(settings, channel, uri, error)
        if hub_url:
            from .direct import load_directly

            store = open_store(settings, find_place().machine)
            located = load_directly(file_uri, hub_url, _named(asked, uri), store, settings, progress)
            path, size, source = str(located.path), located.size, "bucket"
        else:
            with _without_channel(asked, uri, error):
                path, size, source = load_by_node(settings, uri, asked, dest, progress)
    if dest is not None:
        copy_to(path, dest)
        path = os.fspath(dest)
    return Loaded(uri, path, size, file_uri.sha1, source, time.monotonic() - begun)


def _look_here(look: Callable[[FileStore], T]) -> T:
    """Return what ``look`` finds in the store that the settings name, or in that of the node which takes its place.

    :raises NotInStore, LinkInvalid: it is in neither.
    """
    settings = load_settings()
    try:
        return look(open_store(settings))
    except (NotInStore, LinkInvalid):
        other = local_settings()
        if other.storage_dir == settings.storage_dir:
            raise
    return look(open_store(other))


def load_bytes(uri: str, start: int | None = None, end: int | None = None, *, channel: str | None = None,
               direct: str | None = None) -> bytes:
    """Return bytes ``start`` (0) to ``end`` (exclusive; the file's end) of a file.

    Of a file that is not here, only the chunks that hold those bytes are fetched.

    :param channel, direct: as ``load_file``, which also lists what else may be raised.
    :raises InvalidArgument: the range is not within the file.
    """
    with closing(open_range(uri, start, end, channel=channel, direct=direct)) as pieces:
        return b"".join(pieces)


def open_range(uri: str, start: int | None = None, end: int | None = None, *,
               channel: str | None = None, direct: str | None = None) -> Generator[bytes, None, None]:
    """Yield the bytes of ``load_bytes`` piece by piece, in bounded memory. Close the generator to withdraw it."""
    file_uri = parse_file_uri(uri)
    start = 0 if start is None else start
    if start < 0 or (end is not None and end < start):
        raise InvalidArgument(what=f"Bytes {start} to {end} are not a range: use 0 <= start <= end.")
    try:
        file = _look_here(lambda store: store.open(file_uri.sha1))
    except (NotInStore, LinkInvalid) as error:
        settings = client_settings()
        hub_url = settings.direct_hub if direct is None else direct
        asked = _chosen_channel(settings, channel, uri, error)
        if hub_url:
            from .direct import read_directly

            store = open_store(settings, find_place().machine)
            yield from read_directly(file_uri, hub_url, _named(asked, uri), store, settings, start, end,
                                     lambda size: check_range(uri, start, end, size))
        else:
            with _without_channel(asked, uri, error):
                yield from read_by_node(settings, uri, asked, start, end)
        return
    with file:
        size = os.fstat(file.fileno()).st_size
        check_range(uri, start, end, size)
        end = size if end is None else end
        with translated("reading", uri):
            file.seek(start)
        while start < end:
            with translated("reading", uri):
                piece = file.read(min(_SPAN_SIZE_BYTES, end - start))
            if not piece:
                raise DiskError(action="reading", path=uri, why=f"it ends at byte {start} of {end}")
            start += len(piece)
            yield piece


def _chosen_channel(settings: Settings, channel: str | None, uri: str, error: KacheryError) -> str | None:
    """Return the channel to ask on; None: there is none, and the node is asked for what it has.

    :raises ClientOffline: no node may be asked; or LinkInvalid, ``error``, which says more.
    """
    chosen = settings.channel if channel is None else channel
    if isinstance(error, LinkInvalid) and settings.offline_storage_dir:
        raise error
    check_online(settings, f"Loading {uri}, which is not in the local store,")
    return check_channel_name(chosen) if chosen else None


def _named(channel: str | None, uri: str) -> str:
    """:raises NoChannel: none is named, and a bucket is of a channel."""
    if channel is None:
        raise NoChannel(uri=uri)
    return channel


@contextmanager
def _without_channel(channel: str | None, uri: str, error: KacheryError) -> Iterator[None]:
    """Ask the node for a file. Without a channel only for what it has itself, and not at all where there is none.

    :raises NoChannel: it has not got the file; or LinkInvalid, ``error``, which says more.
    """
    if channel is not None:
        yield
        return
    try:
        if find_place().kind is PlaceKind.ALONE:
            raise NoChannel(uri=uri)
        yield
    except (NoChannel, NodeNotRunning) as missing:
        if isinstance(error, LinkInvalid):
            raise error from missing
        raise NoChannel(uri=uri) from missing


# --- asking


def verify(uri: str, *, progress: ProgressCallback | None = None) -> Located:
    """Read all bytes of a file in the local store and check that they have the name that ``uri`` says.

    :return: where it is.
    :raises NotInStore, LinkInvalid: it is not here.
    :raises CorruptFile: it is damaged; the error says what to do.
    """
    store = open_store(local_settings())
    located = store.find(parse_file_uri(uri).sha1)
    return store.verify(located.sha1, progress=with_total(progress, located.path))


def verify_all(on_result: Callable[[str, Located | KacheryError], None]) -> Verified:
    """Verify every file of the local store.

    :param on_result: called with each SHA-1, and where it is or what is wrong with it.
    :return: how many were sound and damaged, and the bytes read.
    """
    return open_store(local_settings()).verify_all(on_result=on_result)


def why(uri: str, *, channel: str | None = None) -> dict[str, Any]:
    """Return where a file is or why it cannot be had, without loading it.

    :param channel: ask on this one alone; without it, and without KACHERY_CHANNEL, on all channels of the node.
    :return: ``uri``, ``verdict``, ``store`` (texts) and ``channels``: for each its ``bucket``, who was ``asked``, and
        the ``answers``.
    :raises NodeNotRunning, ClientAuthRefused: it is not in the local store, and there is no node to ask.
    """
    settings = client_settings()
    file_uri = parse_file_uri(uri)
    chosen = channel or settings.channel or None
    if chosen is not None:
        check_channel_name(chosen)
    try:
        return NodeConnection(settings).why(uri, chosen)
    except NodeNotRunning:
        try:
            located = open_store(settings).find(file_uri.sha1)
        except NotInStore:
            located = None
        if located is None:
            raise
    text = f"linked in place at {located.path}" if located.linked else f"at {located.path}"
    return {"uri": uri, "verdict": "It is in the local store.", "store": f"{located.size} bytes {text}",
            "channels": []}


def info() -> dict[str, Any]:
    """Return the version, the storage directory and what it holds, the default channel, and the node's state.

    ``node`` is None when no node answers; ``nodeWhy`` says why then. ``place`` says whose the storage directory is:
    "shared", the node's; "apart", another than the node's, so that this client stores through the node; "alone", there
    is no node to store for. ``storesWhere`` says the same for people.
    """
    place = find_place(anew=True)
    settings = place.settings
    totals = open_store(settings).totals()
    node: dict[str, Any] | None = None
    reason: str | None = None
    try:
        node = NodeConnection(settings).info()
    except KacheryError as error:
        reason = str(error)
    return {
        "version": __version__,
        "storageDir": str(settings.storage_dir),
        "place": place.kind.value,
        "storesWhere": place.text,
        "channel": settings.channel,
        "store": totals._asdict(),
        "node": node,
        "nodeWhy": reason,
    }
