"""When a channel is asked for a task, when it is asked again, and when to give up."""

from __future__ import annotations

from .task_account import TaskAccount
from .task_request_events import TaskRequestLimits

__all__ = ["TaskRounds", "pause_seconds"]

# However short the pauses are set: nobody is asked more often than this.
_PAUSE_SECONDS_MIN = 0.1
# How often in a row a task is asked for anew that was lost while it ran: executors that die of it, or lie, one after
# the other. One that was lost in queues has killed nobody: it is asked for anew for ``patience_seconds`` at least.
_LOSSES_MAX = 5
_PASSING_REASONS = ("busy", "hub")
_LASTING_REASONS = {
    "unregistered": "no task backend there has registered it",
    "wrong-type": "it is registered there as another kind of task",
    "bad-arguments": "its arguments were refused",
}


def pause_seconds(limits: TaskRequestLimits, tries: int) -> float:
    """Return how long to wait before the next of several tries; it doubles."""
    pause = min(limits.retry_base_seconds * 2.0 ** min(tries, 16), limits.offer_wait_seconds)
    return max(pause, _PAUSE_SECONDS_MIN)


class TaskRounds:
    """The rounds of one request. As long as nobody has taken the task, a channel is asked ``want_rounds_max`` times;
    once somebody has had it, or would take it later, for ``patience_seconds``."""

    def __init__(self, limits: TaskRequestLimits, account: TaskAccount) -> None:
        self._limits = limits
        self._account = account
        self._count = 0
        self._due_at: float | None = None
        self._wait_until: float | None = None
        self._lost_at = self._lost_since = float("-inf")
        self._lost = self._runs_lost = 0

    @property
    def deadline(self) -> float | None:
        """When the time decides something."""
        return self._due_at if self._due_at is not None else self._wait_until

    def begin(self, at: float) -> None:
        """Ask from the time ``at`` on, beginning with a first round."""
        self._count, self._due_at, self._wait_until = 0, at, None

    def again_at(self, now: float, *, ran: bool) -> float | None:
        """Return when to ask anew for a task that whoever had it has lost; None: not again.

        :param ran: it was lost while it ran, or when it was said to have finished.
        """
        if now > self._lost_at + self._limits.patience_seconds:
            self._lost_since, self._lost, self._runs_lost = now, 0, 0
        self._lost_at, self._lost, self._runs_lost = now, self._lost + 1, self._runs_lost + ran
        too_long = now > self._lost_since + self._limits.patience_seconds
        if self._runs_lost > _LOSSES_MAX or (self._lost > _LOSSES_MAX and too_long):
            return None
        return now + pause_seconds(self._limits, self._lost)

    def interrupted(self, now: float) -> None:
        """Messages may have been lost: ask at once; the round under way counts for nothing."""
        self._count, self._due_at = max(0, self._count - 1), now

    def due(self, now: float) -> bool:
        """Whether to ask now; true once for each round."""
        if self._due_at is None or now < self._due_at:
            return False
        self._due_at, self._wait_until = None, now + self._limits.offer_wait_seconds
        self._count += 1
        self._account.rounds += 1
        for node_id in [known for known, reason in self._account.declined.items() if reason in _PASSING_REASONS]:
            del self._account.declined[node_id]
        return True

    def over(self, now: float, alive_at: float, *, taken: bool) -> str:
        """Look at the round under way. Return why to give up; an empty text when there is no cause.

        :param taken: somebody has had the task, last at the time ``alive_at``.
        """
        if self._wait_until is None or not (now >= self._wait_until or self._account.all_declined):
            return ""
        self._wait_until = None
        reasons = set(self._account.declined.values())
        passing = not reasons.isdisjoint(_PASSING_REASONS)
        back = taken and "unregistered" in reasons  # a backend that is started anew takes it again
        if self._account.all_declined and not passing and not back:
            return " and ".join(_LASTING_REASONS[reason] for reason in sorted(reasons))
        if taken or passing:
            if now > alive_at + self._limits.patience_seconds:
                lost = "who had it has lost it, and nobody else took it" if taken else "nobody could take it"
                return f"{lost} within {self._limits.patience_seconds:g} s"
        elif self._count >= self._limits.want_rounds_max:
            return "nobody took it" if self._account.answered else "nobody has answered"
        self._due_at = now + pause_seconds(self._limits, self._count)
        return ""
