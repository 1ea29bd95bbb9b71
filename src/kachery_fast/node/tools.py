"""What the transfers of a node share."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

from ..protocol.asking import RequestLimits
from ..store.files import FileStore

__all__ = ["Tools", "Traffic"]


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
