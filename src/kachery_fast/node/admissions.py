"""Lasting codes that the node's owner admits, as in 2022: a list of texts in the mutable ``_other_client_auth_codes``.

They are for clients that cannot read the file ``client-auth``, whose code changes all the time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor

from ..config import Settings
from ..errors import KacheryError
from ..store.mutables import ADMITTED_KEY, DATABASE_NAME, MutableStore
from .identity import ClientAuth
from .threads import in_thread

__all__ = ["Admissions"]

_KEPT_SECONDS = 3.0

log = logging.getLogger("kachery_fast.node")


class Admissions:
    """Who is admitted; read anew at most every few seconds, and only when a code is not that of ``client-auth``.

    :param clock: seconds that never go back.
    """

    def __init__(self, settings: Settings, client_auth: ClientAuth, threads: Executor,
                 clock: Callable[[], float]) -> None:
        self._settings = settings
        self._client_auth = client_auth
        self._threads = threads
        self._clock = clock
        self._admitted: object = None
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def admit(self, code: str) -> bool:
        """Whether the owner has admitted a code. One that was added or taken off counts within three seconds."""
        async with self._reading:
            if self._clock() - self._read_at >= _KEPT_SECONDS:
                try:
                    self._admitted = await in_thread(self._threads, self._read)
                except KacheryError as error:
                    log.error("the codes that are admitted could not be read: %s", error)
                    self._admitted = None
                self._read_at = self._clock()
        return self._client_auth.admits(code, self._admitted)

    def _read(self) -> object:
        if not (self._settings.storage_dir / DATABASE_NAME).exists():
            return None
        with MutableStore(self._settings.storage_dir,
                          value_size_bytes_max=self._settings.mutable_size_bytes_max) as mutables:
            return mutables.get(ADMITTED_KEY)[1]
