"""When to ask a channel for a file, when to ask again, and when to give up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Answers", "Asking", "RequestLimits"]


@dataclass(frozen=True)
class RequestLimits:
    """The requester's share of the settings table; times in seconds."""

    offer_wait_seconds: float
    offer_gather_seconds: float
    want_rounds_max: int
    patience_seconds: float
    provider_silence_seconds: float
    assign_chunks_max: int
    download_concurrency: int
    corrupt_retries_max: int
    absent_probes_max: int
    retry_base_seconds: float
    retry_cap_seconds: float


class Answers(Enum):
    """What has come of asking."""

    PENDING = "pending"
    OFFERED = "offered"
    NONE = "none"


class Asking:
    """The rounds of one request.

    Before anything has moved, a channel is asked ``want_rounds_max`` times. Once the transfer has begun, a lost
    provider may come back (a node restarts, a network heals): it is asked for ``patience_seconds`` after the last
    progress, with pauses that double.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._fruitless = 0
        self._due_at: float | None = None
        self._asked_at: float | None = None
        self._gather_until: float | None = None
        self._progress_at = 0.0
        self.begun = False

    @property
    def active(self) -> bool:
        """Whether a round is under way or about to begin."""
        return self._due_at is not None or self._asked_at is not None

    @property
    def deadline(self) -> float | None:
        """When the time decides something."""
        if self._due_at is not None:
            return self._due_at
        if self._asked_at is None:
            return None
        if self._gather_until is not None:
            return self._gather_until
        return self._asked_at + self._limits.offer_wait_seconds

    def start(self, now: float) -> None:
        """The request begins."""
        self._progress_at = now

    def progressed(self, now: float) -> None:
        """Something has moved."""
        self.begun, self._progress_at, self._fruitless = True, now, 0

    def out_of_patience(self, now: float) -> bool:
        """Whether nothing has moved for too long: ``patience_seconds``, or one round's wait before anything has."""
        patience = self._limits.patience_seconds if self.begun else self._limits.offer_wait_seconds
        return now - self._progress_at > patience

    def plan(self, now: float) -> bool:
        """Plan a further round; False when it is time to give up."""
        exhausted = self.out_of_patience(now) if self.begun else self._fruitless >= self._limits.want_rounds_max
        if exhausted:
            self._due_at = self._asked_at = None
            return False
        pause = 0.0
        if self._fruitless:
            pause = min(self._limits.retry_base_seconds * 2**self._fruitless, self._limits.offer_wait_seconds)
        self._fruitless += 1
        self._due_at, self._asked_at, self._gather_until = now + pause, None, None
        return True

    def due(self, now: float) -> bool:
        """Whether to send the question now; true once for each round."""
        if self._due_at is None or now < self._due_at:
            return False
        self._due_at, self._asked_at = None, now
        return True

    def offered(self, now: float) -> None:
        """An offer has come in."""
        if self._asked_at is not None and self._gather_until is None:
            self._gather_until = now + self._limits.offer_gather_seconds

    def answers(self, now: float, everybody_declined: bool) -> Answers:
        """Look at the round under way; anything but PENDING ends it."""
        if self._asked_at is None:
            return Answers.PENDING
        if self._gather_until is not None:
            if now < self._gather_until:
                return Answers.PENDING
            self._asked_at = None
            return Answers.OFFERED
        if everybody_declined or now >= self._asked_at + self._limits.offer_wait_seconds:
            self._asked_at = None
            return Answers.NONE
        return Answers.PENDING
