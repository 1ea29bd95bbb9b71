"""The messages of the feed commands: those to append as they are given, those of subfeeds as they come."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from ..errors import InvalidArgument, SubfeedNotAvailable

if TYPE_CHECKING:
    from io import BufferedReader

    from ..client.subfeeds import Subfeed

__all__ = ["batches", "follow", "read_on"]

# Lines of the standard input that are appended together.
_BATCH_MESSAGES = 1000
_READ_SIZE_BYTES = 1024 * 1024
_WATCH_WAIT_MSEC = 5000
# An owner that is there tells of news well within this; a copy of an owner that is gone stays as it is.
_QUIET_MSEC = 1000


def batches(messages: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages to append, those that go together: the arguments, else the lines of the standard input."""
    if messages:
        yield [_message(text, f"Message {number}") for number, text in enumerate(messages, 1)]
        return
    number = 0
    for lines in _lines_at_hand(cast("BufferedReader", sys.stdin.buffer)):
        batch = []
        for line in lines:
            number += 1
            if line.strip():
                batch.append(_message(line, f"Line {number}"))
        if batch:
            yield batch


def _lines_at_hand(file: BufferedReader) -> Iterator[list[bytes]]:
    """Yield the lines of a file or pipe, those together that are there already: a slow writer's lines do not wait."""
    rest = b""
    while data := file.read1(_READ_SIZE_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        for start in range(0, len(lines), _BATCH_MESSAGES):
            yield lines[start:start + _BATCH_MESSAGES]
    if rest:
        yield [rest]


def _message(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(what=f"{what} is not JSON ({error}). Nothing of its batch was appended.") from None
    if not isinstance(found, dict):
        raise InvalidArgument(what=f"{what} is not a JSON object like {{\"spikes\": 3}}. Nothing of its batch was "
                                   "appended.")
    return found


def read_on(target: Subfeed, wait_msec: float, limit: int | None, signed: bool,
            ) -> tuple[list[dict[str, Any]], SubfeedNotAvailable | None]:
    """Return what there is now; of another node's feed also what is not here yet, as it comes without a pause. And what
    is the matter with messages that did not come, though there was time."""
    from ..config import load_settings

    changes = not (target.is_writeable or target.is_snapshot)
    patient = changes and wait_msec >= 1000 * load_settings().offer_wait_seconds
    found: list[dict[str, Any]] = []
    missing: SubfeedNotAvailable | None = None
    pause_msec = wait_msec
    while limit is None or len(found) < limit:
        page = target.read_page(wait_msec=pause_msec if changes else 0, signed=signed,
                                max_num_messages=None if limit is None else limit - len(found))
        if page.messages:
            found += page.messages
            target.position = page.position
            missing, pause_msec = None, min(wait_msec, _QUIET_MSEC)
            continue
        was_missing, missing = missing, target.missing_from(page, wait_msec) if patient else None
        if missing is None or was_missing is not None or not page.known:
            break
        pause_msec = wait_msec  # what is known of by now has the whole wait to come
    return found, missing


def follow(targets: list[Subfeed], signed: bool) -> Iterator[tuple[Subfeed, int, dict[str, Any]]]:
    """Yield subfeed, number and message, as they come."""
    from ..client.feed_sources import PASSING_ERRORS, Pauses
    from ..client.feeds import watch_for_new_messages
    from ..config import load_settings

    if len(targets) == 1:
        [target] = targets
        for message in target.message_stream(signed=signed):
            yield target, target.position - 1, message
        return
    by_name = {str(number): target for number, target in enumerate(targets)}
    pauses = Pauses(load_settings().patience_seconds)
    while True:
        begun = {name: target.position for name, target in by_name.items()}
        try:
            found = watch_for_new_messages(by_name, wait_msec=_WATCH_WAIT_MSEC, signed=signed)
        except PASSING_ERRORS as error:
            time.sleep(pauses.after(error))
            continue
        pauses.answered()
        for name, messages in found.items():
            for number, message in enumerate(messages, begun[name]):
                yield by_name[name], number, message
