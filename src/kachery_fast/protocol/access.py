"""Who may do what on a channel.

Permissions belong to (node id, owner, channel) together and are the intersection of what the node's owner asks for and
what the channel's owner grants. Each of the six opens two bands and, for providers, uploads of one kind of object
(the table of the original's node documentation).
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from ..errors import InvalidName
from .names import band_name

__all__ = ["Action", "Allow", "Deny", "Grant", "Permission", "band_capability", "decide", "parse_permissions"]


class Permission(str, Enum):
    """The six permissions; the values are those of the wire format."""

    REQUEST_FILES = "requestFiles"
    PROVIDE_FILES = "provideFiles"
    REQUEST_FEEDS = "requestFeeds"
    PROVIDE_FEEDS = "provideFeeds"
    REQUEST_TASKS = "requestTasks"
    PROVIDE_TASKS = "provideTasks"


class Action(str, Enum):
    """What a node can try to do on a channel."""

    SEE_CHANNEL = "see the channel"
    CONNECT = "connect to the channel's bands"
    REQUEST_FILES = "request files"
    PROVIDE_FILES = "provide files"
    UPLOAD_FILE = "upload files"
    READ_FILE = "read files"
    LOOK_FOR_FILE = "look for files"
    REPORT_CORRUPT = "report a damaged object"
    REQUEST_FEEDS = "request feeds"
    PROVIDE_FEEDS = "provide feeds"
    UPLOAD_FEED = "upload feeds"
    READ_SEGMENT = "read feeds"
    READ_INDEX = "read the indexes of feeds"
    REPORT_SEGMENT = "report a damaged segment of a feed"
    REQUEST_TASKS = "request tasks"
    PROVIDE_TASKS = "provide tasks"
    CLAIM_TASK = "run tasks"
    FIND_TASK = "see how tasks stand"
    UPLOAD_RESULT = "upload results of tasks"
    READ_RESULT = "read results of tasks"
    REPORT_RESULT = "report the result of a task"


_ANY = frozenset(Permission)
_TASKS = frozenset({Permission.REQUEST_TASKS, Permission.PROVIDE_TASKS})

# An action is allowed when at least one of these permissions is in force.
_NEEDS: dict[Action, frozenset[Permission]] = {
    Action.SEE_CHANNEL: _ANY,
    Action.CONNECT: _ANY,
    Action.REQUEST_FILES: frozenset({Permission.REQUEST_FILES}),
    Action.PROVIDE_FILES: frozenset({Permission.PROVIDE_FILES}),
    Action.UPLOAD_FILE: frozenset({Permission.PROVIDE_FILES}),
    Action.READ_FILE: frozenset({Permission.REQUEST_FILES}),
    # Who uploads looks whether it is there already.
    Action.LOOK_FOR_FILE: frozenset({Permission.REQUEST_FILES, Permission.PROVIDE_FILES}),
    Action.REPORT_CORRUPT: frozenset({Permission.REQUEST_FILES}),
    Action.REQUEST_FEEDS: frozenset({Permission.REQUEST_FEEDS}),
    Action.PROVIDE_FEEDS: frozenset({Permission.PROVIDE_FEEDS}),
    Action.UPLOAD_FEED: frozenset({Permission.PROVIDE_FEEDS}),
    Action.READ_SEGMENT: frozenset({Permission.REQUEST_FEEDS}),
    # Who shares a feed reads the index of what was shared before.
    Action.READ_INDEX: frozenset({Permission.REQUEST_FEEDS, Permission.PROVIDE_FEEDS}),
    Action.REPORT_SEGMENT: frozenset({Permission.REQUEST_FEEDS}),
    Action.REQUEST_TASKS: frozenset({Permission.REQUEST_TASKS}),
    Action.PROVIDE_TASKS: frozenset({Permission.PROVIDE_TASKS}),
    Action.CLAIM_TASK: frozenset({Permission.PROVIDE_TASKS}),
    Action.FIND_TASK: _TASKS,
    Action.UPLOAD_RESULT: frozenset({Permission.PROVIDE_TASKS}),
    # Who runs tasks looks whether there is a result already.
    Action.READ_RESULT: _TASKS,
    Action.REPORT_RESULT: _TASKS,
}

# Permission -> ((kind of band, operation), ...)
_BANDS: dict[Permission, tuple[tuple[str, str], ...]] = {
    Permission.REQUEST_FILES: (("requestFiles", "publish"), ("provideFiles", "subscribe")),
    Permission.PROVIDE_FILES: (("requestFiles", "subscribe"), ("provideFiles", "publish")),
    Permission.REQUEST_FEEDS: (("requestFeeds", "publish"), ("provideFeeds", "subscribe")),
    Permission.PROVIDE_FEEDS: (("requestFeeds", "subscribe"), ("provideFeeds", "publish")),
    Permission.REQUEST_TASKS: (("requestTasks", "publish"), ("provideTasks", "subscribe")),
    Permission.PROVIDE_TASKS: (("requestTasks", "subscribe"), ("provideTasks", "publish")),
}


class Grant(NamedTuple):
    """One node's standing on one channel; ``None`` in its place means that it is no member."""

    node_id: str
    owner_id: str
    channel: str
    requested: frozenset[Permission]
    granted: frozenset[Permission]

    @property
    def permissions(self) -> frozenset[Permission]:
        """What is in force: requested and granted."""
        return self.requested & self.granted


class Allow(NamedTuple):
    """The action may go on."""


class Deny(NamedTuple):
    """The action may not go on; ``reason`` completes "... may not request files on the channel 'lab': "."""

    reason: str


def decide(grant: Grant | None, action: Action) -> Allow | Deny:
    """Decide on one action of one node. Pure; the caller supplies the grant that is in force now."""
    if grant is None:
        return Deny("the node is not a member of the channel")
    needed = _NEEDS[action]
    if needed & grant.permissions:
        return Allow()
    if needed == _ANY:
        return Deny("no permission is in force for this node")
    names = " or ".join(sorted(permission.value for permission in needed))
    if needed & grant.requested:
        return Deny(f"the channel's owner has not granted {names}")
    if needed & grant.granted:
        return Deny(f"the node's owner has not asked for {names}")
    return Deny(f"{names} is neither asked for nor granted")


def band_capability(grant: Grant | None) -> dict[str, list[str]]:
    """What a node may do on each band: ``{"lab-requestFiles": ["publish"], ...}``; bands without rights are absent."""
    if grant is None:
        return {}
    capability: dict[str, set[str]] = {}
    for permission in grant.permissions:
        for kind, operation in _BANDS[permission]:
            capability.setdefault(band_name(grant.channel, kind), set()).add(operation)
    return {band: sorted(operations) for band, operations in sorted(capability.items())}


def parse_permissions(names: list[str] | tuple[str, ...]) -> frozenset[Permission]:
    """Read permission names, ``requestFiles`` or ``request-files``; ``all`` stands for the six.

    :raises InvalidName: one is unknown.
    """
    found: set[Permission] = set()
    for name in names:
        if name == "all":
            found |= _ANY
            continue
        first, *others = name.split("-")
        try:
            found.add(Permission(first + "".join(word.capitalize() for word in others)))
        except ValueError:
            choices = ", ".join(permission.value for permission in Permission)
            raise InvalidName(name=name, kind="permission", why=f"the six are {choices}; all means every one") from None
    return frozenset(found)
