"""Reading from a private channel: a real hub and bucket, whole nodes, and what they ask the hub for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import Cancelled, HubUnreachable, KacheryError, NodeError, NotPermitted
from kachery_fast.net.hub import HubClient
from kachery_fast.node.signed_reads import SignedReads
from kachery_fast.protocol.hub_bodies import SignedDownloads
from kachery_fast.protocol.names import ObjectName, object_name
from tests.hub.support import CHANNEL, World, running_world
from tests.network import LOOPS, run_on
from tests.node.running import Client, enroll, node_settings, running_node
from tests.node.support import CHUNK, data_of, nothing_left, sha1_of, until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)

CHUNKS = 40
ALL_BUT_READING = ["provideFiles", "requestFeeds", "provideFeeds", "requestTasks", "provideTasks"]


class Asked:
    """Counts what nodes ask the hub to sign for reading, by kind and method, on its way there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: Counter[tuple[str, bool]] = Counter()
        self.objects: Counter[tuple[str, bool]] = Counter()
        sign = HubClient.sign_downloads

        async def counted(hub: HubClient, of: ObjectName, sha1s: list[str], *, head: bool = False) -> SignedDownloads:
            self.requests[of.kind, head] += 1
            self.objects[of.kind, head] += len(sha1s)
            return await sign(hub, of, sha1s, head=head)

        monkeypatch.setattr(HubClient, "sign_downloads", counted)


@asynccontextmanager
async def two_nodes(
    root: Path, *, private: bool = True, **settings: Any
) -> AsyncIterator[tuple[World, Client, Client]]:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(running_world(root, **settings))
        await world.owner.call("changeChannel", channel=CHANNEL, private=private)
        clients: list[Client] = []
        for name in "ab":
            of_node = node_settings(root / name)
            await enroll(world, of_node)
            clients.append(await stack.enter_async_context(running_node(of_node)))
        await clients[0].ask("POST", "/api/reload", {})
        yield world, clients[0], clients[1]


def put(node: Client, size: int, seed: int = 1) -> tuple[str, bytes]:
    data = data_of(size, seed)
    stored = node.node.store.put_bytes(data)
    return f"sha1://{stored.sha1}" + (f"?manifest={stored.manifest_sha1}" if stored.manifest_sha1 else ""), data


async def receiving(node: Client, count: int) -> None:
    await until(lambda: any(t["received"] > count for t in node.node.transfers.describe()))


async def link_of(node: Client) -> Any:
    (link,) = node.node.links()
    return link


def stored_at(node: Client, uri: str) -> bytes:
    return node.node.store.find(uri[7:47]).path.read_bytes()


def run(loop_kind: str, root: Path, work: Any) -> None:
    with nothing_left(root):
        run_on(loop_kind, work, 100)


