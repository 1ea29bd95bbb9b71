"""Leave to upload: URLs for exact names and sizes, within a rate for each node.

Whether the node may upload objects of the kind is decided before; the names are built here, from checked parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..config import Settings
from ..errors import TooLarge
from ..protocol.feed_segments import INDEX_SIZE_BYTES_MAX, SEGMENT_SIZE_BYTES_MAX
from ..protocol.hub_bodies import SignedObject, SignedUploads, SignFeedUploads, SignTaskResult, SignUploads
from ..protocol.manifest import CHUNK_SIZE_BYTES_MAX
from ..protocol.names import object_name, result_object_name, segment_object_name, subfeed_object_name
from ..protocol.tasks import RESULT_FRAME_SIZE_BYTES
from .engines import BucketEngine
from .limits import RateLimiter

__all__ = ["UploadBody", "Uploads", "Wanted", "result_size_bytes_max"]

RATE_WINDOW_SECONDS = 10.0


UploadBody = SignUploads | SignFeedUploads | SignTaskResult


class Wanted(NamedTuple):
    """An object that a node wants to upload. ``crc32c``: of its bytes, where the node told."""

    sha1: str
    object_name: str
    size_bytes: int
    replace: bool = False
    crc32c: int | None = None


class Uploads:
    """Signs uploads. One for each hub, used on its event loop."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._rate = RateLimiter(settings.sign_rate_per_node_max, RATE_WINDOW_SECONDS)

    def check(self, body: UploadBody, node_id: str) -> list[Wanted]:
        """Return what ``body`` asks for, in its order; the index of a subfeed comes last.

        :raises TooLarge: too many objects, or too long a one. :raises RateLimited: too many in the last seconds.
        :raises InvalidName: a part of a name is not well-formed.
        """
        count = _count(body)
        if count > self._settings.sign_batch_max:
            raise TooLarge(what="A request for upload URLs", size=count, limit=self._settings.sign_batch_max,
                           setting="sign_batch_max, counted in objects")
        wanted = self._wanted(body)
        self._rate.spend(
            node_id, count, self._clock(), who=f"node {node_id[:16]}",
            limit=f"{self._settings.sign_rate_per_node_max:g} upload URLs a second are allowed")
        return wanted

    def sign(self, bucket: BucketEngine, wanted: list[Wanted], node_id: str) -> SignedUploads:
        """Sign what ``check`` returned."""
        return SignedUploads(uploads=[self._signed(bucket, item, node_id) for item in wanted])

    def _wanted(self, body: UploadBody) -> list[Wanted]:
        channel = body.channel
        if isinstance(body, SignTaskResult):
            limit = result_size_bytes_max(self._settings)
            _check_size(f"The result {body.result_id}", body.size, limit, "task_result_size_bytes_max of the hub")
            return [Wanted(body.result_id, result_object_name(channel, body.result_id), body.size, body.replace,
                           body.crc32c)]
        if isinstance(body, SignUploads):
            for item in body.objects:
                _check_size(f"The object {item.sha1}", item.size, CHUNK_SIZE_BYTES_MAX, "the longest chunk")
            return [Wanted(item.sha1, object_name(channel, item.sha1), item.size, crc32c=item.crc32c)
                    for item in body.objects]
        feed_id, subfeed = body.feed_id, body.subfeed
        for item in body.segments:
            _check_size(f"The segment {item.sha1}", item.size, SEGMENT_SIZE_BYTES_MAX, "the longest segment")
        wanted = [Wanted(item.sha1, segment_object_name(channel, feed_id, subfeed, item.sha1), item.size,
                         crc32c=item.crc32c) for item in body.segments]
        if body.index_size_bytes is not None:
            _check_size("The index", body.index_size_bytes, INDEX_SIZE_BYTES_MAX, "the longest index")
            name = subfeed_object_name(channel, feed_id, subfeed)
            wanted.append(Wanted("", name, body.index_size_bytes, replace=True, crc32c=body.index_crc32c))
        return wanted

    def _signed(self, bucket: BucketEngine, item: Wanted, node_id: str) -> SignedObject:
        signed = bucket.sign_put(item.object_name, item.size_bytes, self._settings.url_life_seconds,
                                 replace=item.replace, node_id=node_id, crc32c=item.crc32c)
        return SignedObject(sha1=item.sha1, object=item.object_name, url=signed.url, headers=signed.headers,
                            resumable=signed.resumable)


def _count(body: UploadBody) -> int:
    if isinstance(body, SignUploads):
        return len(body.objects)
    if isinstance(body, SignFeedUploads):
        return len(body.segments) + (body.index_size_bytes is not None)
    return 1


def result_size_bytes_max(settings: Settings) -> int:
    """The longest object that holds a result: what may be in it, its arguments, and a frame."""
    return settings.task_result_size_bytes_max + settings.task_kwargs_size_bytes_max + RESULT_FRAME_SIZE_BYTES


def _check_size(what: str, size_bytes: int, limit_bytes: int, setting: str) -> None:
    if size_bytes > limit_bytes:
        raise TooLarge(what=what, size=size_bytes, limit=limit_bytes, setting=setting)
