"""The rules of a feed: signed messages in a chain, and heads. (``feed_segments``: the objects that carry them.)

A feed is known by the Ed25519 public key of its owner, a subfeed by the SHA-1 of its name. A *signed message* is

    {"body": {"message": {…}, "messageNumber": 3, "previousSignature": "…", "subfeed": "…", "timestamp": 1795175653433,
     "version": 2}, "signature": "…"}

whose signature is over the canonical JSON of the body. Number, time and the signature of the message before it (none
for number 0) are inside, so messages can be neither reordered nor left out; the subfeed is inside, so that none can be
moved to another one. The messages of 2022 (WIRE-2022.md §4: no ``version`` and ``subfeed``, perhaps ``metaData``) are
signed over the SHA-1 of it and are read where no message of ours stands before them. A *head* is the owner's word on
how long a subfeed was at a time. Whoever sends these, only the feed's key can have made them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..errors import BadMessage, FeedChainBroken, FeedInvalid, HeadInvalid, InvalidArgument, KacheryError, TooLarge
from . import plain_json
from .canonical import canonical_bytes
from .feed_segments import SEGMENT_SIZE_BYTES_MAX
from .signing import sign, verify

__all__ = [
    "NESTING_MAX", "Extension", "Fork", "Head", "Tail", "extend", "payload", "read_head", "sign_head", "sign_messages",
    "signature_of", "tail_after",
]

VERSION = 2
HEAD_VERSION = 1
# More than a signed message is longer than its content: two signatures, a subfeed, numbers and keys.
_SIGNED_OVERHEAD_BYTES = 1024

# Objects and lists within each other in a message. Some Pythons read 20,000, others less than 1000 with their own calls
# counted: what one node signs every other one must be able to read.
NESTING_MAX = 200

_TIME_MS_MAX = 2**53
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
# The end of a canonical signed message: the signature, a quotation mark and a brace.
_SIGNATURE_AT = slice(-130, -2)
_KEYS = frozenset({"message", "messageNumber", "subfeed", "timestamp", "version"})
_KEYS_2022 = frozenset({"message", "messageNumber", "timestamp"})
_HEAD_KEYS = frozenset({"type", "version", "feedId", "subfeed", "count", "lastSignature", "timestamp"})
_LONG_NUMBER = re.compile(rb"[0-9]{16}")
_EXACT_INTEGER_MAX = 2**53 - 1


@dataclass(frozen=True)
class Tail:
    """Where a chain ends: ``count`` messages, the last one's signature (empty for none).

    ``version`` is 2 once a message of ours stands in the chain; until then 0, and messages of 2022 may follow.
    """

    feed_id: str
    subfeed: str
    count: int = 0
    signature: str = ""
    version: int = 0


@dataclass(frozen=True)
class Head:
    """The owner's word: ``count`` messages at ``time_ms``, the last with this ``signature``; ``signed`` is what to
    pass on."""

    count: int
    signature: str
    time_ms: int
    signed: dict[str, Any]


@dataclass(frozen=True)
class Extension:
    """What a batch added: its new messages (canonical, signed), the tail after them, and why it went no further."""

    new: list[bytes]
    tail: Tail
    error: KacheryError | None = None


@dataclass(frozen=True)
class Fork:
    """The owner signed two messages of one number: ``first`` is held, ``second`` came. Both are canonical and signed.

    ``extension`` is what was good before it in the same batch; from ``number`` on nothing can be believed.
    """

    number: int
    first: bytes
    second: bytes
    extension: Extension


# --- messages


def sign_messages(tail: Tail, messages: Sequence[dict[str, Any]], key: Ed25519PrivateKey, time_ms: int,
                  ) -> tuple[list[bytes], Tail]:
    """Sign messages to follow ``tail``.

    :param messages: JSON objects.
    :param key: the feed's key.
    :param time_ms: milliseconds since the epoch.
    :returns: the signed messages as canonical JSON, and the tail after them.
    :raises InvalidArgument: a message is not a JSON object, is nested more than ``NESTING_MAX`` deep, or holds an
        integer beyond 2^53 - 1, which the numbers of JSON cannot hold exactly; nothing was signed then.
    :raises TooLarge: a message is longer than any segment may be.
    """
    contents = [_content(message, index) for index, message in enumerate(messages)]
    signed: list[bytes] = []
    previous = tail.signature
    for number, content in enumerate(contents, tail.count):
        body = _body(content, number, previous, tail.subfeed, time_ms)
        previous = key.sign(body).hex()
        signed.append(_join(body, previous))
    if not signed:
        return [], tail
    return signed, Tail(tail.feed_id, tail.subfeed, tail.count + len(signed), previous, VERSION)


def extend(tail: Tail, first: int, messages: Sequence[object], known: Callable[[int], bytes | None],
           ) -> Extension | Fork:
    """Check messages ``first``, ``first`` + 1, … that somebody sent, against a chain that is held up to ``tail``.

    Messages that are held already are passed over. What is good before the first bad message is kept; the error then
    says what was wrong: a ``FeedInvalid`` (no message, a wrong signature, another number or subfeed, a gap, a message
    of 2022 after one of ours), a ``FeedChainBroken`` (signed by the owner, and does not follow the one before it).

    A message of 2022 does not name its subfeed, so that a liar could show one of another subfeed: it is evidence of a
    fork only where it follows the message that is held before it.

    :param messages: decoded JSON, whatever it is.
    :param known: returns the held message of a number below the tail's count, as canonical bytes; None where it is not
        at hand, which leaves that number unchecked.
    """
    new: list[bytes] = []
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(tail.feed_id))
    except ValueError:
        return Extension(new, tail, _refused(tail, 0, "its feed's id is no public key"))
    for number, item in enumerate(messages, first):
        if not 0 <= number <= tail.count:
            why = f"it is missing; what came begins with number {number}"
            return Extension(new, tail, _refused(tail, tail.count, why))
        held = known(number) if number < tail.count else None
        if number < tail.count and (held is None or _is_signed_as(item, held)):
            continue
        try:
            signed = _read(item, number, tail.subfeed, key)
        except BadMessage as error:
            return Extension(new, tail, _refused(tail, number, str(error.details["why"])))
        if held is not None:
            return _diverging(tail, signed, held, known, new)
        if signed.version < tail.version:
            return Extension(new, tail, _refused(tail, number, "it has the form of 2022, and follows a newer one"))
        if signed.previous != tail.signature:
            return Extension(new, tail, FeedChainBroken(number=number, feed_id=tail.feed_id, subfeed=tail.subfeed))
        new.append(signed.encode())
        tail = Tail(tail.feed_id, tail.subfeed, number + 1, signed.signature, max(tail.version, signed.version))
    return Extension(new, tail)


def payload(signed: bytes | dict[str, Any]) -> dict[str, Any]:
    """Return the message inside a signed message that was verified before."""
    plain = plain_json.decode(signed) if isinstance(signed, bytes) else signed
    message: dict[str, Any] = plain["body"]["message"]
    return message


def signature_of(signed: bytes) -> str:
    """Return the signature of a canonical signed message."""
    return signed[_SIGNATURE_AT].decode("ascii")


def tail_after(feed_id: str, subfeed: str, signed: bytes) -> Tail:
    """Return the tail of a chain whose last message is ``signed``, which was verified before."""
    body = plain_json.decode(signed)["body"]
    return Tail(feed_id, subfeed, body["messageNumber"] + 1, signature_of(signed), body.get("version", 0))


class _Signed(NamedTuple):
    """A message whose signature holds."""

    previous: str
    version: int
    body: bytes
    signature: str

    def encode(self) -> bytes:
        return _join(self.body, self.signature)


def _read(item: object, number: int, subfeed: str, key: Ed25519PublicKey) -> _Signed:
    if not isinstance(item, dict) or item.keys() != {"body", "signature"} or not isinstance(item["body"], dict):
        raise BadMessage(why="it is not a signed message")
    body, signature = item["body"], item["signature"]
    # In one spelling alone: else a relay could make two different messages of one.
    if not isinstance(signature, str) or _SIGNATURE.fullmatch(signature) is None:
        raise BadMessage(why="its signature is malformed")
    _check(body, number)
    previous = body.get("previousSignature", "")
    version = body.get("version", 0)
    if "version" in body:
        if type(version) is not int or version != VERSION:
            raise BadMessage(why=f"its version is {str(version)[:20]!r}, and this program knows {VERSION}")
        if body["subfeed"] != subfeed:
            raise BadMessage(why="it belongs to another subfeed")
        data = _body(canonical_bytes(body["message"]), number, previous, subfeed, body["timestamp"])
        forms = [data]
    else:
        data = canonical_bytes(body)
        forms = [hashlib.sha1(data, usedforsecurity=False).digest(), data]
    if _is_deeper(body, data, NESTING_MAX + 1):
        raise BadMessage(why=f"it is nested more than {NESTING_MAX} deep")
    if not any(_holds(key, signature, form) for form in forms):
        raise BadMessage(why="the feed's key did not sign it")
    return _Signed(previous, version, data, signature)


def _check(body: dict[str, Any], number: int) -> None:
    required, optional = (_KEYS, {"previousSignature"}) if "version" in body else (
        _KEYS_2022, {"previousSignature", "metaData"})
    if not required <= body.keys() <= required | optional:
        raise BadMessage(why="it lacks a field, or has one that it should not have")
    if not isinstance(body["message"], dict) or not isinstance(body.get("metaData", {}), dict):
        raise BadMessage(why="its content is not a JSON object")
    if type(body["messageNumber"]) is not int or body["messageNumber"] != number:
        raise BadMessage(why=f"it says that it is number {str(body['messageNumber'])[:20]}")
    if type(body["timestamp"]) is not int or not 0 <= body["timestamp"] < _TIME_MS_MAX:
        raise BadMessage(why="its time is no time")
    if ("previousSignature" in body) != (number > 0):
        raise BadMessage(why="the first message, and no other, has none before it")
    previous = body.get("previousSignature")
    if number and (not isinstance(previous, str) or _SIGNATURE.fullmatch(previous) is None):
        raise BadMessage(why="the signature of the one before it is malformed")


def _diverging(tail: Tail, other: _Signed, held: bytes, known: Callable[[int], bytes | None], new: list[bytes],
               ) -> Extension | Fork:
    number = int(plain_json.decode(held)["body"]["messageNumber"])
    if other.version < VERSION:
        before = known(number - 1) if number else None
        if before is None or signature_of(before) != other.previous:
            why = "it has the form of 2022, differs from the one that is held, and may be of another subfeed"
            return Extension(new, tail, _refused(tail, number, why))
    return Fork(number, held, other.encode(), Extension(new, tail))


def _is_signed_as(item: object, held: bytes) -> bool:
    # The held message was verified, so one with its signature is the same or a forgery, and neither is news.
    return isinstance(item, dict) and item.get("signature") == signature_of(held)


def _content(message: object, index: int) -> bytes:
    if not isinstance(message, dict):
        raise InvalidArgument(what=f"Message {index} of the batch is not a JSON object (a dict).")
    try:
        data = canonical_bytes(message)
    except BadMessage as error:
        raise InvalidArgument(what=f"Message {index} of the batch: {error.details['why']}.") from None
    if _is_deeper(message, data, NESTING_MAX):
        raise InvalidArgument(what=f"Message {index} of the batch is nested more than {NESTING_MAX} deep.")
    if _LONG_NUMBER.search(data) and _has_inexact(message):
        raise InvalidArgument(what=f"Message {index} of the batch holds an integer beyond 2^53 - 1, which JSON does "
                                   "not keep exactly; write it as a text, or as a float where that will do.")
    if len(data) > SEGMENT_SIZE_BYTES_MAX - _SIGNED_OVERHEAD_BYTES:
        raise TooLarge(what=f"Message {index} of the batch", size=len(data), setting="the longest segment",
                       limit=SEGMENT_SIZE_BYTES_MAX - _SIGNED_OVERHEAD_BYTES)
    return data


def _has_inexact(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_inexact, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_inexact, value))
    return isinstance(value, int) and abs(value) > _EXACT_INTEGER_MAX


def _is_deeper(value: Any, data: bytes, limit: int) -> bool:
    """Whether more than ``limit`` objects and lists lie within each other; ``data``: the value as JSON."""
    if data.count(b"{") + data.count(b"[") <= limit:
        return False
    level = [value]
    for _ in range(limit):
        level = [item for part in level if isinstance(part, (dict, list, tuple))
                 for item in (part.values() if isinstance(part, dict) else part)]
    return any(isinstance(part, (dict, list, tuple)) for part in level)


def _body(content: bytes, number: int, previous: str, subfeed: str, time_ms: int) -> bytes:
    # The canonical JSON of the body, whose keys are in order and whose values have one form each.
    chain = f',"previousSignature":"{previous}"' if number else ""
    return b'{"message":%b,"messageNumber":%d%b,"subfeed":"%b","timestamp":%d,"version":%d}' % (
        content, number, chain.encode("ascii"), subfeed.encode("ascii"), time_ms, VERSION)


def _join(body: bytes, signature: str) -> bytes:
    return b'{"body":%b,"signature":"%b"}' % (body, signature.encode("ascii"))


def _holds(key: Ed25519PublicKey, signature: str, data: bytes) -> bool:
    try:
        key.verify(bytes.fromhex(signature), data)
    except InvalidSignature:
        return False
    return True


def _refused(tail: Tail, number: int, why: str) -> FeedInvalid:
    return FeedInvalid(number=number, feed_id=tail.feed_id, subfeed=tail.subfeed, why=why)


# --- heads


def sign_head(tail: Tail, key: Ed25519PrivateKey, time_ms: int) -> dict[str, Any]:
    """Return the owner's signed word that the subfeed ends at ``tail``; ``time_ms``: milliseconds since the epoch."""
    body = {"type": "feedHead", "version": HEAD_VERSION, "feedId": tail.feed_id, "subfeed": tail.subfeed,
            "count": tail.count, "lastSignature": tail.signature, "timestamp": time_ms}
    return {"body": body, "signature": sign(body, key)}


