"""Programs of ours that serve: how they are imported, and the event loop that they run on."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["imports_kept", "run_on_loop"]


@contextmanager
def imports_kept() -> Iterator[None]:
    """Import what a program needs for as long as it runs, without garbage collections, then and later.

    A hundred thousand objects are made, all of them to stay: to go through them takes a tenth of a node's start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_on_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, on uvloop where that exists."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)
