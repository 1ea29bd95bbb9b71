"""What the system tests share: labs with small chunks, recordings, and waiting for a thing to happen."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kachery_fast.cli.lab import LabNode, result_of

CHUNK_SIZE_BYTES = 256 * 1024

# Everything that waits waits less than a user would have to, so that failures are seen within a test's time.
QUICK = {
    "KACHERY_CHUNK_SIZE_BYTES": str(CHUNK_SIZE_BYTES),
    "KACHERY_OFFER_WAIT_SECONDS": "1.5",
    "KACHERY_PROVIDER_SILENCE_SECONDS": "2.5",
    "KACHERY_PATIENCE_SECONDS": "30",
    "KACHERY_RETRY_CAP_SECONDS": "2",
    "KACHERY_STALL_SECONDS": "5",
    "KACHERY_CHANNEL_REFRESH_SECONDS": "5",
}


def make_recording(path: Path, size: int, seed: int = 1) -> Path:
    """Write ``size`` random bytes, the same for the same seed."""
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def store(node: LabNode, path: Path) -> str:
    """Store a file at a node and return its URI."""
    return str(node.json("store", str(path))[0]["uri"])


def load(node: LabNode, uri: str, *options: str) -> dict[str, Any]:
    """Load a file at a node."""
    found: dict[str, Any] = node.json("load", uri, *options)
    return found


def finish(process: subprocess.Popen[bytes], timeout_seconds: float = 90.0) -> Any:
    """Wait for a command begun with ``--json`` and return its result, or raise its error."""
    out, err = process.communicate(timeout=timeout_seconds)
    return result_of(subprocess.CompletedProcess(process.args, process.returncode, out, err))


def wait_until(happened: Callable[[], bool], what: str, timeout_seconds: float = 30.0) -> None:
    """Wait until something that other processes do has happened."""
    end = time.monotonic() + timeout_seconds
    while not happened():
        if time.monotonic() > end:
            raise AssertionError(f"it did not happen within {timeout_seconds} s: {what}")
        time.sleep(0.02)


def traffic(node: LabNode) -> dict[str, int]:
    """Return what a node has moved since its start."""
    found: dict[str, int] = node.connection.info()["traffic"]
    return found


def received(node: LabNode) -> int:
    """Return the bytes that the transfers under way at a node have received."""
    return sum(transfer["received"] for transfer in node.connection.info()["transfers"])


def objects(bucket_dir: Path) -> list[Path]:
    """Return the objects in the bucket."""
    return [Path(place) / name for place, _, names in os.walk(bucket_dir) for name in names]
