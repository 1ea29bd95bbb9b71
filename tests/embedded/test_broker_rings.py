"""The replay ring: bounded, in order, honest about what it lost."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kachery_fast.embedded.broker_rings import Ring, RingLimits, Rings


def rings(messages_max: int = 100, ring_size_bytes_max: int = 10_000, total_size_bytes_max: int = 100_000,
          age_seconds_max: float = 120.0) -> Rings:
    return Rings("E", RingLimits(messages_max, ring_size_bytes_max, total_size_bytes_max, age_seconds_max))


def put(memory: Rings, ring: Ring, now: float = 0.0, size_bytes: int = 10, key: str = "") -> str:
    body: dict[str, Any] = {"n": memory.number + 1}
    keys = (("client", key),) if key else ()
    memory.append(ring, body, now=now, size_bytes=size_bytes, sender="s", keys=keys)
    return str(body["channelSerial"])


def numbers(memory: Rings, ring: Ring, serial: str | None, rewind: str | None = None, now: float = 0.0) -> list[int]:
    return [entry.number for entry in memory.replay(ring, serial, rewind, now).entries]


def test_a_ring_keeps_the_newest_within_its_count_and_bytes() -> None:
    memory = rings(messages_max=3, ring_size_bytes_max=100)
    ring = memory.get("a")
    for _ in range(5):
        put(memory, ring)
    assert [entry.number for entry in ring.entries] == [3, 4, 5]
    put(memory, ring, size_bytes=90)
    assert [entry.number for entry in ring.entries] == [5, 6]
    put(memory, ring, size_bytes=101)
    assert list(ring.entries) == []
    assert (ring.size_bytes, memory.size_bytes, ring.floor) == (0, 0, 7)


def test_a_channel_that_exceeds_the_bytes_of_all_gives_up_its_own() -> None:
    memory = rings(total_size_bytes_max=100)
    quiet, loud = memory.get("quiet"), memory.get("loud")
    put(memory, quiet, size_bytes=40)
    for _ in range(20):
        put(memory, loud, size_bytes=30)
    assert [entry.number for entry in quiet.entries] == [1]
    assert len(loud.entries) == 2
    assert memory.size_bytes == 100


def test_old_messages_and_deserted_channels_are_forgotten() -> None:
    memory = rings(age_seconds_max=10.0)
    ring, kept = memory.get("a"), memory.get("b")
    kept.members["someone"] = 1
    put(memory, ring, now=0.0, key="k")
    put(memory, ring, now=5.0)
    memory.expire(11.0)
    assert [entry.number for entry in ring.entries] == [2]
    assert ring.keys == set()
    memory.expire(16.0)
    assert list(memory.by_name) == ["b"]
    assert memory.size_bytes == 0


def test_a_channel_made_anew_never_mistakes_an_old_serial_for_its_own() -> None:
    memory = rings(age_seconds_max=10.0)
    serial = put(memory, memory.get("a"), now=0.0)
    put(memory, memory.get("b"), now=0.0)
    memory.expire(20.0)
    ring = memory.get("a")
    put(memory, ring, now=20.0)
    replay = memory.replay(ring, serial, None, 20.0)
    assert not replay.resumed
    assert [entry.number for entry in replay.entries] == [3]


def test_senseless_serials_get_the_whole_ring() -> None:
    memory = rings()
    ring = memory.get("a")
    put(memory, ring)
    for serial in ("E:999", "E:-1", "E:", ":", "E", "F:1", "E:٣", "E:" + "9" * 50, "E:1:1"):
        replay = memory.replay(ring, serial, None, 0.0)
        assert not replay.resumed, serial
        assert [entry.number for entry in replay.entries] == [1]
        assert replay.serial == "E:0"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 60)), max_size=40), st.integers(0, 45),
       st.integers(1, 8))
def test_a_replay_that_says_resumed_has_lost_nothing(published: list[tuple[str, int]], position: int,
                                                     messages_max: int) -> None:
    memory = rings(messages_max=messages_max, ring_size_bytes_max=150, total_size_bytes_max=200)
    sent: dict[str, list[int]] = {"a": [], "b": []}
    memory.get("a")
    for name, size_bytes in published:
        put(memory, memory.get(name), size_bytes=size_bytes)
        sent[name].append(memory.number)
        assert memory.size_bytes <= 200
        assert memory.size_bytes == sum(ring.size_bytes for ring in memory.by_name.values())
    ring = memory.get("a")
    replay = memory.replay(ring, f"E:{position}", None, 0.0)
    got = [entry.number for entry in replay.entries]
    missed = [number for number in sent["a"] if number > position]
    if replay.resumed:
        assert got == missed
    else:
        assert got == [entry.number for entry in ring.entries]
        assert position < ring.floor or position > memory.number
    # Standing where ATTACHED said, and breaking off at once, the client would be sent the same again.
    assert numbers(memory, ring, replay.serial) == got
