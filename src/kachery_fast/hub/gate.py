"""The gate that every request of a node passes: ``protocol.access`` decides, a refusal becomes an error."""

from __future__ import annotations

from ..errors import NotPermitted
from ..protocol.access import Action, Deny, Grant, decide

__all__ = ["require"]


def require(grant: Grant | None, node_id: str, channel: str, action: Action) -> Grant:
    """Return the grant by which ``node_id`` may do this on ``channel``.

    :param grant: the node's standing as read for this request, None when it is no member.
    :raises NotPermitted: it may not.
    """
    decision = decide(grant, action)
    if isinstance(decision, Deny):
        raise NotPermitted(who=f"node {node_id[:16]}", action=action.value, channel=channel, why=decision.reason)
    assert grant is not None, "nobody is allowed anything without a grant"
    return grant
