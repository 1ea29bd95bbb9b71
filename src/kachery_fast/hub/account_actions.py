"""What people do with their accounts: tokens, sessions, the audit log; and what admins do with those of others."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import ActionRefused, AlreadyExists, InvalidArgument, NotOnHub
from ..protocol.names import check_owner_id
from . import audit, channels, identity, sessions
from .actions import Act, Actor, Answer, At, Done, Request, Scope
from .tables import channels as channel_rows
from .tables import identities, nodes, owner_tokens, owners

__all__ = ["ACCOUNT_ACTS", "AccountView"]

TOKENS_PER_OWNER_MAX = 100
TOKEN_DAYS_MAX = 3650.0
NAME_LENGTH_MAX = 100
AUDIT_ENTRIES_MAX = 200
_DAY_MS = 24 * 3600 * 1000


# --- requests


class ShowAccount(Request, tag="showAccount"):
    """My account: how I sign in, where I am signed in, and my tokens."""


class ChangeAccount(Request, tag="changeAccount"):
    """How I am called."""

    name: str


class MakeToken(Request, tag="makeToken"):
    """Make a token for a script: ``name`` says what for, ``scopes`` what it opens, ``days`` how long it holds (null:
    until it is revoked), ``channel`` the only channel that it is for (null: all).
    """

    name: str
    scopes: list[Scope]
    days: float | None = 365.0
    channel: str | None = None


class RevokeToken(Request, tag="revokeToken"):
    """Make the token ``token`` (its id, as showAccount gives it) useless."""

    token: str


class EndSession(Request, tag="endSession"):
    """End the session ``session`` (its id, as showAccount gives it)."""

    session: str


class EndSessions(Request, tag="endSessions"):
    """Sign me out everywhere."""


class ShowAudit(Request, tag="showAudit"):
    """Who changed what when, newest first: of ``channel`` (mine), or all that I did; for an admin with ``everything``
    all that anybody did. ``before``: only entries with a smaller id.
    """

    channel: str | None = None
    everything: bool = False
    before: int | None = None
    limit: int = 100


class ListAccounts(Request, tag="listAccounts"):
    """All accounts. For admins."""


class AddAccount(Request, tag="addAccount"):
    """Make an account for somebody, or a new sign-in link for one that there is. For admins."""

    owner: str


class CloseAccount(Request, tag="closeAccount"):
    """Close an account: its sessions end, its tokens open nothing. Its channels and nodes go on. For admins."""

    owner: str


class ReopenAccount(Request, tag="reopenAccount"):
    """Open a closed account again. For admins."""

    owner: str


class SetAdmin(Request, tag="setAdmin"):
    """Make somebody an admin of this hub, or not one any more. For admins."""

    owner: str
    admin: bool


# --- answers


class TokenLine(Answer):
    """A token; ``id`` is the beginning of its hash. Times in ms, null: never."""

    id: str
    name: str
    scopes: list[str]
    channel: str | None
    created: int
    expires: int | None
    last_used: int | None


class IdentityLine(Answer):
    """A provider by which somebody signs in."""

    issuer: str
    subject: str


class AccountView(Answer):
    """An account, as its owner sees it."""

    owner: str
    name: str
    admin: bool
    created: int
    identities: list[IdentityLine]
    sessions: list[sessions.SessionLine]
    tokens: list[TokenLine]


class TokenMade(Answer):
    """A new token. It is shown this once."""

    id: str
    token: str
    expires: int | None


class Ended(Answer):
    """How many there were."""

    ended: int


class AuditLog(Answer):
    """Entries, newest first."""

    entries: list[audit.Entry]


class AccountLine(Answer):
    """An account in the list of all. ``closed``: since when (ms), null when it is open."""

    owner: str
    name: str
    admin: bool
    created: int
    closed: int | None
    channels: int
    nodes: int


class AccountList(Answer):
    """All accounts."""

    accounts: list[AccountLine]


class SignInLink(Answer):
    """A link that signs somebody in once, within a day."""

    owner: str
    link: str


class AccountChanged(Answer):
    """An account as it is now."""

    owner: str
    closed: int | None
    admin: bool


# --- how they are performed


def _show(connection: Connection, actor: Actor, request: ShowAccount, at: At) -> Done:
    row = connection.execute(sa.select(owners).where(owners.c.id == actor.owner)).one()
    tokens = connection.execute(
        sa.select(owner_tokens).where(owner_tokens.c.owner == actor.owner).order_by(owner_tokens.c.created.desc()))
    known = connection.execute(sa.select(identities).where(identities.c.owner == actor.owner))
    return Done(AccountView(
        owner=row.id, name=row.name, admin=bool(row.admin), created=row.created,
        identities=[IdentityLine(issuer=found.issuer, subject=found.subject) for found in known],
        sessions=sessions.list_sessions(connection, actor.owner, at.now_ms),
        tokens=[TokenLine(
            id=token.hash[:identity.TOKEN_ID_LENGTH], name=token.name, scopes=token.scope.split(),
            channel=token.channel, created=token.created, expires=token.expires, last_used=token.last_used)
            for token in tokens]))


def _change(connection: Connection, actor: Actor, request: ChangeAccount, at: At) -> Done:
    name = "".join(character for character in request.name if character.isprintable()).strip()
    if len(name) > NAME_LENGTH_MAX:
        raise InvalidArgument(what=f"A name has up to {NAME_LENGTH_MAX} characters, not {len(name)}.")
    connection.execute(owners.update().where(owners.c.id == actor.owner).values(name=name))
    return _show(connection, actor, ShowAccount(), at)


def _make_token(connection: Connection, actor: Actor, request: MakeToken, at: At) -> Done:
    scopes = frozenset(request.scopes)
    if not scopes or not request.name.strip() or len(request.name) > NAME_LENGTH_MAX:
        raise InvalidArgument(what=f"A token takes a name of up to {NAME_LENGTH_MAX} characters, and at least one of "
                                   f"the scopes {', '.join(Scope)}.")
    if not scopes <= actor.scopes or (actor.channel is not None and request.channel != actor.channel):
        raise ActionRefused(who=actor.owner, action="makeToken", why="a token cannot make one that opens more")
    if request.days is not None and not 0 < request.days <= TOKEN_DAYS_MAX:
        raise InvalidArgument(what=f"A token holds for up to {TOKEN_DAYS_MAX:g} days, not {request.days:g}.")
    if request.channel is not None:
        channels.require_channel(connection, request.channel, actor.owner, "make a token for it")
    count = connection.execute(sa.select(sa.func.count()).select_from(owner_tokens).where(
        owner_tokens.c.owner == actor.owner)).scalar_one()
    if count >= TOKENS_PER_OWNER_MAX:
        raise InvalidArgument(what=f"You have {count} tokens; revoke some first.")
    token = secrets.token_urlsafe(32)
    digest = identity.hash_code(token)
    expires = None if request.days is None else at.now_ms + int(request.days * _DAY_MS)
    connection.execute(owner_tokens.insert().values(
        hash=digest, owner=actor.owner, created=at.now_ms, name=request.name.strip(), channel=request.channel,
        scope=" ".join(sorted(scope.value for scope in scopes)), expires=expires))
    return Done(TokenMade(id=digest[:identity.TOKEN_ID_LENGTH], token=token, expires=expires))


def _revoke_token(connection: Connection, actor: Actor, request: RevokeToken, at: At) -> Done:
    if len(request.token) != identity.TOKEN_ID_LENGTH or not request.token.isalnum():
        raise InvalidArgument(what=f"A token's id has {identity.TOKEN_ID_LENGTH} hex digits.")
    ended = connection.execute(owner_tokens.delete().where(
        owner_tokens.c.owner == actor.owner,
        owner_tokens.c.hash.startswith(request.token, autoescape=True))).rowcount
    return Done(Ended(ended=ended))


def _end_session(connection: Connection, actor: Actor, request: EndSession, at: At) -> Done:
    return Done(Ended(ended=sessions.end_session(connection, actor.owner, request.session)))


def _end_sessions(connection: Connection, actor: Actor, request: EndSessions, at: At) -> Done:
    return Done(Ended(ended=sessions.end_sessions_of(connection, actor.owner, at.now_ms)))


def _audit(connection: Connection, actor: Actor, request: ShowAudit, at: At) -> Done:
    limit = max(1, min(request.limit, AUDIT_ENTRIES_MAX))
    owner: str | None = actor.owner
    if request.everything:
        if not connection.execute(sa.select(owners.c.admin).where(owners.c.id == actor.owner)).scalar():
            raise ActionRefused(who=actor.owner, action="showAudit", why="that is for the hub's admins")
        owner = None
    if request.channel is not None:
        channels.require_channel(connection, request.channel, actor.owner, "see its audit log")
        owner = None
    return Done(AuditLog(entries=audit.entries_of(
        connection, owner=owner, channel=request.channel, before=request.before, limit=limit)))


# --- of admins


def _list_accounts(connection: Connection, actor: Actor, request: ListAccounts, at: At) -> Done:
    def count(table: sa.Table, *which: sa.ColumnElement[bool]) -> sa.Label[int]:
        return sa.select(sa.func.count()).select_from(table).where(
            table.c.owner == owners.c.id, *which).scalar_subquery().label(table.name)

    rows = connection.execute(sa.select(
        owners, count(channel_rows), count(nodes, nodes.c.forgotten.is_(None))).order_by(owners.c.id))
    return Done(AccountList(accounts=[AccountLine(
        owner=row.id, name=row.name, admin=bool(row.admin), created=row.created, closed=row.closed,
        channels=row.channels, nodes=row.nodes) for row in rows]))


def _add_account(connection: Connection, actor: Actor, request: AddAccount, at: At) -> Done:
    check_owner_id(request.owner)
    folded = connection.execute(sa.select(owners.c.id).where(
        sa.func.lower(owners.c.id) == request.owner.lower())).scalar()
    if folded not in (None, request.owner):
        raise AlreadyExists(what=f"The account {folded!r}", advice="Names of accounts differ in more than case.")
    identity.ensure_owner(connection, request.owner, at.now_ms)
    code = sessions.make_link(connection, request.owner, at.now_ms)
    return Done(SignInLink(owner=request.owner, link=f"{at.hub_url}/sign-in/{code}"))


def _close_account(connection: Connection, actor: Actor, request: CloseAccount, at: At) -> Done:
    if request.owner == actor.owner:
        raise InvalidArgument(what="You cannot close the account that you are using; another admin can.")
    done = _set(connection, request.owner, closed=at.now_ms)
    sessions.end_sessions_of(connection, request.owner, at.now_ms)
    return done


def _reopen_account(connection: Connection, actor: Actor, request: ReopenAccount, at: At) -> Done:
    return _set(connection, request.owner, closed=None)


def _set_admin(connection: Connection, actor: Actor, request: SetAdmin, at: At) -> Done:
    if request.owner == actor.owner:
        raise InvalidArgument(what="You cannot change this of your own account; another admin can.")
    return _set(connection, request.owner, admin=request.admin)


def _set(connection: Connection, owner: str, **values: object) -> Done:
    if not connection.execute(owners.update().where(owners.c.id == owner).values(**values)).rowcount:
        raise NotOnHub(kind="account", name=owner, advice="See the list of accounts.")
    row = connection.execute(sa.select(owners).where(owners.c.id == owner)).one()
    return Done(AccountChanged(owner=owner, closed=row.closed, admin=bool(row.admin)))


ACCOUNT_ACTS = (
    Act(ShowAccount, AccountView, Scope.ACCOUNT, _show, changes=False),
    Act(ChangeAccount, AccountView, Scope.ACCOUNT, _change),
    Act(MakeToken, TokenMade, Scope.ACCOUNT, _make_token),
    Act(RevokeToken, Ended, Scope.ACCOUNT, _revoke_token),
    Act(EndSession, Ended, Scope.ACCOUNT, _end_session),
    Act(EndSessions, Ended, Scope.ACCOUNT, _end_sessions),
    Act(ShowAudit, AuditLog, Scope.READ, _audit, changes=False),
    Act(ListAccounts, AccountList, Scope.ACCOUNT, _list_accounts, changes=False, admin=True),
    Act(AddAccount, SignInLink, Scope.ACCOUNT, _add_account, admin=True),
    Act(CloseAccount, AccountChanged, Scope.ACCOUNT, _close_account, admin=True),
    Act(ReopenAccount, AccountChanged, Scope.ACCOUNT, _reopen_account, admin=True),
    Act(SetAdmin, AccountChanged, Scope.ACCOUNT, _set_admin, admin=True),
)
