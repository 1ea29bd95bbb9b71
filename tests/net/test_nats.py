"""The channel adapter over ``nats-py``, against a real NATS server that enforces what the hub's tokens permit."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import struct
import sys
from base64 import b64encode, urlsafe_b64decode

import pytest
from aiohttp import web

from kachery_fast.errors import BandUnreachable, InvalidArgument, InvalidName, NotPermitted, TooLarge
from kachery_fast.hub.engines.nats import NatsCredentials, NatsPubsub, NatsSettings
from kachery_fast.net import channel as channel_module
from kachery_fast.protocol.nkeys import ACCOUNT, USER, Nkey, check_account, nats_subject
from tests.embedded.broker_server import ALL, BANDS, until
from tests.nats_server import NatsServer, new_key
from tests.network import LOOPS, run_on

from .peers import BAND, NatsPeer

joined = NatsPeer.joined
parametrized = pytest.mark.parametrize("loop_kind", LOOPS)
over = pytest.mark.parametrize("scheme", ["nats", "ws"])


@pytest.fixture
def server(nats_server: NatsServer) -> NatsServer:
    return nats_server


@pytest.mark.parametrize("capability", [{}, {BAND: ["publish"]}, {BAND: ["subscribe"]}])
def test_what_is_not_named_is_refused_by_the_server_not_by_this_side(
    server: NatsServer, capability: dict[str, list[str]]
) -> None:
    """With ``nats-py`` alone: a token without permissions would be one with all of them."""
    from nats.aio.client import Client

    async def scenario() -> None:
        peer, errors = NatsPeer(server, capability=capability), []

        async def note(error: Exception) -> None:
            errors.append(str(error))

        async with joined(server, "node-2", listen=False) as listener:
            await listener.channel.subscribe(BANDS[1], listener.got.put_nowait)
            await listener.channel.subscribe(BAND, listener.got.put_nowait)
            token = await peer.token()
            user, client = Nkey.from_seed(token.seed, USER), Client()
            await client.connect([server.url()], error_cb=note, allow_reconnect=False, pending_size=1,
                                 user_jwt_cb=lambda: bytearray(token.token.encode()),
                                 signature_cb=lambda nonce: b64encode(user.sign(nonce.encode())))
            for subject in (nats_subject(BANDS[1]), "kachery.other-requestFiles", ">", "kachery.>", "$SYS.>"):
                await client.subscribe(subject)
                await client.flush()
                assert errors, subject
                assert "permissions violation for subscription" in errors.pop()
            for subject in (nats_subject(BANDS[1]), "kachery.other-requestFiles", "_INBOX.x"):
                await client.publish(subject, b"x")
                await client.flush()
                assert "permissions violation for publish" in errors.pop()
            await client.publish(nats_subject(BAND), b"mine")
            await client.flush()
            assert bool(errors) == ("publish" not in capability.get(BAND, []))
            await client.close()
            await listener.channel.publish(BAND, b"last")
            data = [(await listener.receive()).data for _ in range(1 if errors else 2)]
            assert data == ([] if errors else [b"mine"]) + [b"last"]

    run_on("uvloop", scenario())


@over
@parametrized
def test_a_token_is_renewed_before_it_ends_and_nothing_is_lost_or_repeated(
    server: NatsServer, loop_kind: str, scheme: str
) -> None:
    async def scenario() -> None:
        async with (joined(server, "node-1", scheme=scheme, life_seconds=3.0) as one,
                    joined(server, "node-2", scheme=scheme, life_seconds=4.0) as two):
            sent = 0
            while one.calls < 3 or two.calls < 3:
                await one.channel.publish(BAND, b"%d" % sent)
                sent += 1
            for number in range(sent):
                assert (await one.receive()).data == b"%d" % number
                assert (await two.receive()).data == b"%d" % number
            assert one.got.empty()
            assert one.states == two.states == [(True, "")]

    run_on(loop_kind, scenario())


def test_a_band_that_one_token_lacks_is_heard_again_with_the_next(server: NatsServer) -> None:
    async def scenario() -> None:
        async with joined(server, life_seconds=2.0) as one, joined(server, "node-2", listen=False) as two:
            one.capability = {BAND: ["publish"]}
            calls = one.calls
            await until(lambda: one.calls > calls)
            one.capability = ALL
            await until(lambda: one.calls > calls + 1)
            while one.got.empty():
                await two.channel.publish(BAND, b"again")
            assert (await one.receive()).data == b"again"
            assert one.states == [(True, "")]

    run_on("uvloop", scenario())


@parametrized
def test_a_token_that_cannot_be_renewed_ends_the_connection_and_a_new_one_brings_it_back(
    server: NatsServer, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with joined(server, life_seconds=2.0, publish_timeout_seconds=0.3) as one:
            one.fault = NotPermitted(who="it", action="connect", channel="lab", why="it was removed")
            await one.become(False)
            with pytest.raises(BandUnreachable):
                await one.channel.publish(BAND, b"{}")
            await until(lambda: "it was removed" in one.channel.why)
            one.fault = None
            await one.become(True)
            await one.channel.publish(BAND, b"back")
            assert (await one.receive()).data == b"back"

    run_on(loop_kind, scenario())


def test_a_key_that_is_not_the_account_s_is_refused(server: NatsServer, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        caplog.set_level(logging.DEBUG)
        peer = NatsPeer(server, signer=new_key(ACCOUNT), connect_timeout_seconds=1.0)
        with pytest.raises(BandUnreachable, match=r"(?i)authorization violation|when it got the token"):
            await peer.channel.connect()
        await peer.channel.close()
        token = await peer.token()
        assert token.token.split(".")[1] not in caplog.text
        assert token.seed not in repr(token) + caplog.text
        assert token.token not in repr(token)

    run_on("uvloop", scenario())


def test_a_server_that_hangs_up_on_a_token_is_not_taken_for_a_bad_network(server: NatsServer) -> None:
    """As may be all that is left of a refusal: a reset overtakes the line that tells it."""
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"X","version":"2.9.0","max_payload":1048576,"headers":true,"nonce":"x"}\r\n')
        await reader.read(1)  # and leave the rest of CONNECT
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def scenario() -> None:
        listening = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        peer = NatsPeer(server, url=f"nats://127.0.0.1:{port}", connect_timeout_seconds=1.0)
        with pytest.raises(BandUnreachable, match="ended the connection when it got the token"):
            await peer.channel.connect()
        await peer.channel.close()
        listening.close()

    run_on("uvloop", scenario())


def test_a_band_that_is_withdrawn_and_given_back_is_heard_again(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "SILENCE_CHECK_SECONDS", 0.05)

    async def scenario() -> None:
        async with joined(server) as one, joined(server, "node-2") as two:
            one.capability = {BAND: ["publish"]}
            server.kill()
            server.start()
            await until(lambda: one.channel.connected and two.channel.connected and one.channel._refused == {BAND}, 30)
            one.capability = ALL
            await until(lambda: not one.channel._refused)
            await two.channel.publish(BAND, b"again")
            assert (await one.receive()).data == b"again"

    run_on("uvloop", scenario())


def test_the_account_s_own_key_signs_too(server: NatsServer) -> None:
    async def scenario() -> None:
        async with joined(server, signer=server.account) as one:
            await one.channel.publish(BAND, b"{}")
            assert (await one.receive()).data == b"{}"

    run_on("uvloop", scenario())


@over
@parametrized
def test_a_server_killed_in_mid_stream_loses_nothing_to_its_sender_and_repeats_nothing(
    server: NatsServer, loop_kind: str, scheme: str
) -> None:
    """A NATS server keeps nothing, so what is said is heard by those who are there."""
    async def scenario() -> None:
        async with (joined(server, "node-1", scheme=scheme, publish_timeout_seconds=30.0) as sender,
                    joined(server, "node-2", scheme=scheme) as listener):
            for turn, end in enumerate((server.kill, server.stop)):
                await asyncio.gather(*(sender.channel.publish(BAND, b"a%d" % number) for number in range(50)))
                under_way = [asyncio.ensure_future(sender.channel.publish(BAND, b"b%d" % number))
                             for number in range(50)]
                end()
                await sender.become(False)
                await listener.become(False)
                server.start()
                await listener.become(True)
                await asyncio.gather(*under_way)
                await sender.channel.publish(BAND, b"end")
                got: list[bytes] = []
                while not got or got[-1] != b"end":
                    got.append((await listener.receive()).data)
                assert len(got) == len(set(got)), turn
                assert set(got) >= {b"a%d" % number for number in range(50)} | {b"end"}
            assert [up for up, _ in sender.states] == [True, False, True, False, True]

    run_on(loop_kind, scenario())


@parametrized
def test_a_server_that_is_down_at_first_is_found_when_it_comes(server: NatsServer, loop_kind: str) -> None:
    async def scenario() -> None:
        server.kill()
        peer = NatsPeer(server, connect_timeout_seconds=1.0)
        with pytest.raises(BandUnreachable, match="cannot connect"):
            await peer.channel.connect()
        with pytest.raises(BandUnreachable):
            await peer.channel.subscribe(BAND, peer.got.put_nowait)
        server.start()
        await peer.become(True)
        await peer.channel.publish(BAND, b"here")
        assert (await peer.receive()).data == b"here"
        await peer.channel.close()

    run_on(loop_kind, scenario())


def test_what_is_too_long_is_refused_before_it_is_sent(server: NatsServer) -> None:
    async def scenario() -> None:
        async with joined(server, message_size_bytes_max=2_000_000) as one:
            with pytest.raises(TooLarge):
                await one.channel.publish(BAND, bytes(2_000_001))
            with pytest.raises(TooLarge, match="the broker's limit"):
                await one.channel.publish(BAND, bytes(1_500_000))  # 1 MiB is the server's
            await one.channel.publish(BAND, b"fine")
            assert (await one.receive()).data == b"fine"

    run_on("uvloop", scenario())


def test_without_its_package_the_reason_says_what_to_install(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nats.aio.client", None)

    async def scenario() -> None:
        peer = NatsPeer(server, connect_timeout_seconds=0.5)
        with pytest.raises(BandUnreachable, match=r"pip install 'kachery-fast\[nats\]'"):
            await peer.channel.connect()
        await peer.channel.close()

    run_on("uvloop", scenario())


@over
def test_an_address_that_was_looked_up_before_is_the_one_connected_to(server: NatsServer, scheme: str) -> None:
    async def scenario() -> None:
        url = server.url(scheme).replace("127.0.0.1", "nowhere.invalid")
        async with joined(server, url=url, scheme=scheme, address="127.0.0.1") as one:
            await one.channel.publish(BAND, b"{}")
            assert (await one.receive()).data == b"{}"

    run_on("uvloop", scenario())


@parametrized
def test_a_websocket_that_sends_its_client_elsewhere_is_left(server: NatsServer, loop_kind: str) -> None:
    asked = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request.path)
        raise web.HTTPFound("/inside")

    async def scenario() -> None:
        application = web.Application()
        application.router.add_get("/{path:.*}", elsewhere)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        peer = NatsPeer(server, url=f"ws://127.0.0.1:{runner.addresses[0][1]}", connect_timeout_seconds=1.0)
        with pytest.raises(BandUnreachable, match="sends its clients elsewhere"):
            await peer.channel.connect()
        await peer.channel.close()
        await runner.cleanup()
        assert set(asked) == {"/"}

    run_on(loop_kind, scenario())


def test_a_server_that_should_speak_tls_and_does_not_is_left(server: NatsServer) -> None:
    async def scenario() -> None:
        peer = NatsPeer(server, url=server.url().replace("nats", "tls"), connect_timeout_seconds=1.0)
        with pytest.raises(BandUnreachable, match="does not speak TLS"):
            await peer.channel.connect()
        await peer.channel.close()

    run_on("uvloop", scenario())


# --- keys


def test_a_token_lives_as_long_as_it_was_to_and_says_from_when(server: NatsServer) -> None:
    for now in (1000.0, 1000.001, 1000.999):
        engine = NatsPubsub(NatsSettings(server.url(), server.account.public), NatsCredentials(server.signer.seed),
                            lambda now=now: now)  # type: ignore[misc]
        for asked, lives in ((2.0, 2.0), (1.0, 1.0), (900.0, 300.0)):
            token = engine.token("node-1", ALL, asked)
            assert token.issued == int(now * 1000)
            assert lives <= (token.expires - token.issued) / 1000 <= lives + 1
            padded = token.token.split(".")[1] + "=="
            claims = json.loads(urlsafe_b64decode(padded))
            assert (claims["iat"], claims["exp"] * 1000) == (int(now), token.expires)


def test_keys_are_read_as_they_were_written_and_nothing_else_is() -> None:
    for kind, letter in ((ACCOUNT, "A"), (USER, "U")):
        key = new_key(kind)
        assert (key.public[0], len(key.public)) == (letter, 56)
        assert (key.seed[:2], len(key.seed)) == (f"S{letter}", 58)
        assert Nkey.from_seed(key.seed, kind).public == key.public
        assert key.seed not in repr(key)
    key = new_key(ACCOUNT)
    assert check_account(key.public) == key.public
    for text in ("", "A", key.public, new_key(USER).seed, key.seed[:-1], f"{key.seed[:-1]}!", "SA" + "é" * 56,
                 key.seed.swapcase()):
        with pytest.raises(InvalidArgument) as refused:
            Nkey.from_seed(text, ACCOUNT)
        assert not text or text not in refused.value.message or len(text) < 3
    for text in ("", key.seed, new_key(USER).public, key.public[:-1] + ("A" if key.public[-1] != "A" else "B")):
        with pytest.raises(InvalidArgument):
            check_account(text)


def test_a_subject_is_of_one_band_whatever_the_channel_is_called() -> None:
    assert nats_subject("lab-requestFiles") == "kachery.lab-requestFiles"
    assert nats_subject("a..b.-requestFiles") == "kachery.a==b=-requestFiles"
    for band in ("", "a b", "a*-requestFiles", ">", "a>b", "é", "-x", "a\r\nb", "a" * 101):
        with pytest.raises(InvalidName):
            nats_subject(band)
