"""Task backends at the node's local API, with a real hub, broker and bucket behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kachery_fast.node import task_backends
from kachery_fast.node.link import ChannelLink
from kachery_fast.protocol.names import result_object_name
from kachery_fast.protocol.tasks import check_receipt, check_result
from tests.hub.support import CHANNEL, World
from tests.network import LOOPS
from tests.node.running import Client, together
from tests.node.support import CHUNK, data_of, until
from tests.node.tasks import Question

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
SUM = {"id": "sum.1", "kind": "pure-calculation"}
MAIL = {"id": "mail.1", "kind": "action", "timeoutSeconds": 3.0, "idempotent": False}


class Backend:
    """A task backend that does by hand what it is told."""

    def __init__(self, client: Client, answer: aiohttp.ClientResponse) -> None:
        self.client = client
        self._answer = answer
        self.id = ""

    async def line(self) -> dict[str, Any]:
        """What it is told next; that the node is alive is not told on."""
        while True:
            line: dict[str, Any] = json.loads(await asyncio.wait_for(self._answer.content.readline(), 20))
            if line["type"] != "alive":
                return line

    async def report(self, run: dict[str, Any], status: str, **fields: Any) -> tuple[int, Any]:
        return await self.client.ask("POST", "/api/backend/report",
                                     {"backend": self.id, "run": run["run"], "status": status, **fields})

    def close(self) -> None:
        self._answer.close()


@asynccontextmanager
async def connected(client: Client, *functions: dict[str, Any], channels: list[str] | None = None,
                    workers: int = 1) -> AsyncIterator[Backend]:
    """Register a backend, which is gone at the end of the block."""
    body = {"channels": channels, "functions": functions or [SUM, MAIL], "name": "test", "workers": workers}
    async with client.session.post(client.url + "/api/backend", json=body, headers=client.headers()) as answer:
        assert answer.status == 200, await answer.text()
        backend = Backend(client, answer)
        registered = await backend.line()
        assert (registered["type"], registered["channels"]) == ("registered", [CHANNEL])
        backend.id = registered["backend"]
        yield backend


class Asker(Question):
    """Asks for a task by hand at node b's end of the channel."""

    async def answered(self) -> Asker:
        """Ask until somebody answers: a node that is connected may not hear every band yet."""
        while not self.answers:
            self.ask()
            for _ in range(200):
                await asyncio.sleep(0.0 if self.answers else 0.005)
        return self


def link_of(client: Client) -> ChannelLink:
    return client.node.links()[0]


async def result_of(client: Client, task: str) -> Any:
    link = link_of(client)
    data = await link.bucket.get_small(result_object_name(CHANNEL, task), 1 << 20)
    found = check_result(data, task, CHANNEL)
    return found.result


