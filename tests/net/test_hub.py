"""A hub from the outside: clocks, retries, and what each failure is called."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kachery_fast.config import Settings, load_settings
from kachery_fast.errors import (
    HubError,
    HubUnreachable,
    InvalidArgument,
    KacheryError,
    NotPermitted,
    OwnerTokenRefused,
    RateLimited,
    StaleMessage,
)
from kachery_fast.hub.app import Hub
from kachery_fast.net.hub import HubClient, OwnerClient, check_hub_url, split_invitation
from kachery_fast.protocol.hub_bodies import ClaimTask, KeepTasks
from kachery_fast.protocol.messages import decode_hub_request
from kachery_fast.protocol.signing import private_key, public_id

from ..network import LOOPS, run_on

KEY = private_key(b"k" * 32)
SHA1 = "a" * 40
Answer = tuple[int, bytes] | str


def settings_with(**overrides: Any) -> Settings:
    return load_settings({}, **{"retry_attempts_max": 3, "connect_timeout_seconds": 2, "stall_seconds": 2, **overrides})


class ScriptedHub:
    """A real HTTP server that gives the answers it was told to, and keeps the requests."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self.bodies: list[bytes] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.read())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer == "break off":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if answer == "silence":
            await asyncio.sleep(3600)
        assert isinstance(answer, tuple)
        return web.Response(status=answer[0], body=answer[1])


