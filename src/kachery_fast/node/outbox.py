"""What a node has to say on a channel, until it is sent: by band, as much at once as fits one message."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from ..errors import KacheryError
from ..protocol.messages import BandBody

__all__ = ["OUTBOX_MAX", "OnSayFailed", "Outbox", "Outgoing"]

OUTBOX_MAX = 10_000
# What an envelope adds to a body: node id, signature, names, and the time that is filled in late.
_ENVELOPE_SIZE_BYTES = 300

OnSayFailed = Callable[[KacheryError], None]


class Outgoing(NamedTuple):
    """Something to say on a band."""

    band: str
    body: BandBody
    on_failed: OnSayFailed | None

    def failed(self, error: KacheryError) -> None:
        """Tell who said it that it could not be sent."""
        if self.on_failed is not None:
            self.on_failed(error)


class Outbox:
    """What waits to be sent. ``filled``: whether anything does."""

    def __init__(self) -> None:
        self.filled = asyncio.Event()
        self._waiting: deque[Outgoing] = deque()

    def add(self, outgoing: Outgoing) -> list[Outgoing]:
        """Add something; return what is dropped for it."""
        dropped = [self._waiting.popleft()] if len(self._waiting) >= OUTBOX_MAX else []
        self._waiting.append(outgoing)
        self.filled.set()
        return dropped

    def take(self, size_bytes_max: int) -> list[Outgoing]:
        """Take what goes out together: what is for one band, in order, as much as fits one message."""
        band = self._waiting[0].band
        batch: list[Outgoing] = []
        passed: list[Outgoing] = []
        size = 0
        while self._waiting:
            if self._waiting[0].band != band:
                passed.append(self._waiting.popleft())
                continue
            size += len(msgspec.json.encode(self._waiting[0].body)) + _ENVELOPE_SIZE_BYTES
            if batch and size > size_bytes_max:
                break
            batch.append(self._waiting.popleft())
        self._waiting.extendleft(reversed(passed))
        if not self._waiting:
            self.filled.clear()
        return batch
