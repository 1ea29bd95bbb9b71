"""Several hubs on one registry, as behind one address: what one of them knows holds at all of them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psycopg
import pytest

from kachery_fast.config import Settings
from kachery_fast.embedded.broker_relay import Revoked, encode_event
from kachery_fast.errors import InvalidSetting, NotPermitted, StaleMessage
from kachery_fast.hub.app import Hub
from kachery_fast.hub.bucket_moves import PAGE
from kachery_fast.hub.registry import registry_url
from kachery_fast.hub.relay import Relay
from kachery_fast.net.channel import AblyChannel, Message
from kachery_fast.net.hub import HubClient, OwnerClient
from kachery_fast.protocol.hub_bodies import GetNodeConfig, JoinChannel
from kachery_fast.protocol.messages import encode_hub_request
from kachery_fast.protocol.names import object_name

from ..network import LOOPS, run_on
from ..postgresql import Cluster
from .support import ALL, CHANNEL, OWNER, Clock, hub_process, hub_settings, node_id, node_key

pytestmark = pytest.mark.postgresql

BAND = f"{CHANNEL}-requestFiles"
SHA1_SIZE = 3000


class Pair(NamedTuple):
    """Two hub processes, an owner at each, and settings for clients."""

    urls: list[str]
    owners: list[OwnerClient]
    settings: Settings

    def client(self, hub: int, name: str) -> HubClient:
        return HubClient(self.urls[hub], node_key(name), self.settings)

    async def member(self, hub: int, name: str) -> HubClient:
        invitation = await self.owners[hub].call("invite", channel=CHANNEL, permissions=["all"])
        client = self.client(hub, name)
        await client.join(invitation["code"], name, ALL)
        return client


@contextmanager
def two_hubs(tmp_path: Path, **environment: str) -> Iterator[list[Path]]:
    """Two processes with a directory each, the same key and the same bucket; yields the directories."""
    key = tmp_path / "key"
    key.write_text(secrets.token_hex(32))
    shared = {"KACHERY_HUB_KEY_FILE": str(key), "KACHERY_HUB_BUCKET_DIR": str(tmp_path / "bucket"), **environment}
    directories = [tmp_path / "one", tmp_path / "two"]
    with hub_process(directories[0], **shared), hub_process(directories[1], **shared):
        yield directories


@contextlib.asynccontextmanager
async def pair_at(directories: list[Path], tmp_path: Path, *, channel: bool = True) -> AsyncIterator[Pair]:
    settings = hub_settings(tmp_path)
    urls = [(directory / "address").read_text().strip() for directory in directories]
    async with contextlib.AsyncExitStack() as stack:
        owners = [await stack.enter_async_context(OwnerClient(
            url, (directory / "owner-token").read_text().strip(), settings))
            for url, directory in zip(urls, directories, strict=True)]
        if channel:
            await owners[0].call("createChannel", name=CHANNEL)
        yield Pair(urls, owners, settings)


class Peer:
    """A node's connection to the bands, as a node has it."""

    def __init__(self, client: HubClient, name: str, settings: Settings) -> None:
        self.got: asyncio.Queue[Message] = asyncio.Queue()
        self.states: asyncio.Queue[bool] = asyncio.Queue()
        self.tokens: list[str] = []
        self._client = client
        self.channel = AblyChannel(
            CHANNEL, endpoint=client.url.removeprefix("http://"), tls=False, token=self._token,
            client_id=node_id(name), settings=settings, on_state=lambda up, _why: self.states.put_nowait(up))

    async def _token(self) -> dict[str, Any]:
        token = await self._client.pubsub_token(CHANNEL)
        self.tokens.append(token.token)
        return {"token": token.token, "issued": token.issued, "expires": token.expires,
                "capability": token.capability, "clientId": token.client_id}

    async def __aenter__(self) -> Peer:
        await self.channel.connect()
        await self.channel.subscribe(BAND, self.got.put_nowait)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self._client.close()

    async def next(self) -> bytes:
        return (await asyncio.wait_for(self.got.get(), 20)).data

    async def until(self, up: bool) -> None:
        while await asyncio.wait_for(self.states.get(), 20) is not up:
            pass


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_messages_published_at_one_hub_reach_nodes_at_the_other_in_order(tmp_path: Path, loop_kind: str) -> None:
    # The first is far longer than PostgreSQL takes with a NOTIFY.
    sent = [b"x" * 50_000, *(f"message {number}".encode() for number in range(100))]

    async def scenario(directories: list[Path]) -> None:
        async with pair_at(directories, tmp_path) as pair:
            one, two = [Peer(await pair.member(hub, name), name, pair.settings) for hub, name in ((0, "A"), (1, "B"))]
            async with one, two:
                for sender, receiver in ((one, two), (two, one)):
                    for data in sent:
                        await sender.channel.publish(BAND, data)
                    assert [await receiver.next() for _ in sent] == sent
                    assert [await sender.next() for _ in sent] == sent, "its own come back once"
                assert one.got.empty()
                assert two.got.empty()

    with two_hubs(tmp_path) as directories:
        run_on(loop_kind, scenario(directories))


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_revocation_at_one_hub_cuts_the_connection_at_the_other(tmp_path: Path, loop_kind: str) -> None:
    async def scenario(directories: list[Path]) -> None:
        async with pair_at(directories, tmp_path) as pair:
            client = await pair.member(0, "A")
            async with Peer(client, "A", pair.settings) as peer:
                await peer.until(True)
                before = peer.tokens[-1]
                await pair.owners[1].call("revoke", channel=CHANNEL, node="A", permissions=["requestFiles"])
                await peer.until(False)
                await peer.until(True)  # with what is left to it
                with pytest.raises(NotPermitted):
                    await peer.channel.publish(BAND, b"no more")
                await peer.channel.publish(f"{CHANNEL}-requestTasks", b"but this")
                for url in pair.urls:
                    assert await refused(url, before)
                    assert not await refused(url, peer.tokens[-1])

    with two_hubs(tmp_path) as directories:
        run_on(loop_kind, scenario(directories))