def test_urls_are_signed_in_batches_and_not_one_for_each_chunk(
    loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with two_nodes(tmp_path) as (_, a, b):
            uri, data = put(a, CHUNKS * CHUNK)
            await a.ask("POST", "/api/upload", {"uri": uri})
            asked = Asked(monkeypatch)
            assert (await b.load(uri))["type"] == "done"
            assert stored_at(b, uri) == data
            # One for the manifest, one for all chunks, whichever of them is met first.
            assert asked.requests["file", False] == 2
            assert asked.objects["file", False] >= CHUNKS + 1

    run(loop_kind, tmp_path, work())


def test_what_an_uploader_looks_for_is_asked_for_at_once(
    loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with two_nodes(tmp_path) as (_, a, _b):
            uri, _ = put(a, CHUNKS * CHUNK)
            asked = Asked(monkeypatch)
            status, _ = await a.ask("POST", "/api/upload", {"uri": uri})
            assert status == 200
            assert (asked.requests["file", True], asked.objects["file", True]) == (1, CHUNKS + 1)

    run(loop_kind, tmp_path, work())


def test_on_a_public_channel_nothing_is_signed_for_reading(
    loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with two_nodes(tmp_path, private=False) as (_, a, b):
            asked = Asked(monkeypatch)
            uri, _ = put(a, 3 * CHUNK)
            assert (await b.load(uri))["type"] == "done"
            assert not asked.requests

    run(loop_kind, tmp_path, work())


@pytest.mark.parametrize("private", [True, False])
def test_a_transfer_goes_on_when_its_channel_becomes_private_or_public(
    loop_kind: str, tmp_path: Path, private: bool
) -> None:
    async def work() -> None:
        async with two_nodes(tmp_path, private=not private, bucket_rate_bytes_max=40 * CHUNK) as (world, a, b):
            uri, data = put(a, CHUNKS * CHUNK)
            load = asyncio.create_task(b.load(uri))
            await receiving(b, 3 * CHUNK)
            await world.owner.call("changeChannel", channel=CHANNEL, private=private)
            last = await load
            assert last["type"] == "done", last
            assert stored_at(b, uri) == data
            assert (await world.download(uri[7:47])) is None

    run(loop_kind, tmp_path, work())


def test_urls_that_expire_in_the_middle_of_a_transfer_are_renewed(
    loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with two_nodes(tmp_path, bucket_rate_bytes_max=40 * CHUNK, url_life_seconds=60.0) as (world, a, b):
            uri, data = put(a, CHUNKS * CHUNK)
            asked = Asked(monkeypatch)
            load = asyncio.create_task(b.load(uri))
            await receiving(b, 3 * CHUNK)
            world.clock.now += 61  # at the hub; the nodes hold what they were given for good
            before = asked.requests["file", False]
            last = await load
            assert last["type"] == "done", last
            assert stored_at(b, uri) == data
            assert asked.requests["file", False] > before

    run(loop_kind, tmp_path, work())


def test_a_node_that_may_not_read_is_told_why_and_still_uploads(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with two_nodes(tmp_path) as (world, a, b):
            uri, _ = put(a, 3 * CHUNK)
            assert (await a.ask("POST", "/api/upload", {"uri": uri}))[0] == 200
            await world.owner.call("revoke", channel=CHANNEL, node="b", permissions=["requestFiles"])
            link = await link_of(b)
            with pytest.raises(NotPermitted) as refused:
                await link.bucket.get_small(object_name(CHANNEL, uri[7:47]), 10)
            assert "read files" in refused.value.message
            other, _ = put(b, 2 * CHUNK, seed=2)
            assert (await b.ask("POST", "/api/upload", {"uri": other}))[0] == 200

    run(loop_kind, tmp_path, work())


def test_short_files_ranges_and_the_question_why_work_on_a_private_channel(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with two_nodes(tmp_path) as (_, a, b):
            for size in (0, 1, CHUNK):
                uri, data = put(a, size, seed=size + 1)
                assert (await b.load(uri))["type"] == "done"
                assert stored_at(b, uri) == data
            uri, data = put(a, 6 * CHUNK)
            assert await b.read(uri, CHUNK - 5, 3 * CHUNK) == data[CHUNK - 5:3 * CHUNK]
            _, answer = await b.ask("POST", "/api/why", {"uri": uri})
            assert "has the manifest and 3 of the 6 chunks" in str(answer)

    run(loop_kind, tmp_path, work())


def test_a_client_of_2022_needs_nothing_new(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with two_nodes(tmp_path) as (_, a, b):
            uri, data = put(a, 4 * CHUNK)
            key = {"sha1": uri[7:47], "manifestSha1": uri[-40:]}
            # A chunk is a file of its own to that client: taken from the bucket when it is there, else from a node.
            start, end = CHUNK, 2 * CHUNK
            chunk = {"sha1": sha1_of(data[start:end]), "chunkOf": {"fileKey": key, "startByte": start, "endByte": end}}
            assert (await a.ask("POST", "/api/upload", {"uri": uri}))[0] == 200
            wanted: list[tuple[dict[str, Any], bytes]] = [(chunk, data[start:end]), (key, data)]
            for asked, expected in wanted:
                body = {"fileKey": asked, "channelName": CHANNEL}
                async with b.session.post(f"{b.url}/loadFile", json=body, headers=b.headers()) as answer:
                    text = await answer.text()
                assert '"type":"finished"' in text, text
                assert b.node.store.find(asked["sha1"]).path.read_bytes() == expected

    run(loop_kind, tmp_path, work())


# --- the keeper of URLs, by itself


class ScriptedHub:
    """A hub that signs what it is asked to, when ``gate`` is open, or fails."""

    def __init__(self) -> None:
        self.now = 1_000_000
        self.life_ms = 300_000
        self.asked: list[tuple[str, list[str], bool]] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    def now_ms(self) -> int:
        return self.now

    async def sign_downloads(self, of: ObjectName, sha1s: list[str], *, head: bool = False) -> SignedDownloads:
        self.asked.append((of.kind, sha1s, head))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        urls = [f"signed:{sha1}?{head}&{len(self.asked)}" for sha1 in sha1s]
        return SignedDownloads(urls=urls, expires=self.now + self.life_ms)


def names(count: int) -> list[str]:
    return [object_name(CHANNEL, f"{number:040x}") for number in range(count)]


def alone(loop_kind: str, work: Any, *, batch_max: int = 4) -> None:
    async def scenario() -> None:
        hub = ScriptedHub()
        reads = SignedReads(hub, CHANNEL, batch_max, private=True)  # type: ignore[arg-type]
        try:
            await work(hub, reads)
        finally:
            await reads.close()
    run_on(loop_kind, scenario())


async def ask(reads: SignedReads, name: str, *, head: bool = False, ahead: Any = (), refused: str = "") -> str:
    url = await reads.url(name, head=head, ahead=ahead, refused=refused)
    assert url is not None
    return url


def test_what_is_asked_for_at_once_goes_in_full_batches_and_each_object_once(loop_kind: str) -> None:
    async def work(hub: ScriptedHub, reads: SignedReads) -> None:
        wanted = names(6)
        found = await asyncio.gather(*(ask(reads, name) for name in [*wanted, *wanted]),
                                     ask(reads, wanted[0], head=True))
        assert sorted((len(sha1s), head) for _, sha1s, head in hub.asked) == [(1, True), (2, False), (4, False)]
        assert found[:6] == found[6:12]
        assert len(set(found)) == 7
        assert await ask(reads, wanted[5]) == found[5]
        assert len(hub.asked) == 3, "it is kept"

    alone(loop_kind, work)


def test_what_comes_next_is_signed_along_and_looked_at_only_when_something_is_signed(loop_kind: str) -> None:
    async def work(hub: ScriptedHub, reads: SignedReads) -> None:
        wanted = names(9)
        looked: list[str] = []

        def ahead() -> Any:
            for name in wanted[1:]:
                looked.append(name)
                yield name

        await ask(reads, wanted[0], ahead=ahead())
        assert [len(sha1s) for _, sha1s, _ in hub.asked] == [4]
        assert looked == wanted[1:4]
        await ask(reads, wanted[3], ahead=ahead())
        assert looked == wanted[1:4]
        reads.private = False
        assert await reads.url(wanted[8], head=False, ahead=ahead(), refused="") is None
        assert (len(hub.asked), looked) == (1, wanted[1:4])

    alone(loop_kind, work)


def test_a_url_is_used_for_the_better_part_of_its_life_and_a_refused_one_no_more(loop_kind: str) -> None:
    async def work(hub: ScriptedHub, reads: SignedReads) -> None:
        (name,) = names(1)
        first = await ask(reads, name)
        hub.now += 284_999
        assert await ask(reads, name) == first
        hub.now += 1
        second = await ask(reads, name)
        assert second != first
        assert await ask(reads, name, refused=first) == second, "another one was signed meanwhile"
        assert await ask(reads, name, refused=second) not in (first, second)
        reads.private = False
        assert await ask(reads, name, refused="http://hub/plain") != ""
        assert reads.private, "a plain read that is refused shows that the channel is private"
        reads.forget()
        count = len(hub.asked)
        await ask(reads, name)
        assert len(hub.asked) == count + 1

    alone(loop_kind, work)


def test_what_was_being_signed_for_one_bucket_is_not_used_for_the_next(loop_kind: str) -> None:
    async def work(hub: ScriptedHub, reads: SignedReads) -> None:
        (name,) = names(1)
        hub.gate.clear()
        former = asyncio.ensure_future(ask(reads, name))
        await until(lambda: len(hub.asked) == 1)
        reads.forget()
        current = asyncio.ensure_future(ask(reads, name))
        await until(lambda: len(hub.asked) == 2)
        hub.gate.set()
        await former
        assert await ask(reads, name) == await current
        assert len(hub.asked) == 2

    alone(loop_kind, work)


def test_a_refusal_of_the_hub_reaches_everybody_who_waits_and_is_not_kept(loop_kind: str) -> None:
    async def work(hub: ScriptedHub, reads: SignedReads) -> None:
        wanted = names(3)
        for error, expected in ((HubUnreachable(url="u", why="w"), HubUnreachable), (ValueError("bug"), NodeError)):
            hub.error = error
            found = await asyncio.gather(*(ask(reads, name) for name in wanted), return_exceptions=True)
            assert [type(each) for each in found] == [expected] * 3
            assert len({id(each) for each in found}) == 3
        hub.error = None
        assert await ask(reads, wanted[0])

    alone(loop_kind, work)


def test_who_stops_waiting_takes_nothing_from_the_others_and_closing_tells_all(loop_kind: str) -> None:
    async def work(hub: ScriptedHub, reads: SignedReads) -> None:
        hub.gate.clear()
        (name,) = names(1)
        waiting = [asyncio.ensure_future(ask(reads, name)) for _ in range(3)]
        await until(lambda: bool(hub.asked))
        waiting[0].cancel()
        late = asyncio.ensure_future(ask(reads, names(2)[1]))
        await asyncio.sleep(0)
        await reads.close()
        found = await asyncio.gather(*waiting, late, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert all(isinstance(each, Cancelled) for each in found[1:])
        with pytest.raises(KacheryError):
            await ask(reads, name)

    alone(loop_kind, work)
