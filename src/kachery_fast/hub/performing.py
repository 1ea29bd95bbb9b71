"""Performs people's actions: checks account and scope, writes the audit log, and does what a transaction cannot."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import ActionRefused
from . import audit
from .account_actions import ACCOUNT_ACTS
from .accounts import IDENTITY_ACTS
from .actions import Act, Actor, Answer, At, Done, Outside, Request
from .bucket_actions import BUCKET_ACTS
from .buckets import EngineRow
from .channel_actions import CHANNEL_ACTS
from .directory_actions import DIRECTORY_ACTS
from .engine_actions import ENGINE_ACTS
from .gcs_actions import GCS_ACTS
from .limits import RateLimiter
from .move_actions import MOVE_ACTS
from .node_actions import NODE_ACTS
from .pubsub_actions import PUBSUB_ACTS
from .pubsubs import find_pubsubs
from .registry import Registry
from .tables import owners
from .traffic_actions import TRAFFIC_ACTS
from .trying import TRYING_ACTS

__all__ = ["ACTS", "ACTS_BY_NAME", "Performer"]

_log = logging.getLogger("kachery_fast.hub")

ACTS: dict[type[Request], Act] = {
    act.request: act for act in (
        *CHANNEL_ACTS, *BUCKET_ACTS, *TRAFFIC_ACTS, *ENGINE_ACTS, *GCS_ACTS, *DIRECTORY_ACTS, *PUBSUB_ACTS, *MOVE_ACTS,
        *TRYING_ACTS, *NODE_ACTS, *ACCOUNT_ACTS, *IDENTITY_ACTS)}
ACTS_BY_NAME: dict[str, Act] = {act.name: act for act in ACTS.values()}

CODE_FAILURES_PER_MINUTE_MAX = 10


class Performer:
    """Performs actions. One for each hub, used on its event loop.

    :param outside: what second steps work on.
    :param public_url: returns the hub's address as other machines know it, for links.
    :param channels_changed: awaited when channels came, went, or became public or private.
    """

    def __init__(
        self, registry: Registry, outside: Outside, clock: Callable[[], float], public_url: Callable[[], str],
        channels_changed: Callable[[], Awaitable[None]],
    ) -> None:
        self._registry = registry
        self._outside = outside
        self._clock = clock
        self._public_url = public_url
        self._guesses = RateLimiter(CODE_FAILURES_PER_MINUTE_MAX / 60, 60.0)
        self._channels_changed = channels_changed

    async def perform(self, actor: Actor, request: Request) -> Answer:
        """Do what somebody, known by now, asks.

        :raises ActionRefused: the token is for something else, the account is closed, or it is not an admin's.
        :raises RateLimited: too many wrong codes. :raises KacheryError: it cannot be done.
        """
        act = ACTS[type(request)]
        _check_scope(act, actor, request)
        at = At(int(self._clock() * 1000), self._public_url(), self._outside.buckets.vault)
        if act.by_code:  # taken beforehand, so that many guesses at once are counted too
            self._guesses.spend(actor.owner, 1, self._clock(), who=actor.owner,
                                limit=f"{CODE_FAILURES_PER_MINUTE_MAX} wrong codes are allowed in a minute")
        if act.first is not None:
            await act.first(request, self._outside)
        done, services = await self._registry.call(_perform, act, actor, request, at)
        if act.by_code:
            self._guesses.refund(actor.owner, 1, self._clock())
        if done.channels_changed:
            await self._channels_changed()  # before the objects of one that is gone are removed, which takes a while
        await self._outside.pubsubs.revoke(services, done.cut)
        answer = done.answer if isinstance(done.answer, Answer) else await done.answer(self._outside)
        if act.changes:
            _log.info("%s (%s): %s %s", actor.owner, actor.via, act.name, getattr(request, "channel", ""))
        return answer


def _check_scope(act: Act, actor: Actor, request: Request) -> None:
    if act.scope not in actor.scopes:
        raise ActionRefused(who=actor.owner, action=act.name, why=f"the token is not for {act.scope.value!r}")
    if actor.channel is not None and getattr(request, "channel", None) != actor.channel:
        raise ActionRefused(who=actor.owner, action=act.name, why=f"the token is for the channel {actor.channel!r}")


def _perform(
    connection: Connection, act: Act, actor: Actor, request: Request, at: At
) -> tuple[Done, set[EngineRow | None]]:
    row = connection.execute(sa.select(owners.c.closed, owners.c.admin).where(owners.c.id == actor.owner)).first()
    if row is None or row.closed is not None:
        raise ActionRefused(who=actor.owner, action=act.name, why="the account is closed")
    if act.admin and not row.admin:
        raise ActionRefused(who=actor.owner, action=act.name, why="that is for the hub's admins")
    channel = getattr(request, "channel", None)
    before: set[EngineRow | None] = find_pubsubs(connection, [channel]) if channel and act.changes else set()
    done = act.perform(connection, actor, request, at)
    services = before | find_pubsubs(connection, done.left) or {None}
    if act.changes:
        audit.note(connection, actor, act.name, request, at.now_ms, done.node)
    return done, services