async def refused(url: str, token: str) -> bool:
    """Whether a broker does not let this token in."""
    where = url.replace("http", "ws", 1) + f"/?access_token={token}&v=5"
    async with aiohttp.ClientSession() as session, session.ws_connect(where) as websocket:
        return bool(json.loads(await websocket.receive_str())["action"] != 4)


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_request_counts_once_at_whichever_hub_it_comes_first(tmp_path: Path, loop_kind: str) -> None:
    async def scenario(directories: list[Path]) -> None:
        async with pair_at(directories, tmp_path) as pair, aiohttp.ClientSession() as session:
            async def post(hub: int, data: bytes) -> tuple[int, Any]:
                async with session.post(f"{pair.urls[hub]}/api/node", data=data) as response:
                    return response.status, await response.json()

            client = await pair.member(0, "A")
            asked = encode_hub_request(GetNodeConfig(
                channel="", time=client.now_ms(), id="1" * 32, label="", version=""), node_key("A"))
            assert (await post(0, asked))[0] == 200
            for hub in (1, 0, 1):
                status, answer = await post(hub, asked)
                assert (status, answer["error"]) == (StaleMessage.http_status, "StaleMessage")
            # A node that left is not brought back by its own words.
            invitation = await pair.owners[0].call("invite", channel=CHANNEL, permissions=["all"], uses=None)
            join = encode_hub_request(JoinChannel(
                channel="", time=client.now_ms(), id="2" * 32, invitation=invitation["code"], label="B",
                permissions=["all"]), node_key("B"))
            assert (await post(0, join))[0] == 200
            async with pair.client(0, "B") as leaving:
                await leaving.leave(CHANNEL)
            assert (await post(1, join))[1]["error"] == "StaleMessage"
            await client.close()

    with two_hubs(tmp_path) as directories:
        run_on(loop_kind, scenario(directories))


