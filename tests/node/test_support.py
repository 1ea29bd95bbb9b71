"""What looks for leaks must see them, on every system."""

from __future__ import annotations

import inspect
import mmap
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.config import load_settings
from kachery_fast.errors import HubUnreachable, KacheryError, NotPermitted
from kachery_fast.net.hub import HubClient
from kachery_fast.net.memory import MemoryBucket
from kachery_fast.protocol.tasks import sign_receipt
from tests.hub.support import running_world
from tests.network import run_on
from tests.node.support import CHANNEL, MemoryHub, fails, identity_of, open_files

# What a node asks of its hub besides membership and tokens.
ASKED = [
    "claim_task", "find_task", "finish_task", "keep_tasks", "report_bad_result", "report_corrupt", "sign_feed_uploads",
    "sign_task_result", "sign_uploads",
]


@pytest.mark.parametrize("process", [Path("/proc/self"), Path("/absent")], ids=["proc", "psutil"])
def test_a_file_that_is_open_is_seen(tmp_path: Path, process: Path) -> None:
    path = tmp_path / "left"
    with path.open("wb"):
        assert open_files(tmp_path, process) == [str(path)]
    assert open_files(tmp_path, process) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_a_file_that_is_mapped_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "left"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
    with mapped:
        assert str(path) in open_files(tmp_path)
    assert open_files(tmp_path) == []


# --- the hub in memory


@pytest.mark.parametrize("name", ASKED)
def test_the_hub_in_memory_takes_what_the_client_of_a_hub_takes(name: str) -> None:
    real = inspect.signature(getattr(HubClient(MemoryHub.url, identity_of("A").key, load_settings({})), name))
    assert inspect.signature(getattr(MemoryHub(MemoryBucket()).of("a"), name)).parameters == real.parameters


def test_the_hub_in_memory_gives_claims_as_a_real_one_does(tmp_path: Path) -> None:
    """One story, told to both."""
    task, pure = "7a" * 16, "5b" * 20
    a, b = identity_of("A"), identity_of("B")
    receipt = sign_receipt(channel=CHANNEL, task=task, function="f", kwargs={}, outcome="finished", error=None,
                           started_ms=1, finished_ms=2, key=a.key)

    async def story(first: Any, second: Any, wait: Any) -> list[Any]:
        told = [await first.find_task(CHANNEL, task)]
        told += [await node.claim_task(CHANNEL, task, "action", "f", attempt="1" * 32) for node in (first, second)]
        told += [await node.claim_task(CHANNEL, pure, "pure-calculation", "f") for node in (first, second)]
        told += [await node.keep_tasks(CHANNEL, [task, pure]) for node in (first, second)]
        try:
            await second.finish_task(CHANNEL, task, "finished", receipt)
        except KacheryError as error:
            told.append(type(error))
        wait(30)
        told += [await node.find_task(CHANNEL, name) for node in (first, second) for name in (task, pure)]
        told.append(await second.claim_task(CHANNEL, pure, "pure-calculation", "f"))
        told.append(await first.keep_tasks(CHANNEL, [task, pure]))
        told.append(await first.finish_task(CHANNEL, task, "finished", receipt))
        told.append(await second.finish_task(CHANNEL, pure, "released"))
        return told

    async def scenario() -> None:
        memory = MemoryHub(MemoryBucket())
        async with running_world(tmp_path) as world:
            clock = world.clock
            memory.clock = clock
            start = clock.now

            def wait(seconds: float) -> None:
                clock.now += seconds

            nodes = [await world.member("A"), await world.member("B")]
            for node, identity in zip(nodes, (a, b), strict=True):
                assert node._key.private_bytes_raw() == identity.key.private_bytes_raw()
            real = await story(nodes[0], nodes[1], wait)
            clock.now = start
            assert await story(memory.of(a.node_id), memory.of(b.node_id), wait) == real
            assert NotPermitted in real
            assert memory.granted == [(a.node_id, task), (a.node_id, pure), (b.node_id, pure)]
            memory.down = True
            for asked in (memory.of("a").find_task(CHANNEL, task), memory.of("a").keep_tasks(CHANNEL, [])):
                await fails(HubUnreachable, asked)

    run_on("asyncio-debug", scenario())
