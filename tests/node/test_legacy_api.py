"""The local API of 2022 as a stranger may use it: bodies of every kind, codes, hosts and paths; the node goes on."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.node.legacy_parts import MISSING_CODE, WRONG_CODE
from tests.network import LOOPS
from tests.node.running import Client, alone
from tests.node.support import until
from tests.node.test_api import raw

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)

SHA1 = "0a4d55a8d778e5022fab701977c5d840bbc486d0"  # of "Hello World"


async def _ask(client: Client, path: str, body: Any = None, method: str = "POST", **headers: str) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
    async with client.session.request(method, client.url + path, data=data if method != "GET" else None,
                                      headers=client.headers(**headers)) as answer:
        return answer.status, await answer.text()


async def _ask_json(client: Client, path: str, body: Any = None, method: str = "POST") -> Any:
    status, text = await _ask(client, path, body, method)
    assert status == 200, text
    return json.loads(text)


def test_codes_hosts_and_origins_are_checked_in_the_words_of_2022(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        async with client.session.post(client.url + "/mutable/get", json={"key": 1}) as answer:
            assert (answer.status, await answer.text()) == (403, MISSING_CODE)
        for headers, text in (({"KACHERY-CLIENT-AUTH-CODE": "abcdefghijkl"}, WRONG_CODE),
                              ({"Origin": "https://evil.example"}, "web pages"),
                              ({"Host": "evil.example"}, "web pages")):
            status, told = await _ask(client, "/mutable/get", {"key": 1}, **headers)
            assert status == 403
            assert text in told
        async with client.session.get(client.url + "/probe") as answer:
            assert (await answer.json())["success"] is True
        async with client.session.post(client.url + "/probe") as answer:
            assert (answer.status, await answer.text()) == (403, MISSING_CODE)
        for code in ("ä", "é" * 12):
            for path in ("/mutable/get", "/store"):  # by the loop, and by a thread
                assert await _ask(client, path, **{"KACHERY-CLIENT-AUTH-CODE": code}) == (403, WRONG_CODE)

    alone(loop_kind, tmp_path, work)


def test_what_is_not_served_is_told_as_text(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        async with client.session.get(client.url + "/mutable/get", headers=client.headers()) as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "POST")
            assert await answer.text() == "GET /mutable/get: Method Not Allowed"
        for path, kind in (("/store", b"text/plain"), ("/api/store", b"application/json")):
            told = await raw(client, b"POST %b HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n" % path.encode())
            assert told.startswith(b"HTTP/1.1 400 ")
            assert kind in told

    alone(loop_kind, tmp_path, work)


def test_a_slow_client_reads_why_its_file_is_refused(loop_kind: str, tmp_path: Path) -> None:
    """As the clients of 2022, it sends the whole file before it looks."""
    def store_slowly(port: int) -> tuple[int, bytes]:
        def body() -> Iterator[bytes]:
            for _ in range(30):
                time.sleep(0.1)
                yield bytes(100_000)

        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("POST", "/store", body=body(), headers={
                "Content-Length": "3000000", "KACHERY-CLIENT-AUTH-CODE": "abcdefghijkl"})
            answer = connection.getresponse()
            return answer.status, answer.read()

    async def work(client: Client) -> None:
        assert await asyncio.to_thread(store_slowly, client.node.port) == (403, WRONG_CODE.encode())

    alone(loop_kind, tmp_path, work)


def test_a_silent_client_of_a_kept_connection_is_given_up(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.node.port)
        writer.write(b"GET /probe HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"POST /store HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
                     b"KACHERY-CLIENT-AUTH-CODE: %b\r\n\r\nonly this" % client.headers()[
                         "KACHERY-CLIENT-AUTH-CODE"].encode())
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert not list((client.node.settings.storage_dir / "sha1").rglob("*"))

    alone(loop_kind, tmp_path, work, stall_seconds=0.3)


@pytest.mark.parametrize(("path", "body"), [
    ("/loadFile", b"{"), ("/loadFile", b"\xff"), ("/loadFile", {}), ("/loadFile", {"fileKey": {"sha1": 1}}),
    ("/loadFile", {"fileKey": {"sha1": SHA1}, "channelName": "x", "more": 1}),
    ("/loadFile", {"fileKey": {"sha1": "../../private.pem"}, "channelName": "x"}),
    ("/downloadFileData", {"fileKey": {"sha1": SHA1}, "startByte": -1}),
    ("/downloadFileData", {"fileKey": {"sha1": SHA1}, "startByte": 10**30}),
    ("/linkFile", {"localFilePath": "/etc/hostname", "size": "1", "mtime": 1}),
    ("/mutable/get", b"[" * 100_000), ("/mutable/set", {"key": 1}),
    ("/feed/appendMessages", {"feedId": "a" * 64, "subfeedHash": "b" * 40, "messages": ["text"]}),
    ("/feed/watchForNewMessages", {"subfeedWatches": {}, "waitMsec": -1}),
    ("/task/requestTask", {"channelName": 1}), ("/task/updateTaskStatus", {"status": "odd"}),
])
def test_a_malformed_body_is_told_what_is_wrong(loop_kind: str, tmp_path: Path, path: str, body: Any) -> None:
    async def work(client: Client) -> None:
        status, text = await _ask(client, path, body)
        assert status == 400, text
        assert "Invalid request in" in text or "SHA-1" in text
        assert (await _ask_json(client, "/mutable/get", {"key": 1}))["found"] is False

    alone(loop_kind, tmp_path, work)


def test_an_oversize_body_is_refused(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        status, text = await _ask(client, "/mutable/set", {"key": 1, "value": "x" * 200_000})
        assert status == 413, text
        assert (await _ask_json(client, "/mutable/set", {"key": 1, "value": "x" * 50_000}))["success"] is True

    alone(loop_kind, tmp_path, work, api_body_size_bytes_max=100_000)


def test_files_are_stored_by_path_only_where_that_is_harmless(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        root = client.node.settings.storage_dir
        data = tmp_path / "data.bin"
        data.write_bytes(b"Hello World")
        (tmp_path / "to-the-key").symlink_to(root / "private.pem")
        os.link(root / "private.pem", tmp_path / "another-name-of-the-key")
        os.mkfifo(tmp_path / "pipe")
        (root / "public.pem").rename(tmp_path / "kept-elsewhere.pem")
        (root / "public.pem").symlink_to(tmp_path / "kept-elsewhere.pem")
        (root / "damaged").mkdir()
        (root / "damaged" / "x").write_bytes(b"Hello World")
        (tmp_path / "another-name-of-the-directory").symlink_to(root / "damaged")
        refused = [str(root / "public.pem"), str(tmp_path / "kept-elsewhere.pem"), str(root / "damaged" / "x"),
                   str(tmp_path / "another-name-of-the-directory" / "x"),
                   "data.bin", "", "~/data.bin", "/data\0.bin", str(root / "private.pem"),
                   f"{tmp_path}/x/../n/private.pem", str(tmp_path / "to-the-key"), str(root / "client-auth"),
                   str(tmp_path / "another-name-of-the-key"),
                   "/proc/self/fd/../../self/root" + str(root / "private.pem"), str(tmp_path),
                   str(tmp_path / "pipe"), str(tmp_path / "absent"), "/dev/zero", "/" + "a" * 300_000]
        for path in refused:
            for endpoint, more in (("/storeFile", {}), ("/linkFile", {"size": 11, "mtime": 0.0})):
                status, text = await _ask(client, endpoint, {"localFilePath": path, **more})
                assert status in (400, 404, 409), (path, text)
                assert len(text) < 1000
        assert not list((root / "sha1").rglob("*")) if (root / "sha1").exists() else True
        stored = await _ask_json(client, "/storeFile", {"localFilePath": f"{tmp_path}/./data.bin"})
        assert stored == {"success": True, "error": None, "sha1": SHA1, "manifestSha1": None}
        again = str(client.node.store.find(SHA1).path)  # as by a client that stores what it has loaded
        assert await _ask_json(client, "/storeFile", {"localFilePath": again}) == stored

    alone(loop_kind, tmp_path, work)


def test_a_key_that_is_put_in_the_place_of_a_file_is_not_stored(loop_kind: str, tmp_path: Path) -> None:
    """What is looked at is what was opened: a path may lead elsewhere a moment later."""
    async def work(client: Client) -> None:
        key = client.node.settings.storage_dir / "private.pem"
        plain, name, swap = tmp_path / "plain", tmp_path / "name", tmp_path / "swap"
        plain.write_bytes(b"Hello World")
        name.symlink_to(plain)
        ended = threading.Event()

        def swap_for_ever() -> None:
            while not ended.is_set():
                for target in (key, plain):
                    swap.symlink_to(target)
                    swap.replace(name)

        swapper = threading.Thread(target=swap_for_ever)
        swapper.start()
        try:
            statuses = {(await _ask(client, "/storeFile", {"localFilePath": str(name)}))[0] for _ in range(100)}
        finally:
            ended.set()
            swapper.join()
        assert statuses <= {200, 400, 409}
        assert not client.node.store.has(hashlib.sha1(key.read_bytes()).hexdigest())

    alone(loop_kind, tmp_path, work)


def test_a_link_is_made_of_the_file_that_the_client_saw(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        data = tmp_path / "data.bin"
        data.write_bytes(b"Hello World")
        mtime = data.stat().st_mtime
        seen = {"localFilePath": str(data), "size": 11, "mtime": mtime}
        for changed in ({"size": 12}, {"mtime": mtime + 0.01}, {"mtime": 1e300}):
            status, text = await _ask(client, "/linkFile", seen | changed)
            assert status == 409, text
        assert (await _ask_json(client, "/linkFile", seen | {"mtime": mtime + 0.001}))["sha1"] == SHA1

    alone(loop_kind, tmp_path, work)


def test_long_files_that_are_read_keep_nobody_waiting(loop_kind: str, tmp_path: Path) -> None:
    """Neither other calls, nor the end of the node, nor for long after the client has gone."""
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.truncate(16 * 2**30)
    linked = {"localFilePath": str(path), "size": path.stat().st_size, "mtime": path.stat().st_mtime}

    def being_read() -> int:
        found = 0
        for fd in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found += fd.readlink() == path
        return found

    async def work(client: Client) -> None:
        for ending in ("clients go", "node stops"):
            calls = [asyncio.ensure_future(_ask(client, "/linkFile", linked)) for _ in range(5)]
            await until(lambda: being_read() == 4)
            assert (await asyncio.wait_for(_ask_json(client, "/mutable/get", {"key": 1}), 10))["found"] is False
            if ending == "node stops":
                await asyncio.wait_for(client.end(), 10)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await until(lambda: being_read() == 0)

    alone(loop_kind, tmp_path, work)


def test_absurd_ranges_and_missing_files_are_refused_and_true_ones_served(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        client.node.store.put_bytes(b"Hello World")
        key = {"fileKey": {"sha1": SHA1}}
        for part in ({"startByte": 5, "endByte": 4}, {"startByte": 12}, {"endByte": 12}, {"startByte": 2**61}):
            status, text = await _ask(client, "/downloadFileData", key | part)
            assert (status, "not a range" in text) == (400, True)
        assert await _ask(client, "/downloadFileData", key) == (200, "Hello World")
        assert await _ask(client, "/downloadFileData", key | {"startByte": 6, "endByte": 11}) == (200, "World")
        assert await _ask(client, "/downloadFileData", key | {"startByte": 11}) == (200, "")
        status, text = await _ask(client, "/downloadFileData", {"fileKey": {"sha1": 40 * "0"}})
        assert status == 500
        assert text.startswith("Error downloading file: Unable get data read stream for local file.")

    alone(loop_kind, tmp_path, work)


def test_a_store_tells_its_error_and_wants_a_length(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        async def pieces() -> Any:
            yield b"Hello World"

        async with client.session.post(client.url + "/store", data=pieces(), headers=client.headers()) as answer:
            assert answer.status == 403
            assert "Missing Content-Length" in await answer.text()
        assert await _ask_json(client, "/store", b"Hello World") == {
            "success": True, "error": None, "sha1": SHA1, "manifestSha1": None}
        (client.node.settings.storage_dir / "tmp").rename(tmp_path / "moved")
        (client.node.settings.storage_dir / "tmp").write_text("a file where a directory should be")
        told = await _ask_json(client, "/store", b"Another")
        assert told["success"] is False
        assert "writing" in told["error"]

    alone(loop_kind, tmp_path, work)


def test_a_chunk_of_a_local_file_is_loaded_as_a_file(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        whole = client.node.store.put_bytes(b"Hello World" * 10)
        chunk = {"sha1": SHA1, "chunkOf": {"fileKey": {"sha1": whole.sha1}, "startByte": 11, "endByte": 22}}
        status, text = await _ask(client, "/loadFile", {"fileKey": chunk, "channelName": "x"})
        length, _, rest = text.partition("#")
        assert (status, json.loads(rest[:int(length)])) == (
            200, {"type": "progress", "bytesLoaded": 11, "bytesTotal": 11})
        length, _, frame = rest[int(length):].partition("#")
        assert len(frame) == int(length)
        assert Path(json.loads(frame)["localFilePath"]).read_bytes() == b"Hello World"
        wrong = chunk | {"sha1": 40 * "1"}
        _, text = await _ask(client, "/loadFile", {"fileKey": wrong, "channelName": "x"})
        assert json.loads(text.partition("#")[2])["type"] == "error"

    alone(loop_kind, tmp_path, work)


def test_one_chunk_is_loaded_by_many_at_once(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        data = os.urandom(2_000_000)
        whole = client.node.store.put_bytes(data + b"more")
        sha1 = hashlib.sha1(data).hexdigest()
        key = {"sha1": sha1, "chunkOf": {"fileKey": {"sha1": whole.sha1}, "startByte": 0, "endByte": len(data)}}
        asked = {"fileKey": key, "channelName": "x"}
        for status, text in await asyncio.gather(*(_ask(client, "/loadFile", asked) for _ in range(8))):
            assert (status, '"finished"' in text) == (200, True), text
        assert client.node.store.verify(sha1).size == len(data)

    alone(loop_kind, tmp_path, work)


def test_a_name_of_the_node_is_allowed_when_it_is_in_the_settings(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        for host, status in (("LabServer:20431", 200), ("rig.example", 200), ("evil.example", 403)):
            async with client.session.get(client.url + "/probe", headers={"Host": host}) as answer:
                assert answer.status == status, host
                assert status == 200 or "KACHERY_NODE_NAMES" in await answer.text()

    alone(loop_kind, tmp_path, work, node_names="labserver, rig.example")


def test_to_wait_for_ever_is_to_wait_for_long(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        feed_id = (await _ask_json(client, "/feed/createFeed", {}))["feedId"]
        place = {"feedId": feed_id, "subfeedHash": 40 * "a"}
        asked = {"subfeedWatches": {"w": {**place, "position": 0, "channelName": "*local*"}}, "waitMsec": 1e12}
        waiting = asyncio.create_task(_ask_json(client, "/feed/watchForNewMessages", asked))
        await _ask_json(client, "/feed/appendMessages", {**place, "messages": [{"a": 1}]})
        assert (await waiting)["messages"] == {"w": [{"a": 1}]}

    alone(loop_kind, tmp_path, work)


def test_who_reads_feeds_gets_all_that_is_here_of_each(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        feed = {"feedId": (await _ask_json(client, "/feed/createFeed"))["feedId"], "subfeedHash": "a" * 40}
        sent = [{"i": number, "text": "x" * 4000} for number in range(1500)]
        for first in range(0, len(sent), 250):
            await _ask_json(client, "/feed/appendMessages", {**feed, "messages": sent[first:first + 250]})
        watches = {name: {**feed, "position": position} for name, position in (("a", 0), ("b", 700), ("none", 1500))}
        for limit, ends in ((0, (1500, 1500)), (1200, (1200, 1500)), (10, (10, 710))):
            found = await _ask_json(client, "/feed/watchForNewMessages", {
                "subfeedWatches": watches, "waitMsec": 1000, "maxNumMessages": limit})
            assert found["messages"] == {"a": sent[:ends[0]], "b": sent[700:ends[1]]}
        signed = await _ask_json(client, "/feed/watchForNewMessages", {"subfeedWatches": watches, "waitMsec": 0,
                                                                        "signed": True})
        assert [message["body"]["message"] for message in signed["messages"]["b"]] == sent[700:]

    alone(loop_kind, tmp_path, work)


def test_what_was_not_announced_is_not_taken(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        async with client.session.put(f"{client.url}/deposit/guessed", data=b"x") as answer:
            assert answer.status == 400
            assert "expired" in await answer.text()
        async with client.session.get(f"{client.url}/task-result/guessed") as answer:
            assert answer.status == 404

    alone(loop_kind, tmp_path, work)


def test_stats_and_halt(loop_kind: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        stats = await _ask_json(client, "/stats", method="GET")
        assert stats["stats"]["nodeId"] == client.node.identity.node_id
        assert "<table>" in (await _ask(client, "/stats?format=html", method="GET"))[1]
        assert (await _ask_json(client, "/halt", method="GET")) == {"success": True}
        await client.node.stopped.wait()

    alone(loop_kind, tmp_path, work)
