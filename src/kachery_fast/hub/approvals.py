"""How a node becomes somebody's: it asks, shows a short code, and who enters that while signed in says that it is his.

As devices sign in (RFC 8628), except that the node proves itself by its signature, so that what it asks with is no
secret. A code is good for one decision, for a quarter of an hour. The functions run inside ``Registry.call``.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import InvalidArgument, NotOnHub, RateLimited
from ..protocol.access import Permission, parse_permissions
from ..protocol.hub_bodies import ApprovalAsked, ApprovalState, AskApproval, FindApproval
from . import seen
from .channels import find_settings
from .grants import join_names, split_names
from .identity import clean_text, find_node, hash_code
from .limits import RateLimiter
from .registry import Registry
from .tables import approvals, memberships

__all__ = ["Approval", "Approvals", "end_approval", "find_waiting"]

_log = logging.getLogger("kachery_fast.hub")

LIFE_SECONDS = 15 * 60
INTERVAL_SECONDS = 2.0
# RFC 8628, 6.1: no vowels, so no words; no digits, so none to be taken for a letter. 20^10 is 43 bits.
CODE_ALPHABET = "BCDFGHJKLMNPQRSTVWXZ"
CODE_LENGTH = 10
# A lab behind one proxy sets up its machines on one day.
ASKS_PER_MINUTE_MAX = 30
OPEN_PER_ADDRESS_MAX = 100
OPEN_MAX = 10_000
_FINDS_PER_SECOND_MAX = 100
# How an asking ended is remembered for as long, for a node whose user comes back to it.
_KEPT_MS = 24 * 3600 * 1000
WAITING, APPROVED, DENIED, EXPIRED = "waiting", "approved", "denied", "expired"


class Approval(NamedTuple):
    """A node that waits to be somebody's. Times are in ms since the epoch."""

    node_id: str
    label: str
    version: str
    channel: str
    requested: frozenset[Permission]
    address: str
    created: int
    expires: int


class Approvals:
    """Answers nodes that ask to be approved. One for each hub, used on its event loop.

    :param public_url: returns the hub's address as other machines know it, for links.
    """

    def __init__(self, registry: Registry, clock: Callable[[], float], public_url: Callable[[], str]) -> None:
        self._registry = registry
        self._clock = clock
        self._public_url = public_url
        self._asks = RateLimiter(ASKS_PER_MINUTE_MAX / 60, 60.0)
        self._finds = RateLimiter(_FINDS_PER_SECOND_MAX, 10.0)
        # Twice what a node does that keeps to the interval.
        self._finds_of_node = RateLimiter(2 / INTERVAL_SECONDS, 10 * INTERVAL_SECONDS)

    async def answer(
        self, body: AskApproval | FindApproval, node_id: str, address: str
    ) -> ApprovalAsked | ApprovalState | None:
        """Answer a node that has proved its key; None: another hub has received this very request to be approved.

        :param address: whom to count the request against.
        :raises RateLimited: too many from there. :raises NotOnHub: there is no such channel.
        :raises InvalidArgument, InvalidName: the permissions make no sense.
        """
        now = self._clock()
        if isinstance(body, FindApproval):
            self._finds.spend(address, 1, now, who=f"address {address}",
                              limit=f"{_FINDS_PER_SECOND_MAX} questions about approvals a second are allowed")
            self._finds_of_node.spend(node_id, 1, now, who=f"node {node_id[:16]}",
                                      limit=f"a node is to wait {INTERVAL_SECONDS:g} s between two questions")
            return await self._registry.call(_state_of, node_id, body.channel, int(now * 1000))
        self._asks.spend(address, 1, now, who=f"address {address}",
                         limit=f"{ASKS_PER_MINUTE_MAX} requests for approval are allowed in a minute")
        opened = await self._registry.call(
            _open, node_id, body, address, int(now * 1000), shared=self._registry.shared)
        if opened is None:
            return None
        code, expires = opened
        _log.info("node %s asks to be approved, from %s", node_id[:16], address)
        return ApprovalAsked(code=code, link=f"{self._public_url()}/approve?code={code}", expires=expires,
                             interval=INTERVAL_SECONDS)


