"""The node's local API, over real sockets: every endpoint, and whatever should not get through."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from kachery_fast.client.connection import NodeConnection
from kachery_fast.errors import ClientAuthRefused, FileChanged, NodeError
from kachery_fast.node.node import Node
from kachery_fast.store.destination import Destination
from kachery_fast.store.streams import StreamWriter
from tests.hub.support import CHANNEL, World
from tests.network import LOOPS, run_on
from tests.node.running import Client, alone, node_settings, together
from tests.node.support import CHUNK, data_of, other_tasks, sha1_of, until

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
UNKNOWN = "sha1://" + "ab" * 20


def put(client: Client, data: bytes) -> str:
    stored = client.node.store.put_bytes(data)
    return f"sha1://{stored.sha1}" + (f"?manifest={stored.manifest_sha1}" if stored.manifest_sha1 else "")


async def raw(client: Client, request: bytes) -> bytes:
    """Send bytes as they stand on a connection of their own; return the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.node.port)
    writer.write(request)
    answer = await reader.read(65536)
    writer.close()
    await writer.wait_closed()
    return answer


def test_anybody_may_probe(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        answer = json.loads((await raw(client, b"GET /probe HTTP/1.1\r\nHost: localhost\r\n\r\n")).partition(
            b"\r\n\r\n")[2])
        assert answer["nodeId"] == client.node.identity.node_id
        assert answer["kacheryStorageDir"] == str(tmp_path / "n")
    alone(loop_kind, tmp_path, work)


@pytest.mark.parametrize("code", [None, "", "wrong", "é", "\udcff\udcfe", "A" * 4000])
def test_a_wrong_code_is_refused_everywhere_but_at_the_probe(loop_kind: str, tmp_path: Path, code: str | None) -> None:
    async def work(client: Client) -> None:
        line = b""
        if code is not None:
            line = b"KACHERY-CLIENT-AUTH-CODE: " + code.encode("utf-8", "surrogateescape") + b"\r\n"
        for method, path in (("GET", "/api/info"), ("GET", "/api/read-error/a"), ("POST", "/api/load"),
                             ("POST", "/api/read"), ("POST", "/api/store"),
                             ("POST", "/api/why"), ("POST", "/api/reload"), ("POST", "/api/stop"), ("GET", "/other")):
            request = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n".encode() + line + b"\r\n"
            answer = await raw(client, request)
            assert answer.startswith(b"HTTP/1.1 403"), (path, answer)
            assert b"ClientAuthRefused" in answer
        assert not client.node.stopped.is_set()
    alone(loop_kind, tmp_path, work)


@pytest.mark.parametrize("lines", [
    "Host: evil.example", "Host: evil.example:20431", "Host: 127.0.0.1\r\nOrigin: http://evil.example",
    "Host: 127.0.0.1\r\nOrigin: http://127.0.0.1", "Host: 127.0.0.1\r\nOrigin: null", "Host: 127.0.0.1.evil.example",
    "Host: 192.168.1.1", "Host: [::1", "Host: ::1", "Host:", "X: y", "Host: localhost.", "Host: 0.0.0.0",
])
def test_web_pages_are_refused_even_with_the_code(loop_kind: str, tmp_path: Path, lines: str) -> None:
    async def work(client: Client) -> None:
        code = client.headers()["KACHERY-CLIENT-AUTH-CODE"]
        for path in ("/probe", "/api/info"):
            answer = await raw(client, f"GET {path} HTTP/1.0\r\n{lines}\r\nKACHERY-CLIENT-AUTH-CODE: {code}\r\n\r\n"
                               .encode())
            assert b" 403 " in answer.splitlines()[0], answer
            assert b"web pages may not" in answer
    alone(loop_kind, tmp_path, work)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:20431", "localhost", "LocalHost:1", "[::1]:20431", "[::1]"])
def test_the_node_answers_to_its_own_names(loop_kind: str, tmp_path: Path, host: str) -> None:
    async def work(client: Client) -> None:
        assert (await client.ask("GET", "/api/info", Host=host))[0] == 200
    alone(loop_kind, tmp_path, work)


def test_the_name_of_its_host_has_no_case(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        node = Node(node_settings(tmp_path / "n", node_host="Rig-2"))
        host = {"Host": "RIG-2:20431", "KACHERY-CLIENT-AUTH-CODE": "x"}
        with pytest.raises(ClientAuthRefused, match="not the node's"):  # the host is not what is refused
            await node._api._border.check("GET", "/api/info", host)
        with pytest.raises(ClientAuthRefused, match="web pages"):
            await node._api._border.check("GET", "/api/info", {**host, "Host": "rig-3"})
        await node.stop()
    run_on(loop_kind, work(), 60)


BODIES: list[tuple[str, bytes]] = [
    ("/api/load", b""), ("/api/load", b"{"), ("/api/load", b"[]"), ("/api/load", b'{"uri": 5}'),
    ("/api/load", b'{"uri": "%s", "dest": "/etc/passwd"}' % UNKNOWN.encode()), ("/api/load", b'{"uri": "http://x"}'),
    ("/api/load", b"\xff\xfe"), ("/api/load", b'{"uri": ' + b"[" * 100_000), ("/api/load", b'{"uri": "\xff"}'),
    ("/api/read", b'{"uri": "%s", "start": -1}' % UNKNOWN.encode()),
    ("/api/read", b'{"uri": "%s", "start": 5, "end": 4}' % UNKNOWN.encode()),
    ("/api/read", b'{"uri": "%s", "start": 1e3}' % UNKNOWN.encode()),
    ("/api/read", b'{"uri": "%s", "start": 1%s}' % (UNKNOWN.encode(), b"0" * 300)),
    ("/api/read", b'{"uri": "%s", "start": true}' % UNKNOWN.encode()), ("/api/why", b'{"uri": "sha1://x"}'),
    ("/api/reload", b'{"x": 1}'), ("/api/stop", b'{"x": 1}'), ("/api/stop", b"null"),
]


@pytest.mark.parametrize("case", BODIES, ids=[str(number) for number in range(len(BODIES))])
def test_a_malformed_request_is_told_what_is_wrong(loop_kind: str, tmp_path: Path, case: tuple[str, bytes]) -> None:
    async def work(client: Client) -> None:
        status, answer = await client.ask("POST", *case)
        assert status == 400, answer
        assert answer["error"] in ("BadMessage", "InvalidUri", "InvalidArgument")
        assert not client.node.stopped.is_set()
    alone(loop_kind, tmp_path, work)


def test_a_body_that_is_too_long_is_refused(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        status, answer = await client.ask("POST", "/api/load", b" " * 5000)
        assert (status, answer["error"]) == (413, "TooLarge")
        assert "api_body_size_bytes_max" in answer["message"]
    alone(loop_kind, tmp_path, work, api_body_size_bytes_max=4096)


def test_unknown_paths_and_methods_are_answered_in_json(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        status, answer = await client.ask("GET", "/nothing")
        assert (status, answer["error"]) == (404, "InvalidArgument")
        assert "/nothing" in answer["message"]
        status, answer = await client.ask("GET", "/api/load")
        assert (status, answer["error"]) == (405, "InvalidArgument")
    alone(loop_kind, tmp_path, work)


def test_what_is_in_the_store_is_loaded_and_read_without_a_channel(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        data = data_of(5_000_000)
        uri = put(client, data)
        done = await client.load(uri)
        assert (done["type"], done["source"], done["size"]) == ("done", "store", len(data))
        assert Path(done["path"]).read_bytes() == data
        assert await client.read(uri) == data
        assert await client.read(uri, 4_999_990, 10**18) == data[-10:]
        assert await client.read(uri, 10**18) == b""
        assert await client.read(uri, 7, 7) == b""
    alone(loop_kind, tmp_path, work)


def test_what_is_not_there_is_an_error_of_its_kind(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        status, answer = await client.ask("POST", "/api/load", {"uri": UNKNOWN})
        assert (status, answer["error"]) == (404, "NoChannel")
        status, answer = await client.ask("POST", "/api/read", {"uri": UNKNOWN, "channel": "elsewhere"})
        assert (status, answer["error"]) == (404, "ChannelUnknown")
        status, answer = await client.ask("POST", "/api/why", {"uri": UNKNOWN})
        assert status == 200
        assert "no channel" in answer["verdict"]
        linked = tmp_path / "linked"
        linked.write_bytes(b"before")
        uri = f"sha1://{client.node.store.link_file(linked).sha1}"
        linked.write_bytes(b"after")
        status, answer = await client.ask("POST", "/api/load", {"uri": uri})
        assert (status, answer["error"]) == (410, "LinkInvalid")
    alone(loop_kind, tmp_path, work)


def test_a_stored_file_that_is_cut_short_breaks_the_answer_off(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        data = data_of(30_000_000)
        uri = put(client, data)
        path = client.node.store.find(sha1_of(data)).path
        path.chmod(0o644)
        async with client.session.post(f"{client.url}/api/read", json={"uri": uri},
                                       headers=client.headers()) as answer:
            assert answer.headers["Content-Length"] == str(len(data))
            with path.open("r+b") as file:
                file.truncate(29_000_000)
            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                await asyncio.wait_for(answer.read(), 10)
        status, told = await client.ask("GET", f"/api/read-error/{answer.headers['X-Kachery-Read']}")
        assert (status, told["error"]) == (200, "FileChanged")
        assert "ends at byte 29000000" in told["message"]
        assert await client.ask("GET", "/api/read-error/0123456789abcdef") == (200, {})
    alone(loop_kind, tmp_path, work)


def test_a_client_learns_why_its_read_broke_off(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        data = data_of(30_000_000)
        uri = put(client, data)
        path = client.node.store.find(sha1_of(data)).path
        path.chmod(0o644)
        connection = NodeConnection(replace(client.node.settings, node_port=client.node.port))

        def read() -> None:
            with connection.read(uri, None, 0, None) as answer:
                with path.open("r+b") as file:
                    file.truncate(29_000_000)
                while answer.read(1 << 20):
                    pass

        with pytest.raises(FileChanged, match="ends at byte 29000000"):
            await asyncio.to_thread(read)
    alone(loop_kind, tmp_path, work)


def test_bytes_are_stored_whole(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        for data in (b"", b"x", data_of(9_000_001)):
            async with client.session.post(f"{client.url}/api/store", data=io.BytesIO(data),
                                           headers=client.headers()) as response:
                status, answer = response.status, await response.json()
            assert (status, answer["sha1"], answer["size"]) == (200, sha1_of(data), len(data))
            assert client.node.store.find(answer["sha1"]).path.read_bytes() == data
    alone(loop_kind, tmp_path, work)


def _store_request(client: Client, size: int, sent: int) -> bytes:
    code = client.headers()["KACHERY-CLIENT-AUTH-CODE"]
    return (f"POST /api/store HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n"
            f"KACHERY-CLIENT-AUTH-CODE: {code}\r\n\r\n").encode() + bytes(sent)


@pytest.mark.parametrize("sent", [10_000, 5_000_000])
def test_a_store_that_is_broken_off_leaves_nothing(loop_kind: str, tmp_path: Path, sent: int) -> None:
    async def work(client: Client) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", client.node.port)
        writer.write(_store_request(client, 9_000_000, sent))
        await writer.drain()
        await until(lambda: any(path.stat().st_size for path in tmp_path.glob("n/tmp/*")))
        writer.close()
        await writer.wait_closed()
        await until(lambda: not list(tmp_path.glob("n/tmp/*")))
        assert not list((tmp_path / "n").glob("sha1/*"))
    alone(loop_kind, tmp_path, work)


def test_a_store_that_is_under_way_ends_with_the_node(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.node.port)
        writer.write(_store_request(client, 9_000_000, 5_000_000))
        await until(lambda: list(tmp_path.glob("n/tmp/*")))
        begun = time.monotonic()
        await client.end()
        assert time.monotonic() - begun < 15  # not stall_seconds
        assert not list(tmp_path.glob("n/tmp/*"))
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.transport.abort()  # close() would wait until all is sent
    alone(loop_kind, tmp_path, work)


def test_stores_of_every_way_and_length_are_stored(loop_kind: str, tmp_path: Path) -> None:
    """First on a connection or not, small or large, with the body behind the head or later."""
    async def work(client: Client) -> None:
        for size in (0, 1, 70_000, 2**20, 2**20 + 1, 3 * 2**20 + 17):
            for first in (True, False):
                data = random.Random(size).randbytes(size)
                reader, writer = await asyncio.open_connection("127.0.0.1", client.node.port)
                if not first:
                    writer.write(b"GET /probe HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
                writer.write(_store_request(client, size, 0) + data[:100])
                await writer.drain()
                writer.write(data[100:])
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                told = json.loads(await reader.readexactly(length))
                assert told["sha1"] == hashlib.sha1(data).hexdigest()
                assert client.node.store.verify(told["sha1"]).size == size
                client.node.store.remove(told["sha1"])
                writer.close()
                await writer.wait_closed()
    alone(loop_kind, tmp_path, work)


def test_a_store_on_a_kept_connection_that_is_broken_off_leaves_nothing(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client goes while a thread is writing: the file must not be closed under it."""
    under_way: list[int] = []
    aborted_while_writing = []
    write, abort = StreamWriter.write, StreamWriter.abort

    def slow_write(self: StreamWriter, buffer: Any) -> None:
        under_way.append(1)
        try:
            release.wait(5)
            write(self, buffer)
        finally:
            under_way.pop()

    def watched_abort(self: StreamWriter) -> None:
        aborted_while_writing.append(bool(under_way))
        abort(self)

    release = threading.Event()
    monkeypatch.setattr(StreamWriter, "write", slow_write)
    monkeypatch.setattr(StreamWriter, "abort", watched_abort)

    async def work(client: Client) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.node.port)
        writer.write(b"GET /probe HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(_store_request(client, 9_000_000, 1_000_000))
        await until(lambda: under_way)
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.1)
        release.set()
        await until(lambda: aborted_while_writing)
        assert aborted_while_writing[0] is False
        await until(lambda: not list((tmp_path / "n" / "tmp").iterdir()))
        assert not list((tmp_path / "n").glob("sha1/*"))
    alone(loop_kind, tmp_path, work)


def test_a_store_of_more_than_fits_is_refused_up_front(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        answer = await raw(client, _store_request(client, 10**17, 1000))
        assert answer.startswith(b"HTTP/1.1 507")
        assert b"DiskFull" in answer
    alone(loop_kind, tmp_path, work)


def test_a_file_comes_from_the_other_node_with_progress(loop_kind: str, tmp_path: Path) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        data = data_of(20 * CHUNK + 5)
        uri = put(a, data)
        assert await b.read(uri, 7 * CHUNK - 3, 7 * CHUNK + 3) == data[7 * CHUNK - 3:7 * CHUNK + 3]
        status, lines = await b.ask("POST", "/api/load", {"uri": uri, "channel": CHANNEL})
        assert status == 200
        assert {line["type"] for line in lines[:-1]} == {"progress"}
        assert (lines[-1]["type"], lines[-1]["source"]) == ("done", "channel")
        assert Path(lines[-1]["path"]).read_bytes() == data
        status, info = await b.ask("GET", "/api/info")
        assert info["traffic"]["downloaded_objects"] == 21
        assert {member["label"] for member in info["hubs"][0]["channels"][0]["members"]} == {"a", "b"}
        status, why = await b.ask("POST", "/api/why", {"uri": UNKNOWN})
        assert "does not have it" in why["channels"][0]["text"]
        assert why["verdict"] == "It cannot be loaded now."
        last = await b.load(UNKNOWN)
        assert (last["type"], last["error"]) == ("error", "NotAvailable")
    together(loop_kind, tmp_path, work)


def test_a_client_that_hangs_up_withdraws_its_wish(loop_kind: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    original = Destination.verify_next

    def verify_next(self: Destination) -> bool:
        held.wait(0.05)
        return original(self)

    monkeypatch.setattr(Destination, "verify_next", verify_next)

    async def work(world: World, a: Client, b: Client) -> None:
        uri = put(a, data_of(200 * CHUNK))
        sha1 = uri[7:47]
        before = other_tasks()
        for path in ("/api/load", "/api/read"):
            body = json.dumps({"uri": uri}).encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", b.node.port)
            code = b.headers()["KACHERY-CLIENT-AUTH-CODE"]
            writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                         f"KACHERY-CLIENT-AUTH-CODE: {code}\r\n\r\n".encode() + body)
            await reader.readline()
            if path == "/api/load":
                await until(lambda: b.node.transfers.describe() != [])
            writer.close()
            await writer.wait_closed()
            await until(lambda: b.node.transfers.describe() == [])
            if path == "/api/load":
                await until(lambda: b.node.transfers.active(sha1) is None)
        active = b.node.transfers.active(sha1)
        if active is not None:
            await active.close()
        await until(lambda: len(other_tasks()) <= len(before) + 4)
        held.set()
        assert (await b.load(uri))["type"] == "done"
    together(loop_kind, tmp_path, work)


def test_a_second_node_on_the_port_or_the_store_is_refused_and_harms_nothing(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        code = client.headers()
        for directory, port, match in (("other", client.node.port, "KACHERY_DAEMON_PORT"),
                                       ("n", 0, "another node works on")):
            second = Node(node_settings(tmp_path / directory, node_port=port))
            with pytest.raises(NodeError, match=match):
                await second.start()
            await second.stop()
            assert client.headers() == code
            assert (await client.ask("GET", "/api/info"))[0] == 200
    alone(loop_kind, tmp_path, work)


def test_a_client_can_stop_the_node(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        assert (await client.ask("POST", "/api/stop", {}))[0] == 200
        await asyncio.wait_for(client.node.stopped.wait(), 5)
    alone(loop_kind, tmp_path, work)


def test_a_fault_of_the_program_is_an_error_in_json(loop_kind: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(client: Client) -> None:
        monkeypatch.setattr(client.node, "describe", lambda: 1 // 0)
        status, answer = await client.ask("GET", "/api/info")
        assert (status, answer["error"]) == (500, "NodeError")
        assert "ZeroDivisionError" in answer["message"]
    alone(loop_kind, tmp_path, work)


def test_a_fault_in_the_middle_of_an_answer_is_not_taken_for_bytes(loop_kind: str, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(world: World, a: Client, b: Client) -> None:
        uri = put(a, data_of(300 * CHUNK))  # several spans
        original = Destination.read
        reads = []

        def read(self: Destination, start: int, end: int) -> bytes:
            reads.append(start)
            if len(reads) > 2:
                raise ZeroDivisionError("a bug")
            return original(self, start, end)

        monkeypatch.setattr(Destination, "read", read)
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await b.read(uri)
        monkeypatch.setattr(b.node.transfers, "load", lambda *_: broken())
        last = await b.load(uri)
        assert (last["type"], last["error"]) == ("error", "NodeError")

    async def broken() -> None:
        raise ZeroDivisionError("a bug")
    together(loop_kind, tmp_path, work)
