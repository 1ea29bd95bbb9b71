"""What goes wrong between people, their nodes and a hub."""

from __future__ import annotations

from .general import NotPermitted
from .tree import KacheryError

__all__ = ["ActionRefused", "ChannelPrivate", "NotApproved", "QuotaExceeded", "SignInRefused"]


class ActionRefused(KacheryError):
    """The hub refused {action!r} to {who}: {why}."""

    exit_code = 4
    http_status = 403


class ChannelPrivate(KacheryError):
    """Only its nodes can read what is in the bucket of the channel {channel!r}: it is private, or the bucket
    takes signed URLs only. Load through a node that is on the channel (kachery-fast node join), without direct mode; or
    have its owner make it public: kachery-fast channel set {channel} --public"""

    exit_code = 4
    http_status = 403


class NotApproved(KacheryError):
    """This node was not approved at the hub {hub}: {why}. Run the command again for a new code."""

    exit_code = 4
    http_status = 403


class QuotaExceeded(NotPermitted):
    """{what} may have {limit} bytes: {used} are stored or on their way, {needed} more were to come, and {why}.
    {advice}"""


class SignInRefused(KacheryError):
    """You could not be signed in: {why}. On the hub's machine, kachery-fast hub sign-in makes a new link."""

    exit_code = 4
    http_status = 403
