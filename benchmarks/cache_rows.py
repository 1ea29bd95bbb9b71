"""What a million cached copies cost: planning, noting, storing, listing. Prints the figures of docs/cache.md.

    python benchmarks/cache_rows.py DIRECTORY [ROWS]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kachery_fast._core import digest_buffer
from kachery_fast.store import FileStore
from kachery_fast.store.eviction import CacheKeeper

REPEATS = 20


def main(directory: str, count: int) -> None:
    """Fill an index with ``count`` rows, and time what uses it."""
    root = Path(directory)
    store, keeper = FileStore(root), CacheKeeper(root)
    index, now_ms = keeper.index, int(time.time() * 1000)
    with index.changing() as rows:
        for number in range(count):
            size = 1 + number * 7919 % 2_000_000
            sha1, used_ms = digest_buffer(b"%d" % number, 64).sha1, now_ms - number * 997 % 10**9
            rows.execute("INSERT INTO copies VALUES (?, ?, ?, '1:2:3', ?, 0, NULL)",
                         (sha1, size, size.bit_length(), used_ms))
    begun = time.perf_counter()
    wanted, planned = index.totals().bytes // 10, 0
    for copy in index.candidates(now_ms=now_ms, before_ms=now_ms):
        wanted -= copy.size
        planned += 1
        if wanted <= 0:
            break
    print(f"plan of a gc to 90 %, {planned} copies: {time.perf_counter() - begun:.2f} s")
    begun = time.perf_counter()
    for number in range(REPEATS):
        store.adopt_bytes(b"fetched %d" % number, digest_buffer(b"fetched %d" % number, 64).sha1)
    print(f"a fetched file, noted: {(time.perf_counter() - begun) / REPEATS * 1000:.1f} ms")
    found = root.stat()
    begun = time.perf_counter()
    for number in range(REPEATS):
        index.note(digest_buffer(b"noted %d" % number, 64).sha1, found, now_ms=now_ms)
    print(f"the note alone: {(time.perf_counter() - begun) / REPEATS * 1000:.1f} ms")
    begun = time.perf_counter()
    for number in range(REPEATS):
        store.put_bytes(b"stored %d" % number)
    print(f"put of a new file: {(time.perf_counter() - begun) / REPEATS * 1000:.1f} ms")
    begun = time.perf_counter()
    next(CacheKeeper(root).list())
    print(f"first line of ls: {(time.perf_counter() - begun) * 1000:.1f} ms")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
