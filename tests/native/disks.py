"""File systems of a kind and size of choice, mounted for one test."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import need_program, need_root

MIB = 1 << 20


@contextlib.contextmanager
def mounted(directory: Path, kind: str, size_bytes: int) -> Iterator[Path]:
    """Mount a fresh file system of ``kind`` at ``directory``, which is made; skips the test where nobody may.

    :param kind: "tmpfs" or "ramfs", in memory, or one that ``mkfs.<kind>`` makes in a file.
    """
    need_root()
    directory.mkdir()
    source, options = kind, f"size={size_bytes}"
    if kind not in ("tmpfs", "ramfs"):
        image = directory.with_suffix(".image")
        with image.open("wb") as file:
            file.truncate(size_bytes)
        subprocess.run([need_program(f"mkfs.{kind}"), str(image)], check=True, capture_output=True, timeout=60)
        source, options = str(image), "loop"
    mount = [need_program("mount"), "-t", kind, "-o", options, source, str(directory)]
    outcome = subprocess.run(mount, capture_output=True, text=True, timeout=60)
    if outcome.returncode:
        pytest.skip(f"this system mounts no {kind}: {outcome.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run([need_program("umount"), str(directory)], check=True, timeout=60)
