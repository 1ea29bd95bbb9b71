"""What nodes ask of the hub, and what it answers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from .bodies import Body
from .names import ObjectKind

__all__ = [
    "ApprovalAsked", "ApprovalState", "AskApproval", "ChannelInfo", "ClaimTask", "FindApproval", "FindTask",
    "FinishTask", "GetNodeConfig", "GetPubsubToken", "HubBody", "JoinChannel", "KeepTasks", "LeaveChannel", "Member",
    "NodeConfig", "ObjectSpec", "PubsubInfo", "PubsubToken", "ReportBadResult", "ReportCorrupt", "SignDownloads",
    "SignFeedUploads", "SignTaskResult", "SignUploads", "SignedDownloads", "SignedObject", "SignedUploads", "TaskClaim",
]

# --- requests


class JoinChannel(Body, tag="joinChannel"):
    """Make me a member of the channel that this invitation names, asking for these permissions (empty: all given)."""

    invitation: str
    label: str = ""
    permissions: list[str] = msgspec.field(default_factory=list)


class LeaveChannel(Body, tag="leaveChannel"):
    """Take me off ``channel``."""


class AskApproval(Body, tag="askApproval"):
    """Give me a code by which somebody, signed in, can say that I am his; it takes the place of the one before.

    With ``channel``, whoever approves also asks for these permissions there, in my name.
    """

    label: str = ""
    version: str = ""
    permissions: list[str] = msgspec.field(default_factory=list)


class FindApproval(Body, tag="findApproval"):
    """What became of my asking for approval? With ``channel``: and where do I stand there?"""


class GetNodeConfig(Body, tag="getNodeConfig"):
    """My channels, permissions and fellow members; also tells the hub that I am alive."""

    label: str = ""
    version: str = ""


class GetPubsubToken(Body, tag="getPubsubToken"):
    """A token for the bands of ``channel``."""


_Crc32c = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


class ObjectSpec(msgspec.Struct, omit_defaults=True):
    """An object under ``<channel>/sha1/`` and its exact size in bytes. ``crc32c``: of its bytes, where
    ``ChannelInfo.crc32c`` says that the bucket compares it."""

    sha1: str
    size: int
    crc32c: _Crc32c | None = None


class SignUploads(Body, tag="signUploads"):
    """Upload URLs for objects of ``channel``."""

    objects: list[ObjectSpec]


class SignFeedUploads(Body, tag="signFeedUploads"):
    """Upload URLs for segments of a subfeed, and with ``index_size_bytes`` for its ``subfeed.json``, which may replace
    the one that is there. ``index_crc32c``: as in ``ObjectSpec``."""

    feed_id: str
    subfeed: str
    segments: list[ObjectSpec] = msgspec.field(default_factory=list)
    index_size_bytes: int | None = None
    index_crc32c: _Crc32c | None = msgspec.field(default=None, name="indexCrc32c")


class SignTaskResult(Body, tag="signTaskResult"):
    """An upload URL for the result of the task with this result id (``protocol.tasks.result_id``).

    ``replace``: it may take the place of the one that is there, as that of a query does. ``crc32c``: as in
    ``ObjectSpec``.
    """

    result_id: str
    size: int
    replace: bool = False
    crc32c: _Crc32c | None = None


class SignDownloads(Body, tag="signDownloads"):
    """URLs by which objects of ``channel`` are read, whether it is private or not; they need not be there.

    ``sha1s``, ``feed_id`` and ``subfeed``: as in ``names.ObjectName``. ``head``: to ask for the sizes alone, by HEAD.
    """

    object_kind: ObjectKind
    sha1s: list[str]
    feed_id: str = ""
    subfeed: str = ""
    head: bool = False


class ReportCorrupt(Body, tag="reportCorrupt"):
    """The object ``sha1`` of ``channel`` arrived with bytes of another SHA-1, ``found`` (empty: not known, the length
    or the content is wrong). With ``feed_id`` and ``subfeed`` it is a segment of that subfeed."""

    sha1: str
    found: str
    feed_id: str = ""
    subfeed: str = ""


class ReportBadResult(Body, tag="reportBadResult"):
    """The result of a task in the bucket is not signed by a node that may provide tasks. The hub looks for itself."""

    result_id: str


class ClaimTask(Body, tag="claimTask"):
    """May I run this task? At most one node is told yes, and holds the task while it keeps the claim alive.

    A claim that was not kept for ``task_lease_seconds`` has lapsed: a pure calculation, a query, or an action declared
    ``idempotent`` by this and the former claim, may then be claimed anew; any other action is ``unknown`` for ever.
    Of a pure calculation, what has ended may be claimed anew too: who is told yes looks for the result first.

    ``attempt`` is random. A node that claims an action twice may have begun it in between, and is told no; unless it
    is the same attempt, repeated because its answer was lost.
    """

    task: str
    kind: str
    function: str
    idempotent: bool = False
    attempt: str = ""


class KeepTasks(Body, tag="keepTasks"):
    """I still run these tasks."""

    tasks: list[str]


class FinishTask(Body, tag="finishTask"):
    """A task that I claimed has ended.

    ``state``: ``finished`` or ``failed`` (the function ran and raised); ``unknown``: it started, and nobody knows how
    it ended; ``released``: it never started, and whoever can may claim it. For an action that finished or failed,
    ``receipt`` is its receipt (``protocol.tasks``); for one that is released, ``attempt`` that of the claim which is
    given back, as it may have been claimed anew since this was sent.
    """

    STATES: ClassVar[tuple[str, ...]] = ("finished", "failed", "unknown", "released")

    task: str
    state: str
    receipt: dict[str, Any] | None = None
    attempt: str = ""


class FindTask(Body, tag="findTask"):
    """How does this task stand?"""

    task: str


HubBody = (JoinChannel | LeaveChannel | AskApproval | FindApproval | GetNodeConfig | GetPubsubToken | SignUploads
           | SignFeedUploads | SignTaskResult | SignDownloads | ReportCorrupt | ReportBadResult | ClaimTask | KeepTasks
           | FinishTask | FindTask)


# --- answers


class Member(msgspec.Struct, rename="camel"):
    """A node on a channel, with the permissions in force."""

    node_id: str
    label: str
    permissions: list[str]
    last_seen: int = 0


class PubsubInfo(msgspec.Struct, rename="camel"):
    """Where the bands are. ``kind``: the protocol, ``ably`` or ``nats``. ``endpoint``: for Ably's ``host:port``, or a
    name of Ably's own (``main``), empty for the hub's own address; for NATS the server's URL.
    ``messages_per_second_max``: how many a node may publish there, 0 for any number."""

    kind: str
    endpoint: str = ""
    tls: bool = False
    messages_per_second_max: float = 0


class ChannelInfo(msgspec.Struct, rename="camel"):
    """One channel of the asking node. ``bucket_url`` is the base of object URLs, relative to the hub if it begins
    with a slash. ``private``: they have to be signed for reading too. ``crc32c``: the bucket compares the CRC-32C of
    what is uploaded with what was told when the URL was asked for."""

    name: str
    owner: str
    permissions: list[str]
    bucket_url: str
    pubsub: PubsubInfo
    members: list[Member]
    private: bool = False
    crc32c: bool = False


class NodeConfig(msgspec.Struct, rename="camel"):
    """Answer to ``GetNodeConfig``. ``time`` is the hub's clock, milliseconds since the epoch."""

    time: int
    owner: str
    channels: list[ChannelInfo]


