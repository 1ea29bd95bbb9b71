"""How much is in a bucket that the hub does not watch: counted by listing it, and anew when the count is old."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import NamedTuple

from ...errors import KacheryError
from . import BucketTotals, KindTotal, ObjectRecord

__all__ = ["Counts"]

_log = logging.getLogger("kachery_fast.hub")

# How long a count holds: a hundred times as long as it took, within these bounds.
_HOLDS_SECONDS_MIN, _HOLDS_SECONDS_MAX = 10.0, 600.0
_HOLDS_TIMES = 100
_KINDS = ("feeds", "sha1", "task_results")


class _Counted(NamedTuple):
    """``until``: when it is old."""

    kinds: dict[str, KindTotal]
    until: float


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
        """Return what the last count came to. When it is old, which ``counted`` tells, another one follows."""
        with self._lock:
            counted = self._counted.get(channel)
            old = counted is None or self._clock() >= counted.until
            if old and channel not in self._counting:
                self._counting.add(channel)
                self._counter.submit(self._count, channel)
        return BucketTotals(dict.fromkeys(_KINDS, KindTotal()) if counted is None else counted.kinds, not old)

    def forget(self, channel: str) -> None:
        """The last count holds no more."""
        with self._lock:
            self._counted.pop(channel, None)

    def removed(self, object_name: str, size_bytes: int | None = None) -> None:
        """An object is there no more, which was counted. One of which the size is not known makes the count an old
        one."""
        channel, kind, _ = object_name.split("/", 2)
        with self._lock:
            counted = self._counted.get(channel)
            if counted is None:
                return
            if size_bytes is None:
                self._counted[channel] = counted._replace(until=0.0)
                return
            before = counted.kinds[kind]
            self._counted[channel] = counted._replace(kinds={
                **counted.kinds, kind: KindTotal(before.objects - 1, before.size_bytes - size_bytes)})

    def _count(self, channel: str) -> None:
        at, begun = self._clock(), time.monotonic()
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
            holds_seconds = _HOLDS_TIMES * (time.monotonic() - begun)
            with self._lock:
                self._counted[channel] = _Counted(
                    kinds, at + min(max(holds_seconds, _HOLDS_SECONDS_MIN), _HOLDS_SECONDS_MAX))
        finally:
            with self._lock:
                self._counting.discard(channel)
