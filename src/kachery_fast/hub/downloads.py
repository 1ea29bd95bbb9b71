"""Leave to read: URLs for exact objects, within a rate for each node.

Whether the node may read objects of the kind is decided before; the names are built here, from checked parts. A URL
says nothing about whether there is such an object.
"""

from __future__ import annotations

from collections.abc import Callable

from ..config import Settings
from ..errors import TooLarge
from ..protocol.hub_bodies import SignDownloads, SignedDownloads
from ..protocol.names import ObjectName
from .engines import BucketEngine
from .limits import RateLimiter
from .uploads import RATE_WINDOW_SECONDS

__all__ = ["Downloads"]

# A node that loads small files reads three objects where one that uploads them puts one, and does so faster.
_DOWNLOADS_PER_UPLOAD = 10


class Downloads:
    """Signs downloads. One for each hub, used on its event loop."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._rate_max = _DOWNLOADS_PER_UPLOAD * settings.sign_rate_per_node_max
        self._rate = RateLimiter(self._rate_max, RATE_WINDOW_SECONDS)

    def sign(self, bucket: BucketEngine, body: SignDownloads, node_id: str) -> SignedDownloads:
        """Sign what ``body`` asks for, in its order.

        :raises TooLarge: too many objects. :raises RateLimited: too many in the last seconds.
        :raises InvalidName: a part of a name is not well-formed.
        """
        count = len(body.sha1s)
        if count > self._settings.sign_batch_max:
            raise TooLarge(what="A request for download URLs", size=count, limit=self._settings.sign_batch_max,
                           setting="sign_batch_max, counted in objects")
        names = [str(ObjectName(body.channel, body.object_kind, sha1, body.feed_id, body.subfeed))
                 for sha1 in body.sha1s]
        self._rate.spend(node_id, count, self._clock(), who=f"node {node_id[:16]}",
                         limit=f"{self._rate_max:g} download URLs a second are allowed")
        signed = [bucket.sign_get(name, self._settings.url_life_seconds, head=body.head) for name in names]
        return SignedDownloads(urls=[item.url for item in signed],
                               expires=min((item.expires_ms for item in signed), default=0))
