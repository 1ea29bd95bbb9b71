"""A subfeed: one log of a feed, a position in it, and the ways to read and follow it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from ..errors import FeedNotWritable, InvalidArgument, KacheryError, SubfeedNotAvailable
from ..protocol.names import FeedUri, subfeed_hash
from .feed_sources import LOCAL, PASSING_ERRORS, Batch, Pauses, checked_position, chosen_channel
from .keeping import Withdrawal

if TYPE_CHECKING:
    from .feeds import Feed

__all__ = ["Subfeed", "checked_limit"]

# How long one question of a stream lasts; the node answers at once when there is something.
_STREAM_WAIT_MSEC = 5000

Result = TypeVar("Result")

logger = logging.getLogger("kachery_fast.client")


class Subfeed:
    """A subfeed and a position in it: the number of the message that is read next."""

    def __init__(self, feed: Feed, subfeed_name: Any, *, position: int = 0, channel: str | None = None) -> None:
        self._feed = feed
        self._source = feed.source
        self._settings = feed.settings
        self._name = subfeed_name
        self._hash = subfeed_hash(subfeed_name)
        self._channel = chosen_channel(feed.settings, channel)
        self._warned = False
        self._position = 0
        self.position = position

    @property
    def feed(self) -> Feed:
        """The feed that it is of."""
        return self._feed

    @property
    def name(self) -> Any:
        """Its name, as it was loaded by."""
        return self._name

    subfeed_name = name

    @property
    def subfeed_hash(self) -> str:
        """The SHA-1 of its name, which it is known by on the network."""
        return self._hash

    @property
    def channel(self) -> str | None:
        """The channel that its messages are asked for on; None: that of the node's setting, ``"*local*"``: none."""
        return self._channel

    @property
    def uri(self) -> str:
        """``feed://<feed id>/<name>``, or ``/~<hash>`` where the name is a dict; ``load_subfeed`` takes it."""
        named = isinstance(self._name, str) and self._name and not self._name.startswith("~")
        if self.is_snapshot:
            more = "&" if "?" in self._feed.uri else "?"
            return f"{self._feed.uri}{more}subfeedName={quote(self._name if named else '~' + self._hash, safe='~')}"
        return str(FeedUri(self._feed.feed_id or "", self._name if named else None, self._hash))

    @property
    def is_snapshot(self) -> bool:
        """Whether it is of a snapshot."""
        return self._feed.is_snapshot

    @property
    def is_writeable(self) -> bool:
        """Whether messages can be appended here."""
        return self._feed.is_writeable

    # --- position and length

    @property
    def position(self) -> int:
        """The number of the message that is read next; set it to read again, or to skip."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        """:raises InvalidArgument: it is not a number of a message."""
        self._position = checked_position(position)

    def set_position(self, position: int) -> None:
        """Set ``position``."""
        self.position = position

    @property
    def num_messages(self) -> int:
        """How many messages this node knows of, at once. Those of another node's feed come in while it is read."""
        return self._source.read(self._name, self._channel, 0, max_num_messages=1).total

    def get_num_local_messages(self) -> int:
        """Return how many messages this node holds, without asking anybody."""
        return self._source.read(self._name, LOCAL, 0, max_num_messages=1).total

    # --- writing

    def append_message(self, message: dict[str, Any]) -> int:
        """Append a message and return its number. From then on it survives a crash of the node, or of the machine.

        :param message: a dict of JSON.
        :raises FeedNotWritable: the feed is of another node, or a snapshot.
        :raises InvalidArgument, TooLarge: the message cannot be one.
        :raises NodeNotRunning, Stalled: the node went away. The error says whether the message may be there all the
            same: it is never sent twice.
        """
        return self.append_messages([message]).start

    def append_messages(self, messages: Sequence[dict[str, Any]]) -> range:
        """Append messages, all of them or none, 100,000 at most, and return their numbers; see ``append_message``."""
        if not self.is_writeable:
            why = "it is a snapshot" if self.is_snapshot else "this node does not own it"
            raise FeedNotWritable(feed_id=self._feed.feed_id or "?", why=why)
        if isinstance(messages, str | bytes | Mapping):
            raise InvalidArgument(what="append_messages takes a list of dicts; append_message takes one.")
        messages = list(messages)
        if not messages:
            count = self.get_num_local_messages()
            return range(count, count)
        return self._source.append(self._name, messages)

    # --- reading

    def get_next_messages(self, *, wait_msec: float = 10, signed: bool = False, max_num_messages: int | None = None,
                          advance_position: bool = True) -> list[dict[str, Any]]:
        """Return the messages from ``position`` on that are there, and move the position past them.

        What this node holds comes at once, though the owner may have gone on meanwhile: ask again until the list is
        empty, or use a stream.

        :param wait_msec: how long to wait for the first of them, and for those that are on their way with it.
        :param signed: return them as they were signed: ``{"body": {"message": …, "messageNumber": …, "timestamp": …,
            …}, "signature": …}``.
        :param max_num_messages: at most so many; None or 0: all.
        :param advance_position: False leaves the position as it is.
        :return: an empty list when nothing came in time. Where messages are known of that nobody brings, a warning in
            the log says what was tried.
        :raises SubfeedNotAvailable: nobody has even said that there is such a subfeed, though ``wait_msec`` was time
            enough for an answer (``KACHERY_OFFER_WAIT_SECONDS``): who was asked, and what they said.
        :raises FeedForked: the owner signed two histories; the messages before the fork can be read.
        :raises ChannelUnknown, NotPermitted: the node may not ask on that channel.
        :raises NodeNotRunning, ClientAuthRefused: there is no node to ask.
        """
        limit = checked_limit(max_num_messages)
        position = begun = self._position
        end = time.monotonic() + wait_msec / 1000 if isinstance(wait_msec, int | float) else 0.0
        found: list[dict[str, Any]] = []
        left_msec, total = wait_msec, 0
        while limit is None or len(found) < limit:
            try:
                batch = self._read(position, left_msec, None if limit is None else limit - len(found), signed)
            except KacheryError:
                if not found:
                    raise
                break  # the next call meets it again
            if not found:
                self._check_empty(batch, wait_msec)
            found += batch.messages
            position = batch.position
            total = max(total, batch.total)  # of all that the owner has told of, not only of what has come by now
            if not batch.messages or position >= total:
                break
            left_msec = max(0.0, 1000 * (end - time.monotonic()))
        if advance_position:
            self._position = begun + len(found)
        return found

    def get_next_message(self, *, wait_msec: float = 10, signed: bool = False, advance_position: bool = True,
                         ) -> dict[str, Any] | None:
        """Return the next message, or None when there is none within ``wait_msec``; see ``get_next_messages``."""
        found = self.get_next_messages(wait_msec=wait_msec, signed=signed, max_num_messages=1,
                                       advance_position=advance_position)
        return found[0] if found else None

    def message_stream(self, *, signed: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the messages from ``position`` on as they come, for ever; those of a snapshot until its end.

        The position is that after the message yielded last. While the node starts again the stream waits for it, up to
        ``KACHERY_PATIENCE_SECONDS``; nothing is yielded twice or left out.

        :raises KacheryError: as ``get_next_messages``, but for what nobody knows of yet: that is waited for, with a
            warning in the log.
        """
        pauses = Pauses(self._settings.patience_seconds)
        while True:
            try:
                batch = self._read(self._position, _STREAM_WAIT_MSEC, None, signed)
            except PASSING_ERRORS as error:
                time.sleep(pauses.after(error))
                continue
            pauses.answered()
            self._warn_waiting(batch)
            if not batch.messages and self.is_snapshot:
                return
            yield from self._advancing(batch)

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Do as ``message_stream``, for ``async for``; cancelling it takes the question back at once."""
        pauses = Pauses(self._settings.patience_seconds)
        while True:
            try:
                batch = await _in_thread(lambda withdrawal: self._read(self._position, _STREAM_WAIT_MSEC, None, False,
                                                                       withdrawal))
            except PASSING_ERRORS as error:
                await asyncio.sleep(pauses.after(error))
                continue
            pauses.answered()
            self._warn_waiting(batch)
            if not batch.messages and self.is_snapshot:
                return
            for message in self._advancing(batch):
                yield message

    def read_page(self, *, wait_msec: float = 0, signed: bool = False, max_num_messages: int | None = None) -> Batch:
        """Return messages from ``position`` on, as many as come in one answer of the node. The position stays."""
        return self._read(self._position, wait_msec, max_num_messages, signed)

    def _advancing(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """Yield the messages of a batch, the position always behind them, until somebody else moves that."""
        number = batch.position - len(batch.messages)
        for message in batch.messages:
            if self._position != number:
                return
            number += 1
            self._position = number
            yield message

    def _read(self, position: int, wait_msec: float, limit: int | None, signed: bool,
              withdrawal: Withdrawal | None = None) -> Batch:
        return self._source.read(self._name, self._channel, position, wait_msec=wait_msec, max_num_messages=limit,
                                 signed=signed, withdrawal=withdrawal)

    def missing_from(self, batch: Batch, wait_msec: float) -> SubfeedNotAvailable | None:
        """Return what an answer without messages, after that wait, would conceal: that nobody has answered for the
        subfeed, or that messages are known of which nobody brings. None when nothing is to be had."""
        there = batch.known and batch.total <= batch.position
        if there or batch.messages or self.is_snapshot or self._channel == LOCAL:
            return None
        within = f"within {wait_msec / 1000:g} s"
        return SubfeedNotAvailable(
            uri=self.uri, channel=self._channel or "the node's own", tried=batch.why,
            why=f"its messages from number {batch.position} to {batch.total - 1} are known of, and none came {within}"
            if batch.known else f"nobody answered for it {within}")

    def _check_empty(self, batch: Batch, wait_msec: float) -> None:
        """Let nobody take for an empty subfeed what does not exist, or cannot be reached, if there was time to say so.

        What is known of may still be on its way, so of that there is but a warning.
        """
        if wait_msec >= 1000 * self._settings.offer_wait_seconds:
            missing = self.missing_from(batch, wait_msec)
            if missing is not None and not batch.known:
                raise missing
            self._warn_waiting(batch)

    def _warn_waiting(self, batch: Batch) -> None:
        """Say once, to who may wait for ever, that nobody has answered, or brings what is known of."""
        if self._warned or self.missing_from(batch, 0) is None:
            return
        self._warned = True
        why = "nobody on the channel has answered for it yet"
        if batch.known:
            why = f"nobody has brought its messages from number {batch.position} to {batch.total - 1} yet"
        logger.warning("%s is waited for: %s. Tried: %s", self.uri, why, batch.why)

    def __repr__(self) -> str:
        return f"Subfeed({self.uri!r}, position={self._position})"


def checked_limit(max_num_messages: int | None) -> int | None:
    """Return a limit on messages, None for all. :raises InvalidArgument: it is not a count."""
    if max_num_messages is None or (isinstance(max_num_messages, int) and max_num_messages >= 0):
        return max_num_messages or None
    raise InvalidArgument(what=f"max_num_messages is a count, or None for all, not {max_num_messages!r}.")


async def _in_thread(call: Callable[[Withdrawal], Result]) -> Result:
    """Run ``call`` in a thread of its own, which the threads that others wait in cannot hold up."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()
    withdrawal = Withdrawal()

    def run() -> None:
        try:
            result = call(withdrawal)
        except BaseException as error:
            tell(done.set_exception, error)
        else:
            tell(done.set_result, result)

    def tell(settle: Callable[[Any], None], value: Any) -> None:
        with suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(lambda: None if done.done() else settle(value))

    threading.Thread(target=run, name="kachery-fast feed", daemon=True).start()
    try:
        return await done
    except asyncio.CancelledError:
        withdrawal.withdraw()
        raise
