"""Which message belongs on which band, and who may send it and hear it: one row for each kind."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..protocol.access import Permission
from ..protocol.bodies import (
    Assign,
    Cancel,
    Failed,
    Offer,
    Progress,
    Ready,
    RequestFile2022,
    UploadFileStatus2022,
    Want,
)
from ..protocol.feed_bodies import FeedFailed, FeedMessages, FeedShared, FeedSubscribe
from ..protocol.task_bodies import TaskCancel, TaskDeclined, TaskRequest, TaskStatus

__all__ = ["BANDS_HEARD", "HEARD_BY_SELF", "RULES", "Rule", "feed_key", "key_of", "look_at"]


class Rule(NamedTuple):
    """``band``: where it is said. ``permission``: what its sender needs. ``heard_by``: what a node needs to act on it.

    ``key``: the fields that tell whom an answer is for; none: it is a request, for all who may provide.
    """

    band: str
    permission: Permission
    heard_by: Permission
    key: tuple[str, ...] = ()


def feed_key(feed_id: str, subfeed: str) -> str:
    """What a listener to the answers about one subfeed is called."""
    return f"{feed_id}/{subfeed}"


_WANTS_FILE = Rule("requestFiles", Permission.REQUEST_FILES, Permission.PROVIDE_FILES)
_GIVES_FILE = Rule("provideFiles", Permission.PROVIDE_FILES, Permission.REQUEST_FILES, ("request",))
_WANTS_FEED = Rule("requestFeeds", Permission.REQUEST_FEEDS, Permission.PROVIDE_FEEDS)
_GIVES_FEED = Rule("provideFeeds", Permission.PROVIDE_FEEDS, Permission.REQUEST_FEEDS, ("feed_id", "subfeed"))
_WANTS_TASK = Rule("requestTasks", Permission.REQUEST_TASKS, Permission.PROVIDE_TASKS)
_GIVES_TASK = Rule("provideTasks", Permission.PROVIDE_TASKS, Permission.REQUEST_TASKS, ("task",))

RULES: dict[type[Any], Rule] = {
    Want: _WANTS_FILE, Assign: _WANTS_FILE, Cancel: _WANTS_FILE, RequestFile2022: _WANTS_FILE,
    Offer: _GIVES_FILE, Ready: _GIVES_FILE, Progress: _GIVES_FILE, Failed: _GIVES_FILE,
    UploadFileStatus2022: _GIVES_FILE,
    FeedSubscribe: _WANTS_FEED,
    FeedShared: _GIVES_FEED, FeedMessages: _GIVES_FEED, FeedFailed: _GIVES_FEED,
    TaskRequest: _WANTS_TASK, TaskCancel: _WANTS_TASK,
    TaskStatus: _GIVES_TASK, TaskDeclined: _GIVES_TASK,
}

BANDS_HEARD: tuple[tuple[str, Permission], ...] = tuple(dict.fromkeys(
    (rule.band, rule.heard_by) for rule in RULES.values()))
"""The bands that a node subscribes to, and what it needs for each."""

HEARD_BY_SELF = frozenset({TaskRequest, TaskCancel, TaskStatus, TaskDeclined})
"""What a node hears of itself: a task may be run by the very node that asks for it."""

_BY_TAG = {kind.__struct_config__.tag: rule for kind, rule in RULES.items()}
_WIRE_NAMES = {"feed_id": "feedId"}


def key_of(body: Any) -> str:
    """Return whom an answer is for: the key of ``ChannelLink.listen``."""
    return "/".join(str(getattr(body, name)) for name in RULES[type(body)].key)


def look_at(body: dict[str, Any]) -> tuple[Rule | None, str]:
    """Return the rule of a body as it came, and whom it is for; a kind of another version has no rule."""
    tag = body.get("type")
    rule = _BY_TAG.get(tag) if isinstance(tag, str) else None
    if rule is None:
        return None, ""
    return rule, "/".join(str(body.get(_WIRE_NAMES.get(name, name))) for name in rule.key)
