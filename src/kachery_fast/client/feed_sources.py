"""Where the messages of a feed come from: the node, which holds and follows feeds, or a snapshot."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ..config import Settings
from ..errors import (
    BandUnreachable,
    ChannelUnknown,
    FeedNotWritable,
    FeedUnknown,
    HubUnreachable,
    InvalidArgument,
    KacheryError,
    NodeNotRunning,
    Stalled,
)
from ..protocol.names import check_channel_name, subfeed_hash
from .connection import NodeConnection
from .keeping import NoAnswer, Withdrawal
from .snapshots import Snapshot, unsigned

__all__ = [
    "LOCAL",
    "PASSING_ERRORS",
    "Batch",
    "NodeSource",
    "Pauses",
    "SnapshotSource",
    "Source",
    "checked_position",
    "checked_wait",
    "chosen_channel",
]

#: As the clients of 2022 call reading what is on this machine, and asking nobody.
LOCAL = "*local*"
#: What a node that starts again makes a reader see for a while.
PASSING_ERRORS = (NodeNotRunning, HubUnreachable, BandUnreachable, ChannelUnknown)
_PAUSE_SECONDS = 0.1
_PAUSE_SECONDS_MAX = 1.0
# JSON numbers that every reader holds; a position beyond is a mistake.
_POSITION_MAX = 2**53 - 1
_WAIT_MSEC_MAX = 24 * 3600 * 1000
_IN_DOUBT = ("whether the messages were appended is not known: look at the end of the subfeed before appending them "
             "again")


class Batch(NamedTuple):
    """An answer to a read: messages, the position after them, how many messages are known of, whether anything is
    known of the subfeed at all, and, when nothing came, why."""

    messages: list[dict[str, Any]]
    position: int
    total: int
    known: bool = True
    why: str = ""


class Source(Protocol):
    """What a feed reads from and writes to. A subfeed is given by its name, a text or a dict, or ``~`` and its hash."""

    feed_id: str | None
    writable: bool

    def read(self, subfeed: Any, channel: str | None, position: int, *, wait_msec: float = 0,
             max_num_messages: int | None = None, signed: bool = False, withdrawal: Withdrawal | None = None) -> Batch:
        """Return messages from ``position`` on, up to ``wait_msec`` later; not more than ``max_num_messages``, and not
        always all that there are."""
        ...

    def append(self, subfeed: Any, messages: Sequence[dict[str, Any]]) -> range:
        """Append messages, all or none, and return their numbers."""
        ...


class NodeSource:
    """A feed as the node knows it: its own, or one of others that it follows.

    :raises NodeNotRunning, ClientAuthRefused: there is no node to ask.
    """

    def __init__(self, settings: Settings, feed_id: str, connection: NodeConnection | None = None) -> None:
        self._silence_seconds = 2 * settings.stall_seconds
        self.connection = connection = connection or NodeConnection(settings)
        self.feed_id: str | None = feed_id
        try:
            self.writable = bool(connection.call("/api/feed/info", {"feedId": feed_id}).get("writable"))
        except FeedUnknown:  # of another node, and not followed yet
            self.writable = False

    def read(self, subfeed: Any, channel: str | None, position: int, *, wait_msec: float = 0,
             max_num_messages: int | None = None, signed: bool = False, withdrawal: Withdrawal | None = None) -> Batch:
        """See ``Source``. :raises KacheryError: what the node says, for example that nobody may ask there."""
        wait_msec = checked_wait(wait_msec)
        body = {"feedId": self.feed_id, "subfeed": subfeed, "channel": channel, "position": checked_position(position),
                "waitMsec": wait_msec, "maxMessages": max_num_messages, "signed": signed}
        answer = self.connection.call("/api/feed/read", body, self._silence_seconds + wait_msec / 1000,
                                      withdrawal=withdrawal)
        return Batch(list(answer["messages"]), int(answer["position"]), int(answer["count"]), bool(answer["known"]),
                     str(answer.get("why") or ""))

    def append(self, subfeed: Any, messages: Sequence[dict[str, Any]]) -> range:
        """See ``Source``.

        :raises InvalidArgument: a message is not a JSON object. :raises TooLarge: it, or all of them, are too long.
        :raises FeedNotWritable: the feed is not this node's.
        :raises NodeNotRunning, Stalled: no node answers. When the messages had been sent, nobody can tell whether they
            were appended, and the error says so.
        """
        body = _encode({"feedId": self.feed_id, "subfeed": subfeed, "messages": messages}, messages)
        try:
            answer = self.connection.call("/api/feed/append", body)
        except NodeNotRunning as error:
            if not isinstance(error.__cause__, NoAnswer):
                raise
            raise NodeNotRunning(url=self.connection.url, why=f"{error.__cause__}; {_IN_DOUBT}") from error
        except Stalled as error:
            raise Stalled(what=f"The node at {self.connection.url} ({_IN_DOUBT})",
                          seconds=error.details.get("seconds")) from error
        return range(int(answer["first"]), int(answer["end"]))

    def forks(self, subfeed: Any) -> list[dict[str, Any]]:
        """Return the evidence against the owner: for each fork its ``number``, and both signed messages, ``first`` and
        ``second``."""
        answer = self.connection.call("/api/feed/forks", {"feedId": self.feed_id, "subfeed": subfeed})
        return list(answer["forks"])


class SnapshotSource:
    """A feed as a snapshot holds it. ``uri``: what errors call it."""

    def __init__(self, snapshot: Snapshot, uri: str) -> None:
        self.snapshot = snapshot
        self.feed_id = snapshot.feed_id
        self.writable = False
        self._uri = uri

    def read(self, subfeed: Any, channel: str | None, position: int, *, wait_msec: float = 0,
             max_num_messages: int | None = None, signed: bool = False, withdrawal: Withdrawal | None = None) -> Batch:
        """See ``Source``; there is nothing to wait for. :raises InvalidArgument: there are no signatures."""
        checked_position(position)
        checked_wait(wait_msec)
        held = self.snapshot.subfeeds.get(subfeed_hash(subfeed))
        if held is None:
            return Batch([], position, 0, known=False, why=f"the snapshot {self._uri} has no such subfeed")
        messages = held.signed if signed else held.messages
        if messages is None:
            raise unsigned(self._uri)
        end = len(messages) if max_num_messages is None else position + max_num_messages
        found = messages[position:end]
        return Batch(found, position + len(found), len(messages))

    def append(self, subfeed: Any, messages: Sequence[dict[str, Any]]) -> range:
        """:raises FeedNotWritable: always."""
        raise FeedNotWritable(feed_id=self.feed_id or "?", why=f"{self._uri} is a snapshot")


class Pauses:
    """How a stream bears with a node that is away: for ``patience_seconds`` after it had answered once."""

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self._answered = False
        self._end = 0.0
        self._pause_seconds = 0.0

    def answered(self) -> None:
        """Note that the node answered."""
        self._answered, self._pause_seconds = True, 0.0

    def after(self, error: KacheryError) -> float:
        """Return how many seconds to pause before asking again. :raises KacheryError: ``error``; it is enough."""
        now = time.monotonic()
        if not self._pause_seconds:
            self._pause_seconds, self._end = _PAUSE_SECONDS, now + self._patience_seconds
        else:
            self._pause_seconds = min(2 * self._pause_seconds, _PAUSE_SECONDS_MAX)
        if not self._answered or now > self._end:
            raise error
        return self._pause_seconds


def chosen_channel(settings: Settings, channel: str | None) -> str | None:
    """Return the channel to ask on: the one that is named, else that of KACHERY_CHANNEL, else None, for the node's own
    choice; ``LOCAL``: nobody is asked.

    :raises InvalidName: it cannot be a channel's name.
    """
    if channel in ("", LOCAL):
        return LOCAL
    name = settings.channel if channel is None else channel
    return check_channel_name(name) if name else None


def checked_position(position: Any) -> int:
    """Return a position. :raises InvalidArgument: it is not a whole number from 0 on."""
    if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position <= _POSITION_MAX:
        raise InvalidArgument(what=f"A position is the number of a message, from 0 on, not {position!r}.")
    return position


def checked_wait(wait_msec: Any) -> int:
    """Return a wait in milliseconds, a day at most. :raises InvalidArgument: it is not a number from 0 on."""
    if not isinstance(wait_msec, int | float) or not 0 <= wait_msec <= _POSITION_MAX:
        raise InvalidArgument(what=f"wait_msec is a number of milliseconds, from 0 on, not {wait_msec!r}.")
    return min(int(wait_msec), _WAIT_MSEC_MAX)


def _encode(body: dict[str, Any], messages: Sequence[dict[str, Any]]) -> bytes:
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidArgument(what=f"A message of a feed is a dict of JSON; message {number} of these is "
                                       f"{type(message).__name__}.")
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        for number, message in enumerate(messages):
            try:
                json.dumps(message, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as inner:
                raise InvalidArgument(what=f"Message {number} of these cannot be written as JSON: {inner}.") from None
        raise InvalidArgument(what=f"This cannot be written as JSON: {error}.") from None