def test_hubs_share_owner_claims_and_bucket(tmp_path: Path) -> None:
    content = b"c" * SHA1_SIZE
    sha1 = hashlib.sha1(content).hexdigest()
    path = f"bucket/{CHANNEL}/sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"

    async def scenario(directories: list[Path]) -> None:
        async with pair_at(directories, tmp_path) as pair, aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True)) as session:
            for owner in pair.owners:
                found = await owner.call("listChannels")
                assert (found["owner"], [item["name"] for item in found["channels"]]) == (OWNER, [CHANNEL])
            clients = [await pair.member(0, "A"), await pair.member(1, "B")]
            (signed,) = await clients[0].sign_uploads(CHANNEL, [(sha1, len(content))])
            elsewhere = signed.url.replace(pair.urls[0], pair.urls[1])
            async with session.put(elsewhere, data=io.BytesIO(content), headers=signed.headers) as response:
                assert response.status == 200
            async with session.get(f"{pair.urls[0]}/{path}") as response:
                assert await response.read() == content
            ids = [f"{number:032x}" for number in range(60)]
            answers = await asyncio.gather(*(
                client.claim_task(CHANNEL, task, "action", "f") for task in ids for client in clients))
            assert sum(answer.granted for answer in answers) == len(ids)
            for client in clients:
                await client.close()

    with two_hubs(tmp_path) as directories:
        run_on("asyncio-debug", scenario(directories))