def test_a_calculation_goes_all_the_way(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        async with connected(a, channels=[CHANNEL]) as backend:
            asker = await Asker(link_of(b), "pure-calculation", "sum.1", n=1).answered()
            run = await backend.line()
            assert run == {"type": "run", "run": run["run"], "task": asker.task, "function": "sum.1",
                           "kind": "pure-calculation", "kwargs": {"n": 1}, "channel": CHANNEL}
            assert await backend.report(run, "running", progress=0.25, text="quarter") == (200, {})
            await until(lambda: any(getattr(body, "progress", None) == 0.25 for body in asker.answers))
            data = data_of(3 * CHUNK)
            stored = a.node.store.put_bytes(data)
            uri = f"sha1://{stored.sha1}?manifest={stored.manifest_sha1}"
            assert await backend.report(run, "finished", result={"file": uri, "format": "bytes"}) == (200, {})
            await asker.heard("finished")
            assert asker.statuses()[-2:] == ["running", "finished"]
            assert await result_of(b, asker.task) == {"file": uri, "format": "bytes"}
            assert (await link_of(b).hub.find_task(CHANNEL, asker.task)).state == "finished"
            _, info = await a.ask("GET", "/api/info")
            assert info["taskBackends"] == {"queued": 0, "running": 0, "backends": [
                {"name": "test", "workers": 1, "runs": 0, "functions": [
                    {"id": "sum.1", "kind": "pure-calculation"}, {"id": "mail.1", "kind": "action"}]}]}
            # With the node itself gone, the file of the result is still to be had.
            await a.end()
            assert (await b.load(uri))["type"] == "done"
            assert b.node.store.find(stored.sha1).path.read_bytes() == data
    together(loop_kind, tmp_path, work)


def test_of_two_nodes_and_twenty_requests_one_runs_it_once(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        async with connected(a) as at_a, connected(b) as at_b:  # a node runs also what it asks for itself
            await Asker(link_of(b), "pure-calculation", "sum.1", n=0).answered()
            askers = [Asker(link_of(b), "pure-calculation", "sum.1", n=1) for _ in range(20)]
            lines = [asyncio.ensure_future(backend.line()) for backend in (at_a, at_b)]
            for number in (0, 1):  # the one that was asked for first, then the one that twenty ask for
                await asyncio.wait(lines, return_when=asyncio.FIRST_COMPLETED)
                if number == 0:
                    for asker in askers:
                        asker.ask()
                index = next(index for index, line in enumerate(lines) if line.done())
                run = lines[index].result()
                assert run["kwargs"] == {"n": number}
                backend = (at_a, at_b)[index]
                lines[index] = asyncio.ensure_future(backend.line())
                await backend.report(run, "finished", result={"json": number})
            await asyncio.gather(*(asker.heard("finished") for asker in askers))
            assert await result_of(b, askers[0].task) == {"json": 1}
            for line in lines:
                line.cancel()
            assert [type(ended) for ended in await asyncio.gather(*lines, return_exceptions=True)] == [
                asyncio.CancelledError] * 2
    together(loop_kind, tmp_path, work)


def test_an_action_has_its_receipt_at_the_hub(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        async with connected(a) as backend:
            asker = await Asker(link_of(b), "action", "mail.1", to="x").answered()
            await backend.report(await backend.line(), "finished")
            check_receipt((await asker.heard("finished")).receipt, CHANNEL, asker.task)
            hub = link_of(b).hub
            while (claim := await hub.find_task(CHANNEL, asker.task)).state == "claimed":
                await asyncio.sleep(0.01)
            assert claim.state == "finished"
            assert check_receipt(claim.receipt, CHANNEL, asker.task).node_id == a.node.identity.node_id
    together(loop_kind, tmp_path, work)


def test_a_backend_that_closes_its_connection_is_gone(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        async with connected(a, workers=2) as backend:
            action = await Asker(link_of(b), "action", "mail.1").answered()
            calculation = await Asker(link_of(b), "pure-calculation", "sum.1", n=1).answered()
            runs = [await backend.line(), await backend.line()]
            backend.close()
            await action.heard("unknown")
            await until(lambda: calculation.statuses()[-1] == "unregistered")
            assert (await backend.report(runs[0], "finished"))[0] == 404
            hub = link_of(b).hub
            while (await hub.find_task(CHANNEL, action.task)).state == "claimed":
                await asyncio.sleep(0.01)
            assert (await hub.find_task(CHANNEL, action.task)).state == "unknown"
        assert a.node.task_backends.describe()["backends"] == []
        async with connected(a) as backend:  # another one takes the calculation up
            calculation.ask()
            await backend.report(await backend.line(), "finished", result={"json": 1})
            await calculation.heard("finished")
    together(loop_kind, tmp_path, work)


def test_the_node_shows_that_it_is_alive(loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_backends, "_ALIVE_SECONDS", 0.01)

    async def work(world: World, a: Client, b: Client) -> None:
        async with connected(a) as backend:
            for _ in range(3):
                assert json.loads(await backend._answer.content.readline()) == {"type": "alive"}
    together(loop_kind, tmp_path, work)


@pytest.mark.parametrize(("change", "error"), [
    ({"functions": [SUM, SUM]}, "InvalidArgument"),
    ({"functions": [{"id": " x", "kind": "query"}]}, "InvalidName"),
    ({"functions": [{"id": "x", "kind": "thing"}]}, "InvalidArgument"),
    ({"functions": None}, "BadMessage"),
    ({"workers": 0}, "BadMessage"),
    ({"channels": ["nowhere"]}, "ChannelUnknown"),
    ({"more": 1}, "BadMessage"),
])
def test_a_registration_that_makes_no_sense_is_refused(
        loop_kind: str, tmp_path: Path, change: dict[str, Any], error: str) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        body = {"channels": None, "functions": [SUM], "name": "test", "workers": 1, **change}
        _, answer = await a.ask("POST", "/api/backend", body)
        assert answer["error"] == error
        assert a.node.task_backends.describe()["backends"] == []
    together(loop_kind, tmp_path, work)


@pytest.mark.parametrize("report", [
    {"status": "done"}, {"status": "finished", "result": {"json": 1, "file": "x"}},
    {"status": "finished", "result": {"file": "nothing", "format": "npy"}},
    {"status": "finished", "result": {"file": "sha1://" + "ab" * 20, "format": "exe"}},
    {"status": "finished", "result": {}}, {"status": "error", "error": "text"},
])
def test_a_report_that_makes_no_sense_is_refused_and_the_run_goes_on(
        loop_kind: str, tmp_path: Path, report: dict[str, Any]) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        async with connected(a) as backend:
            asker = await Asker(link_of(b), "pure-calculation", "sum.1", n=1).answered()
            run = await backend.line()
            assert (await backend.report(run, **report))[0] == 400
            assert (await backend.report({"run": "99"}, "finished"))[0] == 404
            assert (await backend.report(run, "finished", result={"json": 1}))[0] == 200
            await asker.heard("finished")
    together(loop_kind, tmp_path, work)


def test_without_the_permission_nothing_is_run_and_with_it_at_once(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        node_id = a.node.identity.node_id
        body = {"channels": [CHANNEL], "functions": [SUM]}
        status, answer = await a.ask("POST", "/api/backend", body)
        assert (status, answer["error"]) == (403, "NotPermitted")
        assert f"kachery-fast channel grant {CHANNEL} {node_id} provideTasks" in answer["message"]
        await world.owner.call("grant", channel=CHANNEL, node=node_id, permissions=["provideTasks"])
        await a.ask("POST", "/api/reload", {})
        async with connected(a, channels=[CHANNEL]) as backend:
            await until(lambda: link_of(a).connected)
            await b.ask("POST", "/api/reload", {})
            asker = await Asker(link_of(b), "pure-calculation", "sum.1", n=1).answered()
            run = await backend.line()
            # It may provide tasks and not files: a result that is a file cannot be given.
            stored = a.node.store.put_bytes(b"file")
            await backend.report(run, "finished", result={"file": f"sha1://{stored.sha1}", "format": "bytes"})
            error = (await asker.heard("error")).error
            assert error is not None
            assert (error["type"], "provideFiles" in error["message"]) == ("NotPermitted", True)
            # Revoked in the midst: nothing is claimed, and nothing run.
            await world.owner.call("revoke", channel=CHANNEL, node=node_id, permissions=["provideTasks"])
            late = Asker(link_of(b), "pure-calculation", "sum.1", n=2)
            late.ask()
            await asyncio.sleep(0.3)
            assert a.node.task_backends.describe()["backends"][0]["runs"] == 0
            assert (await link_of(b).hub.find_task(CHANNEL, late.task)).state == "none"
    together(loop_kind, tmp_path, work, {"a": ["requestFiles"], "b": None})


def test_a_backend_ends_with_the_node(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        async with connected(a) as backend:
            action = await Asker(link_of(b), "action", "mail.1").answered()
            await backend.line()
            await a.end()
            with pytest.raises((aiohttp.ClientError, json.JSONDecodeError, RuntimeError)):
                await backend.line()
            assert (await link_of(b).hub.find_task(CHANNEL, action.task)).state == "unknown"
    together(loop_kind, tmp_path, work)