def find_waiting(connection: Connection, code: str, now_ms: int) -> Approval:
    """Return the node that shows ``code``, in whichever case and with or without its hyphen.

    :raises NotOnHub: none does: the code is wrong, spent, replaced by a newer one, or has expired.
    """
    digest = hash_code(_plain(code))
    row = connection.execute(sa.select(approvals).where(
        approvals.c.code == digest, approvals.c.state == WAITING, approvals.c.expires > now_ms)).first()
    if row is None:
        raise NotOnHub(kind="node that waits with the code", name=clean_text(code)[:20], advice=(
            "Codes hold for a quarter of an hour and are used once. Look at the machine again, or run there anew: "
            "kachery-fast node join HUB_URL"))
    return Approval(row.node, row.label, row.version, row.channel, split_names(row.requested), row.address, row.created,
                    row.expires)


def end_approval(connection: Connection, approval: Approval, *, approved: bool) -> None:
    """Tell the node how it ended; the code is spent."""
    connection.execute(approvals.update().where(approvals.c.node == approval.node_id)
                       .values(state=APPROVED if approved else DENIED))


def _open(
    connection: Connection, node_id: str, body: AskApproval, address: str, now_ms: int, *, shared: bool
) -> tuple[str, int] | None:
    """Make a code for a node; return it and when it expires. None: any hub has seen this request before."""
    if shared and not seen.remember(connection, node_id, body.id, body.time):
        return None
    requested = parse_permissions(body.permissions)
    if bool(body.channel) != bool(requested):
        raise InvalidArgument(what="Who asks for a channel names permissions on it, and who asks for none names none.")
    if body.channel:
        find_settings(connection, body.channel)
    over = sa.or_(approvals.c.created < now_ms - _KEPT_MS,
                  sa.and_(approvals.c.state == WAITING, approvals.c.expires <= now_ms))
    connection.execute(approvals.delete().where(sa.or_(approvals.c.node == node_id, over)))
    waiting = approvals.c.state == WAITING
    here, everywhere = connection.execute(sa.select(
        sa.func.count().filter(waiting, approvals.c.address == address), sa.func.count()).select_from(approvals)).one()
    for count, limit, whose in ((here, OPEN_PER_ADDRESS_MAX, f"from {address}"), (everywhere, OPEN_MAX, "at this hub")):
        if count >= limit:
            raise RateLimited(who=f"node {node_id[:16]}", retry_seconds=LIFE_SECONDS, limit=(
                f"{limit} nodes may wait to be approved {whose}"))
    code = _make_code()
    expires = now_ms + LIFE_SECONDS * 1000
    connection.execute(approvals.insert().values(
        code=hash_code(_plain(code)), node=node_id, label=clean_text(body.label), version=clean_text(body.version),
        channel=body.channel, requested=join_names(requested), address=address[:50], state=WAITING, created=now_ms,
        expires=expires))
    return code, expires


def _state_of(connection: Connection, node_id: str, channel: str, now_ms: int) -> ApprovalState:
    node = find_node(connection, node_id)
    owner = node.owner if node is not None else ""
    standing = connection.execute(sa.select(memberships.c.state).where(
        memberships.c.channel == channel, memberships.c.node == node_id, memberships.c.owner == owner)).scalar()
    row = connection.execute(sa.select(approvals.c.state, approvals.c.expires).where(
        approvals.c.node == node_id)).first()
    over = row is None or (row.state == WAITING and row.expires <= now_ms)
    return ApprovalState(state=EXPIRED if over or row is None else row.state, owner=owner, standing=standing or "")


def _make_code() -> str:
    letters = "".join(secrets.choice(CODE_ALPHABET) for _ in range(CODE_LENGTH))
    return f"{letters[:CODE_LENGTH // 2]}-{letters[CODE_LENGTH // 2:]}"


def _plain(code: str) -> str:
    return "".join(letter for letter in code.upper() if letter in CODE_ALPHABET)
