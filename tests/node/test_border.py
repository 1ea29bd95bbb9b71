"""The border of the local API: web pages, rebound names and clients without the code stay outside."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.config import load_settings
from kachery_fast.node.node import Node
from kachery_fast.store.mutables import ADMITTED_KEY, MutableStore

from ..network import LOOPS, run_on

on_both_loops = pytest.mark.parametrize("loop_kind", LOOPS)
ENDPOINTS = [("GET", "/api/info"), ("POST", "/api/load"), ("POST", "/api/read"), ("POST", "/api/store"),
             ("POST", "/api/why"), ("POST", "/api/reload"), ("POST", "/api/stop")]


async def ask(node: Node, method: str, path: str, body: bytes = b"{}", **headers: str) -> tuple[int, Any]:
    """One request with exactly these headers (dashes for underscores); status and JSON of the answer."""
    status, content = await ask_plainly(node, method, path, body, **headers)
    return status, json.loads(content)


async def ask_plainly(node: Node, method: str, path: str, body: bytes = b"{}", **headers: str) -> tuple[int, bytes]:
    """The same, with the answer as it came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
    lines = [f"{method} {path} HTTP/1.1", f"Content-Length: {len(body)}", "Connection: close",
             *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), content


def with_node(loop_kind: str, storage_dir: Path, scenario: Callable[[Node, str], Awaitable[None]]) -> None:
    """Run a scenario with a node and its present client code."""

    async def run() -> None:
        node = Node(load_settings({}, storage_dir=storage_dir, node_port=0))
        await node.start()
        try:
            await scenario(node, (storage_dir / "client-auth").read_text())
        finally:
            await node.stop()

    run_on(loop_kind, run())


@on_both_loops
def test_a_web_page_is_refused_even_with_the_code(tmp_path: Path, loop_kind: str) -> None:
    async def scenario(node: Node, code: str) -> None:
        for method, path in [*ENDPOINTS, ("GET", "/probe")]:
            for origin in ("https://evil.example", "null", f"http://127.0.0.1:{node.port}"):
                status, answer = await ask(node, method, path, Host=f"127.0.0.1:{node.port}", Origin=origin,
                                           KACHERY_CLIENT_AUTH_CODE=code)
                assert (status, answer["error"]) == (403, "ClientAuthRefused")
        assert not node.stopped.is_set()

    with_node(loop_kind, tmp_path, scenario)


@on_both_loops
def test_a_name_that_was_bound_to_loopback_is_refused(tmp_path: Path, loop_kind: str) -> None:
    async def scenario(node: Node, code: str) -> None:
        for host in ("evil.example", f"evil.example:{node.port}", "127.0.0.1.evil.example", "localhost.evil.example",
                     "[::2]", "10.0.0.1", ""):
            status, answer = await ask(node, "GET", "/api/info", Host=host, KACHERY_CLIENT_AUTH_CODE=code)
            assert (status, answer["error"]) == (403, "ClientAuthRefused"), host
        for host in ("localhost", f"localhost:{node.port}", "127.0.0.1", f"[::1]:{node.port}"):
            status, answer = await ask(node, "GET", "/api/info", Host=host, KACHERY_CLIENT_AUTH_CODE=code)
            assert (status, answer["nodeId"]) == (200, node.identity.node_id), host

    with_node(loop_kind, tmp_path, scenario)


@on_both_loops
def test_every_endpoint_but_the_probe_wants_the_code(tmp_path: Path, loop_kind: str) -> None:
    async def scenario(node: Node, code: str) -> None:
        host = f"127.0.0.1:{node.port}"
        for method, path in ENDPOINTS:
            for wrong in ({}, {"KACHERY_CLIENT_AUTH_CODE": ""}, {"KACHERY_CLIENT_AUTH_CODE": code[:-1]},
                          {"KACHERY_CLIENT_AUTH_CODE": code.swapcase()}):
                status, answer = await ask(node, method, path, b"{}", Host=host, **wrong)
                assert (status, answer["error"]) == (403, "ClientAuthRefused"), path
        assert (await ask(node, "GET", "/probe", Host=host))[0] == 200
        assert not node.stopped.is_set()
        assert not (tmp_path / "sha1").exists()

    with_node(loop_kind, tmp_path, scenario)


