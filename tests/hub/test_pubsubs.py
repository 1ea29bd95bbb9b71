"""Owners' own pub/sub services: who may add and use them, and what nodes are given for them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from kachery_fast.embedded.tokens import Claims, TokenKey, check_token
from kachery_fast.errors import (
    AddressRefused,
    AlreadyExists,
    CredentialsUnreadable,
    InvalidArgument,
    NotOnHub,
    NotPermitted,
)
from kachery_fast.hub.engines.ably import check_ably
from kachery_fast.hub.engines.nats import check_nats
from kachery_fast.net.bands import open_bands
from kachery_fast.net.channel import Channel, Message
from kachery_fast.net.hub import HubClient
from kachery_fast.protocol.hub_bodies import PubsubInfo
from kachery_fast.protocol.messages import CHANNEL_CHANGED
from kachery_fast.protocol.names import BAND_KINDS, band_name
from kachery_fast.protocol.nkeys import ACCOUNT
from tests.embedded.broker_server import KEY, Server, serving, until

from ..nats_server import NatsServer, new_key, running_nats
from ..network import LOOPS, run_on
from .browsing import browser, sign_in
from .support import CHANNEL, Clock, World, node_id, running_world

parametrized = pytest.mark.parametrize("loop_kind", LOOPS)
API_KEY = f"{KEY.name}:{KEY.secret}"
BANDS = [band_name(CHANNEL, kind) for kind in BAND_KINDS]


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with running_nats(tmp_path_factory.mktemp("nats")) as server:
        yield server


class Service(Server):
    """A broker of somebody else's, that speaks Ably's protocol, with Ably's revocation of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.revoked: list[Any] = []
        self.refuses = False

    async def start(self) -> None:
        await super().start()
        self.broker._started -= 60  # it has been there for a while; tokens are of whole seconds

    def routes(self) -> list[web.RouteDef]:
        return [*super().routes(), web.post("/keys/{key}/revokeTokens", self._revoke)]

    async def _revoke(self, request: web.Request) -> web.Response:
        basic = base64.b64encode(API_KEY.encode()).decode()
        assert (request.match_info["key"], request.headers["Authorization"]) == (KEY.name, f"Basic {basic}")
        if self.refuses:
            return web.json_response({"error": {"message": "Token revocation is not enabled"}}, status=400)
        self.revoked.append(await request.json())
        for target in self.revoked[-1]["targets"]:
            await self.broker.revoke(target.removeprefix("clientId:"))
        return web.json_response({"successCount": 1, "failureCount": 0, "results": []}, status=201)


@contextlib.asynccontextmanager
async def ably_service() -> AsyncIterator[Service]:
    service = Service()
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def use_ably(world: World, service: Server, channel: str = CHANNEL) -> None:
    await world.owner.call("addAbly", name="ably", apiKey=API_KEY, endpoint=f"http://{service.endpoint}")
    await world.owner.call("setPubsub", channel=channel, engine="ably")


async def use_nats(world: World, nats: NatsServer, channel: str = CHANNEL, **fields: Any) -> None:
    await world.owner.call("addNats", **{"name": "nats", **nats.settings, **fields})
    await world.owner.call("setPubsub", channel=channel, engine=fields.get("name", "nats"))


async def bands_of(world: World, client: HubClient, name: str, channel: str = CHANNEL) -> Channel:
    """The way to the bands as a node goes it."""
    (info,) = [info for info in (await client.node_config()).channels if info.name == channel]
    return open_bands(channel, info.pubsub, hub_url=world.url, token=lambda: client.pubsub_token(channel),
                      client_id=node_id(name), settings=world.settings)


# --- tokens


