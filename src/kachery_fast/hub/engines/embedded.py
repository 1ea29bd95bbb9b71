"""The engines that need nothing but the hub itself: its own bucket and its own broker.

Their addresses are relative to the hub, so they hold by whichever name a node reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from ...embedded.broker import Broker
from ...embedded.bucket import BucketServer, UploadSigner
from ...embedded.bucket_reads import DownloadSigner
from ...errors import ObjectMissing
from ...protocol.hub_bodies import PubsubInfo, PubsubToken
from . import BandTraffic, BucketTotals, KindTotal, ObjectRecord, SignedRead, SignedUrl

__all__ = ["EmbeddedBucket", "EmbeddedPubsub"]


class EmbeddedBucket:
    """A ``BucketEngine`` over the embedded object server."""

    watched = notes_reads = True

    def __init__(self, server: BucketServer, signer: UploadSigner, reads: DownloadSigner) -> None:
        self._server = server
        self._signer = signer
        self._reads = reads
        self.url_base = server.prefix

    def sign_put(
        self, object_name: str, size_bytes: int, life_seconds: float, *, replace: bool = False, node_id: str = "",
        crc32c: int | None = None,
    ) -> SignedUrl:
        """See ``BucketEngine``."""
        return SignedUrl(*self._signer.sign(object_name, size_bytes, life_seconds, self.url_base, replace=replace,
                                            node_id=node_id))

    def totals(self, channel: str) -> BucketTotals:
        """See ``BucketEngine``."""
        counted = self._server.counted
        totals = self._server.totals(channel)
        return BucketTotals({kind: KindTotal(*total) for kind, total in totals.items()}, counted)

    def size(self, object_name: str) -> int | None:
        """See ``BucketEngine``."""
        try:
            return self._server.size(object_name)
        except ObjectMissing:
            return None

    def objects(self, channel: str, *, kind: str = "", after: str = "", limit: int) -> list[ObjectRecord]:
        """See ``BucketEngine``."""
        prefix = f"{channel}/{kind}/" if kind else f"{channel}/"
        return [ObjectRecord(*found) for found in islice(self._server.objects(prefix, after), limit)]

    def expire(self, object_name: str, unread_since: float) -> bool:
        """See ``BucketEngine``."""
        return self._server.expire(object_name, unread_since)

    def sign_get(self, object_name: str, life_seconds: float, *, head: bool = False) -> SignedRead:
        """See ``BucketEngine``."""
        signed = self._reads.sign(object_name, life_seconds, self.url_base, method="HEAD" if head else "GET")
        return SignedRead(signed.url, signed.expires * 1000)

    def sha1(self, object_name: str) -> str:
        """See ``BucketEngine``."""
        return self._server.sha1(object_name)

    def read(self, object_name: str, limit_bytes: int) -> tuple[bytes, str]:
        """See ``BucketEngine``."""
        return self._server.read(object_name, limit_bytes)

    def write(self, object_name: str, data: bytes, *, replace: bool = False) -> bool:
        """See ``BucketEngine``."""
        return self._server.write(object_name, data, replace=replace)

    def remove(self, object_name: str, *, etag: str | None = None) -> bool:
        """See ``BucketEngine``."""
        try:
            self._server.remove(object_name, etag=etag)
        except ObjectMissing:
            return False
        return True

    def remove_channel(self, channel: str) -> int:
        """See ``BucketEngine``."""
        return sum(self.remove(found.name) for found in self._server.objects(f"{channel}/"))


class EmbeddedPubsub:
    """A ``PubsubEngine`` over the embedded broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def info(self) -> PubsubInfo:
        """See ``PubsubEngine``."""
        return PubsubInfo(kind="ably")

    def token(self, node_id: str, capability: Mapping[str, Sequence[str]], life_seconds: float) -> PubsubToken:
        """See ``PubsubEngine``."""
        details = self._broker.issue_token(node_id, capability, life_seconds)
        return PubsubToken(
            token=details["token"], issued=details["issued"], expires=details["expires"],
            capability=details["capability"], client_id=details["clientId"], pubsub=self.info())

    async def revoke(self, node_ids: Sequence[str]) -> None:
        """See ``PubsubEngine``."""
        for node_id in node_ids:
            await self._broker.revoke(node_id)

    def traffic(self, band: str) -> BandTraffic:
        """Return what moves on a band."""
        moved = self._broker.meter.moved(band)
        return BandTraffic(moved.messages, moved.size_bytes, self._broker.rings.subscribers(band))
