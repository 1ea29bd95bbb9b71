"""A hub moves as one file: to another database and back, while it runs, and never by halves."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from kachery_fast.errors import AlreadyExists, DiskError, InvalidArgument, InvalidSetting, NotOnHub
from kachery_fast.hub.archive import ArchiveReader, ArchiveWriter
from kachery_fast.hub.moving import LEFT_BEHIND, export_hub, import_hub
from kachery_fast.hub.registry import HEAD, reading, registry_url
from kachery_fast.hub.tables import audit, engines, metadata, nodes, sessions
from kachery_fast.protocol.hub_bodies import GetNodeConfig
from kachery_fast.protocol.messages import encode_hub_request

from ..network import run_on
from ..postgresql import the_cluster
from .support import ALL, CHANNEL, OWNER, Clock, World, hub_settings, node_id, node_key, running_world

TASK = "7a" * 16
CONTENT = os.urandom(3_000_000)


@pytest.fixture
def empty_database() -> Iterator[str]:
    cluster = the_cluster()
    name = cluster.make_database(empty=True)
    yield cluster.url(name)
    cluster.drop_database(name)


async def fill(world: World) -> None:
    """Give a hub something of every kind that is hard to carry."""
    client = await world.member("A")
    await client.claim_task(CHANNEL, TASK, "action", "f")
    assert await world.upload(client, CONTENT) == 200
    await world.owner.call("changeChannel", channel=CHANNEL, description="µm, \"quotes\"\nlines", sizeBytesMax=2**40)
    now_ms = int(world.clock() * 1000)

    def more(connection: sa.engine.Connection) -> None:
        connection.execute(engines.insert().values(
            id="e" * 32, owner=OWNER, kind="s3", name="ours", settings="{}", secret=bytes(range(256)), created=now_ms))
        connection.execute(sessions.insert().values(
            hash="s" * 64, owner=OWNER, agent="", created=now_ms, last_seen=now_ms, expires=now_ms))
        connection.execute(nodes.insert(), [
            {"id": f"{number:064x}", "owner": OWNER, "label": "", "version": "", "created": 1, "last_seen": 1}
            for number in range(2_000)])

    await world.hub._registry.call(more)


def rows_of(database: str, tmp_path: Path) -> dict[str, list[Any]]:
    with reading(registry_url(database, tmp_path)) as connection:
        return {table.name: sorted(repr(tuple(row)) for row in connection.execute(sa.select(table)))
                for table in metadata.sorted_tables if table not in LEFT_BEHIND}


def test_a_hub_moves_to_postgresql_and_back_and_its_nodes_go_on(tmp_path: Path, empty_database: str) -> None:
    clock = Clock()
    places = [(tmp_path / "first", ""), (tmp_path / "second", empty_database), (tmp_path / "third", "")]

    async def scenario() -> None:
        kept: dict[str, list[Any]] = {}
        for number, (directory, database) in enumerate(places):
            overrides: dict[str, Any] = {"hub_dir": directory, "hub_database": database}
            settings = hub_settings(tmp_path, **overrides)
            if number:
                moved = await import_hub(settings, tmp_path / f"hub-{number - 1}.tar", int(clock() * 1000))
                assert moved.objects == 1
                assert rows_of(database, directory) == kept
                assert (directory / "hub-key").read_text() == (places[0][0] / "hub-key").read_text()
                assert not {path.name for path in directory.iterdir()} & {".import", "lock.tmp"}
                clock.now += 1
            async with running_world(tmp_path, clock, channel=not number, **overrides) as world:
                if not number:
                    await fill(world)
                client = world.node("A")
                (info,) = (await client.node_config()).channels
                assert (info.name, info.owner, info.permissions) == (CHANNEL, OWNER, sorted(ALL))
                assert await world.download(hashlib.sha1(CONTENT).hexdigest()) == CONTENT
                assert (await client.find_task(CHANNEL, TASK)).state == "claimed"
                # What counts up counts on.
                await world.owner.call("grant", channel=CHANNEL, node=node_id("A"), permissions=["all"])
                file = tmp_path / f"hub-{number}.tar"
                moved = export_hub(settings, file)  # while it runs
                assert stat.S_IMODE(file.stat().st_mode) == 0o600
                kept = rows_of(database, directory)
                assert moved.rows == sum(map(len, kept.values())) > 2_000
                assert len(kept[audit.name]) == number + 4
                assert repr(bytes(range(256))) in kept[engines.name][0]

    run_on("asyncio-debug", scenario())
    with tarfile.open(tmp_path / "hub-0.tar") as archive:  # as anybody can read it
        names = archive.getnames()
    assert names[:3] == ["hub.json", "hub-key", "owner-token"]
    assert names[-1] == "end.json"
    assert not any("sessions" in name for name in names)


def test_what_was_heard_by_the_old_hub_is_not_taken_by_the_new_one(tmp_path: Path, empty_database: str) -> None:
    clock = Clock()

    async def scenario() -> None:
        sent: list[bytes] = []
        async with running_world(tmp_path, clock) as world:
            client = await world.member("A")
            await client.node_config()
            sent.append(a_request(clock))
            assert (await world.post("/api/node", sent[0]))[0] == 200
            export_hub(world.settings, tmp_path / "hub.tar")
        clock.now += 1
        elsewhere: dict[str, Any] = {"hub_dir": tmp_path / "new", "hub_database": empty_database}
        await import_hub(hub_settings(tmp_path, **elsewhere), tmp_path / "hub.tar", int(clock() * 1000))
        async with running_world(tmp_path, clock, channel=False, **elsewhere) as world:
            assert (await world.post("/api/node", sent[0]))[1]["error"] == "StaleMessage"
            await world.node("A").node_config()

    run_on("asyncio-debug", scenario())


def a_request(clock: Clock) -> bytes:
    return encode_hub_request(GetNodeConfig(
        channel="", time=int(clock() * 1000), id="1" * 32, label="", version=""), node_key("A"))


@pytest.fixture
def exported(tmp_path: Path) -> bytes:
    """A small hub as a file."""
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.upload(await world.member("A"), b"content")
            export_hub(world.settings, tmp_path / "good.tar")

    run_on("asyncio-debug", scenario())
    return (tmp_path / "good.tar").read_bytes()


def rewritten(data: bytes, change: Callable[[str, bytes], list[tuple[str, bytes]]]) -> bytes:
    """The archive with other members, and a digest that is right for them."""
    source, target = ArchiveReader(io.BytesIO(data)), io.BytesIO()
    writer = ArchiveWriter(target)
    while (member := source.next()) is not None:
        for name, content in change(member[0], source.content()):
            writer.add(name, content)
    writer.end()
    return target.getvalue()


def adding(name: str, content: bytes = b"x") -> Callable[[bytes], bytes]:
    return lambda data: rewritten(data, lambda found, kept: [
        (found, kept), *([(name, content)] if found.startswith("objects/") else [])])


def replacing(begin: str, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda data: rewritten(data, lambda found, kept: [
        (found, change(kept) if found.startswith(begin) else kept)])


def of_type(kind: bytes) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        info = tarfile.TarInfo("objects/link")
        info.type, info.linkname = kind, "/etc/passwd"
        return data[:512 * 2] + info.tobuf(tarfile.USTAR_FORMAT) + data[512 * 2:]
    return changed


BAD: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[:len(data) // 2],
    "without its end": lambda data: data[:-512 * 4],
    "empty": lambda data: b"",
    "something else": lambda data: b"no archive" * 1000,
    "a bit is flipped": lambda data: data.replace(b"content", b"kontent"),
    "a path that climbs": adding("objects/../../../etc/cron.d/x"),
    "an absolute path": adding("objects//etc/passwd"),
    "another file": adding("../escaped"),
    "a hidden file": adding("objects/.incoming/x"),
    "a name of no object": adding(f"objects/{CHANNEL}/sha1/aa/bb/cc/{'ab' * 20}"),
    "an object twice": lambda data: rewritten(data, lambda name, kept: [(name, kept)] * (
        2 if name.startswith("objects/") else 1)),
    "a table that stays behind": adding("registry/sessions/0", b"{}"),
    "an unknown table": adding("registry/sqlite_master/0", b"{}"),
    "a row of other columns": replacing("registry/nodes", lambda rows: b'{"id":"x"}\n'),
    "a row that refers to nobody": replacing("registry/nodes", lambda rows: rows.replace(OWNER.encode(), b"nobody")),
    "no JSON": replacing("registry/nodes", lambda rows: b"{" * 1000),
    "a key that is none": replacing("hub-key", lambda key: b"\xff" * 64),
    "another version": replacing("hub.json", lambda head: head.replace(HEAD.encode(), b"0009")),
    "a symbolic link": of_type(tarfile.SYMTYPE),
    "a device": of_type(tarfile.CHRTYPE),
    "a pax header": of_type(tarfile.XHDTYPE),
    "a sparse file": of_type(tarfile.GNUTYPE_SPARSE),
}


@pytest.mark.parametrize("case", BAD)
def test_an_archive_that_is_not_right_leaves_nothing(tmp_path: Path, exported: bytes, case: str) -> None:
    file = tmp_path / "bad.tar"
    file.write_bytes(BAD[case](exported))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((InvalidArgument, AlreadyExists)):
        asyncio.run(import_hub(hub_settings(tmp_path, hub_dir=tmp_path / "new"), file, 0))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("case", ["without its end", "a row that refers to nobody"])
def test_an_archive_that_is_not_right_leaves_nothing_in_postgresql(
    tmp_path: Path, exported: bytes, case: str, empty_database: str
) -> None:
    file = tmp_path / "bad.tar"
    settings = hub_settings(tmp_path, hub_dir=tmp_path / "new", hub_database=empty_database)
    file.write_bytes(BAD[case](exported))
    with pytest.raises(InvalidArgument):
        asyncio.run(import_hub(settings, file, 0))
    assert not (tmp_path / "new").exists()
    assert not any(rows_of(empty_database, tmp_path).values())
    file.write_bytes(exported)
    asyncio.run(import_hub(settings, file, 0))


def test_an_import_replaces_no_hub_no_objects_and_no_key(tmp_path: Path, exported: bytes) -> None:
    file = tmp_path / "good.tar"
    with pytest.raises(AlreadyExists, match="empty directory"):
        asyncio.run(import_hub(hub_settings(tmp_path), file, 0))
    bucket = tmp_path / "hub" / "bucket"
    with pytest.raises(AlreadyExists, match="--no-objects"):
        asyncio.run(import_hub(hub_settings(
            tmp_path, hub_dir=tmp_path / "new", hub_bucket_dir=str(bucket)), file, 0))
    assert any((bucket / CHANNEL).rglob("*")), "it is as it was"
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    with pytest.raises(InvalidSetting, match="not the key"):
        asyncio.run(import_hub(hub_settings(tmp_path, hub_dir=tmp_path / "new", hub_key_file=str(key)), file, 0))
    assert not (tmp_path / "new").exists()
    key.unlink()
    settings = hub_settings(tmp_path, hub_dir=tmp_path / "new", hub_key_file=str(key))
    asyncio.run(import_hub(settings, file, 0))
    assert key.read_text() == (tmp_path / "hub" / "hub-key").read_text()


def test_an_export_overwrites_nothing_and_needs_a_hub(tmp_path: Path, exported: bytes) -> None:
    with pytest.raises(AlreadyExists, match=r"good\.tar"):
        export_hub(hub_settings(tmp_path), tmp_path / "good.tar")
    assert (tmp_path / "good.tar").read_bytes() == exported
    with pytest.raises(NotOnHub):
        export_hub(hub_settings(tmp_path, hub_dir=tmp_path / "none"), tmp_path / "other.tar")
    with pytest.raises(DiskError):
        export_hub(hub_settings(tmp_path), tmp_path / "no folder" / "other.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "good.tar"}


def test_the_commands_move_a_hub_and_say_what_they_did(tmp_path: Path, exported: bytes) -> None:
    def run(*arguments: str) -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-m", "kachery_fast", "hub", *arguments, "--json"],
                              capture_output=True, check=True)
        return msgspec.json.decode(done.stdout, type=dict[str, Any])

    told = run("export", str(tmp_path / "hub.tar"), "--dir", str(tmp_path / "hub"), "--no-objects")
    assert (told["objects"], told["file"]) == (0, str(tmp_path / "hub.tar"))
    back = run("import", str(tmp_path / "hub.tar"), "--dir", str(tmp_path / "new"))
    assert (back["rows"], back["objects"]) == (told["rows"], 0)
    assert (tmp_path / "new" / "hub-key").read_text() == (tmp_path / "hub" / "hub-key").read_text()