@parametrized
def test_a_node_gets_a_token_of_the_owner_s_key_for_its_permissions_alone(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with (ably_service() as service,
                    running_world(tmp_path, clock, hub_engine_hosts=service.endpoint) as world):
            await use_ably(world, service)
            a = await world.member("a", ["requestFiles"])
            (info,) = (await a.node_config()).channels
            assert info.pubsub == PubsubInfo("ably", service.endpoint, False, 4)
            token = await a.pubsub_token(CHANNEL)
            assert token.pubsub == info.pubsub
            claims = check_token(KEY, token.token, clock.now)
            assert isinstance(claims, Claims)
            assert claims.client_id == node_id("a")
            assert claims.capability == {
                f"{CHANNEL}-requestFiles": {"publish"}, f"{CHANNEL}-provideFiles": {"subscribe"}}
            assert (claims.issued, claims.expires - claims.issued) == (int(clock.now), 600)
            assert b'"iat":%d,' % int(clock.now) in base64.urlsafe_b64decode(token.token.split(".")[1] + "==")

    run_on(loop_kind, scenario())


def test_ably_s_own_place_is_named_without_a_connection() -> None:
    settings, credentials = check_ably(f" {API_KEY}\n", "")
    assert settings.info == PubsubInfo("ably", "main", True, 4)
    assert (settings.server, settings.url) == (("main.realtime.ably.net", 443), "https://main.realtime.ably.net")
    assert KEY.secret not in repr(credentials)
    assert check_ably(API_KEY, "ably.lab.org:8443").settings.info == PubsubInfo("ably", "ably.lab.org:8443", True, 4)


@pytest.mark.parametrize("key", ["", "app.key", "app.key:short", "appkey:0123456789", "app.key:with space 1234",
                                 "a/b.key:0123456789", f"{API_KEY}\nx"])
def test_what_is_no_api_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_ably(key, "")
    assert not key or key not in refused.value.message


@pytest.mark.parametrize("url", ["", "http://x", "nats://", "nats://user:pw@x", "nats://x/path", "nats://x:0", "ws://x?y",
                                 "nats://a,nats://b", "nats://x:99999", "nats://x\r\nPUB"])
def test_what_is_no_address_of_a_nats_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument):
        check_nats(url, new_key(ACCOUNT).public, new_key(ACCOUNT).seed)


def test_the_port_of_a_nats_server_need_not_be_named() -> None:
    for url, server in (("nats://x", ("x", 4222)), ("tls://x:1", ("x", 1)), ("ws://x/", ("x", 80)),
                        ("wss://x", ("x", 443))):
        assert check_nats(url, new_key(ACCOUNT).public, new_key(ACCOUNT).seed).settings.server == server


@parametrized
def test_messages_go_by_each_channel_s_own_service_at_once(tmp_path: Path, nats: NatsServer, loop_kind: str) -> None:
    """One node on three channels: the hub's broker, an Ably, a NATS. A token is of use in one place alone."""
    async def scenario() -> None:
        async with ably_service() as service, running_world(
                tmp_path, hub_engine_hosts=f"{service.endpoint} {nats.hosts}") as world:
            for name in ("two", "three"):
                await world.owner.call("createChannel", name=name)
            await use_ably(world, service, "two")
            await use_nats(world, nats, "three")
            a, b = await world.member("a"), await world.member("b")
            for name in ("two", "three"):
                for node, label in ((a, "a"), (b, "b")):
                    await node.join(await world.invite(channel=name), label, ["requestFiles", "provideFiles"])
            assert {info.name: info.pubsub.kind for info in (await a.node_config()).channels} == {
                CHANNEL: "ably", "two": "ably", "three": "nats"}
            for name in (CHANNEL, "two", "three"):
                got: asyncio.Queue[Message] = asyncio.Queue()
                sender, listener = await bands_of(world, a, "a", name), await bands_of(world, b, "b", name)
                await sender.connect()
                await listener.connect()
                await listener.subscribe(f"{name}-requestFiles", got.put_nowait)
                await sender.publish(f"{name}-requestFiles", b"to " + name.encode())
                assert (await asyncio.wait_for(got.get(), 10)).data == b"to " + name.encode()
                for other in {CHANNEL, "two", "three"} - {name}:
                    with pytest.raises(NotPermitted):
                        await sender.publish(f"{other}-requestFiles", b"{}")
                await sender.close()
                await listener.close()
            assert service.broker.stats()["published"] == 1

    run_on(loop_kind, scenario())


