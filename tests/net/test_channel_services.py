"""What nodes see of a channel is the same over Ably, which the embedded broker speaks, and over NATS."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest

from kachery_fast.errors import NotPermitted
from kachery_fast.net import channel as channel_module
from kachery_fast.net.channel import Message
from tests.embedded.broker_server import ALL, BANDS, BOTH, Server, serving
from tests.network import LOOPS, run_on

from .peers import BAND, AblyPeer, NatsPeer, Peer


class Service(NamedTuple):
    """How it is served, how a node joins, and whether it says who sent a message."""

    serving: Callable[[], AbstractAsyncContextManager[Any]]
    joined: Callable[..., AbstractAsyncContextManager[Peer]]
    says_senders: bool


@pytest.fixture(params=["ably", "nats"])
def service(request: pytest.FixtureRequest) -> Service:
    """Each of both; NATS also over ``ws``."""
    if request.param == "ably":
        return Service(serving, AblyPeer.joined, True)
    server = request.getfixturevalue("nats_server")
    return Service(lambda: nullcontext(server), partial(NatsPeer.joined, scheme=request.param), False)


@pytest.mark.parametrize("service", ["ably", "nats", "ws"], indirect=True)
@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_message_reaches_every_subscriber_its_sender_included(service: Service, loop_kind: str) -> None:
    sender = "node-1" if service.says_senders else ""

    async def scenario() -> None:
        async with (service.serving() as server, service.joined(server, "node-1") as one,
                    service.joined(server, "node-2") as two):
            await one.channel.publish(BAND, b'{"x": "\xc3\xa9"}')
            await one.channel.publish(BAND, bytes(range(256)) * 200)
            for peer in (one, two):
                assert await peer.receive() == Message(BAND, b'{"x": "\xc3\xa9"}', sender)
                assert (await peer.receive()).data == bytes(range(256)) * 200
            assert one.channel.connected
            assert one.states == [(True, "")]

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("missing", BOTH)
@pytest.mark.parametrize("band", BANDS)
def test_each_band_and_operation_needs_its_own_permission(service: Service, band: str, missing: str) -> None:
    capability = {**ALL, band: [operation for operation in BOTH if operation != missing]}

    async def scenario() -> None:
        async with (service.serving() as server,
                    service.joined(server, "node-1", listen=False, capability=capability) as one,
                    service.joined(server, "node-2", listen=False) as two):
            await two.channel.subscribe(band, two.got.put_nowait)
            if missing == "publish":
                await one.channel.subscribe(band, one.got.put_nowait)
                with pytest.raises(NotPermitted, match=f"publish on {band}"):
                    await one.channel.publish(band, b"{}")
                await two.channel.publish(band, b"theirs")
                assert (await one.receive()).data == b"theirs"
                assert (await two.receive()).data == b"theirs"
            else:
                with pytest.raises(NotPermitted, match=f"subscribe on {band}"):
                    await one.channel.subscribe(band, one.got.put_nowait)
                await one.channel.publish(band, b"mine")
                assert (await two.receive()).data == b"mine"
                assert one.got.empty()

    run_on("uvloop", scenario())


def test_what_is_granted_later_is_taken_up_with_a_new_token(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A refusal under a token that is no longer fresh costs one renewal; here no token ever is.
    monkeypatch.setattr(channel_module, "TOKEN_FRESH_SECONDS", -1.0)

    async def scenario() -> None:
        async with service.serving() as server, service.joined(server, listen=False, capability={}) as one:
            one.capability = {BAND: ["publish"]}
            await one.channel.publish(BAND, b"{}")
            one.capability = {BAND: BOTH}
            await one.channel.subscribe(BAND, one.got.put_nowait)
            await one.channel.publish(BAND, b"heard")
            assert (await one.receive()).data == b"heard"
            assert one.states == [(True, "")]
            if isinstance(server, Server):
                assert server.broker.stats()["connects"] == 1

    run_on("uvloop", scenario())
