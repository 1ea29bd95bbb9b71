"""How much is in a bucket that the hub does not watch: counted by listing it, and anew when the count is old."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import NamedTuple

from ...errors import KacheryError
from . import BucketTotals, KindTotal, ObjectRecord

__all__ = ["RECOUNT_SECONDS", "Counts"]

_log = logging.getLogger("kachery_fast.hub")

RECOUNT_SECONDS = 600.0
_KINDS = ("feeds", "sha1", "task_results")


class _Counted(NamedTuple):
    totals: BucketTotals
    at: float


class Counts:
    """The counts of one bucket.

    :param objects: yields the objects whose names begin so. :param counter: runs what counts.
    :param clock: seconds since the epoch.
    """

    def __init__(
        self, objects: Callable[[str], Iterable[ObjectRecord]], counter: Executor, clock: Callable[[], float]
    ) -> None:
        self._objects = objects
        self._counter = counter
        self._clock = clock
        self._lock = threading.Lock()
        self._counted: dict[str, _Counted] = {}
        self._counting: set[str] = set()

    def totals(self, channel: str) -> BucketTotals:
        """Return what the last count came to, which another one follows when it is old."""
        with self._lock:
            counted = self._counted.get(channel)
            if (counted is None or self._clock() - counted.at >= RECOUNT_SECONDS) and channel not in self._counting:
                self._counting.add(channel)
                self._counter.submit(self._count, channel)
        return counted.totals if counted is not None else BucketTotals(dict.fromkeys(_KINDS, KindTotal()), False)

    def forget(self, channel: str) -> None:
        """The last count holds no more."""
        with self._lock:
            self._counted.pop(channel, None)

    def removed(self, object_name: str, size_bytes: int) -> None:
        """An object is there no more, which was counted."""
        channel, kind, _ = object_name.split("/", 2)
        with self._lock:
            counted = self._counted.get(channel)
            if counted is not None:
                kinds = dict(counted.totals.kinds)
                kinds[kind] = KindTotal(kinds[kind].objects - 1, kinds[kind].size_bytes - size_bytes)
                self._counted[channel] = counted._replace(totals=counted.totals._replace(kinds=kinds))

    def _count(self, channel: str) -> None:
        at = self._clock()
        kinds = dict.fromkeys(_KINDS, KindTotal())
        try:
            for found in self._objects(f"{channel}/"):
                kind = found.name.split("/", 2)[1]
                before = kinds.get(kind, KindTotal())
                kinds[kind] = KindTotal(before.objects + 1, before.size_bytes + found.size_bytes)
        except KacheryError as error:
            _log.warning("channel %s: what is in its bucket could not be counted: %s", channel, error)
        except Exception:
            _log.exception("channel %s: what is in its bucket could not be counted", channel)
        else:
            with self._lock:
                self._counted[channel] = _Counted(BucketTotals(kinds, True), at)
        finally:
            with self._lock:
                self._counting.discard(channel)
