"""Test data, and looking at a store from outside."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["counter_stream", "files_below", "sha1_of", "sound"]


def counter_stream(size: int) -> bytes:
    """The first ``size`` bytes of sha256("0") + sha256("1") + …, as the golden vectors have them."""
    sha256 = hashlib.sha256
    return b"".join(sha256(b"%d" % number).digest() for number in range(size // 32 + 1))[:size]


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def files_below(root: Path) -> list[str]:
    """The files below ``root``, not the directories, as sorted paths relative to it."""
    found = []
    for directory, _, names in os.walk(root):
        found += [os.path.relpath(os.path.join(directory, name), root) for name in names]
    return sorted(found)


def sound(root: Path) -> int:
    """Assert that every file under a digest's name in the store has that digest; return how many there are."""
    count = 0
    for name in files_below(root):
        path = root / name
        if len(path.name) == 40 and name.startswith("sha1/"):
            assert sha1_of(path.read_bytes()) == path.name
            count += 1
    return count