def read_head(head: object, feed_id: str, subfeed: str) -> Head:
    """Check a head that somebody sent.

    :param head: decoded JSON, whatever it is.
    :raises HeadInvalid: it is not one of this subfeed, signed by the feed's key.
    """
    def invalid(why: str) -> HeadInvalid:
        return HeadInvalid(feed_id=feed_id, subfeed=subfeed, why=why)

    if not isinstance(head, dict) or head.keys() != {"body", "signature"} or not isinstance(head["body"], dict):
        raise invalid("it is not a signed head")
    body, signature = head["body"], head["signature"]
    if (body.keys() != _HEAD_KEYS or body["type"] != "feedHead" or type(body["version"]) is not int
            or body["version"] != HEAD_VERSION):
        raise invalid("it is not a head that this program knows")
    count, last, time_ms = body["count"], body["lastSignature"], body["timestamp"]
    if (body["feedId"], body["subfeed"]) != (feed_id, subfeed):
        raise invalid("it is that of another subfeed")
    if any(type(number) is not int or not 0 <= number < _TIME_MS_MAX for number in (count, time_ms)):
        raise invalid("its count or time is none")
    if not isinstance(last, str) or (_SIGNATURE.fullmatch(last) is None if count else last):
        raise invalid("the signature of the last message is malformed")
    if not isinstance(signature, str) or not verify(body, signature, feed_id):
        raise invalid("the feed's key did not sign it")
    return Head(count, last, time_ms, head)
