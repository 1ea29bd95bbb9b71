"""What is counted of the last minute."""

from __future__ import annotations

from kachery_fast.embedded.broker_traffic import OVERHEAD_BYTES, SECONDS, Meter


def test_messages_are_counted_by_the_second_for_a_minute() -> None:
    now = [1000.9]
    meter = Meter(lambda: now[0])
    meter.note("lab-requestFiles", 2, 300 + 2 * OVERHEAD_BYTES)
    assert sum(meter.moved("lab-requestFiles").messages) == 0, "the second is not over"
    now[0] = 1001.0
    meter.note("lab-requestFiles", 1, 50 + OVERHEAD_BYTES)
    meter.note("lab-provideFiles", 5, 1)
    assert meter.moved("lab-requestFiles").messages == (*[0] * (SECONDS - 1), 2)
    assert meter.moved("lab-requestFiles").size_bytes == 300
    now[0] = 1060.5
    assert meter.moved("lab-requestFiles").messages == (2, 1, *[0] * (SECONDS - 2))
    now[0] = 1061.0
    assert meter.moved("lab-requestFiles").messages == (1, *[0] * (SECONDS - 1))
    assert meter.moved("lab-requestFiles").size_bytes == 50
    assert meter.moved("another").messages == (0,) * SECONDS


def test_what_is_over_is_forgotten_and_what_is_long_is_bounded() -> None:
    now = [1000.0]
    meter = Meter(lambda: now[0])
    for _ in range(500):
        now[0] += 1
        meter.note("busy", 1, 10 + OVERHEAD_BYTES)
    meter.note("quiet", 1, 10)
    now[0] += 1
    assert meter.moved("busy").messages == (1,) * SECONDS
    assert meter.moved("busy").size_bytes == 10 * SECONDS
    now[0] += SECONDS
    meter.note("busy", 1, 10)
    meter.expire()
    assert set(meter._seconds) == {"busy"}
