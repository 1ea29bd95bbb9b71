"""Who says that it has a task, and for how long that is believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .task_bodies import TaskStatus
from .task_view import TaskView, of_status

__all__ = ["TaskWords"]

# Nodes whose word on a task is remembered.
_NODES_MAX = 200
# A node with many tasks in its queue speaks of each but rarely: it is believed for so many times the silence, as long
# as it is heard of at all.
_QUEUED_SILENCES = 32


@dataclass(frozen=True)
class _Word:
    body: TaskStatus
    time: float


class TaskWords:
    """The last word of each node that has one task, queued or running.

    :param silence_seconds: a node that runs it and was not heard of for so long has fallen silent.
    :param last_heard: when each node was last heard of, about any task; kept by the caller.
    """

    def __init__(self, silence_seconds: float, last_heard: Mapping[str, float]) -> None:
        self._silence_seconds = silence_seconds
        self._last_heard = last_heard
        self._words: dict[str, _Word] = {}

    def __bool__(self) -> bool:
        """Whether anybody has it."""
        return bool(self._words)

    def note(self, node_id: str, body: TaskStatus, now: float) -> None:
        """A node says that it has the task."""
        if node_id in self._words or len(self._words) < _NODES_MAX:
            self._words[node_id] = _Word(body, now)

    def lost_last(self, node_id: str) -> bool:
        """A node has it no more; return whether it was the last one that had it."""
        return self._words.pop(node_id, None) is not None and not self._words

    def clear(self) -> None:
        """Nobody has it."""
        self._words.clear()

    def forget_silent(self, now: float) -> None:
        """Believe those no more who have fallen silent."""
        self._words = {node_id: word for node_id, word in self._words.items() if now < self._quiet_at(node_id, word)}

    def quiet_at(self, now: float) -> float:
        """Return when the first of them will have fallen silent; ``now`` when nobody has it."""
        return min((self._quiet_at(node_id, word) for node_id, word in self._words.items()), default=now)

    def view(self) -> TaskView | None:
        """Return what they say, those that run it before those in whose queue it is; None when nobody has it."""
        running = [node_id for node_id, word in self._words.items() if word.body.status == "running"]
        for node_id in running or self._words:
            return of_status(self._words[node_id].body, node_id)
        return None

    def _quiet_at(self, node_id: str, word: _Word) -> float:
        heard_at = word.time
        if word.body.status == "queued":
            heard_at = max(heard_at, self._last_heard.get(node_id, heard_at))
        return min(heard_at + self._silence_seconds, word.time + _QUEUED_SILENCES * self._silence_seconds)
