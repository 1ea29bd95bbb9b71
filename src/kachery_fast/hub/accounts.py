"""Which account belongs to whom a provider knows. The functions that take a connection run inside ``Registry.call``.

An account is found by issuer and subject, and by nothing else: an e-mail address can be given to another person, and
one that is not verified can be anybody's.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import AccountTaken, AlreadyExists, IdentityRefused, InvalidArgument, InvalidSetting, NotOnHub
from ..protocol.names import check_owner_id
from .actions import Act, Actor, Answer, At, Done, Request, Scope
from .tables import identities, owners

__all__ = ["IDENTITY_ACTS", "Person", "allowed_addresses", "connect_identity", "owner_of"]

# Addresses that can name an owner. Letters beyond ASCII can look like others, so they name nobody.
_EMAIL = re.compile(r"[a-z0-9.!#$%&*+=?^_`{|}~-]{1,64}@[a-z0-9-]+(\.[a-z0-9-]+)*")
_ALLOWED = re.compile(r"[^\s@,]*@[^\s@,]+")
_WORD_LENGTH = 32


class Person(NamedTuple):
    """Who signed in, by the word of the provider. Issuer and subject together are a name for ever; the rest may change.

    ``email``, ``name``: "" when the provider does not tell.
    """

    issuer: str
    subject: str
    email: str
    email_verified: bool
    name: str


def allowed_addresses(text: str) -> frozenset[str]:
    """Read the setting ``hub_oidc_allowed``: addresses and @domains, in lower case; empty for everybody.

    :raises InvalidSetting: a word of it is neither.
    """
    words = text.replace(",", " ").lower().split()
    for word in words:
        if _ALLOWED.fullmatch(word) is None:
            raise InvalidSetting(name="hub_oidc_allowed", value=word, source="the settings",
                                 why="write an e-mail address, or @example.org for everybody of a domain")
    return frozenset(words)


def owner_of(connection: Connection, person: Person, now_ms: int, allowed: frozenset[str]) -> str:
    """Return the owner that somebody who signed in is; made on the first sign-in.

    :param allowed: who may have an account made, as of ``allowed_addresses``.
    :raises IdentityRefused: the account is closed, or none is made for this person. :raises AccountTaken: there is one
        under this address that is not known to be the same person's.
    """
    known = _find(connection, person.issuer, person.subject)
    if known is not None:
        if known.closed:
            raise IdentityRefused(why=f"the account {known.owner!r} is closed",
                                  advice="An admin of this hub can open it again.")
        return known.owner
    _check_allowed(person, allowed)
    owner = _new_name(person)
    taken = connection.execute(sa.select(owners.c.id).where(sa.func.lower(owners.c.id) == owner)).scalar()
    if taken is not None:
        raise AccountTaken(owner=taken, issuer=person.issuer, subject=person.subject)
    connection.execute(owners.insert().values(id=owner, created=now_ms, name=person.name))
    _insert(connection, person.issuer, person.subject, owner, now_ms)
    return owner


def connect_identity(connection: Connection, owner: str, issuer: str, subject: str, now_ms: int) -> None:
    """Let whom ``issuer`` knows as ``subject`` sign in as ``owner`` from now on.

    :raises NotOnHub: there is no such owner. :raises AlreadyExists: they sign in as another one.
    """
    if connection.execute(sa.select(owners.c.id).where(owners.c.id == owner)).first() is None:
        raise NotOnHub(kind="account", name=owner, advice="Check its spelling.")
    known = _find(connection, issuer, subject)
    if known is None:
        _insert(connection, issuer, subject, owner, now_ms)
    elif known.owner != owner:
        raise AlreadyExists(what=f"An account for {subject!r} of {issuer}, {known.owner!r},",
                            advice="Whom a provider knows has one account.")


class _Known(NamedTuple):
    owner: str
    closed: bool


def _find(connection: Connection, issuer: str, subject: str) -> _Known | None:
    row = connection.execute(
        sa.select(owners.c.id, owners.c.closed).join(identities, identities.c.owner == owners.c.id)
        .where(identities.c.issuer == issuer, identities.c.subject == subject)).first()
    return None if row is None else _Known(row.id, row.closed is not None)


def _insert(connection: Connection, issuer: str, subject: str, owner: str, now_ms: int) -> None:
    connection.execute(identities.insert().values(issuer=issuer, subject=subject, owner=owner, created=now_ms))


def _check_allowed(person: Person, allowed: frozenset[str]) -> None:
    if not allowed:
        return
    email = person.email.lower()
    if not person.email_verified:
        raise IdentityRefused(why=f"only some addresses may have an account here, and {person.issuer} has not verified "
                                  f"{email or 'yours'}", advice="Verify your address there, and sign in again.")
    if not {email, f"@{email.rpartition('@')[2]}"} & allowed:
        raise IdentityRefused(why=f"{email} may not have an account here",
                              advice="Ask an admin of this hub, or sign in with another address.")


def _new_name(person: Person) -> str:
    """Name a new owner: by the verified address, else by a word that no address can be, since it has a colon."""
    email = person.email.lower()
    if person.email_verified and _EMAIL.fullmatch(email):
        return check_owner_id(email)
    # Not by the subject itself: two issuers of one host may both know somebody by it.
    digest = hashlib.sha256(f"{person.issuer}\n{person.subject}".encode("utf-8", "surrogatepass")).hexdigest()
    return check_owner_id(f"{urlsplit(person.issuer).hostname}:{digest[:_WORD_LENGTH]}")


# --- for admins


class ConnectIdentity(Request, tag="connectIdentity"):
    """Let whom the provider ``issuer`` knows as ``subject`` sign in as ``owner``."""

    owner: str
    issuer: str
    subject: str


class IdentityConnected(Answer):
    """An identity that signs in as ``owner``."""

    owner: str
    issuer: str
    subject: str


def _connect(connection: Connection, _actor: Actor, request: ConnectIdentity, at: At) -> Done:
    if not 0 < len(request.issuer) <= 400 or not 0 < len(request.subject) <= 255:
        raise InvalidArgument(what="An issuer has 1 to 400 characters, a subject 1 to 255.")
    connect_identity(connection, request.owner, request.issuer, request.subject, at.now_ms)
    return Done(IdentityConnected(owner=request.owner, issuer=request.issuer, subject=request.subject))


IDENTITY_ACTS = (
    Act(ConnectIdentity, IdentityConnected, Scope.ACCOUNT, _connect, admin=True),
)
