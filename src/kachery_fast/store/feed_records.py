"""What the feed log answers with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import KacheryError
from ..protocol.feeds import Tail

__all__ = ["Appended", "Extended", "FeedInfo", "ForkRecord", "SubfeedInfo"]


@dataclass(frozen=True)
class Appended:
    """What an append made: numbers ``first`` to ``tail.count`` (exclusive), as signed bytes, and the head after it."""

    first: int
    tail: Tail
    signed: list[bytes]
    sign_head: Callable[[], dict[str, Any]] = field(repr=False, compare=False)

    @cached_property
    def head(self) -> dict[str, Any]:
        """The owner's word that the subfeed ends here; signed when it is first asked for, since few are."""
        return self.sign_head()


@dataclass(frozen=True)
class Extended:
    """How many messages of a batch were new, how many are held now, and why the rest was refused."""

    new_count: int
    count: int
    error: KacheryError | None = None


@dataclass(frozen=True)
class SubfeedInfo:
    """One subfeed: its hash, its name where it is known, the messages held, and where it forked."""

    subfeed: str
    name: Any
    count: int
    forked_at: int | None


@dataclass(frozen=True)
class FeedInfo:
    """One feed: its id, the name that it has on this node, whether this node owns it, and its subfeeds."""

    feed_id: str
    name: str | None
    writable: bool
    subfeeds: list[SubfeedInfo]


@dataclass(frozen=True)
class ForkRecord:
    """Two signed messages of one number, the evidence of a fork; ``time_ms``: when the second came."""

    number: int
    first: bytes
    second: bytes
    time_ms: int
