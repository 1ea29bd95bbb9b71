"""Serving a channel from the local store: what is uploaded, once, checked, and what is said when it cannot be."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from kachery_fast.errors import (
    BucketUnreachable,
    CorruptFile,
    DiskError,
    KacheryError,
    NotPermitted,
    UploadRefused,
    UrlExpired,
)
from kachery_fast.net.bucket import HttpBucket
from kachery_fast.net.memory import MemoryBucket
from kachery_fast.node import providing as providing_module
from kachery_fast.node.uploading import Account, put_signed
from kachery_fast.protocol.bodies import Assign, Failed, Offer, Ready, RequestFile2022, UploadFileStatus2022, Want
from kachery_fast.store.files import FileStore
from tests.network import LOOPS, run_on
from tests.node.support import CHUNK, Network, Peer, data_of, network, nothing_left, other_tasks, sha1_of, until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
_numbers = itertools.count()


class Asker:
    """A node that asks by hand, and notes what is answered."""

    def __init__(self, peer: Peer, provider: Peer) -> None:
        self.peer = peer
        self.provider = provider
        self.request = f"request{next(_numbers)}"
        self.answers: list[Any] = []
        self.peer.link.listen(self.request, lambda body, _: self.answers.append(body))

    def want(self, sha1: str, manifest: str | None = None) -> None:
        self.peer.link.say(Want, {"request": self.request, "sha1": sha1, "manifest": manifest})

    def assign(self, sha1: str, manifest: str | None, chunks: list[tuple[int, int]], **fields: Any) -> None:
        self.peer.link.say(Assign, {"request": self.request, "provider": self.provider.identity.node_id, "sha1": sha1,
                                    "manifest": manifest, "chunks": chunks, **fields})

    async def heard(self, kind: type[Any]) -> Any:
        await until(lambda: any(isinstance(body, kind) for body in self.answers))
        return next(body for body in self.answers if isinstance(body, kind))

    async def failed(self) -> Any:
        """The reason and detail of the next failure, which is taken away."""
        body = await self.heard(Failed)
        self.answers.remove(body)
        return body


async def pair(net: Network, **settings: Any) -> tuple[Peer, Asker]:
    a = await net.peer("a", **settings)
    b = await net.peer("b", ["requestFiles"])
    return a, Asker(b, a)


def ready(asker: Asker) -> list[int]:
    return sorted(index for body in asker.answers if isinstance(body, Ready)
                  for first, end in body.chunks for index in range(first, end))


def test_what_is_asked_for_is_uploaded_and_nothing_else(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            data = data_of(8 * CHUNK)
            uri = a.put(data)
            asker.want(uri.sha1)
            offer = await asker.heard(Offer)
            assert (offer.size, offer.manifest) == (len(data), uri.manifest_sha1)
            assert net.bucket.puts == []
            asker.assign(uri.sha1, uri.manifest_sha1, [(2, 4), (7, 99)])
            await until(lambda: ready(asker) == [2, 3, 7])
            assert len(net.bucket.puts) == 3
            assert net.hub.signed == [[(sha1_of(data[i * CHUNK:(i + 1) * CHUNK]), CHUNK) for i in (2, 3, 7)]]
            # Already there: counts as uploaded, not as traffic.
            asker.answers.clear()
            asker.assign(uri.sha1, uri.manifest_sha1, [(3, 4)], send_manifest=True)
            await until(lambda: ready(asker) == [3])
            await until(lambda: any(isinstance(body, Ready) and body.manifest_ready for body in asker.answers))
            assert a.traffic.uploaded_objects == 4
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_signatures_are_asked_for_in_batches(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net, sign_batch_max=3)
            uri = a.put(data_of(20 * CHUNK))
            asker.assign(uri.sha1, uri.manifest_sha1, [(0, 20)])
            await until(lambda: ready(asker) == list(range(20)))
            assert max(len(batch) for batch in net.hub.signed) == 3
    run_on(loop_kind, work(), 60)


def test_uploads_are_bounded_over_the_node(loop_kind: str, tmp_path: Path) -> None:
    class Counting(MemoryBucket):
        now = most = 0

        async def put_from(self, *arguments: Any, **named: Any) -> bool:
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                return await super().put_from(*arguments, **named)
            finally:
                self.now -= 1

    async def work() -> None:
        bucket = Counting()
        async with network(tmp_path, bucket) as net:
            a, asker = await pair(net, upload_concurrency=2)
            uris = [a.put(data_of(10 * CHUNK, seed)) for seed in range(3)]
            askers = [asker, Asker(asker.peer, a), Asker(asker.peer, a)]
            for each, uri in zip(askers, uris, strict=True):
                each.assign(uri.sha1, uri.manifest_sha1, [(0, 10)])
            await until(lambda: all(ready(each) == list(range(10)) for each in askers))
            assert 1 <= bucket.most <= 2
    run_on(loop_kind, work(), 60)


@pytest.mark.parametrize("with_crc32c", [True, False])
def test_a_bucket_that_comes_in_the_midst_of_an_upload_gets_the_whole_file(
    loop_kind: str, tmp_path: Path, with_crc32c: bool
) -> None:
    """Objects are signed in batches of another size where their CRC-32C is told."""
    class Left(MemoryBucket):
        async def put_from(self, *arguments: Any, **named: Any) -> bool:
            if len(self.puts) == 3:
                (a,) = nodes
                a.link.info = replace(a.link.info, crc32c=with_crc32c)
                a.link.bucket = second
            return await super().put_from(*arguments, **named)

    async def work() -> None:
        async with network(tmp_path, Left()) as net:
            a = await net.peer("a", sign_batch_max=10, upload_concurrency=1)
            nodes.append(a)
            a.link.info = replace(a.link.info, crc32c=not with_crc32c)
            data, account = data_of(30 * CHUNK), Account()
            uri = await a.uploader.put_file(a.put(data), account)
            chunks = {net.object(sha1_of(data[start:start + CHUNK])) for start in range(0, len(data), CHUNK)}
            assert {*second.objects} == {*chunks, net.object(uri.manifest_sha1 or "")}
            assert account.done_bytes == account.total_bytes

    nodes: list[Peer] = []
    second = MemoryBucket()
    run_on(loop_kind, work(), 60)


def test_leave_for_a_bucket_that_the_node_has_not_heard_of_has_it_ask(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a = await net.peer("a")
            a.link.bucket = HttpBucket("http://127.0.0.1:1", a.ranges, a.settings)  # which takes no leave for "memory:"

            async def refresh() -> None:
                a.link.bucket = net.bucket

            a.link._refresh = refresh
            (leave,) = await a.link.hub.sign_uploads(net.channel, [(sha1_of(b"x"), 1)])
            assert await put_signed(a.link, leave, lambda upload: a.link.bucket.put_bytes(upload, b"x"),
                                    lambda: a.link.hub.sign_uploads(net.channel, [(sha1_of(b"x"), 1)]))
            assert net.bucket.objects == {leave.object: b"x"}

    run_on(loop_kind, work(), 60)


def test_an_expired_url_is_signed_anew_and_not_for_ever(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            data = data_of(2 * CHUNK)
            uri = a.put(data)
            first = net.object(sha1_of(data[:CHUNK]))
            net.bucket.fail(first, *[UrlExpired(object=first, why="expired")] * 2)
            asker.assign(uri.sha1, uri.manifest_sha1, [(0, 1)])
            await until(lambda: ready(asker) == [0])
            assert len(net.hub.signed) == 3
            second = net.object(sha1_of(data[CHUNK:]))
            net.bucket.fail(second, *[UrlExpired(object=second, why="expired")] * 9)
            asker.assign(uri.sha1, uri.manifest_sha1, [(1, 2)])
            assert "no longer valid" in (await asker.failed()).detail
    run_on(loop_kind, work(), 60)


@pytest.mark.parametrize("refused", [True, False])
def test_what_went_to_the_bucket_that_the_channel_had_is_uploaded_to_the_other_one_too(
        loop_kind: str, tmp_path: Path, refused: bool) -> None:
    class Noting(MemoryBucket):
        begun = 0

        async def put_from(self, *arguments: Any, **named: Any) -> bool:
            self.begun += 1
            return await super().put_from(*arguments, **named)

    async def work() -> None:
        former = Noting()
        async with network(tmp_path, former) as net:
            a, asker = await pair(net)
            data = data_of(6 * CHUNK)
            uri = a.put(data)
            former.gate.clear()
            first = net.object(sha1_of(data[:CHUNK]))
            if refused:
                former.fail(first, UploadRefused(action="the writing", object=first, status=403, why="its key is gone"))
            asker.assign(uri.sha1, uri.manifest_sha1, [(0, 6)])
            await until(lambda: former.begun)
            net.move(a)
            former.gate.set()
            await until(lambda: ready(asker) == list(range(6)))
            assert former.puts == ([] if refused else [first])
            assert len(net.bucket.puts) == 6
            assert [len(batch) for batch in net.hub.signed] == [6] + [1] * 6, "leave was for the bucket that it had"
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_a_hub_that_is_down_is_named_and_the_next_time_is_served(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            uri = a.put(data_of(2 * CHUNK))
            net.hub.down = True
            asker.assign(uri.sha1, uri.manifest_sha1, [(0, 2)])
            failed = await asker.failed()
            assert failed.reason == "hub"
            assert "connection refused" in failed.detail
            net.hub.down = False
            asker.assign(uri.sha1, uri.manifest_sha1, [(0, 2)])
            await until(lambda: ready(asker) == [0, 1])
    run_on(loop_kind, work(), 60)


@pytest.mark.parametrize(("error", "reason"), [
    (BucketUnreachable(object="x", why="HTTP 503", attempts=5), "bucket"),
    (NotPermitted(who="x", action="y", channel="z", why="w"), "not-permitted"),
    (DiskError(action="reading", path="p", why="bad sector"), "disk-error"),
    (ZeroDivisionError("a bug"), "bucket"),
    (OSError(5, "Input/output error"), "disk-error"),
])
def test_a_failed_upload_is_told_and_blocks_nothing(loop_kind: str, tmp_path: Path, error: Any, reason: str) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            data = data_of(2 * CHUNK)
            uri = a.put(data)
            for _ in range(20):  # more often than uploads are possible at once
                net.bucket.fail(net.object(sha1_of(data[:CHUNK])), error)
                asker.assign(uri.sha1, uri.manifest_sha1, [(0, 1)])
                assert (await asker.failed()).reason == reason
            assert a.providing.load == 0
            asker.assign(uri.sha1, uri.manifest_sha1, [(0, 1)])
            await until(lambda: ready(asker) == [0])
    run_on(loop_kind, work(), 60)


def test_a_fault_in_signing_is_told(loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            uri = a.put(data_of(CHUNK))
            monkeypatch.setattr(net.hub, "sign_uploads", lambda *_: 1 // 0)
            asker.assign(uri.sha1, None, [(0, 1)])
            assert (await asker.failed()).reason == "hub"
            assert a.providing.load == 0
    run_on(loop_kind, work(), 60)


def test_a_file_that_is_unknown_changed_or_damaged_is_told_apart(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            asker.assign("ab" * 20, None, [(0, 1)])
            assert (await asker.failed()).reason == "unknown"
            asker.want("ab" * 20)  # a node without the file keeps silent
            asker = Asker(asker.peer, a)
            linked = tmp_path / "linked.dat"
            linked.write_bytes(data_of(CHUNK, 5))
            sha1 = a.store.link_file(linked).sha1
            linked.write_bytes(data_of(CHUNK, 6))
            asker.want(sha1)
            failed = await asker.failed()
            assert failed.reason == "changed-on-disk"
            assert str(linked) in failed.detail
            # Of 2022, without a manifest: it has to be read, and is found damaged.
            sha1 = FileStore(a.settings.storage_dir, chunk_size_bytes=8 * CHUNK).put_bytes(data_of(3 * CHUNK)).sha1
            path = a.store.find(sha1).path
            path.chmod(0o644)
            path.write_bytes(bytes(3 * CHUNK))
            asker = Asker(asker.peer, a)
            asker.want(sha1)
            failed = await asker.failed()
            assert failed.reason == "changed-on-disk"
            assert "damaged" in failed.detail
    run_on(loop_kind, work(), 60)


@pytest.mark.parametrize("error", [CorruptFile(path="p", found="f", sha1="s", advice=""), OSError(5, "I/O"),
                                   ZeroDivisionError("a bug")])
def test_a_look_up_that_fails_is_told(loop_kind: str, tmp_path: Path, error: Exception,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            uri = a.put(data_of(CHUNK))
            monkeypatch.setattr(a.store, "manifest_for", broken)
            asker.want(uri.sha1)
            assert (await asker.failed()).reason == (
                "changed-on-disk" if isinstance(error, KacheryError) else "disk-error")
    run_on(loop_kind, work(), 60)


def test_a_file_of_2022_is_hashed_once_however_many_ask(loop_kind: str, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            sha1 = FileStore(a.settings.storage_dir, chunk_size_bytes=8 * CHUNK).put_bytes(data_of(3 * CHUNK)).sha1
            calls = []
            original = a.store._digest

            def digest(*key: Any) -> Any:
                calls.append(key)
                return original(*key)

            monkeypatch.setattr(a.store, "_digest", digest)
            askers = [Asker(asker.peer, a) for _ in range(10)]
            for each in askers:
                each.want(sha1)
            for each in askers:
                assert (await each.heard(Offer)).manifest is not None
            assert len(calls) == 1
            assert a.providing._lookups == {}
    run_on(loop_kind, work(), 60)


def test_files_being_hashed_hold_up_neither_other_questions_nor_the_stop(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 2022 may take minutes; here each goes on until it is told that nobody waits for it any more."""
    begun: list[str] = []

    def endless(sha1: str, _chunk_size_bytes: int, progress: Callable[[int], None]) -> Any:
        begun.append(threading.current_thread().name)
        while True:
            progress(len(begun))
            time.sleep(0.001)

    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            former = FileStore(a.settings.storage_dir, chunk_size_bytes=8 * CHUNK)
            monkeypatch.setattr(a.store, "_digest", endless)
            for seed in range(8):
                Asker(asker.peer, a).want(former.put_bytes(data_of(3 * CHUNK, seed)).sha1)
            await until(lambda: len(begun) == 2)
            assert all(name.startswith("hash") for name in begun)
            uri = a.put(data_of(3 * CHUNK, 9))
            asker.want(uri.sha1)
            await asker.heard(Offer)
            assert await asker.peer.load(uri) == data_of(3 * CHUNK, 9)
            assert len(begun) == 2
            await asyncio.wait_for(a.providing.close(), 5)
            await asyncio.wait_for(asyncio.to_thread(a.hash_threads.shutdown), 5)
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_the_manifests_remembered_are_bounded(loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providing_module, "_MANIFEST_CHUNKS_KEPT", 5)

    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            for seed in range(6):
                each = Asker(asker.peer, a)
                each.want(a.put(data_of(3 * CHUNK, seed)).sha1)
                await each.heard(Offer)
            assert len(a.providing._manifests) == 1
    run_on(loop_kind, work(), 60)


