"""Nodes on a channel whose bucket has a quota and forgets what nobody reads."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.protocol.names import FileUri
from tests.hub.support import CHANNEL, World, running_world
from tests.network import LOOPS, run_on
from tests.node.running import Client, enrolled, running_node
from tests.node.support import CHUNK, data_of, nothing_left, until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)

YEAR = 365 * 24 * 3600.0


def beside_a_caring_hub(
    loop_kind: str, root: Path, work: Callable[..., Awaitable[None]], **hub: Any
) -> None:
    """Run ``work(world, a, b, c)`` with three nodes and a hub that looks for unread objects all the time."""
    async def run() -> None:
        async with AsyncExitStack() as stack:
            world = await stack.enter_async_context(running_world(root, expiry_seconds=0.01, **hub))
            await world.owner.call("changeChannel", channel=CHANNEL, unreadDaysMax=30)
            clients = []
            for of_node in await enrolled(world, root, {"a": None, "b": None, "c": None}):
                clients.append(await stack.enter_async_context(running_node(of_node)))
            for client in clients:
                await client.ask("POST", "/api/reload", {})
            await work(world, *clients)
    with nothing_left(root):
        run_on(loop_kind, run(), 100)


def objects(world: World) -> list[Path]:
    return [Path(folder) / name for folder, _, names in os.walk(world.settings.hub_dir / "bucket" / CHANNEL)
            for name in names]


def forget(world: World) -> list[Path]:
    """Let all objects look as if they had not been read for a year; return them."""
    paths = objects(world)
    for path in paths:
        try:
            os.utime(path, (time.time() - YEAR, path.stat().st_mtime))
        except FileNotFoundError:
            continue
    return paths


def inodes(paths: list[Path]) -> dict[Path, int]:
    found = {}
    for path in paths:
        try:
            found[path] = path.stat().st_ino
        except FileNotFoundError:
            continue
    return found


def store(client: Client, data: bytes) -> str:
    stored = client.node.store.put_bytes(data)
    return str(FileUri(stored.sha1, "", stored.manifest_sha1))


def test_a_file_whose_objects_have_expired_is_asked_for_again(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client, c: Client) -> None:
        data = data_of(5 * CHUNK + 17)
        uri = store(a, data)
        assert (await b.load(uri))["size"] == len(data)
        paths = forget(world)
        assert len(paths) == 7
        await until(lambda: not objects(world))
        assert (await c.load(uri))["size"] == len(data)
        assert await c.read(uri) == data
        assert sorted(objects(world)) == sorted(paths)

    beside_a_caring_hub(loop_kind, tmp_path, work)


def test_objects_that_expire_in_the_midst_of_a_load_are_brought_again(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client, c: Client) -> None:
        data = data_of(40 * CHUNK)
        uri = store(a, data)
        assert (await b.load(uri))["size"] == len(data)
        paths = objects(world)
        before = inodes(paths)
        loading = asyncio.ensure_future(c.load(uri))
        await until(lambda: list((tmp_path / "c").rglob("*.part")))
        forget(world)
        await until(lambda: len(inodes(paths)) < len(paths) or loading.done())
        assert (await loading)["size"] == len(data)
        assert await c.read(uri) == data
        after = inodes(paths)
        assert any(after.get(path) != inode for path, inode in before.items())

    beside_a_caring_hub(loop_kind, tmp_path, work, bucket_rate_bytes_max=2_000_000)


def test_who_asks_is_told_that_the_channel_is_full_and_what_to_do(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client, c: Client) -> None:
        data = data_of(3 * CHUNK)
        uri = store(a, data)
        await world.owner.call("changeChannel", channel=CHANNEL, sizeBytesMax=CHUNK)
        told = await b.load(uri)
        assert told["error"] == "NotAvailable"
        for part in (f"channel '{CHANNEL}' may have {CHUNK} bytes", f"kachery-fast channel set {CHANNEL}"):
            assert part in told["message"]
        await world.owner.call("changeChannel", channel=CHANNEL, sizeBytesMax=None)
        assert (await b.load(uri))["size"] == len(data)

    beside_a_caring_hub(loop_kind, tmp_path, work)


def test_uploads_are_counted_for_the_node_that_made_them(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client, c: Client) -> None:
        data = data_of(3 * CHUNK)
        uri = store(a, data)
        assert (await b.load(uri))["size"] == len(data)
        while True:
            nodes = (await world.owner.call("showUsage", channel=CHANNEL))["nodes"]
            moved = {line["label"]: (line["uploads"], line["downloads"]) for line in nodes}
            if moved.get("", (0, 0))[1] >= 4:
                break
        assert moved == {"a": (4, 0), "": (0, 4)}
        assert sum(line["downloadBytes"] for line in nodes) == sum(line["uploadBytes"] for line in nodes) > len(data)

    beside_a_caring_hub(loop_kind, tmp_path, work)
