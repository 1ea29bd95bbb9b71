"""HTTP to servers that owners name: only to addresses that are nobody's private ones, and never more than was meant.

An owner of a channel is not to reach, through the hub, what only the hub's machine can reach (its own services, the
lab's network, the cloud's metadata): the address that is connected to is checked, whatever name it came from. Redirects
are not followed, proxies of the environment not used; answers are bounded in size, and each exchange in time. A server
that answers a byte at a time is cut off too.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..config import Settings
from ..errors import AddressRefused, EngineUnusable, InvalidArgument, TooLarge
from ..net.foreign import SHOWN_LENGTH_MAX, one_line

__all__ = ["ANSWER_SIZE_BYTES_MAX", "Outbound", "Reply", "check_endpoint", "is_for_everybody", "shown"]

ANSWER_SIZE_BYTES_MAX = 4 * 1024 * 1024
EXCHANGE_SECONDS_MAX = 60.0
_SHOWN_BYTES_MAX = 4 * SHOWN_LENGTH_MAX
_PORTS = {"http": 80, "https": 443}
_READ_BYTES = 256 * 1024
# IPv6 addresses whose last 32 bits are an IPv4 one: of NAT64 (RFC 6052), and those of RFC 4291 §2.5.5.1.
_WITH_IPV4 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")  # RFC 8215


class Reply(NamedTuple):
    """An answer. The names of ``headers`` are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def check_endpoint(text: str) -> str:
    """Return the address of a server, ``http(s)://HOST[:PORT]``, without a slash at its end.

    :raises InvalidArgument: it is anything else, such as one with a user's name, a path, a query or a fragment.
    """
    try:
        parts = urlsplit(text)
        usable = parts.scheme in _PORTS and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or not text.isascii() or not text.isprintable() or any(mark in text for mark in "\\@?# \"<>") or (
            parts.path not in ("", "/")):
        raise InvalidArgument(what=f"{shown(text.encode())!r} is not the address of a server. It looks like "
                                   "https://s3.example.org or http://minio.lab.example:9000")
    return text.rstrip("/")


