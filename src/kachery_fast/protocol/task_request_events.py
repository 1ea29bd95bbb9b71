"""What can happen to the request for a task, and what it asks to be done: the vocabularies of ``task_requesting``."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import KacheryError
from .hub_bodies import TaskClaim
from .task_bodies import TaskDeclined, TaskStatus
from .tasks import TaskResult

__all__ = [
    "Ask", "BandRestored", "Cancel", "Effect", "Event", "Find", "Found", "Heard", "Look", "Looked", "ProvidersChanged",
    "SayFailed", "TaskRequestLimits", "Tick", "Withdraw",
]


@dataclass(frozen=True)
class TaskRequestLimits:
    """The requester's share of the settings table; times in seconds."""

    offer_wait_seconds: float
    want_rounds_max: int
    patience_seconds: float
    provider_silence_seconds: float
    retry_base_seconds: float


# --- events


@dataclass(frozen=True)
class Heard:
    """A message about this task, of a node that may provide tasks."""

    body: TaskStatus | TaskDeclined
    sender: str


@dataclass(frozen=True)
class Looked:
    """The answer to ``Look``: the result, whose signature holds and whose node may provide tasks here; or None, and
    ``why`` (absent, or refused); or the trouble with the bucket."""

    result: TaskResult | None = None
    why: str = "absent"
    error: KacheryError | None = None


@dataclass(frozen=True)
class Found:
    """The answer to ``Find``: what the hub says, or why it could not be asked."""

    claim: TaskClaim | None = None
    error: KacheryError | None = None


@dataclass(frozen=True)
class SayFailed:
    """The question could not be sent."""

    error: KacheryError


@dataclass(frozen=True)
class BandRestored:
    """Messages flow again; some may have been lost."""


@dataclass(frozen=True)
class ProvidersChanged:
    """Who may provide tasks on the channel: node id -> label. ``self_may``: the asking node itself may, too."""

    providers: dict[str, str]
    self_may: bool = False


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for it any more."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Heard | Looked | Found | SayFailed | BandRestored | ProvidersChanged | Cancel | Tick


# --- effects


@dataclass(frozen=True)
class Look:
    """Look for the result in the bucket, past all caches when ``fresh``; answer with ``Looked``."""

    fresh: bool


@dataclass(frozen=True)
class Find:
    """Ask the hub how the task stands; answer with ``Found``."""


@dataclass(frozen=True)
class Ask:
    """Say ``TaskRequest`` on the requestTasks band; ``SayFailed`` tells that it could not be said."""


@dataclass(frozen=True)
class Withdraw:
    """Say ``TaskCancel`` on the requestTasks band."""


Effect = Look | Find | Ask | Withdraw
