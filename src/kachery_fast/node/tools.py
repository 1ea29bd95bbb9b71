"""What the transfers of a node share, and what its feeds do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

from ..config import Settings
from ..protocol.asking import RequestLimits
from ..store.feeds import FeedLog
from ..store.files import FileStore

__all__ = ["FeedTools", "Tools", "Traffic"]


@dataclass
class Traffic:
    """What a node has moved since its start: whole objects, and their bytes."""

    uploaded_objects: int = 0
    uploaded_bytes: int = 0
    downloaded_objects: int = 0
    downloaded_bytes: int = 0


class Tools(NamedTuple):
    """What the transfers of a node share: its store, limits, thread pools, the bound on downloads, and the count."""

    store: FileStore
    limits: RequestLimits
    disk_threads: Executor
    verify_threads: Executor
    downloads: asyncio.Semaphore
    traffic: Traffic


class FeedTools(NamedTuple):
    """What the feeds of a node share: its log, settings, threads, the bounds on segments and on long indexes in
    memory, the count.

    ``on_grown(feed id, subfeed, count, forked)`` hears when the copy of another node's subfeed has changed.
    """

    log: FeedLog
    settings: Settings
    threads: Executor
    segments: asyncio.Semaphore
    indexes: asyncio.Semaphore
    traffic: Traffic
    on_grown: Callable[[str, str, int, bool], None]
