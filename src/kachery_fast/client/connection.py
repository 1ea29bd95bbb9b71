"""The way to the node of this machine: its local HTTP API on loopback.

Each request carries a client code (``access``), read afresh, and once more when it is refused. What is large or lasts
has a connection of its own, and closing it is how a request is withdrawn; small calls share kept ones (``keeping``).
"""

from __future__ import annotations

import http.client
import json
import logging
import select
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from ..config import Settings
from ..errors import ClientAuthRefused, KacheryError, NodeError, NodeNotRunning
from .access import ClientCode, check_online
from .answer import ANSWER_SIZE_BYTES_MAX, Answer, error_of, node_errors, object_of
from .keeping import KeptConnections, NoAnswer, NotHttp, Reply, Withdrawal, watch_other_side
from .progress import ProgressCallback

__all__ = ["NodeConnection"]

AUTH_HEADER = "KACHERY-CLIENT-AUTH-CODE"
_JSON = "application/json"

logger = logging.getLogger("kachery_fast.client")


class NodeConnection:
    """Requests to the node whose address and storage directory are in ``settings``.

    Every method raises NodeNotRunning when nothing answers, ClientAuthRefused when the code cannot be read or is
    refused, NodeError when the answer makes no sense, and whatever error of the project the node reports.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        host = f"[{settings.node_host}]" if ":" in settings.node_host else settings.node_host  # RFC 3986, 3.2.2
        self.url = f"http://{host}:{settings.node_port}"
        self._client_code = ClientCode(settings, self.probe)
        self._code = ""  # as it was last read, for the kept connections
        self._kept = KeptConnections(partial(_connected, settings, self.url), f"{host}:{settings.node_port}")

    # --- the node itself

    def probe(self) -> dict[str, Any]:
        """Return what any client may know: ``daemonVersion``, ``nodeId`` and ``kacheryStorageDir``."""
        with self._request("GET", "/probe", auth=False, timeout=self._settings.connect_timeout_seconds) as answer:
            return answer.json()

    def is_running(self) -> bool:
        """Whether a node answers at the address."""
        try:
            self.probe()
        except KacheryError:
            return False
        return True

    def info(self) -> dict[str, Any]:
        """Return the node's state: identity, hubs, channels and running transfers."""
        with self._request("GET", "/api/info", timeout=self._settings.stall_seconds) as answer:
            return answer.json()

    def reload(self) -> None:
        """Have the node read its configuration anew."""
        self._post("/api/reload", {})

    def stop(self) -> None:
        """Have the node end."""
        self._post("/api/stop", {})

    # --- files

    def load(self, uri: str, channel: str | None, progress: ProgressCallback | None = None) -> dict[str, Any]:
        """Have the node bring a file into its store; return ``path``, ``size``, ``sha1``, ``source`` and ``seconds``.

        Leaving this method early, on Ctrl-C for example, closes the connection, which withdraws the request.

        :param channel: None: the node's KACHERY_CHANNEL; empty: none, only what the node has.
        :param progress: called about four times a second.
        :raises Stalled: the node fell silent for ``stall_seconds``.
        """
        body = {"uri": uri, "channel": channel}
        with self._request("POST", "/api/load", body, timeout=self._settings.stall_seconds) as answer:
            return answer.result(f"the load of {uri}", progress)

    def upload(self, uri: str, channel: str, progress: ProgressCallback | None = None) -> str:
        """Have the node upload a file of its store to a channel's bucket; return the URI by which the bucket has it.

        Leaving this method early withdraws the request.

        :param progress: called about four times a second.
        :raises NotInStore: the node has not got the file. :raises Stalled: it fell silent for ``stall_seconds``.
        """
        body = {"uri": uri, "channel": channel}
        with self._request("POST", "/api/upload", body, timeout=self._settings.stall_seconds) as answer:
            return str(answer.result(f"the upload of {uri}", progress)["uri"])

    @contextmanager
    def read(self, uri: str, channel: str | None, start: int, end: int | None) -> Iterator[Answer]:
        """Open bytes ``start`` to ``end`` (exclusive; None: to the end) of a file, fetched by the node as needed.

        A chunk may have to be uploaded elsewhere before a byte comes. The node has its own watchdogs for that; until
        the head of the answer is there, it may take any time while the node lives.

        :raises Stalled: the node does not live, or was silent for longer than it lets any provider be.
        """
        body = {"uri": uri, "channel": channel, "start": start, "end": end}
        limit = self._settings.provider_stall_seconds + self._settings.stall_seconds
        with self._request("POST", "/api/read", body, timeout=limit, patient=True) as answer:
            try:
                yield answer
            except NodeError as error:
                found = self._read_error(answer.read_name)
                if found is None:
                    raise
                raise found from error

    def _read_error(self, name: str) -> KacheryError | None:
        """Return why a read broke off in mid-body, where HTTP has no place for an error; None when it is not known."""
        if not (name.isascii() and name.isalnum()):
            return None
        try:
            with self._request("GET", f"/api/read-error/{name}", timeout=self._settings.stall_seconds) as answer:
                found = answer.json()
        except KacheryError as error:
            logger.debug("the reason of a broken read could not be asked for: %s", error)
            return None
        return KacheryError.from_dict(found) if "error" in found else None

    def why(self, uri: str, channel: str | None) -> dict[str, Any]:
        """Return where a file is or why it cannot be had, without loading it."""
        return self._post("/api/why", {"uri": uri, "channel": channel})

    def store(self, make_body: Callable[[], Iterable[Any]], size_bytes: int) -> dict[str, Any]:
        """Send bytes to the node's store; return ``sha1``, ``size`` and ``manifestSha1``.

        :param make_body: returns the body's buffers, ``size_bytes`` in all; called again for a second attempt.
        """
        with self._request("POST", "/api/store", make_body, size_bytes=size_bytes,
                           timeout=self._settings.stall_seconds) as answer:
            return answer.json()

    # --- calls by path, of the modules that know what is said there

    def call(self, path: str, body: dict[str, Any] | bytes, timeout_seconds: float | None = None, *,
             withdrawal: Withdrawal | None = None) -> dict[str, Any]:
        """Return the answer to ``body``, posted to ``path`` over a kept connection. It is sent once, and again only
        when the node refused the client code, so it is never done twice.

        :param body: a JSON object, or its text.
        :param timeout_seconds: how long a silence may last; without it twice the stall limit.
        :param withdrawal: lets another thread take the call back.
        """
        timeout = 2 * self._settings.stall_seconds if timeout_seconds is None else timeout_seconds
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with node_errors(self.url, timeout):
            reply = self._exchange_kept(path, data, timeout, withdrawal)
            if reply.status == 403 and isinstance(error := error_of(reply.status, reply.body), ClientAuthRefused):
                logger.debug("the node refused the code (%s); reading it again", error)
                self._code = ""
                reply = self._exchange_kept(path, data, timeout, withdrawal)
            if reply.status != 200:
                raise error_of(reply.status, reply.body)
            return object_of(reply.body, _read_quickly)

    def _exchange_kept(self, path: str, data: bytes, timeout: float, withdrawal: Withdrawal | None) -> Reply:
        try:
            self._code = self._code or self._client_code.read()
        except ClientAuthRefused:
            self.probe()  # that no node runs is the better reason
            self._code = self._client_code.read()  # a node that began in this moment had written it before it listened
        try:
            return self._kept.exchange(path, self._code, data, timeout_seconds=timeout,
                                       answer_size_bytes_max=ANSWER_SIZE_BYTES_MAX, withdrawal=withdrawal)
        except NoAnswer as error:
            raise NodeNotRunning(url=self.url, why=str(error)) from error
        except NotHttp as error:
            raise NodeError(what=str(error)) from error

    @contextmanager
    def stream(self, path: str, body: dict[str, Any], timeout_seconds: float, *,
               withdrawal: Withdrawal | None = None) -> Iterator[Answer]:
        """Post ``body`` to ``path`` and yield the answer while it comes in; leaving closes the connection.

        :param withdrawal: lets another thread break it off.
        """
        with self._request("POST", path, body, timeout=timeout_seconds, withdrawal=withdrawal) as answer:
            yield answer

    # --- one request

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        # The node answers these within its own waits for offers; twice the stall limit is ample.
        with self._request("POST", path, body, timeout=2 * self._settings.stall_seconds) as answer:
            return answer.json()

    @contextmanager
    def _request(self, method: str, path: str, body: Any = None, *, timeout: float, auth: bool = True,
                 size_bytes: int = 0, patient: bool = False,
                 withdrawal: Withdrawal | None = None) -> Iterator[Answer]:
        with closing(self._connect(timeout)) as connection:
            if withdrawal is not None:
                withdrawal.watch(connection.sock)
            answer = self._exchange(connection, method, path, body, auth, size_bytes, patient)
            if answer.status == 403 and auth:
                error = answer.error()
                if not isinstance(error, ClientAuthRefused):
                    raise error
                logger.debug("the node refused the code; reading it again")
                connection.close()
                with _connect_errors(self.url):
                    connection.connect()
                watch_other_side(connection.sock, self._settings.stall_seconds)
                if withdrawal is not None:
                    withdrawal.watch(connection.sock)
                answer = self._exchange(connection, method, path, body, auth, size_bytes, patient)
            try:
                if answer.status != 200:
                    raise answer.error()
                yield answer
            finally:
                answer.close()  # which holds the socket of an answer that ends with its connection

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        settings = self._settings
        check_online(settings, "This call")
        with _connect_errors(self.url):
            connection = http.client.HTTPConnection(settings.node_host, settings.node_port,
                                                    timeout=settings.connect_timeout_seconds, blocksize=1 << 20)
            connection.connect()
        watch_other_side(connection.sock, self._settings.stall_seconds)
        connection.sock.settimeout(timeout)
        connection.timeout = timeout  # for the second connection, after a refused code
        return connection

    def _exchange(self, connection: http.client.HTTPConnection, method: str, path: str, body: Any, auth: bool,
                  size_bytes: int, patient: bool) -> Answer:
        headers = {}
        if auth:
            headers[AUTH_HEADER] = self._client_code.read()
        data: Any = None
        if callable(body):
            data = body()
            headers["Content-Length"] = str(size_bytes)
            headers["Content-Type"] = "application/octet-stream"
        elif body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = _JSON
        seconds = float(connection.timeout or self._settings.stall_seconds)
        with node_errors(self.url, seconds):
            try:
                connection.request(method, path, data, headers)
            except (BrokenPipeError, ConnectionResetError):
                # A node that refuses a body answers before it has read all of it: look for that answer.
                logger.debug("the node stopped reading a body")
            if patient:
                self._wait_for_answer(connection.sock)
            try:
                response = connection.getresponse()
            except ConnectionResetError as error:
                raise NodeNotRunning(url=self.url, why="it closed the connection without an answer") from error
            return Answer(response, self.url, seconds)

    def _wait_for_answer(self, sock: socket.socket) -> None:
        """Wait until an answer begins, while the node answers others. :raises NodeNotRunning, Stalled: it does not."""
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        while not poller.poll(min(self._settings.stall_seconds * 1000, 2**31 - 1)):
            self.probe()


def _connected(settings: Settings, url: str) -> socket.socket:
    """Return a new connection for small requests, which must not wait for each other in the socket's buffer."""
    check_online(settings, "This call")
    with _connect_errors(url):
        connection = socket.create_connection((settings.node_host, settings.node_port),
                                              settings.connect_timeout_seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _read_quickly(data: bytes) -> Any:
    """Read JSON as ``json.loads`` does, in a tenth of the time where msgspec can: not a NaN, say, or half a surrogate.
    """
    import msgspec  # takes 10 ms, which who does not call by path is spared

    try:
        return msgspec.json.decode(data)
    except msgspec.MsgspecError:
        return json.loads(data)


@contextmanager
def _connect_errors(url: str) -> Iterator[None]:
    """Translate what making a connection raises."""
    try:
        yield
    except (http.client.InvalidURL, UnicodeError) as error:
        raise NodeNotRunning(url=url, why="KACHERY_DAEMON_HOST is not the name of a host") from error
    except OSError as error:
        raise NodeNotRunning(url=url, why=error.strerror or str(error) or "no answer") from error
