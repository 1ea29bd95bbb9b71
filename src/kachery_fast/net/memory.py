"""The network in memory, for tests and offline use: the same interfaces, with faults on demand."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict

from ..errors import FileChanged, KacheryError, ObjectMissing, TooLarge, WrongSize
from .bucket import SignedUpload
from .ranges import Progress

__all__ = ["MemoryBucket"]


class MemoryBucket:
    """A ``bucket.Bucket`` in memory. ``objects`` maps names to bytes and may be changed at will.

    Faults: delete from ``objects`` (missing), ``corrupt`` (wrong bytes), ``fail`` (errors), clear ``gate`` (nothing
    moves until it is set). ``puts`` and ``gets`` list the names of the operations that got through, in order.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.gets: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._failures: defaultdict[str, list[KacheryError]] = defaultdict(list)

    def sign(self, object_name: str) -> SignedUpload:
        """Leave to put one object."""
        return SignedUpload(object_name, f"memory:{object_name}", {})

    def corrupt(self, object_name: str, at: int = 0) -> None:
        """Flip the bits of the byte ``at``."""
        data = bytearray(self.objects[object_name])
        data[at] ^= 0xFF
        self.objects[object_name] = bytes(data)

    def fail(self, object_name: str, *errors: KacheryError) -> None:
        """Let the next operations on the object raise ``errors``, one each."""
        self._failures[object_name].extend(errors)

    async def get_into(self, object_name: str, memory: memoryview, *, progress: Progress | None = None) -> None:
        """As ``Bucket.get_into``."""
        data = await self._read(object_name)
        if len(data) != len(memory):
            raise WrongSize(object=object_name, found=len(data), expected=len(memory))
        memory[:] = data
        if progress is not None:
            progress(len(data))

    async def get_small(self, object_name: str, limit_bytes: int) -> bytes:
        """As ``Bucket.get_small``."""
        data = await self._read(object_name)
        if len(data) > limit_bytes:
            raise TooLarge(what=object_name, size=len(data), limit=limit_bytes, setting="the reader's limit")
        return data

    async def size(self, object_name: str) -> int:
        """As ``Bucket.size``."""
        await self._pass(object_name)
        return len(self._find(object_name))

    async def put_from(self, upload: SignedUpload, fd: int, offset: int, length: int, *,
                       progress: Progress | None = None) -> bool:
        """As ``Bucket.put_from``."""
        await self._pass(upload.object_name)
        if upload.object_name in self.objects:
            return False
        data = os.pread(fd, length, offset)
        if len(data) != length:
            raise FileChanged(path="the file being sent", why=f"it ends at byte {offset + len(data)}")
        self.objects[upload.object_name] = data
        self.puts.append(upload.object_name)
        if progress is not None:
            progress(length)
        return True

    async def _read(self, object_name: str) -> bytes:
        await self._pass(object_name)
        data = self._find(object_name)
        self.gets.append(object_name)
        return data

    async def _pass(self, object_name: str) -> None:
        await self.gate.wait()
        await asyncio.sleep(0)
        if self._failures[object_name]:
            raise self._failures[object_name].pop(0)

    def _find(self, object_name: str) -> bytes:
        if object_name not in self.objects:
            raise ObjectMissing(object=object_name)
        return self.objects[object_name]