@on_both_loops
def test_the_code_before_the_present_one_still_opens_and_older_ones_do_not(tmp_path: Path, loop_kind: str) -> None:
    async def scenario(node: Node, first: str) -> None:
        host = f"127.0.0.1:{node.port}"
        node.client_auth.rotate()
        assert (await ask(node, "GET", "/api/info", Host=host, KACHERY_CLIENT_AUTH_CODE=first))[0] == 200
        node.client_auth.rotate()
        assert (await ask(node, "GET", "/api/info", Host=host, KACHERY_CLIENT_AUTH_CODE=first))[0] == 403
        present = (tmp_path / "client-auth").read_text()
        assert (await ask(node, "GET", "/api/info", Host=host, KACHERY_CLIENT_AUTH_CODE=present))[0] == 200
        assert (tmp_path / "client-auth").stat().st_mode & 0o777 == 0o640

    with_node(loop_kind, tmp_path, scenario)


@on_both_loops
def test_a_lasting_code_does_not_read_files_by_path_nor_end_the_node(tmp_path: Path, loop_kind: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"a file of the node's user")
    named = {"localFilePath": str(secret)}
    linked = {**named, "size": secret.stat().st_size, "mtime": secret.stat().st_mtime}
    calls = [("POST", "/storeFile", named), ("POST", "/%73toreFile", named), ("POST", "/linkFile", linked),
             ("GET", "/halt", {}), ("POST", "/api/stop", {})]
    storage_dir = tmp_path / "storage"
    with MutableStore(storage_dir, value_size_bytes_max=1000) as mutables:
        mutables.set(ADMITTED_KEY, ["lasting"])

    async def scenario(node: Node, code: str) -> None:
        host = f"127.0.0.1:{node.port}"

        async def call(method: str, path: str, body: bytes, code: str) -> tuple[int, bytes]:
            return await ask_plainly(node, method, path, body, Host=host, KACHERY_CLIENT_AUTH_CODE=code)

        for method, path, body in calls:
            status, told = await call(method, path, json.dumps(body).encode(), "lasting")
            assert status == 403, path
            assert b"a lasting code does not open" in told
            assert b"client-auth" in told
        assert not node.stopped.is_set()
        assert not (storage_dir / "sha1").exists()
        for path in ("/store", "/api/store"):
            status, told = await call("POST", path, b"sent in", "lasting")
            assert (status, json.loads(told)["sha1"]) == (200, hashlib.sha1(b"sent in").hexdigest()), path
        uri = f"sha1://{hashlib.sha1(b'sent in').hexdigest()}/x"
        assert await call("POST", "/api/read", json.dumps({"uri": uri}).encode(), "lasting") == (200, b"sent in")
        for _, path, body in calls[:3]:
            assert (await call("POST", path, json.dumps(body).encode(), code))[0] == 200, path
        assert (await call("POST", "/api/stop", b"", code))[0] == 200
        await node.stopped.wait()

    with_node(loop_kind, storage_dir, scenario)


@on_both_loops
def test_a_body_that_is_not_as_documented_is_refused(tmp_path: Path, loop_kind: str) -> None:
    async def scenario(node: Node, code: str) -> None:
        host = f"127.0.0.1:{node.port}"
        bodies = [b"[]", b"{", b'{"uri": 1}', b'{"uri": "sha1://x"}', b'{"uri": "x", "more": 1}', b"\xff",
                  b"[" * 50_000]
        for path in ("/api/load", "/api/read", "/api/why"):
            for body in bodies:
                status, answer = await ask(node, "POST", path, body, Host=host, KACHERY_CLIENT_AUTH_CODE=code)
                assert (status, answer["error"]) in ((400, "BadMessage"), (400, "InvalidUri")), (path, body[:20])

    with_node(loop_kind, tmp_path, scenario)
