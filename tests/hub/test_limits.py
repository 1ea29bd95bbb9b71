"""Rates per key."""

from __future__ import annotations

import pytest

from kachery_fast.errors import RateLimited
from kachery_fast.hub.limits import RateLimiter, address_group


def spend(limiter: RateLimiter, key: str, units: float, now: float) -> None:
    limiter.spend(key, units, now, who="node", limit="a few")


def test_a_rate_allows_a_burst_of_its_window_and_then_its_average() -> None:
    limiter = RateLimiter(rate=2.0, window_seconds=10.0)
    spend(limiter, "A", 20, 100.0)
    with pytest.raises(RateLimited) as caught:
        spend(limiter, "A", 3, 100.5)
    assert caught.value.details["retry_seconds"] == 1.0
    spend(limiter, "B", 20, 100.5)
    spend(limiter, "A", 3, 101.5)
    spend(limiter, "A", 20, 1000.0)
    with pytest.raises(RateLimited):
        spend(limiter, "A", 1, 1000.0)


def test_a_refused_request_costs_nothing_and_a_refunded_one_neither() -> None:
    limiter = RateLimiter(rate=1.0, window_seconds=4.0)
    for _ in range(3):
        with pytest.raises(RateLimited):
            spend(limiter, "A", 5, 0.0)
        spend(limiter, "A", 4, 0.0)
        limiter.refund("A", 4, 0.0)
    limiter.refund("A", 100, 0.0)
    limiter.refund("never seen", 100, 0.0)
    for key in ("A", "never seen"):
        spend(limiter, key, 4, 0.0)
        with pytest.raises(RateLimited):
            spend(limiter, key, 1, 0.0)


def test_a_clock_set_back_neither_fills_nor_empties() -> None:
    limiter = RateLimiter(rate=1.0, window_seconds=4.0)
    spend(limiter, "A", 2, 1000.0)
    spend(limiter, "A", 2, 10.0)
    with pytest.raises(RateLimited):
        spend(limiter, "A", 1, 10.0)
    spend(limiter, "A", 1, 11.0)


def test_the_memory_is_bounded() -> None:
    limiter = RateLimiter(rate=1.0, window_seconds=4.0, keys_max=3)
    for key in "ABCD":
        spend(limiter, key, 4, 0.0)
    spend(limiter, "A", 4, 0.0)
    with pytest.raises(RateLimited):
        spend(limiter, "D", 4, 0.0)


@pytest.mark.parametrize(("address", "group"), [
    ("192.0.2.7", "192.0.2.7"),
    ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ("fe80::1%eth0", "fe80::/64"),
    (None, "?"),
    ("nonsense", "?"),
])
def test_an_ipv6_host_is_counted_by_its_network(address: str | None, group: str) -> None:
    assert address_group(address) == group
