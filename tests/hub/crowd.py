"""A crowd at work: it connects, publishes, changes things, and lives through the restart of its hub."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import statistics
import time
from collections.abc import Awaitable
from itertools import count
from pathlib import Path
from typing import Any

from kachery_fast.cli.lab import Program, free_port
from kachery_fast.config import load_settings
from kachery_fast.errors import KacheryError
from kachery_fast.hub.registry import Registry, registry_url
from tests.embedded.broker_server import until
from tests.hub.changes import Changes
from tests.hub.crowd_nodes import LightNode, Place, RealNode, register, sent_at

__all__ = ["Crowd", "CrowdedHub", "spread"]

OWNER = "lab@localhost"
CONNECTING_MAX = 64
LOST_AFTER_SECONDS = 10.0
RESTART_SECONDS_MAX = 60.0
# A stride that is prime to the crowd: another channel with each message.
STRIDE = 1009


class CrowdedHub:
    """``kachery-fast hub`` in a process of its own, with the nodes of a crowd registered.

    :param directory: where everything is kept.
    """

    def __init__(self, directory: Path, nodes: int, per_channel: int, *, private: bool = False) -> None:
        self.per_channel = per_channel
        self.directory = directory / "hub"
        self.directory.mkdir(mode=0o700, parents=True)
        asyncio.run(self._register(nodes, private))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("KACHERY_")}
        self.program = Program(["hub", "--dir", str(self.directory), "--port", str(port), "--owner", OWNER], environ,
                               directory / "hub.log")

    async def _register(self, nodes: int, private: bool) -> None:
        registry = Registry(registry_url("", self.directory))
        await registry.open()
        await registry.call(register, OWNER, nodes, self.per_channel, private=private)
        await registry.close()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        address = self.directory / "address"
        address.unlink(missing_ok=True)
        self.program.start()
        self.program.wait_until(address.exists, "the hub")

    @property
    def token(self) -> str:
        """The owner's."""
        return (self.directory / "owner-token").read_text().strip()

    @property
    def cpu_seconds(self) -> float:
        """Of this start of it, all threads."""
        fields = Path(f"/proc/{self.program.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Crowd:
    """All nodes of this process."""

    def __init__(self, url: str, per_channel: int, token: str) -> None:
        self.place = Place(url, per_channel, load_settings({}, connect_timeout_seconds=60.0))
        self._token = token
        self.nodes: list[RealNode | LightNode] = []
        self._times_ms: dict[type, list[float]] = {}
        self._failed = 0
        self._back: dict[int, float] = {}
        self._since = float("inf")
        self._changes: Changes | None = None
        self._times = 0

    @property
    def changes_made(self) -> int:
        """How many changes were acknowledged."""
        return 0 if self._changes is None else self._changes.count

    def _hear(self, node: RealNode | LightNode, data: bytes) -> None:
        now, sent = time.monotonic(), sent_at(data)
        self._times_ms.setdefault(type(node), []).append(1000 * (now - sent))
        if sent > self._since:
            self._back.setdefault(id(node), now)

    async def connect(self, first: int, count: int, real_every: int) -> dict[str, Any]:
        """Connect nodes, of which one in ``real_every`` is what nodes really are, and listen."""
        kinds: dict[bool, type[RealNode | LightNode]] = {True: RealNode, False: LightNode}
        fresh = [kinds[number % real_every == 0](number, self.place, self._hear)
                 for number in range(first, first + count)]
        self.nodes += fresh
        slots = asyncio.Semaphore(CONNECTING_MAX)

        async def one(node: RealNode | LightNode) -> None:
            async with slots:
                await node.connect()

        await asyncio.gather(*(one(node) for node in fresh))
        return {"real": sum(isinstance(node, RealNode) for node in self.nodes)}

    async def publish(self, rate: float, seconds: float) -> dict[str, Any]:
        """Have one node after the other publish, at a rate a second, evenly; return how late all was heard."""
        self._times_ms, self._failed = {}, 0
        sent = await self._publish(rate, asyncio.sleep(seconds))
        expected = (sent - self._failed) * self.place.per_channel
        with contextlib.suppress(AssertionError):  # what is lost is told
            await until(lambda: self._heard >= expected, LOST_AFTER_SECONDS)
        times_ms = [each for times in self._times_ms.values() for each in times]
        return {"sent": sent, "failed": self._failed, "expected": expected, "heard": self._heard,
                "message_bytes": len(self.nodes[0].wish()), **spread(times_ms),
                "real": spread(self._times_ms.get(RealNode, []))}

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
            node = self.nodes[sent * STRIDE % len(self.nodes)]
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
        self._times += 1
        self._changes = Changes(f"change-{self._times}", self.place.url, self._token, self.place.settings)
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
        lost = await self._changes.lost()
        await self._changes.close()
        return {"back": len(back), "p50_seconds": statistics.median(back) if back else None,
                "last_seconds": back[-1] if len(back) == len(self.nodes) else None,
                "real_last_seconds": max((self._back.get(id(node), float("inf")) - since for node in self.nodes
                                          if isinstance(node, RealNode)), default=None),
                "changes": self.changes_made, "lost_changes": lost}

    async def _returned(self, down: Path, up: Path, seconds: float) -> float:
        await until(down.exists, RESTART_SECONDS_MAX)
        self._since = time.monotonic()  # what was sent later was sent to the hub that came after
        await until(lambda: _time_in(up) is not None, RESTART_SECONDS_MAX)
        since = _time_in(up) or 0.0
        with contextlib.suppress(AssertionError):  # who is not back is told
            await until(lambda: len(self._back) == len(self.nodes), seconds)
        return since

    async def _sign_for_ever(self, rate: float) -> None:
        for number in count():
            node = self.nodes[number % len(self.nodes)]
            with contextlib.suppress(KacheryError):
                await node.hub.sign_uploads(node.channel_name, [(secrets.token_hex(20), 20 << 20)])
            await asyncio.sleep(1 / rate)

    async def close(self) -> None:
        """Disconnect everybody."""
        await asyncio.gather(*(node.close() for node in self.nodes))


def _time_in(path: Path) -> float | None:
    text = path.read_text() if path.exists() else ""
    return float(text) if text else None


def spread(times_ms: list[float]) -> dict[str, float]:
    """The middle, the slowest of a hundred but one, and the slowest."""
    if len(times_ms) < 2:
        return {}
    cuts = statistics.quantiles(times_ms, n=100)
    return {"p50_ms": cuts[49], "p99_ms": cuts[98], "max_ms": max(times_ms)}
