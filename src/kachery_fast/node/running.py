"""A node in the foreground of a process, until a signal or a client ends it."""

from __future__ import annotations

import asyncio
import logging
import signal

from ..config import Settings
from ..net.loop import run_on_loop
from .node import Node

__all__ = ["run_node", "stop_at_signals"]

log = logging.getLogger("kachery_fast.node")


def run_node(settings: Settings) -> None:
    """Run a node in the foreground until SIGINT, SIGTERM, or a client's stop; on uvloop where that exists.

    :raises KacheryError: the storage directory or the port cannot be used.
    """
    async def main() -> None:
        node = Node(settings)
        stop_at_signals(node)
        try:
            await node.start()
            log.info("node %s on http://%s:%d", node.identity.node_id, settings.node_host, node.port)
            await node.stopped.wait()
        finally:
            await node.stop()

    run_on_loop(main())


def stop_at_signals(node: Node) -> None:
    """Have SIGINT and SIGTERM stop a node of the running loop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, node.stopped.set)
