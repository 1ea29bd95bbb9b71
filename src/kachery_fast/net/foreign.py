"""What foreign servers say, as it may be shown."""

from __future__ import annotations

__all__ = ["SHOWN_LENGTH_MAX", "one_line"]

SHOWN_LENGTH_MAX = 200


def one_line(text: str) -> str:
    """Return one short line of printable characters."""
    text = text[:4 * SHOWN_LENGTH_MAX]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:SHOWN_LENGTH_MAX]
