"""Envelopes: how what nodes say on the bands, and ask of the hub, is signed, sent and read.

An envelope is ``{"body": {...}, "fromNodeId": <64 hex>, "signature": <128 hex>}`` (to a hub ``nodeId`` in place of
``fromNodeId``, as in 2022). The signature covers the canonical JSON of the body as it was received, unknown keys
included, so a newer node may add keys. Each body of ours carries channel, time and a random id; the two file messages
of 2022 carry none and are read for the sake of old nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import BadMessage, SignatureInvalid
from . import plain_json
from .bodies import (
    Assign,
    Cancel,
    Failed,
    Offer,
    Progress,
    Ready,
    RequestFile2022,
    UploadFileStatus2022,
    Want,
)
from .feed_bodies import FeedFailed, FeedMessages, FeedShared, FeedSubscribe
from .hub_bodies import FinishTask, HubBody, KeepTasks
from .names import is_node_id, is_sha1
from .signing import public_id, sign, sign_2022, verify, verify_2022
from .task_bodies import TASK_KINDS, TaskCancel, TaskDeclined, TaskRequest, TaskStatus

__all__ = [
    "BODIES_2022", "CHANNEL_CHANGED", "BandBody", "decode_band", "decode_hub_request", "encode_band",
    "encode_hub_request",
]

BandBody = (Want | Assign | Cancel | Offer | Ready | Progress | Failed | RequestFile2022 | UploadFileStatus2022
            | FeedSubscribe | FeedShared | FeedMessages | FeedFailed
            | TaskRequest | TaskCancel | TaskStatus | TaskDeclined)
# They carry no channel, time or id.
BODIES_2022 = (RequestFile2022, UploadFileStatus2022)

CHANNEL_CHANGED = b'{"messages":[],"channelChanged":true}'
"""What a hub says on the bands of a channel when there is news of it: who hears it asks the hub. It is not signed, as
nothing else follows from it, and that at most once a second; who does not know it hears no message."""

_Decoded = TypeVar("_Decoded")
_band_bodies = {kind.__struct_config__.tag: kind for kind in BandBody.__args__}
_hub_bodies = {kind.__struct_config__.tag: kind for kind in HubBody.__args__}
_TAGS_2022 = frozenset(kind.__struct_config__.tag for kind in BODIES_2022)
# Ours are 32 digits each; a longer one would be remembered at the cost of the receiver.
_ID_LENGTH_MAX = 64
_TIME_MS_MAX = 2**53
_FUNCTION_LENGTH_MAX = 200
_COUNT_MAX = 2**53


def encode_band(bodies: list[BandBody], key: Ed25519PrivateKey) -> bytes:
    """Sign each body and return one pub/sub payload, ``{"messages": [envelope, …]}``."""
    signer = public_id(key)
    envelopes = []
    for body in bodies:
        plain = msgspec.to_builtins(body)
        signature = sign_2022(plain, key) if isinstance(body, BODIES_2022) else sign(plain, key)
        envelopes.append({"body": plain, "fromNodeId": signer, "signature": signature})
    return msgspec.json.encode({"messages": envelopes})


def decode_band(data: bytes, *, size_bytes_max: int, concerns: Callable[[dict[str, Any]], bool] | None = None,
                ) -> list[tuple[BandBody, str] | BadMessage | SignatureInvalid]:
    """Read a payload; each entry is (body, sender's node id), or the error that made that one message unusable.

    Messages of kinds that belong to other versions are skipped in silence. Freshness and membership are the caller's
    to check.

    :param concerns: looks at a body before its signature is checked; False skips the message. Most of what is said on
        a busy channel is said to others, and looking costs a hundredth of checking.
    """
    if len(data) > size_bytes_max:
        return [BadMessage(why=f"it is {len(data)} bytes; {size_bytes_max} are allowed")]
    try:
        payload = plain_json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return [BadMessage(why=f"it is not JSON ({error})")]
    envelopes = payload.get("messages", [payload]) if isinstance(payload, dict) else [payload]
    if not isinstance(envelopes, list):
        return [BadMessage(why="its messages are not a list")]
    decoded: list[tuple[BandBody, str] | BadMessage | SignatureInvalid] = []
    for envelope in envelopes:
        try:
            entry = _open(envelope, "fromNodeId", _band_bodies, concerns)
        except (BadMessage, SignatureInvalid) as error:
            decoded.append(error)
        else:
            if entry is not None:
                decoded.append(entry)
    return decoded


def encode_hub_request(body: HubBody, key: Ed25519PrivateKey) -> bytes:
    """Sign a request to the hub; JSON bytes."""
    plain = msgspec.to_builtins(body)
    return msgspec.json.encode({"body": plain, "nodeId": public_id(key), "signature": sign(plain, key)})


def decode_hub_request(data: bytes) -> tuple[HubBody, str]:
    """Read a node's request and check its signature; return the body and the node's id.

    :raises BadMessage: malformed, or of an unknown kind.
    :raises SignatureInvalid: not signed by the node it names.
    """
    try:
        envelope = plain_json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(why=f"it is not JSON ({error})") from None
    entry = _open(envelope, "nodeId", _hub_bodies)
    if entry is None:
        raise BadMessage(why=f"unknown type of request: {str(envelope['body'].get('type'))[:60]!r}")
    return entry


def _open(envelope: object, sender_key: str, bodies: dict[Any, type[_Decoded]],
          concerns: Callable[[dict[str, Any]], bool] | None = None) -> tuple[_Decoded, str] | None:
    if not isinstance(envelope, dict) or set(envelope) != {"body", sender_key, "signature"}:
        raise BadMessage(why="it is not an envelope of body, node id and signature")
    body, sender, signature = envelope["body"], envelope[sender_key], envelope["signature"]
    if not (isinstance(body, dict) and isinstance(sender, str) and isinstance(signature, str)):
        raise BadMessage(why="it is not an envelope of body, node id and signature")
    tag = body.get("type")
    kind = bodies.get(tag) if isinstance(tag, str) else None
    if kind is None or (concerns is not None and not concerns(body)):
        return None
    check = verify_2022 if tag in _TAGS_2022 else verify
    if not check(body, signature, sender):
        raise SignatureInvalid(who=f"node {sender[:16]}")
    try:
        decoded = msgspec.convert(body, kind)
    except (msgspec.ValidationError, OverflowError) as error:
        raise BadMessage(why=f"{tag}: {error}") from None
    _check_fields(str(tag), decoded)
    return decoded, sender


# Field -> what its text must be; where the empty text stands for "none", the kinds of body are named.
_TEXTS: dict[str, tuple[Callable[[str], bool], str, tuple[str, ...]]] = {
    "sha1": (is_sha1, "a SHA-1", ()),
    "manifest": (is_sha1, "a SHA-1", ()),
    "found": (is_sha1, "a SHA-1", ("reportCorrupt",)),
    "subfeed": (is_sha1, "the SHA-1 of a subfeed's name", ("reportCorrupt", "signDownloads")),
    "result_id": (is_sha1, "a SHA-1", ()),
    "feed_id": (is_node_id, "a feed's id", ("reportCorrupt", "signDownloads")),
    "id": (lambda text: 0 < len(text) <= _ID_LENGTH_MAX, f"1 to {_ID_LENGTH_MAX} characters long", ()),
    "request": (lambda text: 0 < len(text) <= _ID_LENGTH_MAX, f"1 to {_ID_LENGTH_MAX} characters long",
                ("feedMessages", "feedShared")),
    "task": (lambda text: 0 < len(text) <= _ID_LENGTH_MAX, f"1 to {_ID_LENGTH_MAX} characters long", ()),
    "attempt": (lambda text: 0 < len(text) <= _ID_LENGTH_MAX, f"1 to {_ID_LENGTH_MAX} characters long",
                ("claimTask", "finishTask")),
    "function": (lambda text: 0 < len(text) <= _FUNCTION_LENGTH_MAX, f"1 to {_FUNCTION_LENGTH_MAX} characters long",
                 ()),
    "kind": (TASK_KINDS.__contains__, "one of " + ", ".join(TASK_KINDS), ()),
}
_COUNTS = {"position": _COUNT_MAX, "first": _COUNT_MAX, "index_size_bytes": _COUNT_MAX, "size": 2**63 - 1}


def _check_fields(tag: str, body: object) -> None:
    for name, (holds, wanted, empty_in) in _TEXTS.items():
        text = getattr(body, name, None)
        if text is not None and not holds(text) and (text or tag not in empty_in):
            raise BadMessage(why=f"{tag}: {name} is not {wanted}")
    for name, limit in _COUNTS.items():
        number = getattr(body, name, None)
        if number is not None and not 0 <= number <= limit:
            raise BadMessage(why=f"{tag}: {name} is not a count")
    if abs(getattr(body, "time", 0)) > _TIME_MS_MAX:
        raise BadMessage(why=f"{tag}: its time is no time")
    if isinstance(body, TaskStatus) and body.status not in TaskStatus.STATUSES:
        raise BadMessage(why=f"{tag}: there is no status {body.status[:20]!r}")
    if isinstance(body, FinishTask) and body.state not in FinishTask.STATES:
        raise BadMessage(why=f"{tag}: a task does not end as {body.state[:20]!r}")
    if isinstance(body, KeepTasks) and not all(0 < len(task) <= _ID_LENGTH_MAX for task in body.tasks):
        raise BadMessage(why=f"{tag}: a task is named by 1 to {_ID_LENGTH_MAX} characters")
    for item in (*getattr(body, "objects", ()), *getattr(body, "segments", ())):
        if not is_sha1(item.sha1) or item.size < 0:
            raise BadMessage(why=f"{tag}: an object needs a SHA-1 and a size")
    if not all(is_sha1(sha1) for sha1 in getattr(body, "sha1s", ())):
        raise BadMessage(why=f"{tag}: one of sha1s is not a SHA-1")
    if isinstance(body, FeedShared) and any(not 0 <= part.first < part.end <= _COUNT_MAX for part in body.segments):
        raise BadMessage(why=f"{tag}: a segment without messages")
    for first, end in getattr(body, "chunks", ()):
        if not 0 <= first < end <= 1 << 40:
            raise BadMessage(why=f"{tag}: a range of chunks from {first} to {end}")
