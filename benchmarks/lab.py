"""Where things are measured: the lab of feeds and tasks, and a directory in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kachery_fast.cli.lab import Lab

__all__ = ["CHANNEL", "in_memory", "running_lab"]

CHANNEL = "bench"


@contextmanager
def running_lab(directory: Path, *names: str) -> Iterator[Lab]:
    """A hub and nodes of these names, which may do everything on its channel; removed at the end."""
    place = directory / "lab"
    try:
        with Lab(place, channel=CHANNEL) as lab:
            lab.start_hub()
            for name in names:
                lab.add_node(name, permissions=["all"])
            yield lab
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def in_memory() -> Iterator[Path]:
    """A directory in memory, where no disk is measured; removed at the end.

    :raises FileNotFoundError: there is no such file system.
    """
    memory = Path("/dev/shm")
    if not memory.is_dir():
        raise FileNotFoundError("/dev/shm, a file system in memory, is not there")
    place = Path(tempfile.mkdtemp(prefix="kachery-bench-", dir=memory))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
