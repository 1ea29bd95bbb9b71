"""What was tried to get a file, and what each party answered: the account that replaces a bare "not found"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import NotAvailable

__all__ = ["Inquiry", "harmless", "node_text"]


# Answers and labels come from other machines and end up on a terminal.
_TEXT_LENGTH_MAX = 300


def node_text(node_id: str, label: str) -> str:
    """Name a node for people: its label and the beginning of its id."""
    return f"{harmless(label)} ({node_id[:8]})" if label else f"node {node_id[:8]}"


def harmless(text: str) -> str:
    """Cut a foreign text, and blank what could steer a terminal."""
    text = "".join(character if character.isprintable() else " " for character in text[:_TEXT_LENGTH_MAX + 1])
    return text if len(text) <= _TEXT_LENGTH_MAX else text[:_TEXT_LENGTH_MAX] + "…"


@dataclass
class Inquiry:
    """The account of one request on one channel; facts are noted as they come, in the order they came.

    ``providers`` maps the node ids of everybody else who may provide such things there to their labels, ``former``
    those of who answered and may not any more; ``thing`` is what they were asked for; ``bands`` says why they could
    not be asked.
    """

    uri: str
    channel: str
    providers: dict[str, str] = field(default_factory=dict)
    bucket: str = "not looked at"
    rounds: int = 0
    answers: dict[str, str] = field(default_factory=dict)
    thing: str = "the file"
    bands: str = ""
    former: dict[str, str] = field(default_factory=dict)

    def change_providers(self, providers: dict[str, str]) -> None:
        """Take over who may provide such things from now on. What somebody said while it might holds only so long."""
        for node_id in self.former.keys() & providers.keys():
            del self.former[node_id], self.answers[node_id]
        for node_id in self.providers.keys() & self.answers.keys() - providers.keys():
            self.former[node_id] = self.providers[node_id]
            self.note(node_id, "may not provide it any more")
        self.providers = providers

    def note(self, node_id: str, answer: str) -> None:
        """Remember the last word of a node, or what became of it."""
        self.answers[node_id] = harmless(answer)

    def label(self, node_id: str) -> str:
        """Name a node for people."""
        return node_text(node_id, self._name(node_id))

    def tried(self) -> str:
        """Return the account as one line."""
        parts = [f"bucket: {self.bucket}"]
        if self.rounds:
            times = "once" if self.rounds == 1 else f"{self.rounds} times"
            parts.append(f"asked {self._crowd()} {times}")
        else:
            parts.append("nobody was asked")
        if self.bands:
            parts.append(f"the last question could not be sent ({self.bands})")
        parts.extend(f"{self.label(node_id)}: {answer}" for node_id, answer in self.answers.items())
        silent = [node_id for node_id in self.providers if node_id not in self.answers] if self.rounds else []
        if silent:
            names = ", ".join(self.label(node_id) for node_id in silent[:5])
            more = f" and {len(silent) - 5} more" if len(silent) > 5 else ""
            parts.append(f"no answer from {names}{more} (a node without {self.thing} keeps silent)")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the account as plain JSON, as ``kachery-fast why --json`` prints it."""
        return {
            "channel": self.channel,
            "bucket": self.bucket,
            "rounds": self.rounds,
            "asked": [{"node": node_id, "label": label} for node_id, label in self.providers.items()],
            "answers": [
                {"node": node_id, "label": self._name(node_id), "answer": answer}
                for node_id, answer in self.answers.items()
            ],
        }

    def error(self, why: str) -> NotAvailable:
        """Return the error that carries the account."""
        return NotAvailable(uri=self.uri, channel=self.channel, why=why, tried=self.tried(), account=self.to_dict())

    def _name(self, node_id: str) -> str:
        return self.providers.get(node_id) or self.former.get(node_id, "")

    def _crowd(self) -> str:
        count = len(self.providers)
        return "1 node" if count == 1 else f"{count} nodes"
