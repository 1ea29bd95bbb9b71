"""Processes that append to a feed until they are killed: ``python -m tests.store.feed_children ARGUMENTS``."""

# The parent reads what is printed.
# ruff: noqa: T201

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from kachery_fast.store.feeds import FeedLog

from .children import PROJECT

__all__ = ["start_appender"]

MESSAGE_SIZE_BYTES_MAX = 100_000


def start_appender(root: Path, feed_id: str, subfeed: str, *, threads: int, batch: int, count: int = 10**9,
                   ) -> subprocess.Popen[str]:
    """Start a process whose threads append batches; it prints the end of each that was acknowledged."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.store.feed_children", str(root), feed_id, subfeed, str(threads), str(batch),
         str(count)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _append(root: str, feed_id: str, subfeed: str, threads: str, batch: str, count: str) -> None:
    log = FeedLog(Path(root), message_size_bytes_max=MESSAGE_SIZE_BYTES_MAX)
    lock = threading.Lock()

    def work(thread: int) -> None:
        for number in range(int(count)):
            messages = [{"thread": thread, "batch": number, "of": int(batch), "text": "x" * 300}] * int(batch)
            done = log.append(feed_id, subfeed, messages).result()
            with lock:
                print(done.tail.count, flush=True)

    print("ready", flush=True)
    sys.stdin.readline()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(int(threads))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    log.close()


if __name__ == "__main__":
    _append(*sys.argv[1:])
