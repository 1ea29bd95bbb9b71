"""What the system tests of feeds share: a lab of nodes that may read and share feeds, and subfeeds as they see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast.cli.lab import Lab, LabNode
from tests.system.support import QUICK

ENVIRON = {**QUICK, "KACHERY_FEED_RELAY_WAIT_SECONDS": "0.3", "KACHERY_FEED_RENEW_SECONDS": "2"}
# More than any of this takes on a machine that is eight times slower than a quiet one.
LONG_MSEC = 60_000
PERMISSIONS = ["requestFiles", "provideFiles", "requestFeeds", "provideFeeds"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), environ=ENVIRON) as lab:
        lab.start_hub()
        lab.add_node("A", permissions=PERMISSIONS)
        lab.add_node("B", permissions=PERMISSIONS)
        yield lab


@pytest.fixture
def extra(lab: Lab) -> Iterator[Any]:
    """Makes further nodes, which end with the test."""
    added: list[LabNode] = []

    def add(name: str, **options: Any) -> LabNode:
        added.append(lab.add_node(name, **{"permissions": PERMISSIONS, **options}))
        return added[-1]

    yield add
    for node in added:
        node.program.stop()


def made(node: LabNode, subfeed: Any = "main") -> kf.Subfeed:
    """A subfeed of a fresh feed of this node."""
    with node.used():
        return kf.create_feed().load_subfeed(subfeed)


def seen(node: LabNode, subfeed: kf.Subfeed, **options: Any) -> kf.Subfeed:
    """The same subfeed, as this node sees it."""
    with node.used():
        return kf.load_subfeed(subfeed.uri, **options)


def read(node: LabNode, subfeed: kf.Subfeed, wait_msec: int = LONG_MSEC) -> list[dict[str, Any]]:
    """All messages that a new client of this node gets."""
    return seen(node, subfeed).get_next_messages(wait_msec=wait_msec)


def numbered(start: int, end: int) -> list[dict[str, Any]]:
    return [{"i": i} for i in range(start, end)]


def read_signed(subfeed: kf.Subfeed) -> list[dict[str, Any]]:
    """All messages that the node of this subfeed holds, as they were signed."""
    subfeed.position = 0
    return subfeed.get_next_messages(signed=True)
