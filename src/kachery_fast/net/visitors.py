"""Who is connected to a port: those that are too slow are cut, and when there are too many, who has most makes room.

aiohttp waits for ever for the rest of a head, and for a client that does not read its answer.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

__all__ = ["Patience", "Visitor", "Visitors", "Watched", "connections_max"]

_log = logging.getLogger("kachery_fast.net")

LOOK_SECONDS = 0.5
# Open files that are not connections: the registry's, objects, logs.
OTHER_FILES = 256
# At once, so that each new connection beyond the limit does not look through all the others.
_CUT_AT_ONCE_MAX = 64


class Patience(NamedTuple):
    """How long a client may take, in seconds."""

    head_seconds: float = 10.0
    """From the connection to the first byte of a request, and from there to the end of its head."""
    body_seconds: float = 30.0
    """For the body after it."""
    answer_seconds: float = 60.0
    """To take an answer that does not fit into the buffers between."""
    idle_seconds: float = 75.0
    """From one request to the next; longer than nginx keeps its connections."""


class Visitor:
    """One connection: whose, and what it is at.

    ``since``: when it came, when its last request was answered, or when the next one began (``begun``).
    ``answering``: a request is being answered. ``full_since``: since when the client has not read what waits for it.
    """

    __slots__ = ("address", "answering", "begun", "cut", "full_since", "had_request", "since")

    def __init__(self, address: str, since: float, cut: Callable[[], object]) -> None:
        self.address = address
        self.since = since
        self.cut = cut
        self.begun = False
        self.had_request = False
        self.answering = False
        self.full_since: float | None = None


class Visitors:
    """All connections of a port. Used on its event loop.

    :param connections_max: how many there may be. :param clock: seconds, only ever forwards.
    :param group: what counts as one address.
    """

    def __init__(self, connections_max: int, patience: Patience | None = None,
                 clock: Callable[[], float] = time.monotonic, group: Callable[[str], str] = str) -> None:
        self.patience = patience or Patience()
        self._connections_max = connections_max
        self._clock = clock
        self._group = group
        self._all: dict[Visitor, None] = {}  # in the order in which they came
        self._counts: Counter[str] = Counter()
        self._by_transport: dict[asyncio.BaseTransport, Visitor] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, address: str, cut: Callable[[], object]) -> Visitor | None:
        """Let one in; None when there is no room.

        :param cut: ends the connection.
        """
        if len(self._all) >= self._connections_max and not self._make_room():
            return None
        address = self._group(address)
        visitor = Visitor(address, self._clock(), cut)
        self._all[visitor] = None
        self._counts[address] += 1
        return visitor

    def remove(self, visitor: Visitor) -> None:
        """Forget one that has gone, or that is somebody else's now. May be called twice."""
        if visitor in self._all:
            del self._all[visitor]
            self._counts[visitor.address] -= 1
            if not self._counts[visitor.address]:
                del self._counts[visitor.address]

    def look(self) -> None:
        """Cut who is too slow."""
        now = self._clock()
        for visitor in [visitor for visitor in self._all if self._is_slow(visitor, now)]:
            self._cut(visitor)

    def _is_slow(self, visitor: Visitor, now: float) -> bool:
        if visitor.full_since is not None:
            return now - visitor.full_since > self.patience.answer_seconds
        if visitor.answering:
            return False
        between = visitor.had_request and not visitor.begun
        return now - visitor.since > (self.patience.idle_seconds if between else self.patience.head_seconds)

    def _make_room(self) -> bool:
        """Cut connections on which nothing is being answered: of the address that has most, those that wait longest."""
        waiting = [visitor for visitor in self._all if not visitor.answering]
        most = max((self._counts[visitor.address] for visitor in waiting), default=0)
        chosen = [visitor for visitor in waiting if self._counts[visitor.address] == most]
        chosen.sort(key=lambda visitor: visitor.since)
        for visitor in chosen[:min(_CUT_AT_ONCE_MAX, max(1, len(chosen) // 2))]:
            self._cut(visitor)
        return bool(chosen)

    def _cut(self, visitor: Visitor) -> None:
        self.remove(visitor)
        visitor.cut()

    # --- what the connections tell

    def opened(self, transport: asyncio.Transport, visitor: Visitor) -> None:
        """A connection is the application's now."""
        visitor.cut = transport.abort
        self._by_transport[transport] = visitor

    def closed(self, transport: asyncio.BaseTransport) -> None:
        """It has ended."""
        visitor = self._by_transport.pop(transport, None)
        if visitor is not None:
            self.remove(visitor)

    def received(self, visitor: Visitor) -> None:
        """Bytes have come."""
        if not (visitor.begun or visitor.answering):
            visitor.begun, visitor.since = True, self._clock()

    def filled(self, visitor: Visitor, full: bool) -> None:
        """The buffers to a client are full, or no longer."""
        visitor.full_since = self._clock() if full else None

    @contextmanager
    def answering(self, transport: asyncio.BaseTransport | None) -> Iterator[None]:
        """A request has come, as far as its head, and is being answered within this."""
        visitor = None if transport is None else self._by_transport.get(transport)
        if visitor is None:
            yield
            return
        visitor.answering = True
        try:
            yield
        finally:
            visitor.answering, visitor.begun, visitor.had_request = False, False, True
            visitor.since = self._clock()


class Watched(asyncio.Protocol):
    """A protocol of a web application, whose connection is watched."""

    def __init__(self, inner: Any, visitor: Visitor, visitors: Visitors) -> None:
        self._inner = inner
        self._visitor = visitor
        self._visitors = visitors
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        self._transport = transport
        self._visitors.opened(cast("asyncio.Transport", transport), self._visitor)
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        if self._transport is not None:
            self._visitors.closed(self._transport)
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        self._visitors.received(self._visitor)
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """See ``asyncio.Protocol``."""
        keep: bool | None = self._inner.eof_received()
        return keep

    def pause_writing(self) -> None:
        """See ``asyncio.Protocol``."""
        self._visitors.filled(self._visitor, True)
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """See ``asyncio.Protocol``."""
        self._visitors.filled(self._visitor, False)
        self._inner.resume_writing()


def connections_max(wanted: int) -> int:
    """Let the process open as many files as it may; return how many connections there is room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    _log.warning("only %d files may be open (ulimit -n), so there may be %d connections and not %d", soft,
                 max(1, soft - OTHER_FILES), wanted)
    return max(1, soft - OTHER_FILES)
