"""What goes wrong with owners' own buckets and pub/sub services at a hub."""

from __future__ import annotations

from .tree import KacheryError

__all__ = ["AddressRefused", "CredentialsUnreadable", "EngineUnusable"]


class AddressRefused(KacheryError):
    """The hub does not connect to {host!r}: {why}. If that is where the server is, the hub's admin can allow it: start
    the hub with KACHERY_HUB_ENGINE_HOSTS naming this host."""

    exit_code = 4
    http_status = 403


class CredentialsUnreadable(KacheryError):
    """The credentials of {name!r} cannot be read: they were encrypted with another key than the one in this
    hub's directory. Put the key back from a backup of that directory, and restart the hub; or give the credentials
    anew: kachery-fast channel engines --renew {name} --credentials FILE"""

    exit_code = 6
    http_status = 503


class EngineUnusable(KacheryError):
    """{what} cannot be used: {why}. {advice}"""

    exit_code = 5
    http_status = 502
