"""Commands on the node of this machine: info, and node start, info, join, leave, stop, run, key."""

from __future__ import annotations

import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..client.access import check_online
from ..client.connection import NodeConnection
from ..client.place import client_settings
from ..config import Settings, load_settings
from ..errors import AlreadyExists, InvalidArgument, KacheryError, NodeError
from .background import start_detached
from .node_approval import join_by_approval, joined_text
from .node_run import key, run
from .output import command_errors, emit, human_size, json_line, json_option
from .owner import split_list

__all__ = ["info", "node"]

# How long a node may take to end: it lets go of its transfers first.
_STOP_SECONDS = 30.0


@click.command(short_help="Show the local store, the node and its channels.")
@json_option
@command_errors
def info(as_json: bool) -> None:
    """Show the local store, whether it is the node's, the node and its channels."""
    from ..client import files as client

    found = client.info()
    emit(found, lambda: _info_text(found), as_json)


@click.group(short_help="Start, stop and connect the node of this machine.")
def node() -> None:
    """Start, stop and connect the node of this machine."""


node.add_command(run)
node.add_command(key)


@node.command(short_help="Start the node.")
@click.option("--detach", is_flag=True, help="Run in the background, the log in node.log of the storage directory.")
@click.option("--label", help="The node's name for people; remembered.")
@click.option("--verbose", "-v", is_flag=True, help="Log more.")
@json_option
@command_errors
def start(detach: bool, label: str | None, verbose: bool, as_json: bool) -> None:
    """Start the node. It stays in the foreground, until Ctrl-C or node stop, unless told to detach."""
    settings = load_settings()
    check_online(settings, "Running a node")
    connection = NodeConnection(settings)
    if connection.is_running():
        raise AlreadyExists(what=f"A node at {connection.url}",
                            advice="Stop it with: kachery-fast node stop, or set KACHERY_DAEMON_PORT to another port.")
    if label is not None:
        from ..node.membership import set_label

        set_label(settings.storage_dir, label)
    if not detach:
        from ..net.loop import imports_kept

        with imports_kept():
            from ..node.running import run_node

        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("kachery_fast").setLevel(logging.DEBUG if verbose else logging.INFO)
        run_node(settings)
        return
    log_path = settings.storage_dir / "node.log"
    argv = [sys.executable, "-m", "kachery_fast", "node", "start", *(["--verbose"] if verbose else [])]
    # It starts in another directory, where a relative path would be another one.
    environ = {**os.environ, "KACHERY_STORAGE_DIR": str(settings.storage_dir)}
    from ..store.takeover import PROGRESS_TEXT

    pid = start_detached(argv, log_path, connection.is_running, environ=environ, progress=PROGRESS_TEXT,
                         tell=partial(click.echo, err=True))
    found = {"pid": pid, "url": connection.url, "log": str(log_path), "nodeId": connection.probe().get("nodeId")}
    emit(found, f"The node runs at {connection.url}, process {pid}. Its log is {log_path}.", as_json)


@node.command("info", short_help="Show the node, its channels and its transfers.")
@json_option
@command_errors
def node_info(as_json: bool) -> None:
    """Show the node, its hubs and channels, and the transfers that run."""
    found = NodeConnection(client_settings()).info()
    emit(found, lambda: "\n".join(_node_lines(found)), as_json)


@node.command(short_help="Join a channel by a link from its owner, or a hub by a code that you enter there.")
@click.argument("link", metavar="LINK|HUB_URL")
@click.option("--label", help="The node's name for people; remembered.")
@click.option("--channel", metavar="NAME", help="With a hub's address: the channel to be let in to.")
@click.option("--permissions", metavar="LIST",
              help="What this node wants to do there, separated by commas; without it everything that is granted.")
@json_option
@command_errors
def join(link: str, label: str | None, channel: str | None, permissions: str | None, as_json: bool) -> None:
    """Join a channel by a link from its owner, or a hub by a code that you enter there.

    LINK is an invitation, and the node is on the channel at once. With the address of a hub, a code is shown; who
    enters it at the hub, signed in, owns the node, which then waits for the channel's owner. The command waits for the
    code to be entered; run again it goes on. Works with the node running or not. With --json and a hub's address,
    there is a line with the code, and one with the result.
    """
    from ..node import membership

    settings = load_settings()
    check_online(settings, "Joining a channel")
    wanted = None if permissions is None else split_list(permissions)
    by_link = "/join/" in link
    if not by_link and "://" not in link:
        raise InvalidArgument(what=f"{link!r} is neither an invitation (http://hub.example.org:20440/join/CODE) nor "
                                   "the address of a hub (http://hub.example.org:20440).")
    if by_link and channel is not None:
        raise InvalidArgument(what="An invitation names its channel. Pass --channel with the address of a hub alone.")
    if not by_link and channel is None and wanted is not None:
        raise InvalidArgument(what="Permissions are for a channel. Name it with --channel.")
    if by_link:
        joined = membership.join(settings, link, label=label, permissions=wanted)
        text = (f"This node is on the channel {joined['channel']} of {joined['owner']} "
                f"({_permissions(joined['permissions'])}).")
    else:
        joined = join_by_approval(settings, link, label=label, channel=channel, permissions=wanted, as_json=as_json)
        text = joined_text(joined)
    then = _reload(settings)
    if not then["running"]:
        then["note"] = "Start the node with: kachery-fast node start"
    if by_link or not as_json:
        emit({**joined, **then}, f"{text}{_note(then)}", as_json)
    else:
        click.echo(json_line({**joined, **then}))


