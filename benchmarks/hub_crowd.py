"""The nodes of the hub's load: a process of its own, told by JSON lines what to do, that answers with JSON lines.

So its share of the two processors can be told from the hub's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import logging
import os
import secrets
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from httpx._transports import default
from tests.embedded.broker_server import until
from tests.hub.changes import Changes
from tests.hub.crowd import LightNode, Place, RealNode, channel_of, crowd_key, sent_at

from kachery_fast.config import load_settings
from kachery_fast.errors import KacheryError
from kachery_fast.net.hub import HubClient
from kachery_fast.net.loop import run_on_loop
from kachery_fast.protocol.names import ObjectName

CONNECTING_MAX = 64
LOST_AFTER_SECONDS = 10.0
RESTART_SECONDS_MAX = 60.0
# A stride that is prime to the crowd: another channel with each message.
STRIDE = 1009


class Crowd:
    """All nodes of this process."""

    def __init__(self, url: str, per_channel: int, token: str) -> None:
        self._place = Place(url, per_channel, load_settings({}, connect_timeout_seconds=60.0))
        self._token = token
        self._nodes: list[RealNode | LightNode] = []
        self._times_ms: dict[type, list[float]] = {}
        self._failed = 0
        self._back: dict[int, float] = {}
        self._since = float("inf")
        self._changes: Changes | None = None

    def _hear(self, node: RealNode | LightNode, data: bytes) -> None:
        now, sent = time.monotonic(), sent_at(data)
        self._times_ms.setdefault(type(node), []).append(1000 * (now - sent))
        if sent > self._since:
            self._back.setdefault(id(node), now)

    async def connect(self, first: int, count: int, real_every: int) -> dict[str, Any]:
        """Connect nodes, of which one in ``real_every`` is what nodes really are, and listen."""
        kinds: dict[bool, type[RealNode | LightNode]] = {True: RealNode, False: LightNode}
        fresh = [kinds[number % real_every == 0](number, self._place, self._hear)
                 for number in range(first, first + count)]
        self._nodes += fresh
        slots = asyncio.Semaphore(CONNECTING_MAX)

        async def one(node: RealNode | LightNode) -> None:
            async with slots:
                await node.connect()

        await asyncio.gather(*(one(node) for node in fresh))
        gc.collect()
        gc.freeze()
        return {"real": sum(isinstance(node, RealNode) for node in self._nodes)}

    async def publish(self, rate: float, seconds: float) -> dict[str, Any]:
        """Have one node after the other publish, at a rate a second, evenly; return how late all was heard."""
        self._times_ms, self._failed = {}, 0
        sent = await self._publish(rate, asyncio.sleep(seconds))
        expected = (sent - self._failed) * self._place.per_channel
        with contextlib.suppress(AssertionError):  # what is lost is told
            await until(lambda: self._heard >= expected, LOST_AFTER_SECONDS)
        times_ms = [each for times in self._times_ms.values() for each in times]
        return {"sent": sent, "failed": self._failed, "expected": expected, "heard": self._heard,
                "message_bytes": len(self._nodes[0].wish()), **_spread(times_ms),
                "real": _spread(self._times_ms.get(RealNode, []))}

    @property
    def _heard(self) -> int:
        return sum(len(times) for times in self._times_ms.values())

    async def _publish(self, rate: float, end: Awaitable[object]) -> int:
        """Publish until ``end``; returns how many were sent."""
        loop = asyncio.get_running_loop()
        ending = asyncio.ensure_future(end)
        saying: set[asyncio.Task[None]] = set()
        begun, sent = time.perf_counter(), 0
        while not ending.done():
            node = self._nodes[sent * STRIDE % len(self._nodes)]
            sent += 1
            task = loop.create_task(node.say())
            saying.add(task)
            task.add_done_callback(saying.discard)
            task.add_done_callback(self._said)
            await asyncio.sleep(max(0.0, begun + sent / rate - time.perf_counter()))
        await asyncio.gather(*saying, return_exceptions=True)
        return sent

    def _said(self, task: asyncio.Task[None]) -> None:
        self._failed += task.exception() is not None

    async def survive(self, rate: float, signed_rate: float, down: str, up: str, seconds: float) -> dict[str, Any]:
        """Publish, sign and change until the hub was away and every node is back.

        :param rate, signed_rate: messages, and about as many requests for signed URLs, a second.
        :param down, up: files that appear when the hub is ended, and when it is up again, the latter with the time.
        :param seconds: how long after that at most.
        """
        self._changes = Changes("change", self._place.url, self._token, self._place.settings)
        others = [asyncio.create_task(self._changes.make_for_ever()),
                  asyncio.create_task(self._sign_for_ever(signed_rate))]
        self._back, self._since = {}, float("inf")
        returned = asyncio.create_task(self._returned(Path(down), Path(up), seconds))
        await self._publish(rate, returned)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        since = returned.result()
        back = sorted(when - since for when in self._back.values())
        return {"back": len(back), "p50_seconds": statistics.median(back) if back else None,
                "last_seconds": back[-1] if len(back) == len(self._nodes) else None,
                "real_last_seconds": max((self._back.get(id(node), float("inf")) - since for node in self._nodes
                                          if isinstance(node, RealNode)), default=None),
                "changes": self._changes.count, "lost_changes": await self._changes.lost()}

    async def _returned(self, down: Path, up: Path, seconds: float) -> float:
        await until(down.exists, RESTART_SECONDS_MAX)
        self._since = time.monotonic()  # what was sent later was sent to the hub that came after
        await until(lambda: _time_in(up) is not None, RESTART_SECONDS_MAX)
        since = _time_in(up) or 0.0
        with contextlib.suppress(AssertionError):  # who is not back is told
            await until(lambda: len(self._back) == len(self._nodes), seconds)
        return since

    async def _sign_for_ever(self, rate: float) -> None:
        for number in count():
            node = self._nodes[number % len(self._nodes)]
            with contextlib.suppress(KacheryError):
                await node.hub.sign_uploads(node.channel_name, [(secrets.token_hex(20), 20 << 20)])
            await asyncio.sleep(1 / rate)

    async def sign(self, nodes: int, seconds: float, *, at_once: int = 0, rate: float = 0.0,
                   download: bool = False) -> dict[str, Any]:
        """Ask for signed URLs, one a request, in the name of one node after the other, each on its connection.

        :param at_once: requests that are under way all the time; else ``rate``: requests a second, evenly.
        """
        clients = [HubClient(self._place.url, crowd_key(number), self._place.settings) for number in range(nodes)]
        times_ms: list[float] = []
        turns = count()

        async def one() -> None:
            number = next(turns) % nodes
            channel = channel_of(number, self._place.per_channel)
            begun = time.perf_counter()
            if download:
                await clients[number].sign_downloads(ObjectName(channel, "file", ""), [secrets.token_hex(20)])
            else:
                await clients[number].sign_uploads(channel, [(secrets.token_hex(20), 20 << 20)])
            times_ms.append(1000 * (time.perf_counter() - begun))

        async def keep_asking(going: Callable[[], bool]) -> None:
            while going():
                await one()

        await asyncio.gather(*(keep_asking(lambda: len(times_ms) < nodes) for _ in range(16)))  # connects all
        times_ms.clear()
        begun = time.perf_counter()
        if rate:
            asking = []
            while time.perf_counter() - begun < seconds:
                asking.append(asyncio.create_task(one()))
                await asyncio.sleep(max(0.0, begun + len(asking) / rate - time.perf_counter()))
            await asyncio.gather(*asking)
        else:
            await asyncio.gather(*(
                keep_asking(lambda: time.perf_counter() - begun < seconds) for _ in range(at_once)))
        elapsed = time.perf_counter() - begun
        for client in clients:
            await client.close()
        return {"requests": len(times_ms), "per_second": len(times_ms) / elapsed, **_spread(times_ms)}


def _time_in(path: Path) -> float | None:
    text = path.read_text() if path.exists() else ""
    return float(text) if text else None


def _spread(times_ms: list[float]) -> dict[str, float]:
    if len(times_ms) < 2:
        return {}
    cuts = statistics.quantiles(times_ms, n=100)
    return {"p50_ms": cuts[49], "p99_ms": cuts[98], "max_ms": max(times_ms)}


async def _serve() -> None:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of what the SDK leaves behind
    # Each client of the SDK makes one, for 25 ms; a machine has one node, and this process has many.
    vars(default)["create_ssl_context"] = functools.cache(httpx.create_ssl_context)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    crowd = Crowd(**json.loads(await reader.readline()))
    while line := await reader.readline():
        command = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            answer = await getattr(crowd, command.pop("do"))(**command)
        except Exception as error:  # whatever it is, it is told
            answer = {"error": repr(error)}
        answer["crowd_share"] = (time.process_time() - cpu) / (time.perf_counter() - wall)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    run_on_loop(_serve())
    os._exit(0)  # thousands of connections need no farewell
