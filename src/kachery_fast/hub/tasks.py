"""Claims on tasks: which node runs what, kept in the registry.

``protocol.claims`` says what becomes of a claim. A change is written only if the row still is the one that was looked
at, so that it holds between several hubs on one database, and it is written before anybody is told. Who loses his
permission loses it with the next request: the grant is read in the transaction that acts on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..config import Settings
from ..errors import HubError, InvalidArgument, InvalidName, RateLimited, TooLarge
from ..protocol import claims
from ..protocol.access import Action
from ..protocol.claims import Claim
from ..protocol.hub_bodies import ClaimTask, FindTask, FinishTask, KeepTasks, TaskClaim
from ..protocol.tasks import check_function, check_task_id
from . import grants
from .gate import require
from .limits import RateLimiter
from .registry import Registry, insert_new
from .tables import task_claims

__all__ = ["TaskBody", "Tasks"]

TaskBody = ClaimTask | KeepTasks | FinishTask | FindTask

REQUESTS_PER_SECOND_MAX = 200
RATE_WINDOW_SECONDS = 10.0
# Ids that are kept alive for the price of one request.
KEPT_PER_UNIT = 100
KEEP_BATCH_MAX = 1_000
# Older builds of SQLite take 999 values in a statement.
_ROWS_AT_ONCE = 500
RECEIPT_SIZE_BYTES_MAX = 64 * 1024
# A calculation is found by its result, and a query asked again gets another id; an action that is forgotten could be
# started once more, by who asks for it under the same id.
CALCULATION_KEPT_SECONDS = 24 * 3600.0
ACTION_KEPT_SECONDS = 366 * 24 * 3600.0
# By one node on one channel, so that none can use up the room of the others.
CLAIMS_PER_NODE_MAX = 1_000_000
PRUNE_INTERVAL_SECONDS = 600.0

_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{40}")
# A row that changes each time it is looked at is a bug, not a race.
_TRIES_MAX = 10


class Tasks:
    """Answers requests about tasks. One for each hub, used on its event loop.

    :param claims_per_node_max: a node with so many on a channel gets no further ones until older ones are forgotten.
    """

    def __init__(self, registry: Registry, settings: Settings, clock: Callable[[], float], *,
                 claims_per_node_max: int = CLAIMS_PER_NODE_MAX) -> None:
        self._registry = registry
        self._clock = clock
        self._lease_ms = int(settings.task_lease_seconds * 1000)
        self._claims_per_node_max = claims_per_node_max
        self._rate = RateLimiter(REQUESTS_PER_SECOND_MAX, RATE_WINDOW_SECONDS)
        self._pruned_at = float("-inf")
        self._full: frozenset[tuple[str, str]] = frozenset()

    async def start(self) -> None:
        """Give who holds a claim the time of one lease to say so: while the hub was away, nobody could keep one."""
        await self._registry.call(_prolong, self._now_ms() + self._lease_ms)

    async def answer(self, body: TaskBody, node_id: str) -> TaskClaim | dict[str, Any]:
        """Answer one request of a node.

        :raises NotPermitted: the node may not do this, or does not hold the task that it says has ended.
        :raises RateLimited: too many in the last seconds, or too many tasks of the node on the channel.
        :raises InvalidName, InvalidArgument, TooLarge, BadMessage, SignatureInvalid: ids or receipt are not right.
        """
        _check(body)
        units = 1 + len(body.tasks) / KEPT_PER_UNIT if isinstance(body, KeepTasks) else 1
        self._rate.spend(node_id, units, self._clock(), who=f"node {node_id[:16]}",
                         limit=f"{REQUESTS_PER_SECOND_MAX} requests about tasks a second are allowed")
        if isinstance(body, KeepTasks):
            return await self._registry.call(_keep, body, node_id, self._now_ms(), self._lease_ms)
        if isinstance(body, FinishTask):
            return await self._registry.call(_finish, body, node_id, self._now_ms())
        if isinstance(body, FindTask):
            return await self._registry.call(_find, body, node_id, self._now_ms())
        if self._clock() - self._pruned_at >= PRUNE_INTERVAL_SECONDS:
            self._pruned_at = self._clock()
            self._full = await self._registry.call(_prune, self._now_ms(), self._claims_per_node_max)
        return await self._registry.call(_claim, body, node_id, self._now_ms(), self._lease_ms,
                                         full=(body.channel, node_id) in self._full)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _check(body: TaskBody) -> None:
    tasks = body.tasks if isinstance(body, KeepTasks) else [body.task]
    if len(tasks) > KEEP_BATCH_MAX:
        raise TooLarge(what="A list of tasks to keep", size=len(tasks), limit=KEEP_BATCH_MAX, setting="tasks a request")
    for task in tasks:
        if _ID.fullmatch(task) is None:
            raise InvalidName(name=task[:100], kind="task", why="its id is 32 or 40 hex digits, in lower case")
    if isinstance(body, ClaimTask):
        check_task_id(body.kind, body.task)
        check_function(body.function)
        if not 16 <= len(body.attempt) <= 64 or not body.attempt.isascii():
            raise InvalidArgument(what="The attempt of a claim is 16 to 64 random characters.")
    if isinstance(body, FinishTask) and body.receipt is not None:
        size = len(msgspec.json.encode(body.receipt))
        if size > RECEIPT_SIZE_BYTES_MAX:
            raise TooLarge(what=f"The receipt of the action {body.task}", size=size, limit=RECEIPT_SIZE_BYTES_MAX,
                           setting="the longest receipt")


# --- within Registry.call


def _claim(connection: Connection, body: ClaimTask, node_id: str, now_ms: int, lease_ms: int, *, full: bool
           ) -> TaskClaim:
    _require(connection, body, node_id, Action.CLAIM_TASK)
    for _ in range(_TRIES_MAX):
        found, revision = _load(connection, body.channel, body.task)
        if found is None and full:
            raise RateLimited(who=f"node {node_id[:16]}", retry_seconds=PRUNE_INTERVAL_SECONDS,
                              limit=f"it has run more tasks on {body.channel!r} than are remembered of one node")
        standing, granted = claims.claim(found, body, node_id, now_ms, lease_ms)
        if standing == found or _save(connection, body.channel, standing, revision, now_ms):
            return claims.describe(standing, body.task, granted=granted)
    raise _too_many_tries(body.task)


def _find(connection: Connection, body: FindTask, node_id: str, now_ms: int) -> TaskClaim:
    _require(connection, body, node_id, Action.FIND_TASK)
    for _ in range(_TRIES_MAX):
        found, revision = _load(connection, body.channel, body.task)
        if found is None:
            return claims.describe(None, body.task)
        standing = claims.look(found, now_ms)
        # A claim that may be given anew need not be written down: whoever held it may still be at it.
        told = standing.state != "unknown" or standing == found
        if told or _save(connection, body.channel, standing, revision, now_ms):
            return claims.describe(standing, body.task)
    raise _too_many_tries(body.task)


def _finish(connection: Connection, body: FinishTask, node_id: str, now_ms: int) -> TaskClaim:
    _require(connection, body, node_id, Action.CLAIM_TASK)
    for _ in range(_TRIES_MAX):
        found, revision = _load(connection, body.channel, body.task)
        standing = claims.finish(found, body, node_id)
        if standing == found or _save(connection, body.channel, standing, revision, now_ms):
            return claims.describe(standing, body.task)
    raise _too_many_tries(body.task)


def _keep(connection: Connection, body: KeepTasks, node_id: str, now_ms: int, lease_ms: int) -> dict[str, Any]:
    _require(connection, body, node_id, Action.CLAIM_TASK)
    held: set[str] = set()
    for start in range(0, len(body.tasks), _ROWS_AT_ONCE):
        theirs = sa.and_(task_claims.c.channel == body.channel,
                         task_claims.c.task.in_(body.tasks[start:start + _ROWS_AT_ONCE]))
        # On the conditions of claims.keep, which is asked afterwards which rows they were.
        connection.execute(
            task_claims.update().where(theirs, task_claims.c.node == node_id, task_claims.c.state == "claimed")
            .values(expires=now_ms + lease_ms, changed=now_ms, revision=task_claims.c.revision + 1))
        rows = connection.execute(sa.select(task_claims).where(theirs))
        held.update(row.task for row in rows if claims.keep(_read(row), node_id, now_ms, lease_ms) is not None)
    return {"lost": sorted(set(body.tasks) - held)}


def _prolong(connection: Connection, expires_ms: int) -> None:
    connection.execute(
        task_claims.update().where(task_claims.c.state == "claimed", task_claims.c.expires < expires_ms)
        .values(expires=expires_ms, revision=task_claims.c.revision + 1))


def _prune(connection: Connection, now_ms: int, claims_per_node_max: int) -> frozenset[tuple[str, str]]:
    """Forget what is old; return the channels and nodes that have too many claims left."""
    older = task_claims.c.changed < now_ms - int(CALCULATION_KEPT_SECONDS * 1000)
    oldest = task_claims.c.changed < now_ms - int(ACTION_KEPT_SECONDS * 1000)
    connection.execute(task_claims.delete().where(sa.or_(oldest, sa.and_(older, task_claims.c.kind != "action"))))
    whose = (task_claims.c.channel, task_claims.c.node)
    rows = connection.execute(sa.select(*whose).group_by(*whose).having(sa.func.count() >= claims_per_node_max))
    return frozenset((str(row.channel), str(row.node)) for row in rows)


def _require(connection: Connection, body: TaskBody, node_id: str, action: Action) -> None:
    require(grants.find_grant(connection, node_id, body.channel), node_id, body.channel, action)


def _load(connection: Connection, channel: str, task: str) -> tuple[Claim | None, int]:
    row = connection.execute(
        sa.select(task_claims).where(task_claims.c.channel == channel, task_claims.c.task == task)).first()
    return (None, 0) if row is None else (_read(row), row.revision)


def _read(row: Any) -> Claim:
    return Claim(
        task=row.task, kind=row.kind, function=row.function, node_id=row.node, attempt=row.attempt,
        idempotent=bool(row.idempotent), state=row.state, claimed_ms=row.claimed, expires_ms=row.expires,
        receipt=None if row.receipt is None else msgspec.json.decode(row.receipt))


def _save(connection: Connection, channel: str, standing: Claim, revision: int, now_ms: int) -> bool:
    """Write a claim in the place of the row of this revision (0: there is none); False: that was not so any more."""
    values = {
        "kind": standing.kind, "function": standing.function, "node": standing.node_id, "attempt": standing.attempt,
        "idempotent": standing.idempotent, "state": standing.state, "claimed": standing.claimed_ms,
        "expires": standing.expires_ms, "changed": now_ms, "revision": revision + 1,
        "receipt": None if standing.receipt is None else msgspec.json.encode(standing.receipt).decode()}
    if revision:
        return connection.execute(
            task_claims.update().where(task_claims.c.channel == channel, task_claims.c.task == standing.task,
                                       task_claims.c.revision == revision).values(**values)).rowcount == 1
    return insert_new(connection, task_claims, channel=channel, task=standing.task, **values)


def _too_many_tries(task: str) -> HubError:
    return HubError(url="the registry", why=f"the task {task} changed each time it was looked at")
