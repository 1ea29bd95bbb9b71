"""Waiting until a socket can be read or written: in a thread, and on an event loop."""

from __future__ import annotations

import asyncio
import select
import socket

__all__ = ["poll", "readable"]


def poll(sock: socket.socket, events: int, timeout_seconds: float) -> int:
    """Wait for ``events`` on the socket; returns those that came, 0 when none did in time."""
    poller = select.poll()
    poller.register(sock, events)
    found = poller.poll(timeout_seconds * 1000)
    return found[0][1] if found else 0


async def readable(sock: socket.socket, timeout_seconds: float) -> None:
    """Wait until something can be read, be it the end. :raises TimeoutError: nothing in time."""
    loop = asyncio.get_running_loop()
    waiting: asyncio.Future[bool] = loop.create_future()
    descriptor = sock.fileno()
    loop.add_reader(descriptor, _wake, waiting, True)
    alarm = loop.call_later(timeout_seconds, _wake, waiting, False)
    try:
        if not await waiting:
            raise TimeoutError
    finally:
        alarm.cancel()
        loop.remove_reader(descriptor)


def _wake(waiting: asyncio.Future[bool], came: bool) -> None:
    if not waiting.done():
        waiting.set_result(came)
