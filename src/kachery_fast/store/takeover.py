"""Taking over the mutables and feeds of a directory of 2022 into this program's own databases.

The old files are only read (``legacy``). Nothing that is here already is replaced, so a take-over that was broken off
is simply done again. Private keys of feeds, which 2022 kept among the mutables, go into the feed log and nowhere else.
Codes that were admitted at another daemon are not taken: who admitted them there let nobody in here.

A key is taken only where all messages of its feed were: whoever appends to a part of a feed signs a second history,
and nobody can believe such a feed any more.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec

from ..errors import InvalidName, TooLarge
from ..protocol import feeds as rules
from ..protocol import plain_json
from ..protocol.names import check_feed_id, check_sha1
from ..protocol.signing import private_key, public_id
from .feeds import FeedLog
from .legacy import FEEDS_NAME, MUTABLES_NAME, WORK_PREFIX, OldDatabase, fingerprint_of_files
from .mutables import ADMITTED_KEY, MutableStore
from .takeover_marker import refused_before, write_marker
from .tally import Tally

__all__ = ["PROGRESS_TEXT", "take_over", "take_over_in_place"]

log = logging.getLogger("kachery_fast.store")

# Mutables that are written together.
_BATCH_MUTABLES_MAX = 4000
# Messages that are checked and written together.
_BATCH_MESSAGES_MAX = 500
_BATCH_SIZE_BYTES_MAX = 4 * 1024 * 1024

# The log says that often how far it is, in lines with this text, for which a start in the background waits.
PROGRESS_TEXT = "taking over from 2022"
_PROGRESS_SECONDS = 5.0

_READ_ONLY = "Feeds are kept as far as they verify, and those that were not writable here before are read-only"
_NOT_ADMITTED = ("the codes in it let clients in at another daemon, and let nobody in here. Admit codes anew by: "
                 f"kachery-fast mutable set --parse '\"{ADMITTED_KEY}\"' '[\"A-LONG-RANDOM-CODE\"]'")


class _FeedRows:
    """What the mutables of 2022 say of feeds: seeds by feed id, and (name, feed id)."""

    def __init__(self) -> None:
        self.seeds: dict[str, bytes] = {}
        self.names: list[tuple[str, str]] = []


class _Progress:
    """Says in the log how far a take-over is, so that who waits for the start of a node sees that it goes on."""

    def __init__(self, tally: Tally, check: Callable[[], None]) -> None:
        self._tally = tally
        self._check = check
        self._due = time.monotonic() + _PROGRESS_SECONDS

    def tick(self) -> None:
        """Note that something was done; raises what the check raises."""
        self._check()
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _PROGRESS_SECONDS
            counts = (self._tally.mutables, self._tally.messages)
            log.info("%s: so far %d mutables, %d messages", PROGRESS_TEXT, *(
                count.taken + count.here for count in counts))


def take_over_in_place(root: Path, *, mutable_size_bytes_max: int, message_size_bytes_max: int,
                       check: Callable[[], None] = lambda: None) -> Tally | None:
    """Take over what the daemon of 2022 left in a storage directory, if there is news; for the start of a node, before
    the feed log is opened. Logs how far it is, what was done, and what is wrong with the old files at every start.

    :param check: called now and then; what it raises ends the take-over, and the next start goes on with it.
    :returns: None when nothing of the old files has changed since the last time, or there are none.
    :raises DiskFull, DiskError, DatabaseUnusable: this program's own databases cannot be written; the next start tries
        again.
    """
    for left in root.glob(f"{WORK_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    found = fingerprint_of_files(root / MUTABLES_NAME, root / FEEDS_NAME)
    if not any(found):
        return None
    refused = refused_before(root, found, mutable_size_bytes_max)
    if refused is not None:
        _log_refused(refused)
        return None
    log.info("the mutables and feeds of 2022 in %s are taken over; every signature is checked", root)
    tally = Tally()
    take_over(root, root, mutable_size_bytes_max=mutable_size_bytes_max, message_size_bytes_max=message_size_bytes_max,
              tally=tally, tick=_Progress(tally, check).tick)
    if not tally.unread:  # else the next start tries again
        write_marker(root, found, tally)
    log.info("taken over from 2022: %d mutables, %d feeds, %d messages; already here: %d, %d, %d; refused: %d",
             tally.mutables.taken, tally.feeds.taken, tally.messages.taken, tally.mutables.here, tally.feeds.here,
             tally.messages.here, len(tally.refused))
    _log_refused(tally.refused)
    return tally


def take_over(source: Path, root: Path, *, mutable_size_bytes_max: int, message_size_bytes_max: int,
              with_feeds: bool = True, tally: Tally | None = None, tick: Callable[[], None] = lambda: None) -> Tally:
    """Take over ``mutables.db`` and ``feeds.db`` of ``source`` into the databases of ``root``.

    :param with_feeds: nobody else has the feed log of ``root`` open; without, feeds and their keys are refused.
    :param tally: where to count; it is returned.
    :param tick: called now and then, while something goes on.
    :raises DiskFull, DiskError, DatabaseUnusable: the databases of ``root`` cannot be written.
    """
    tally = Tally() if tally is None else tally
    found = _take_mutables(OldDatabase(source / MUTABLES_NAME, root, tick), root, mutable_size_bytes_max, tally, tick)
    if not with_feeds:
        if found.seeds or (source / FEEDS_NAME).exists():
            tally.refuse(str(source / FEEDS_NAME), f"the feeds, and the keys of {len(found.seeds)} of them, were not "
                         "taken: the node of this machine runs, and has its feeds in use. Stop it with: kachery-fast "
                         "node stop, and import again")
        return tally
    with OldDatabase(source / FEEDS_NAME, root, tick) as old:
        if old.exists or found.seeds:
            _take_feeds(old, root, found, message_size_bytes_max, tally, tick)
    return tally


# --- mutables


def _take_mutables(old: OldDatabase, root: Path, size_bytes_max: int, tally: Tally,
                   tick: Callable[[], None]) -> _FeedRows:
    feeds = _FeedRows()
    with ExitStack() as stack:
        stack.enter_context(old)
        store: MutableStore | None = None
        for pairs in _batches_of_mutables(old, feeds, tally):
            if store is None:
                store = stack.enter_context(MutableStore(root, value_size_bytes_max=size_bytes_max))
            _add_mutables(store, pairs, str(old), tally)
            tick()
    if old.problem:
        tally.unread = tally.unread or old.temporary
        advice = ("What could be read of it was taken. Once it can be read, try again" if old.temporary else
                  "What could be read of it was taken; it is left as it is. Restore it from a backup, and try again")
        tally.refuse(str(old), f"{old.problem}. {advice}")
    return feeds


def _batches_of_mutables(old: OldDatabase, feeds: _FeedRows, tally: Tally) -> Iterator[list[tuple[Any, Any]]]:
    pairs: list[tuple[Any, Any]] = []
    size_bytes = 0
    for raw_key, raw_value in old.rows("SELECT key, value FROM mutables"):
        try:
            key, value = _json(raw_key), _json(raw_value)
            if key == ADMITTED_KEY:
                if value:
                    tally.refuse(f"the mutable {ADMITTED_KEY} of {old}", _NOT_ADMITTED)
            elif not isinstance(key, dict) or not _is_of_feeds(key, value, feeds):
                pairs.append((key, value))
                size_bytes += len(raw_key) + len(raw_value)
        except (ValueError, RecursionError) as error:
            tally.refuse(f"a row of {old}", f"it is not as in 2022 ({error})")
        if len(pairs) == _BATCH_MUTABLES_MAX or size_bytes > _BATCH_SIZE_BYTES_MAX:
            yield pairs
            pairs, size_bytes = [], 0
    if pairs:
        yield pairs


def _add_mutables(store: MutableStore, pairs: list[tuple[Any, Any]], where: str, tally: Tally) -> None:
    added, refused = store.add(pairs)
    tally.mutables.taken += added
    tally.mutables.here += len(pairs) - added - len(refused)
    for refusal in refused:
        tally.refuse(f"a row of {where}", refusal.message)
        if isinstance(refusal, TooLarge) and refusal.details["setting"] == "mutable_size_bytes_max":
            tally.too_large_bytes = min(refusal.details["size"], tally.too_large_bytes or refusal.details["size"])


def _is_of_feeds(key: dict[str, Any], value: Any, feeds: _FeedRows) -> bool:
    """Note what a row says of feeds; whether it holds a private key, and must not become a mutable.

    :raises ValueError: its key is none.
    """
    kind = key.get("type")
    if kind == "feedConfig":
        feed_id, seed = key.get("feedId"), b""
        if isinstance(feed_id, str) and isinstance(value, dict) and value.get("feedId") == feed_id:
            try:
                seed = bytes.fromhex(str(value.get("privateKey")))
            except ValueError:
                seed = b""
        if len(seed) != 32 or public_id(private_key(seed)) != feed_id:
            raise ValueError(f"the private key of the feed {str(feed_id)[:64]} is not that feed's")
        feeds.seeds[feed_id] = seed
        return True
    name = {"feed_id_for_name": key.get("feed_name"), "feedIdForName": key.get("feedName")}.get(str(kind))
    if isinstance(name, str) and isinstance(value, str):
        with suppress(InvalidName):
            feeds.names.append((name, check_feed_id(value)))
    return False


def _json(data: object) -> Any:
    if not isinstance(data, bytes):
        raise ValueError("it is not JSON")
    return json.loads(data)


# --- feeds


def _take_feeds(old: OldDatabase, root: Path, found: _FeedRows, message_size_bytes_max: int, tally: Tally,
                tick: Callable[[], None]) -> None:
    feed_log = FeedLog(root, message_size_bytes_max=message_size_bytes_max)
    try:
        before = {info.feed_id: info.writable for info in feed_log.feeds()}
        places = _subfeeds(old, tally)
        broken = {feed_id for feed_id, subfeed in places
                  if not _take_subfeed(feed_log, old, feed_id, subfeed, tally, tick)}
        old.close()  # which notes when it was written to meanwhile
        whole = _is_whole(old, found, tally)
        seeds = {feed_id: seed for feed_id, seed in found.seeds.items() if whole and feed_id not in broken}
        for feed_id, error in feed_log.adopt(seeds, found.names):
            tally.refuse(f"the name of the feed {feed_id[:64]}", error.message)
        after = {info.feed_id: info.writable for info in feed_log.feeds()}
    finally:
        feed_log.close()
    news = {feed_id for feed_id, writable in after.items() if before.get(feed_id) != writable}
    tally.feeds.taken += len(news)
    of_2022 = {*found.seeds, *(feed_id for feed_id, _ in places)}
    tally.feeds.here += len((after.keys() & of_2022) - news)


def _is_whole(old: OldDatabase, found: _FeedRows, tally: Tally) -> bool:
    """Whether all of the old feeds could be read; what keeps them from it is refused."""
    if old.problem:
        tally.unread = tally.unread or old.temporary
        advice = ("Once it can be read, try again" if old.temporary else
                  "It is left as it is. Restore it from a backup and try again, or go on with new feeds")
        tally.refuse(str(old), f"{old.problem}. {_READ_ONLY}. {advice}")
    elif not old.exists:
        tally.refuse(str(old), f"it is missing, and mutables.db has the keys of {len(found.seeds)} feeds. "
                               f"{_READ_ONLY}. Put it back, and try again")
    return old.exists and not old.problem


def _subfeeds(old: OldDatabase, tally: Tally) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for feed_id, subfeed in old.rows("SELECT DISTINCT feedId, subfeedHash FROM subfeedMessages"):
        place = _text(feed_id), _text(subfeed)
        try:
            check_feed_id(place[0])
            check_sha1(place[1])
        except InvalidName as error:
            tally.refuse(f"a subfeed of {old}", error.message)
        else:
            found.append(place)
    return found


def _take_subfeed(feed_log: FeedLog, old: OldDatabase, feed_id: str, subfeed: str, tally: Tally,
                  tick: Callable[[], None]) -> bool:
    """Take the messages of a subfeed as far as they are true; whether that was all of them."""
    what = f"messages of feed://{feed_id}/~{subfeed} in {old}"
    if feed_log.owns(feed_id):
        differs_at = _second_history(feed_log, old, feed_id, subfeed)
        if differs_at is not None:
            tally.refuse(what, f"message {differs_at - 1} is not the one that this node has: the feed was appended to "
                               "by the daemon of 2022 after it was taken over. This node goes on with its own")
            return False
    count = 0
    for batch in _batches(old, feed_id, subfeed):
        if batch is None:
            tally.refuse(what, f"message {count} is missing. What is before it was taken; the feed is read-only here")
            return False
        done = feed_log.extend(feed_id, subfeed, count, batch)
        tick()
        tally.messages.taken += done.new_count
        if done.error is not None:
            tally.refuse(what, f"{done.error.message} What is before it was taken; the feed is read-only here unless "
                               "it was taken over before")
            return False
        tally.messages.here += len(batch) - done.new_count
        count += len(batch)
    return True


def _second_history(feed_log: FeedLog, old: OldDatabase, feed_id: str, subfeed: str) -> int | None:
    """Return how many messages were compared, when the last of them differs. Each is signed with the one before it."""
    count = feed_log.tail(feed_id, subfeed).count
    last = next(old.rows("SELECT position, message FROM subfeedMessages WHERE feedId = ? AND subfeedHash = ?"
                         " AND position < ? ORDER BY position DESC LIMIT 1", feed_id, subfeed, count), None)
    if last is None:
        return None
    held = feed_log.read(feed_id, subfeed, int(last[0]), 1, _BATCH_SIZE_BYTES_MAX)
    came = _message(last[1])
    same = isinstance(came, dict) and bool(held) and came.get("signature") == rules.signature_of(held[0])
    return None if same else int(last[0]) + 1


def _batches(old: OldDatabase, feed_id: str, subfeed: str) -> Iterator[list[Any] | None]:
    """Yield the messages of a subfeed from 0 on; at the end None, when one is missing in between."""
    batch: list[Any] = []
    size_bytes = 0
    found = old.rows("SELECT position, message FROM subfeedMessages WHERE feedId = ? AND subfeedHash = ?"
                     " ORDER BY position", feed_id, subfeed)
    for expected, (position, message) in enumerate(found):
        if position != expected:
            if batch:
                yield batch
            yield None
            return
        batch.append(_message(message))
        size_bytes += len(message) if isinstance(message, bytes) else 0
        if len(batch) == _BATCH_MESSAGES_MAX or size_bytes > _BATCH_SIZE_BYTES_MAX:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _message(data: object) -> Any:
    """Return a message as the rules read it; what is not JSON is None, which they refuse."""
    try:
        return plain_json.decode(data) if isinstance(data, bytes) else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _log_refused(refused: list[tuple[str, str]]) -> None:
    for what, why in refused:
        log.warning("of 2022, not taken over: %s: %s", what, why)
