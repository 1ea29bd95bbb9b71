"""The file that names a node's hubs, and joining and leaving at a real hub."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.config import Settings, load_settings
from kachery_fast.errors import ChannelUnknown, DiskError, HubUnreachable, InvalidArgument, NodeError, NotPermitted
from kachery_fast.node.membership import join, leave, read_node_file, set_label
from tests.hub.support import CHANNEL, World, node_id, running_world


@asynccontextmanager
async def _world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(tmp_path) as world:
        yield world


@contextmanager
def hub_in_thread(tmp_path: Path) -> Iterator[Callable[[Any], Any]]:
    """A hub on a loop of its own, as joining runs one itself; yields what runs ``work(world)`` there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    context = _world(tmp_path)
    world = run(context.__aenter__())
    try:
        yield lambda work: run(work(world))
    finally:
        run(context.__aexit__(None, None, None))
        run(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def settings_of(tmp_path: Path, name: str = "node") -> Settings:
    return load_settings({}, storage_dir=tmp_path / name, retry_attempts_max=1, retry_base_seconds=0.01)


async def invitation(world: World) -> str:
    return f"{world.url}/join/{await world.invite()}"


def test_a_node_joins_and_leaves(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with hub_in_thread(tmp_path) as at_hub:
        link = at_hub(invitation)
        joined = join(settings, link, label="desk", permissions=["requestFiles"])
        assert joined["channel"] == CHANNEL
        assert joined["permissions"] == ["requestFiles"]
        assert joined["nodeId"] == (settings.storage_dir / "kachery-node-id").read_text()
        again = join(settings, at_hub(invitation))
        assert len(again["permissions"]) == 6
        node_file = read_node_file(settings.storage_dir)
        assert [entry.url for entry in node_file.hubs] == [joined["hub"]]
        assert node_file.label == "desk"
        with pytest.raises(ChannelUnknown, match=CHANNEL):
            leave(settings, "elsewhere")
        leave(settings, CHANNEL)
        with pytest.raises(ChannelUnknown, match="none"):
            leave(settings, CHANNEL)

        async def members(world: World) -> list[Any]:
            reader = await world.member("reader")
            return (await reader.node_config()).channels[0].members

        assert [member.node_id for member in at_hub(members)] == [node_id("reader")]


def test_a_bad_invitation_changes_nothing(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with hub_in_thread(tmp_path) as at_hub:
        link = at_hub(invitation)
        with pytest.raises(NotPermitted):
            join(settings, link[:-5] + "AAAAA")
        with pytest.raises(InvalidArgument, match="invitation"):
            join(settings, "nonsense")
    with pytest.raises(HubUnreachable):
        join(settings, link)
    assert not (settings.storage_dir / "kachery-fast.json").exists()


def test_leaving_without_any_hub_says_so(tmp_path: Path) -> None:
    with pytest.raises(ChannelUnknown, match="none"):
        leave(settings_of(tmp_path), CHANNEL)


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b'{"hubs": {}}', b'{"hubs": [{"url": 5}]}', b'{"label": "\xff"}', b'{"hubs": [{}]}',
    b'{"hubs": [{"url": "ftp://hub"}]}', b'{"hubs": [{"url": ""}]}', b'{"label": 7}',
])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kachery-fast.json"
    path.write_bytes(content)
    with pytest.raises(NodeError, match="Mend it, or delete it") as caught:
        read_node_file(tmp_path)
    assert str(path) in caught.value.message
    with pytest.raises(NodeError):
        set_label(tmp_path, "new")
    assert path.read_bytes() == content


def test_keys_of_a_newer_version_are_no_damage(tmp_path: Path) -> None:
    (tmp_path / "kachery-fast.json").write_text(json.dumps({"label": "x", "hubs": [], "theme": "dark"}))
    assert read_node_file(tmp_path).label == "x"


def test_what_the_disk_refuses_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        set_label(tmp_path / "file" / "storage", "x")
    (tmp_path / "dir" / "kachery-fast.json").mkdir(parents=True)
    with pytest.raises(DiskError, match=r"kachery-fast\.json"):
        read_node_file(tmp_path / "dir")


def test_processes_that_change_the_file_at_once_lose_nothing(tmp_path: Path) -> None:
    program = ("import sys, pathlib\n"
               "from kachery_fast.node.membership import HubEntry, _changed\n"
               "sys.stdin.read()\n"
               "for number in range(20):\n"
               "    with _changed(pathlib.Path(sys.argv[1])) as found:\n"
               "        found.hubs.append(HubEntry(f'http://{sys.argv[2]}-{number}:1'))\n")
    children = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), f"h{number}"], stdin=subprocess.PIPE)
                for number in range(2)]
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    assert [child.wait(60) for child in children] == [0, 0]
    assert len({entry.url for entry in read_node_file(tmp_path).hubs}) == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kachery-fast.lock", "kachery-fast.json"]
