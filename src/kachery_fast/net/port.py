"""One port for two servers: what moves gigabytes goes to threads, all other requests to the web application's loop.

A connection goes to the one or the other by its first request, and stays there.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from ..errors import InvalidArgument
from .visitors import LOOK_SECONDS, Patience, Visitor, Visitors, Watched

__all__ = ["HEAD_SIZE_BYTES_MAX", "Port", "ThreadServer", "serve_port"]

# The longest head of a request that threads serve.
HEAD_SIZE_BYTES_MAX = 16384

_log = logging.getLogger("kachery_fast.net")

_METHOD_SIZE_MAX = 16
_HEAD_END = b"\r\n\r\n"
# Who is not accepted by then is not heard, and asks again after a second, three, seven. Linux takes 4,096 at most.
_BACKLOG = 4096
_ACCEPTED_AT_ONCE_MAX = 32
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
    """A listening port, on one address or several; ``port`` is its number.

    :param listeners: sockets that listen on the same port.
    """

    def __init__(self, listeners: Sequence[socket.socket], app_factory: Callable[[], asyncio.BaseProtocol],
                 server: ThreadServer, visitors: Visitors, *, watched: bool) -> None:
        self._listeners = listeners
        self._visitors = visitors
        self._watched = watched
        self._app_factory = app_factory
        self._server = server
        self._sorting: set[asyncio.Task[None]] = set()
        self.port: int = listeners[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        self._accepting = [loop.create_task(self._accept(listener)) for listener in listeners]
        self._looking = loop.create_task(self._look_for_ever())

    async def close(self) -> None:
        """Stop listening. Connections that were handed over live on: they are the application's and the server's."""
        tasks = [self._looking, *self._accepting, *self._sorting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await _readable(listener)
            try:
                # Several a turn: when thousands come back at once a turn takes long, and one a turn would be slow.
                for _ in range(_ACCEPTED_AT_ONCE_MAX):
                    sock, address = listener.accept()
                    sock.setblocking(False)
                    self._admit(sock, str(address[0]))
            except BlockingIOError:
                continue
            except OSError as error:  # e.g. out of file descriptors: others must close some first
                _log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)

    def _admit(self, sock: socket.socket, address: str) -> None:
        visitor = self._visitors.add(address, sock.close)
        if visitor is None:
            _log.warning("a connection of %s was refused: there are %d already", address, len(self._visitors))
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._sort(sock, visitor))
        visitor.cut = task.cancel
        self._sorting.add(task)
        task.add_done_callback(functools.partial(self._sorted, sock, visitor))

    def _sorted(self, sock: socket.socket, visitor: Visitor, task: asyncio.Task[None]) -> None:
        self._sorting.discard(task)
        if task.cancelled():
            self._visitors.remove(visitor)
            sock.close()  # a task cancelled before its first step could not

    async def _sort(self, sock: socket.socket, visitor: Visitor) -> None:
        try:
            for_threads = await asyncio.wait_for(self._look(sock), self._visitors.patience.head_seconds)
            if for_threads or not self._watched:
                self._visitors.remove(visitor)
            if for_threads:
                self._server.serve(sock)
            else:
                await asyncio.get_running_loop().connect_accepted_socket(lambda: self._protocol(visitor), sock)
        except (OSError, asyncio.TimeoutError):
            self._visitors.remove(visitor)
            sock.close()
        except Exception:
            _log.exception("a connection could not be handed over")
            self._visitors.remove(visitor)
            sock.close()

    def _protocol(self, visitor: Visitor) -> asyncio.BaseProtocol:
        made = self._app_factory()
        return Watched(made, visitor, self._visitors) if self._watched else made

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self._visitors.look()

    async def _look(self, sock: socket.socket) -> bool:
        """Look at the first request without taking it: whether it is for the threads.

        For these its head is waited for, so that no thread waits for who sends it slowly.

        :raises ConnectionError: the client closed.
        """
        known = 0
        try:
            seen = _peek(sock)  # mostly it is there already
        except BlockingIOError:
            await _readable(sock)
            seen = _peek(sock)
        while len(seen) > known:
            decided = _begins_with(seen, self._server.prefixes)
            if decided is False or (decided and (_HEAD_END in seen or len(seen) == HEAD_SIZE_BYTES_MAX)):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
                return decided
            # What was peeked stays readable; ask to be woken by more than that only.
            known = len(seen)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, known + 1)
            await _readable(sock)
            seen = _peek(sock)
        raise ConnectionResetError  # what made it readable is the end


async def serve_port(host: str, port: int, app_factory: Callable[[], asyncio.BaseProtocol],
                     server: ThreadServer, *, visitors: Visitors | None = None,
                     first_bytes_seconds: float = 10.0) -> Port:
    """Listen on every address of ``host``, and hand each connection over by its first request's path.

    :param port: 0: the system picks one. :param app_factory: makes a protocol of the web application, e.g. aiohttp's
        ``AppRunner.server``.
    :param visitors: watches over the application's connections, which tells it when it answers
        (``Visitors.answering``). None: nobody does.
    :param first_bytes_seconds: without ``visitors``: a connection that has not said by then what it wants is closed.
    :raises InvalidArgument: the address cannot be listened on.
    """
    listeners: list[socket.socket] = []
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                             flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            if listeners and port == 0:  # the others on the port that the first one was given
                address = (address[0], listeners[0].getsockname()[1], *address[2:])
            listeners.append(_listen(family, address))
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise InvalidArgument(what=f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    unwatched = Visitors(sys.maxsize, Patience(head_seconds=first_bytes_seconds))
    return Port(listeners, app_factory, server, unwatched if visitors is None else visitors,
                watched=visitors is not None)


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # the other family has its own
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _peek(sock: socket.socket) -> bytes:
    return sock.recv(HEAD_SIZE_BYTES_MAX, socket.MSG_PEEK)


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