def test_a_chunk_that_was_damaged_on_the_disk_after_its_upload_is_not_uploaded_again(
        loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            data = data_of(2 * CHUNK)
            uri = a.put(data)
            asker.assign(uri.sha1, uri.manifest_sha1, [(0, 1)])
            await until(lambda: ready(asker) == [0])
            net.bucket.objects.clear()
            net.bucket.puts.clear()
            path = a.store.find(uri.sha1).path
            path.chmod(0o644)
            path.write_bytes(bytes(100) + data[100:])
            asker.assign(uri.sha1, uri.manifest_sha1, [(0, 1)])
            failed = await asker.failed()
            assert failed.reason == "changed-on-disk"
            assert net.bucket.puts == []
    run_on(loop_kind, work(), 60)


FILE_KEYS: list[Callable[[bytes], dict[str, Any]]] = [
    lambda data: {"sha1": sha1_of(data)},
    lambda data: {"sha1": sha1_of(data[1000:70_000]),
                  "chunkOf": {"fileKey": {"sha1": sha1_of(data)}, "startByte": 1000, "endByte": 70_000}},
]


@pytest.mark.parametrize("make_key", FILE_KEYS, ids=["whole", "chunk"])
def test_requests_of_2022_are_served_under_the_names_of_2022(
        loop_kind: str, tmp_path: Path, make_key: Callable[[bytes], dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            data = data_of(3 * CHUNK)
            a.put(data)
            key = make_key(data)
            said: list[Any] = []
            say = a.link.say

            def listening(kind: type[Any], fields: dict[str, Any], *rest: Any) -> None:
                said.append((kind, fields))
                say(kind, fields, *rest)

            monkeypatch.setattr(a.link, "say", listening)
            asker.peer.link.say(RequestFile2022, {"file_key": key})
            await until(lambda: len(said) == 2)
            assert said == [(UploadFileStatus2022, {"file_key": key, "status": status})
                            for status in ("started", "finished")]
            sha1 = key["sha1"]
            name = f"lab/sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"
            assert sha1_of(net.bucket.objects[name]) == sha1
    run_on(loop_kind, work(), 60)


def test_a_request_of_2022_under_a_false_name_is_not_served(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            data = data_of(3 * CHUNK)
            a.put(data)
            for start, end in ((0, 100), (-1, 5), (5, 10**9), ("a", None)):
                asker.peer.link.say(RequestFile2022, {"file_key": {
                    "sha1": "ab" * 20, "chunkOf": {"fileKey": {"sha1": sha1_of(data)}, "startByte": start,
                                                   "endByte": end}}})
            asker.want(sha1_of(data))
            await asker.heard(Offer)
            await until(lambda: a.providing.load == 0)
            await asyncio.sleep(0.05)
            assert net.bucket.puts == []
    run_on(loop_kind, work(), 60)


def test_closing_in_the_middle_leaves_nothing_running(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with network(tmp_path) as net:
            a, asker = await pair(net)
            uri = a.put(data_of(20 * CHUNK))
            net.bucket.gate.clear()
            before = other_tasks()
            asker.assign(uri.sha1, uri.manifest_sha1, [(0, 20)])
            await until(lambda: a.providing.load == 20)
            await asyncio.sleep(0.02)
            await a.providing.close()
            assert [task for task in other_tasks() if task not in before] == []
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)
