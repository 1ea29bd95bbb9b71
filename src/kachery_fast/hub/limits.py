"""Rates that the hub allows, per node or per network address."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

from ..errors import RateLimited

__all__ = ["RateLimiter", "address_group"]


class RateLimiter:
    """A token bucket for each key: ``rate`` units a second, saved up for ``window_seconds`` at most.

    At most ``keys_max`` keys are remembered; the one unused for longest is forgotten first (it starts anew with a full
    bucket, so a crowd of that size can go round the limit, but not fill the memory).
    """

    def __init__(self, rate: float, window_seconds: float, keys_max: int = 10_000) -> None:
        self._rate = rate
        self._capacity = rate * window_seconds
        self._keys_max = keys_max
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, key: str, units: float, now: float, *, who: str, limit: str) -> None:
        """Take ``units`` from the bucket of ``key``.

        :param now: the present in seconds. ``who`` and ``limit`` are for the error's text.
        :raises RateLimited: there is not enough in it; nothing is taken.
        """
        level = self._level(key, now)
        if level < units:
            wait_seconds = (min(units, self._capacity) - level) / self._rate
            raise RateLimited(who=who, limit=limit, retry_seconds=max(0.1, round(wait_seconds, 1)))
        self._levels[key] = (level - units, now)
        self._levels.move_to_end(key)
        if len(self._levels) > self._keys_max:
            self._levels.popitem(last=False)

    def refund(self, key: str, units: float, now: float) -> None:
        """Put back what was spent on something that turned out not to count."""
        if key in self._levels:
            self._levels[key] = (min(self._capacity, self._level(key, now) + units), now)

    def _level(self, key: str, now: float) -> float:
        level, since = self._levels.get(key, (self._capacity, now))
        # A clock that was set back must not empty a bucket.
        return min(self._capacity, level + max(0.0, now - since) * self._rate)


def address_group(address: str | None) -> str:
    """What counts as one guesser: an IPv4 address, or the /64 network that an IPv6 host picks its addresses from."""
    try:
        parsed = ipaddress.ip_address((address or "").split("%")[0])
    except ValueError:
        return "?"
    if parsed.version == 6:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
