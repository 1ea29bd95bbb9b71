"""Snapshots of feeds: what some subfeeds held at a time, as a JSON file that can be read anywhere and for ever.

    {"feedId": "…", "version": 2, "subfeeds": {"<hash>": {"subfeedHash": "<hash>", "name": "main",
     "messages": [{…}, …], "signatures": [{"timestamp": 1795175653433, "signature": "…", "version": 2}, …]}}}

The messages stand by themselves, as in the snapshots of 2022, so that kachery-client 1.2 reads ours too. Beside them
is what else belongs to each signed message and does not follow from its place (``protocol.feeds``): with it every
signature can be checked, by whoever reads the file. A snapshot of 2022 has no signatures, and is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import InvalidArgument, KacheryError, WrongFormat
from ..protocol.feeds import Extension, Fork, Tail, extend
from ..protocol.names import is_node_id, is_sha1, subfeed_hash

__all__ = ["Snapshot", "SnapshotSubfeed", "good_part", "make_snapshot", "read_snapshot", "unsigned"]

_VERSION = 2
_SIGNATURE_KEYS = ("timestamp", "signature", "version", "metaData")


class SnapshotSubfeed(NamedTuple):
    """What a snapshot holds of a subfeed: its name (None: only the hash is known), messages in order, and the same
    messages signed (None: a snapshot of 2022, which has no signatures)."""

    subfeed: str
    name: Any
    messages: list[dict[str, Any]]
    signed: list[dict[str, Any]] | None


class Snapshot(NamedTuple):
    """A snapshot: the feed's id (None in those of 2022) and its subfeeds by their hash."""

    feed_id: str | None
    subfeeds: dict[str, SnapshotSubfeed]


def make_snapshot(feed_id: str, subfeeds: Iterable[tuple[Any, str, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
    """Return the document of a snapshot.

    :param subfeeds: name (None: unknown), hash, and all signed messages from number 0 on of each.
    """
    found: dict[str, Any] = {}
    for name, subfeed, signed in subfeeds:
        rows = []
        for item in signed:
            row = {"timestamp": item["body"]["timestamp"], "signature": item["signature"]}
            rows.append(row | {key: item["body"][key] for key in ("version", "metaData") if key in item["body"]})
        found[subfeed] = {"subfeedHash": subfeed, **({} if name is None else {"name": name}),
                          "messages": [item["body"]["message"] for item in signed], "signatures": rows}
    return {"feedId": feed_id, "version": _VERSION, "subfeeds": found}


def read_snapshot(document: Any, what: str, *, check_signatures: bool = True) -> Snapshot:
    """Check a document, every signature in it included, and return what it holds.

    :param what: what errors call it, its URI or path. :param check_signatures: False leaves these to the caller.
    :raises WrongFormat: it is not a snapshot.
    :raises FeedInvalid, FeedChainBroken: a message in it is not the feed's, or not in its place.
    """
    def wrong(why: str) -> WrongFormat:
        return WrongFormat(what=what, format="a snapshot of a feed", why=why)

    if not isinstance(document, dict) or not isinstance(document.get("subfeeds"), dict):
        raise wrong("it is not an object with subfeeds")
    feed_id = document.get("feedId")
    if feed_id is not None and not is_node_id(feed_id):
        raise wrong("its feedId is not 64 hex digits")
    if document.get("version", _VERSION if feed_id else None) not in (None, _VERSION):
        raise wrong(f"its version is {str(document.get('version'))[:20]}, and this program knows {_VERSION}")
    found = {}
    for subfeed, content in document["subfeeds"].items():
        if not is_sha1(subfeed) or not isinstance(content, dict) or not isinstance(content.get("messages"), list):
            raise wrong(f"its subfeed {subfeed[:50]!r} has no messages, or is not known by a hash")
        name = content.get("name")
        if name is not None and _hash_or_none(name) != subfeed:
            raise wrong(f"its subfeed {subfeed} has the name of another")
        messages = content["messages"]
        if not all(isinstance(message, dict) for message in messages):
            raise wrong(f"a message of its subfeed {subfeed} is not an object")
        signed = None
        if feed_id is not None:
            signed = _signed(messages, content.get("signatures"), subfeed)
            if signed is None:
                raise wrong(f"its subfeed {subfeed} has not a signature for each message")
            error = good_part(Tail(feed_id, subfeed), signed).error if check_signatures else None
            if error is not None:
                raise error
        found[subfeed] = SnapshotSubfeed(subfeed, name, messages, signed)
    return Snapshot(feed_id, found)


def good_part(tail: Tail, signed: Sequence[Any]) -> Extension:
    """Check signed messages, one by one, against the chain that ends at ``tail``, until one is wrong.

    :return: with ``error`` FeedInvalid or FeedChainBroken for the first that is not the feed's, or not in its place.
    """
    found = extend(tail, tail.count, signed, lambda _: None)
    if isinstance(found, Fork):
        raise AssertionError("nothing is held that a message could differ from")
    return found


def unsigned(what: str) -> InvalidArgument:
    """Return the error for asking a snapshot of 2022 for signed messages."""
    return InvalidArgument(what=f"{what} is a snapshot of 2022, which holds no signatures.")


def _signed(messages: list[dict[str, Any]], rows: Any, subfeed: str) -> list[dict[str, Any]] | None:
    """Put the signed messages together again; None: there is not what they need."""
    if not isinstance(rows, list) or len(rows) != len(messages):
        return None
    signed = []
    previous = None
    for number, (message, row) in enumerate(zip(messages, rows, strict=True)):
        if not isinstance(row, dict) or not {"timestamp", "signature"} <= row.keys() <= set(_SIGNATURE_KEYS):
            return None
        body = {"message": message, "messageNumber": number, "timestamp": row["timestamp"]}
        body |= {key: row[key] for key in ("version", "metaData") if key in row}
        body |= {"previousSignature": previous} if number else {}
        body |= {"subfeed": subfeed} if "version" in row else {}
        previous = row["signature"]
        signed.append({"body": body, "signature": previous})
    return signed


def _hash_or_none(name: Any) -> str | None:
    try:
        return subfeed_hash(name)
    except KacheryError:
        return None
