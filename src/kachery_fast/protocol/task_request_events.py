"""What can happen to the request for a task, and what it asks to be done: the vocabularies of ``task_requesting``."""

from __future__ import annotations

from msgspec import Struct

from ..errors import KacheryError
from .hub_bodies import TaskClaim
from .task_bodies import TaskDeclined, TaskStatus
from .tasks import TaskResult

__all__ = [
    "Ask", "BandRestored", "Cancel", "Effect", "Event", "Find", "Found", "Heard", "Look", "Looked", "ProvidersChanged",
    "SayFailed", "TaskRequestLimits", "Tick", "Withdraw",
]


class TaskRequestLimits(Struct, frozen=True):
    """The requester's share of the settings table; times in seconds."""

    offer_wait_seconds: float
    want_rounds_max: int
    patience_seconds: float
    provider_silence_seconds: float
    retry_base_seconds: float


# --- events


class Heard(Struct, frozen=True):
    """A message about this task, of a node that may provide tasks."""

    body: TaskStatus | TaskDeclined
    sender: str


class Looked(Struct, frozen=True):
    """The answer to ``Look``: the result, whose signature holds and whose node may provide tasks here; or None, and
    ``why`` (absent, or refused); or the trouble with the bucket."""

    result: TaskResult | None = None
    why: str = "absent"
    error: KacheryError | None = None


class Found(Struct, frozen=True):
    """The answer to ``Find``: what the hub says, or why it could not be asked."""

    claim: TaskClaim | None = None
    error: KacheryError | None = None


class SayFailed(Struct, frozen=True):
    """The question could not be sent."""

    error: KacheryError


class BandRestored(Struct, frozen=True):
    """Messages flow again; some may have been lost."""


class ProvidersChanged(Struct, frozen=True):
    """Who may provide tasks on the channel: node id -> label. ``self_may``: the asking node itself may, too."""

    providers: dict[str, str]
    self_may: bool = False


class Cancel(Struct, frozen=True):
    """Nobody waits for it any more."""


class Tick(Struct, frozen=True):
    """Time has passed."""


Event = Heard | Looked | Found | SayFailed | BandRestored | ProvidersChanged | Cancel | Tick


# --- effects


class Look(Struct, frozen=True):
    """Look for the result in the bucket, past all caches when ``fresh``; answer with ``Looked``."""

    fresh: bool


class Find(Struct, frozen=True):
    """Ask the hub how the task stands; answer with ``Found``."""


class Ask(Struct, frozen=True):
    """Say ``TaskRequest`` on the requestTasks band; ``SayFailed`` tells that it could not be said."""


class Withdraw(Struct, frozen=True):
    """Say ``TaskCancel`` on the requestTasks band."""


Effect = Look | Find | Ask | Withdraw
