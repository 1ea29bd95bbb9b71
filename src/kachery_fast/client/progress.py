"""How far a transfer is, told to whoever wants to show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

__all__ = ["Progress", "ProgressCallback"]


class Progress(NamedTuple):
    """Bytes done so far, of how many (None: not known yet), and what is being waited for (empty: nothing)."""

    done_bytes: int
    total_bytes: int | None = None
    waiting: str = ""


ProgressCallback: TypeAlias = Callable[[Progress], None]
