"""A node for the time of one program: its key is in memory only, and it ends with the program that started it.

That program hands over an ``Order`` and keeps a pipe open. When the pipe closes, for whatever reason (a kill -9 too),
the node ends: it leaves the channel if its identity was made for this once, and removes its directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ..config import Settings, load_settings
from ..errors import KacheryError, NodeError
from ..net.loop import run_on_loop
from . import membership
from .node import Node
from .running import stop_at_signals

__all__ = ["Order", "run_ephemeral"]

log = logging.getLogger("kachery_fast.node")

_CONNECT_SECONDS = 60.0
_POLL_SECONDS = 0.02
_PARENT_POLL_SECONDS = 1.0


class Order(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    """What node is wanted. ``client/ephemeral.py`` writes it, as a line of JSON.

    ``directory``: its own, made for it and removed at the end. ``seed``: its key, 64 hex digits. ``stays``: whether it
    remains a member of its channels. ``link``: an invitation to use. ``hub``: one that knows the key already.
    ``channel``: the one to wait for; empty: all.
    """

    directory: str
    seed: str
    stays: bool
    link: str = ""
    hub: str = ""
    label: str = ""
    channel: str = ""

    def __repr__(self) -> str:
        return f"Order({self.directory!r})"  # the seed is nobody's business


def run_ephemeral(order: Order, descriptor: int, say: Callable[[str, dict[str, Any]], None]) -> None:
    """Run the node until the pipe closes, on SIGINT, SIGTERM, or a client's stop.

    :param descriptor: the reading end of a pipe, whose other end the starting program holds.
    :param say: called with "ready" once the node is connected (``nodeId``, ``port``, ``storageDir``, ``channels``), and
        with "stillMember" where it could not leave its channel at the end (``nodeId``, ``channel``, ``hub``, ``why``).
    :raises KacheryError: it could not start, join or connect; everything is removed by then.
    """
    try:
        settings = load_settings(storage_dir=Path(order.directory) / "storage", node_host="127.0.0.1", node_port=0,
                                 node_private_key=order.seed)
        run_on_loop(_serve(order, settings, descriptor, say))
    finally:
        shutil.rmtree(order.directory, ignore_errors=True)


async def _serve(order: Order, settings: Settings, descriptor: int,
                 say: Callable[[str, dict[str, Any]], None]) -> None:
    loop = asyncio.get_running_loop()
    node = Node(settings)
    stop_at_signals(node)
    joined: dict[str, Any] = {}
    with _ending_with_parent(node, descriptor):
        try:
            if order.link:
                join = partial(membership.join, settings, order.link, label=order.label or None)
                joined = await loop.run_in_executor(None, join)
            if order.hub:
                await loop.run_in_executor(
                    None, partial(membership.use_hub, settings, order.hub, label=order.label or None))
            await node.start()
            if order.link or order.hub:
                await _connect(node, order.channel)
            if not node.stopped.is_set():
                say("ready", {"nodeId": node.identity.node_id, "port": node.port,
                              "storageDir": str(settings.storage_dir),
                              "channels": sorted({link.name for link in node.links()})})
            await node.stopped.wait()
        finally:
            await node.stop()
            if joined and not order.stays:
                why = await loop.run_in_executor(None, _leave, settings, joined["channel"])
                if why:
                    with contextlib.suppress(OSError):  # who started it may be gone
                        say("stillMember", {"nodeId": node.identity.node_id, "channel": joined["channel"],
                                            "hub": joined["hub"], "why": why})


@contextlib.contextmanager
def _ending_with_parent(node: Node, descriptor: int) -> Iterator[None]:
    """Within this, the node stops when the pipe closes, or when who started it is gone but a child of his holds it."""
    loop = asyncio.get_running_loop()
    parent = os.getppid()

    def heard() -> None:
        if not os.read(descriptor, 4096):
            loop.remove_reader(descriptor)
            node.stopped.set()

    async def watch() -> None:
        while True:
            await asyncio.sleep(_PARENT_POLL_SECONDS)
            if os.getppid() != parent:
                node.stopped.set()

    loop.add_reader(descriptor, heard)
    watching = loop.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        loop.remove_reader(descriptor)


async def _connect(node: Node, channel: str) -> None:
    """Wait until the node is connected to its channel, or to all, or is told to stop.

    :raises NodeError: it is on none, or was not connected in time. :raises ChannelUnknown: it is not on this one.
    """
    await node.reload()
    if channel:
        node.link_for("the channel", channel)
    loop = asyncio.get_running_loop()
    end = loop.time() + _CONNECT_SECONDS
    while not node.stopped.is_set():
        links = [link for link in node.links() if channel in ("", link.name)]
        if not links:
            raise NodeError(what="it is on no channel of its hub. Use an invitation (--join), or ask the channel's "
                                 f"owner to make the node {node.identity.node_id} a member.")
        if all(link.connected for link in links):
            return
        if loop.time() > end:
            why = "; ".join(f"{link.name}: {link.why}" for link in links if not link.connected)
            raise NodeError(what=f"it was not connected after {_CONNECT_SECONDS:g} s ({why}).")
        await asyncio.sleep(_POLL_SECONDS)


def _leave(settings: Settings, channel: str) -> str:
    """Take the node off the channel, and return why it could not be, empty if it was.

    A hub that is away is not waited for as long as it is otherwise.
    """
    hasty = dataclasses.replace(settings, retry_attempts_max=2, connect_timeout_seconds=3.0, stall_seconds=5.0)
    try:
        membership.leave(hasty, channel)
    except KacheryError as error:
        log.warning("the node is gone but still a member of the channel %s: %s", channel, error)
        return error.message
    return ""
