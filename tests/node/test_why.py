"""Where a file is and what everybody answers, with nothing moved."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from kachery_fast.errors import BucketUnreachable
from kachery_fast.node.why import ask_channel
from kachery_fast.protocol.names import FileUri
from tests.network import LOOPS, run_on
from tests.node.support import CHUNK, data_of, network, other_tasks, until
from tests.node.test_transfer import SIZE, fill

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)


def test_it_says_what_the_bucket_and_each_node_have(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b", ["requestFiles"])
            data = data_of(SIZE)
            uri = a.put(data)
            began = time.monotonic()
            inquiry, text = await ask_channel(uri, b.link, 20.0)
            assert time.monotonic() - began < 10  # everybody has answered
            assert "bucket: does not have it" in text
            assert f"has it ({SIZE} bytes, 0 objects queued)" in text
            fill(net, data, skip=(1, 2))
            inquiry, text = await ask_channel(uri, b.link, 20.0)
            assert inquiry.bucket == "has the manifest and 8 of the 10 chunks looked at, 10 in all"
            assert net.bucket.puts == []
    run_on(loop_kind, work(), 60)


def test_one_object_is_looked_at_by_its_size(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            b = await net.peer("b")
            net.bucket.objects[net.object("ab" * 20)] = b"12345"
            inquiry, text = await ask_channel(FileUri("ab" * 20, "", None), b.link, 1.0)
            assert inquiry.bucket == "has it, 5 bytes"
            assert text.endswith("nobody was asked")
    run_on(loop_kind, work(), 60)


def test_a_file_that_changed_on_disk_is_told(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b", ["requestFiles"])
            linked = tmp_path / "linked"
            linked.write_bytes(data_of(CHUNK))
            sha1 = a.store.link_file(linked).sha1
            linked.unlink()
            _, text = await ask_channel(FileUri(sha1, "", None), b.link, 20.0)
            assert "changed-on-disk" in text
            assert "it is gone" in text
    run_on(loop_kind, work(), 60)


def test_the_silent_are_named_after_the_wait(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            await net.peer("a")
            b = await net.peer("b")
            before = other_tasks()
            _, text = await ask_channel(FileUri("ab" * 20, "", None), b.link, 0.5)
            assert "no answer from a (" in text
            assert b.link._listeners == {}
            assert len(other_tasks()) <= len(before) + 1
    run_on(loop_kind, work(), 60)


def test_troubles_of_bucket_and_bands_are_told_apart(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, b = await net.peer("a"), await net.peer("b", ["requestFiles"])
            uri = a.put(data_of(SIZE))
            name = net.object(uri.manifest_sha1 or "")
            net.bucket.fail(name, BucketUnreachable(object=name, why="HTTP 503", attempts=5))
            inquiry, text = await ask_channel(uri, b.link, 20.0)
            assert "HTTP 503" in inquiry.bucket
            assert "has it (" in text
            net.broker.set_up(False)
            inquiry, text = await ask_channel(uri, b.link, 20.0)
            assert inquiry.bucket == "does not have it"
            assert "bucket: does not have it" in text
            assert "broker is down" in text or "out of reach" in text
            assert inquiry.rounds == 0
    run_on(loop_kind, work(), 60)


def test_a_cancelled_question_leaves_nothing(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            await net.peer("a")
            b = await net.peer("b")
            task = asyncio.create_task(ask_channel(FileUri("ab" * 20, "", None), b.link, 20.0))
            await until(lambda: b.link._listeners)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert b.link._listeners == {}
    run_on(loop_kind, work(), 60)
