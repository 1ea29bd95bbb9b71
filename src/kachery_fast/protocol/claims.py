"""Who may run a task: the rules by which the hub gives claims.

A claim is a row at the hub. The functions here say what becomes of it; the hub makes each change only if the row still
is what they looked at, so of any number of nodes that claim a task at once exactly one is told yes.

A claim that is not kept alive lapses when its time is over. What has lapsed may be claimed anew where a second run
does no harm: a calculation, a query, an action that both claims declare idempotent. Any other action becomes
``unknown`` as soon as somebody asks for it, and stays so: a receipt that arrives later says how it ended, but nothing
starts it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import InvalidArgument, NotPermitted
from .hub_bodies import ClaimTask, FinishTask, TaskClaim
from .tasks import check_receipt

__all__ = ["Claim", "claim", "describe", "finish", "keep", "look"]


@dataclass(frozen=True)
class Claim:
    """What is known of a task that was claimed. Times are the hub's, milliseconds since the epoch.

    ``state`` is ``claimed`` or one of ``FinishTask.STATES``; ``attempt`` tells the repetition of a claim from a second
    one.
    """

    task: str
    kind: str
    function: str
    node_id: str
    attempt: str
    idempotent: bool
    state: str
    claimed_ms: int
    expires_ms: int
    receipt: dict[str, Any] | None = None

    @property
    def repeatable(self) -> bool:
        """Whether the task may be started again when it is not known how it ended."""
        return self.kind != "action" or self.idempotent


def look(found: Claim, now_ms: int) -> Claim:
    """Return how a task stands now. When it has become ``unknown``, that must be written down before it is told."""
    if found.state != "claimed" or now_ms < found.expires_ms:
        return found
    return replace(found, state="released" if found.repeatable else "unknown")


def claim(found: Claim | None, asked: ClaimTask, node_id: str, now_ms: int, lease_ms: int) -> tuple[Claim, bool]:
    """Decide on a claim; return what is to be written down, and whether ``node_id`` holds the task from now on.

    :param found: what is known of the task, None when nothing is.
    """
    fresh = Claim(asked.task, asked.kind, asked.function, node_id, asked.attempt, asked.idempotent, "claimed", now_ms,
                  now_ms + lease_ms)
    if found is None:
        return fresh, True
    harmless = found.repeatable and fresh.repeatable and found.kind == asked.kind
    if found.state == "claimed" and now_ms < found.expires_ms:
        # Who claims again what it holds has not heard the answer (the same attempt), or forgotten it (a new one).
        same_attempt = found.kind == asked.kind and found.attempt == asked.attempt != ""
        granted = found.node_id == node_id and (harmless or same_attempt)
        return (fresh, True) if granted else (found, False)
    if found.state in ("finished", "failed"):
        # A calculation whose result is gone from the bucket, or that failed, may be asked for again.
        granted = found.kind == asked.kind == "pure-calculation"
    elif found.kind == "action" and found.state != "released":
        granted = harmless
        if not granted:  # it may have begun, and may not begin again
            found = replace(found, state="unknown", idempotent=False)
    else:
        granted = True
    return (fresh, True) if granted else (found, False)


def keep(found: Claim, node_id: str, now_ms: int, lease_ms: int) -> Claim | None:
    """Keep a claim alive, also one that has lapsed if nobody has noticed; None: the node does not hold it."""
    if found.state != "claimed" or found.node_id != node_id:
        return None
    return replace(found, expires_ms=now_ms + lease_ms)


def finish(found: Claim | None, asked: FinishTask, node_id: str) -> Claim:
    """Take down how a task ended, by the word of the node that claimed it; the first end that is known holds.

    :raises NotPermitted: the node does not hold the claim.
    :raises InvalidArgument: the receipt of an action is missing, or of another function, node or outcome.
    :raises BadMessage, SignatureInvalid: it is none of this task, or forged.
    """
    if found is None or found.node_id != node_id:
        why = "nobody has claimed it" if found is None else f"the node {found.node_id[:16]} has claimed it"
        raise NotPermitted(who=f"node {node_id[:16]}", action=f"say how the task {asked.task} ended",
                           channel=asked.channel, why=why)
    if found.kind != "action":
        return found if found.state in ("finished", "failed") else replace(found, state=asked.state)
    if asked.state == "released" and asked.attempt != found.attempt:
        return found  # it was on its way for so long that the node has claimed the action anew, and may have begun it
    if asked.state in ("finished", "failed"):
        _check_receipt(found, asked)
    if found.state in ("finished", "failed") or (found.state, asked.state) == ("unknown", "released"):
        return found
    receipt = asked.receipt if asked.state in ("finished", "failed") else None
    return replace(found, state=asked.state, receipt=receipt)


def _check_receipt(found: Claim, asked: FinishTask) -> None:
    if asked.receipt is None:
        raise InvalidArgument(what=f"The end of the action {asked.task} needs its receipt.")
    receipt = check_receipt(asked.receipt, asked.channel, asked.task)
    outcome = "finished" if asked.state == "finished" else "error"
    if (receipt.node_id, receipt.function, receipt.outcome) != (found.node_id, found.function, outcome):
        raise InvalidArgument(what=f"The receipt of the action {asked.task} is of another node, function or outcome.")


def describe(found: Claim | None, task: str, *, granted: bool = False) -> TaskClaim:
    """Put it as nodes are told."""
    if found is None:
        return TaskClaim(task=task, state="none")
    return TaskClaim(
        task=task, state=found.state, granted=granted, node_id=found.node_id, function=found.function,
        kind=found.kind, claimed=found.claimed_ms, expires=found.expires_ms, receipt=found.receipt)
