"""Why reads broke off is remembered for a while, and not without bound."""

from __future__ import annotations

from kachery_fast.errors import NodeError
from kachery_fast.node.failures import Failures


def test_a_failure_is_known_for_a_minute() -> None:
    now = [1000.0]
    failures = Failures(lambda: now[0])
    error = NodeError(what="x")
    failures.keep("a", error)
    assert failures.find("a") is error
    assert failures.find("b") is None
    now[0] += 59.9
    assert failures.find("a") is error
    now[0] += 0.2
    assert failures.find("a") is None


def test_the_oldest_of_too_many_failures_is_forgotten() -> None:
    failures = Failures(lambda: 0.0)
    names = [failures.make_name() for _ in range(65)]
    for name in names:
        failures.keep(name, NodeError(what=name))
    assert failures.find(names[0]) is None
    assert all(failures.find(name) is not None for name in names[1:])