class ApprovalAsked(msgspec.Struct, rename="camel"):
    """Answer to ``AskApproval``. ``link``: where the code is entered. ``expires``: milliseconds since the epoch, by the
    hub's clock. ``interval``: seconds to wait between two ``FindApproval``."""

    code: str
    link: str
    expires: int
    interval: float


class ApprovalState(msgspec.Struct, rename="camel"):
    """Answer to ``FindApproval``.

    ``state``: ``waiting``, ``approved``, ``denied``, or ``expired`` (also when nothing was asked, or long ago).
    ``owner``: whose the node is now, whichever way it became that; empty for nobody's. ``standing``: on the channel
    that was named, ``asked``, ``member``, ``left``, ``removed``, or empty for none.
    """

    state: str
    owner: str = ""
    standing: str = ""


class PubsubToken(msgspec.Struct, rename="camel"):
    """Answer to ``GetPubsubToken``: the fields of an Ably TokenDetails, and ``pubsub``, where the token is good.

    Of NATS: ``seed`` is that of the user whom the token is for, with which the node signs what the server asks it to.
    """

    token: str
    issued: int
    expires: int
    capability: str
    client_id: str
    seed: str = ""
    pubsub: PubsubInfo | None = None

    def __repr__(self) -> str:
        return f"PubsubToken(client_id={self.client_id!r}, …)"


class SignedObject(msgspec.Struct, rename="camel"):
    """Where and how to PUT one object; ``url`` is relative to the hub if it begins with a slash. ``resumable``: where
    to begin, by POST, a session that takes it (``net.resumable``)."""

    sha1: str
    object: str
    url: str
    headers: dict[str, str]
    resumable: bool = False


class SignedUploads(msgspec.Struct, rename="camel"):
    """Answer to ``SignUploads``, ``SignFeedUploads`` (the index last) and ``SignTaskResult``, in the order asked."""

    uploads: list[SignedObject]


class SignedDownloads(msgspec.Struct, rename="camel"):
    """Answer to ``SignDownloads``: a URL for each object, in the order asked, relative to the hub if it begins with a
    slash. They hold until ``expires``, by the hub's clock, milliseconds since the epoch."""

    urls: list[str]
    expires: int


class TaskClaim(msgspec.Struct, rename="camel"):
    """Answer to ``ClaimTask`` and ``FindTask``: how a task stands.

    ``state`` is ``none`` (nobody claimed it), ``claimed``, ``finished``, ``failed``, ``unknown`` or ``released``;
    ``granted``: the asking node holds the claim from now on. Times are the hub's, milliseconds since the epoch.
    """

    task: str
    state: str
    granted: bool = False
    node_id: str = ""
    function: str = ""
    kind: str = ""
    claimed: int = 0
    expires: int = 0
    receipt: dict[str, Any] | None = None
