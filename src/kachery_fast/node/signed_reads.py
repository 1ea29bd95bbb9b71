"""Signed URLs for reading from the bucket of a private channel: asked for in batches, ahead of their use, and kept."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

from ..errors import Cancelled, KacheryError, NodeError
from ..net.hub import HubClient
from ..protocol.names import ObjectName, parse_object_name
from .ending import begin_task, end_tasks
from .faults import logged_fault

__all__ = ["SignedReads"]

# About 400 bytes each.
_KEPT_MAX = 4096
# A URL is not used in the last part of its life, so that it still holds when the request arrives.
_UNUSED_SHARE = 4
_UNUSED_SECONDS_MAX = 15.0


class _Key(NamedTuple):
    object_name: str
    head: bool
    bucket: int


class _Signed(NamedTuple):
    url: str
    usable_until_ms: int


class SignedReads:
    """The URLs of one channel's objects; ``private`` says whether they have to be signed, as far as is known.

    What is asked for at once (in one turn of the event loop) goes to the hub in requests of ``batch_max``.
    """

    def __init__(self, hub: HubClient, channel: str, batch_max: int, *, private: bool = False) -> None:
        self.private = private
        self._hub = hub
        self._channel = channel
        self._batch_max = batch_max
        self._kept: OrderedDict[_Key, _Signed] = OrderedDict()
        self._coming: dict[_Key, asyncio.Future[str]] = {}
        self._asked: list[_Key] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._bucket = 0  # how many there were before

    async def url(self, object_name: str, *, head: bool, ahead: Iterable[str], refused: str) -> str | None:
        """See ``net.bucket.ReadUrls``."""
        key = _Key(object_name, head, self._bucket)
        if refused:
            self.private = True
            if key in self._kept and self._kept[key].url == refused:
                del self._kept[key]
        elif not self.private:
            return None
        kept = self._usable(key)
        if kept is not None:
            return kept
        if self._closed:
            raise self._cancelled()
        self._ask(key)
        for name in islice(ahead, self._batch_max - 1):
            other = _Key(name, False, self._bucket)
            if self._usable(other) is None:
                self._ask(other)
        return await asyncio.shield(self._coming[key])

    def forget(self) -> None:
        """The bucket is elsewhere now."""
        self._bucket += 1
        self._kept.clear()

    async def close(self) -> None:
        """Break off what is being asked; who waits for it is told so."""
        self._closed = True
        await end_tasks(self._tasks)
        for coming in self._coming.values():  # of tasks that never had a turn
            self._fail(coming, self._cancelled())
        self._coming.clear()

    def _usable(self, key: _Key) -> str | None:
        kept = self._kept.get(key)
        if kept is None or self._hub.now_ms() >= kept.usable_until_ms:
            return None
        self._kept.move_to_end(key)
        return kept.url

    def _ask(self, key: _Key) -> None:
        if key in self._coming:
            return
        self._coming[key] = asyncio.get_running_loop().create_future()
        self._asked.append(key)
        if len(self._asked) == 1:
            asyncio.get_running_loop().call_soon(self._ask_hub)

    def _ask_hub(self) -> None:
        """Ask for what was asked for in one turn of the loop."""
        keys, self._asked = self._asked, []
        if self._closed:
            return
        groups: defaultdict[tuple[ObjectName, bool], list[tuple[str, _Key]]] = defaultdict(list)
        for key in keys:
            name = parse_object_name(key.object_name)
            groups[name._replace(sha1=""), key.head].append((name.sha1, key))
        for (name, head), items in groups.items():
            for start in range(0, len(items), self._batch_max):
                begin_task(self._sign(name, head, items[start:start + self._batch_max]), self._tasks)

    async def _sign(self, name: ObjectName, head: bool, items: list[tuple[str, _Key]]) -> None:
        before_ms = self._hub.now_ms()
        failure: KacheryError = self._cancelled()
        urls: list[str] = []
        try:
            signed = await self._hub.sign_downloads(name, [sha1 for sha1, _ in items], head=head)
            urls = signed.urls
            unused_ms = min((signed.expires - before_ms) // _UNUSED_SHARE, int(_UNUSED_SECONDS_MAX * 1000))
            for (_, key), url in zip(items, urls, strict=True):
                self._kept[key] = _Signed(url, signed.expires - unused_ms)
            while len(self._kept) > _KEPT_MAX:
                self._kept.popitem(last=False)
        except KacheryError as error:
            failure = error
        except Exception as error:
            failure = NodeError(what=logged_fault(error, f"the signing of reads on {self._channel!r}"))
        finally:
            for number, (_, key) in enumerate(items):
                coming = self._coming.pop(key)
                if urls:
                    coming.set_result(urls[number])
                else:
                    self._fail(coming, type(failure)(**failure.details))  # each its own: who waits adds to it

    def _fail(self, coming: asyncio.Future[str], error: KacheryError) -> None:
        coming.set_exception(error)
        coming.exception()  # collected, also when nobody waits: it may be one that was asked for ahead

    def _cancelled(self) -> Cancelled:
        return Cancelled(what=f"The reading from the bucket of {self._channel!r}")
