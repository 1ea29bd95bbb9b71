"""Feeds: append-only logs of JSON messages, signed by the node that owns them, read and followed anywhere.

A feed belongs to the node that made it, and only that node appends to it. Its messages stand in named subfeeds.
Another node that is on a channel with it reads and follows them by ``feed://<feed id>``. Names and orders of arguments
are those of kachery-client 1.2; where something differs, docs/feeds.md says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from ..config import Settings
from ..errors import InvalidArgument, InvalidFeedUri, InvalidName, SubfeedNotAvailable
from ..protocol.names import FeedUri, check_feed_id, is_node_id, parse_feed_uri, subfeed_hash
from .connection import NodeConnection
from .feed_sources import LOCAL, NodeSource, SnapshotSource, Source, checked_wait, chosen_channel
from .formats import load_json, store_json
from .place import client_settings
from .snapshots import make_snapshot, read_snapshot
from .subfeeds import Subfeed, checked_limit

__all__ = [
    "Feed",
    "create_feed",
    "delete_feed",
    "get_feed_id",
    "list_feeds",
    "load_feed",
    "load_subfeed",
    "watch_for_new_messages",
]


class Feed:
    """A feed, as ``create_feed`` and ``load_feed`` return it. It remembers the node that it was loaded from.

    Threads may share it, and its subfeeds, each of which has one position.
    """

    def __init__(self, source: Source, uri: str, settings: Settings) -> None:
        self._source = source
        self._uri = uri
        self._settings = settings

    @property
    def source(self) -> Source:
        """Where its messages come from."""
        return self._source

    @property
    def settings(self) -> Settings:
        """The settings that it was loaded with."""
        return self._settings

    @property
    def uri(self) -> str:
        """``feed://<feed id>``, or the content URI of a snapshot."""
        return self._uri

    @property
    def feed_id(self) -> str | None:
        """64 hex digits, the feed's public key; None for a snapshot of 2022, which does not say."""
        return self._source.feed_id

    @property
    def is_writeable(self) -> bool:
        """Whether this node owns the feed, so that messages can be appended here."""
        return self._source.writable

    @property
    def is_snapshot(self) -> bool:
        """Whether it is a snapshot, which never changes."""
        return isinstance(self._source, SnapshotSource)

    def load_subfeed(self, subfeed_name: Any, *, position: int = 0, channel: str | None = None) -> Subfeed:
        """Return a subfeed, whether anything was appended to it yet or not.

        :param subfeed_name: a text, a dict of JSON, or ``~`` and the 40 hex digits of a name's hash.
        :param position: the number of the message to read first.
        :param channel: where to ask for the messages of another node's feed; without it the one of the setting
            KACHERY_CHANNEL. ``"*local*"``: read what this node holds, and ask nobody.
        :raises InvalidName: the name or the channel is malformed.
        """
        return Subfeed(self, subfeed_name, position=position, channel=channel)

    def create_snapshot(self, subfeed_names: Sequence[Any]) -> Feed:
        """Store what this node holds of some subfeeds as a file, and return that as a feed: ``sha1://…/feed.json``.

        It can be loaded from the store without a node, and from a channel like any file; its signatures are checked
        then.

        :param subfeed_names: as ``load_subfeed`` takes them.
        :raises SubfeedNotAvailable: this node, which is not the owner, holds nothing of one of them.
        :raises DiskFull, DiskError, NodeNotRunning: it could not be stored.
        """
        if isinstance(self._source, SnapshotSource):
            raise InvalidArgument(what=f"{self._uri} is a snapshot already.")
        return load_feed(store_json(self.export(subfeed_names), "feed.json"))

    def export(self, subfeed_names: Sequence[Any]) -> dict[str, Any]:
        """Return what ``create_snapshot`` would store."""
        if isinstance(subfeed_names, str) or not all(isinstance(name, str | dict) for name in subfeed_names):
            raise InvalidArgument(what="Name the subfeeds in a list, each by a text or a dict.")
        found = []
        for name in subfeed_names:
            subfeed = self.load_subfeed(name, channel=LOCAL)
            signed = subfeed.get_next_messages(wait_msec=0, signed=True)
            if not signed and not self.is_writeable:
                raise SubfeedNotAvailable(uri=subfeed.uri, channel=LOCAL, why="this node holds nothing of it",
                                          tried="its own log")
            hashed = isinstance(name, str) and name.startswith("~")
            found.append((None if hashed else name, subfeed.subfeed_hash, signed))
        return make_snapshot(check_feed_id(self.feed_id or ""), found)

    def describe(self) -> dict[str, Any]:
        """Return what is held of the feed: ``feedId``, ``name``, ``writable`` and ``subfeeds``, each with its
        ``subfeed`` (the hash), ``name`` (None: only the hash is known), ``count`` and ``forkedAt``.

        :raises FeedUnknown: this node holds nothing of it.
        """
        if isinstance(self._source, NodeSource):
            return self._source.connection.call("/api/feed/info", {"feedId": self.feed_id})
        subfeeds = self._source.snapshot.subfeeds.values() if isinstance(self._source, SnapshotSource) else ()
        return {"feedId": self.feed_id, "name": None, "writable": False, "subfeeds": [
            {"subfeed": held.subfeed, "name": held.name, "count": len(held.messages), "forkedAt": None}
            for held in subfeeds]}

    def delete(self) -> None:
        """Delete the feed on this node: ``delete_feed(feed.uri)``."""
        delete_feed(self._uri)

    def __repr__(self) -> str:
        return f"Feed({self._uri!r})"


