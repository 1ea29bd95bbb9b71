"""Who was asked to run a task, and what each answered: the account that a failure carries."""

from __future__ import annotations

from typing import Any

from ..errors import TaskNotTaken, TaskOutcomeUnknown
from .inquiry import harmless, node_text

__all__ = ["TaskAccount"]

_NAMED_MAX = 5
_ANSWERS_MAX = 200


class TaskAccount:
    """The account of one request. ``providers`` are the other nodes that may provide tasks: node id -> label.

    ``declined`` holds those of whose last word it is that they will not run it, with the reason.
    """

    def __init__(self, function: str, task: str, channel: str) -> None:
        self.function, self.task, self.channel = function, task, channel
        self.providers: dict[str, str] = {}
        self.self_may = False
        self.rounds = 0
        self.bucket = ""
        self.hub = ""
        self.declined: dict[str, str] = {}
        self._answers: dict[str, str] = {}

    @property
    def nobody(self) -> bool:
        """Whether there is nobody to ask."""
        return not self.providers and not self.self_may

    @property
    def all_declined(self) -> bool:
        """Whether everybody who could run it has declined; this node itself, without a backend, keeps silent."""
        return bool(self.declined) and all(node_id in self.declined for node_id in self.providers)

    @property
    def answered(self) -> bool:
        """Whether anybody has answered."""
        return bool(self._answers)

    def note(self, node_id: str, answer: str) -> None:
        """Remember the last word of a node, or what became of it."""
        self._answers.pop(node_id, None)
        if len(self._answers) < _ANSWERS_MAX:
            self._answers[node_id] = harmless(answer)

    def label(self, node_id: str) -> str:
        """Name a node for people."""
        return node_text(node_id, self.providers.get(node_id, ""))

    def text(self) -> str:
        """Return who was asked and what each answered, as one line."""
        parts = []
        if self.rounds:
            times = "once" if self.rounds == 1 else f"{self.rounds} times"
            count = len(self.providers) + self.self_may
            parts.append(f"{count} node{'s' if count != 1 else ''}, {times}")
        else:
            parts.append("nobody")
        parts.extend(f"{self.label(node_id)}: {answer}" for node_id, answer in self._answers.items())
        silent = [node_id for node_id in self.providers if node_id not in self._answers] if self.rounds else []
        if silent:
            names = ", ".join(self.label(node_id) for node_id in silent[:_NAMED_MAX])
            more = f" and {len(silent) - _NAMED_MAX} more" if len(silent) > _NAMED_MAX else ""
            parts.append(f"no answer from {names}{more} (a node without a task backend keeps silent)")
        if self.bucket:
            parts.append(f"bucket: {self.bucket}")
        if self.hub:
            parts.append(f"hub: {self.hub}")
        return "; ".join(part.rstrip(".") for part in parts)  # some are errors' messages, and whole sentences

    def not_taken(self, why: str) -> TaskNotTaken:
        """Return the error of a task that nobody has run."""
        return TaskNotTaken(function=self.function, why=why, asked=self.text(), **self.details())

    def outcome_unknown(self, why: str) -> TaskOutcomeUnknown:
        """Return the error of an action that may have been carried out."""
        return TaskOutcomeUnknown(function=self.function, why=f"{why} (asked: {self.text()})", **self.details())

    def details(self) -> dict[str, Any]:
        """Return what every error of the request carries."""
        return {"task": self.task, "channel": self.channel, "account": self.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        """Return the account as plain JSON."""
        return {
            "rounds": self.rounds, "bucket": self.bucket, "hub": self.hub,
            "asked": [{"node": node_id, "label": label} for node_id, label in self.providers.items()],
            "answers": [{"node": node_id, "label": self.providers.get(node_id, ""), "answer": answer}
                        for node_id, answer in self._answers.items()],
        }
