"""The channel in memory keeps the promises of the interface."""

from __future__ import annotations

import asyncio

import pytest

from kachery_fast.errors import BandUnreachable, NotPermitted, TooLarge
from kachery_fast.net.channel import Channel, Message
from kachery_fast.net.memory import MemoryBroker
from tests.embedded.broker_server import ALL, BANDS, BOTH
from tests.network import LOOPS, run_on

BAND = BANDS[0]


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_message_reaches_every_subscriber_its_sender_included_after_the_call(loop_kind: str) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        channels: list[Channel] = [broker.channel("lab", f"node-{number}", ALL) for number in range(3)]
        got: list[list[Message]] = [[], [], []]
        for channel, received in zip(channels, got, strict=True):
            await channel.connect()
            await channel.subscribe(BAND, received.append)
            assert channel.connected
        await channels[0].publish(BAND, b"x")
        assert got == [[], [], []]
        await asyncio.sleep(0)
        assert got == [[Message(BAND, b"x", "node-0")]] * 3
        await channels[2].close()
        await channels[1].publish(BAND, b"y")
        await asyncio.sleep(0)
        assert [len(received) for received in got] == [2, 2, 1]
        assert broker.published == 2

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("missing", BOTH)
@pytest.mark.parametrize("band", BANDS)
def test_each_band_and_operation_needs_its_own_permission(band: str, missing: str) -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        channel = broker.channel("lab", "node-1", {**ALL, band: [name for name in BOTH if name != missing]})
        await channel.connect()
        got: list[Message] = []
        if missing == "publish":
            await channel.subscribe(band, got.append)
            with pytest.raises(NotPermitted, match=f"publish on {band}"):
                await channel.publish(band, b"x")
        else:
            await channel.publish(band, b"x")
            with pytest.raises(NotPermitted, match=f"subscribe on {band}"):
                await channel.subscribe(band, got.append)
        await asyncio.sleep(0)
        assert got == []

    run_on("uvloop", scenario())


def test_a_withdrawn_permission_silences_a_subscription() -> None:
    async def scenario() -> None:
        broker = MemoryBroker()
        channel = broker.channel("lab", "node-1", ALL)
        got: list[Message] = []
        await channel.connect()
        await channel.subscribe(BAND, got.append)
        channel.grant({BAND: ["publish"]})
        await channel.publish(BAND, b"x")
        await asyncio.sleep(0)
        assert got == []

    run_on("uvloop", scenario())


def test_an_outage_fails_calls_and_keeps_subscriptions() -> None:
    async def scenario() -> None:
        broker = MemoryBroker(message_size_bytes_max=10)
        channel = broker.channel("lab", "node-1", ALL)
        got: list[Message] = []
        broker.set_up(False)
        with pytest.raises(BandUnreachable):
            await channel.connect()
        with pytest.raises(BandUnreachable, match="the broker is down"):
            await channel.subscribe(BAND, got.append)
        with pytest.raises(BandUnreachable):
            await channel.publish(BAND, b"x")
        assert channel.why == "the broker is down"
        broker.set_up(True)
        assert channel.connected
        assert channel.why == ""
        await channel.publish(BAND, b"y")
        await asyncio.sleep(0)
        assert [message.data for message in got] == [b"y"]
        with pytest.raises(TooLarge):
            await channel.publish(BAND, b"x" * 11)
        await channel.close()
        with pytest.raises(BandUnreachable):
            await channel.publish(BAND, b"z")

    run_on("uvloop", scenario())