# --- feeds by name or URI


def create_feed(name: str | None = None, *, feed_name: str | None = None) -> Feed:
    """Make a feed on this node, and return it. With a name that this node has a feed of, return that one.

    :param name: what this node is to know it by; it is nobody else's business. ``feed_name``: the same, as in 2022.
    :raises InvalidName: the name is empty, or looks like a URI or a feed's id.
    :raises NodeNotRunning, ClientAuthRefused: there is no node that could own it.
    """
    settings = client_settings()
    connection = NodeConnection(settings)
    name = feed_name if name is None else name
    return _create(connection, settings, None if name is None else _check_name(name))


def load_feed(feed_name_or_uri: str, *, create: bool = False, channel: str | None = None) -> Feed:
    """Return a feed: one of this node by its name, any by its URI or id, or a snapshot by its content URI.

    :param create: make the feed of that name when there is none.
    :param channel: where to load the file of a snapshot from; without it the one of KACHERY_CHANNEL.
    :raises FeedUnknown: this node has no feed of that name.
    :raises InvalidFeedUri, InvalidUri, InvalidName: it is none of these.
    :raises WrongFormat, FeedInvalid, FeedChainBroken: the file is no snapshot, or one that was tampered with. What
        else may happen to it is listed at ``load_file``.
    :raises NodeNotRunning, ClientAuthRefused: there is no node to ask, and it is not a snapshot.
    """
    settings = client_settings()
    _check_text(feed_name_or_uri)
    if create and _is_uri(feed_name_or_uri):
        raise InvalidArgument(what=f"{feed_name_or_uri} is not a name that a feed could be created by.")
    if feed_name_or_uri.startswith("sha1://"):
        snapshot = read_snapshot(load_json(feed_name_or_uri, channel=channel), feed_name_or_uri)
        return Feed(SnapshotSource(snapshot, feed_name_or_uri), feed_name_or_uri, settings)
    connection = NodeConnection(settings)
    if create:
        return _create(connection, settings, _check_name(feed_name_or_uri))
    return _feed(connection, settings, _find(connection, feed_name_or_uri))


def load_subfeed(subfeed_uri: str, *, position: int = 0, channel: str | None = None) -> Subfeed:
    """Return the subfeed that ``feed://<feed id>/<name or ~hash>`` names, or ``subfeedName=`` in a snapshot's URI.

    :param position, channel: as ``Feed.load_subfeed``.
    :raises InvalidFeedUri: it names no subfeed. For the rest see ``load_feed``.
    """
    _check_text(subfeed_uri)
    if subfeed_uri.startswith("sha1://"):
        snapshot_uri, _, name = subfeed_uri.partition("subfeedName=")
        if not name:
            raise InvalidFeedUri(uri=subfeed_uri, why="it names a feed, not a subfeed")
        feed = load_feed(snapshot_uri.rstrip("?&"), channel=channel)
        return feed.load_subfeed(unquote(name), position=position, channel=channel)
    uri = parse_feed_uri(subfeed_uri)
    if uri.subfeed is None:
        raise InvalidFeedUri(uri=subfeed_uri, why="it names a feed, not a subfeed")
    settings = client_settings()
    name = f"~{uri.subfeed}" if uri.name is None else uri.name
    return _feed(NodeConnection(settings), settings, uri.feed_id).load_subfeed(name, position=position, channel=channel)


def get_feed_id(feed_name: str, *, create: bool = False) -> str:
    """Return the id of this node's feed of that name.

    :param create: make it when there is none.
    :raises FeedUnknown: there is none. :raises InvalidName: no feed can have that name.
    """
    connection = NodeConnection(client_settings())
    path = "/api/feed/create" if create else "/api/feed/find"
    return str(connection.call(path, {"name": _check_name(feed_name)})["feedId"])


