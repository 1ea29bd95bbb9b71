"""Nodes with feeds over the network in memory."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from kachery_fast.node.feeds import Feeds, Reading, Watch
from kachery_fast.protocol.access import Permission
from kachery_fast.protocol.feed_bodies import FeedSubscribe
from kachery_fast.protocol.feeds import payload
from kachery_fast.protocol.names import subfeed_hash, subfeed_object_name
from tests.node.support import CHANNEL, Network, Peer, settings_for, until

SUBFEED = subfeed_hash("main")
QUICK_FEEDS: dict[str, Any] = {"feed_relay_wait_seconds": 0.05, "feed_renew_seconds": 0.5}


class FeedPeer(Peer):
    """A node's end of a channel, with its feeds; the one that ``feed_peer`` makes."""

    feeds: Feeds

    def _requested(self, body: Any, sender: str) -> None:
        if not isinstance(body, FeedSubscribe):
            super()._requested(body, sender)
        elif self.link.may(Permission.PROVIDE_FEEDS):
            self.sharing.heard(body, sender)

    async def begin(self) -> None:
        """Open the feeds, and share them."""
        self.feeds = Feeds(self.settings, self.traffic)
        await self.feeds.open()
        self.sharing = self.feeds.serve(self.link)
        self.link._wants_request = self.feeds.concerns

    async def close(self) -> None:
        self.serves = False
        await self.sharing.close()
        await self.feeds.close()
        await super().close()

    async def create(self) -> str:
        feed_id, _ = await self.feeds.create(None)
        return feed_id

    async def append(self, feed_id: str, count: int, size: int = 10, *, subfeed: str = SUBFEED) -> None:
        first = self.feeds.log.tail(feed_id, subfeed).count
        await self.feeds.append(feed_id, subfeed, [{"i": first + n, "text": "x" * size} for n in range(count)], None)

    async def read_once(self, feed_id: str, position: int = 0, wait_seconds: float = 8.0, *,
                        subfeed: str = SUBFEED) -> Reading:
        """Read once, following."""
        following = await self.feeds.follow(self.link, feed_id, subfeed)
        (reading,) = await self.feeds.read([Watch(feed_id, subfeed, position, following)], wait_seconds, 1 << 40)
        return reading

    async def read_to(self, feed_id: str, end: int, position: int = 0, *, subfeed: str = SUBFEED) -> list[bytes]:
        """Read until there are ``end`` messages; check that they are numbered."""
        found: list[bytes] = []
        while position < end:
            reading = await self.read_once(feed_id, position, subfeed=subfeed)
            assert reading.messages, reading
            for message in reading.messages:
                assert payload(message)["i"] == position
                position += 1
            found += reading.messages
        return found


async def feed_peer(net: Network, name: str, permissions: list[str] | None = None, **settings: Any) -> FeedPeer:
    """Add a node with feeds, and tell the others of it."""
    net.members[name] = [permission.value for permission in Permission] if permissions is None else permissions
    peer = FeedPeer(net, name, settings_for(net.root / name, **{**QUICK_FEEDS, **settings}))
    await peer.begin()
    net.peers.append(peer)
    for other in net.peers:
        other.link.update(net.info(other.name))
    await peer.link.start()
    await until(lambda: peer.link.connected)
    return peer


async def remove(net: Network, peer: Peer) -> None:
    """Switch a node off; it stays a member."""
    net.peers.remove(peer)
    await peer.close()


def index_name(feed_id: str, subfeed: str = SUBFEED) -> str:
    return subfeed_object_name(CHANNEL, feed_id, subfeed)


def segments_in(net: Network) -> list[str]:
    return [name for name in net.bucket.objects if "/segments/" in name]


def put_segment(net: Network, feed_id: str, data: bytes) -> tuple[str, int]:
    """Put bytes into the bucket as a segment, as whoever may provide feeds can; return SHA-1 and size."""
    sha1 = hashlib.sha1(data).hexdigest()
    net.bucket.objects[index_name(feed_id).replace("subfeed.json", f"segments/{sha1}")] = data
    return sha1, len(data)


def seed_of(storage_dir: Path, feed_id: str) -> bytes:
    """The private key of a feed, as only its owner can read it."""
    with sqlite3.connect(storage_dir / "kachery-fast-feeds.db") as connection:
        (seed,) = connection.execute("SELECT seed FROM feeds WHERE feed = ?", (feed_id,)).fetchone()
    connection.close()
    return bytes(seed)


def decoded(messages: list[bytes]) -> list[Any]:
    return [msgspec.json.decode(message) for message in messages]


@asynccontextmanager
async def pair(root: Path, **settings: Any) -> AsyncIterator[tuple[Network, FeedPeer, FeedPeer, str]]:
    """An owner a with a feed, and a reader b."""
    net = Network(root)
    try:
        a = await feed_peer(net, "a", **settings)
        b = await feed_peer(net, "b", **settings)
        yield net, a, b, await a.create()
    finally:
        await net.close()
