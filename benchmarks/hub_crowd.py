"""The nodes of the hub's load: a process of its own, told by JSON lines what to do, that answers with JSON lines.

So its share of the two processors can be told from the hub's.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import secrets
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from kachery_fast.config import load_settings
from kachery_fast.errors import KacheryError
from kachery_fast.net.hub import HubClient
from kachery_fast.net.loop import run_on_loop
from kachery_fast.protocol.names import ObjectName
from tests.hub.changes import Changes
from tests.hub.crowd import LightNode, Place, RealNode, channel_of, crowd_key, sent_at

CONNECTING_MAX = 64
LOST_AFTER_SECONDS = 10.0
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
        end = time.monotonic() + LOST_AFTER_SECONDS
        while self._heard < expected and time.monotonic() < end:
            await asyncio.sleep(0.05)
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
        begun, count = time.perf_counter(), 0
        while not ending.done():
            node = self._nodes[count * STRIDE % len(self._nodes)]
            count += 1
            task = loop.create_task(node.say())
            saying.add(task)
            task.add_done_callback(saying.discard)
            task.add_done_callback(self._said)
            await asyncio.sleep(max(0.0, begun + count / rate - time.perf_counter()))
        await asyncio.gather(*saying, return_exceptions=True)
        return count

    def _said(self, task: asyncio.Task[None]) -> None:
        self._failed += task.exception() is not None

    async def survive(self, rate: float, down: str, up: str, nodes: int, seconds: float) -> dict[str, Any]:
        """Publish, sign and change until the hub was away and every node is back.

        :param down, up: files that appear when the hub is ended, and when it is up again, the latter with the time.
        :param seconds: how long after that at most.
        """
        self._changes = Changes("change", self._place.url, self._token, self._place.settings)
        others = [asyncio.create_task(self._changes.make_for_ever()), asyncio.create_task(self._sign_for_ever())]
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
        while not down.exists():
            await asyncio.sleep(0.01)
        self._since = time.monotonic()  # what was sent later was sent to the hub that came after
        while not (up.exists() and up.read_text()):
            await asyncio.sleep(0.01)
        since = float(up.read_text())
        while len(self._back) < len(self._nodes) and time.monotonic() < since + seconds:
            await asyncio.sleep(0.05)
        return since

    async def _sign_for_ever(self) -> None:
        number = 0
        while True:
            node = self._nodes[number % len(self._nodes)]
            number += 1
            try:
                await node.hub.sign_uploads(node.channel_name, [(secrets.token_hex(20), 20 << 20)])
            except KacheryError:
                await asyncio.sleep(0.01)

    async def sign(self, nodes: int, seconds: float, *, at_once: int = 0, rate: float = 0.0,
                   download: bool = False) -> dict[str, Any]:
        """Ask for signed URLs, one a request, in the name of one node after the other, each on its connection.

        :param at_once: requests that are under way all the time; else ``rate``: requests a second, evenly.
        """
        clients = [HubClient(self._place.url, crowd_key(number), self._place.settings) for number in range(nodes)]
        times_ms: list[float] = []
        turns = iter(range(1 << 60))

        async def one() -> None:
            number = next(turn for turn in turns) % nodes
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


def _spread(times_ms: list[float]) -> dict[str, float]:
    if len(times_ms) < 2:
        return {}
    cuts = statistics.quantiles(times_ms, n=100)
    return {"p50_ms": cuts[49], "p99_ms": cuts[98], "max_ms": max(times_ms)}


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    crowd = Crowd(**json.loads(await reader.readline()))
    while line := await reader.readline():
        command = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            answer = await getattr(crowd, command.pop("do"))(**command)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            answer = {"error": repr(error)}
        answer["crowd_share"] = (time.process_time() - cpu) / (time.perf_counter() - wall)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    run_on_loop(_serve())
    os._exit(0)  # thousands of connections need no farewell
