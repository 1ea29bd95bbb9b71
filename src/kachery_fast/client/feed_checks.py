"""Checking feeds message by message, with nothing but the feed's public key: what a node or a file says proves nothing.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from ..errors import FeedForked, InvalidArgument, KacheryError, WrongFormat
from ..protocol.feeds import Tail
from ..protocol.names import FeedUri
from ..store.disk import SourceFile, display, source_errors
from .copies import SomePath
from .feed_sources import LOCAL, NodeSource, SnapshotSource
from .feeds import Feed
from .place import client_settings
from .snapshots import good_part, read_snapshot
from .subfeeds import Subfeed

__all__ = ["CheckedSubfeed", "check_subfeed", "load_export"]


class CheckedSubfeed(NamedTuple):
    """What was found: how many messages are good, the times of the first and last of them (milliseconds since the
    epoch; None without any), the evidence of forks, and what is wrong with the message after them (None: nothing)."""

    uri: str
    total: int
    first_ms: int | None
    last_ms: int | None
    forks: list[dict[str, Any]]
    error: KacheryError | None


def check_subfeed(feed: Feed, name: Any) -> CheckedSubfeed:
    """Verify each message of a subfeed that is held here: its signature, its number, and its place in the chain.

    :param name: as ``Feed.load_subfeed`` takes it.
    :raises InvalidArgument: a snapshot of 2022, which has no signatures.
    """
    if feed.feed_id is None:
        raise InvalidArgument(what=f"{feed.uri} is a snapshot of 2022, which holds no signatures to verify.")
    subfeed = feed.load_subfeed(name, channel=LOCAL)
    tail = Tail(feed.feed_id, subfeed.subfeed_hash)
    first_ms = last_ms = None
    error: KacheryError | None = None
    while error is None:
        page, error = _next_page(subfeed)
        if not page:
            break
        found = good_part(tail, page)
        error = found.error or error
        tail = found.tail
        if found.new:
            last_ms = page[len(found.new) - 1]["body"]["timestamp"]
            first_ms = page[0]["body"]["timestamp"] if first_ms is None else first_ms
    named = isinstance(name, str) and name and not name.startswith("~")
    uri = str(FeedUri(feed.feed_id, name if named else None, subfeed.subfeed_hash))
    return CheckedSubfeed(uri, tail.count, first_ms, last_ms, _forks(feed, name), error)


def load_export(path: SomePath) -> Feed:
    """Return the feed in a file that ``feed export`` wrote. Its signatures are not checked yet.

    :raises LocalFileMissing, LocalFileUnreadable, NotADataFile: there is no such file.
    :raises WrongFormat: it is no snapshot of a feed.
    """
    name = display(path)
    with SourceFile(path) as source, source_errors(path), open(source.fd, "rb", closefd=False) as file:
        data = file.read()
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WrongFormat(what=name, format="a snapshot of a feed", why=f"it is not JSON ({error})") from None
    return Feed(SnapshotSource(read_snapshot(document, name, check_signatures=False), name), name, client_settings())


def _next_page(subfeed: Subfeed) -> tuple[list[dict[str, Any]], KacheryError | None]:
    """Return the next messages that are held, a bounded number of bytes of them, or the fork that they end at."""
    try:
        batch = subfeed.read_page(signed=True)
    except FeedForked as error:
        return [], error
    subfeed.position = batch.position
    return batch.messages, None


def _forks(feed: Feed, name: Any) -> list[dict[str, Any]]:
    if not isinstance(feed.source, NodeSource):
        return []
    found: list[dict[str, Any]] = feed.source.forks(name)
    return found
