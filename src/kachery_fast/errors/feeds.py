"""What goes wrong with feeds."""

from __future__ import annotations

from .general import InvalidArgument
from .tree import KacheryError

__all__ = [
    "FeedChainBroken", "FeedForked", "FeedInvalid", "FeedNotWritable", "FeedUnknown", "HeadInvalid",
    "SubfeedNotAvailable",
]


class FeedUnknown(KacheryError):
    """This node has no feed {feed}. {advice}"""

    exit_code = 3
    http_status = 404


class FeedNotWritable(InvalidArgument):
    """Nothing can be appended to feed://{feed_id} here: {why}. Only the node that made a feed extends it."""

    exit_code = 4
    http_status = 403


class SubfeedNotAvailable(KacheryError):
    """{uri} could not be read from the channel {channel!r}: {why}. Tried: {tried}."""

    exit_code = 3
    http_status = 404


class FeedInvalid(KacheryError):
    """Message {number} of feed://{feed_id}/~{subfeed} was refused: {why}. The {number} messages before it are good."""

    exit_code = 6
    http_status = 502


class FeedChainBroken(FeedInvalid):
    """Message {number} of feed://{feed_id}/~{subfeed} is signed by the feed's owner, and does not follow the message
    before it that is held here. The owner has written two histories, and they part at {number} or before."""


class HeadInvalid(FeedInvalid):
    """The head of feed://{feed_id}/~{subfeed}, the owner's word on its length, was refused: {why}."""


class FeedForked(KacheryError):
    """The owner of feed://{feed_id}/~{subfeed} signed two different messages number {number}, so which of the two
    histories holds cannot be known. The messages before it are good; both signed messages are kept as evidence
    (kachery-fast feed verify shows them). Ask the owner."""

    exit_code = 6
    http_status = 409
