"""The hub as a program: its pages, its directory, its start and its end."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import time
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner, Result

from kachery_fast.cli import program
from kachery_fast.errors import AlreadyExists, DiskError, InvalidArgument
from kachery_fast.hub.addresses import local_url, public_url
from kachery_fast.hub.app import Hub, run_hub
from kachery_fast.hub.directory import HubDirectory, running_hub

from ..network import LOOPS, run_on
from .support import OWNER, hub_settings, running_world


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_terminal_is_told_what_this_is_and_how_to_join(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world, world.session.get(world.url + "/") as page:
            assert "kachery-fast hub" in await page.text()
            assert page.content_type == "text/plain"
            async with world.session.get(world.url + "/join/abc-_1$(reboot)'x") as page:
                assert f"kachery-fast node join {world.url}/join/abc-_1rebootx\n" in await page.text()
            async with world.session.get(world.url + "/api/health") as answer:
                health = await answer.json()
                assert health["ok"] is True
                assert health["time"] == int(world.clock() * 1000)
            async with world.session.get(world.url + "/api/node") as answer:
                assert answer.status == 405
                assert "POST" in (await answer.json())["message"]
            for path in ("/nothing/here", "/apis", "/bucketful"):
                async with world.session.get(world.url + path) as answer:
                    assert answer.status == 404
                    assert (await answer.json())["error"] == "NotOnHub"

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_an_object_wants_a_connection_of_its_own(tmp_path: Path, loop_kind: str) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path, channel=False) as world, aiohttp.ClientSession() as keeping:
            await (await keeping.get(world.url + "/api/health")).read()
            async with keeping.get(world.url + "/bucket/lab/sha1/aa") as answer:
                assert answer.status == 421
                assert answer.headers["Connection"] == "close"

    run_on(loop_kind, scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_the_hub_starts_and_stops_again_and_again_with_clients_connected(
        tmp_path: Path, loop_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kachery_fast.hub.app.STOP_SECONDS", 60.0)

    async def scenario() -> None:
        settings = hub_settings(tmp_path)
        async with aiohttp.ClientSession() as session:
            for _ in range(3):
                hub = Hub(settings)
                await hub.start()
                assert running_hub(settings.hub_dir) == os.getpid()
                assert (settings.hub_dir / "address").read_text().strip() == hub.local_url
                await (await session.get(hub.local_url + "/api/health")).read()  # its connection is kept
                begin = time.monotonic()
                await hub.stop()
                assert time.monotonic() - begin < 30, "an idle client does not hold the hub up"
                await hub.stop()
                assert running_hub(settings.hub_dir) is None
                assert not (settings.hub_dir / "address").exists()

    run_on(loop_kind, scenario())


def test_what_the_hub_keeps_secret_is_closed_to_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            folder = world.settings.hub_dir
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            for name in ("hub-key", "owner-token", "hub.db"):
                assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600, name
            token = (folder / "owner-token").read_text().strip()
            for path in folder.iterdir():
                if path.is_file() and path.name != "owner-token":
                    assert token.encode() not in path.read_bytes(), "only its hash is kept"
            (folder / "hub-key").chmod(0o644)
            HubDirectory(folder).secret("upload-secret")
            assert stat.S_IMODE((folder / "hub-key").stat().st_mode) == 0o600

    run_on("asyncio-debug", scenario())


def test_a_second_hub_on_the_directory_or_the_port_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            with pytest.raises(AlreadyExists, match="hub stop"):
                await Hub(world.settings).start()
            elsewhere = hub_settings(tmp_path, hub_dir=tmp_path / "elsewhere", hub_port=world.hub.port)
            with pytest.raises(InvalidArgument, match="Cannot listen"):
                await Hub(elsewhere).start()
            assert running_hub(elsewhere.hub_dir) is None, "the lock was given back"
            assert (await world.owner.call("listChannels"))["owner"] == OWNER

    run_on("asyncio-debug", scenario())


def test_a_directory_that_cannot_be_used_is_refused_and_nothing_is_left_open(tmp_path: Path) -> None:
    async def scenario() -> None:
        in_the_way = tmp_path / "file"
        in_the_way.write_text("")
        with pytest.raises(DiskError):
            await Hub(hub_settings(tmp_path, hub_dir=in_the_way / "hub")).start()
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        (damaged / "hub.db").write_bytes(b"this is no database, and longer than a header" * 100)
        with pytest.raises(DiskError, match="not a database"):
            await Hub(hub_settings(tmp_path, hub_dir=damaged)).start()
        assert running_hub(damaged) is None

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize(("call", "error", "expected"), [
    ("flock", OSError(errno.ENOLCK, "No locks available"), DiskError),
    ("ftruncate", OSError(errno.EROFS, "Read-only file system"), DiskError),
    ("pwrite", OSError(errno.ENOSPC, "No space left on device"), DiskError),
    ("flock", BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable"), AlreadyExists),
])
def test_a_directory_that_fails_while_it_is_taken_is_an_error_and_no_lock_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: OSError, expected: type[Exception]
) -> None:
    def broken(*_: object) -> None:
        raise error

    directory = HubDirectory(tmp_path / "hub")
    with monkeypatch.context() as patched:
        patched.setattr(fcntl if call == "flock" else os, call, broken)
        with pytest.raises(expected):
            directory.acquire()
    assert running_hub(directory.path) is None
    directory.acquire()
    directory.release()


def test_the_address_is_there_only_when_what_was_to_be_prepared_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = hub_settings(tmp_path)
        address = settings.hub_dir / "address"
        seen: list[bool] = []

        async def prepare(hub: Hub) -> None:
            seen.append(address.exists())
            if await hub.ensure_owner("other@lab.org") != "other@lab.org":
                raise InvalidArgument(what="another owner")

        hub = Hub(settings)
        await hub.start()
        await hub.ensure_owner(OWNER)
        await hub.stop()
        with pytest.raises(InvalidArgument, match="another owner"):
            await Hub(settings).start(prepare=prepare)
        assert seen == [False]
        assert not address.exists()
        assert running_hub(settings.hub_dir) is None

    run_on("asyncio-debug", scenario())


def test_a_hub_started_again_in_the_background_for_another_owner_is_refused(tmp_path: Path) -> None:
    directory = str(tmp_path / "hub")

    def start(owner: str) -> Result:
        return CliRunner().invoke(program, ["hub", "--port", "0", "--dir", directory, "--owner", owner, "--detach"])

    first = start(OWNER)
    assert first.exit_code == 0, first.output
    stopped = CliRunner().invoke(program, ["hub", "stop", "--dir", directory])
    assert stopped.exit_code == 0, stopped.output
    second = start("other@lab.org")
    assert second.exit_code != 0
    assert f"The hub in {directory} failed: it ended at once, with exit code 2. Its log" in second.stderr
    assert f"belongs to {OWNER}, not to other@lab.org" in second.stderr
    assert running_hub(tmp_path / "hub") is None


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_hub_in_order(tmp_path: Path, loop_kind: str, number: signal.Signals) -> None:
    async def scenario() -> None:
        settings = hub_settings(tmp_path)

        async def ready(hub: Hub) -> None:
            assert running_hub(settings.hub_dir) == os.getpid()
            os.kill(os.getpid(), number)

        await run_hub(settings, ready=ready)
        assert running_hub(settings.hub_dir) is None

    run_on(loop_kind, scenario())


def test_the_address_for_others_is_not_the_wildcard(tmp_path: Path) -> None:
    async def scenario() -> None:
        given = Hub(hub_settings(tmp_path), public_url="https://hub.example.org/kachery/")
        await given.start()
        assert given.public_url == "https://hub.example.org/kachery"
        await given.stop()

    run_on("asyncio-debug", scenario())
    assert local_url("0.0.0.0", 20440) == local_url("", 20440) == "http://127.0.0.1:20440"
    assert local_url("::", 20440) == "http://[::1]:20440"
    assert local_url("hub.example.org", 1) == public_url("hub.example.org", 1) == "http://hub.example.org:1"
    for host in ("0.0.0.0", "::", ""):
        shown = public_url(host, 20440)
        assert shown.startswith("http://")
        assert shown.endswith(":20440")
        assert "0.0.0.0" not in shown
        assert "::" not in shown
