"""Who is signed in on the website: one-time links, sessions, and the cookie of a session.

The functions that take a connection run inside ``Registry.call``.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import SignInRefused
from .actions import Answer
from .identity import clean_text, hash_code
from .tables import owners, sessions, sign_in_links

__all__ = [
    "SESSION_SECONDS", "Seal", "SessionLine", "SignedIn", "begin_session", "end_session", "end_sessions_of",
    "find_link_owner", "find_session", "list_sessions", "make_link", "use_link",
]

LINK_SECONDS = 24 * 3600
SESSION_SECONDS = 14 * 24 * 3600
SESSIONS_PER_OWNER_MAX = 100
LINKS_PER_OWNER_MAX = 10
_AGENT_LENGTH_MAX = 200
_LAST_SEEN_STEP_MS = 60_000
_ID_LENGTH = 12


class SessionLine(Answer):
    """A session as its owner sees it: ``id`` is the beginning of its hash, ``agent`` what the browser calls itself."""

    id: str
    agent: str
    created: int
    last_seen: int
    expires: int


class SignedIn(NamedTuple):
    """Who is signed in, by which session."""

    owner: str
    name: str
    admin: bool
    session: str


class Seal:
    """Signs what a browser keeps for the hub (HMAC-SHA-256), so that nothing else is looked up.

    :param key: of this hub, or of all hubs behind one address.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def seal(self, purpose: str, text: str) -> str:
        """Return the text with a signature for this purpose."""
        return f"{text}.{self._mark(purpose, text)}"

    def open(self, purpose: str, sealed: str) -> str | None:
        """Return the text, None when it was not sealed here for this purpose."""
        text, _, mark = sealed.rpartition(".")
        good = hmac.compare_digest(self._mark(purpose, text).encode(), mark.encode("utf-8", "replace"))
        return text if good else None

    def _mark(self, purpose: str, text: str) -> str:
        made = hmac.digest(self._key, f"{purpose}\0{text}".encode("utf-8", "replace"), hashlib.sha256)
        return base64.urlsafe_b64encode(made).rstrip(b"=").decode()


# --- one-time links


def make_link(connection: Connection, owner: str, now_ms: int) -> str:
    """Return the code of a link that signs ``owner`` in once, within a day; only its hash is kept.

    :raises SignInRefused: there is no such account, or it is closed.
    """
    _require_open(connection, owner)
    connection.execute(sign_in_links.delete().where(sign_in_links.c.expires < now_ms))
    _make_room(connection, sign_in_links, owner, sign_in_links.c.created, LINKS_PER_OWNER_MAX)
    code = secrets.token_urlsafe(24)
    connection.execute(sign_in_links.insert().values(
        hash=hash_code(code), owner=owner, created=now_ms, expires=now_ms + LINK_SECONDS * 1000))
    return code


def find_link_owner(connection: Connection, code: str, now_ms: int) -> str | None:
    """Return whom a link would sign in, without using it up; None when it holds no more."""
    found = connection.execute(sa.select(sign_in_links.c.owner).where(
        sign_in_links.c.hash == hash_code(code), sign_in_links.c.expires >= now_ms)).scalar()
    return None if found is None else str(found)


def use_link(connection: Connection, code: str, now_ms: int) -> str:
    """Use a link up and return whom it signs in. :raises SignInRefused: it holds no more."""
    owner = find_link_owner(connection, code, now_ms)
    # One conditional deletion: two that come at once cannot both have it.
    used = connection.execute(sign_in_links.delete().where(sign_in_links.c.hash == hash_code(code))).rowcount
    if owner is None or not used:
        raise SignInRefused(why="the link was used already, or has expired")
    _require_open(connection, owner)
    return owner


def _make_room(connection: Connection, table: sa.Table, owner: str, newest: sa.Column[int], count_max: int) -> None:
    """Remove an owner's oldest rows, so that one more makes ``count_max`` at most."""
    oldest = sa.select(table.c.hash).where(table.c.owner == owner).order_by(newest.desc()).offset(count_max - 1)
    connection.execute(table.delete().where(table.c.hash.in_([row.hash for row in connection.execute(oldest)])))


def _require_open(connection: Connection, owner: str) -> None:
    row = connection.execute(sa.select(owners.c.closed).where(owners.c.id == owner)).first()
    if row is None or row.closed is not None:
        raise SignInRefused(why=f"the account {owner} is closed" if row else f"there is no account {owner}")


# --- sessions


def begin_session(connection: Connection, owner: str, agent: str, now_ms: int) -> str:
    """Sign an owner in, and return the session's token; only its hash is kept. The oldest of too many end.

    :raises SignInRefused: the account is closed.
    """
    _require_open(connection, owner)
    connection.execute(sessions.delete().where(sessions.c.expires < now_ms))
    _make_room(connection, sessions, owner, sessions.c.last_seen, SESSIONS_PER_OWNER_MAX)
    token = secrets.token_urlsafe(32)
    connection.execute(sessions.insert().values(
        hash=hash_code(token), owner=owner, agent=clean_text(agent, _AGENT_LENGTH_MAX), created=now_ms,
        last_seen=now_ms, expires=now_ms + SESSION_SECONDS * 1000))
    return token


def find_session(connection: Connection, token: str, now_ms: int) -> SignedIn | None:
    """Return who is signed in by this token, None when nobody is any more."""
    digest = hash_code(token)
    row = connection.execute(
        sa.select(sessions.c.last_seen, sessions.c.expires, sessions.c.created.label("begun"), owners)
        .select_from(sessions.join(owners, sessions.c.owner == owners.c.id))
        .where(sessions.c.hash == digest)).first()
    if row is None or row.expires < now_ms or row.closed is not None or row.begun < row.sessions_from:
        return None
    if not 0 <= now_ms - row.last_seen < _LAST_SEEN_STEP_MS:
        connection.execute(sessions.update().where(sessions.c.hash == digest).values(
            last_seen=now_ms, expires=now_ms + SESSION_SECONDS * 1000))
    return SignedIn(row.id, row.name, bool(row.admin), digest[:_ID_LENGTH])


def list_sessions(connection: Connection, owner: str, now_ms: int) -> list[SessionLine]:
    """Return an owner's sessions, the one used last first."""
    rows = connection.execute(sa.select(sessions).where(sessions.c.owner == owner, sessions.c.expires >= now_ms)
                              .order_by(sessions.c.last_seen.desc()))
    return [SessionLine(id=row.hash[:_ID_LENGTH], agent=row.agent, created=row.created, last_seen=row.last_seen,
                        expires=row.expires) for row in rows]


def end_session(connection: Connection, owner: str, session: str) -> int:
    """End the session of an owner that is called ``session``; return how many that were, 0 or 1."""
    if len(session) != _ID_LENGTH or not session.isalnum():
        return 0
    return connection.execute(sessions.delete().where(
        sessions.c.owner == owner, sessions.c.hash.startswith(session, autoescape=True))).rowcount


def end_sessions_of(connection: Connection, owner: str, now_ms: int) -> int:
    """End all sessions of an owner, and make every link useless; return how many sessions there were."""
    connection.execute(owners.update().where(owners.c.id == owner).values(sessions_from=now_ms))
    connection.execute(sign_in_links.delete().where(sign_in_links.c.owner == owner))
    return connection.execute(sessions.delete().where(sessions.c.owner == owner)).rowcount
