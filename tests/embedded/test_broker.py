"""The broker as a raw client of the protocol sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from kachery_fast.embedded.broker import BrokerLimits
from kachery_fast.embedded.broker_wire import PUBLISH, RESUMED, SUBSCRIBE, Action
from tests.embedded.broker_server import ALL, BANDS, BOTH, KEY, Clock, Raw, Server, raw_client, serving, until
from tests.network import LOOPS, run_on

BAND = BANDS[0]


async def received(client: Raw) -> dict[str, Any]:
    body = await client.read(Action.MESSAGE)
    return dict(body["messages"][0])


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize(("from_binary", "to_binary"), [(False, False), (False, True), (True, False), (True, True)])
def test_messages_cross_between_json_and_msgpack(loop_kind: str, from_binary: bool, to_binary: bool) -> None:
    async def scenario() -> None:
        async with (serving() as server, raw_client(server, binary=from_binary) as sender,
                    raw_client(server, token=server.token("node-2"), binary=to_binary) as receiver):
            await receiver.attach(BAND)
            text = {"name": "m", "data": '{"x": "é"}', "encoding": "json", "extras": {"ref": [1, 2]}}
            assert (await sender.publish(BAND, 0, text))["action"] == Action.ACK
            assert await received(receiver) == {**text, "id": f"{sender.connected['connectionId']}:0:0",
                                                "clientId": "node-1"}
            if from_binary:
                await sender.publish(BAND, 1, {"data": b"\x00\xff\x10"})
            else:
                await sender.publish(BAND, 1, {"data": "AP8Q", "encoding": "base64"})
            message = await received(receiver)
            if to_binary and from_binary:
                assert message["data"] == b"\x00\xff\x10"
                assert "encoding" not in message
            else:
                assert (message["data"], message["encoding"]) == ("AP8Q", "base64")

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_connected_tells_identity_and_limits(loop_kind: str) -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server) as client:
            details = client.connected["connectionDetails"]
            assert details["clientId"] == "node-1"
            assert details["connectionKey"] == client.connected["connectionKey"]
            assert details["maxMessageSize"] == server.limits.message_size_bytes_max
            assert details["connectionStateTtl"] == 120_000
            assert details["maxIdleInterval"] == 6_000
            assert "error" not in client.connected

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("missing", BOTH)
@pytest.mark.parametrize("band", BANDS)
def test_each_band_and_operation_needs_its_own_permission(band: str, missing: str) -> None:
    granted = [operation for operation in BOTH if operation != missing]
    capability = {**ALL, band: granted}

    async def scenario() -> None:
        async with (serving() as server, raw_client(server, token=server.token("node-1", capability)) as client,
                    raw_client(server, token=server.token("node-2")) as other):
            await other.attach(band)
            attached = await client.attach(band)
            assert attached["flags"] == (PUBLISH if missing == "subscribe" else SUBSCRIBE)
            answer = await client.publish(band, 0, {"data": "mine"})
            if missing == "publish":
                assert answer["action"] == Action.NACK
                assert answer["error"]["code"] == 40160
            else:
                assert answer["action"] == Action.ACK
                assert (await received(other))["data"] == "mine"
            assert (await other.publish(band, 0, {"data": "yours"}))["action"] == Action.ACK
            await client.send(action=Action.HEARTBEAT, id="fence")
            if missing == "publish":
                assert (await received(client))["data"] == "yours"
            # What is not granted never arrives: the next thing after it is the echo of the fence.
            assert (await client.read())["id"] == "fence"
            third = band + "x"
            await client.send(action=Action.ATTACH, channel=third)
            refusal = await client.read(Action.ERROR)
            assert (refusal["channel"], refusal["error"]["code"]) == (third, 40160)

    run_on("uvloop", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_star_means_all_only_when_it_stands_in_the_token(loop_kind: str) -> None:
    async def scenario() -> None:
        async with (serving() as server, raw_client(server, token=server.token("a", {"*": ["*"]})) as all_of_it,
                    raw_client(server) as some):
            assert (await all_of_it.attach("anything"))["flags"] == PUBLISH | SUBSCRIBE
            await all_of_it.send(action=Action.ATTACH, channel="x" * 600)
            assert (await all_of_it.read(Action.ERROR))["error"]["code"] == 40160
            for name in ("*", "lab-*", ""):
                await some.send(action=Action.ATTACH, channel=name)
                assert (await some.read(Action.ERROR))["error"]["code"] == 40160

    run_on(loop_kind, scenario())


def test_a_client_gets_its_own_messages_unless_it_asks_not_to() -> None:
    async def scenario() -> None:
        async with (serving() as server, raw_client(server) as loud,
                    raw_client(server, query={"echo": "false"}) as quiet):
            await loud.attach(BAND)
            await quiet.attach(BAND)
            await quiet.send(action=Action.MESSAGE, channel=BAND, msgSerial=0, messages=[{"data": "q"}])
            assert (await quiet.read())["action"] == Action.ACK
            assert (await received(loud))["data"] == "q"
            await loud.send(action=Action.MESSAGE, channel=BAND, msgSerial=0, messages=[{"data": "l"}])
            assert (await received(loud))["data"] == "l"
            assert (await received(quiet))["data"] == "l"

    run_on("uvloop", scenario())


def test_the_sender_is_who_its_token_says() -> None:
    async def scenario() -> None:
        async with (serving() as server, raw_client(server) as client,
                    raw_client(server, token=server.token("")) as nobody):
            await client.attach(BAND)
            for serial, forged in enumerate(("node-2", "*")):
                answer = await client.publish(BAND, serial, {"data": "x", "clientId": forged})
                assert answer["error"]["code"] == 40012
            assert (await nobody.publish(BAND, 0, {"data": "x", "clientId": "node-1"}))["error"]["code"] == 40012
            assert (await nobody.publish(BAND, 1, {"data": "anonymous"}))["action"] == Action.ACK
            message = await received(client)
            assert message["data"] == "anonymous"
            assert "clientId" not in message

    run_on("uvloop", scenario())


@pytest.mark.parametrize("query", [{"clientId": "node-2"}, {}])
def test_a_connection_for_another_client_is_refused(query: dict[str, str]) -> None:
    async def scenario() -> None:
        async with serving() as server:
            if query:
                async with raw_client(server, expect=Action.ERROR, query=query) as client:
                    assert client.connected["error"]["code"] == 40102
                    await client.ended()
            else:
                async with raw_client(server, token="", expect=Action.ERROR,
                                      query={"key": f"{KEY.name}:{KEY.secret}"}) as client:
                    assert client.connected["error"]["code"] == 40101
                    await client.ended()
            assert server.broker.stats()["connections"] == 0

    run_on("uvloop", scenario())


def test_heartbeats_are_echoed_and_sent_when_idle() -> None:
    async def scenario() -> None:
        async with serving(BrokerLimits(tick_seconds=0.02, idle_seconds=0.2)) as server, raw_client(server) as client:
            await client.send(action=Action.HEARTBEAT, id="ping-1")
            while (echo := await client.read()) == {"action": 0}:
                pass  # this machine was at other work for longer than idle_seconds
            assert echo == {"action": 0, "id": "ping-1"}
            assert (await client.read()) == {"action": 0}

    run_on("uvloop", scenario())


def test_presence_is_refused_and_detach_and_close_are_answered() -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server) as client, raw_client(server) as other:
            await client.attach(BAND)
            await client.send(action=Action.PRESENCE, channel=BAND, presence=[{"action": 2}], msgSerial=0)
            assert (await client.read(Action.NACK))["msgSerial"] == 0
            await client.send(action=Action.DETACH, channel=BAND)
            assert (await client.read(Action.DETACHED))["channel"] == BAND
            await other.publish(BAND, 0, {"data": "unheard"})
            await client.send(action=Action.CLOSE)
            await client.read(Action.CLOSED)
            await client.ended()
            assert server.broker.stats()["sessions"] == 1

    run_on("uvloop", scenario())


@pytest.mark.parametrize("messages", [
    [{"data": 5}], [{"data": {"a": 1}}], [{"name": 5}], [{"data": "x", "id": 7}], [{"data": "x", "extras": "no"}],
])
def test_ill_formed_messages_are_refused_alone(messages: list[dict[str, Any]]) -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server) as client:
            assert (await client.publish(BAND, 0, *messages))["error"]["code"] == 40013
            assert (await client.publish(BAND, 1, {"data": "fine"}))["action"] == Action.ACK

    run_on("uvloop", scenario())


@pytest.mark.parametrize("frame", [
    "", "{", "[]", "null", '{"action":"x"}', '{"action":15}', '{"action":15,"channel":"lab-requestFiles"}',
    "[" * 5000, '{"action":10,"channel":"' + "\\ud800" + '"}', b"\xc1", b"\x80",
    '{"action":15,"messages":[{"x":[' + ",".join(["1e300"] * 5000) + ']}]}',
], ids=lambda frame: repr(frame)[:40])
def test_a_frame_that_cannot_be_read_ends_its_connection_alone(frame: str | bytes) -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server) as client, raw_client(server) as other:
            if isinstance(frame, str):
                await client.websocket.send_str(frame)
            else:
                await client.websocket.send_bytes(frame)
            answer = await client.read(Action.ERROR)
            if "channel" not in answer:
                assert answer["error"]["code"] == 40000
                await client.ended()
            assert (await other.publish(BAND, 0, {"data": "x"}))["action"] == Action.ACK

    run_on("uvloop", scenario())


def test_oversize_is_refused_as_a_message_and_cut_as_a_frame() -> None:
    limits = BrokerLimits(message_size_bytes_max=1000, frame_size_bytes_max=5000)

    async def scenario() -> None:
        async with serving(limits) as server, raw_client(server, binary=True) as client:
            answer = await client.publish(BAND, 0, {"data": b"x" * 600}, {"data": b"x" * 401})
            assert answer["error"]["code"] == 40009
            assert (await client.publish(BAND, 1, {"data": b"x" * 1000}))["action"] == Action.ACK
            answer = await client.publish(BAND, 2, *[{} for _ in range(1001)])
            assert answer["error"]["code"] == 40009
            await client.send(action=Action.MESSAGE, channel=BAND, msgSerial=3, messages=[{"data": b"x" * 6000}])
            await client.ended()
            assert server.broker.stats()["published"] == 1

    run_on("uvloop", scenario())


def test_a_client_that_reads_too_slowly_is_cut_and_others_are_not() -> None:
    limits = BrokerLimits(send_queue_bytes_max=256 * 1024, inbound_rate_max=1e6, inbound_burst_max=1e6,
                          close_seconds=0.2)

    async def scenario() -> None:
        async with (serving(limits) as server, raw_client(server) as sender,
                    raw_client(server, token=server.token("slow")) as slow):
            await sender.attach(BAND)
            await slow.attach(BAND)
            slow.stop_reading()
            data = "x" * 50_000
            for serial in range(400):
                await sender.publish(BAND, serial, {"data": data})
                if server.broker.stats().get("slow_consumers"):
                    break
            assert server.broker.stats()["slow_consumers"] == 1
            before = server.broker.stats()["delivered"]
            await sender.publish(BAND, 1000, {"data": "after"})
            assert server.broker.stats()["delivered"] == before + 1
            await until(lambda: server.broker.stats()["connections"] == 1)

    run_on("uvloop", scenario())


def test_the_unsent_bytes_of_all_clients_together_are_bounded() -> None:
    limits = BrokerLimits(send_total_bytes_max=512 * 1024, inbound_rate_max=1e6, inbound_burst_max=1e6,
                          close_seconds=0.2, tick_seconds=0.05)

    async def scenario() -> None:
        async with (serving(limits) as server, raw_client(server) as sender,
                    raw_client(server, token=server.token("slow-1")) as one,
                    raw_client(server, token=server.token("slow-2")) as two):
            for slow in (one, two):
                await slow.attach(BAND)
                slow.stop_reading()
            data = "x" * 50_000
            for serial in range(400):
                await sender.publish(BAND, serial, {"data": data})
                if server.broker.stats().get("slow_consumers"):
                    break
            assert server.broker.stats()["slow_consumers"] >= 1
            assert (await sender.publish(BAND, 1000, {"data": "after"}))["action"] == Action.ACK

    run_on("uvloop", scenario())


def test_a_client_that_sends_too_fast_is_read_more_slowly_and_loses_nothing() -> None:
    limits = BrokerLimits(inbound_rate_max=200.0, inbound_burst_max=20.0)

    async def scenario() -> None:
        async with serving(limits) as server, raw_client(server) as client:
            loop = asyncio.get_running_loop()
            began = loop.time()
            for serial in range(60):
                await client.send(action=Action.MESSAGE, channel=BAND, msgSerial=serial, messages=[{"data": "x"}])
            for serial in range(60):
                assert (await client.read(Action.ACK))["msgSerial"] == serial
            assert loop.time() - began >= 0.18
            assert server.broker.stats()["published"] == 60

    run_on("uvloop", scenario())


def test_the_number_of_connections_channels_and_attachments_is_bounded() -> None:
    limits = BrokerLimits(connections_max=2, channels_max=3, attachments_max=2)

    async def scenario() -> None:
        async with serving(limits) as server, raw_client(server) as one, raw_client(server) as two:
            async with raw_client(server, expect=Action.DISCONNECTED) as three:
                assert three.connected["error"]["statusCode"] == 429
            for band in BANDS[:2]:
                await one.attach(band)
            await one.send(action=Action.ATTACH, channel=BANDS[2])
            assert (await one.read(Action.ERROR))["error"]["code"] == 42900
            assert (await two.publish(BANDS[2], 0, {"data": "x"}))["action"] == Action.ACK
            assert (await two.publish(BANDS[3], 1, {"data": "x"}))["error"]["code"] == 42900

    run_on("uvloop", scenario())


def test_one_client_does_not_take_the_connections_of_all() -> None:
    async def scenario() -> None:
        async with (serving(BrokerLimits(connections_per_client_max=2, tick_seconds=0.05)) as server,
                    raw_client(server)):
            async with raw_client(server), raw_client(server, expect=Action.DISCONNECTED) as refused:
                assert refused.connected["error"]["statusCode"] == 429
                async with raw_client(server, token=server.token("node-2")):
                    pass
            await until(lambda: server.broker.stats()["connections"] == 1)
            async with raw_client(server):
                pass

    run_on("uvloop", scenario())


# --- resume and replay


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_resumed_connection_gets_what_it_missed_and_its_resent_messages_count_once(loop_kind: str) -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server, token=server.token("node-2")) as other:
            await other.attach(BAND)
            async with raw_client(server) as client:
                await client.attach(BAND)
                await client.publish(BAND, 0, {"data": "0"})
                serial = (await other.read(Action.MESSAGE))["channelSerial"]
                key, identity = client.connected["connectionKey"], client.connected["connectionId"]
            await other.publish(BAND, 0, {"data": "missed"})
            async with raw_client(server, query={"resume": key}) as client:
                assert client.connected["connectionId"] == identity
                assert "error" not in client.connected
                attached = await client.attach(BAND, channelSerial=serial, flags=32)
                assert attached["flags"] & RESUMED
                assert attached["channelSerial"] == serial
                assert (await received(client))["data"] == "missed"
                assert (await client.publish(BAND, 0, {"data": "0"}))["action"] == Action.ACK
                assert (await client.publish(BAND, 1, {"data": "1"}))["action"] == Action.ACK
            assert (await received(other))["data"] == "1"

    run_on(loop_kind, scenario())


def test_a_refused_message_stays_refused_when_it_is_sent_again() -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server) as client:
            assert (await client.publish("other", 0, {"data": "x"}))["action"] == Action.NACK
            assert (await client.publish(BAND, 1, {"data": "x"}))["action"] == Action.ACK
            assert (await client.publish("other", 0, {"data": "x"}))["action"] == Action.NACK
            assert (await client.publish(BAND, 1, {"data": "x"}))["action"] == Action.ACK
            assert server.broker.stats()["published"] == 1

    run_on("uvloop", scenario())


def test_a_session_is_not_resumed_by_another_client_or_with_a_guessed_key() -> None:
    async def scenario() -> None:
        async with serving() as server:
            async with raw_client(server) as client:
                key, identity = client.connected["connectionKey"], client.connected["connectionId"]
            for token, guess in ((server.token("thief"), key), (server.token(), identity)):
                async with raw_client(server, token=token, query={"resume": guess}) as other:
                    assert other.connected["connectionId"] != identity
                    assert other.connected["error"]["code"] == 80008

    run_on("uvloop", scenario())


def test_a_half_open_connection_is_superseded_by_its_own_resume() -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server) as stale:
            await stale.attach(BAND)
            async with raw_client(server, query={"resume": stale.connected["connectionKey"]}) as fresh:
                await fresh.attach(BAND)
                await fresh.publish(BAND, 0, {"data": "x"})
                await stale.ended()
                assert server.broker.stats()["delivered"] == 1
                assert server.broker.stats()["connections"] == 1

    run_on("uvloop", scenario())


def test_a_session_is_forgotten_after_its_time() -> None:
    async def scenario() -> None:
        limits = BrokerLimits(tick_seconds=0.02, connection_state_seconds=0.1)
        async with serving(limits) as server:
            async with raw_client(server) as client:
                key = client.connected["connectionKey"]
            await until(lambda: server.broker.stats()["sessions"] == 0)
            async with raw_client(server, query={"resume": key}) as client:
                assert client.connected["error"]["code"] == 80008

    run_on("uvloop", scenario())


def test_a_serial_of_an_older_incarnation_gets_the_whole_ring() -> None:
    async def scenario() -> None:
        async with serving() as server, raw_client(server) as sender, raw_client(server) as client:
            for serial in range(3):
                await sender.publish(BAND, serial, {"data": str(serial)})
            attached = await client.attach(BAND, channelSerial="older:96", flags=32)
            assert not attached["flags"] & RESUMED
            assert [(await received(client))["data"] for _ in range(3)] == ["0", "1", "2"]

    run_on("uvloop", scenario())


def test_rewind_goes_back_by_count_or_time_and_plain_attach_does_not() -> None:
    clock = Clock()

    async def scenario() -> None:
        async with serving(clock=clock) as server, raw_client(server) as sender:
            for serial in range(4):
                clock.now += 10
                await sender.publish(BAND, serial, {"data": str(serial)})
            for rewind, expected in (("2", ["2", "3"]), ("15s", ["2", "3"]), ("1m", ["0", "1", "2", "3"]),
                                     ("nonsense", []), ("0", [])):
                async with raw_client(server) as client:
                    await client.attach(BAND, params={"rewind": rewind})
                    await client.send(action=Action.HEARTBEAT, id="fence")
                    got = []
                    while (body := await client.read())["action"] == Action.MESSAGE:
                        got.append(body["messages"][0]["data"])
                    assert got == expected, rewind

    run_on("uvloop", scenario())


def test_a_message_with_an_id_of_its_own_is_delivered_once() -> None:
    async def scenario() -> None:
        async with (serving() as server, raw_client(server) as sender,
                    raw_client(server, token=server.token("node-2")) as thief, raw_client(server) as client):
            await client.attach(BAND)
            for serial in range(2):
                answer = await sender.publish(BAND, serial, {"data": "once", "id": "m-1"})
                assert answer["action"] == Action.ACK
            await thief.publish(BAND, 0, {"data": "another's", "id": "m-1"})
            assert (await received(client))["data"] == "once"
            assert (await received(client))["data"] == "another's"

    run_on("uvloop", scenario())


# --- REST


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_plain_requests_get_the_time_or_are_told_to_upgrade(loop_kind: str) -> None:
    clock = Clock(1_800_000_000.5)

    async def scenario() -> None:
        async with serving(clock=clock) as server, aiohttp.ClientSession() as session:
            async with session.get(f"http://{server.endpoint}/time") as response:
                assert json.loads(await response.read()) == [1_800_000_000_500]
            async with session.get(f"http://{server.endpoint}/") as response:
                assert response.status == 426

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_closing_the_broker_tells_the_clients_and_leaves_no_task(loop_kind: str) -> None:
    async def scenario() -> None:
        server = Server()
        await server.start()
        async with raw_client(server) as client:
            await client.attach(BAND)
            stopping = asyncio.ensure_future(server.stop())
            error = (await client.read(Action.DISCONNECTED))["error"]
            assert error["code"] == 80003
            assert error["statusCode"] < 500
            await client.ended()
            await stopping
        others = [task for task in asyncio.all_tasks() if "kachery_fast" in repr(task.get_coro())]
        assert others == []

    run_on(loop_kind, scenario())
