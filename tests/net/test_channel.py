"""The channel adapter over the real ``ably`` SDK, against the embedded broker on a real port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any

import pytest
from ably.transport.websockettransport import WebSocketTransport

from kachery_fast.config import load_settings
from kachery_fast.embedded.broker import BrokerLimits
from kachery_fast.embedded.broker_wire import Action, Fault
from kachery_fast.errors import BandUnreachable, NotPermitted, TooLarge
from kachery_fast.net import ably_client
from kachery_fast.net import channel as channel_module
from kachery_fast.net.channel import Message
from tests.embedded.broker_server import ALL, BANDS, BOTH, Clock, Server, proxying, raw_client, serving, until
from tests.network import LOOPS, run_on

from .peers import BAND, AblyPeer

joined = AblyPeer.joined


def test_a_band_without_any_permission_is_refused_both_ways() -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server, listen=False, capability={BAND: BOTH}) as one:
            for _ in range(2):
                with pytest.raises(NotPermitted):
                    await one.channel.subscribe(BANDS[1], one.got.put_nowait)
                with pytest.raises(NotPermitted):
                    await one.channel.publish(BANDS[1], b"{}")
            await one.channel.subscribe(BAND, one.got.put_nowait)
            await one.channel.publish(BAND, b"fine")
            assert (await one.receive()).data == b"fine"

    run_on("uvloop", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_token_is_renewed_in_place_before_it_ends(loop_kind: str) -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server, life_seconds=2.0) as one:
            await until(lambda: one.calls >= 4)
            await one.channel.publish(BAND, b"still here")
            assert (await one.receive()).data == b"still here"
            assert server.broker.stats()["connects"] == 1
            assert server.broker.stats().get("expired", 0) == 0
            assert one.states == [(True, "")]

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_tokens_that_have_ended_are_replaced_again_and_again(loop_kind: str) -> None:
    clock = Clock()

    async def scenario() -> None:
        async with serving(clock=clock) as server, joined(server) as one:
            for turn in range(2):
                # The clock leaps over the time for renewal: the broker cuts the connection, twice.
                clock.now += 1000
                await until(lambda turn=turn: len(one.states) == 3 + 2 * turn)  # type: ignore[misc]
                assert one.calls == 2 + turn
                await one.channel.publish(BAND, b"%d" % turn)
                assert (await one.receive()).data == b"%d" % turn
            assert server.broker.stats()["expired"] == 2

    run_on(loop_kind, scenario())


def test_a_token_that_has_ended_before_the_connect_is_replaced() -> None:
    clock = Clock()

    async def scenario() -> None:
        async with serving(clock=clock) as server:
            peer = AblyPeer(server)
            fresh, stale = peer.token, server.broker.issue_token("node-1", ALL, 10)

            async def token() -> dict[str, Any]:
                return stale if peer.calls == 0 and await fresh() else await fresh()

            clock.now += 11
            peer.channel._token = token
            await peer.channel.connect()
            await peer.channel.publish(BAND, b"{}")
            assert server.broker.stats()["connects_refused"] >= 1
            await peer.channel.close()

    run_on("uvloop", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_no_token_for_a_while_delays_the_channel_and_does_not_kill_it(loop_kind: str) -> None:
    async def scenario() -> None:
        async with serving() as server:
            # Long enough that the reason is known by then.
            peer = AblyPeer(server, connect_timeout_seconds=2.0, publish_timeout_seconds=0.3)
            peer.fault = OSError("the hub is down")
            with pytest.raises(BandUnreachable, match="the hub is down"):
                await peer.channel.connect()
            with pytest.raises(BandUnreachable, match="the hub is down"):
                await peer.channel.publish(BAND, b"{}")
            with pytest.raises(BandUnreachable):
                await peer.channel.subscribe(BAND, peer.got.put_nowait)
            peer.fault = None
            await peer.become(True)
            await peer.channel.publish(BAND, b"back")
            assert (await peer.receive()).data == b"back"
            await peer.channel.close()

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_broker_that_is_down_at_first_is_found_when_it_comes(loop_kind: str) -> None:
    async def scenario() -> None:
        taken: list[float] = []
        async with serving() as server:
            while not taken or (taken[-1] >= BACK_SECONDS and len(taken) < 3):
                await server.stop()
                peer = AblyPeer(server, connect_timeout_seconds=2.0)  # long enough that the reason is known by then
                with pytest.raises(BandUnreachable, match="cannot connect"):
                    await peer.channel.connect()
                taken.append(await seconds_until_back(server, peer))
                await peer.channel.close()
        assert min(taken) < BACK_SECONDS

    run_on(loop_kind, scenario())


# The promise. A machine that is at other work may take longer now and then, but not three times in a row.
BACK_SECONDS = 5.0


async def seconds_until_back(server: Server, peer: AblyPeer) -> float:
    """Start the broker again, and wait until the channel is connected."""
    began = asyncio.get_running_loop().time()
    await server.start()
    await peer.become(True)
    return asyncio.get_running_loop().time() - began


def test_revoked_clients_come_back_with_what_they_still_may() -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server) as one, joined(server, "node-2") as two:
            one.capability = {BAND: ["publish"]}
            assert await server.broker.revoke("node-1") == 1
            await until(lambda: [up for up, _ in one.states] == [True, False, True])
            await two.channel.publish(BAND, b"secret")
            assert (await two.receive()).data == b"secret"
            await one.channel.publish(BAND, b"allowed")
            assert (await two.receive()).data == b"allowed"
            assert one.got.empty()

    run_on("uvloop", scenario())


def test_a_band_that_is_withdrawn_and_given_back_is_heard_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(channel_module, "SILENCE_CHECK_SECONDS", 0.02)

    async def scenario() -> None:
        async with serving() as server, joined(server) as one, joined(server, "node-2") as two:
            one.capability = {BAND: ["publish"]}
            assert await server.broker.revoke("node-1") == 1
            await until(lambda: [up for up, _ in one.states] == [True, False, True])
            calls = one.calls
            await until(lambda: one.calls > calls + 1)
            await one.channel.publish(BAND, b"still here")
            assert (await two.receive()).data == b"still here"
            assert one.got.empty()
            one.capability = ALL
            await until(lambda: not one.got.empty())
            calls = one.calls
            await two.channel.publish(BAND, b"again")
            assert [(await one.receive()).data for _ in range(2)] == [b"still here", b"again"]
            assert one.calls == calls, "nothing more is asked for"
            assert server.broker.stats()["connects"] == 3, "the connection was kept"
            assert caplog.text.count("is not subscribed again") == 1

    run_on("uvloop", scenario())


# --- breaks in mid-stream


async def stream(sender: AblyPeer, count: int, disturb: Any, at: tuple[int, ...]) -> list[bytes]:
    """Publish ``count`` numbered messages, several in flight, disturbing at some; return the acknowledged ones."""
    acknowledged: list[bytes] = []
    limit = asyncio.Semaphore(8)

    async def one(number: int) -> None:
        async with limit:
            data = b"%d" % number
            with contextlib.suppress(BandUnreachable):
                await sender.channel.publish(BAND, data)
                acknowledged.append(data)

    tasks = []
    for number in range(count):
        if number in at:
            await until(lambda number=number: len(acknowledged) > number - 20)  # type: ignore[misc]
            tasks.append(asyncio.ensure_future(disturb()))
        tasks.append(asyncio.ensure_future(one(number)))
    await asyncio.gather(*tasks)
    return acknowledged


async def collected(peer: AblyPeer, expected: list[bytes]) -> list[bytes]:
    got: list[bytes] = []
    missing = set(expected)
    while missing:
        message = await peer.receive()
        got.append(message.data)
        missing.discard(message.data)
    while not peer.got.empty():
        got.append(peer.got.get_nowait().data)
    return got


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_broker_restarted_in_mid_stream_loses_nothing_acknowledged_and_repeats_nothing(loop_kind: str) -> None:
    async def scenario() -> None:
        async with (serving() as server, joined(server, "node-1", publish_timeout_seconds=20.0) as sender,
                    joined(server, "node-2") as listener):
            async def restart() -> None:
                # What a broker has acknowledged while a subscriber was away is gone when it restarts before that is
                # back: its memory is all there is. So both are there when it stops.
                await until(lambda: sender.channel.connected and listener.channel.connected)
                await server.stop()
                await server.start()

            acknowledged = await stream(sender, 400, restart, (100, 250))
            assert len(acknowledged) == 400
            got = await collected(listener, acknowledged)
            assert len(got) == len(set(got)) == 400

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_after_a_restart_the_channel_is_back_within_five_seconds(loop_kind: str) -> None:
    async def scenario() -> None:
        taken: list[float] = []
        async with serving() as server, joined(server) as one:
            while not taken or (taken[-1] >= BACK_SECONDS and len(taken) < 3):
                await server.stop()
                await one.become(False)
                taken.append(await seconds_until_back(server, one))
                assert one.channel.why
        assert min(taken) < BACK_SECONDS

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_cut_connections_resume_and_lose_nothing(loop_kind: str) -> None:
    async def scenario() -> None:
        async with (serving() as server, proxying(server.port) as first, proxying(server.port) as second,
                    joined(server, "node-1", endpoint=f"127.0.0.1:{first.port}") as sender,
                    joined(server, "node-2", endpoint=f"127.0.0.1:{second.port}") as listener):
            async def cut() -> None:
                first.cut()
                second.cut()

            acknowledged = await stream(sender, 300, cut, (50, 120, 200))
            assert len(acknowledged) == 300
            got = await collected(listener, acknowledged)
            assert len(got) == len(set(got)) == 300
            assert server.broker.stats()["resumes"] >= 3

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_subscriber_whose_client_was_replaced_gets_what_it_missed_once(loop_kind: str) -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server, "node-1") as sender, joined(server, "node-2") as listener:
            await sender.channel.publish(BAND, b"before")
            assert (await listener.receive()).data == b"before"
            listener.gate.clear()
            await server.broker.revoke("node-2")
            await listener.become(False)
            for number in range(20):
                await sender.channel.publish(BAND, b"%d" % number)
            assert listener.got.empty()
            listener.gate.set()
            assert [(await listener.receive()).data for _ in range(20)] == [b"%d" % number for number in range(20)]
            await sender.channel.publish(BAND, b"after")
            assert (await listener.receive()).data == b"after"

    run_on(loop_kind, scenario())


def test_a_hung_broker_is_noticed_and_publishing_into_it_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ably_client, "REQUEST_TIMEOUT_SECONDS", 0.5)

    async def scenario() -> None:
        limits = BrokerLimits(idle_seconds=0.5, tick_seconds=0.05)
        async with (serving(limits) as server, proxying(server.port) as proxy,
                    joined(server, endpoint=f"127.0.0.1:{proxy.port}", publish_timeout_seconds=0.4) as one):
            proxy.hold(True)
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(BandUnreachable):
                await one.channel.publish(BAND, b"into the void")
            assert loop.time() - began < 2.0
            await one.become(False, 5.0)
            proxy.cut()
            proxy.hold(False)
            await one.become(True, 10.0)
            await one.channel.publish(BAND, b"back")
            while (await one.receive()).data != b"back":
                pass

    run_on("uvloop", scenario())


def test_an_sdk_that_believes_to_be_connected_and_is_not_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "ATTEMPT_SECONDS", 0.1)

    async def scenario() -> None:
        async with (serving() as server, proxying(server.port) as proxy,
                    joined(server, endpoint=f"127.0.0.1:{proxy.port}", publish_timeout_seconds=20.0) as one):
            # Long before the idle timer of the SDK (6 + 5 s) would see it.
            proxy.hold(True)
            publishing = asyncio.ensure_future(one.channel.publish(BAND, b"once"))
            await one.become(False, 3.0)
            proxy.cut()
            proxy.hold(False)
            await publishing
            assert (await one.receive()).data == b"once"
            await one.channel.publish(BAND, b"twice")
            assert (await one.receive()).data == b"twice"

    run_on("uvloop", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_broker_that_sends_its_clients_away_gets_them_back(loop_kind: str) -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server) as one:
            for turn, fault in enumerate((Fault(50003, 503, "Overloaded."), Fault(80003, 400, "Moving."))):
                (connection,) = server.broker._connections.values()
                connection.disconnect(fault)
                await until(lambda turn=turn: len(one.states) == 3 + 2 * turn)  # type: ignore[misc]
                await one.channel.publish(BAND, b"back")
                assert (await one.receive()).data == b"back"

    run_on(loop_kind, scenario())


def test_a_silence_that_the_sdk_bears_is_ended_by_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ably_client, "REQUEST_TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(channel_module, "SILENCE_CHECK_SECONDS", 0.1)
    monkeypatch.setattr(WebSocketTransport, "set_idle_timer", lambda *_: None)

    async def scenario() -> None:
        limits = BrokerLimits(idle_seconds=0.4, tick_seconds=0.05)
        async with (serving(limits) as server, proxying(server.port) as proxy,
                    joined(server, endpoint=f"127.0.0.1:{proxy.port}") as one):
            proxy.hold(True)
            await one.become(False, 5.0)
            assert (False, "nothing was heard of the broker") in one.states
            proxy.hold(False)
            await one.become(True)

    run_on("uvloop", scenario())


# --- limits, foreign peers, surroundings


def test_a_message_beyond_the_limit_is_refused_before_it_is_sent() -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server, message_size_bytes_max=2000) as one:
            with pytest.raises(TooLarge, match="2001 bytes"):
                await one.channel.publish(BAND, b"x" * 2001)
            await one.channel.publish(BAND, b"x" * 2000)
            assert len((await one.receive()).data) == 2000

    run_on("uvloop", scenario())


def test_the_largest_message_of_the_default_settings_passes() -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server) as one:
            size_bytes = load_settings({}).message_size_bytes_max
            await one.channel.publish(BAND, b"\xff" * size_bytes)
            assert (await one.receive()).data == b"\xff" * size_bytes

    run_on("uvloop", scenario())


@pytest.mark.parametrize(("message", "expected"), [
    ({"data": '{"messages":[]}'}, b'{"messages":[]}'),
    ({"data": '{"a": [1, "é"]}', "encoding": "json"}, json.dumps({"a": [1, "é"]}, separators=(",", ":")).encode()),
    ({"data": "AP8Q", "encoding": "base64"}, b"\x00\xff\x10"),
    ({"data": "named", "name": "m"}, b"named"),
    ({}, b"null"),
])
def test_what_other_clients_publish_arrives_as_bytes(message: dict[str, Any], expected: bytes) -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server) as one, raw_client(server, token=server.token("js")) as other:
            await other.publish(BAND, 0, message)
            assert await one.receive() == Message(BAND, expected, "js")

    run_on("uvloop", scenario())


@pytest.mark.parametrize("message", [
    {"data": "{", "encoding": "json"}, {"data": "*", "encoding": "base64"}, {"data": "x", "encoding": "cipher+aes"},
    {"data": "x", "name": "error"}, {"data": "x", "encoding": "vcdiff"},
    {"data": "x", "extras": {"delta": {"from": "?"}}},
])
def test_a_message_that_cannot_be_decoded_does_not_stop_the_next(message: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server) as one, raw_client(server, token=server.token("js")) as other:
            await other.publish(BAND, 0, message)
            await other.publish(BAND, 1, {"data": "good"})
            while (await one.receive()).data != b"good":
                pass
            # Nor does the SDK ask for it again and again.
            assert server.broker.stats()["delivered"] == 2

    run_on("uvloop", scenario())


def test_a_receiver_that_raises_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server, listen=False) as one:
            def broken(_message: Message) -> None:
                raise RuntimeError("a bug in the receiver")

            await one.channel.subscribe(BAND, broken)
            await one.channel.subscribe(BAND, one.got.put_nowait)
            for number in range(2):
                await one.channel.publish(BAND, b"%d" % number)
                assert (await one.receive()).data == b"%d" % number

    run_on("uvloop", scenario())
    assert "a bug in the receiver" in caplog.text


def test_loopback_is_not_routed_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "ws_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    async def scenario() -> None:
        async with serving() as server, joined(server) as one:
            await one.channel.publish(BAND, b"{}")
            await one.receive()

    run_on("uvloop", scenario())


@pytest.mark.parametrize(("endpoint", "expected"), [
    ("127.0.0.1:20440", True), ("127.1.2.3", True), ("localhost:1", True), ("[::1]:1", True), ("127.0.0.1:1/", True),
    ("hub.lab.org:443", False), ("10.0.0.1:1", False), ("main", False), ("127.0.0.1.evil.org:1", False),
])
def test_loopback_is_told_from_other_hosts(endpoint: str, expected: bool) -> None:
    assert ably_client._is_loopback(endpoint) is expected


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("moment", ["connected", "connecting", "refused", "without token", "never begun", "half open"])
def test_closing_at_any_moment_leaves_no_task(loop_kind: str, moment: str) -> None:
    async def scenario() -> None:
        async with serving() as server, proxying(server.port) as proxy:
            before = asyncio.all_tasks()
            peer = AblyPeer(server, endpoint=f"127.0.0.1:{proxy.port}" if moment == "half open" else "",
                        connect_timeout_seconds=20.0 if moment == "connected" else 0.3)
            if moment == "refused":
                await server.stop()
            elif moment == "without token":
                peer.fault = OSError("no")
            elif moment == "half open":
                proxy.hold(True)
            if moment == "connecting":
                peer.gate.clear()
                connecting = asyncio.ensure_future(peer.channel.connect())
                await until(lambda: peer.calls > 0)
                await peer.channel.close()
                with pytest.raises(BandUnreachable):
                    await connecting
            elif moment != "never begun":
                with contextlib.suppress(BandUnreachable):
                    await peer.channel.connect()
                if moment == "connected":
                    await peer.channel.subscribe(BAND, peer.got.put_nowait)
                await peer.channel.close()
            await peer.channel.close()
            with pytest.raises(BandUnreachable):
                await peer.channel.publish(BAND, b"{}")
            left = [task for task in asyncio.all_tasks() - before if "ably" in repr(task) or "channel" in repr(task)]
            assert left == []
            assert peer.got.empty()

    run_on(loop_kind, scenario())


def test_tokens_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server) as one:
            await one.channel.publish(BAND, b"{}")

    logging.getLogger("ably").setLevel(logging.NOTSET)
    with caplog.at_level(logging.INFO):
        run_on("uvloop", scenario())
    assert "channel lab is connected" in caplog.text
    assert "accessToken" not in caplog.text


def test_a_plain_client_hears_what_the_adapter_publishes_under_one_id() -> None:
    async def scenario() -> None:
        async with serving() as server, joined(server) as one, raw_client(server, token=server.token("js")) as other:
            await other.attach(BAND)
            await one.channel.publish(BAND, b"\x01")
            (message,) = (await other.read(Action.MESSAGE))["messages"]
            assert (message["data"], message["encoding"], message["clientId"]) == ("AQ==", "base64", "node-1")
            assert len(message["id"]) == 16

    run_on("uvloop", scenario())
