"""What was taken from a directory of 2022, what was there already, and what was refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Count", "Tally"]


@dataclass
class Count:
    """Of one kind: how many were taken, their bytes (files and links alone), and how many were here already."""

    taken: int = 0
    size_bytes: int = 0
    here: int = 0


@dataclass
class Tally:
    """The account of one take-over. ``refused``: what was not taken, and why. ``replaced``: the SHA-1 of each file that
    was here with other bytes; these are in ``damaged/`` now.

    ``too_large_bytes``: the length of the shortest mutable that was longer than the setting allows. ``unread``: a file
    could not be read this time, and the same one may be readable the next time.
    """

    files: Count = field(default_factory=Count)
    links: Count = field(default_factory=Count)
    mutables: Count = field(default_factory=Count)
    feeds: Count = field(default_factory=Count)
    messages: Count = field(default_factory=Count)
    refused: list[tuple[str, str]] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    too_large_bytes: int | None = None
    unread: bool = False

    def refuse(self, what: str, why: str) -> None:
        """Note what was not taken."""
        self.refused.append((what, why))

    def to_dict(self) -> dict[str, Any]:
        """Return the account as plain JSON."""
        kinds = {"files": self.files, "links": self.links, "mutables": self.mutables, "feeds": self.feeds,
                 "messages": self.messages}
        found: dict[str, Any] = {name: {"taken": count.taken, "alreadyHere": count.here}
                                 for name, count in kinds.items()}
        for name in ("files", "links"):
            found[name]["takenBytes"] = kinds[name].size_bytes
        found["refused"] = [{"what": what, "why": why} for what, why in self.refused]
        found["replaced"] = self.replaced
        return found
