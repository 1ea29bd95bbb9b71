"""Bringing files into a channel's bucket before anybody has asked for them.

Between nodes that is not needed: a node uploads when another one asks. It is for those who load without a node, and so
cannot ask, and for a machine that will be off when the others want its files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

from ..config import Settings
from ..errors import InvalidArgument, NotInStore
from ..protocol.names import check_channel_name, parse_file_uri
from .access import check_online
from .connection import NodeConnection
from .copies import SomePath
from .place import client_settings
from .progress import ProgressCallback
from .storing import open_store, store_file

__all__ = ["upload_file"]

_SPAN_SIZE_BYTES = 8 * 1024 * 1024


def upload_file(path_or_uri: SomePath, *, channel: str | None = None, progress: ProgressCallback | None = None) -> str:
    """Have the node upload a file to the bucket of a channel, and return its content URI.

    Everybody who reaches the hub can read it from there (``direct=`` of ``load_file``). What the bucket has already is
    not sent again, so a call that broke off is simply repeated.

    :param path_or_uri: ``sha1://…`` of a file in the store, or the path of one, which is stored first.
    :param channel: the channel; without it the one of the setting KACHERY_CHANNEL.
    :param progress: called about four times a second.
    :return: the URI with the manifest by which the bucket has the file.
    :raises InvalidArgument: no channel is named. :raises InvalidUri, InvalidName: URI or channel is malformed.
    :raises LocalFileMissing and others: as ``store_file``, of a path. :raises NotInStore: of a URI.
    :raises NodeNotRunning, ClientAuthRefused: there is no node that uploads; ClientOffline: none may be asked.
    :raises ChannelUnknown, NotPermitted: the node is not on the channel, or may not provide files there.
    :raises HubUnreachable, BucketUnreachable and others: hub or bucket did not take it, and why.
    """
    settings = client_settings()
    chosen = settings.channel if channel is None else channel
    if not chosen:
        raise InvalidArgument(what="No channel was named to upload to. Pass channel=, use --channel, or set "
                                   "KACHERY_CHANNEL.")
    check_channel_name(chosen)
    check_online(settings, f"Uploading {os.fsdecode(path_or_uri)}")
    given = os.fspath(path_or_uri)
    uri = given if isinstance(given, str) and given.startswith("sha1://") else store_file(path_or_uri,
                                                                                         progress=progress)
    parse_file_uri(uri)
    connection = NodeConnection(settings)
    try:
        return connection.upload(uri, chosen, progress)
    except NotInStore as error:  # of a client whose store is not the node's
        _hand_over(settings, uri, error)
        return connection.upload(uri, chosen, progress)


def _hand_over(settings: Settings, uri: str, error: NotInStore) -> None:
    """Store a file of the local store at the node too. :raises NotInStore: ``error``, when it is not here either."""
    store, sha1 = open_store(settings), parse_file_uri(uri).sha1
    try:
        size = store.find(sha1).size
    except NotInStore:
        raise error from None

    def pieces() -> Iterator[bytes]:
        with closing(store.open(sha1)) as file:
            yield from iter(lambda: file.read(_SPAN_SIZE_BYTES), b"")

    NodeConnection(settings).store(pieces, size)
