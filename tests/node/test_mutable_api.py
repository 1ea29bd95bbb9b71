"""The mutables of the local API: what is not as documented is refused, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.network import LOOPS, run_on
from tests.node.running import Client, node_settings, running_node

BAD = [
    ("get", b""), ("get", b"[]"), ("get", b"{"), ("get", b'{"key":1,"more":2}'), ("set", b'{"key":1}'),
    ("set", b'{"key":1,"value":2,"update":"yes"}'), ("set", b'{"key":1,"value":NaN}'), ("delete", b'{"value":1}'),
    ("list", b'{"key":1}'), ("get", b'{"key":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    ("set", b'{"key":1,"value":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    ("set", b'{"key":12345678901234567890,"value":1}'),
]


@pytest.mark.parametrize("loop_kind", LOOPS)
def test_requests_are_answered_as_documented(tmp_path: Path, loop_kind: str) -> None:
    async def check(client: Client) -> None:
        assert await client.ask("POST", "/api/mutable/get", {"key": {"a": 1}}) == (200, {"found": False, "value": None})
        assert await client.ask("POST", "/api/mutable/set", {"key": {"a": 1}, "value": [None]}) == (
            200, {"changed": True})
        assert await client.ask("POST", "/api/mutable/set", {"key": {"a": 1}, "value": 2, "update": False}) == (
            200, {"changed": False})
        assert await client.ask("POST", "/api/mutable/get", {"key": {"a": 1}}) == (
            200, {"found": True, "value": [None]})
        assert await client.ask("POST", "/api/mutable/list", {}) == (
            200, {"mutables": [{"key": {"a": 1}, "value": [None]}]})
        for _ in range(2):
            deleted = await client.ask("POST", "/api/mutable/delete", {"key": {"a": 1}})
        assert deleted == (200, {"changed": False})

    async def main() -> None:
        async with running_node(node_settings(tmp_path / "store"), connected=False) as client:
            await check(client)

    run_on(loop_kind, main())


def test_what_is_not_as_documented_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        settings = node_settings(tmp_path / "store", mutable_size_bytes_max=100)
        async with running_node(settings, connected=False) as client:
            for what, body in BAD:
                status, answer = await client.ask("POST", f"/api/mutable/{what}", body)
                assert (status, answer["error"]) in ((400, "BadMessage"), (400, "InvalidArgument")), (what, body[:50])
            status, answer = await client.ask("POST", "/api/mutable/set", {"key": 1, "value": "x" * 99})
            assert (status, answer["error"]) == (413, "TooLarge")
            async with client.session.post(f"{client.url}/api/mutable/list", data=b"{}") as refused:
                assert refused.status == 403
            assert await client.ask("POST", "/api/mutable/list") == (200, {"mutables": []})

    run_on(LOOPS[0], main())
