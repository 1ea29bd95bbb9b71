"""A node's life beside its hubs: late ones, changed permissions, lost channels, and an end at any moment."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from kachery_fast.errors import HubError, NodeError
from kachery_fast.node.ending import begin_task
from kachery_fast.node.node import Node
from kachery_fast.protocol.names import parse_file_uri
from tests.hub.support import CHANNEL, running_world
from tests.network import LOOPS, run_on
from tests.node.running import enroll, node_settings, running_node
from tests.node.support import CHUNK, data_of, nothing_left, until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)


def silent_address() -> tuple[socket.socket, str]:
    """An address that takes connections and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_hub_that_does_not_answer_delays_neither_start_nor_stop(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        listener, url = silent_address()
        with listener:
            settings = node_settings(tmp_path / "n", stall_seconds=30.0, connect_timeout_seconds=30.0)
            settings.storage_dir.mkdir()
            (settings.storage_dir / "kachery-fast.json").write_text(json.dumps({"hubs": [{"url": url}]}))
            begun = time.monotonic()
            async with running_node(settings, connected=False) as client:
                status, answer = await client.ask("POST", "/api/load", {"uri": "sha1://" + "ab" * 20})
                assert (status, answer["error"]) == (503, "HubUnreachable")
                assert url in answer["message"]
                assert "not asked yet; the channel 'lab' is not among those known: none" in answer["message"]
                begun_reload = time.monotonic()
                assert (await client.ask("POST", "/api/reload", {}))[0] == 200
                assert time.monotonic() - begun_reload < 10  # offer_wait_seconds are 0.4, the hub's limits are 30
            assert time.monotonic() - begun < 20
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_a_channel_that_two_hubs_have_is_ambiguous(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            worlds = [await stack.enter_async_context(running_world(tmp_path / name)) for name in ("one", "two")]
            settings = node_settings(tmp_path / "a")
            for world in worlds:
                await enroll(world, settings)
            urls = sorted(world.url for world in worlds)
            (settings.storage_dir / "kachery-fast.json").write_text(json.dumps(
                {"hubs": [{"url": url} for url in urls]}))
            a = await stack.enter_async_context(running_node(settings))
            await until(lambda: len(a.node.links()) == 2)
            for path in ("/api/load", "/api/read", "/api/why"):
                status, answer = await a.ask("POST", path, {"uri": "sha1://" + "ab" * 20})
                assert (status, answer["error"]) == (400, "InvalidArgument")
                assert all(url in answer["message"] for url in urls)
            (settings.storage_dir / "kachery-fast.json").write_text(json.dumps({"hubs": [{"url": urls[1]}]}))
            await a.ask("POST", "/api/reload", {})
            assert a.node.link_for(parse_file_uri("sha1://" + "ab" * 20), None).hub.url == urls[1]
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_a_stop_in_the_middle_of_a_transfer_is_quick_and_resumable(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            world = await stack.enter_async_context(running_world(tmp_path, bucket_rate_bytes_max=20 * CHUNK))
            settings = [node_settings(tmp_path / name) for name in "ab"]
            for each in settings:
                await enroll(world, each)
            a = await stack.enter_async_context(running_node(settings[0]))
            data = data_of(40 * CHUNK)
            stored = a.node.store.put_bytes(data)
            uri = f"sha1://{stored.sha1}?manifest={stored.manifest_sha1}"
            async with running_node(settings[1]) as b:
                load = asyncio.create_task(b.load(uri))
                await until(lambda: any(t["received"] > 3 * CHUNK for t in b.node.transfers.describe()))
                begun = time.monotonic()
            assert time.monotonic() - begun < 10
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            async with running_node(settings[1]) as b:
                assert (await b.load(uri))["type"] == "done"
                _, info = await b.ask("GET", "/api/info")
                assert info["traffic"]["downloaded_objects"] < 40
                assert b.node.store.find(stored.sha1).path.read_bytes() == data
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 90)


def test_permissions_and_channels_follow_the_hub(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running_world(tmp_path) as world:
            settings = node_settings(tmp_path / "a")
            await enroll(world, settings, ["requestFiles"])
            async with running_node(settings) as a:
                link = a.node.links()[0]
                first = link._channel
                node_id = a.node.identity.node_id
                await world.owner.call("grant", channel=CHANNEL, node=node_id, permissions=["provideFiles"])
                await a.ask("POST", "/api/reload", {})
                assert sorted(link.info.permissions) == ["provideFiles", "requestFiles"]
                assert link._channel is not first
                await until(lambda: link.connected)
                second = link._channel
                await a.ask("POST", "/api/reload", {})
                assert link._channel is second
                await world.owner.call("revoke", channel=CHANNEL, node=node_id, permissions=["requestFiles"])
                await a.ask("POST", "/api/reload", {})
                status, answer = await a.ask("POST", "/api/load", {"uri": "sha1://" + "ab" * 20})
                assert (status, answer["error"]) == (403, "NotPermitted")
                assert "channel grant" in answer["message"]
                (settings.storage_dir / "kachery-fast.json").write_text(json.dumps({"hubs": []}))
                await asyncio.gather(*(a.ask("POST", "/api/reload", {}) for _ in range(3)))
                assert a.node.links() == []
                status, answer = await a.ask("POST", "/api/load", {"uri": "sha1://" + "ab" * 20})
                assert (status, answer["error"]) == (404, "ChannelUnknown")
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_a_channel_that_a_strangers_message_shows_to_be_gone_is_closed_whole(loop_kind: str, tmp_path: Path) -> None:
    """The look at the hub for a stranger ends the very link that asked for it."""
    async def work() -> None:
        async with running_world(tmp_path) as world:
            settings = node_settings(tmp_path / "a")
            await enroll(world, settings)
            async with running_node(settings) as a:
                link = a.node.links()[0]
                channel = link._channel
                assert channel is not None
                leaver = world.node("x")
                leaver._key = a.node.identity.key
                await leaver.leave(CHANNEL)
                begin_task(link.look_again(), link._tasks)
                await until(lambda: a.node.links() == [])
                await until(lambda: not [task for task in asyncio.all_tasks() if "_supervise" in repr(task)])
                assert (await a.ask("GET", "/api/info"))[0] == 200
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_a_fault_in_the_talk_with_a_hub_does_not_end_it(loop_kind: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with running_world(tmp_path) as world:
            settings = node_settings(tmp_path / "a")
            await enroll(world, settings)
            async with running_node(settings) as a:
                side = next(iter(a.node._hubs.values()))
                with monkeypatch.context() as patched:
                    patched.setattr(side.client, "node_config", lambda *_: 1 // 0)
                    await a.ask("POST", "/api/reload", {})
                    assert "fault of the program" in side.why
                    patched.setattr(side.client, "node_config", refuse)
                    await a.ask("POST", "/api/reload", {})
                    assert "on fire" in side.why
                await a.ask("POST", "/api/reload", {})
                assert side.reachable
    run_on(loop_kind, work(), 60)


async def refuse(*_arguments: object) -> None:
    raise HubError(url="http://hub", why="on fire")


def test_a_damaged_configuration_is_an_error_at_start_that_leaves_nothing(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        settings = node_settings(tmp_path / "a")
        settings.storage_dir.mkdir()
        (settings.storage_dir / "kachery-fast.json").write_text("{")
        node = Node(settings)
        with pytest.raises(NodeError, match=r"kachery-fast\.json is damaged"):
            await node.start()
        await node.stop()
        assert not (settings.storage_dir / "client-auth").exists()
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_who_finds_a_node_listening_finds_its_code(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        settings = node_settings(tmp_path / "a")
        node = Node(settings)
        listen, found = node._api.start, []

        async def start() -> None:
            found.append((settings.storage_dir / "client-auth").read_text(encoding="ascii"))
            await listen()

        node._api.start = start  # type: ignore[method-assign]
        await node.start()
        assert [node.client_auth.accepts(code) for code in found] == [True]
        await node.stop()
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_the_client_code_changes_as_time_goes_by(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running_node(node_settings(tmp_path / "a", client_auth_seconds=1.0), connected=False) as a:
            first = a.headers()
            rotate, changes = a.node.client_auth.rotate, itertools.count()
            # Once; after two changes the first code were no good, however soon this comes to ask.
            a.node.client_auth.rotate = lambda: None if next(changes) else rotate()  # type: ignore[method-assign]
            await until(lambda: a.headers() != first)
            assert (await a.ask("GET", "/api/info", **first))[0] == 200  # the one before stays valid
            assert (await a.ask("GET", "/api/info"))[0] == 200
    run_on(loop_kind, work(), 60)