def is_for_everybody(address: str) -> bool:
    """Whether an IP address is one of the public internet: no private, loopback, link-local, multicast, unspecified or
    reserved one, nor an IPv6 address by which such an IPv4 one is reached."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and any(found in network for network in _WITH_IPV4):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_for_everybody(str(inner))
        if found in _LOCAL_NAT64:
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def shown(data: bytes) -> str:
    """What a foreign server says, as it may be shown: one short line of printable characters."""
    return one_line(data[:_SHOWN_BYTES_MAX].decode("utf-8", "replace"))


class Outbound:
    """Connects to owners' servers. Its methods block; they may be called from any thread.

    :param settings: ``hub_engine_hosts`` are trusted whatever their addresses, for all ports or the one named.
    """

    def __init__(self, settings: Settings, *, exchange_seconds_max: float = EXCHANGE_SECONDS_MAX) -> None:
        self._trusted = frozenset(settings.hub_engine_hosts.lower().replace(",", " ").split())
        self._connect_seconds = settings.connect_timeout_seconds
        self._stall_seconds = settings.stall_seconds
        self._exchange_seconds_max = exchange_seconds_max
        self._lock = threading.Lock()
        self._active: set[socket.socket] = set()
        self._closed = False
        self._tls: ssl.SSLContext | None = None

    def trusts(self, url: str) -> bool:
        """Whether the hub's admin has named this server (``hub_engine_hosts``)."""
        return self._trusts(*_origin(url)[1:])

    def check(self, url: str) -> None:
        """Look a server's name up, and whether the hub would connect to it.

        :raises AddressRefused: it would not. :raises EngineUnusable: the name is not known.
        """
        self._addresses(*_origin(url)[1:])

    def address(self, host: str, port: int) -> str:
        """Look a server's name up, and return an address of it that the hub may connect to. Raises as ``check``."""
        return str(self._addresses(host, port)[0][4][0])

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes = b"",
        limit_bytes: int = ANSWER_SIZE_BYTES_MAX, hub: bool = False,
    ) -> Reply:
        """Send one request on a connection of its own, and return the answer, whatever its status.

        :param hub: ``url`` is this hub's own, which needs no leave.
        :raises AddressRefused: the hub does not connect there. :raises TooLarge: the answer is longer than
            ``limit_bytes``. :raises EngineUnusable: there is no answer, or it is not HTTP's.
        """
        scheme, host, port = _origin(url)
        parts = urlsplit(url)
        what = f"The server {host}"
        try:
            with self._connected(scheme, host, port, hub=hub) as connection:
                connection.request(method, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
                                   body=body or None, headers={**(headers or {}), **_length(method, body)})
                answer = connection.getresponse()
                # HTTP/1.1 headers are Latin-1, of any length up to http.client's bounds.
                named = {name.lower(): value for name, value in answer.getheaders()}
                return Reply(answer.status, named, _read(answer, method, limit_bytes, what))
        except http.client.HTTPException as error:
            raise EngineUnusable(what=what, why=f"it does not answer as HTTP is spoken ({type(error).__name__})",
                                 advice="Is the address right, and http:// or https:// as it has to be?") from None
        except ssl.SSLError as error:
            raise EngineUnusable(what=what, why=f"TLS fails ({shown(str(error.reason or error).encode())})",
                                 advice="Is it http:// that is spoken there, or its certificate not valid?") from None
        except OSError as error:
            raise EngineUnusable(what=what, why=_reason(error),
                                 advice="Is the address right, and does it run?") from None

    def close(self) -> None:
        """Break off what is under way; from now on nothing is connected to."""
        with self._lock:
            self._closed = True
            for sock in self._active:
                _end(sock)

    @contextmanager
    def _connected(self, scheme: str, host: str, port: int, *, hub: bool) -> Iterator[http.client.HTTPConnection]:
        sock = self._open(host, port, hub=hub)
        cut = threading.Event()

        # The time-out of a socket is for each read: who sends a byte now and then would never meet it.
        def cut_off() -> None:
            cut.set()
            _end(sock)

        watchdog = threading.Timer(self._exchange_seconds_max, cut_off)
        watchdog.daemon = True
        watchdog.start()
        try:
            with self._lock:
                self._active.add(sock)
                if self._closed:
                    raise OSError("the hub stops")
            if scheme == "https":
                self._tls = self._tls or ssl.create_default_context()
                wrapped: socket.socket = self._tls.wrap_socket(sock, server_hostname=host)
                with self._lock:
                    self._active.discard(sock)
                    self._active.add(wrapped)
                sock = wrapped
            connection = http.client.HTTPConnection(host, port)
            connection.auto_open = 0  # only ever this connection, to the address that was checked
            connection.sock = sock
            yield connection
            if cut.is_set():  # what ends early can look complete
                raise TimeoutError
        finally:
            watchdog.cancel()
            with self._lock:
                self._active.discard(sock)
            sock.close()

    def _open(self, host: str, port: int, *, hub: bool) -> socket.socket:
        failure: OSError = OSError("the name has no address")
        for family, kind, protocol, _name, address in self._addresses(host, port, hub=hub):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self._connect_seconds)
                sock.connect(address)
            except OSError as error:
                failure = error
                sock.close()
            else:
                sock.settimeout(self._stall_seconds)
                return sock
        raise failure

    def _trusts(self, host: str, port: int) -> bool:
        return not self._trusted.isdisjoint((host, f"{host}:{port}", f"[{host}]:{port}"))

    def _addresses(self, host: str, port: int, *, hub: bool = False) -> list[Any]:
        """Rows of ``getaddrinfo``, only those that may be connected to."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise EngineUnusable(what=f"The server {host}", why=f"its name is not known ({_reason(error)})",
                                 advice="Is the address right?") from None
        if hub or self._trusts(host, port):
            return found
        allowed = [row for row in found if is_for_everybody(str(row[4][0]))]
        if not allowed:
            raise AddressRefused(host=host if port in _PORTS.values() else f"{host}:{port}",
                                 why="its address is a private, local or reserved one")
        return allowed


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _PORTS[parts.scheme]


def _length(method: str, body: bytes) -> dict[str, str]:
    return {"content-length": str(len(body))} if body or method in ("PUT", "POST") else {}


def _read(answer: http.client.HTTPResponse, method: str, limit_bytes: int, what: str) -> bytes:
    if method == "HEAD":
        return b""
    data = bytearray()
    while piece := answer.read(min(_READ_BYTES, limit_bytes + 1 - len(data))):
        data += piece
        if len(data) > limit_bytes:
            raise TooLarge(what=f"{what}'s answer", size=f"more than {limit_bytes}", limit=limit_bytes,
                           setting="what is read of such an answer")
    if answer.length:  # it was to be longer
        raise OSError("the answer broke off")
    return bytes(data)


def _end(sock: socket.socket) -> None:
    with suppress(OSError):
        # Past SSLSocket.shutdown, which would drop the TLS state under the thread that reads.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    return shown(str(getattr(error, "strerror", None) or error).encode()) or type(error).__name__
