"""Which channels everybody may read, told to the embedded bucket whenever it changes.

A change made at this hub holds before its answer is sent. Where several hubs share a registry, each looks there every
``LOOK_SECONDS``; one that cannot look any more lets nobody read without a signature after ``BELIEVED_SECONDS``, so that
what another hub has closed is closed everywhere by then.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress

from ..errors import KacheryError
from . import channels
from .registry import Registry

__all__ = ["BELIEVED_SECONDS", "LOOK_SECONDS", "OpenChannels"]

_log = logging.getLogger("kachery_fast.hub")

LOOK_SECONDS = 2.0
BELIEVED_SECONDS = 10.0


class OpenChannels:
    """Keeps the bucket told. One for each hub, used on its event loop.

    :param tell: takes the names of all public channels, in lower case, and for how many seconds they count.
    """

    def __init__(self, registry: Registry, tell: Callable[[frozenset[str], float], None]) -> None:
        self._registry = registry
        self._tell = tell
        self._in_turn = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look for the first time, and go on looking where others may change the registry."""
        await self.refresh()
        if self._registry.shared:
            self._looking = asyncio.get_running_loop().create_task(self._look_for_ever())

    async def refresh(self) -> None:
        """Look into the registry, and tell the bucket.

        :raises DiskError: the registry failed; nothing is open to everybody until it can be looked at again.
        """
        try:
            await self._look()
        except BaseException:
            self._tell(frozenset(), 0.0)
            raise

    async def _look(self) -> None:
        async with self._in_turn:  # of two looks, the one that began later is told later
            until = asyncio.get_running_loop().time() + BELIEVED_SECONDS
            found = await self._registry.call(channels.list_public)
            left = until - asyncio.get_running_loop().time() if self._registry.shared else math.inf
            self._tell(found, left)

    async def close(self) -> None:
        """Stop looking."""
        if self._looking is not None:
            self._looking.cancel()
            with suppress(asyncio.CancelledError):
                await self._looking

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look()
            except KacheryError as error:
                _log.error("which channels are private could not be looked up: %s", error)
            except Exception:
                _log.exception("which channels are private could not be looked up")
