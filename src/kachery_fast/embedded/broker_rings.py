"""The broker's memory: one bounded replay ring for each channel, and what a returning client missed.

Pure bookkeeping: no sockets, no clock. A serial is ``<incarnation>:<number>``; the number counts over all channels
of one broker process, so that a channel that was forgotten and made anew never reuses one.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any, NamedTuple

from .broker_wire import SUBSCRIBE, Outbound

__all__ = ["Entry", "Replay", "Ring", "RingLimits", "Rings"]

REWIND_PATTERN = re.compile(r"([0-9]{1,6})(s|m)?")


class Entry(NamedTuple):
    """One MESSAGE kept for replay. ``time`` is seconds since the epoch, ``keys`` the idempotency keys in it."""

    number: int
    time: float
    size_bytes: int
    sender: str
    keys: tuple[tuple[str, str], ...]
    outbound: Outbound


class Replay(NamedTuple):
    """The answer to an ATTACH: where the client stands, whether nothing was lost, and what to send it again."""

    serial: str
    resumed: bool
    entries: list[Entry]


class Ring:
    """The last messages of one channel, in order. ``floor`` is the highest number no longer (or never) held."""

    __slots__ = ("entries", "floor", "keys", "members", "name", "size_bytes")

    def __init__(self, name: str, floor: int) -> None:
        self.name = name
        self.floor = floor
        self.size_bytes = 0
        self.entries: deque[Entry] = deque()
        self.keys: set[tuple[str, str]] = set()
        self.members: dict[Any, int] = {}

    @property
    def top(self) -> int:
        """The number of the newest message, or the floor."""
        return self.entries[-1].number if self.entries else self.floor


class RingLimits(NamedTuple):
    """Bounds of the memory: messages and bytes of one channel, bytes of all, and age. A channel that would exceed
    the bytes of all gives up its own oldest messages, never another's."""

    messages_max: int
    ring_size_bytes_max: int
    total_size_bytes_max: int
    age_seconds_max: float


class Rings:
    """All channels of one broker by name."""

    def __init__(self, incarnation: str, limits: RingLimits) -> None:
        self.incarnation = incarnation
        self.limits = limits
        self.size_bytes = 0
        self.number = 0
        self.by_name: dict[str, Ring] = {}

    def get(self, name: str) -> Ring:
        """Return the ring of a channel, made when there is none."""
        ring = self.by_name.get(name)
        if ring is None:
            ring = self.by_name[name] = Ring(name, self.number)
        return ring

    def subscribers(self, name: str) -> frozenset[str]:
        """Return the client ids of those that receive what is published on a channel."""
        ring = self.by_name.get(name)
        return frozenset(member.session.client_id for member, modes in (ring.members.items() if ring else ())
                         if modes & SUBSCRIBE)

    def append(self, ring: Ring, body: dict[str, Any], *, now: float, size_bytes: int, sender: str,
               keys: tuple[tuple[str, str], ...]) -> Entry:
        """Number a MESSAGE, stamp its ``channelSerial``, keep it, and let older ones go as the limits ask."""
        self.number += 1
        body["channelSerial"] = f"{self.incarnation}:{self.number}"
        entry = Entry(self.number, now, size_bytes, sender, keys, Outbound(body))
        ring.entries.append(entry)
        ring.keys.update(keys)
        ring.size_bytes += size_bytes
        self.size_bytes += size_bytes
        while ring.entries and (len(ring.entries) > self.limits.messages_max
                                or ring.size_bytes > self.limits.ring_size_bytes_max
                                or self.size_bytes > self.limits.total_size_bytes_max):
            self._forget_head(ring)
        return entry

    def expire(self, now: float) -> None:
        """Forget messages older than the limit, and channels that are empty and without members."""
        empty = []
        for name, ring in self.by_name.items():
            while ring.entries and now - ring.entries[0].time > self.limits.age_seconds_max:
                self._forget_head(ring)
            if not ring.entries and not ring.members:
                empty.append(name)
        for name in empty:
            del self.by_name[name]

    def replay(self, ring: Ring, serial: str | None, rewind: str | None, now: float) -> Replay:
        """Say what a client that stands at ``serial`` gets on ATTACH.

        A serial of this incarnation whose successors are all held resumes without loss. One of another incarnation,
        or too old, gets the whole ring: what it misses is in there or lost, and what it has it knows by its id.
        Without a serial, ``rewind`` ("30s", "2m" or a count) says how far back to go.
        """
        if serial:
            incarnation, _, text = serial.rpartition(":")
            number = int(text) if text.isdecimal() and text.isascii() and len(text) < 16 else -1
            if incarnation == self.incarnation and ring.floor <= number <= self.number:
                return Replay(serial, True, [entry for entry in ring.entries if entry.number > number])
            return Replay(f"{self.incarnation}:{ring.floor}", False, list(ring.entries))
        entries = _rewound(ring, rewind, now) if rewind else []
        number = entries[0].number - 1 if entries else ring.top
        return Replay(f"{self.incarnation}:{number}", False, entries)

    def _forget_head(self, ring: Ring) -> None:
        entry = ring.entries.popleft()
        ring.floor = entry.number
        ring.keys.difference_update(entry.keys)
        ring.size_bytes -= entry.size_bytes
        self.size_bytes -= entry.size_bytes


def _rewound(ring: Ring, rewind: str, now: float) -> list[Entry]:
    match = REWIND_PATTERN.fullmatch(rewind)
    if match is None:
        return []
    count, unit = int(match[1]), match[2]
    if unit is None:
        return list(ring.entries)[-count:] if count else []
    since = now - count * (60 if unit == "m" else 1)
    return [entry for entry in ring.entries if entry.time >= since]
