"""Where the hub connects to for owners, where it does not, and what it puts up with there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kachery_fast.config import load_settings
from kachery_fast.errors import AddressRefused, EngineUnusable, InvalidArgument, TooLarge
from kachery_fast.hub.outbound import Outbound, check_endpoint, is_for_everybody, shown

from ..http_server import Handler, HttpServer


def outbound(*hosts: str, seconds: float = 20.0, **overrides: Any) -> Outbound:
    return Outbound(load_settings({}, hub_engine_hosts=" ".join(hosts), connect_timeout_seconds=5.0, **overrides),
                    exchange_seconds_max=seconds)


@contextmanager
def serving(get: Callable[[Handler], None]) -> Iterator[HttpServer]:
    class Answering(Handler):
        def get(self) -> None:
            get(self)

    server = HttpServer(Answering)
    try:
        yield server
    finally:
        server.close()


# --- addresses


@pytest.mark.parametrize("address", ["8.8.8.8", "52.219.0.1", "2600:1f00::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_for_everybody(address: str) -> None:
    assert is_for_everybody(address)


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1",
    "fe80::1%lo", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::", "2001::1", "2001:db8::1",
])
def test_no_other_address_is(address: str) -> None:
    assert not is_for_everybody(address)


@pytest.mark.parametrize("host", [
    "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "2130706433", "0x7f000001",
    "0177.0.0.1", "127.1", "0", "0.0.0.0", "169.254.169.254", "[fe80::1]", "10.0.0.1", "192.168.0.10",
])
def test_a_private_address_is_refused_however_it_is_written(host: str) -> None:
    with serving(lambda handler: handler.answer(b"inner")) as server:
        url = f"http://{host}:{server.port}/latest/meta-data/"
        # Where a resolver takes no such number for an address, there is no such name.
        with pytest.raises((AddressRefused, EngineUnusable)) as refused:
            outbound().request("GET", url)
        assert isinstance(refused.value, AddressRefused) or "not known" in refused.value.message
        with pytest.raises((AddressRefused, EngineUnusable)):
            outbound().check(url)


def test_a_name_is_judged_by_the_address_that_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a name whose owner answers with a public address first, and with a private one a moment later."""
    with serving(lambda handler: handler.answer(b"inner")) as server:
        answers = iter(["8.8.8.8", "127.0.0.1", "::ffff:127.0.0.1"])

        def resolve(host: str, port: int, **options: Any) -> list[Any]:
            assert host == "rebinding.example.org"
            address = next(answers)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        url = f"http://rebinding.example.org:{server.port}/"
        outbound().check(url)
        for _ in range(2):
            with pytest.raises(AddressRefused, match="private, local or reserved"):
                outbound().request("GET", url)


def test_of_several_addresses_only_public_ones_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    class Socket(socket.socket):
        def connect(self, address: Any) -> None:
            tried.append(address[0])
            raise ConnectionRefusedError(111, "Connection refused")

    rows = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("127.0.0.1", "8.8.8.8")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
    monkeypatch.setattr(socket, "socket", Socket)
    with pytest.raises(EngineUnusable, match="refused"):
        outbound().request("GET", "http://mixed.example.org/")
    assert tried == ["8.8.8.8"]


def test_a_host_that_the_admin_names_is_connected_to_on_the_port_that_is_named() -> None:
    with serving(lambda handler: handler.answer(b"inner")) as server, serving(
            lambda handler: handler.answer(b"other")) as other:
        url = f"http://127.0.0.1:{server.port}/"
        for named in ("127.0.0.1", f"127.0.0.1:{server.port}", f"x, 127.0.0.1:{server.port},y"):
            assert outbound(named).request("GET", url).body == b"inner"
        for named in ("localhost", f"127.0.0.1:{other.port}", "127.0.0.2", "0.0.1"):
            with pytest.raises(AddressRefused, match="KACHERY_HUB_ENGINE_HOSTS"):
                outbound(named).request("GET", url)


