"""What every benchmark shares: alternating pairs, their ratio, test data, and the form of a result.

The machines are shared and noisy, so a figure is a ratio: ours and the rival run in turn (A B A B ...), and the
median of the pairwise ratios counts. Both run once before, unmeasured, to warm up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Figure", "Ratio", "figure", "make_file", "pairs", "rate"]

BLOCK_SIZE_BYTES = 8 << 20


@dataclass(frozen=True)
class Ratio:
    """The outcome of a run of pairs. Ratios are ours / rival, pair by pair."""

    ours_median: float
    rival_median: float
    ratio_median: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class Figure:
    """One line of the table. ``bar`` says what is promised, such as ">= 0.85"; ``note`` what was measured how.

    ``ours`` and ``rival`` are in ``unit``; ``ratio``, ``low`` and ``high`` are ours / rival: the median and the
    extremes over the pairs.
    """

    name: str
    ours: float
    rival: float
    ratio: float
    low: float
    high: float
    unit: str
    bar: str
    note: str


def pairs(ours: Callable[[], float], rival: Callable[[], float], count: int = 5) -> Ratio:
    """Measure two callables in turn, ``count`` times each, after one unmeasured run of both.

    :param ours: returns what it measured: a rate (then a bar is a minimum) or seconds (a maximum).
    :param rival: returns the same quantity, in the same unit.
    """
    ours()
    rival()
    mine: list[float] = []
    other: list[float] = []
    for _ in range(count):
        mine.append(ours())
        other.append(rival())
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    return Ratio(
        statistics.median(mine),
        statistics.median(other),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def figure(name: str, measured: Ratio, *, unit: str, bar: str, note: str) -> Figure:
    """Return the line of the table for a run of pairs."""
    return Figure(
        name,
        measured.ours_median,
        measured.rival_median,
        measured.ratio_median,
        measured.ratio_low,
        measured.ratio_high,
        unit,
        bar,
        note,
    )


def rate(call: Callable[[], object], amount: float) -> Callable[[], float]:
    """Return a callable that runs ``call`` and returns ``amount`` per second, such as gigabytes per second."""

    def measured() -> float:
        start = time.perf_counter()
        call()
        return amount / (time.perf_counter() - start)

    return measured


def make_file(path: str | Path, size_bytes: int, seed: int = 0) -> Path:
    """Write ``size_bytes`` of data that neither compress nor repeat, at about the speed of memory.

    One block of random words is xored with another random key for each block of the file, so that no eight bytes
    of one block are found in another.

    :param seed: other seeds give other files.
    :returns: the path of the file, which is left in the page cache.
    """
    path = Path(path)
    generator = np.random.Generator(np.random.SFC64(seed))
    words = generator.integers(0, 1 << 64, BLOCK_SIZE_BYTES // 8, dtype=np.uint64)
    block = np.empty_like(words)
    left = size_bytes
    with path.open("wb", buffering=0) as file:
        while left:
            np.bitwise_xor(words, generator.integers(0, 1 << 64, dtype=np.uint64), out=block)
            content = block.data.cast("B")[: min(left, BLOCK_SIZE_BYTES)]
            while content:
                written = file.write(content)
                left -= written
                content = content[written:]
    return path
