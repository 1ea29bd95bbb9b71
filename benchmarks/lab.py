"""The lab that feeds and tasks are measured in, and its users."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kachery_fast.cli.lab import Lab

__all__ = ["CHANNEL", "running_lab"]

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
