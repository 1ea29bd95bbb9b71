"""Files straight from a channel's bucket: a real hub and its bucket, and no node at the reader's."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import re
import socket
import socketserver
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.cli.lab import Lab
from kachery_fast.client import direct
from kachery_fast.client.files import open_range
from kachery_fast.client.fs import KacheryFileSystem
from kachery_fast.config import load_settings
from kachery_fast.protocol.names import object_name, parse_file_uri
from kachery_fast.store.destination import Destination
from kachery_fast.store.files import FileStore
from tests.cli.commands import Program
from tests.system.support import CHUNK_SIZE_BYTES, QUICK, load, make_recording, store

CHUNKS = 6


class Shelf(NamedTuple):
    """A hub whose bucket has the files ``long`` (of several chunks), ``short`` and ``empty``; no node runs any more."""

    lab: Lab
    long: str
    short: str
    empty: str
    data: bytes


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    directory = tmp_path_factory.mktemp("direct")
    with Lab(directory / "lab", environ=QUICK) as lab:
        lab.start_hub()
        giver, taker = lab.add_node("A"), lab.add_node("B")
        uris = [store(giver, make_recording(directory / f"{size}.dat", size, seed=31))
                for size in (CHUNKS * CHUNK_SIZE_BYTES + 7, 1000, 0)]
        for uri in uris:
            load(taker, uri)
        for node in (giver, taker):
            node.run("node", "stop")
        long, short, empty = uris
        yield Shelf(lab, long, short, empty, (directory / f"{CHUNKS * CHUNK_SIZE_BYTES + 7}.dat").read_bytes())


@pytest.fixture
def reader(shelf: Shelf, program: Program, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A fresh store without a node, in a process that has read nothing yet."""
    direct._recent.clear()
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
        program.env[name] = value
    return program


