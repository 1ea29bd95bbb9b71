"""A node that is started on a directory of 2022 is that node: its id, files, links, manifests, mutables and feeds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kachery_fast.node.takeover import take_over
from kachery_fast.protocol.manifest import parse_manifest
from tests.network import run_on
from tests.node.running import Client, node_settings, running_node
from tests.store.legacy_directory import MAIN, NODE, OWN_FEED, legacy_directory, sha1_of, snapshot

KEY = {"type": "feed_id_for_name", "feed_name": "diary"}


def started(root: Path, work: Callable[[Client], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running_node(node_settings(root), connected=False) as client:
            await work(client)

    run_on("asyncio", main(), 60)


def test_a_directory_of_2022_is_served_as_it_is(tmp_path: Path) -> None:
    old = legacy_directory(tmp_path / "store", tmp_path / "elsewhere")
    kept = [*old.databases, *(old.root / name for name in ("private.pem", "public.pem", "kachery-node-id", "owner"))]
    before = snapshot(*kept)

    async def check(client: Client) -> None:
        assert client.node.identity.node_id == NODE
        for data in (old.small, old.target.read_bytes(), old.manifest):
            assert await client.read(f"sha1://{sha1_of(data)}/x") == data
        name = sha1_of(old.manifest)
        uri = f"sha1://{sha1_of(old.large)}/x?manifest={name}"
        assert await client.read(uri, 19_999_990, 20_000_010) == old.large[19_999_990:20_000_010]
        assert (await client.load(uri))["type"] != "error"
        found = client.node.store.manifest_for(sha1_of(old.large), name)
        assert found == (name, parse_manifest(old.manifest, name=name))
        assert await client.ask("POST", "/api/mutable/get", {"key": KEY}) == (200, {"found": True, "value": OWN_FEED})
        assert client.node.feeds.owns(OWN_FEED)
        assert (await client.node.feeds.append(OWN_FEED, MAIN, [{"new": 1}], "main")).first == 700

    async def check_again(client: Client) -> None:
        assert (await client.node.feeds.append(OWN_FEED, MAIN, [{"new": 2}], "main")).first == 701

    started(old.root, check)
    started(old.root, check_again)
    assert snapshot(*kept) == before


def test_a_damaged_feeds_db_does_not_keep_the_node_from_starting(tmp_path: Path) -> None:
    old = legacy_directory(tmp_path / "store", tmp_path / "elsewhere", large_size_bytes=10)
    old.databases[1].write_bytes(b"nonsense" * 1000)

    async def check(client: Client) -> None:
        assert await client.read(f"sha1://{sha1_of(old.small)}/x") == old.small
        assert await client.ask("POST", "/api/mutable/get", {"key": "greeting"}) == (
            200, {"found": True, "value": "grüß dich 😀"})
        assert not client.node.feeds.owns(OWN_FEED)

    started(old.root, check)


def test_a_fault_of_the_take_over_is_logged_and_the_node_starts(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("nobody has foreseen this")

    monkeypatch.setattr("kachery_fast.node.takeover.take_over_in_place", fail)
    take_over(node_settings(tmp_path / "store"))
    assert "nobody has foreseen this" in caplog.text
    assert "the next start tries again" in caplog.text
