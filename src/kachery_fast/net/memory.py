"""The network in memory, for tests, simulations and offline use: the same interfaces, with faults on demand."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ..errors import BandUnreachable, FileChanged, KacheryError, NotPermitted, ObjectMissing, TooLarge, WrongSize
from .bucket import SignedUpload
from .channel import Message, Receive
from .ranges import Progress
from .targets import FileSpan, Target, size_of

__all__ = ["MemoryBroker", "MemoryBucket", "MemoryChannel"]

_REPLACE = "?replace"


class MemoryBroker:
    """A broker of one process: what is published on a band is delivered to its subscribers by ``loop.call_soon``."""

    def __init__(self, *, message_size_bytes_max: int = 60000) -> None:
        self.message_size_bytes_max = message_size_bytes_max
        self.up = True
        self.published = 0
        self._channels: list[MemoryChannel] = []
        self._receivers: dict[str, list[tuple[MemoryChannel, Receive]]] = {}

    def channel(self, name: str, client_id: str, capability: Mapping[str, Sequence[str]]) -> MemoryChannel:
        """Return a new client's channel.

        :param name: the kachery channel.
        :param capability: band -> "publish" and/or "subscribe"; a band that is missing allows nothing.
        """
        channel = MemoryChannel(self, name, client_id, capability)
        self._channels.append(channel)
        return channel

    def set_up(self, up: bool) -> None:
        """Begin (False) or end (True) an outage: publishing fails meanwhile; subscriptions outlive it."""
        self.up = up

    def _deliver(self, band: str, data: bytes, client_id: str) -> None:
        self.published += 1
        loop = asyncio.get_running_loop()
        message = Message(band, data, client_id)
        for channel, receive in self._receivers.get(band, ()):
            loop.call_soon(channel._receive, receive, message)

    def _subscribe(self, band: str, channel: MemoryChannel, receive: Receive) -> None:
        self._receivers.setdefault(band, []).append((channel, receive))

    def _remove(self, channel: MemoryChannel) -> None:
        if channel in self._channels:
            self._channels.remove(channel)
        for band, receivers in list(self._receivers.items()):
            kept = [pair for pair in receivers if pair[0] is not channel]
            if kept:
                self._receivers[band] = kept
            else:
                del self._receivers[band]


class MemoryChannel:
    """A ``net.channel.Channel`` at a ``MemoryBroker``; the capability may be changed in mid-life by ``grant``."""

    def __init__(self, broker: MemoryBroker, name: str, client_id: str,
                 capability: Mapping[str, Sequence[str]]) -> None:
        self.name = name
        self.client_id = client_id
        self._broker = broker
        self._capability = {band: frozenset(operations) for band, operations in capability.items()}
        self._open = False

    def grant(self, capability: Mapping[str, Sequence[str]]) -> None:
        """Replace what this client may do; a band it may no longer hear is silent from now on."""
        self._capability = {band: frozenset(operations) for band, operations in capability.items()}

    @property
    def connected(self) -> bool:
        """Whether messages flow right now."""
        return self._open and self._broker.up

    @property
    def why(self) -> str:
        """Why not connected, "" when connected."""
        if self.connected:
            return ""
        return "the broker is down" if self._open else "not connected"

    async def connect(self) -> None:
        """Connect.

        :raises BandUnreachable: the broker is down; connected as soon as it is back.
        """
        self._open = True
        self._check_up()

    async def publish(self, band: str, data: bytes) -> None:
        """Publish to every subscriber of the band, this one included. See ``Channel.publish``."""
        if len(data) > self._broker.message_size_bytes_max:
            raise TooLarge(what=f"a message on {band}", size=len(data), limit=self._broker.message_size_bytes_max,
                           setting="message_size_bytes_max")
        self._check_up()
        self._check_permitted(band, "publish")
        self._broker._deliver(band, bytes(data), self.client_id)

    async def subscribe(self, band: str, receive: Receive) -> None:
        """Subscribe; lasts over outages. See ``Channel.subscribe``."""
        self._check_permitted(band, "subscribe")
        self._broker._subscribe(band, self, receive)
        self._check_up()

    async def close(self) -> None:
        """Disconnect; nothing is received from then on."""
        self._open = False
        self._broker._remove(self)

    def _receive(self, receive: Receive, message: Message) -> None:
        if self._open and "subscribe" in self._capability.get(message.band, ()):
            receive(message)

    def _check_up(self) -> None:
        if not self.connected:
            raise BandUnreachable(channel=self.name, why=self.why)

    def _check_permitted(self, band: str, operation: str) -> None:
        if operation not in self._capability.get(band, ()):
            raise NotPermitted(who=self.client_id, action=f"{operation} on {band}", channel=self.name,
                               why=f"the token does not cover {operation} on it")


class MemoryBucket:
    """A ``bucket.Bucket`` in memory. ``objects`` maps names to bytes and may be changed at will.

    Faults: delete from ``objects`` (missing), ``corrupt`` (wrong bytes), ``fail`` (errors), clear ``gate`` (nothing
    moves until it is set). ``puts`` and ``gets`` list the names of the operations that got through, in order.
    """

    splices = False

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.gets: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._failures: defaultdict[str, list[KacheryError]] = defaultdict(list)

    def sign(self, object_name: str, *, replace: bool = False) -> SignedUpload:
        """Leave to put one object, also in the place of another one when ``replace``."""
        return SignedUpload(object_name, f"memory:{object_name}{_REPLACE if replace else ''}", {})

    def corrupt(self, object_name: str, at: int = 0) -> None:
        """Flip the bits of the byte ``at``."""
        data = bytearray(self.objects[object_name])
        data[at] ^= 0xFF
        self.objects[object_name] = bytes(data)

    def fail(self, object_name: str, *errors: KacheryError) -> None:
        """Let the next operations on the object raise ``errors``, one each."""
        self._failures[object_name].extend(errors)

    async def get_into(self, object_name: str, target: Target, *, progress: Progress | None = None,
                       ahead: Iterable[str] = ()) -> None:
        """As ``Bucket.get_into``."""
        data = await self._read(object_name)
        if len(data) != size_of(target):
            raise WrongSize(object=object_name, found=len(data), expected=size_of(target))
        if isinstance(target, FileSpan):
            os.pwrite(target.fd, data, target.offset)
        else:
            target[:] = data
        if progress is not None:
            progress(len(data))

    async def get_small(self, object_name: str, limit_bytes: int, *, fresh: bool = False,
                        ahead: Iterable[str] = ()) -> bytes:
        """As ``Bucket.get_small``; there is no cache on the way."""
        data = await self._read(object_name)
        if len(data) > limit_bytes:
            raise TooLarge(what=object_name, size=len(data), limit=limit_bytes, setting="the reader's limit")
        return data

    async def size(self, object_name: str, *, ahead: Iterable[str] = ()) -> int:
        """As ``Bucket.size``."""
        await self._pass(object_name)
        return len(self._find(object_name))

    async def put_from(self, upload: SignedUpload, fd: int, offset: int, length: int, *,
                       progress: Progress | None = None) -> bool:
        """As ``Bucket.put_from``."""
        await self._pass(upload.object_name)
        if not self._takes(upload):
            return False
        data = os.pread(fd, length, offset)
        if len(data) != length:
            raise FileChanged(path="the file being sent", why=f"it ends at byte {offset + len(data)}")
        self.objects[upload.object_name] = data
        self.puts.append(upload.object_name)
        if progress is not None:
            progress(length)
        return True

    async def put_bytes(self, upload: SignedUpload, data: bytes) -> bool:
        """As ``Bucket.put_bytes``."""
        await self._pass(upload.object_name)
        if not self._takes(upload):
            return False
        self.objects[upload.object_name] = bytes(data)
        self.puts.append(upload.object_name)
        return True

    def _takes(self, upload: SignedUpload) -> bool:
        return upload.object_name not in self.objects or upload.url.endswith(_REPLACE)

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
