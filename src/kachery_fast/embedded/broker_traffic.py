"""How much moves on each of the broker's channels, second by second, for the last minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["OVERHEAD_BYTES", "SECONDS", "Meter", "Moved"]

SECONDS = 60
# What a message takes besides its payload, about: the broker counts it into what its memory holds.
OVERHEAD_BYTES = 200


class Moved(NamedTuple):
    """What moved in the last ``SECONDS`` whole seconds: messages in each, the oldest first, and bytes of all payloads
    together."""

    messages: tuple[int, ...]
    size_bytes: int


@dataclass
class _Second:
    number: int
    messages: int = 0
    size_bytes: int = 0


class Meter:
    """Counts what is published.

    :param clock: seconds since the epoch.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds: dict[str, deque[_Second]] = {}

    def note(self, channel: str, messages: int, size_bytes: int) -> None:
        """Count messages that are published now; ``size_bytes`` is with ``OVERHEAD_BYTES`` for each."""
        now = int(self._clock())
        seconds = self._seconds.setdefault(channel, deque(maxlen=SECONDS + 1))
        if not seconds or seconds[-1].number != now:
            seconds.append(_Second(now))
        seconds[-1].messages += messages
        seconds[-1].size_bytes += max(0, size_bytes - OVERHEAD_BYTES * messages)

    def moved(self, channel: str) -> Moved:
        """Return what was counted; the second that is not over is left out."""
        first = int(self._clock()) - SECONDS
        messages, size_bytes = [0] * SECONDS, 0
        for second in self._seconds.get(channel, ()):
            if 0 <= second.number - first < SECONDS:
                messages[second.number - first] += second.messages
                size_bytes += second.size_bytes
        return Moved(tuple(messages), size_bytes)

    def expire(self) -> None:
        """Forget channels on which nothing has moved for so long."""
        oldest = int(self._clock()) - SECONDS
        for channel in [name for name, seconds in self._seconds.items() if seconds[-1].number < oldest]:
            del self._seconds[channel]