def test_a_token_of_before_the_change_is_not_vouched_for_after_a_restart(tmp_path: Path, nats: NatsServer) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, hub_engine_hosts=nats.hosts) as world:
            token = (await (await world.member("a")).pubsub_token(CHANNEL)).token
            await use_nats(world, nats)
        async with running_world(tmp_path, hub_engine_hosts=nats.hosts) as world:
            url = world.url.replace("http", "ws", 1) + f"/?access_token={token}&v=5"
            async with world.session.ws_connect(url) as websocket:
                assert (await websocket.receive_json())["action"] != 4

    run_on("uvloop", scenario())


# --- taking back


@parametrized
def test_what_is_revoked_holds_at_the_service_too_where_it_takes_tokens_back(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with (ably_service() as service,
                    running_world(tmp_path, clock, hub_engine_hosts=service.endpoint) as world):
            await use_ably(world, service)
            a = await world.member("a")
            bands = await bands_of(world, a, "a")
            await bands.connect()
            await bands.publish(BANDS[0], b"{}")
            clock.now += 1
            await world.owner.call("removeNode", channel=CHANNEL, node=node_id("a"))
            assert service.revoked == [{"targets": [f"clientId:{node_id('a')}"]}]
            await until(lambda: not bands.connected)
            await until(lambda: "not a member" in bands.why or "not permitted" in bands.why)
            await bands.close()
            b = await world.approved("b", world.owner)
            await b.join(await world.invite(), "b", ["requestFiles"])
            await world.owner.call("forgetNode", node=node_id("b"))
            assert service.revoked[1:] == [{"targets": [f"clientId:{node_id('b')}"]}], "of no channel by name"

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("how", ["refuses", "away"])
def test_a_service_that_does_not_take_tokens_back_holds_nothing_up(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with ably_service() as service, running_world(tmp_path, hub_engine_hosts=service.endpoint) as world:
            await use_ably(world, service)
            await world.member("a")
            if how == "away":
                await service.stop()
            service.refuses = True
            await world.owner.call("removeNode", channel=CHANNEL, node=node_id("a"))
            assert "hold at ably until they end" in caplog.text
            assert how == "away" or "Revocable tokens" in caplog.text
            assert KEY.secret not in caplog.text

    run_on("uvloop", scenario())


@parametrized
def test_a_channel_that_changes_its_service_cuts_its_nodes_and_tells_them_by_their_tokens(
    tmp_path: Path, nats: NatsServer, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, hub_engine_hosts=nats.hosts) as world:
            a = await world.member("a")
            bands = await bands_of(world, a, "a")
            await bands.connect()
            states = []
            bands._on_state = lambda up, why: states.append(up)  # type: ignore[attr-defined]
            await use_nats(world, nats)
            await until(lambda: False in states)
            token = await a.pubsub_token(CHANNEL)
            assert token.pubsub == PubsubInfo("nats", nats.url())
            assert token.seed.startswith("SU")
            await bands.close()

    run_on(loop_kind, scenario())


def test_where_nobody_is_cut_off_nodes_are_told_by_the_service_that_they_are_still_on(
    tmp_path: Path, nats: NatsServer
) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, hub_engine_hosts=nats.hosts) as world:
            await use_nats(world, nats)
            bands, got = await bands_of(world, await world.member("a"), "a"), asyncio.Queue[Message]()
            await bands.connect()
            await bands.subscribe(BANDS[0], got.put_nowait)
            await world.owner.call("setPubsub", channel=CHANNEL)
            assert (await asyncio.wait_for(got.get(), 20)).data == CHANNEL_CHANGED
            await bands.close()

    run_on("uvloop", scenario())


# --- who may


def test_services_are_their_owner_s_and_their_credentials_nobody_s(
    tmp_path: Path, nats: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        caplog.set_level(logging.DEBUG)
        async with serving() as server, running_world(
                tmp_path, hub_engine_hosts=f"{server.endpoint} {nats.hosts}") as world:
            await use_ably(world, server)
            await use_nats(world, nats)
            found = (await world.owner.call("listPubsubs"))["engines"]
            assert [(item["name"], item["kind"], item["account"], item["channels"]) for item in found] == [
                ("ably", "ably", KEY.name, []), ("nats", "nats", nats.account.public, [CHANNEL])]
            assert (await world.owner.call("listEngines"))["engines"] == [], "they are no buckets"
            assert (await world.owner.call("showChannel", channel=CHANNEL))["pubsub"] == "nats"
            other = await world.person("other@lab.org")
            await other.call("createChannel", name="theirs")
            for action, fields in (("setPubsub", {"channel": "theirs", "engine": found[0]["id"]}),
                                   ("removeEngine", {"engine": "ably"}),
                                   ("changePubsubCredentials", {"engine": "ably", "secret": API_KEY})):
                with pytest.raises(NotOnHub):
                    await other.call(action, **fields)
            with pytest.raises(NotPermitted):
                await other.call("setPubsub", channel=CHANNEL, engine=None)
            for action, fields in (("setBucket", {"engine": "ably"}), ("setPubsub", {"engine": "nothing"})):
                with pytest.raises(NotOnHub):
                    await world.owner.call(action, channel=CHANNEL, **fields)
            with pytest.raises(AlreadyExists):
                await world.owner.call("addNats", **{**nats.settings, "name": "ably"})
            with pytest.raises(InvalidArgument, match="is used by lab"):
                await world.owner.call("removeEngine", engine="nats")
            everything = json.dumps([found, await world.owner.call("showAudit")]) + caplog.text
            for secret in (KEY.secret, nats.signer.seed):
                assert secret not in everything
                for path in (tmp_path / "hub").glob("hub.db*"):
                    assert secret.encode() not in path.read_bytes()
            await world.owner.call("setPubsub", channel=CHANNEL, engine=None)
            await world.owner.call("removeEngine", engine="nats")

    run_on("uvloop", scenario())


def test_credentials_are_renewed_only_by_others_of_the_same_account(tmp_path: Path, nats: NatsServer) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, hub_engine_hosts=nats.hosts) as world:
            await world.owner.call("addAbly", name="ably", apiKey=API_KEY)
            await use_nats(world, nats)
            a = await world.member("a")
            with pytest.raises(InvalidArgument, match=r"is app\.key, not app\.other"):
                await world.owner.call("changePubsubCredentials", engine="ably", secret="app.other:0123456789abcdef")
            await world.owner.call("changePubsubCredentials", engine="ably", secret=f"{KEY.name}:another-secret")
            await world.owner.call("setPubsub", channel=CHANNEL, engine="ably")
            token = (await a.pubsub_token(CHANNEL)).token
            assert isinstance(check_token(TokenKey(KEY.name, "another-secret"), token, world.clock.now), Claims)
            await world.owner.call("changePubsubCredentials", engine="nats", secret=nats.account.seed)
            await world.owner.call("setPubsub", channel=CHANNEL, engine="nats")
            bands = await bands_of(world, a, "a")
            await bands.connect()
            await bands.close()

    run_on("uvloop", scenario())


def test_without_its_key_a_hub_gives_no_tokens_there_and_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.owner.call("createChannel", name="own")
            await world.owner.call("addAbly", name="ably", apiKey=API_KEY)
            await world.owner.call("setPubsub", channel=CHANNEL, engine="ably")
        (tmp_path / "hub" / "hub-key").unlink()
        async with running_world(tmp_path) as world:
            a = await world.member("a")
            await a.join(await world.invite(channel="own"), "a", ["requestFiles"])
            assert await a.pubsub_token("own")
            assert len((await a.node_config()).channels) == 2
            with pytest.raises(CredentialsUnreadable, match="engines --renew ably"):
                await a.pubsub_token(CHANNEL)
            await world.owner.call("removeNode", channel=CHANNEL, node=node_id("a"))

    run_on("uvloop", scenario())


# --- where the hub connects to


@parametrized
def test_private_addresses_are_refused_unless_the_admin_allows_them(
    tmp_path: Path, nats: NatsServer, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with serving() as server, running_world(tmp_path) as world:
            for action, fields in (("addNats", nats.settings), ("addNats", {**nats.settings, "url": nats.url("ws")}),
                                   ("addAbly", {"apiKey": API_KEY, "endpoint": f"http://{server.endpoint}"}),
                                   ("addAbly", {"apiKey": API_KEY, "endpoint": "169.254.169.254"})):
                with pytest.raises(AddressRefused):
                    await world.owner.call(action, name="x", **fields)
            assert (await world.owner.call("listPubsubs"))["engines"] == []

    run_on(loop_kind, scenario())


@parametrized
def test_a_test_goes_by_the_channel_s_service_and_only_where_the_hub_may(
    tmp_path: Path, nats: NatsServer, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with ably_service() as service:
            hosts = f"{service.endpoint} {nats.hosts}"
            async with running_world(tmp_path, hub_engine_hosts=hosts) as world:
                await use_ably(world, service)
                tried = await world.owner.call("testChannel", channel=CHANNEL)
                assert (tried["ok"], tried["pubsub"]) == (True, "ably"), tried
                assert service.broker.stats()["published"] == 1
                for name, url in (("tcp", nats.url()), ("web", nats.url("ws"))):
                    await use_nats(world, nats, name=name, url=url)
                    tried = await world.owner.call("testChannel", channel=CHANNEL)
                    assert (tried["ok"], tried["pubsub"]) == (True, name), tried
                await use_nats(world, nats, name="wrong", seed=new_key(ACCOUNT).seed)
                last = (await world.owner.call("testChannel", channel=CHANNEL))["steps"][-1]
                assert re.search("authorization violation|when it got the token", last["why"].lower())
                await world.owner.call("setPubsub", channel=CHANNEL, engine="tcp")
            async with running_world(tmp_path) as world:
                before = nats.log().count("Client connection created")
                last = (await world.owner.call("testChannel", channel=CHANNEL))["steps"][-1]
                assert "does not connect to" in last["why"]
                assert nats.log().count("Client connection created") == before

    run_on(loop_kind, scenario())


@parametrized
def test_a_service_is_added_chosen_and_tested_on_the_website_without_a_script(
    tmp_path: Path, nats: NatsServer, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with (serving() as server,
                    running_world(tmp_path, hub_engine_hosts=f"{server.endpoint} {nats.hosts}") as world,
                    browser(world) as mine):
            await sign_in(world, mine)
            page = await mine.get("/pubsubs")
            page = await mine.submit(page.form("/do/addNats"), **{**nats.settings, "name": "mine <b>"})
            assert "mine &lt;b&gt;" in page.text
            assert "mine <b>" not in page.text
            page = await mine.submit(page.form("/do/addAbly"), name="other", apiKey=API_KEY,
                                     endpoint=f"http://{server.endpoint}")
            line = (await world.owner.call("listPubsubs"))["engines"][0]
            page = await mine.get(f"/channels/{CHANNEL}")
            assert "messages go by the hub's own broker" in page.text
            page = await mine.submit(page.form("/do/setPubsub"), engine=line["id"])
            assert "The messages of lab go another way now." in page.text
            assert "pub/sub service does not tell what moves" in page.text
            tested = await mine.submit(page.form("/do/testChannel"))
            assert "Everything works." in tested.text
            page = await mine.submit((await mine.get(f"/channels/{CHANNEL}")).form("/do/setPubsub"), engine="")
            page = await mine.submit((await mine.get("/pubsubs")).form("/do/removeEngine", engine=line["id"]))
            assert "The hub has forgotten mine" in page.text
            assert nats.signer.seed not in page.text

    run_on(loop_kind, scenario())


@pytest.mark.live
def test_ably_itself_works(tmp_path: Path) -> None:
    """``KACHERY_TEST_ABLY_KEY``: an API key that may publish and subscribe."""
    key = os.environ.get("KACHERY_TEST_ABLY_KEY")
    if not key:
        pytest.skip("KACHERY_TEST_ABLY_KEY names no API key")

    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.owner.call("addAbly", name="real", apiKey=key)
            await world.owner.call("setPubsub", channel=CHANNEL, engine="real")
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert tried["ok"], tried

    run_on("uvloop", scenario())