def test_two_channels_move_at_once_and_neither_waits_for_the_other(tmp_path: Path) -> None:
    """Each page is noted in the registry, by which a hub leaves alone for two minutes what another one moves."""
    shared = tmp_path / "shared"
    shared.mkdir()
    names = [object_name(channel, f"{number:040x}") for channel in (CHANNEL, "second") for number in range(PAGE + 1)]
    for name in names:
        (tmp_path / "bucket" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bucket" / name).write_bytes(b"damaged, so that it is read, and stays")

    async def scenario(directories: list[Path]) -> None:
        async with pair_at(directories, tmp_path) as pair:
            owner = pair.owners[0]
            await owner.call("createChannel", name="second")
            await owner.call("addDirectoryBucket", name="cluster", folder=str(shared))
            for channel in (CHANNEL, "second"):
                await owner.call("migrateBucket", channel=channel, engine="cluster")
            for channel in (CHANNEL, "second"):
                while (found := await owner.call("bucketMove", channel=channel))["state"] != "done":
                    await asyncio.sleep(0.05)
                assert found["damaged"] == PAGE + 1

    with two_hubs(tmp_path, KACHERY_HUB_BUCKET_FOLDERS=str(shared)) as directories:
        run_on("uvloop", asyncio.wait_for(scenario(directories), 60))


def test_a_hub_with_another_key_does_not_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        first, second = Hub(hub_settings(tmp_path)), Hub(hub_settings(tmp_path, hub_dir=tmp_path / "other"))
        await first.start()
        try:
            with pytest.raises(InvalidSetting, match="same key"):
                await second.start()
            (tmp_path / "other" / "hub-key").write_text((tmp_path / "hub" / "hub-key").read_text())
            await second.start()
            await second.stop()
        finally:
            await first.stop()
        (tmp_path / "other" / "hub-key").write_text(secrets.token_hex(32))
        await second.start()  # nobody else runs: it is their key from now on
        await second.stop()

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("text", ["", "secret-key-that-is-none", "ab" * 31])
def test_a_key_that_is_none_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    key = tmp_path / "key"
    key.write_text(text)

    async def scenario() -> None:
        with pytest.raises(InvalidSetting, match="openssl rand") as caught:
            await Hub(hub_settings(tmp_path, hub_key_file=str(key))).start()
        assert not text or text not in str(caught.value)
        with pytest.raises(InvalidSetting, match="No such file"):
            await Hub(hub_settings(tmp_path, hub_key_file=str(tmp_path / "absent"))).start()

    run_on("asyncio-debug", scenario())


# --- the way between them


class End:
    """A relay and what came through it."""

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        self.relay = Relay(registry_url(url, Path()), "ab" * 32, clock or Clock())
        self.got: asyncio.Queue[bytes] = asyncio.Queue()
        self.lost = asyncio.Event()

    async def __aenter__(self) -> End:
        await self.relay.start(self.got.put_nowait, self.lost.set)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.relay.close()

    async def take(self, count: int) -> list[bytes]:
        return [await asyncio.wait_for(self.got.get(), 30) for _ in range(count)]


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_what_is_sent_while_postgresql_restarts_arrives_afterwards_in_order(loop_kind: str) -> None:
    cluster = Cluster()

    async def scenario() -> None:
        url = cluster.url(cluster.make_database())
        async with End(url) as one, End(url) as two:
            one.relay.send(b"before")
            assert await two.take(1) == [b"before"]
            await asyncio.to_thread(cluster.stop)
            sent = [f"event {number}".encode() for number in range(500)]
            for event in sent[:400]:
                assert one.relay.send(event)
            await asyncio.to_thread(cluster.start)
            for event in sent[400:]:
                assert one.relay.send(event)
            assert await two.take(500) == sent
            two.relay.send(b"and back")
            assert await one.take(1) == [b"and back"]
            assert not one.lost.is_set()
            assert not two.lost.is_set()

    try:
        run_on(loop_kind, scenario())
    finally:
        cluster.close()


def test_who_was_cut_off_catches_up_and_a_late_comer_hears_what_is_kept(database: str) -> None:
    async def scenario() -> None:
        async with End(database) as one, End(database) as two:
            one.relay.send(b"1")
            assert await two.take(1) == [b"1"]
            cut(database)
            one.relay.send(b"2")
            assert await two.take(1) == [b"2"]
            async with End(database) as three:
                assert await three.take(2) == [b"1", b"2"]
                one.relay.send(b"3")
                assert await three.take(1) == [b"3"]
                assert not three.lost.is_set()

    run_on("asyncio-debug", scenario())


def test_a_gap_in_what_was_heard_is_told(database: str) -> None:
    async def scenario() -> None:
        async with End(database) as one, End(database) as two:
            one.relay.send(b"1")
            assert await two.take(1) == [b"1"]
            with psycopg.connect(database, autocommit=True) as connection:
                # As if number 2 had been written and forgotten while the other one was away.
                one.relay._sent += 1
                connection.execute("SELECT pg_notify('kachery_relay', %s)", [f"{one.relay.hub} 2 2"])
            await asyncio.wait_for(two.lost.wait(), 20)
            one.relay.send(b"3")
            assert await two.take(1) == [b"3"]

    run_on("asyncio-debug", scenario())


def test_what_waits_is_bounded_and_old_events_are_forgotten(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    async def scenario() -> None:
        end = End(database, clock)
        assert end.relay.send(b"x" * 16_000_000)
        assert not end.relay.send(b"x" * 1_000_000)
        async with end, End(database, clock) as other:
            assert len((await other.take(1))[0]) == 16_000_000
        clock.now += 1000
        async with End(database, clock), End(database, clock) as other:
            other.relay.send(b"later")
            with psycopg.connect(database, autocommit=True) as connection:
                count = None
                while count != 1:  # its first heartbeat has come
                    count = connection.execute("SELECT count(*) FROM relayed").fetchone()[0]  # type: ignore[index]
                    await asyncio.sleep(0.01)

    run_on("asyncio-debug", scenario())


def cut(url: str) -> None:
    """End every connection to a database but this one."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                           "WHERE datname = current_database() AND pid <> pg_backend_pid()")


def test_a_broker_that_may_have_missed_a_revocation_begins_anew(tmp_path: Path) -> None:
    async def scenario() -> None:
        hub = Hub(hub_settings(tmp_path))
        await hub.start()
        try:
            token = hub._broker.issue_token("node", {"lab-requestFiles": ["publish"]}, 600)["token"]
            assert not await refused(hub.local_url, token)
            hub._broker.receive(b"no event")
            hub._broker.receive(encode_event(Revoked("another", 1e12)))
            assert not await refused(hub.local_url, token)
            hub._broker.clock = lambda: Clock()() + 1
            hub._broker.forget_tokens()
            assert await refused(hub.local_url, token)
        finally:
            await hub.stop()

    run_on("asyncio-debug", scenario())