class Relay:
    """A way to the hub and its bucket that notes what goes over it: request lines, and the bytes of the answers."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._to = (parts.hostname or "", parts.port or 80)
        self.requests: list[str] = []
        self.answered_bytes = 0
        self._lock = threading.Lock()
        relay = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(relay._to) as hub:
                    answers = threading.Thread(target=relay._answers, args=(hub, self.request))
                    answers.start()
                    while data := self.request.recv(65536):
                        found = re.findall(rb"^(?:GET|HEAD|POST) [^ ]*", data, re.MULTILINE)
                        relay.requests += [line.decode() for line in found]
                        hub.sendall(data)
                    hub.shutdown(socket.SHUT_WR)
                    answers.join()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def _answers(self, hub: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := hub.recv(65536):
                with self._lock:
                    self.answered_bytes += len(data)
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def chunk_path(shelf: Shelf, reader: Program, index: int) -> Path:
    """Where the bucket keeps a chunk of the long file."""
    manifest_sha1 = parse_file_uri(shelf.long).manifest_sha1 or ""
    manifest = json.loads((shelf.lab.bucket_dir.parent / object_name(shelf.lab.channel, manifest_sha1)).read_bytes())
    return shelf.lab.bucket_dir.parent / object_name(shelf.lab.channel, manifest["chunks"][index]["sha1"])


def part_of(reader: Program, uri: str) -> Path:
    return FileStore(reader.storage_dir).part_path(parse_file_uri(uri).sha1)


def test_whole_files_come_without_a_node(shelf: Shelf, reader: Program, tmp_path: Path) -> None:
    where: dict[str, Any] = {"channel": shelf.lab.channel, "direct": shelf.lab.hub_url}
    steps: list[kf.Progress] = []
    loaded = kf.load(shelf.long, progress=steps.append, **where)
    assert Path(loaded.path).read_bytes() == shelf.data
    assert (loaded.source, loaded.size) == ("bucket", len(shelf.data))
    assert steps[-1] == kf.Progress(len(shelf.data), len(shelf.data))
    assert kf.load(shelf.long).source == "store"
    assert kf.verify(shelf.long).size == len(shelf.data)
    dest = tmp_path / "short.dat"
    assert kf.load_file(shelf.short, dest, **where) == str(dest)
    assert dest.stat().st_size == 1000
    assert Path(kf.load_file(shelf.empty, **where)).read_bytes() == b""
    assert not list((reader.storage_dir / "tmp").glob("*.part-of"))


def test_a_range_fetches_only_its_chunks_and_stores_nothing(shelf: Shelf, reader: Program) -> None:
    where: dict[str, Any] = {"channel": shelf.lab.channel, "direct": shelf.lab.hub_url}
    absent = chunk_path(shelf, reader, 0)
    hidden = absent.with_name("hidden")
    absent.rename(hidden)
    try:
        start, end = CHUNK_SIZE_BYTES + 5, 3 * CHUNK_SIZE_BYTES + 9
        assert kf.load_bytes(shelf.long, start, end, **where) == shelf.data[start:end]
        with pytest.raises(errors.NotAvailable, match="in part"):
            kf.load_bytes(shelf.long, 0, 1, **where)
    finally:
        hidden.rename(absent)
    assert kf.load_bytes(shelf.long, **where) == shelf.data
    assert kf.load_bytes(shelf.short, 3, 3, **where) == b""
    with pytest.raises(errors.InvalidArgument, match="not within"):
        kf.load_bytes(shelf.long, 0, len(shelf.data) + 1, **where)
    assert not reader.storage_dir.exists()


def test_blocks_that_are_smaller_than_chunks_fetch_each_chunk_once(
        shelf: Shelf, reader: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with Relay(shelf.lab.hub_url) as relay:
        monkeypatch.setenv("KACHERY_DIRECT_HUB", relay.url)
        fs = KacheryFileSystem(channel=shelf.lab.channel, block_size=CHUNK_SIZE_BYTES // 4, skip_instance_cache=True)
        with fs.open(shelf.long) as file:
            assert file.read() == shelf.data
        step = CHUNK_SIZE_BYTES // 4
        for start in range(0, len(shelf.data), step):
            assert fs.cat_file(shelf.long, start, min(start + step, len(shelf.data))) == shelf.data[start:start + step]
    assert len(shelf.data) < relay.answered_bytes < 1.05 * len(shelf.data) + 20_000
    assert len([line for line in relay.requests if line.startswith("POST")]) == 2  # of the manifest, and of the file
    assert len(relay.requests) <= CHUNKS + 1 + 2 + 3


def test_threads_that_read_in_one_chunk_fetch_it_once(shelf: Shelf, reader: Program) -> None:
    with Relay(shelf.lab.hub_url) as relay, ThreadPoolExecutor(8) as threads:
        where: dict[str, Any] = {"channel": shelf.lab.channel, "direct": relay.url}
        kf.load_bytes(shelf.long, 0, 1, **where)
        before = relay.answered_bytes
        start = 2 * CHUNK_SIZE_BYTES
        starts = range(start, start + CHUNK_SIZE_BYTES, CHUNK_SIZE_BYTES // 16)
        found = threads.map(lambda at: kf.load_bytes(shelf.long, at, at + 100, **where), starts)
        assert list(found) == [shelf.data[at:at + 100] for at in starts]
    assert relay.answered_bytes - before < 1.1 * CHUNK_SIZE_BYTES


def test_a_read_that_is_left_takes_nothing_from_the_next(shelf: Shelf, reader: Program) -> None:
    where: dict[str, Any] = {"channel": shelf.lab.channel, "direct": shelf.lab.hub_url}
    pieces = open_range(shelf.long, **where)
    assert next(pieces) == shelf.data[:CHUNK_SIZE_BYTES]
    pieces.close()  # while the next chunk comes in
    assert kf.load_bytes(shelf.long, **where) == shelf.data


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_reads_for_itself(shelf: Shelf, reader: Program) -> None:
    where: dict[str, Any] = {"channel": shelf.lab.channel, "direct": shelf.lab.hub_url}
    pieces = open_range(shelf.long, **where)
    next(pieces)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        assert child.submit(partial(kf.load_bytes, shelf.long, **where)).result(60) == shelf.data
    pieces.close()


def test_a_broken_download_goes_on_from_what_is_there(shelf: Shelf, reader: Program) -> None:
    where: dict[str, Any] = {"channel": shelf.lab.channel, "direct": shelf.lab.hub_url}
    absent = chunk_path(shelf, reader, CHUNKS)
    hidden = absent.with_name("hidden")
    absent.rename(hidden)
    try:
        with pytest.raises(errors.NotAvailable, match="in part"):
            kf.load_file(shelf.long, **where)
    finally:
        hidden.rename(absent)
    assert part_of(reader, shelf.long).exists()
    first = chunk_path(shelf, reader, 0)  # here already: it is not asked for again
    first.rename(first.with_name("hidden"))
    try:
        assert Path(kf.load_file(shelf.long, **where)).read_bytes() == shelf.data
    finally:
        first.with_name("hidden").rename(first)
    assert not part_of(reader, shelf.long).exists()


def test_damage_in_the_bucket_is_an_error_and_never_a_file(shelf: Shelf, reader: Program) -> None:
    where: dict[str, Any] = {"channel": shelf.lab.channel, "direct": shelf.lab.hub_url}
    victim = chunk_path(shelf, reader, 2)
    data = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    try:
        for call in (lambda: kf.load_file(shelf.long, **where), lambda: kf.load_bytes(shelf.long, **where)):
            with pytest.raises(errors.CorruptObject):
                call()
    finally:
        victim.unlink()
        victim.write_bytes(data)
    with pytest.raises(errors.NotInStore):
        kf.load_file(shelf.long, local_only=True)
    other = shelf.long.replace(parse_file_uri(shelf.long).sha1, "1" * 40)
    with pytest.raises(errors.ManifestInvalid, match="another file"):
        kf.load_file(other, **where)


def test_what_cannot_be_had_is_told(shelf: Shelf, reader: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = f"sha1://{'1' * 40}/a.dat"
    channel = shelf.lab.channel
    with pytest.raises(errors.NotAvailable, match=r"does not have it.*nobody is asked"):
        kf.load_file(absent, channel=channel, direct=shelf.lab.hub_url)
    with pytest.raises(errors.NotOnHub):
        kf.load_file(absent, channel="other", direct=shelf.lab.hub_url)
    with pytest.raises(errors.InvalidArgument, match="hub's address"):
        kf.load_file(absent, channel=channel, direct="nothing")
    with pytest.raises(errors.NoChannel):
        kf.load_file(absent, direct=shelf.lab.hub_url)
    monkeypatch.setenv("KACHERY_RETRY_ATTEMPTS_MAX", "1")
    with pytest.raises(errors.HubUnreachable):
        kf.load_file(absent, channel=channel, direct="http://127.0.0.1:1")
    reader.storage_dir.mkdir()
    monkeypatch.setenv("KACHERY_OFFLINE_STORAGE_DIR", str(reader.storage_dir))
    with pytest.raises(errors.ClientOffline):
        kf.load_file(absent, channel=channel, direct=shelf.lab.hub_url)


def test_leaving_a_load_keeps_what_has_come_and_runs_within_an_event_loop(shelf: Shelf, reader: Program) -> None:
    where: dict[str, Any] = {"channel": shelf.lab.channel, "direct": shelf.lab.hub_url}

    def leave(_step: kf.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kf.load_file(shelf.long, progress=leave, **where)

    async def as_a_notebook_does() -> str:
        return kf.load_file(shelf.long, **where)

    assert Path(asyncio.run(as_a_notebook_does())).read_bytes() == shelf.data


def test_two_programs_never_write_into_one_partial_file(shelf: Shelf, reader: Program) -> None:
    uri = parse_file_uri(shelf.short)
    settings = load_settings()
    other = Destination(FileStore(settings.storage_dir), uri.sha1, None, (), 0, whole=True)
    try:
        with pytest.raises(errors.AlreadyExists, match="another program"):
            kf.load_file(shelf.short, channel=shelf.lab.channel, direct=shelf.lab.hub_url)
    finally:
        other.close(keep=False)
    kf.load_file(shelf.short, channel=shelf.lab.channel, direct=shelf.lab.hub_url)


def test_the_commands_take_the_hub_as_an_option_or_from_the_environment(shelf: Shelf, reader: Program) -> None:
    where = ["--direct", shelf.lab.hub_url, "--channel", shelf.lab.channel]
    assert reader.json("cat", shelf.long, "--start", "10", "--end", "12", *where)["end"] == 12
    assert reader.json("load", shelf.short, *where)["source"] == "bucket"
    reader.env.update(KACHERY_DIRECT_HUB=shelf.lab.hub_url, KACHERY_CHANNEL=shelf.lab.channel)
    assert Path(reader.ok("load", shelf.long, "--quiet").strip()).read_bytes() == shelf.data


def test_a_hub_tells_a_channel_s_bucket_as_in_2022(shelf: Shelf) -> None:
    def ask(body: bytes) -> dict[str, Any]:
        request = urllib.request.Request(f"{shelf.lab.hub_url}/api/getChannelBucketBaseUrl", body)
        with urllib.request.urlopen(request) as answer:
            return dict(json.load(answer))

    assert ask(json.dumps({"channelName": shelf.lab.channel}).encode()) == {
        "url": f"{shelf.lab.hub_url}/bucket", "private": False}
    for body, status in ((b"{}", 400), (b"[", 400), (b'{"channelName":"no"}', 404), (b'{"channelName":"../x"}', 400)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(body)
        assert caught.value.code == status
        caught.value.close()


def test_a_channel_that_has_become_private_is_called_that(shelf: Shelf, reader: Program) -> None:
    where: dict[str, Any] = {"channel": shelf.lab.channel, "direct": shelf.lab.hub_url}
    assert kf.load_bytes(shelf.long, start=0, end=5, **where) == shelf.data[:5]
    shelf.lab.owner("set", shelf.lab.channel, "--private")
    try:
        for start in (3 * CHUNK_SIZE_BYTES, 0):  # the first still knows where the bucket is, the second asks anew
            with pytest.raises(errors.ChannelPrivate):
                kf.load_bytes(shelf.long, start=start, end=start + 5, **where)
            direct._recent.clear()
        with pytest.raises(errors.ChannelPrivate):
            kf.load_file(shelf.long, **where)
    finally:
        shelf.lab.owner("set", shelf.lab.channel, "--public")
    assert kf.load_bytes(shelf.long, start=0, end=5, **where) == shelf.data[:5]
