"""What nodes say about tasks on the bands.

The id of a task (``task``) is, for a pure calculation, the SHA-1 of the canonical JSON of ``{"functionId", "kwargs"}``
(as in 2022), so that all who ask for the same calculation ask for one task; for a query or an action it is random and
chosen by who asks. The hub keeps who runs which task (``hub_bodies.ClaimTask``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from .bodies import Body

__all__ = ["TASK_KINDS", "TaskCancel", "TaskDeclined", "TaskRequest", "TaskStatus"]

TASK_KINDS = ("pure-calculation", "query", "action")


class TaskRequest(Body, tag="taskRequest"):
    """requestTasks: who can run this? Repeated with the same ``task`` until somebody is heard of."""

    request: str
    task: str
    function: str
    kind: str
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class TaskCancel(Body, tag="taskCancel"):
    """requestTasks: this requester waits no longer. A calculation or query that nobody waits for need not start."""

    request: str
    task: str


class TaskStatus(Body, tag="taskStatus"):
    """provideTasks: how a task stands, when it changes and each ``progress_interval_seconds`` until it has ended.

    ``error`` is ``{"type", "message", "traceback"}``; ``receipt`` the signed receipt of an action that has ended. The
    result of a finished calculation or query is then in the bucket.
    """

    STATUSES: ClassVar[tuple[str, ...]] = ("queued", "running", "finished", "error", "unknown")

    task: str
    status: str
    progress: float | None = None
    text: str = ""
    error: dict[str, str] | None = None
    receipt: dict[str, Any] | None = None


class TaskDeclined(Body, tag="taskDeclined"):
    """provideTasks: a node with a task backend on this channel will not run it. ``reason`` is one of ``REASONS``."""

    REASONS: ClassVar[tuple[str, ...]] = ("unregistered", "wrong-type", "bad-arguments", "busy", "hub")

    request: str
    task: str
    reason: str
    detail: str = ""
