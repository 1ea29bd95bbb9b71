"""A folder as a channel's bucket, at the hub: who may name which, what is in it, and moving there and back."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.embedded.bucket_files import ObjectFiles
from kachery_fast.embedded.bucket_mark import is_marked, mark
from kachery_fast.errors import HubError, InvalidArgument, NotOnHub, QuotaExceeded
from kachery_fast.protocol.names import object_name

from ..network import LOOPS, run_on
from ..node.support import until
from .browsing import browser, sign_in
from .support import CHANNEL, World, running_world

DAY = 24 * 3600.0


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared" / "lab").mkdir(parents=True)
    return tmp_path / "shared"


def world_of(tmp_path: Path, **overrides: Any) -> Any:
    return running_world(tmp_path / "world", hub_bucket_folders=f"/nowhere:{tmp_path / 'shared'}", **overrides)


async def use_folder(world: World, folder: Path) -> dict[str, Any]:
    added = await world.owner.call("addDirectoryBucket", name="cluster", folder=str(folder))
    await world.owner.call("setBucket", channel=CHANNEL, engine="cluster")
    return added


def marks(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".kachery-bucket-*")]


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_folder_is_marked_and_nodes_are_told_where_it_is(tmp_path: Path, shared: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path) as world:
            added = await use_folder(world, shared / "lab")
            assert (added["kind"], added["bucket"], added["channels"]) == ("directory", str(shared / "lab"), [])
            (mark,) = marks(shared / "lab")
            a = await world.member("a")
            (info,) = (await a.node_config()).channels
            assert info.bucket_url == f"file://{shared / 'lab'}#{mark.rpartition('-')[2]}"
            assert not info.private
            shown = await world.owner.call("listEngines")
            assert mark.rpartition("-")[2] not in str(shown), "that is between the hub and nodes"
            (signed,) = await a.sign_uploads(CHANNEL, [("ab" * 20, 5)])
            assert signed.headers == {}
            index = (await a.sign_feed_uploads(CHANNEL, "ab" * 32, "cd" * 20, [], 10))[-1]
            assert index.headers == {"replace": "1"}
            status, answer = await world.post("/api/getChannelBucketBaseUrl", b'{"channelName": "lab"}')
            assert (status, "load through a node" in answer["message"]) == (404, True)

    run_on(loop_kind, scenario())


def test_only_folders_that_the_admin_has_named_can_be_buckets(tmp_path: Path, shared: Path) -> None:
    (tmp_path / "other").mkdir()
    (shared / "out").symlink_to(tmp_path / "other")

    async def scenario() -> None:
        async with world_of(tmp_path) as world:
            for folder in (tmp_path / "other", shared / "out", shared / ".." / "other", Path("/")):
                with pytest.raises(InvalidArgument, match="KACHERY_HUB_BUCKET_FOLDERS"):
                    await world.owner.call("addDirectoryBucket", name="x", folder=str(folder))
            with pytest.raises(InvalidArgument, match="not a whole path"):
                await world.owner.call("addDirectoryBucket", name="x", folder="shared/lab")
            with pytest.raises(InvalidArgument, match="no NUL"):
                await world.owner.call("addDirectoryBucket", name="x", folder="/\0")
            with pytest.raises(InvalidArgument, match="There is no folder"):
                await world.owner.call("addDirectoryBucket", name="x", folder=str(shared / "absent"))
            (shared / "sealed").mkdir()
            (shared / "sealed" / "sub").write_text("a file")
            with pytest.raises(InvalidArgument, match="There is no folder"):
                await world.owner.call("addDirectoryBucket", name="x", folder=str(shared / "sealed" / "sub"))
            assert (await world.owner.call("listEngines"))["engines"] == []
        async with running_world(tmp_path / "second") as world:
            with pytest.raises(InvalidArgument, match="KACHERY_HUB_BUCKET_FOLDERS"):
                await world.owner.call("addDirectoryBucket", name="x", folder=str(shared / "lab"))

    run_on("uvloop", scenario())
    assert marks(tmp_path / "other") == []


def test_it_is_public_and_has_no_credentials(tmp_path: Path, shared: Path) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path) as world:
            await use_folder(world, shared / "lab")
            with pytest.raises(InvalidArgument, match="would be private"):
                await world.owner.call("changeChannel", channel=CHANNEL, private=True)
            with pytest.raises(InvalidArgument, match="is a folder"):
                await world.owner.call("changeCredentials", engine="cluster", accessKey="a", secretKey="b")
            with pytest.raises(InvalidArgument, match="is used by lab"):
                await world.owner.call("removeEngine", engine="cluster")
            await world.owner.call("setBucket", channel=CHANNEL)
            await world.owner.call("removeEngine", engine="cluster")
            with pytest.raises(NotOnHub):
                await world.owner.call("setBucket", channel=CHANNEL, engine="cluster")

    run_on("uvloop", scenario())


def test_a_channel_moves_there_and_back_and_its_owner_looks_into_it(tmp_path: Path, shared: Path) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path) as world:
            await world.owner.call("addDirectoryBucket", name="cluster", folder=str(shared / "lab"))
            a = await world.member("a")
            for data in (b"one", b"two"):
                assert await world.upload(a, data) == 200
            await moved(world, "cluster")
            names = sorted(object_name(CHANNEL, hashlib.sha1(data).hexdigest()) for data in (b"one", b"two"))
            listed = await world.owner.call("listObjects", channel=CHANNEL)
            assert [line["name"] for line in listed["objects"]] == names
            assert all((shared / "lab" / name).is_file() for name in names)
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert (tried["ok"], len(tried["steps"])) == (True, 5)
            (shared / "lab" / names[0]).write_bytes(b"damaged")
            assert await a.report_corrupt(CHANNEL, names[0].rpartition("/")[2], "0" * 40)
            assert not (shared / "lab" / names[0]).exists()
            await moved(world, None)
            assert await world.download(names[1].rpartition("/")[2]) is not None
            await world.owner.call("setBucket", channel=CHANNEL, engine="cluster")
            (shared / "lab" / marks(shared / "lab")[0]).unlink()  # as of a file system that is not mounted
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert "is its file system mounted" in tried["steps"][0]["advice"].lower()

    run_on("uvloop", scenario())


def test_what_nobody_reads_there_goes_and_makes_room(tmp_path: Path, shared: Path) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path, expiry_seconds=0.01) as world:
            await use_folder(world, shared / "lab")
            a, files = await world.member("a"), ObjectFiles(shared / "lab", shared=True, clock=world.clock)
            names = [object_name(CHANNEL, f"{number:040x}") for number in range(3)]
            for name in names:
                files.write(name, bytes(100))
                world.clock.now += 3600 * 3
            await world.owner.call("changeChannel", channel=CHANNEL, sizeBytesMax=350, unreadDaysMax=30)
            while not (await world.owner.call("showUsage", channel=CHANNEL))["counted"]:
                await asyncio.sleep(0.01)
            assert len(await a.sign_uploads(CHANNEL, [("ab" * 20, 100)])) == 1, "one makes room for another"
            assert [files.offered(name) for name in names] == [False, True, True]
            with pytest.raises(QuotaExceeded, match="was all used lately"):
                await a.sign_uploads(CHANNEL, [("ac" * 20, 250)])
            world.clock.now += 20 * DAY
            with files.reading(names[2]):  # as a node does
                pass
            world.clock.now += 11 * DAY
            await until(lambda: not (shared / "lab" / names[1]).exists())
            assert (shared / "lab" / names[2]).exists()

    run_on("uvloop", scenario())


@pytest.mark.parametrize("mounted", [False, True], ids=["not mounted", "not to be read"])
def test_a_folder_that_fails_keeps_no_other_bucket_from_being_cleared(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool
) -> None:
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).startswith(str(shared)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    async def scenario() -> None:
        async with world_of(tmp_path, expiry_seconds=0.01) as world:
            await use_folder(world, shared / "lab")
            if mounted:
                monkeypatch.setattr(os, "scandir", refuse)  # as of a user that is not root
                with pytest.raises(HubError, match="Permission denied"):
                    await world.owner.call("listObjects", channel=CHANNEL)
            else:
                (shared / "lab" / marks(shared / "lab")[0]).unlink()
            a = await world.member("a")
            await world.owner.call("createChannel", name="second")
            await a.join(await world.invite(channel="second"), "a")
            for channel in (CHANNEL, "second"):
                await world.owner.call("changeChannel", channel=channel, unreadDaysMax=30)
            (leave,) = await a.sign_uploads("second", [(hashlib.sha1(b"x").hexdigest(), 1)])
            async with world.session.put(leave.url, data=b"x", headers=leave.headers) as response:
                assert response.status == 200
            world.clock.now += 31 * DAY
            await until(lambda: not (world.settings.hub_dir / "bucket" / "second").exists())

    run_on("uvloop", scenario())


def test_a_folder_may_be_marked_again_by_who_is_not_root() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as made:  # which anybody can reach
        folder = Path(made)
        folder.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
        if not (child := os.fork()):
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                mark(folder, "ab" * 16)
                mark(folder, "ab" * 16)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert is_marked(folder, "ab" * 16)


def test_channels_use_different_buckets_at_once(tmp_path: Path, shared: Path) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path) as world:
            await use_folder(world, shared / "lab")
            await world.owner.call("createChannel", name="second")
            a = await world.member("a")
            invitation = await world.owner.call("invite", channel="second", permissions=["all"])
            await a.join(invitation["code"], "a", ["all"])
            urls = {info.name: info.bucket_url for info in (await a.node_config()).channels}
            assert urls[CHANNEL].startswith("file:")
            assert urls["second"].startswith(world.url)
            for channel, sort in ((CHANNEL, "file:"), ("second", world.url)):
                (signed,) = await a.sign_uploads(channel, [("ab" * 20, 5)])
                assert signed.url.startswith(sort)

    run_on("uvloop", scenario())


def test_the_website_adds_a_folder_and_moves_a_channel_there(tmp_path: Path, shared: Path) -> None:
    async def scenario() -> None:
        async with world_of(tmp_path) as world, browser(world) as mine:
            await sign_in(world, mine)
            assert await world.upload(await world.member("a"), b"x") == 200
            page = await mine.get("/buckets")
            page = await mine.submit(page.form("/do/addDirectoryBucket"), name="cluster", folder=str(shared / "lab"))
            assert "The hub knows the folder cluster now." in page.note()
            assert f"<code>{shared / 'lab'}</code>" in page.text
            assert "Other credentials" not in page.text
            page = await mine.get(f"/channels/{CHANNEL}")
            assert "The last move" not in page.text
            (line,) = (await world.owner.call("listEngines"))["engines"]
            page = await mine.submit(page.form("/do/migrateBucket"), engine=line["id"])
            assert "The channel lab moves." in page.note()
            while "The last move to another bucket is done" not in page.text:
                page = await mine.get(f"/channels/{CHANNEL}")
            assert "is done: 1 object, 1 B copied." in page.text
            assert "your bucket <strong>cluster</strong>" in page.text
            assert [form.action for form in page.forms].count("/do/stopMove") == 0

    run_on("uvloop", scenario())


async def moved(world: World, engine: str | None) -> None:
    await world.owner.call("migrateBucket", channel=CHANNEL, engine=engine)
    while (await world.owner.call("bucketMove", channel=CHANNEL))["state"] != "done":
        await asyncio.sleep(0.01)
