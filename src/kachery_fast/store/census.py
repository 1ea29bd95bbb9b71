"""Going through a whole store: what there is, and how much."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from ..protocol.names import is_sha1
from .disk import translated
from .layout import LINK_SUFFIX, Layout

__all__ = ["Entry", "Totals", "count_all", "walk"]


class Entry(NamedTuple):
    """One name in the store. ``size`` is that of the stored file in bytes, None when there is only a link."""

    sha1: str
    size: int | None
    linked: bool


class Totals(NamedTuple):
    """How much a store holds.

    ``bytes`` are those of stored files alone; linked files lie elsewhere. When ``exact`` is False the count was
    broken off after its time, and the numbers are scaled up from the part that was seen.
    """

    files: int
    links: int
    bytes: int
    exact: bool


def walk(layout: Layout) -> Iterator[Entry]:
    """Yield each name of the store once, in the order of the SHA-1; memory does not grow with the store.

    :raises DiskError: a directory cannot be read.
    """
    for _, entries in _walk_by_top(layout):
        yield from entries


def count_all(layout: Layout, *, seconds: float, clock: Callable[[], float] = time.monotonic) -> Totals:
    """Count files, links and bytes, for at most about ``seconds``.

    Names are spread evenly over the 256 top directories, so a part of them stands for the whole.

    :raises DiskError: a directory cannot be read.
    """
    files = links = size = 0
    end = clock() + seconds
    for seen, (top_count, entries) in enumerate(_walk_by_top(layout)):
        if seen and clock() > end:
            scale = top_count / seen
            return Totals(round(files * scale), round(links * scale), round(size * scale), exact=False)
        for entry in entries:
            files += entry.size is not None
            links += entry.linked
            size += entry.size or 0
    return Totals(files, links, size, exact=True)


def _walk_by_top(layout: Layout) -> Iterator[tuple[int, Iterator[Entry]]]:
    tops = _subdirectories(str(layout.files))
    for top in tops:
        yield len(tops), _walk_below(top)


def _walk_below(top: str) -> Iterator[Entry]:
    for middle in _subdirectories(top):
        for bottom in _subdirectories(middle):
            yield from _entries(bottom)


def _subdirectories(path: str) -> list[str]:
    with translated("listing", path):
        try:
            with os.scandir(path) as found:
                return sorted(entry.path for entry in found if len(entry.name) == 2 and entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def _entries(path: str) -> list[Entry]:
    sizes: dict[str, int] = {}
    links: set[str] = set()
    with translated("listing", path), suppress(FileNotFoundError), os.scandir(path) as found:
        for entry in found:
            if is_sha1(entry.name):
                try:
                    if entry.is_file():
                        sizes[entry.name] = entry.stat().st_size
                except FileNotFoundError:
                    continue
            elif entry.name.endswith(LINK_SUFFIX) and is_sha1(entry.name[: -len(LINK_SUFFIX)]):
                links.add(entry.name[: -len(LINK_SUFFIX)])
    return [Entry(sha1, sizes.get(sha1), sha1 in links) for sha1 in sorted(sizes.keys() | links)]
