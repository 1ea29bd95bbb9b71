"""Task backends of 2022: polls that wait, that are broken off, that come again; what they were given."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from kachery_fast.node.legacy_backends import LegacyBackends
from tests.hub.support import CHANNEL, World
from tests.network import LOOPS
from tests.node.running import Client, together
from tests.node.support import until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)

FUNCTIONS = [{"channelName": CHANNEL, "taskFunctionId": "add.1", "taskFunctionType": "pure-calculation"}]


async def _post(client: Client, path: str, body: Any) -> Any:
    async with client.session.post(client.url + path, json=body, headers=client.headers()) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


def _poll(client: Client, msec: float = 20_000) -> asyncio.Task[Any]:
    body = {"taskFunctions": FUNCTIONS, "backendId": None, "timeoutMsec": msec}
    return asyncio.create_task(_post(client, "/task/registerTaskFunctions", body))


def _ask(client: Client, **kwargs: int) -> asyncio.Task[Any]:
    body = {"channelName": CHANNEL, "taskFunctionId": "add.1", "taskKwargs": kwargs,
            "taskFunctionType": "pure-calculation", "timeoutMsec": 60_000}
    return asyncio.create_task(_post(client, "/task/requestTask", body))


def _polls(client: Client) -> int:
    return sum(poller.polls for poller in client.node._api._legacy._backends._pollers.values())


async def _finish(client: Client, task: dict[str, Any], result: bytes) -> None:
    signed = await _post(client, "/task/createSignedTaskResultUploadUrl", {
        "channelName": CHANNEL, "taskId": task["taskHash"], "size": len(result)})
    async with client.session.put(signed["signedUrl"], data=result) as answer:
        assert answer.status == 200, await answer.text()
    await _post(client, "/task/updateTaskStatus", {"channelName": CHANNEL, "taskId": task["taskId"],
                                                   "status": "finished"})


def test_a_poll_is_given_a_task_and_its_result_reaches_who_asked(loop_kind: str, tmp_path: Path) -> None:
    async def work(_world: World, a: Client, b: Client) -> None:
        assert await _poll(a, 0) == {"success": True, "requestedTasks": []}
        poll, asked = _poll(a), _ask(b, a=1, b=2)
        (task,) = (await poll)["requestedTasks"]
        assert (task["taskFunctionId"], task["kwargs"], task["backendId"]) == ("add.1", {"a": 1, "b": 2}, None)
        await _finish(a, task, b"3")
        state = await asked
        assert state["status"] == "finished"
        async with b.session.get(state["taskResultUrl"]) as answer:
            assert (answer.status, await answer.text()) == (200, "3")
        # It has ended, and can be told of no more.
        body = {"channelName": CHANNEL, "taskId": task["taskId"], "status": "running"}
        async with a.session.post(a.url + "/task/updateTaskStatus", json=body, headers=a.headers()) as answer:
            assert answer.status == 404

    together(loop_kind, tmp_path, work)


def test_a_backend_that_is_started_anew_is_not_taken_for_the_one_that_died(loop_kind: str, tmp_path: Path) -> None:
    async def work(_world: World, a: Client, b: Client) -> None:
        poll, asked = _poll(a), _ask(b, a=1)
        (lost,) = (await poll)["requestedTasks"]
        async with aiohttp.ClientSession() as process:  # which polls on while it works, and dies with that poll
            body = {"taskFunctions": FUNCTIONS, "backendId": None, "timeoutMsec": 20_000}
            second = asyncio.create_task(process.post(a.url + "/task/registerTaskFunctions", json=body,
                                                      headers=a.headers()))
            await asyncio.sleep(0.2)
            second.cancel()
            await asyncio.wait([second])
        await until(lambda: not a.node.task_backends.describe()["backends"])
        poll = _poll(a)
        (task,) = (await poll)["requestedTasks"]
        assert task["taskId"] != lost["taskId"]
        assert task["taskHash"] == lost["taskHash"]
        await _finish(a, task, b"1")
        assert (await asked)["status"] == "finished"

    together(loop_kind, tmp_path, work)


def test_a_poll_that_breaks_off_takes_nothing_from_another_process(loop_kind: str, tmp_path: Path) -> None:
    """Two processes with the same functions are one backend to the node."""
    async def work(_world: World, a: Client, b: Client) -> None:
        poll, asked = _poll(a), _ask(b, a=1)
        (task,) = (await poll)["requestedTasks"]  # of one, which works now
        async with aiohttp.ClientSession() as other:
            body = {"taskFunctions": FUNCTIONS, "backendId": None, "timeoutMsec": 20_000}
            second = asyncio.create_task(other.post(a.url + "/task/registerTaskFunctions", json=body,
                                                    headers=a.headers()))
            await until(lambda: _polls(a) == 1)
            second.cancel()
            await asyncio.wait([second])
        await until(lambda: _polls(a) == 0)
        await _finish(a, task, b"1")
        assert (await asked)["status"] == "finished"

    together(loop_kind, tmp_path, work)


def test_what_a_dead_connection_was_given_is_given_to_the_next(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_over = LegacyBackends._hand_over
    died: list[web.Request] = []

    async def die_first(self: LegacyBackends, request: web.Request, poller: Any) -> web.StreamResponse:
        if poller.waiting and not died:
            died.append(request)
            assert request.transport is not None
            request.transport.abort()
        return await hand_over(self, request, poller)

    monkeypatch.setattr(LegacyBackends, "_hand_over", die_first)

    async def work(_world: World, a: Client, b: Client) -> None:
        polls = [_poll(a), _poll(a)]
        await until(lambda: _polls(a) == 2)
        asked = _ask(b, a=1)
        done, left = await asyncio.wait(polls, return_when=asyncio.FIRST_EXCEPTION, timeout=10)
        assert any(poll.exception() is not None for poll in done)
        tasks = [task for poll in done if poll.exception() is None for task in poll.result()["requestedTasks"]]
        tasks += [task for poll in left for task in (await poll)["requestedTasks"]]
        (task,) = tasks or (await _poll(a))["requestedTasks"]
        await _finish(a, task, b"1")
        assert (await asked)["status"] == "finished"

    together(loop_kind, tmp_path, work)


@pytest.mark.parametrize("result", [b"nonsense", b"[1,", b"\xff"])
def test_a_result_that_is_not_json_is_refused_and_may_be_sent_again(loop_kind: str, tmp_path: Path,
                                                                     result: bytes) -> None:
    async def work(_world: World, a: Client, b: Client) -> None:
        poll, asked = _poll(a), _ask(b, a=1)
        (task,) = (await poll)["requestedTasks"]
        signed = await _post(a, "/task/createSignedTaskResultUploadUrl", {
            "channelName": CHANNEL, "taskId": task["taskHash"], "size": len(result)})
        async with a.session.put(signed["signedUrl"], data=result) as answer:
            assert answer.status == 400
            assert "JSON" in await answer.text()
        async with a.session.put(signed["signedUrl"], data=result + b"more") as answer:
            assert "announced" in await answer.text()
        await _finish(a, task, b'"good"')
        assert (await asked)["status"] == "finished"

    together(loop_kind, tmp_path, work)
