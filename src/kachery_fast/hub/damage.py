"""Reports of bad objects. The hub believes nobody: it looks at the object itself, and removes only what is bad."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from ..config import Settings
from ..errors import InvalidArgument, ObjectMissing, RateLimited, ResultRefused, TooLarge
from ..protocol.access import Action, Deny, Grant, decide
from ..protocol.hub_bodies import ReportBadResult, ReportCorrupt
from ..protocol.names import object_name, result_object_name, segment_object_name
from ..protocol.tasks import check_result
from . import grants
from .engines import BucketEngine
from .registry import Registry
from .uploads import result_size_bytes_max

__all__ = ["CHECKS_PER_NODE_MAX", "Damage"]

_log = logging.getLogger("kachery_fast.hub")

# Each check reads up to 64 MiB.
CHECKS_PER_NODE_MAX = 4


class Damage:
    """Checks what is reported. One for each hub, used on its event loop."""

    def __init__(
        self, registry: Registry, settings: Settings, clock: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._result_size_bytes_max = result_size_bytes_max(settings)
        self._clock = clock
        self._checking: Counter[str] = Counter()
        # One thread: hash and removal of an object are one step, and damaged objects are rare.
        self._checker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-checker")

    def close(self) -> None:
        """Finish the checks that were begun."""
        self._checker.shutdown()

    async def report(self, bucket: BucketEngine, body: ReportCorrupt, grant: Grant) -> dict[str, Any]:
        """Remove an object whose bytes do not have the SHA-1 in its name.

        :param grant: that of the reporting node. :returns: ``removed``, and ``actual``: the SHA-1 that was found.
        :raises RateLimited: too many reports of one node at once. :raises InvalidArgument: half a segment's name.
        """
        if bool(body.feed_id) != bool(body.subfeed):
            raise InvalidArgument(what="A segment is named by its feed and its subfeed.")
        name = object_name(body.channel, body.sha1)
        if body.feed_id:
            name = segment_object_name(body.channel, body.feed_id, body.subfeed, body.sha1)
        with self._counted(grant.node_id):
            actual, removed = await asyncio.get_running_loop().run_in_executor(
                self._checker, _check_object, bucket, name, body.sha1)
        if removed:
            # Only damage that was there is written down, so reports cannot fill the registry.
            await self._record(grant, body.sha1, body.found, actual)
        return {"removed": removed, "actual": actual}

    async def report_result(self, bucket: BucketEngine, body: ReportBadResult, grant: Grant) -> dict[str, Any]:
        """Remove a result that is not what it claims to be, or not by a node that may provide tasks here now.

        :param grant: that of the reporting node. :returns: ``removed``, and ``why``, "" when it is good or missing.
        :raises RateLimited: too many reports of one node at once.
        """
        name = result_object_name(body.channel, body.result_id)
        loop = asyncio.get_running_loop()
        with self._counted(grant.node_id):
            try:
                data, etag = await loop.run_in_executor(
                    self._checker, bucket.read, name, self._result_size_bytes_max)
                actual: str | None = hashlib.sha1(data, usedforsecurity=False).hexdigest()
                why = await self._why_bad(body, data)
            except ObjectMissing:
                return {"removed": False, "why": ""}
            except TooLarge as error:
                # No URL is signed for one that long; and what replaces it meanwhile is long too, or made again.
                why, etag, actual = error.message, None, None
            removed = bool(why) and await loop.run_in_executor(
                self._checker, lambda: bucket.remove(name, etag=etag))
        if removed:
            _log.warning("the result %s is removed: %s", name, why)
            await self._record(grant, body.result_id, "", actual)
        return {"removed": removed, "why": why}

    async def _why_bad(self, body: ReportBadResult, data: bytes) -> str:
        try:
            result = await asyncio.get_running_loop().run_in_executor(
                self._checker, check_result, data, body.result_id, body.channel)
        except ResultRefused as error:
            return error.message
        standing = await self._registry.call(grants.find_grant, result.node_id, body.channel)
        decision = decide(standing, Action.PROVIDE_TASKS)
        return f"node {result.node_id[:16]}: {decision.reason}" if isinstance(decision, Deny) else ""

    @contextmanager
    def _counted(self, node_id: str) -> Iterator[None]:
        if self._checking[node_id] >= CHECKS_PER_NODE_MAX:
            raise RateLimited(who=f"node {node_id[:16]}", retry_seconds=1.0,
                              limit=f"{CHECKS_PER_NODE_MAX} reports of damage at once are allowed")
        self._checking[node_id] += 1
        try:
            yield
        finally:
            self._checking[node_id] -= 1
            if not self._checking[node_id]:
                del self._checking[node_id]

    async def _record(self, grant: Grant, name: str, found: str, actual: str | None) -> None:
        await self._registry.call(grants.record_damage, grant, name, found, actual, int(self._clock() * 1000))


def _check_object(bucket: BucketEngine, name: str, sha1: str) -> tuple[str | None, bool]:
    actual: str | None = None
    try:
        actual = bucket.sha1(name)
    except ObjectMissing:
        return None, False
    except TooLarge as error:  # no URL is signed for one that long
        _log.warning("object %s is removed: %s", name, error)
    else:
        if actual == sha1:
            return actual, False
        _log.warning("object %s is damaged (its bytes have the SHA-1 %s); it is removed", name, actual)
    return actual, bucket.remove(name)
