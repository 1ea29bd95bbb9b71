"""What there is to see of the request for a task: how it stands, and how it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..errors import BadMessage, KacheryError, SignatureInvalid
from .hub_bodies import TaskClaim
from .inquiry import harmless
from .task_bodies import TaskStatus
from .task_errors import task_error
from .tasks import Receipt, TaskResult, check_receipt

__all__ = [
    "Phase", "TaskView", "is_other", "of_claim", "of_failure", "of_receipt", "of_result", "of_status", "read_receipt",
]


class Phase(Enum):
    """Where a request stands (``task_requesting``)."""

    CACHE = "cache"
    ASK = "ask"
    FOLLOW = "follow"
    FETCH = "fetch"
    CONFIRM = "confirm"
    FALLBACK = "fallback"
    ENDED = "ended"


@dataclass(frozen=True)
class TaskView:
    """``status`` is ``waiting``, ``queued``, ``running``, ``finished``, ``error``, ``unknown`` or ``cancelled``.

    ``text`` is what the function says of its ``progress`` (0 to 1), or what the request is waiting for; ``node`` runs
    it or has run it; ``result`` is that of ``TaskResult``; ``result_ms`` when it ended, by the clock of ``node``.
    """

    status: str = "waiting"
    progress: float | None = None
    text: str = ""
    node: str = ""
    cached: bool = False
    result: dict[str, Any] | None = None
    result_ms: int | None = None
    error: KacheryError | None = None


def of_status(body: TaskStatus, node_id: str) -> TaskView:
    """Return what a node says of a task that it has."""
    progress = None if body.progress is None else min(1.0, max(0.0, body.progress))
    return TaskView(body.status, progress, harmless(body.text), node_id)


def of_result(found: TaskResult, *, cached: bool) -> TaskView:
    """Return what a result says. ``cached``: it is one from before."""
    return TaskView("finished", node=found.node_id, cached=cached, result=found.result, result_ms=found.finished_ms)


def of_failure(function: str, node_id: str, report: Mapping[str, Any], time_ms: int | None, **details: Any) -> TaskView:
    """Return what a report of an error says (``task_errors.error_report``). ``details`` are the error's."""
    error = task_error(function, report, node=node_id, **details)
    return TaskView("error", node=node_id, result_ms=time_ms, error=error)


def of_receipt(receipt: Receipt, **details: Any) -> TaskView:
    """Return what the receipt of an action says."""
    if receipt.error is not None:
        return of_failure(receipt.function, receipt.node_id, receipt.error, receipt.finished_ms, **details)
    return TaskView("finished", node=receipt.node_id, result_ms=receipt.finished_ms)


def is_other(claim: TaskClaim, function: str, kind: str, kwargs_sha1: str) -> bool:
    """Whether what the hub knows under an id is another task: of another function, or with other arguments."""
    body = (claim.receipt or {}).get("body")
    done_with = body.get("kwargsSha1", kwargs_sha1) if isinstance(body, dict) else kwargs_sha1
    return bool(claim.function) and (claim.function, claim.kind, done_with) != (function, kind, kwargs_sha1)


def of_claim(claim: TaskClaim, function: str, details: Mapping[str, Any], kwargs_sha1: str) -> TaskView | None:
    """Return what the hub knows of the end of an action; None when it knows of none. ``details`` are those of errors,
    the channel among them."""
    receipt = read_receipt(claim.receipt, function, details["channel"], claim.task, kwargs_sha1)
    if receipt is not None and receipt.node_id == claim.node_id and claim.state in ("finished", "failed"):
        return of_receipt(receipt, **details)
    if claim.state == "finished":
        return TaskView("finished", node=claim.node_id)
    if claim.state == "failed":
        return of_failure(function, claim.node_id, {"message": "the hub knows no more of it"}, None, **details)
    return None


def read_receipt(receipt: object, function: str, channel: str, task: str, kwargs_sha1: str) -> Receipt | None:
    """Return the receipt of this task, or None when that is none. ``kwargs_sha1`` is of its canonical arguments."""
    try:
        found = check_receipt(receipt, channel, task)
    except (BadMessage, SignatureInvalid):
        return None
    return found if (found.function, found.kwargs_sha1) == (function, kwargs_sha1) else None