def test_what_the_hub_s_admin_names_does_not_open_what_it_points_to() -> None:
    with serving(lambda handler: handler.answer(b"secret")) as inner:
        def redirect(handler: Handler) -> None:
            handler.send_response(302)
            handler.send_header("Location", f"http://localhost:{inner.port}/")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        with serving(redirect) as server:
            reply = outbound(f"127.0.0.1:{server.port}").request("GET", f"http://127.0.0.1:{server.port}/")
            assert (reply.status, reply.body) == (302, b"")


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda handler: handler.answer(b"direct")) as server, serving(
            lambda handler: handler.answer(b"proxied")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert outbound("127.0.0.1").request("GET", f"http://127.0.0.1:{server.port}/").body == b"direct"


@pytest.mark.parametrize("text", [
    "", "s3.example.org", "ftp://s3.example.org", "file:///etc/passwd", "http://", "https://user@s3.example.org",
    "https://user:word@s3.example.org", "https://s3.example.org?x=1", "https://s3.example.org#x",
    "https://s3.example.org/path", "https://s3.example.org:99999", "https://s3.example.org:0", "http://[::1",
    "https://s3.example.org\\@10.0.0.1", "https://s3 .example.org", "https://s3.example.org\n", "https://münchen.example",
    'https://s3.example.org"', "https://s3.example.org<b>", "javascript:alert(1)", "gopher://127.0.0.1:6379",
])
def test_only_a_plain_address_is_an_endpoint(text: str) -> None:
    with pytest.raises(InvalidArgument):
        check_endpoint(text)


def test_an_endpoint_has_no_slash_at_its_end() -> None:
    assert check_endpoint("https://s3.example.org:9000/") == "https://s3.example.org:9000"


# --- what it puts up with


def test_a_long_answer_is_cut_off() -> None:
    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        while True:  # until the hub has had enough
            try:
                handler.wfile.write(b"x" * 65536)
            except OSError:
                return

    with serving(endless) as server, pytest.raises(TooLarge):
        outbound("127.0.0.1").request("GET", f"http://127.0.0.1:{server.port}/", limit_bytes=100_000)


def test_a_server_that_drips_is_cut_off_in_time() -> None:
    stop = threading.Event()

    def dripping(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not stop.wait(0.02):
            try:
                handler.wfile.write(b"x")
            except OSError:
                return

    with serving(dripping) as server:
        begun = time.monotonic()
        with pytest.raises(EngineUnusable):
            outbound("127.0.0.1", seconds=0.4).request("GET", f"http://127.0.0.1:{server.port}/")
        assert time.monotonic() - begun < 10
        stop.set()


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
                                  b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
                                  b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"])
def test_what_is_no_http_is_an_error_of_ours(said: bytes) -> None:
    def speaking(handler: Handler) -> None:
        handler.wfile.write(said)
        handler.close_connection = True

    with serving(speaking) as server, pytest.raises(EngineUnusable) as refused:
        outbound("127.0.0.1").request("GET", f"http://127.0.0.1:{server.port}/")
    assert len(refused.value.message) < 300


def test_closing_ends_what_is_under_way() -> None:
    asked = threading.Event()

    def silent(handler: Handler) -> None:
        asked.set()
        handler.rfile.read(1)  # until the hub hangs up
        handler.close_connection = True

    with serving(silent) as server:
        client = outbound("127.0.0.1")
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                client.request("GET", f"http://127.0.0.1:{server.port}/")
            except EngineUnusable as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(20)
        client.close()
        thread.join(20)
        assert len(failed) == 1
        with pytest.raises(EngineUnusable, match="the hub stops"):
            client.request("GET", f"http://127.0.0.1:{server.port}/")


def test_what_a_foreign_server_says_is_one_short_printable_line() -> None:
    assert shown(b"a\x1b[31m\r\nb\x00\xff  c\xe2\x80\xae") == "a [31m b � c"
    assert len(shown(b"x" * 10_000)) == 200
