"""Every wire type: what nodes say on the bands, and what they ask of the hub.

An envelope is ``{"body": {...}, "fromNodeId": <64 hex>, "signature": <128 hex>}`` (to a hub ``nodeId`` in place of
``fromNodeId``, as in 2022). The signature covers the canonical JSON of the body as it was received, unknown keys
included, so a newer node may add keys. Each body of ours carries channel, time and a random id; the two file messages
of 2022 carry none and are read for the sake of old nodes.

Chunk ranges are lists of ``[first, end)`` pairs of chunk indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import BadMessage, SignatureInvalid
from .names import is_sha1
from .signing import public_id, sign, sign_2022, verify, verify_2022

__all__ = [
    "Assign", "BandBody", "Cancel", "ChannelInfo", "Failed", "GetNodeConfig", "GetPubsubToken", "HubBody",
    "JoinChannel", "LeaveChannel", "Member", "NodeConfig", "ObjectSpec", "Offer", "Progress", "PubsubInfo",
    "PubsubToken", "Ready", "ReportCorrupt", "RequestFile2022", "SignUploads", "SignedObject", "SignedUploads",
    "UploadFileStatus2022", "Want", "compress", "decode_band", "decode_hub_request", "encode_band",
    "encode_hub_request", "expand",
]

Ranges = list[tuple[int, int]]


class _Body(msgspec.Struct, kw_only=True, rename="camel", omit_defaults=True):
    """What every body of ours carries. ``time`` is milliseconds since the epoch, ``id`` 32 random hex digits."""

    channel: str = ""
    time: int
    id: str


# --- files, on the bands


class Want(_Body, tag="want"):
    """requestFiles: who has this file? ``manifest`` is the one the requester holds or was told of."""

    request: str
    sha1: str
    manifest: str | None = None


class Assign(_Body, tag="assign"):
    """requestFiles: ``provider`` shall upload these chunks, and the manifest first when ``send_manifest``.

    Chunk indices beyond the file's end are ignored: a requester that has yet to see the manifest may guess.
    """

    request: str
    provider: str
    sha1: str
    manifest: str | None = None
    chunks: Ranges = []
    send_manifest: bool = False


class Cancel(_Body, tag="cancel"):
    """requestFiles: the requester needs nothing more for this request."""

    request: str


class Offer(_Body, tag="offer"):
    """provideFiles: I have it, ``size`` bytes, cut by ``manifest``; ``load`` chunks are queued here already."""

    request: str
    sha1: str
    size: int
    manifest: str | None = None
    load: int = 0


class Ready(_Body, tag="ready"):
    """provideFiles: these chunks (and the manifest) are in the bucket now."""

    request: str
    chunks: Ranges = []
    manifest_ready: bool = False


class Progress(_Body, tag="progress"):
    """provideFiles, each second while at work: ``bytes`` sent so far for this request, ``queued`` chunks to go."""

    request: str
    bytes: int
    queued: int = 0


class Failed(_Body, tag="failed"):
    """provideFiles: the provider cannot go on. ``reason`` is one word of ``REASONS``, ``detail`` a sentence."""

    REASONS: ClassVar[tuple[str, ...]] = (
        "unknown", "not-permitted", "evicted", "changed-on-disk", "disk-error", "busy", "bucket", "hub")

    request: str
    reason: str
    detail: str = ""


class RequestFile2022(msgspec.Struct, tag="requestFile", rename="camel"):
    """requestFiles, 2022: please upload this object. ``file_key`` is echoed as it came."""

    file_key: dict[str, Any]


class UploadFileStatus2022(msgspec.Struct, tag="uploadFileStatus", rename="camel"):
    """provideFiles, 2022: ``status`` is ``started``, then ``finished`` once the object is in the bucket."""

    file_key: dict[str, Any]
    status: str


BandBody = Want | Assign | Cancel | Offer | Ready | Progress | Failed | RequestFile2022 | UploadFileStatus2022
_TYPES_2022 = (RequestFile2022, UploadFileStatus2022)


# --- requests to the hub


class JoinChannel(_Body, tag="joinChannel"):
    """Make me a member of the channel that this invitation names, asking for these permissions (empty: all given)."""

    invitation: str
    label: str = ""
    permissions: list[str] = []


class LeaveChannel(_Body, tag="leaveChannel"):
    """Take me off ``channel``."""


class GetNodeConfig(_Body, tag="getNodeConfig"):
    """My channels, permissions and fellow members; also tells the hub that I am alive."""

    label: str = ""
    version: str = ""


class GetPubsubToken(_Body, tag="getPubsubToken"):
    """A token for the bands of ``channel``."""


class ObjectSpec(msgspec.Struct):
    """An object under ``<channel>/sha1/`` and its exact size in bytes."""

    sha1: str
    size: int


class SignUploads(_Body, tag="signUploads"):
    """Upload URLs for objects of ``channel``."""

    objects: list[ObjectSpec]


class ReportCorrupt(_Body, tag="reportCorrupt"):
    """The object ``sha1`` of ``channel`` arrived with bytes of another SHA-1, ``found`` (empty: not known, the length
    or the content is wrong)."""

    sha1: str
    found: str


HubBody = JoinChannel | LeaveChannel | GetNodeConfig | GetPubsubToken | SignUploads | ReportCorrupt


# --- the hub's answers


class Member(msgspec.Struct, rename="camel"):
    """A node on a channel, with the permissions in force."""

    node_id: str
    label: str
    permissions: list[str]
    last_seen: int = 0


class PubsubInfo(msgspec.Struct, rename="camel"):
    """Where the bands are. ``kind`` is ``ably``; ``endpoint`` is ``host:port``, empty for the hub's own address."""

    kind: str
    endpoint: str = ""
    tls: bool = False


