"""What looks after the bucket while a hub runs: counting what moves, quotas, and the removal of unread objects."""

from __future__ import annotations

from collections.abc import Callable

from .buckets import Buckets
from .expiry import Expiry
from .quotas import Promises, Quotas
from .registry import Registry
from .usage import Usage

__all__ = ["Care"]


class Care:
    """One for each hub. It is the observer of the embedded bucket, so it is made before that one; then ``start``.

    :param url_life_seconds: that of every upload URL. :param expiry_seconds: the pause between two looks for objects
        that nobody reads. :param clock: seconds since the epoch.
    """

    def __init__(
        self, registry: Registry, url_life_seconds: float, expiry_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._expiry_seconds = expiry_seconds
        self._clock = clock
        self._promises = Promises(url_life_seconds, clock)
        self.usage = Usage(registry, clock)

    def start(self, buckets: Buckets) -> None:
        """Begin."""
        self.quotas = Quotas(self.usage, self._promises, buckets, self._clock)
        self._expiry = Expiry(self._registry, buckets, self._expiry_seconds, self._clock)
        self._expiry.start()
        self.usage.start()

    async def stop(self) -> None:
        """End; nothing may move any more."""
        self.quotas.close()
        await self._expiry.stop()
        await self.usage.stop()

    # --- what moves, told from any thread

    def arrived(self, object_name: str, node_id: str, size_bytes: int) -> None:
        """An object was uploaded, by a URL that was signed for this node."""
        self._promises.release(object_name)
        self.usage.arrived(object_name, node_id, size_bytes)

    def found(self, object_name: str) -> None:
        """An object that was to be uploaded was there already."""
        self._promises.release(object_name)

    def sent(self, object_name: str, node_id: str, size_bytes: int) -> None:
        """So many bytes of an object were sent."""
        self.usage.sent(object_name, node_id, size_bytes)
