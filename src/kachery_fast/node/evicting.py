"""Keeping the cached copies of a node within their bound, and its trash short, while the node runs."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Executor

from ..config import Settings
from ..errors import KacheryError
from ..store.eviction import CacheKeeper
from ..store.files import FileStore
from ..store.quota import quota_of
from .faults import logged_fault
from .threads import in_thread

__all__ = ["Evicting"]

log = logging.getLogger("kachery_fast.node")

# Evicting a little more than is over the bound makes it a rare thing.
_LOW_WATER_FRACTION = 0.9
_EMPTY_TRASH_SECONDS = 3600.0
_DAY_SECONDS = 86400.0


class Evicting:
    """Looks every ``cache_check_seconds`` whether there is too much, at the cost of reading one row."""

    def __init__(self, settings: Settings, store: FileStore, threads: Executor) -> None:
        self._settings = settings
        self._store = store
        self._threads = threads
        self._keeper = CacheKeeper(settings.storage_dir)
        self._emptied_at = float("-inf")
        self._why = self._trash_why = ""
        self._reasons: tuple[str, ...] = ()

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

    def close(self) -> None:
        """Let go of the index, here and in the store that fills it."""
        self._keeper.index.close()
        self._store.close()

    def _look(self) -> None:
        settings, now = self._settings, time.time()
        if time.monotonic() - self._emptied_at > _EMPTY_TRASH_SECONDS:
            self._empty_trash(now - settings.trash_keep_days * _DAY_SECONDS)
        quota = quota_of(settings.storage_dir, settings.cache_size_bytes_max)
        if quota is None or self._keeper.index.totals().bytes <= quota:
            return
        done = self._keeper.evict(int(quota * _LOW_WATER_FRACTION), now=now, keep_seconds=settings.cache_keep_seconds)
        if done.files:
            log.info("evicted %d cached copies, %d bytes; %d bytes are cached, %d may be", *done[:3], quota)
        if done.failed and done.reasons != self._reasons:
            log.error("%d cached copies could not be evicted: %s", done.failed, " ".join(done.reasons))
        self._reasons = done.reasons

    def _empty_trash(self, before: float) -> None:
        """Delete what this program put in the trash; what one of 2022 left in its own is for its user to delete."""
        self._emptied_at = time.monotonic()
        try:
            files, size = self._keeper.empty_trash(before=before)
        except KacheryError as error:
            if error.message != self._trash_why:
                log.error("the trash is not emptied: %s", error)
            self._trash_why = error.message
            return
        self._trash_why = ""
        if files:
            log.info("emptied the trash of %d files, %d bytes", files, size)
