"""What happens to the reader of a subfeed (``following.Follower``), and what it wants done."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from ..errors import KacheryError
from . import plain_json
from .feed_bodies import FeedFailed, FeedMessages, FeedShared, Segment
from .feed_segments import Index
from .feeds import Head

__all__ = [
    "BandRestored", "Effect", "End", "Event", "Grown", "Heard", "IndexRead", "KeepHead", "Load", "Loaded",
    "LookAtIndex", "SayFailed", "Subscribe", "Take", "Taken", "Tick", "Wanted",
]

# --- events


class Wanted(Struct, frozen=True):
    """Somebody reads the subfeed: follow it until ``until``."""

    until: float


class IndexRead(Struct, frozen=True):
    """``LookAtIndex`` has ended: with the index, or None and why there is none."""

    index: Index | None
    why: str = ""


class Heard(Struct, frozen=True):
    """A node said something about this subfeed."""

    body: FeedMessages | FeedShared | FeedFailed
    sender: str


class Loaded(Struct, frozen=True):
    """``Load`` has ended: the subfeed is held up to ``count``.

    ``why``: what was wrong, "" for nothing. ``useless``: the object is what its name says, and no good: not to be tried
    again. ``forked``: as of ``Grown``. ``trouble``: the disk or the bucket was in the way, and nobody said anything
    false.
    """

    segment: Segment
    count: int
    why: str = ""
    useless: bool = False
    forked: bool = False
    trouble: bool = False


class Taken(Struct, frozen=True):
    """``Take`` has ended: the subfeed is held up to ``count``; ``why``: what was wrong with the rest, "" if nothing."""

    count: int
    why: str = ""
    forked: bool = False


class Grown(Struct, frozen=True):
    """The subfeed is held up to ``count`` by other ways; ``forked``: no message after it can ever be believed."""

    count: int
    forked: bool = False


class Parted(Struct, frozen=True):
    """The owner has signed a history in which message ``number`` is another one than the one held; seen by a message or
    head that builds on it, so that the message itself is still to be seen."""

    number: int


class BandRestored(Struct, frozen=True):
    """The bands were out of reach, and messages may have been lost."""


class SayFailed(Struct, frozen=True):
    """A question could not be sent."""

    error: KacheryError


class Tick(Struct, frozen=True):
    """The time that ``deadline`` named has come."""


Event = Wanted | IndexRead | Heard | Loaded | Taken | Grown | Parted | BandRestored | SayFailed | Tick


# --- effects


class LookAtIndex(Struct, frozen=True):
    """Read the subfeed's index from the bucket, past caches; answer by ``IndexRead``."""


class Load(Struct, frozen=True):
    """Load a segment, check its messages and keep the good ones; answer by ``Loaded``."""

    segment: Segment


class Take(Struct, frozen=True):
    """Check messages ``first``, … and keep the good ones; answer by ``Taken``.

    ``parts``: the messages, as one or several JSON lists, to be read when they are needed.
    """

    first: int
    parts: tuple[bytes, ...]
    sender: str

    def messages(self) -> list[Any]:
        """Read them; it takes a while for many."""
        return [message for part in self.parts for message in plain_json.decode(part)]


class KeepHead(Struct, frozen=True):
    """Keep a head that was checked; the messages that it speaks of are held."""

    head: Head


class Subscribe(Struct, frozen=True):
    """Say a ``FeedSubscribe`` with these fields; ``SayFailed`` when it cannot be sent."""

    fields: dict[str, Any]


class End(Struct, frozen=True):
    """Nobody reads any more. The machine takes no further events."""


Effect = LookAtIndex | Load | Take | KeepHead | Subscribe | End