@node.command(short_help="Leave a channel.")
@click.argument("channel")
@json_option
@command_errors
def leave(channel: str, as_json: bool) -> None:
    """Leave a channel. What was loaded from it stays in the local store."""
    from ..node import membership

    settings = load_settings()
    check_online(settings, "Leaving a channel")
    membership.leave(settings, channel)
    then = _reload(settings)
    emit({"channel": channel, **then}, f"This node has left the channel {channel}.{_note(then)}", as_json)


@node.command(short_help="Stop the node.")
@json_option
@command_errors
def stop(as_json: bool) -> None:
    """Stop the node, and wait until it has ended.

    Loads that run fail; what they have brought is kept, and they go on from there when they are asked for again.
    """
    connection = NodeConnection(client_settings())
    pid = connection.info().get("pid")
    connection.stop()
    end = time.monotonic() + _STOP_SECONDS
    while connection.is_running() or _lives(pid):
        if time.monotonic() > end:
            raise NodeError(what=f"it was told to stop but still runs after {_STOP_SECONDS:g} s (process {pid}).")
        time.sleep(0.05)
    emit({"stopped": True, "pid": pid}, "The node has stopped.", as_json)


def _lives(pid: Any) -> bool:
    """Whether this process has not ended; one that cannot be told counts as ended."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
        # Ended, but not yet collected by its parent: state Z, after the name in brackets (proc(5)).
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()
    except OSError:
        return False


def _reload(settings: Settings) -> dict[str, Any]:
    """Have a running node take up the change; return ``running``, and a ``note`` if it may not have done so.

    The change itself is made by then, so whatever the node answers is no failure of the command.
    """
    connection = NodeConnection(settings)
    if not connection.is_running():
        return {"running": False}
    try:
        connection.reload()
    except KacheryError as error:
        return {"running": True, "note": f"The running node may not have taken that up yet ({error}). If node info "
                                         "does not show it in a minute, stop the node and start it again."}
    return {"running": True}


def _note(then: dict[str, Any]) -> str:
    return f"\n{then['note']}" if "note" in then else ""


# --- text


def _info_text(found: dict[str, Any]) -> str:
    store = found["store"]
    about = "" if store["exact"] else "about "
    lines = [
        f"kachery-fast {found['version']}",
        f"Local store: {found['storageDir']}",
        f"  Files are stored {found['storesWhere']}.",
        f"  {about}{store['files']} files, {human_size(store['bytes'])}; {about}{store['links']} links",
    ]
    if found["channel"]:
        lines.append(f"Channel, where none is named: {found['channel']}")
    if found["node"] is None:
        lines.append(f"Node: {found['nodeWhy']}")
    else:
        lines += _node_lines(found["node"])
    return "\n".join(lines)


def _node_lines(node_state: dict[str, Any]) -> list[str]:
    lines = [f"Node: {node_state.get('label') or 'without a label'}, process {node_state.get('pid')}",
             f"  id {node_state.get('nodeId')}"]
    hubs = node_state.get("hubs", [])
    if not hubs:
        lines.append("  It is on no channel. Join one with: kachery-fast node join LINK")
    for hub in hubs:
        state = "" if hub.get("reachable") else f", not reachable: {hub.get('why') or '?'}"
        lines.append(f"  Hub {hub.get('url')}{state}")
        for channel in hub.get("channels", []):
            state = "" if channel.get("connected") else f", not connected: {channel.get('why') or '?'}"
            lines.append(f"    channel {channel.get('name')}: {_permissions(channel.get('permissions', []))}{state}")
            members = [_member(member) for member in channel.get("members", [])]
            if members:
                lines.append(f"      nodes: {', '.join(members)}")
    for transfer in node_state.get("transfers", []):
        total = transfer.get("total")
        of = f" of {human_size(total)}" if total else ""
        waiting = f", {transfer['waiting']}" if transfer.get("waiting") else ""
        lines.append(f"  Loading {transfer.get('uri')}: {human_size(transfer.get('received') or 0)}{of}{waiting}")
    return lines


def _permissions(names: Any) -> str:
    """Return permissions for people, whether they come as a list or as an object of truth values."""
    if isinstance(names, dict):
        names = [name for name, granted in names.items() if granted]
    return "may " + ", ".join(str(name) for name in names) if names else "may do nothing yet"


def _member(member: Any) -> str:
    if isinstance(member, dict):
        return str(member.get("label") or str(member.get("nodeId") or member.get("node") or "?")[:10])
    return str(member)[:64]
