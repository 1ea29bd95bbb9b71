"""A clock that goes as slowly as the machine is busy, for promises of how soon another process does something."""

from __future__ import annotations

import time
from collections.abc import Callable


def spin_until(happened: Callable[[], object], timeout_seconds: float = 60.0) -> float:
    """Spin until something has happened, and return the seconds of CPU that this took.

    Where a core is free, these are the seconds on the clock. Where several programs share one, each gets as much of it
    as the other: so much work could the one that is waited for have done at most, if it was not waiting for something.
    """
    begun, end = time.thread_time(), time.monotonic() + timeout_seconds
    while not happened():
        assert time.monotonic() < end, f"it did not happen within {timeout_seconds:g} s"
    return time.thread_time() - begun
