"""Permissions: every action against every subset of what is asked for and what is granted."""

from __future__ import annotations

from itertools import chain, combinations

import pytest

from kachery_fast.errors import InvalidName
from kachery_fast.protocol.access import (
    Action,
    Allow,
    Deny,
    Grant,
    Permission,
    band_capability,
    decide,
    parse_permissions,
)

SUBSETS = [frozenset(subset) for subset in chain.from_iterable(
    combinations(Permission, length) for length in range(len(Permission) + 1))]
ALL = frozenset(Permission)

TASKS = (Permission.REQUEST_TASKS, Permission.PROVIDE_TASKS)
# The table, written out: which permission opens which action; where there are several, any one of them does.
TABLE: dict[Action, Permission | tuple[Permission, ...]] = {
    Action.SEE_CHANNEL: tuple(Permission),
    Action.CONNECT: tuple(Permission),
    Action.REQUEST_FILES: Permission.REQUEST_FILES,
    Action.PROVIDE_FILES: Permission.PROVIDE_FILES,
    Action.UPLOAD_FILE: Permission.PROVIDE_FILES,
    Action.READ_FILE: Permission.REQUEST_FILES,
    Action.LOOK_FOR_FILE: (Permission.REQUEST_FILES, Permission.PROVIDE_FILES),
    Action.REPORT_CORRUPT: Permission.REQUEST_FILES,
    Action.REQUEST_FEEDS: Permission.REQUEST_FEEDS,
    Action.PROVIDE_FEEDS: Permission.PROVIDE_FEEDS,
    Action.UPLOAD_FEED: Permission.PROVIDE_FEEDS,
    Action.READ_SEGMENT: Permission.REQUEST_FEEDS,
    Action.READ_INDEX: (Permission.REQUEST_FEEDS, Permission.PROVIDE_FEEDS),
    Action.REPORT_SEGMENT: Permission.REQUEST_FEEDS,
    Action.REQUEST_TASKS: Permission.REQUEST_TASKS,
    Action.PROVIDE_TASKS: Permission.PROVIDE_TASKS,
    Action.CLAIM_TASK: Permission.PROVIDE_TASKS,
    Action.FIND_TASK: TASKS,
    Action.UPLOAD_RESULT: Permission.PROVIDE_TASKS,
    Action.READ_RESULT: TASKS,
    Action.REPORT_RESULT: TASKS,
}


def grant(requested: frozenset[Permission], granted: frozenset[Permission]) -> Grant:
    return Grant("0" * 64, "owner@example.org", "lab", requested, granted)


def test_the_table_names_every_action() -> None:
    assert set(TABLE) == set(Action)


@pytest.mark.parametrize("action", Action)
def test_every_action_with_every_subset_of_permissions(action: Action) -> None:
    assert len(SUBSETS) == 64
    needed = TABLE[action] if isinstance(TABLE[action], tuple) else (TABLE[action],)
    for requested in SUBSETS:
        for granted in SUBSETS:
            in_force = requested & granted
            allowed = any(permission in in_force for permission in needed)
            decision = decide(grant(requested, granted), action)
            assert isinstance(decision, Allow if allowed else Deny)


@pytest.mark.parametrize("action", Action)
def test_who_is_no_member_may_do_nothing(action: Action) -> None:
    assert decide(None, action) == Deny("the node is not a member of the channel")


def test_a_refusal_says_whose_turn_it_is() -> None:
    wanted = frozenset({Permission.REQUEST_FILES})
    none: frozenset[Permission] = frozenset()
    assert decide(grant(wanted, none), Action.REQUEST_FILES) == Deny(
        "the channel's owner has not granted requestFiles")
    assert decide(grant(none, wanted), Action.REQUEST_FILES) == Deny(
        "the node's owner has not asked for requestFiles")
    assert decide(grant(none, none), Action.REQUEST_FILES) == Deny("requestFiles is neither asked for nor granted")
    assert decide(grant(none, none), Action.CONNECT) == Deny("no permission is in force for this node")


def test_each_permission_opens_two_bands_as_in_the_table_of_the_original() -> None:
    """Request X: publish on the request band, subscribe to the provide band. Provide X: the other way round."""
    for kind in ("Files", "Feeds", "Tasks"):
        request, provide = Permission(f"request{kind}"), Permission(f"provide{kind}")
        asks, answers = f"lab-request{kind}", f"lab-provide{kind}"
        assert band_capability(grant(ALL, frozenset({request}))) == {answers: ["subscribe"], asks: ["publish"]}
        assert band_capability(grant(ALL, frozenset({provide}))) == {answers: ["publish"], asks: ["subscribe"]}
        assert band_capability(grant(ALL, frozenset({request, provide}))) == {
            answers: ["publish", "subscribe"], asks: ["publish", "subscribe"]}


def test_capabilities_are_the_union_over_the_permissions_in_force() -> None:
    for permissions in SUBSETS:
        expected: dict[str, set[str]] = {}
        for permission in permissions:
            for band, operations in band_capability(grant(ALL, frozenset({permission}))).items():
                expected.setdefault(band, set()).update(operations)
        found = band_capability(grant(ALL, permissions))
        assert found == {band: sorted(operations) for band, operations in expected.items()}
        assert band_capability(grant(permissions, ALL)) == found
    assert band_capability(None) == {}


def test_permission_names() -> None:
    assert parse_permissions(["requestFiles", "provide-tasks"]) == {Permission.REQUEST_FILES, Permission.PROVIDE_TASKS}
    assert parse_permissions(["all"]) == ALL
    assert parse_permissions([]) == frozenset()
    for bad in ("", "requestfiles", "request files", "write", "-"):
        with pytest.raises(InvalidName, match="requestFiles, provideFiles"):
            parse_permissions([bad])
