"""One hub process under a lab's load: signed URLs, thousands of nodes on its broker, and a restart in the midst.

The hub is ``kachery-fast hub`` with its registry, bucket and broker; the nodes are another process (``hub_crowd.py``).
Both share the machine, loopback between them; how much of a processor each took stands beside each figure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.hub.crowd import CrowdedHub

from benchmarks.measure import Figure, Ratio, figure

__all__ = ["FIGURES"]

NODES = 2000
SIGNING_NODES = 200
PER_CHANNEL = 20
PER_LARGE_CHANNEL = 200
MESSAGES_PER_SECOND = 200.0
SIGNED_PER_SECOND = 50.0
REAL_EVERY = 20

SIGNED_PER_SECOND_MIN = 300.0
HEARD_MS_MAX = 100.0
BACK_SECONDS_MAX = 5.0


class _Crowd:
    """The nodes' process."""

    def __init__(self, hub: CrowdedHub) -> None:
        self._hub = hub
        self._process = subprocess.Popen([sys.executable, "-m", "benchmarks.hub_crowd"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True)
        self._write({"url": hub.url, "per_channel": hub.per_channel, "token": hub.token})

    def _write(self, body: dict[str, Any]) -> None:
        assert self._process.stdin is not None, "it has a pipe"
        self._process.stdin.write(json.dumps(body) + "\n")
        self._process.stdin.flush()

    def ask(self, do: str, meanwhile: Callable[[], None] | None = None, **fields: Any) -> dict[str, Any]:
        """Have something done, and restart the hub meanwhile; return what was measured."""
        cpu, wall = self._hub.cpu_seconds, time.perf_counter()
        self._write({"do": do, **fields})
        if meanwhile is not None:
            meanwhile()
            cpu, wall = self._hub.cpu_seconds, time.perf_counter()
        assert self._process.stdout is not None, "it has a pipe"
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise AssertionError(answer["error"])
        answer["hub_cpu_seconds"] = self._hub.cpu_seconds - cpu
        answer["hub_share"] = answer["hub_cpu_seconds"] / (time.perf_counter() - wall)
        return answer

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


@contextmanager
def _crowded(directory: Path, nodes: int, per_channel: int, **options: Any) -> Iterator[tuple[CrowdedHub, _Crowd]]:
    hub = CrowdedHub(directory, nodes, per_channel, **options)
    try:
        hub.start()
        crowd = _Crowd(hub)
        try:
            yield hub, crowd
        finally:
            crowd.close()
    finally:
        hub.program.stop()


def signed_uploads(directory: Path, seconds: float = 8.0) -> Figure:
    """Upload URLs a second, one a request: each is signed by its node, checked, decided on and signed by the hub."""
    return _signed(directory, seconds, download=False)


def signed_downloads(directory: Path, seconds: float = 8.0) -> Figure:
    """Download URLs a second on private channels, likewise."""
    return _signed(directory, seconds, download=True)


def _signed(directory: Path, seconds: float, *, download: bool) -> Figure:
    with _crowded(directory, SIGNING_NODES, PER_CHANNEL, private=download) as (_, crowd):
        most = crowd.ask("sign", nodes=SIGNING_NODES, seconds=seconds, at_once=32, download=download)
        even = crowd.ask("sign", nodes=SIGNING_NODES, seconds=seconds, rate=SIGNED_PER_SECOND_MIN, download=download)
    kind = "download" if download else "upload"
    note = (f"{SIGNING_NODES} nodes, each on its connection, 32 requests at once: p50 {most['p50_ms']:.0f}, p99 "
            f"{most['p99_ms']:.0f} ms; at {SIGNED_PER_SECOND_MIN:.0f} a second p50 {even['p50_ms']:.1f}, p99 "
            f"{even['p99_ms']:.1f} ms; {_shares(most)}")
    return _against(f"signed {kind} URLs a second / {SIGNED_PER_SECOND_MIN:.0f}", most["per_second"],
                    SIGNED_PER_SECOND_MIN, unit="1/s", bar=">= 1", note=note)


def heard_on_small_channels(directory: Path, seconds: float = 12.0) -> Figure:
    """From publishing to hearing at 200 messages a second: 2,000 nodes on 100 channels of 20."""
    return _heard(directory, seconds, PER_CHANNEL, "<= 1")


def heard_on_large_channels(directory: Path, seconds: float = 12.0) -> Figure:
    """The same on 10 channels of 200: ten times the deliveries."""
    return _heard(directory, seconds, PER_LARGE_CHANNEL, "shown")


def _heard(directory: Path, seconds: float, per_channel: int, bar: str) -> Figure:
    with _crowded(directory, NODES, per_channel) as (_, crowd):
        crowd.ask("connect", first=0, count=NODES, real_every=REAL_EVERY)
        found = crowd.ask("publish", rate=MESSAGES_PER_SECOND, seconds=seconds)
    if found["failed"] or found["heard"] != found["expected"]:
        raise AssertionError(f"messages were lost or not taken: {found}")
    note = (f"{NODES:,} nodes on channels of {per_channel}, {found['sent'] / seconds:.0f} signed messages of "
            f"{found['message_bytes']} bytes a second: {found['heard'] / seconds:,.0f} deliveries a second, none lost; "
            f"p50 {found['p50_ms']:.1f}, max {found['max_ms']:.0f} ms; with the SDK, at one node in {REAL_EVERY}, p99 "
            f"{found['real']['p99_ms']:.0f} ms; {_shares(found)}")
    return _against(f"published to heard, p99, channels of {per_channel} / {HEARD_MS_MAX:.0f} ms", found["p99_ms"],
                    HEARD_MS_MAX, unit="ms", bar=bar, note=note)


def back_after_a_kill(directory: Path) -> Figure:
    """Until the last of 2,000 nodes hears messages again after ``kill -9`` of the hub, from its listening anew."""
    return _back(directory, "kill")


def back_after_a_stop(directory: Path) -> Figure:
    """The same when the hub is stopped in order."""
    return _back(directory, "stop")


def _back(directory: Path, how: str) -> Figure:
    down, up = directory / "down", directory / "up"
    with _crowded(directory, NODES, PER_CHANNEL) as (hub, crowd):
        crowd.ask("connect", first=0, count=NODES, real_every=REAL_EVERY)

        def restart() -> None:
            time.sleep(2.0)  # under load for a while
            getattr(hub.program, how)()
            down.touch()
            hub.start()
            up.write_text(str(time.monotonic()))

        found = crowd.ask("survive", restart, rate=MESSAGES_PER_SECOND, signed_rate=SIGNED_PER_SECOND,
                          down=str(down), up=str(up), seconds=40.0)
    if found["lost_changes"] or not found["changes"] or found["back"] != NODES:
        raise AssertionError(f"something was lost: {found}")
    note = (f"{NODES:,} nodes on channels of {PER_CHANNEL}, one in {REAL_EVERY} with the SDK, of which the last is "
            f"back after {found['real_last_seconds']:.1f} s; half of all after {found['p50_seconds']:.1f} s; none of "
            f"{found['changes']} changes lost that were acknowledged meanwhile; {found['hub_cpu_seconds']:.1f} s of "
            f"the hub's processor time for all of it; {_shares(found)}")
    return _against(f"all nodes back after {'kill -9' if how == 'kill' else 'SIGTERM'} / {BACK_SECONDS_MAX:.0f} s",
                    found["last_seconds"], BACK_SECONDS_MAX, unit="s", bar="<= 1", note=note)


def _against(name: str, found: float, limit: float, **options: str) -> Figure:
    ratio = found / limit
    return figure(name, Ratio(found, limit, ratio, ratio, ratio), **options)


def _shares(found: dict[str, Any]) -> str:
    return (f"of a processor the hub took {found['hub_share']:.2f}, the nodes {found['crowd_share']:.2f}; load average "
            f"{os.getloadavg()[0]:.1f}")


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "hub-signed-uploads": signed_uploads,
    "hub-signed-downloads": signed_downloads,
    "hub-bands": heard_on_small_channels,
    "hub-bands-large": heard_on_large_channels,
    "hub-killed": back_after_a_kill,
    "hub-stopped": back_after_a_stop,
}
