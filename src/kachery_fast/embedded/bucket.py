"""The embedded bucket: an object server with Google Cloud Storage's semantics over a directory.

Reads are public, or let in by a gate (``bucket_reads``); an object is created once, by a PUT to a signed URL that binds
its name, its exact size, create-only (or, for the two kinds of object that may be, replacing) and a short life. One
thread serves one connection; bytes go by ``sendfile`` and ``splice``, past Python.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from ..config import Settings
from ..errors import InvalidArgument, InvalidName, UploadRefused, UrlExpired
from .bucket_files import ObjectFiles
from .bucket_http import ConnectionLimits, Observer, PutLeave, RateLimit, RequestHandler, refuse_busy
from .bucket_names import is_object_name, is_replaceable
from .bucket_reads import ReadGate
from .bucket_stock import StoredObject, Total

__all__ = ["BucketServer", "SignedPut", "UploadSigner"]

_log = logging.getLogger("kachery_fast.embedded")

_IDLE_SECONDS = 15.0
_QUERY = ("X-Kachery-Expires", "X-Kachery-Size", "X-Kachery-Signature")
_NODE = "X-Kachery-Node"
_NUMBER = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)
_REFUSING_THREADS = 2
_REFUSALS_MAX = 64


class SignedPut(NamedTuple):
    """A signed upload: PUT to ``url`` with all of ``headers``."""

    url: str
    headers: dict[str, str]


class UploadSigner:
    """Signs and verifies upload URLs by HMAC-SHA256 over method, object name, size, expiry, create-only or replace, and
    the node that it is for.

    :param secret: at least 16 bytes, known to the hub alone. :param clock: the time in seconds since 1970.
    """

    def __init__(self, secret: bytes, *, clock: Callable[[], float] = time.time) -> None:
        if len(secret) < 16:
            raise InvalidArgument(what="The bucket's signing secret must have at least 16 bytes.")
        self._secret = secret
        self._clock = clock

    def sign(self, object_name: str, size_bytes: int, life_seconds: float, base_url: str, *,
             replace: bool = False, node_id: str = "") -> SignedPut:
        """Sign the upload of one object of exactly ``size_bytes``, valid for ``life_seconds``.

        :param base_url: where the bucket's objects are, e.g. ``http://hub:20440/bucket``.
        :param replace: it takes the place of what is there, any number of times; else it is created once.
        :param node_id: who is to upload it, so that it can be counted as theirs.
        :raises InvalidName: not an object's name, or, with ``replace``, not of a kind that may be replaced.
        """
        if not is_object_name(object_name):
            raise InvalidName(name=object_name, kind="object", why="it is not <channel>/(sha1|feeds|task_results)/...")
        if replace and not is_replaceable(object_name):
            raise InvalidName(name=object_name, kind="object", why="objects of its kind are never replaced")
        expires = str(int(self._clock() + life_seconds))
        size = str(size_bytes)
        values = (expires, size, self._signature(object_name, size, expires, node_id, replace=replace))
        query = "&".join(f"{name}={value}" for name, value in zip(_QUERY, values, strict=True))
        if node_id:
            query += f"&{_NODE}={node_id}"
        headers = {} if replace else {"x-goog-if-generation-match": "0"}
        return SignedPut(f"{base_url.rstrip('/')}/{object_name}?{query}",
                         {**headers, "x-goog-content-length-range": f"{size},{size}"})

    def verify(self, object_name: str, query: str) -> PutLeave:
        """Check the query of a PUT; returns what was signed.

        :raises UploadRefused: not signed here for this object. :raises UrlExpired: it was, but its life is over.
        """
        values = dict(parse_qsl(query, keep_blank_values=True))
        expires, size, signature = (values.get(name, "") for name in _QUERY)
        node_id = values.get(_NODE, "")
        count = len(_QUERY) + (_NODE in values)
        well_formed = (query.count("=") == count == len(values) and _NUMBER.fullmatch(expires)
                       and _NUMBER.fullmatch(size) and signature.isascii() and node_id.isascii())
        replace = False
        signed = bool(well_formed) and hmac.compare_digest(
            signature, self._signature(object_name, size, expires, node_id))
        if well_formed and not signed:
            replace = signed = hmac.compare_digest(
                signature, self._signature(object_name, size, expires, node_id, replace=True))
        if not signed:
            raise UploadRefused(action="the upload", object=object_name, status=403,
                                why="the URL is not signed for this object, size and time")
        if self._clock() >= int(expires):
            raise UrlExpired(object=object_name, why=f"it expired at {expires}")
        return PutLeave(int(size), replace, node_id)

    def _signature(self, object_name: str, size: str, expires: str, node_id: str, *, replace: bool = False) -> str:
        text = "\n".join(("PUT", object_name, size, expires, "replace" if replace else "create-only", node_id))
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


class BucketServer:
    """Serves the objects below ``root`` on sockets that somebody else accepts (``net.port``).

    :param prefix: where objects begin in a URL's path. :param gate: lets reads in; None: all of them.
    :param rate_limit_bytes_per_second: holds all uploads together, and all downloads together, to this rate.
    :param fsync, shared, clock: see ``ObjectFiles``. :param observer: is told what moves.
    :param recount_seconds: how often to count anew what is there, as others may change it too; None: once is enough.
    :raises DiskError: ``root`` is not usable.
    """

    def __init__(self, root: Path, signer: UploadSigner, settings: Settings, *, prefix: str = "/bucket/",
                 gate: ReadGate | None = None, rate_limit_bytes_per_second: int | None = None,
                 fsync: bool = False, shared: bool = False, clock: Callable[[], float] = time.time,
                 observer: Observer | None = None, recount_seconds: float | None = None) -> None:
        self.prefix = prefix
        self._files = ObjectFiles(root, fsync=fsync, shared=shared, clock=clock)
        self._observer = observer
        self._signer = signer
        self._check_read = None if gate is None else gate.check
        self._limits = ConnectionLimits(_IDLE_SECONDS, settings.stall_seconds)
        rate = rate_limit_bytes_per_second
        self._upload_rate, self._download_rate = (RateLimit(rate) if rate else None for _ in range(2))
        self._connections_max = settings.bucket_connections_max
        self._threads = ThreadPoolExecutor(self._connections_max, thread_name_prefix="kachery-bucket")
        self._refusing = ThreadPoolExecutor(_REFUSING_THREADS, thread_name_prefix="kachery-bucket-busy")
        self._lock = threading.Lock()
        self._served: dict[socket.socket, RequestHandler] = {}
        self._refused: set[socket.socket] = set()
        self._closed = False
        self._closing = threading.Event()
        self._counter = threading.Thread(target=self._count, args=(recount_seconds,), name="kachery-bucket-counter")
        self._counter.start()

    @property
    def prefixes(self) -> tuple[bytes, ...]:
        """How the targets of requests for objects begin."""
        return (self.prefix.encode("ascii"),)

    def serve(self, sock: socket.socket) -> None:
        """Take over an accepted socket of which nothing was read yet; returns at once, a thread does the rest.

        At ``bucket_connections_max`` connections the one that has been idle longest makes room (HTTP allows a server
        to close a connection between requests at any time). Where none is idle, an address that holds more than half
        makes room for another one; else the answer is 503 with Retry-After.
        """
        with self._lock:
            if self._closed or len(self._refused) >= _REFUSALS_MAX:
                sock.close()
            elif len(self._served) < self._connections_max or self._drop_idle() or self._drop_for(_address(sock)):
                handler = RequestHandler(sock, self._files, self._signer.verify, prefix=self.prefix,
                                         limits=self._limits, upload_rate=self._upload_rate,
                                         download_rate=self._download_rate, observer=self._observer,
                                         check_read=self._check_read)
                self._served[sock] = handler
                self._threads.submit(self._run, sock, handler.run)
            else:
                self._refused.add(sock)
                self._refusing.submit(self._run, sock, lambda: refuse_busy(sock))

    def close(self) -> None:
        """Break off every connection and wait for the threads."""
        self._closing.set()
        with self._lock:
            self._closed = True
            for sock in (*self._served, *self._refused):
                _shut(sock)
        self._threads.shutdown()
        self._refusing.shutdown()
        self._counter.join()

    def size(self, name: str) -> int:
        """Return an object's size in bytes. :raises ObjectMissing: :raises InvalidName: :raises DiskError:"""
        return self._files.size(name)

    def sha1(self, name: str) -> str:
        """Return the SHA-1 of an object's bytes in hex; reads it all. Raises as ``size`` does."""
        return self._files.sha1(name)

    def read(self, name: str, limit_bytes: int) -> tuple[bytes, str]:
        """Return an object's bytes and etag. :raises TooLarge: it is longer than that; else as ``size`` does."""
        return self._files.read(name, limit_bytes)

    def write(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Make an object; False when there was one already.

        :raises InvalidName: :raises DiskFull: :raises DiskError:
        """
        return self._files.write(name, data, replace=replace)

    def remove(self, name: str, *, etag: str | None = None) -> None:
        """Remove an object, or only the one that has this etag. Raises as ``size`` does."""
        self._files.remove(name, etag=etag)

    def expire(self, name: str, unread_since: float) -> bool:
        """Remove an object that was last read before then (seconds since the epoch) and is not being read; whether it
        was. :raises InvalidName: :raises DiskError:"""
        return self._files.expire(name, unread_since)

    def objects(self, prefix: str = "", after: str = "") -> Iterator[StoredObject]:
        """Yield the objects whose names begin with ``prefix`` and come after ``after``, in the order of names."""
        return self._files.objects(prefix, after)

    def totals(self, channel: str) -> dict[str, Total]:
        """Return how much there is of each kind of a channel's objects; as much as was counted, until ``counted``."""
        return self._files.stock.totals(channel)

    @property
    def counted(self) -> bool:
        """Whether what an earlier run left has been counted."""
        return self._files.stock.counted

    def _count(self, again_seconds: float | None) -> None:
        try:
            self._files.stock.count(self._closing)
            while again_seconds is not None and not self._closing.wait(again_seconds):
                self._files.stock.count(self._closing)
        except Exception:
            _log.exception("the objects of the bucket could not be counted")

    def _drop_idle(self) -> bool:
        """Close the connection that has been idle longest; its thread takes the next one. Call with the lock held."""
        idle = [(handler.idle_since, sock) for sock, handler in self._served.items() if handler.idle_since is not None]
        if not idle:
            return False
        _, sock = min(idle, key=lambda pair: pair[0])
        del self._served[sock]
        _shut(sock)
        return True

    def _drop_for(self, newcomer: str) -> bool:
        """Break off the oldest connection of another address that holds more than half of all; whether there was one.
        Call with the lock held."""
        addresses = {sock: _address(sock) for sock in self._served}
        most, count = Counter(addresses.values()).most_common(1)[0]
        if most == newcomer or 2 * count <= self._connections_max:
            return False
        oldest = next(sock for sock, address in addresses.items() if address == most)
        del self._served[oldest]
        _shut(oldest)
        return True

    def _run(self, sock: socket.socket, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            _log.info("a bucket connection broke off: %s", error)
        except Exception:
            _log.exception("a bucket connection failed")
        finally:
            with self._lock:
                self._served.pop(sock, None)
                self._refused.discard(sock)
                sock.close()


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _address(sock: socket.socket) -> str:
    try:
        return str(sock.getpeername()[0])
    except OSError:  # it has gone
        return ""
