"""Ably's SDK for JavaScript beside that for Python at the embedded broker: messages both ways."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.config import load_settings
from kachery_fast.net.channel import AblyChannel, Message
from tests.embedded.broker_server import ALL, BANDS, Server, serving
from tests.network import LOOPS, run_on
from tests.programs import need_program

FOLDER = Path(__file__).parent / "ably_js"
BAND = BANDS[0]
parametrized = pytest.mark.parametrize("loop_kind", LOOPS)
binary_or_not = pytest.mark.parametrize("binary", [True, False], ids=["msgpack", "json"])


def need_sdk() -> str:
    """The path of node; skips the test where it, or the SDK, is not installed."""
    node = need_program("node")
    if not (FOLDER / "node_modules" / "ably").is_dir():
        pytest.skip("the npm package ably is not installed; make test does it where there is npm")
    return node


class JavaScript:
    """A client in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.got: list[dict[str, Any]] = []
        self._heard = asyncio.Event()

    async def do(self, action: str, **fields: Any) -> dict[str, Any]:
        """Have it do something; return what it says of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": action, **fields}).encode() + b"\n")
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        while "band" in (line := await self._line()):
            self.got.append(line)
        return line

    async def receive(self) -> tuple[bytes, str]:
        """The next message, and the client id of its sender."""
        line = self.got.pop(0) if self.got else await self._line()
        return base64.b64decode(line["data"]), line["clientId"]

    async def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        data = await asyncio.wait_for(self._process.stdout.readline(), 30)
        assert data, "the client has ended"
        found: dict[str, Any] = json.loads(data)
        return found


@contextlib.asynccontextmanager
async def javascript(
    server: Server, client_id: str, *, binary: bool, capability: Mapping[str, Sequence[str]] = ALL
) -> AsyncIterator[JavaScript]:
    wanted = json.dumps({"endpoint": "127.0.0.1", "port": server.port, "clientId": client_id, "binary": binary,
                         "token": server.token(client_id, capability)})
    process = await asyncio.create_subprocess_exec(
        need_sdk(), str(FOLDER / "client.mjs"), wanted, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        client = JavaScript(process)
        await client.answer()
        await client.do("connection")
        yield client
    finally:
        process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def python(server: Server, client_id: str) -> AsyncIterator[tuple[AblyChannel, asyncio.Queue[Message]]]:
    async def token() -> dict[str, Any]:
        return server.broker.issue_token(client_id, ALL, 900.0)

    got: asyncio.Queue[Message] = asyncio.Queue()
    channel = AblyChannel("lab", endpoint=server.endpoint, tls=False, token=token, client_id=client_id,
                          settings=load_settings({}))
    try:
        await channel.connect()
        await channel.subscribe(BAND, got.put_nowait)
        yield channel, got
    finally:
        await channel.close()


@binary_or_not
@parametrized
def test_messages_go_both_ways_whichever_sdk_and_format(loop_kind: str, binary: bool) -> None:
    need_sdk()

    async def scenario() -> None:
        async with (serving() as server, python(server, "py") as (channel, got),
                    javascript(server, "js", binary=binary) as js,
                    javascript(server, "other", binary=not binary) as other):
            for client in (js, other):
                assert await client.do("subscribe", band=BAND) == {"did": "subscribe"}
            data = bytes(range(256)) * 100
            await channel.publish(BAND, data)
            assert await js.receive() == await other.receive() == (data, "py")
            assert (await got.get()).data == data
            for sent in ({"data": base64.b64encode(data).decode()}, {"text": '{"x": "\u00e9"}'}):
                assert await js.do("publish", band=BAND, **sent) == {"did": "publish"}
                expected = data if "data" in sent else '{"x": "\u00e9"}'.encode()
                assert await asyncio.wait_for(got.get(), 10) == Message(BAND, expected, "js")
                assert await js.receive() == await other.receive() == (expected, "js")

    run_on(loop_kind, scenario())


@binary_or_not
def test_what_is_not_permitted_is_refused_with_ably_s_code(binary: bool) -> None:
    need_sdk()

    async def scenario() -> None:
        capability = {BAND: ["subscribe"]}
        async with serving() as server, javascript(server, "js", binary=binary, capability=capability) as js:
            assert await js.do("subscribe", band=BAND) == {"did": "subscribe"}
            assert (await js.do("publish", band=BAND, text="x"))["failed"] == 40160
            assert (await js.do("subscribe", band=BANDS[1]))["failed"] == 40160

    run_on("uvloop", scenario())


@binary_or_not
def test_what_is_published_again_under_its_id_is_delivered_once(binary: bool) -> None:
    need_sdk()

    async def scenario() -> None:
        async with (serving() as server, python(server, "py") as (_, got),
                    javascript(server, "js", binary=binary) as js):
            for _ in range(2):
                assert await js.do("publish", band=BAND, text="one", id="an-id-of-ours:0") == {"did": "publish"}
            assert await js.do("publish", band=BAND, text="two") == {"did": "publish"}
            assert [(await asyncio.wait_for(got.get(), 10)).data for _ in range(2)] == [b"one", b"two"]

    run_on("uvloop", scenario())
