"""Telling the nodes of a channel, over its bands, that the hub has news of it: they ask at once, not in half a minute.

A matter of seconds alone: what is not told is learnt at the next look. So nothing waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..config import Settings
from ..errors import KacheryError
from ..protocol.messages import CHANNEL_CHANGED
from ..protocol.names import BAND_KINDS, band_name
from .buckets import EngineRow
from .pubsubs import Pubsubs, find_pubsub
from .registry import Registry

__all__ = ["Teller"]

_log = logging.getLogger("kachery_fast.hub")

_TELL_SECONDS_MAX = 20.0


class Teller:
    """Tells nodes. One for each hub, used on its event loop.

    :param local_url: returns the hub's address for programs on its machine.
    """

    def __init__(self, registry: Registry, pubsubs: Pubsubs, local_url: Callable[[], str], settings: Settings) -> None:
        self._registry = registry
        self._pubsubs = pubsubs
        self._local_url = local_url
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, channel: str, *, at: EngineRow | None = None) -> None:
        """Begin to tell the nodes of a channel, each of which hears one band at least.

        :param at: the pub/sub service that the channel had before, where the nodes still are.
        """
        task = asyncio.get_running_loop().create_task(self._tell(channel, at))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _tell(self, channel: str, at: EngineRow | None) -> None:
        try:
            await asyncio.wait_for(self._publish(channel, at), _TELL_SECONDS_MAX)
        except (KacheryError, asyncio.TimeoutError) as error:
            _log.info("channel %s: its nodes were not told of its change: %s", channel, error or "no answer in time")
        except Exception:
            _log.exception("channel %s: its nodes could not be told of its change", channel)

    async def _publish(self, channel: str, at: EngineRow | None) -> None:
        row = at or await self._registry.call(find_pubsub, channel)
        bands = [band_name(channel, kind) for kind in BAND_KINDS]
        client = await self._pubsubs.open(channel, row, {band: ["publish"] for band in bands}, self._local_url(),
                                          self._settings)
        try:
            await client.connect()
            for band in bands:
                await client.publish(band, CHANNEL_CHANGED)
        finally:
            await client.close()
