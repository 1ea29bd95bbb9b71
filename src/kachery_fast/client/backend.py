"""Running tasks for others: a backend that offers registered functions through the node of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import Executor

__all__ = ["run_task_backend"]


def run_task_backend(channels: Iterable[str] | None = None, task_function_ids: Iterable[str] | None = None,
                     executor: Executor | None = None, *, stop: threading.Event | None = None) -> None:
    """Run registered functions for the nodes of the channels, until Ctrl-C, SIGTERM or ``stop``."""
    raise NotImplementedError