def delete_feed(feed_name_or_uri: str) -> None:
    """Delete a feed from this node: its key, so that nobody can ever append to it again, and its messages.

    Copies that other nodes hold stay, and what was shared stays in the bucket. Of another node's feed it deletes the
    copy here.

    :raises FeedUnknown: this node has no such feed.
    """
    _check_text(feed_name_or_uri)
    if feed_name_or_uri.startswith("sha1://"):
        raise InvalidArgument(what=f"{feed_name_or_uri} is a snapshot, a file like any other, and not deleted here.")
    connection = NodeConnection(client_settings())
    connection.call("/api/feed/delete", {"feedId": _find(connection, feed_name_or_uri)})


def list_feeds() -> list[dict[str, Any]]:
    """Return all feeds that this node owns or holds copies of, each as ``Feed.describe`` returns it."""
    found: list[dict[str, Any]] = NodeConnection(client_settings()).call("/api/feed/list", {})["feeds"]
    return found


def watch_for_new_messages(subfeed_watches: Mapping[str, Any], *, wait_msec: float, channel: str | None = None,
                           signed: bool = False, max_num_messages: int | None = None,
                           ) -> dict[str, list[dict[str, Any]]]:
    """Wait until at least one of several subfeeds has news, and return them by the names of the watches.

    :param subfeed_watches: for each name a ``Subfeed``, whose position moves on, or a dict as in 2022:
        ``{"feedId": …, "subfeedHash": … or "subfeedName": …, "position": …}``.
    :param channel: where to ask, for those that are dicts; as for ``Feed.load_subfeed``.
    :param wait_msec, signed, max_num_messages: as ``Subfeed.get_next_messages``, for each subfeed.
    :return: watches without news are absent.
    :raises InvalidArgument: a watch is neither. For the rest see ``Subfeed.get_next_messages``.
    """
    settings = client_settings()
    limit = checked_limit(max_num_messages)
    wait_msec = checked_wait(wait_msec)
    watches = {str(key): _watch(watch, chosen_channel(settings, channel)) for key, watch in subfeed_watches.items()}
    connection = NodeConnection(settings)
    answer = connection.call("/api/feed/watch", {"watches": watches, "waitMsec": wait_msec, "maxMessages": limit,
                                                 "signed": signed}, 2 * settings.stall_seconds + wait_msec / 1000)
    found: dict[str, list[dict[str, Any]]] = {key: rows for key, rows in answer["messages"].items() if rows}
    for key, watch in subfeed_watches.items():
        if isinstance(watch, Subfeed) and str(key) in found:
            watch.position += len(found[str(key)])
    return found


def _watch(watch: Any, channel: str | None) -> dict[str, Any]:
    if isinstance(watch, Subfeed) and not watch.is_snapshot:
        return {"feedId": watch.feed.feed_id, "subfeed": watch.name, "channel": watch.channel,
                "position": watch.position}
    if isinstance(watch, Mapping) and "feedId" in watch and ("subfeedHash" in watch or "subfeedName" in watch):
        name = f"~{watch['subfeedHash']}" if "subfeedHash" in watch else watch["subfeedName"]
        subfeed_hash(name)
        return {"feedId": check_feed_id(str(watch["feedId"])), "subfeed": name, "channel": channel,
                "position": watch.get("position", 0)}
    raise InvalidArgument(what="A watch is a subfeed of a feed that can grow, or a dict with feedId, subfeedHash or "
                               "subfeedName, and position.")


def _create(connection: NodeConnection, settings: Settings, name: str | None) -> Feed:
    return _feed(connection, settings, str(connection.call("/api/feed/create", {"name": name})["feedId"]))


def _feed(connection: NodeConnection, settings: Settings, feed_id: str) -> Feed:
    return Feed(NodeSource(settings, feed_id, connection), str(FeedUri(feed_id)), settings)


def _find(connection: NodeConnection, feed_name_or_uri: str) -> str:
    """Return the id of a feed by its name, URI or id."""
    if not _is_uri(feed_name_or_uri):
        return str(connection.call("/api/feed/find", {"name": _check_name(feed_name_or_uri)})["feedId"])
    uri = parse_feed_uri(feed_name_or_uri)
    if uri.subfeed is not None:
        raise InvalidFeedUri(uri=feed_name_or_uri, why="it names a subfeed, where a feed is wanted")
    return uri.feed_id


def _is_uri(text: str) -> bool:
    return "://" in text or is_node_id(text)


def _check_text(name: Any) -> None:
    if not isinstance(name, str):
        raise InvalidArgument(what=f"A feed is named by a text, not by {type(name).__name__}.")


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not name or _is_uri(name):
        raise InvalidName(name=str(name)[:100], kind="feed", why="use a text that is not a URI, nor 64 hex digits")
    return name