@asynccontextmanager
async def scripted(*answers: Answer) -> AsyncIterator[ScriptedHub]:
    hub = ScriptedHub(list(answers))
    app = web.Application()
    app.router.add_post("/api/{name}", hub.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    hub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield hub
    finally:
        await runner.cleanup()


class Sleeper:
    """Notes the pauses instead of making them."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.pauses.append(seconds)


def client_for(
    url: str, settings: Settings | None = None, *, clock: Callable[[], float] = time.time, key: Ed25519PrivateKey = KEY
) -> tuple[HubClient, Sleeper]:
    sleeper = Sleeper()
    return HubClient(url, key, settings or settings_with(), clock=clock, sleep=sleeper, uniform=max), sleeper


def failure(error: KacheryError) -> Answer:
    return error.http_status, json.dumps(error.to_dict()).encode()


CONFIG: Answer = (200, b'{"time": 5000000, "owner": "o", "channels": []}')


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_each_try_is_signed_anew_and_pauses_grow(loop_kind: str) -> None:
    async def scenario() -> None:
        async with scripted((502, b"<html>a proxy"), (503, b""), "break off", CONFIG) as hub:
            client, sleeper = client_for(hub.url, settings_with(retry_attempts_max=4, retry_base_seconds=1))
            async with client:
                assert (await client.node_config("label", "1.0")).owner == "o"
            assert sleeper.pauses == [1, 2, 4]
            bodies = [decode_hub_request(data) for data in hub.bodies]
            assert {sender for _, sender in bodies} == {public_id(KEY)}
            assert len({body.id for body, _ in bodies}) == 4

    run_on(loop_kind, scenario())


@pytest.mark.parametrize(("answers", "error", "count"), [
    ([(503, b"")], HubError, 3),
    ([(500, b'{"error": "NodeError", "message": "an error of its own", "details": {}}')], HubError, 3),
    (["break off"], HubUnreachable, 3),
    ([(404, b"not a hub")], HubError, 1),
    ([(301, b"")], HubError, 1),
    ([(200, b"not JSON")], HubError, 1),
    ([(200, b'{"time": "x"}')], HubError, 1),
    ([(200, b"[" * 100_000)], HubError, 1),
    ([(404, b"[" * 100_000)], HubError, 1),
    ([failure(NotPermitted(who="x", action="y", channel="z", why="no"))], NotPermitted, 1),
    ([(400, b'{"error": "NotPermitted", "message": "x", "details": {"self": 1}}')], HubError, 1),
    ([failure(RateLimited(who="x", limit="y", retry_seconds=0.5))], RateLimited, 3),
    ([failure(RateLimited(who="x", limit="y", retry_seconds=9999))], RateLimited, 1),
    ([(429, b"slow down")], HubError, 3),
])
def test_what_may_pass_is_tried_again_and_the_rest_is_an_error_at_once(
    answers: list[Answer], error: type[KacheryError], count: int
) -> None:
    async def scenario() -> None:
        async with scripted(*answers) as hub:
            client, sleeper = client_for(hub.url)
            async with client:
                with pytest.raises(error):
                    await client.node_config()
            assert len(hub.bodies) == count
            assert len(sleeper.pauses) == count - 1

    run_on("asyncio-debug", scenario())


def test_being_slowed_down_is_obeyed() -> None:
    async def scenario() -> None:
        async with scripted(failure(RateLimited(who="x", limit="y", retry_seconds=1.5)), CONFIG) as hub:
            client, sleeper = client_for(hub.url, settings_with(retry_base_seconds=0.25))
            async with client:
                await client.node_config()
            assert sleeper.pauses == [1.75]

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_a_hub_that_is_not_there_or_does_not_answer_is_unreachable(loop_kind: str) -> None:
    async def scenario() -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            client, sleeper = client_for(f"http://127.0.0.1:{unused.getsockname()[1]}")
            async with client:
                with pytest.raises(HubUnreachable, match="refused"):
                    await client.node_config()
            assert len(sleeper.pauses) == 2
        async with scripted("silence") as hub:
            client, _ = client_for(hub.url, settings_with(retry_attempts_max=1, stall_seconds=0.1))
            async with client:
                with pytest.raises(HubUnreachable, match="no answer in time"):
                    await client.node_config()

    run_on(loop_kind, scenario())


# --- clocks


def test_the_clock_follows_the_hub() -> None:
    async def scenario() -> None:
        ticks = itertools.count(1_000.0, 0.5)  # half a second passes between two looks at the clock
        async with scripted(CONFIG) as hub:
            client, _ = client_for(hub.url, clock=lambda: next(ticks))
            async with client:
                await client.node_config()
                # Looks: before at 1000, for the signature at 1000.5, after at 1001: the hub's 5000 s belong to 1000.5.
                assert client.now_ms() == 5_000_000 + 1_000

    run_on("asyncio-debug", scenario())


@pytest.mark.parametrize("answer_now", [True, False])
def test_a_stale_request_corrects_the_clock_and_is_repeated_once(answer_now: bool) -> None:
    async def scenario() -> None:
        details = {"now": 7_000_000} if answer_now else {}
        stale = failure(StaleMessage(time=0, why="old", limit=120, **details))
        async with scripted(stale, stale, CONFIG) as hub:
            client, sleeper = client_for(hub.url, clock=lambda: 1_000.0)
            async with client:
                with pytest.raises(StaleMessage):
                    await client.pubsub_token("lab")
                times = [decode_hub_request(data)[0].time for data in hub.bodies]
                assert times == ([1_000_000, 7_000_000] if answer_now else [1_000_000])
            assert sleeper.pauses == []

    run_on("asyncio-debug", scenario())


@asynccontextmanager
async def real_hub(
    tmp_path: Path, clock: Callable[[], float] = time.time
) -> AsyncIterator[tuple[Hub, OwnerClient, HubClient]]:
    """A hub with the channel ``lab``, its owner, and a node that has joined nothing yet."""
    settings = settings_with(hub_dir=tmp_path / "hub", hub_port=0, retry_attempts_max=1)
    hub = Hub(settings)
    await hub.start()
    try:
        await hub.ensure_owner("o")
        token = (settings.hub_dir / "owner-token").read_text().strip()
        async with (OwnerClient(hub.local_url, token, settings) as owner,
                    HubClient(hub.local_url, KEY, settings, clock=clock) as node):
            await owner.call("createChannel", name="lab")
            yield hub, owner, node
    finally:
        await hub.stop()


@pytest.mark.parametrize("loop_kind", LOOPS)
@pytest.mark.parametrize("shift_seconds", [-86_400.0, 86_400.0])
def test_a_node_whose_clock_is_a_day_off_works_with_a_real_hub(
    tmp_path: Path, loop_kind: str, shift_seconds: float
) -> None:
    async def scenario() -> None:
        async with real_hub(tmp_path, clock=lambda: time.time() + shift_seconds) as (hub, owner, client):
            invitation = await owner.call("invite", channel="lab")
            url, code = split_invitation(invitation["link"])
            assert url == hub.local_url
            info = await client.join(code, "far away")
            assert info.bucket_url == f"{hub.local_url}/bucket/"
            assert abs(client.now_ms() - time.time() * 1000) < 2_000
            (signed,) = await client.sign_uploads("lab", [(SHA1, 5)])
            assert signed.url.startswith(f"{hub.local_url}/bucket/lab/sha1/aa/aa/aa/{SHA1}?")
            assert signed.headers["x-goog-if-generation-match"] == "0"
            assert (await client.pubsub_token("lab")).client_id == public_id(KEY)
            assert not await client.report_corrupt("lab", SHA1, "b" * 40)
            await client.leave("lab")

    run_on(loop_kind, scenario())


# --- feeds and tasks


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_an_answer_about_a_claim_that_was_lost_is_asked_for_as_the_same_attempt(loop_kind: str) -> None:
    claim: Answer = (200, json.dumps({"task": "7a" * 16, "state": "claimed", "granted": True}).encode())

    async def scenario() -> None:
        async with scripted("break off", (503, b""), claim) as hub:
            client, _ = client_for(hub.url)
            async with client:
                assert (await client.claim_task("lab", "7a" * 16, "action", "f")).granted
                assert (await client.claim_task("lab", "7a" * 16, "action", "f", attempt="x" * 32)).granted
            asked = [decode_hub_request(data)[0] for data in hub.bodies]
            assert all(isinstance(body, ClaimTask) for body in asked)
            attempts = [body.attempt for body in asked if isinstance(body, ClaimTask)]
            assert len(set(attempts[:3])) == 1
            assert len(attempts[0]) == 32
            assert attempts[3] == "x" * 32
            assert len({body.id for body in asked}) == 4

    run_on(loop_kind, scenario())


def test_many_tasks_are_kept_in_several_requests() -> None:
    ids = [f"{number:032x}" for number in range(2500)]

    async def scenario() -> None:
        async with scripted((200, json.dumps({"lost": ids[:1]}).encode()), (200, b'{"lost": []}'),
                            (200, json.dumps({"lost": ids[-1:]}).encode())) as hub:
            client, _ = client_for(hub.url)
            async with client:
                assert await client.keep_tasks("lab", ids) == {ids[0], ids[-1]}
                assert len(hub.bodies) == 3
                assert await client.keep_tasks("lab", []) == set()
                assert len(hub.bodies) == 3
            bodies = [decode_hub_request(data)[0] for data in hub.bodies]
            assert [task for body in bodies if isinstance(body, KeepTasks) for task in body.tasks] == ids

    run_on("asyncio-debug", scenario())


def test_feeds_and_tasks_at_a_real_hub(tmp_path: Path) -> None:
    """Every request once, with absolute URLs."""
    async def scenario() -> None:
        async with real_hub(tmp_path) as (hub, owner, node):
            await node.join((await owner.call("invite", channel="lab", permissions=["all"]))["code"])
            feed, subfeed = "4a" * 32, "0b" * 20
            segment, index = await node.sign_feed_uploads("lab", feed, subfeed, [(SHA1, 5)], 7)
            result = await node.sign_task_result("lab", SHA1, 5, replace=True)
            assert [urlsplit(item.url)._replace(query="").geturl() for item in (segment, index, result)] == [
                f"{hub.local_url}/bucket/{item.object}" for item in (segment, index, result)]
            assert (segment.sha1, index.sha1, result.sha1) == (SHA1, "", SHA1)
            assert segment.object.endswith(f"/segments/{SHA1}")
            assert index.object.endswith("/subfeed.json")
            assert result.object == f"lab/task_results/aa/aa/aa/{SHA1}"
            assert not await node.report_corrupt("lab", SHA1, "", feed_id=feed, subfeed=subfeed)
            assert not await node.report_bad_result("lab", SHA1)
            task = "7a" * 16
            assert (await node.claim_task("lab", task, "query", "f")).granted
            assert await node.keep_tasks("lab", [task, "8b" * 16]) == {"8b" * 16}
            assert (await node.finish_task("lab", task, "finished")).state == "finished"
            assert (await node.find_task("lab", task)).node_id == public_id(KEY)

    run_on("asyncio-debug", scenario())


# --- what a hub must not get away with


def test_a_hub_that_signs_other_objects_than_were_asked_for_is_caught() -> None:
    async def scenario() -> None:
        other = {"sha1": "b" * 40, "object": "x", "url": "/x", "headers": {}}
        async with scripted((200, json.dumps({"uploads": [other]}).encode())) as hub:
            client, _ = client_for(hub.url)
            async with client:
                for request in (
                    client.sign_uploads("lab", [(SHA1, 5)]), client.sign_task_result("lab", SHA1, 5),
                    client.sign_feed_uploads("lab", "4a" * 32, SHA1, [(SHA1, 5)]),
                    client.sign_feed_uploads("lab", "4a" * 32, SHA1, [], 5),
                ):
                    with pytest.raises(HubError, match="other objects"):
                        await request

    run_on("asyncio-debug", scenario())


def test_an_owners_request_is_made_once() -> None:
    async def scenario() -> None:
        refusal = failure(OwnerTokenRefused(why="it is wrong"))
        async with scripted((503, b""), refusal, (200, b'{"a": 1}'), (200, b"[]")) as hub:
            async with OwnerClient(hub.url, "token", settings_with()) as owner:
                with pytest.raises(HubError):
                    await owner.call("listChannels")
                with pytest.raises(OwnerTokenRefused):
                    await owner.call("listChannels")
                assert await owner.call("createChannel", name="x") == {"a": 1}
                with pytest.raises(HubError):
                    await owner.call("listChannels")
            assert [json.loads(body)["type"] for body in hub.bodies] == [
                "listChannels", "listChannels", "createChannel", "listChannels"]

    run_on("asyncio-debug", scenario())


# --- addresses


@pytest.mark.parametrize("link", [
    "http://hub:20440/join/abc-_9", "https://hub.example.org/kachery/join/abc", " http://[::1]:1/join/x\n"])
def test_an_invitation_is_an_address_and_a_code(link: str) -> None:
    url, code = split_invitation(link)
    assert f"{url}/join/{code}" == link.strip()


@pytest.mark.parametrize("text", [
    "", "hub:20440", "ftp://hub", "http://", "http://hub:99999", "http://hub:x", "http://user:pw@hub", "http://hub/?q=1",
    "http://[::1", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="address"):
        check_hub_url(text)
    with pytest.raises(InvalidArgument):
        split_invitation(f"{text}/join/code")


@pytest.mark.parametrize("link", ["http://hub:20440", "http://hub/join/", "http://hub/join/a b", "http://hub/join/é",
                                  "/join/abc", "http://hub/join/../x"])
def test_what_is_no_invitation_is_refused(link: str) -> None:
    with pytest.raises(InvalidArgument):
        split_invitation(link)
