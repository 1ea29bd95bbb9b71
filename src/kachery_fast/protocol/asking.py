"""When to ask a channel for a file, when to ask again, and when to give up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import KacheryError

__all__ = ["Answers", "Asking", "RequestLimits"]


@dataclass(frozen=True)
class RequestLimits:
    """The requester's share of the settings table; times in seconds."""

    offer_wait_seconds: float
    offer_gather_seconds: float
    want_rounds_max: int
    patience_seconds: float
    provider_silence_seconds: float
    provider_stall_seconds: float
    assign_chunks_max: int
    stripe_providers_max: int
    download_concurrency: int
    corrupt_retries_max: int
    absent_probes_max: int
    retry_base_seconds: float
    retry_cap_seconds: float


# However short the pauses are set: a channel is not asked more often than this.
_PAUSE_SECONDS_MIN = 0.1
_PERMISSION_EXIT_CODE = 4
_PASSING_EXIT_CODES = (5, 8)  # unreachable, timed out


class Answers(Enum):
    """What has come of asking."""

    PENDING = "pending"
    OFFERED = "offered"
    NONE = "none"


class Asking:
    """The rounds of one request.

    As long as nobody has answered, a channel is asked ``want_rounds_max`` times. Once somebody has offered the file, or
    something has moved, a lost provider may come back (a node restarts, a network heals): the channel is asked for
    ``patience_seconds`` after the last sign that something goes on, with pauses that double. A provider that says
    it is at work is such a sign, but not for longer than ``provider_stall_seconds`` after the last chunk.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._fruitless = 0
        self._due_at: float | None = None
        self._asked_at: float | None = None
        self._wait_until = 0.0
        self._gathering = False
        self._progress_at = 0.0
        self._alive_at = 0.0
        self._moved_at = float("-inf")
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
        return None if self._asked_at is None else self._wait_until

    # --- what happened

    def start(self, now: float) -> None:
        """The request begins, or begins to move chunks after a long look at the disk."""
        self._progress_at = self._alive_at = now

    def progressed(self, now: float) -> None:
        """Something has moved."""
        self.begun, self._fruitless = True, 0
        self.start(now)

    def alive(self, now: float) -> None:
        """A provider that owes something says that it is at work."""
        self._alive_at = now

    def answered(self, now: float) -> None:
        """Somebody has the file: from now on patience counts, not rounds."""
        if not self.begun:
            self.begun = True
            self.start(now)

    def offered(self, now: float) -> None:
        """An offer has come in: wait for others, but not long. A late offer ends the pause between two rounds."""
        self.answered(now)
        if self.active and not self._gathering:
            self._begin_waiting(now, self._limits.offer_gather_seconds)
            self._gathering = True

    def expect(self, now: float) -> None:
        """Somebody is looking whether it has the file: wait for it."""
        if self._asked_at is not None and not self._gathering:
            end = self._asked_at + self._limits.patience_seconds
            self._wait_until = max(self._wait_until, min(now + self._limits.offer_wait_seconds, end))

    def bucket_moved(self, now: float) -> None:
        """The channel has another bucket."""
        self._moved_at = now

    def moved_lately(self, now: float) -> bool:
        """Whether a provider may not have heard yet that the channel has another bucket."""
        return now < self._moved_at + self._limits.patience_seconds

    # --- what to do

    def out_of_patience(self, now: float) -> bool:
        """Whether nothing has moved for too long: ``patience_seconds``, or one round's wait before anybody answered."""
        limits = self._limits
        if not self.begun:
            return now > self._progress_at + limits.offer_wait_seconds
        alive_at = min(max(self._progress_at, self._alive_at), self._progress_at + limits.provider_stall_seconds)
        return now > alive_at + limits.patience_seconds

    def bears(self, error: KacheryError, now: float) -> bool:
        """Whether trouble with the bucket may pass: it is out of reach or slow, and patience is left."""
        return error.exit_code in _PASSING_EXIT_CODES and not self.out_of_patience(now)

    def gives_up(self, error: KacheryError) -> bool:
        """Whether a question that could not be sent ends the request; once something moves, the bands may come back."""
        return not self.begun or error.exit_code == _PERMISSION_EXIT_CODE

    def account(self, *, ever_offered: bool) -> str:
        """Say, for people, why the asking came to an end."""
        patience = f"{self._limits.patience_seconds:g} s"
        if ever_offered:
            return f"every provider was lost, and none came back within {patience}"
        return f"those who have it went on declining for {patience}" if self.begun else "no node has offered it"

    def plan(self, now: float) -> bool:
        """Plan a further round; False when it is time to give up."""
        self.stop()
        if self.out_of_patience(now) if self.begun else self._fruitless >= self._limits.want_rounds_max:
            return False
        pause = 0.0
        if self._fruitless:
            pause = min(self._limits.retry_base_seconds * 2.0 ** min(self._fruitless, 16),
                        self._limits.offer_wait_seconds)
            pause = max(pause, _PAUSE_SECONDS_MIN)
        self._fruitless += 1
        self._due_at = now + pause
        return True

    def interrupted(self, now: float) -> None:
        """Messages may have been lost: break off the round under way; it counts for nothing while patience lasts."""
        if self.active and now <= self._progress_at + self._limits.patience_seconds:
            self._fruitless = max(0, self._fruitless - 1)
        self.stop()

    def stop(self) -> None:
        """Nobody has to be asked at present."""
        self._due_at = self._asked_at = None
        self._gathering = False

    def due(self, now: float) -> bool:
        """Whether to send the question now; true once for each round."""
        if self._due_at is None or now < self._due_at:
            return False
        self._begin_waiting(now, self._limits.offer_wait_seconds)
        return True

    def answers(self, now: float, *, everybody_declined: bool, everybody_answered: bool) -> Answers:
        """Look at the round under way; anything but PENDING ends it."""
        if self._asked_at is None:
            return Answers.PENDING
        nobody_is_missing = everybody_answered if self._gathering else everybody_declined
        if now < self._wait_until and not nobody_is_missing:
            return Answers.PENDING
        outcome = Answers.OFFERED if self._gathering else Answers.NONE
        self.stop()
        return outcome

    def _begin_waiting(self, now: float, seconds: float) -> None:
        self._due_at, self._asked_at, self._wait_until = None, now, now + seconds
        self._gathering = False
