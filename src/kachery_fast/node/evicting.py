"""Keeping the cached copies of a node within their bound, and its trash short, while the node runs."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Executor

from ..config import Settings
from ..errors import KacheryError
from ..store.eviction import CacheKeeper
from ..store.files import FileStore
from ..store.quota import quota_of
from .faults import logged_fault
from .threads import in_thread

__all__ = ["Evicting", "TrashAge"]

log = logging.getLogger("kachery_fast.node")

# Evicting a little more than is over the bound makes it a rare thing.
_LOW_WATER_FRACTION = 0.9
_EMPTY_TRASH_SECONDS = 3600.0
_DAY_SECONDS = 86400.0
# The clock may run ahead of the machine's own count by so much from one look to the next.
_JITTER_SECONDS = 1.0


class TrashAge:
    """Tells which moment is surely long enough ago, also when the system's clock is put forward.

    By how much it was put forward is not believed for as long as the trash is kept; after that all that was in the
    trash has been there for long enough in truth. What happened before this process started cannot be known, so
    nothing is old within its first hour.

    :param wall: seconds since 1970, by a clock that people and servers set.
    :param running: seconds from any origin, by one that they do not.
    """

    def __init__(self, keep_seconds: float, wall: float, running: float) -> None:
        self._keep_seconds = keep_seconds
        self._wall, self._running = wall, running
        self._patient_until = running + min(keep_seconds, _EMPTY_TRASH_SECONDS)
        self._jumps: list[tuple[float, float]] = []

    def before(self, wall: float, running: float) -> float:
        """Return the time, by the first clock, before which the trash may be emptied. To be asked often."""
        jump = (wall - self._wall) - (running - self._running)
        self._wall, self._running = wall, running
        self._jumps = [(at, by) for at, by in self._jumps if running - at < self._keep_seconds]
        if jump > _JITTER_SECONDS:
            self._jumps.append((running, jump))
        if running < self._patient_until:
            return float("-inf")
        return wall - self._keep_seconds - sum(by for _, by in self._jumps)


def running_seconds() -> float:
    """Return the time that the machine has run for, with what it slept where the system counts that."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Evicting:
    """Looks every ``cache_check_seconds`` whether there is too much, at the cost of reading one row."""

    def __init__(self, settings: Settings, store: FileStore, threads: Executor) -> None:
        self._settings = settings
        self._store = store
        self._threads = threads
        self._keeper = CacheKeeper(settings.storage_dir)
        self._emptied_at = float("-inf")
        self._trash_age = TrashAge(settings.trash_keep_days * _DAY_SECONDS, time.time(), running_seconds())
        self._why = self._trash_why = ""
        self._reasons: tuple[str, ...] = ()
        self._is_stuck = False
        self._stopping = threading.Event()

    async def run(self) -> None:
        """Go on until cancelled; what fails is logged, once, and tried again."""
        while True:
            await asyncio.sleep(self._settings.cache_check_seconds)
            try:
                await in_thread(self._threads, self._look)
                self._why = ""
            except KacheryError as error:
                if error.message != self._why:
                    log.error("nothing is evicted: %s", error)
                self._why = error.message
            except Exception as error:
                self._why = logged_fault(error, "the eviction")

    def stop(self) -> None:
        """End what is under way at its next file, or batch of files."""
        self._stopping.set()

    def close(self) -> None:
        """Let go of the index, here and in the store that fills it."""
        self._keeper.index.close()
        self._store.close()

    def _look(self) -> None:
        settings, now = self._settings, time.time()
        before = self._trash_age.before(now, running_seconds())
        if time.monotonic() - self._emptied_at > _EMPTY_TRASH_SECONDS:
            self._empty_trash(before, now)
        files, size = self._keeper.make_room(stop=self._stopping.is_set)
        if files:
            log.info("the disk is nearly full: deleted %d evicted copies, %d bytes, from the trash", files, size)
        quota = quota_of(settings.storage_dir, settings.cache_size_bytes_max)
        if quota is None or self._keeper.index.totals().bytes <= quota:
            self._is_stuck = False
            return
        done = self._keeper.evict(int(quota * _LOW_WATER_FRACTION), now=now, keep_seconds=settings.cache_keep_seconds,
                                  stop=self._stopping.is_set)
        if done.files:
            log.info("evicted %d cached copies, %d bytes; %d bytes are cached, %d may be", *done[:3], quota)
        if done.failed and done.reasons != self._reasons:
            log.error("%d cached copies could not be evicted: %s", done.failed, " ".join(done.reasons))
        self._reasons = done.reasons
        stuck = not done.files and not done.failed and done.left_bytes > quota and not self._stopping.is_set()
        if stuck and not self._is_stuck:
            log.warning("%d bytes are cached, %d may be, and nothing can go: the copies are pinned, or came or were "
                        "used within KACHERY_CACHE_KEEP_SECONDS", done.left_bytes, quota)
        self._is_stuck = stuck

    def _empty_trash(self, before: float, now: float) -> None:
        """Delete what this program put in the trash; what one of 2022 left in its own is for its user to delete."""
        self._emptied_at = time.monotonic()
        try:
            files, size = self._keeper.empty_trash(before=before, seen_at=now, stop=self._stopping.is_set)
        except KacheryError as error:
            if error.message != self._trash_why:
                log.error("the trash is not emptied: %s", error)
            self._trash_why = error.message
            return
        self._trash_why = ""
        if files:
            log.info("emptied the trash of %d files, %d bytes", files, size)
