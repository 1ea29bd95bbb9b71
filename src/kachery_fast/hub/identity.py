"""Who is who: owners and their tokens, and registered nodes.

The functions that take a connection run inside ``Registry.call``.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..protocol.names import check_node_id, check_owner_id
from .actions import Actor, Scope
from .tables import nodes, owner_tokens, owners

__all__ = [
    "TOKEN_ID_LENGTH", "NodeRecord", "clean_text", "ensure_owner", "find_first_admin", "find_node", "find_token",
    "hash_code", "issue_owner_token", "register_node", "touch_node",
]

# A node asks for its configuration every half minute; its row is not rewritten more often than this.
_LAST_SEEN_STEP_MS = 5_000
_LABEL_LENGTH_MAX = 100
_LAST_USED_STEP_MS = 60_000
# By so much of its hash a token is called.
TOKEN_ID_LENGTH = 12
# Made once, as every request of a node runs it.
_FIND_NODE = sa.select(nodes.c.id, nodes.c.owner, nodes.c.label).where(
    nodes.c.id == sa.bindparam("node_id"), nodes.c.forgotten.is_(None))


class NodeRecord(NamedTuple):
    """A registered node."""

    id: str
    owner: str
    label: str


def hash_code(code: str) -> str:
    """Hash an owner token or an invitation for storage. Both are random, so a plain SHA-256 gives nothing away.

    Codes are found by this hash, through an index: what the look-up's duration may tell is about the hash of a guess,
    which leads to no code.
    """
    return hashlib.sha256(code.encode("utf-8", "surrogatepass")).hexdigest()


# --- owners


def ensure_owner(connection: Connection, owner: str, now_ms: int, *, admin: bool = False) -> None:
    """Add the owner when missing.

    :raises InvalidName: it cannot name an owner.
    """
    check_owner_id(owner)
    if connection.execute(sa.select(owners.c.id).where(owners.c.id == owner)).first() is None:
        connection.execute(owners.insert().values(id=owner, created=now_ms, admin=admin))


def find_first_admin(connection: Connection) -> str | None:
    """Return who has been an admin of this hub for longest."""
    wanted = sa.select(owners.c.id).where(owners.c.admin, owners.c.closed.is_(None))
    return connection.execute(wanted.order_by(owners.c.created, owners.c.id).limit(1)).scalar()


def issue_owner_token(connection: Connection, owner: str, now_ms: int) -> str:
    """Make a token for an owner; only its hash is kept."""
    token = secrets.token_urlsafe(32)
    connection.execute(owner_tokens.insert().values(hash=hash_code(token), owner=owner, created=now_ms))
    return token


def find_token(connection: Connection, token: str, now_ms: int) -> Actor | None:
    """Return who holds ``token`` and what it is for, None for a wrong one or one that has expired."""
    digest = hash_code(token)
    row = connection.execute(sa.select(owner_tokens).where(owner_tokens.c.hash == digest)).first()
    if row is None or (row.expires is not None and row.expires < now_ms):
        return None
    if row.last_used is None or not 0 <= now_ms - row.last_used < _LAST_USED_STEP_MS:
        connection.execute(owner_tokens.update().where(owner_tokens.c.hash == digest).values(last_used=now_ms))
    scopes = frozenset(Scope) if row.scope == "all" else frozenset(Scope(word) for word in row.scope.split())
    return Actor(row.owner, f"token {digest[:TOKEN_ID_LENGTH]}", scopes, row.channel)


# --- nodes


def find_node(connection: Connection, node_id: str) -> NodeRecord | None:
    """Return the registration of a node, None when it has none."""
    row = connection.execute(_FIND_NODE, {"node_id": node_id}).first()
    return None if row is None else NodeRecord(row.id, row.owner, row.label)


def register_node(connection: Connection, node_id: str, owner: str, label: str, now_ms: int) -> NodeRecord:
    """Register a node under ``owner``; one that is registered already stays under the owner it has.

    :raises InvalidName: the id is not a public key.
    """
    check_node_id(node_id)
    label = clean_text(label)
    found = find_node(connection, node_id)
    if found is None:
        values = {"owner": owner, "label": label, "version": "", "created": now_ms, "last_seen": now_ms}
        known = connection.execute(
            nodes.update().where(nodes.c.id == node_id).values(forgotten=None, **values)).rowcount
        if not known:
            connection.execute(nodes.insert().values(id=node_id, **values))
        return NodeRecord(node_id, owner, label)
    if label and label != found.label:
        connection.execute(nodes.update().where(nodes.c.id == node_id).values(label=label))
        return found._replace(label=label)
    return found


def touch_node(connection: Connection, node_id: str, label: str, version: str, now_ms: int) -> None:
    """Note that a node is alive, how it calls itself and which version it runs."""
    row = connection.execute(
        sa.select(nodes.c.label, nodes.c.version, nodes.c.last_seen).where(nodes.c.id == node_id)
    ).one()
    changed = {"label": clean_text(label) or row.label, "version": clean_text(version) or row.version}
    recent = 0 <= now_ms - row.last_seen < _LAST_SEEN_STEP_MS
    if recent and changed == {"label": row.label, "version": row.version}:
        return
    connection.execute(nodes.update().where(nodes.c.id == node_id).values(last_seen=now_ms, **changed))


def clean_text(text: str, length_max: int = _LABEL_LENGTH_MAX) -> str:
    """Return what a node or a browser calls itself as others can be shown it: no control characters, bounded."""
    return "".join(character for character in text if character.isprintable())[:length_max]
