"""All transfers of a node: one for each file, whoever asks for it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import fields
from typing import Any, TypeVar

from ..config import Settings
from ..errors import Cancelled, KacheryError, LinkInvalid, NotInStore
from ..protocol.asking import RequestLimits
from ..protocol.names import FileUri
from ..store.cache import note_use
from ..store.objects import Located
from .link import ChannelLink
from .threads import in_thread
from .tools import Tools
from .transfer import Transfer

__all__ = ["Transfers", "request_limits"]

# A reader of slices comes back soon: its partial file stays open, and verified, for so long.
_LINGER_SECONDS = 60.0
_READ_SPAN_BYTES = 4 * 1024 * 1024

T = TypeVar("T")


def request_limits(settings: Settings) -> RequestLimits:
    """Return the requester's share of the settings."""
    return RequestLimits(**{field.name: getattr(settings, field.name) for field in fields(RequestLimits)})


class Transfers:
    """Starts transfers, lets further askers join them, and ends those that nobody waits for.

    At most ``load_requests_max`` are open at once; those that only wait for a reader to come back make room first.
    """

    def __init__(self, tools: Tools, settings: Settings) -> None:
        self._tools = tools
        self._slots = asyncio.Semaphore(settings.load_requests_max)
        self._active: dict[str, Transfer] = {}
        self._lingering: dict[str, asyncio.TimerHandle] = {}
        self._closed = False

    def active(self, sha1: str) -> Transfer | None:
        """Return the transfer of a file, if one is under way."""
        return self._active.get(sha1)

    def describe(self) -> list[dict[str, Any]]:
        """Return what is under way, as plain JSON."""
        return [{"uri": str(transfer.uri), "received": transfer.received, "total": transfer.total,
                 "waiting": transfer.waiting} for transfer in self._active.values() if transfer.wanted]

    async def load(self, uri: FileUri, link: ChannelLink) -> Located:
        """Bring a whole file into the store; a transfer of it that is under way is joined.

        :raises KacheryError: it could not be had; the error says what was tried.
        """
        located = await self._ask(uri, link, lambda transfer: transfer.want(None, None))
        if located is None:
            raise AssertionError("a whole file ends as a stored one")
        return located

    async def read(self, uri: FileUri, link: ChannelLink, start: int,
                   end: int | None) -> tuple[int, AsyncGenerator[bytes, None]]:
        """Fetch the chunks that hold the bytes ``start`` to ``end`` (None: the file's end).

        :return: the length of the range, cut at the file's end, and its bytes in spans; chunks come as they are needed.
        :raises KacheryError: as ``load``, also while the spans are read.
        """
        first_end = start + 1 if end is None else min(end, start + 1)
        found = await self._ask(uri, link, lambda transfer: transfer.size(start, first_end), linger=True)
        size = found.size if isinstance(found, Located) else found
        stop = size if end is None else min(end, size)
        return max(0, stop - start), self._spans(uri, link, start, stop)

    async def close(self) -> None:
        """Break off every transfer, and wait until they are over; what was received is kept."""
        self._closed = True
        await asyncio.gather(*(transfer.close() for transfer in list(self._active.values())))

    async def _spans(self, uri: FileUri, link: ChannelLink, start: int, end: int) -> AsyncGenerator[bytes, None]:
        while start < end:
            stop = min(end, start + _READ_SPAN_BYTES)
            yield await self._span(uri, link, start, stop)
            start = stop

    async def _span(self, uri: FileUri, link: ChannelLink, start: int, end: int) -> bytes:
        found = await self._ask(uri, link, lambda transfer: transfer.read(start, end), linger=True)
        if isinstance(found, Located):  # somebody else's wish has made the whole file of it meanwhile
            return await in_thread(self._tools.disk_threads, self._read_stored, uri.sha1, start, end)
        return found

    def _read_stored(self, sha1: str, start: int, end: int) -> bytes:
        with self._tools.store.open(sha1) as file:
            file.seek(start)
            return file.read(end - start)

    async def _ask(self, uri: FileUri, link: ChannelLink, ask: Callable[[Transfer], Awaitable[T]], *,
                   linger: bool = False) -> T | Located:
        """Ask the file's transfer, which is begun if there is none; or return the file, if the store has it by now.

        :param linger: keep the transfer for a while after it has given what was asked for.
        """
        while True:
            transfer = await self._find_or_begin(uri, link)
            if isinstance(transfer, Located):
                return transfer
            self._stay(uri.sha1)
            given = False
            try:
                result = await ask(transfer)
                given = True
                return result
            except KacheryError:
                if self._closed or (transfer.link is link and transfer.uri.manifest_sha1 == uri.manifest_sha1):
                    raise
                # Another's channel or manifest did not do; this asker's may.
                await transfer.over.wait()
            finally:
                if not transfer.wanted and not transfer.ending:
                    if given and linger and not self._slots.locked():
                        self._lingering[uri.sha1] = asyncio.get_running_loop().call_later(
                            _LINGER_SECONDS, self._leave, transfer)
                    else:
                        self._leave(transfer)

    async def _find_or_begin(self, uri: FileUri, link: ChannelLink) -> Transfer | Located:
        sha1 = uri.sha1
        while True:
            transfer = self._active.get(sha1)
            if transfer is not None and transfer.ending:
                await transfer.over.wait()
                continue
            if transfer is not None:
                return transfer
            if self._lingering and self._slots.locked():
                self._leave(self._active[next(iter(self._lingering))])
            await self._slots.acquire()
            try:
                located = await in_thread(self._tools.disk_threads, self._find_stored, sha1)
                if self._closed:
                    raise Cancelled(what=f"The transfer of {uri}")
                if located is not None:
                    return located
                if sha1 not in self._active:
                    transfer = Transfer(uri, link, self._tools, secrets.token_hex(16), lambda: self._forget(sha1))
                    self._active[sha1] = transfer
                    return transfer
            finally:
                if transfer is None:  # else it gives its slot back when it is over
                    self._slots.release()

    def _find_stored(self, sha1: str) -> Located | None:
        try:
            located = self._tools.store.find(sha1)
        except (NotInStore, LinkInvalid):
            return None
        if not located.linked:
            note_use(located.path, time.time())
        return located

    def _stay(self, sha1: str) -> None:
        handle = self._lingering.pop(sha1, None)
        if handle is not None:
            handle.cancel()

    def _leave(self, transfer: Transfer) -> None:
        self._stay(transfer.uri.sha1)
        transfer.break_off()

    def _forget(self, sha1: str) -> None:
        self._active.pop(sha1, None)
        self._stay(sha1)
        self._slots.release()
