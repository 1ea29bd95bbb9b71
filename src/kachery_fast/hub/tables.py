"""The tables of the registry. A change here takes a migration (``migrations/``); a test compares the two.

Times are milliseconds since the epoch. What is a secret of somebody else's (tokens, invitations, sessions, links) is
kept as its SHA-256: it is made of 128 random bits or more, so one round is enough (nothing to guess at). The code of an
approval has 43, so who reads the registry can find it; it is worth something for a quarter of an hour, to an account.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

__all__ = [
    "approvals", "audit", "bucket_moves", "channels", "damage_reports", "engines", "identities", "invitations",
    "memberships", "metadata", "nodes", "owner_tokens", "owners", "relayed", "seen_requests", "sessions",
    "sign_in_links", "task_claims", "usage",
]

metadata = sa.MetaData()


def _number(default: int) -> dict[str, Any]:
    return {"nullable": False, "default": default, "server_default": str(default)}


def _text(default: str = "") -> dict[str, Any]:
    return {"nullable": False, "default": default, "server_default": default}


def _no() -> dict[str, Any]:
    return {"nullable": False, "default": False, "server_default": sa.false()}


# --- people

# ``closed``: since when an admin keeps the account closed. ``sessions_from``: sessions begun before it do not count.
owners = sa.Table(
    "owners", metadata,
    sa.Column("id", sa.String(254), primary_key=True),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("name", sa.String(200), **_text()),
    sa.Column("admin", sa.Boolean, **_no()),
    sa.Column("closed", sa.BigInteger, nullable=True),
    sa.Column("sessions_from", sa.BigInteger, **_number(0)),
)
# Who an OpenID provider says somebody is. Only the pair of issuer and subject is a name for ever (OpenID Connect Core
# 1.0, 5.7); an e-mail address can be given to somebody else.
identities = sa.Table(
    "identities", metadata,
    sa.Column("issuer", sa.String(400), primary_key=True),
    sa.Column("subject", sa.String(255), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False, index=True),
    sa.Column("created", sa.BigInteger, nullable=False),
)
sign_in_links = sa.Table(
    "sign_in_links", metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("expires", sa.BigInteger, nullable=False),
)
sessions = sa.Table(
    "sessions", metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False, index=True),
    sa.Column("agent", sa.String(200), **_text()),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("last_seen", sa.BigInteger, nullable=False),
    sa.Column("expires", sa.BigInteger, nullable=False),
)
# ``scope``: names of what it opens, separated by spaces (``actions.py``). ``channel``: the only one that it is for.
owner_tokens = sa.Table(
    "owner_tokens", metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("name", sa.String(100), **_text()),
    sa.Column("scope", sa.String(200), **_text("all")),
    sa.Column("channel", sa.String(64), nullable=True),
    sa.Column("expires", sa.BigInteger, nullable=True),
    sa.Column("last_used", sa.BigInteger, nullable=True),
)

# --- nodes and channels

# ``forgotten``: since when nobody owns the node. Its row stays while a channel's owner has decided on it.
nodes = sa.Table(
    "nodes", metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
    sa.Column("label", sa.String(100), nullable=False, default=""),
    sa.Column("version", sa.String(100), nullable=False, default=""),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("last_seen", sa.BigInteger, nullable=False),
    sa.Column("forgotten", sa.BigInteger, nullable=True),
)
# A node that waits for somebody, signed in, to say that it is his (as RFC 8628 does for devices). ``address``: where it
# asked from (``limits.address_group``).
approvals = sa.Table(
    "approvals", metadata,
    sa.Column("code", sa.String(64), primary_key=True),
    sa.Column("node", sa.String(64), nullable=False, unique=True),
    sa.Column("label", sa.String(100), nullable=False),
    sa.Column("version", sa.String(100), nullable=False),
    sa.Column("channel", sa.String(64), **_text()),
    sa.Column("requested", sa.String(200), **_text()),
    sa.Column("address", sa.String(50), **_text()),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("expires", sa.BigInteger, nullable=False),
)
# ``folded`` keeps "Lab" and "lab" from being two channels: their objects would be one on some file systems.
# ``private``: reading needs a signed URL. ``inviters``: "owner" or "members". ``bucket``, ``pubsub``: rows of engines,
# null for the hub's own.
channels = sa.Table(
    "channels", metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("folded", sa.String(64), nullable=False, unique=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("description", sa.String(1000), **_text()),
    sa.Column("listed", sa.Boolean, **_no()),
    sa.Column("private", sa.Boolean, **_no()),
    sa.Column("inviters", sa.String(10), **_text("owner")),
    sa.Column("size_bytes_max", sa.BigInteger, nullable=True),
    sa.Column("unread_days_max", sa.Integer, nullable=True),
    sa.Column("node_day_bytes_max", sa.BigInteger, nullable=True),
    sa.Column("bucket", sa.String(32), nullable=True),
    sa.Column("pubsub", sa.String(32), nullable=True),
)
# A row outlives membership (state "left" or "removed"), so that ``decided``, the time of the channel owner's last
# word on this node, holds against invitations that are older than it. "asked": the node's owner asks, nobody granted.
memberships = sa.Table(
    "memberships", metadata,
    sa.Column("channel", sa.ForeignKey("channels.name"), primary_key=True),
    sa.Column("node", sa.ForeignKey("nodes.id"), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), primary_key=True),
    sa.Column("requested", sa.String(200), nullable=False),
    sa.Column("granted", sa.String(200), nullable=False),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("invitation", sa.String(64), nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("decided", sa.BigInteger, nullable=False),
    sa.Index("memberships_by_node", "node"),
)
# ``uses_left`` is null for any number. ``node_owner``: who invites, and under whose name a new node is registered.
invitations = sa.Table(
    "invitations", metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("channel", sa.ForeignKey("channels.name"), nullable=False, index=True),
    sa.Column("node_owner", sa.ForeignKey("owners.id"), nullable=False),
    sa.Column("permissions", sa.String(200), nullable=False),
    sa.Column("uses_left", sa.Integer, nullable=True),
    sa.Column("expires", sa.BigInteger, nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
)
# An owner's account with a bucket or a pub/sub service. ``secret`` is encrypted (``vault.py``).
engines = sa.Table(
    "engines", metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False, index=True),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("secret", sa.LargeBinary, nullable=True),
    sa.Column("created", sa.BigInteger, nullable=False),
)

# A channel that moves, or has moved, from one bucket to another (rows of engines; null: the hub's own). ``state``:
# "copying", "following", "switched", "done" or "stopped". ``after``: the name up to which that is done.
bucket_moves = sa.Table(
    "bucket_moves", metadata,
    sa.Column("channel", sa.ForeignKey("channels.name"), primary_key=True),
    sa.Column("owner", sa.String(254), nullable=False),
    sa.Column("source", sa.String(32), nullable=True),
    sa.Column("target", sa.String(32), nullable=True),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("after", sa.Text, nullable=False),
    sa.Column("objects", sa.BigInteger, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("damaged", sa.BigInteger, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("started", sa.BigInteger, nullable=False),
    sa.Column("changed", sa.BigInteger, nullable=False),
)

# --- what happened

damage_reports = sa.Table(
    "damage_reports", metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("channel", sa.String(64), nullable=False, index=True),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("sha1", sa.String(40), nullable=False),
    sa.Column("found", sa.String(40), nullable=False),
    sa.Column("actual", sa.String(40), nullable=True),
    sa.Column("time", sa.BigInteger, nullable=False),
)
# Who changed what when. ``via``: "web", "token <its beginning>", "node" or "hub".
audit = sa.Table(
    "audit", metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("time", sa.BigInteger, nullable=False, index=True),
    sa.Column("owner", sa.String(254), nullable=False, index=True),
    sa.Column("via", sa.String(40), nullable=False),
    sa.Column("action", sa.String(40), nullable=False),
    sa.Column("channel", sa.String(64), nullable=False, index=True),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)
# ``day``: since the epoch, of UTC. ``node``: "" for what cannot be told.
usage = sa.Table(
    "usage", metadata,
    sa.Column("channel", sa.String(64), primary_key=True),
    sa.Column("day", sa.Integer, primary_key=True),
    sa.Column("node", sa.String(64), primary_key=True),
    sa.Column("uploads", sa.BigInteger, **_number(0)),
    sa.Column("upload_bytes", sa.BigInteger, **_number(0)),
    sa.Column("downloads", sa.BigInteger, **_number(0)),
    sa.Column("download_bytes", sa.BigInteger, **_number(0)),
)
# Signed requests that were accepted, where several hubs share the registry; one alone remembers them by itself.
seen_requests = sa.Table(
    "seen_requests", metadata,
    sa.Column("node", sa.String(64), primary_key=True),
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("time", sa.BigInteger, nullable=False, index=True),
)
# What brokers of several hubs tell one another (``relay.py``): event ``number`` of the hub process ``hub``.
relayed = sa.Table(
    "relayed", metadata,
    sa.Column("hub", sa.String(32), primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("time", sa.BigInteger, nullable=False, index=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
# ``revision`` grows with each change, so that a change can be made only to what was looked at. ``changed`` is the time
# of the last one, by which rows are forgotten.
task_claims = sa.Table(
    "task_claims", metadata,
    sa.Column("channel", sa.ForeignKey("channels.name"), primary_key=True),
    sa.Column("task", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("function", sa.String(200), nullable=False),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("attempt", sa.String(64), nullable=False),
    sa.Column("idempotent", sa.Boolean, nullable=False),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("claimed", sa.BigInteger, nullable=False),
    sa.Column("expires", sa.BigInteger, nullable=False),
    sa.Column("receipt", sa.Text, nullable=True),
    sa.Column("changed", sa.BigInteger, nullable=False, index=True),
    sa.Column("revision", sa.Integer, nullable=False),
)
