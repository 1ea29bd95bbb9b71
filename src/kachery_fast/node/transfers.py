"""All transfers of a node: one for each file, whoever asks for it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Any

from ..config import Settings
from ..protocol.asking import RequestLimits
from ..protocol.names import FileUri
from ..store.objects import Located
from .link import ChannelLink
from .transfer import Tools, Transfer

__all__ = ["Transfers", "request_limits"]

# A reader of slices comes back soon: its partial file stays open, and verified, for so long.
_LINGER_SECONDS = 60.0
_READ_SPAN_BYTES = 4 * 1024 * 1024


def request_limits(settings: Settings) -> RequestLimits:
    """Return the requester's share of the settings."""
    return RequestLimits(**{field.name: getattr(settings, field.name) for field in fields(RequestLimits)})


class Transfers:
    """Starts transfers, lets further askers join them, and ends those that nobody waits for."""

    def __init__(self, tools: Tools, settings: Settings) -> None:
        self._tools = tools
        self._slots = asyncio.Semaphore(settings.load_requests_max)
        self._active: dict[str, Transfer] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._lingering: dict[str, asyncio.TimerHandle] = {}

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
        located = await self._want(uri, link, None, None)
        if located is None:
            raise AssertionError("a whole file ends as a stored one")
        return located

    async def read(self, uri: FileUri, link: ChannelLink, start: int,
                   end: int | None) -> tuple[int, AsyncIterator[bytes]]:
        """Fetch the chunks that hold the bytes ``start`` to ``end`` (None: the file's end).

        :return: the length of the range, cut at the file's end, and its bytes in spans; chunks come as they are needed.
        :raises KacheryError: as ``load``, also while the spans are read.
        """
        await self._want(uri, link, start, start + 1 if end is None else min(end, start + 1))
        transfer = self._active.get(uri.sha1)
        if transfer is None:
            loop = asyncio.get_running_loop()
            size = (await loop.run_in_executor(self._tools.disk_threads, self._tools.store.find, uri.sha1)).size
        else:
            size, _ = transfer.size_and_read()
        stop = size if end is None else min(end, size)
        return max(0, stop - start), self._spans(uri, link, start, stop)

    async def close(self) -> None:
        """Break off every transfer; what was received is kept."""
        for handle in self._lingering.values():
            handle.cancel()
        await asyncio.gather(*(transfer.close() for transfer in list(self._active.values())))
        await asyncio.gather(*self._closing)

    async def _spans(self, uri: FileUri, link: ChannelLink, start: int, end: int) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        while start < end:
            stop = min(end, start + _READ_SPAN_BYTES)
            await self._want(uri, link, start, stop)
            transfer = self._active.get(uri.sha1)
            if transfer is None:  # somebody else's wish has made the whole file of it meanwhile
                yield await loop.run_in_executor(self._tools.disk_threads, self._read_stored, uri.sha1, start, stop)
            else:
                _, destination = transfer.size_and_read()
                yield await loop.run_in_executor(self._tools.disk_threads, destination.read, start, stop)
            start = stop

    def _read_stored(self, sha1: str, start: int, end: int) -> bytes:
        with self._tools.store.open(sha1) as file:
            file.seek(start)
            return file.read(end - start)

    async def _want(self, uri: FileUri, link: ChannelLink, start: int | None, end: int | None) -> Located | None:
        transfer = await self._joinable(uri.sha1)
        if transfer is not None:
            return await self._wait(transfer, start, end)
        async with self._slots:
            transfer = await self._joinable(uri.sha1)
            if transfer is None:
                transfer = Transfer(uri, link, self._tools, secrets.token_hex(16), lambda: self._forget(uri.sha1))
                self._active[uri.sha1] = transfer
            return await self._wait(transfer, start, end)

    async def _joinable(self, sha1: str) -> Transfer | None:
        """Return the transfer of a file if there is one; one that is just ending is waited for, and is none."""
        while (transfer := self._active.get(sha1)) is not None and transfer.ending:
            await transfer.over.wait()
        return transfer

    async def _wait(self, transfer: Transfer, start: int | None, end: int | None) -> Located | None:
        sha1 = transfer.uri.sha1
        handle = self._lingering.pop(sha1, None)
        if handle is not None:
            handle.cancel()
        fulfilled = False
        try:
            result = await transfer.want(start, end)
            fulfilled = True
            return result
        finally:
            if not transfer.wanted and self._active.get(sha1) is transfer:
                delay = _LINGER_SECONDS if fulfilled and start is not None else 0.0
                loop = asyncio.get_running_loop()
                self._lingering[sha1] = loop.call_later(delay, self._close_unwanted, transfer)

    def _close_unwanted(self, transfer: Transfer) -> None:
        self._lingering.pop(transfer.uri.sha1, None)
        if not transfer.wanted:
            task = asyncio.get_running_loop().create_task(transfer.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _forget(self, sha1: str) -> None:
        self._active.pop(sha1, None)
        handle = self._lingering.pop(sha1, None)
        if handle is not None:
            handle.cancel()
