"""What passes a node's end of a channel, in and out: real signatures and links, bands in memory."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace

from kachery_fast.errors import BandUnreachable, KacheryError, NotPermitted
from kachery_fast.net.memory import MemoryChannel
from kachery_fast.node import link as link_module
from kachery_fast.node import outbox as outbox_module
from kachery_fast.protocol.access import Permission
from kachery_fast.protocol.bodies import (
    Assign,
    Cancel,
    Offer,
    Progress,
    RequestFile2022,
    UploadFileStatus2022,
    Want,
)
from kachery_fast.protocol.hub_bodies import PubsubInfo, PubsubToken
from kachery_fast.protocol.messages import encode_band
from tests.network import LOOPS, run_on
from tests.node.support import ALL, CHANNEL, Network, Peer, identity_of, network, other_tasks, until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
SHA1 = "ab" * 20


def speak_as(net: Network, name: str) -> MemoryChannel:
    """A connection to the bands that may say anything, wherever."""
    return net.broker.channel(CHANNEL, identity_of(name).node_id, {
        f"{CHANNEL}-{kind}": ["publish"] for kind in ("requestFiles", "provideFiles")})


def want(**fields: Any) -> Want:
    values = {"channel": CHANNEL, "time": int(time.time() * 1000), "id": "1" * 32, "request": "r", "sha1": SHA1,
              **fields}
    return Want(**values)


async def say(net: Network, name: str, data: bytes, band: str = "requestFiles") -> None:
    channel = speak_as(net, name)
    await channel.connect()
    await channel.publish(f"{CHANNEL}-{band}", data)
    await asyncio.sleep(0.02)


async def a_and_members(net: Network) -> Peer:
    a = await net.peer("a")
    net.members["friend"] = ALL
    net.members["provider"] = ["provideFiles"]
    a.link.update(net.info("a"))
    return a


def signed(name: str, *bodies: Any) -> bytes:
    return encode_band(list(bodies), identity_of(name).key)


def forged() -> bytes:
    payload = json.loads(signed("friend", want()))
    payload["messages"][0]["body"]["sha1"] = "cd" * 20
    return json.dumps(payload).encode()


def named_otherwise() -> bytes:
    payload = json.loads(signed("stranger", want()))
    payload["messages"][0]["fromNodeId"] = identity_of("friend").node_id
    return json.dumps(payload).encode()


DROPPED: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("stranger", "requestFiles", lambda: signed("stranger", want()), "which lacks requestFiles"),
    ("provider", "requestFiles", lambda: signed("provider", want()), "which lacks requestFiles"),
    ("friend", "provideFiles", lambda: signed("friend", want()), "wrong band"),
    ("provider", "requestFiles", lambda: signed("friend", want()), "by another's connection"),
    ("friend", "requestFiles", forged, "signed"),
    ("friend", "requestFiles", named_otherwise, "signed"),
    ("friend", "requestFiles", lambda: signed("friend", want(time=int(time.time() * 1000) - 200_000)), "s old"),
    ("friend", "requestFiles", lambda: signed("friend", want(time=int(time.time() * 1000) + 200_000)), "in the future"),
    ("friend", "requestFiles", lambda: signed("friend", want(channel="other")), "signed for the channel 'other'"),
    ("friend", "requestFiles", lambda: signed("friend", want(sha1="xyz")), "not a SHA-1"),
    ("friend", "requestFiles", lambda: b"{", "not JSON"),
    ("friend", "requestFiles", lambda: b"[" * 50_000, "JSON"),
]


@pytest.mark.parametrize("case", DROPPED, ids=[f"{number}-{why}" for number, (_, _, _, why) in enumerate(DROPPED)])
def test_what_does_not_count_is_dropped_with_a_line_in_the_log(
        loop_kind: str, tmp_path: Path, case: tuple[str, str, Callable[[], bytes], str],
        caplog: pytest.LogCaptureFixture) -> None:
    speaker, band, make, why = case

    async def work() -> None:
        async with network(tmp_path) as net:
            a = await a_and_members(net)
            with caplog.at_level(logging.WARNING):
                await say(net, speaker, make(), band)
                await until(lambda: why in caplog.text)
            assert a.heard == []
            assert caplog.text.count("Traceback") == 0
            await say(net, "friend", signed("friend", want(id="2" * 32)))
            assert len(a.heard) == 1
    run_on(loop_kind, work(), 60)


def test_a_message_counts_once(loop_kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await a_and_members(net)
            for _ in range(3):
                await say(net, "friend", signed("friend", want()))
            assert len(a.heard) == 1
            assert caplog.text.count("received before") == 2
    run_on(loop_kind, work(), 60)


def test_a_message_that_is_too_long_is_dropped_unread(loop_kind: str, tmp_path: Path,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await a_and_members(net)
            net.broker.message_size_bytes_max = 10**7
            await say(net, "friend", signed("friend", *[want(id=f"{number:032}") for number in range(400)]))
            assert a.heard == []
            assert "120000 are allowed" in caplog.text
    run_on(loop_kind, work(), 60)


def test_what_is_meant_for_others_is_not_looked_at_further(loop_kind: str, tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await a_and_members(net)
            await say(net, "friend", signed("friend", Assign(
                channel=CHANNEL, time=0, id="3" * 32, request="r", provider="ff" * 32, sha1=SHA1)))
            await say(net, "provider", signed("provider", Offer(
                channel=CHANNEL, time=0, id="4" * 32, request="unknown", sha1=SHA1, size=1),
                UploadFileStatus2022(file_key={}, status="started")), "provideFiles")
            assert a.heard == []
            assert caplog.text == ""  # though their times are stale
    run_on(loop_kind, work(), 60)


def test_a_listener_hears_its_request_until_it_stops_listening(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await a_and_members(net)
            heard: list[Any] = []

            def listener(body: Any, sender: str) -> None:
                heard.append((body, sender))

            a.link.listen("r", listener)

            def progress(number: int) -> bytes:
                return signed("provider", Progress(channel=CHANNEL, time=int(time.time() * 1000), id=f"{number:032}",
                                                   request="r", bytes=number))
            await say(net, "provider", progress(1), "provideFiles")
            a.link.unlisten("r", listener)
            await say(net, "provider", progress(2), "provideFiles")
            assert [(body.bytes, sender) for body, sender in heard] == [(1, identity_of("provider").node_id)]
    run_on(loop_kind, work(), 60)


def test_a_member_that_joined_just_now_is_found_by_one_look_at_the_hub(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await a_and_members(net)
            net.members["late"] = ALL
            await say(net, "late", signed("late", *[want(id=f"{number:032}") for number in range(20)]))
            await until(lambda: len(a.heard) == 20)
            assert a.refreshed == 1
            net.members["later"] = ALL  # within the second after that look
            await say(net, "later", signed("later", want(id="5" * 32)))
            await until(lambda: len(a.heard) == 21)
            assert a.refreshed == 2
    run_on(loop_kind, work(), 60)


def test_a_flood_of_strangers_is_bounded(loop_kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await a_and_members(net)
            release = asyncio.Event()
            a.link._refresh = release.wait  # type: ignore[assignment]
            before = len(other_tasks())
            for part in range(10):
                await say(net, "stranger", signed("stranger", *[
                    want(id=f"{part:016}{number:016}") for number in range(100)]))
            assert len(other_tasks()) - before <= link_module._STRANGERS_WAITING_MAX + 1
            assert "too many of strangers" in caplog.text
            release.set()
    run_on(loop_kind, work(), 60)


def test_messages_go_out_together_and_never_too_long(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await net.peer("a")
            b = await net.peer("b")
            band = f"{CHANNEL}-requestFiles"
            listener = net.broker.channel(CHANNEL, "listener", {band: ["subscribe"]})
            await listener.connect()
            sizes: list[int] = []
            await listener.subscribe(band, lambda message: sizes.append(len(message.data)))
            for number in range(500):
                a.link.say(Want, {"request": f"r{number}", "sha1": SHA1})
            a.link.say(UploadFileStatus2022, {"file_key": {"sha1": SHA1}, "status": "started"})
            await until(lambda: len(b.heard) == 500)
            assert [body.request for body, _ in b.heard] == [f"r{number}" for number in range(500)]
            # About 400 bytes each, 60,000 in a message at most (the broker refuses longer ones).
            assert 4 <= len(sizes) <= 6
            assert max(sizes) <= 60000
    run_on(loop_kind, work(), 60)


def test_what_cannot_be_sent_is_told_and_the_next_is_sent(loop_kind: str, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b")
            errors: list[KacheryError] = []
            net.broker.set_up(False)
            a.link.say(Want, {"request": "lost", "sha1": SHA1}, errors.append)
            await until(lambda: errors)
            assert isinstance(errors[0], BandUnreachable)
            net.broker.set_up(True)
            a.link.say(UploadFileStatus2022, {"file_key": {"x": "y" * 70_000}, "status": "started"}, errors.append)
            await until(lambda: len(errors) == 2)
            assert "the limit is 60000 bytes" in errors[1].message
            with monkeypatch.context() as patched:
                patched.setattr(link_module, "encode_band", lambda *_: 1 // 0)
                a.link.say(Want, {"request": "fault", "sha1": SHA1}, errors.append)
                await until(lambda: len(errors) == 3)
            assert "fault of the program" in errors[2].message
            a.link.say(Want, {"request": "good", "sha1": SHA1}, errors.append)
            await until(lambda: b.heard)
            assert b.heard[0][0].request == "good"
            assert len(errors) == 3
    run_on(loop_kind, work(), 60)


@pytest.mark.parametrize("known", [True, False], ids=["withdrawn", "refused by the broker alone"])
def test_who_may_not_send_hears_which_permission_is_missing(loop_kind: str, tmp_path: Path, known: bool) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await net.peer("a")
            errors: list[KacheryError] = []
            next(channel for channel in net.broker._channels if channel.client_id == a.identity.node_id).grant({})
            if known:
                net.members["a"] = ["provideFiles"]
            a.link.say(Want, {"request": "r", "sha1": SHA1}, errors.append)
            a.link.say(Cancel, {"request": "r"}, errors.append)
            await until(lambda: len(errors) == 2)
            assert all(isinstance(error, NotPermitted) for error in errors)
            expected = (f"kachery-fast channel grant {CHANNEL} {a.identity.node_id} requestFiles" if known
                        else "publish on lab-requestFiles")
            assert [expected in error.message for error in errors] == [True, True], errors
    run_on(loop_kind, work(), 60)


def test_who_may_not_send_hears_so_though_the_channel_is_left_meanwhile(
    loop_kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await net.peer("a")
            errors: list[KacheryError] = []
            next(channel for channel in net.broker._channels if channel.client_id == a.identity.node_id).grant({})
            await a.link.check_member("nobody", Permission.REQUEST_FILES)  # the next look at the hub is a second later
            a.link.say(Want, {"request": "r", "sha1": SHA1}, errors.append)
            await until(lambda: "publish on lab-requestFiles" in caplog.text)
            await a.link.close()
            assert [type(error) for error in errors] == [NotPermitted]
    run_on(loop_kind, work(), 60)


def test_a_full_outbox_drops_the_oldest_and_says_so(loop_kind: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "OUTBOX_MAX", 3)

    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b")
            errors: list[KacheryError] = []
            for number in range(5):
                a.link.say(Cancel, {"request": f"r{number}"}, errors.append)
            await until(lambda: len(b.heard) == 3)
            assert [body.request for body, _ in b.heard] == ["r2", "r3", "r4"]
            assert len(errors) == 2
    run_on(loop_kind, work(), 60)


def test_requests_of_2022_are_heard(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await a_and_members(net)
            await say(net, "friend", signed("friend", RequestFile2022(file_key={"sha1": SHA1})))
            await say(net, "stranger", signed("stranger", RequestFile2022(file_key={"sha1": SHA1})))
            assert [sender for _, sender in a.heard] == [identity_of("friend").node_id]
    run_on(loop_kind, work(), 60)


def test_a_connection_made_anew_loses_no_message_meanwhile(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b")
            errors: list[KacheryError] = []
            connecting = asyncio.create_task(a.link.connect())
            await asyncio.sleep(0)
            await connecting
            await until(lambda: a.link.connected)
            a.link.say(Want, {"request": "r", "sha1": SHA1}, errors.append)
            await until(lambda: b.heard)
            assert not errors
    run_on(loop_kind, work(), 60)


def test_the_token_of_another_service_is_not_told_to_the_one_before(loop_kind: str, tmp_path: Path) -> None:
    """Its request may have been under way when the hub told of the new one."""
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await net.peer("a")
            tokens: list[Callable[[], Awaitable[PubsubToken]]] = []
            real = a.link._open_channel

            def opening(name: str, pubsub: PubsubInfo, **named: Any) -> Any:
                tokens.append(named["token"])
                return real(name, pubsub, **named)

            async def pubsub_token(_channel: str) -> PubsubToken:
                return PubsubToken("token", 0, 1, "{}", "a", pubsub=later)

            a.link._open_channel = opening
            cast(Any, a.link.hub).pubsub_token = pubsub_token
            later = PubsubInfo("nats", "nats://nats.example.org")
            await a.link.connect()
            a.link.info = replace(a.link.info, pubsub=later)
            await a.link.connect()
            former, current = tokens
            assert (await current()).token == "token"
            with pytest.raises(BandUnreachable, match="another service"):
                await former()
    run_on(loop_kind, work(), 60)