class ChannelInfo(msgspec.Struct, rename="camel"):
    """One channel of the asking node. ``bucket_url`` is the base of object URLs, relative to the hub if it begins
    with a slash."""

    name: str
    owner: str
    permissions: list[str]
    bucket_url: str
    pubsub: PubsubInfo
    members: list[Member]


class NodeConfig(msgspec.Struct, rename="camel"):
    """Answer to ``GetNodeConfig``. ``time`` is the hub's clock, milliseconds since the epoch."""

    time: int
    owner: str
    channels: list[ChannelInfo]


class PubsubToken(msgspec.Struct, rename="camel"):
    """Answer to ``GetPubsubToken``: the fields of an Ably TokenDetails."""

    token: str
    issued: int
    expires: int
    capability: str
    client_id: str


class SignedObject(msgspec.Struct, rename="camel"):
    """Where and how to PUT one object; ``url`` is relative to the hub if it begins with a slash."""

    sha1: str
    object: str
    url: str
    headers: dict[str, str]


class SignedUploads(msgspec.Struct, rename="camel"):
    """Answer to ``SignUploads``, in the order asked."""

    uploads: list[SignedObject]


# --- encode and decode

Envelope = dict[str, Any]
_Decoded = TypeVar("_Decoded")
_band_bodies = {kind.__struct_config__.tag: kind for kind in BandBody.__args__}
_hub_bodies = {kind.__struct_config__.tag: kind for kind in HubBody.__args__}
_TAGS_2022 = frozenset(kind.__struct_config__.tag for kind in _TYPES_2022)
# Ours are 32 digits each; a longer one would be remembered at the cost of the receiver.
_ID_LENGTH_MAX = 64
_TIME_MS_MAX = 2**53


def encode_band(bodies: list[BandBody], key: Ed25519PrivateKey) -> bytes:
    """Sign each body and return one pub/sub payload, ``{"messages": [envelope, …]}``."""
    signer = public_id(key)
    envelopes = []
    for body in bodies:
        plain = msgspec.to_builtins(body)
        signature = sign_2022(plain, key) if isinstance(body, _TYPES_2022) else sign(plain, key)
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
        payload = msgspec.json.decode(data)
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
        envelope = msgspec.json.decode(data)
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


def _check_fields(tag: str, body: object) -> None:
    for name in ("sha1", "manifest", "found"):
        value = getattr(body, name, None)
        if value is not None and not is_sha1(value) and not (name == "found" and value == ""):
            raise BadMessage(why=f"{tag}: {name} is not a SHA-1")
    for name in ("id", "request"):
        value = getattr(body, name, None)
        if value is not None and not 0 < len(value) <= _ID_LENGTH_MAX:
            raise BadMessage(why=f"{tag}: {name} is not 1 to {_ID_LENGTH_MAX} characters long")
    if abs(getattr(body, "time", 0)) > _TIME_MS_MAX:
        raise BadMessage(why=f"{tag}: its time is no time")
    for item in getattr(body, "objects", ()):
        if not is_sha1(item.sha1) or item.size < 0:
            raise BadMessage(why=f"{tag}: an object needs a SHA-1 and a size")
    for first, end in getattr(body, "chunks", ()):
        if not 0 <= first < end <= 1 << 40:
            raise BadMessage(why=f"{tag}: a range of chunks from {first} to {end}")


def compress(indices: list[int]) -> Ranges:
    """Turn chunk indices into ranges: ``[0, 1, 2, 5]`` -> ``[(0, 3), (5, 6)]``."""
    ranges: Ranges = []
    for index in sorted(indices):
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        elif not ranges or index >= ranges[-1][1]:
            ranges.append((index, index + 1))
    return ranges


def expand(ranges: Ranges, count: int) -> list[int]:
    """Turn ranges into sorted indices below ``count``, each once; overlaps and what lies beyond cost nothing."""
    indices: list[int] = []
    position = 0
    for first, end in sorted(ranges):
        indices.extend(range(max(first, position), min(end, count)))
        position = max(position, end)
    return indices
