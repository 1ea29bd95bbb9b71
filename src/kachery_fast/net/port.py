"""One port for two servers: what moves gigabytes goes to threads, all other requests to the web application's loop.

A connection goes to the one or the other by its first request, and stays there.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ..errors import InvalidArgument

__all__ = ["Port", "ThreadServer", "serve_port"]

_log = logging.getLogger("kachery_fast.net")

_METHOD_SIZE_MAX = 16
_ACCEPT_PAUSE_SECONDS = 0.1


class ThreadServer(Protocol):
    """Who serves some of the connections in threads of its own.

    ``prefixes``: how the target of a first request that is for it begins; the space after a target counts.
    """

    @property
    def prefixes(self) -> tuple[bytes, ...]:
        """See the class."""

    def serve(self, sock: socket.socket) -> None:
        """Take over an accepted socket of which nothing was read yet, and return at once."""


class Port:
    """A listening port; ``port`` is its number."""

    def __init__(self, listener: socket.socket, app_factory: Callable[[], asyncio.BaseProtocol],
                 server: ThreadServer, first_bytes_seconds: float) -> None:
        self._listener = listener
        self._first_bytes_seconds = first_bytes_seconds
        self._app_factory = app_factory
        self._server = server
        self._look_bytes = _METHOD_SIZE_MAX + 1 + max(map(len, server.prefixes))
        self._sorting: set[asyncio.Task[None]] = set()
        self.port: int = listener.getsockname()[1]
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def close(self) -> None:
        """Stop listening. Connections that were handed over live on: they are the application's and the server's."""
        tasks = [self._accepting, *self._sorting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _address = await loop.sock_accept(self._listener)
            except OSError as error:  # e.g. out of file descriptors: others must close some first
                _log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            task = loop.create_task(self._sort(sock))
            self._sorting.add(task)
            task.add_done_callback(functools.partial(self._sorted, sock))

    def _sorted(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._sorting.discard(task)
        if task.cancelled():
            sock.close()  # a task cancelled before its first step could not

    async def _sort(self, sock: socket.socket) -> None:
        try:
            for_threads = await asyncio.wait_for(self._is_for_threads(sock), self._first_bytes_seconds)
            if for_threads:
                self._server.serve(sock)
            else:
                await asyncio.get_running_loop().connect_accepted_socket(self._app_factory, sock)
        except (OSError, asyncio.TimeoutError):
            sock.close()
        except Exception:
            _log.exception("a connection could not be handed over")
            sock.close()

    async def _is_for_threads(self, sock: socket.socket) -> bool:
        """Look at the first bytes without taking them. :raises ConnectionError: the client closed."""
        while True:
            await _readable(sock)
            seen = sock.recv(self._look_bytes, socket.MSG_PEEK)
            if not seen:
                raise ConnectionResetError
            decided = _begins_with(seen, self._server.prefixes)
            if decided is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
                return decided
            # What was peeked stays readable; ask to be woken by more than that only.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(seen) + 1)


async def serve_port(host: str, port: int, app_factory: Callable[[], asyncio.BaseProtocol],
                     server: ThreadServer, *, first_bytes_seconds: float = 10.0) -> Port:
    """Listen, and hand each connection over by its first request's path.

    :param port: 0: the system picks one. :param app_factory: makes a protocol of the web application, e.g. aiohttp's
        ``AppRunner.server``.
    :param first_bytes_seconds: a connection that has not said by then what it wants is closed.
    :raises InvalidArgument: the address cannot be listened on.
    """
    try:
        info = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                            flags=socket.AI_PASSIVE)
        listener = socket.create_server(info[0][4][:2], family=info[0][0], backlog=512)
    except OSError as error:
        raise InvalidArgument(what=f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    listener.setblocking(False)
    return Port(listener, app_factory, server, first_bytes_seconds)


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock.fileno(), wake)
    try:
        await ready
    finally:
        with suppress(OSError, ValueError):
            loop.remove_reader(sock.fileno())


def _begins_with(seen: bytes, prefixes: tuple[bytes, ...]) -> bool | None:
    """Whether a request line's target begins with one of ``prefixes``; None: too few bytes to tell."""
    method, space, target = seen.partition(b" ")
    if not space:
        return None if len(method) < _METHOD_SIZE_MAX and method.isalpha() else False
    if target.startswith(prefixes):
        return True
    return None if any(prefix.startswith(target) for prefix in prefixes) else False
