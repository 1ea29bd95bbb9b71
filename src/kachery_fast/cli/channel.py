"""``kachery-fast channel``: what the owner of channels does, on whichever machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from ..config import Settings, load_settings
from ..errors import DiskError, InvalidArgument
from .output import command_errors, emit, human_size, json_option, size_of

__all__ = ["channel"]

_NONE = "none"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _hub_options(function: _Function) -> _Function:
    """Add ``--hub``, ``--token`` and ``--json``."""
    for option in (
        json_option,
        click.option("--token", help="The owner's token; better in KACHERY_HUB_TOKEN, where other users of this "
                                     "machine do not see it."),
        click.option("--hub", "hub_url", metavar="URL", help="The hub. [default: the one that runs on this machine]"),
    ):
        function = option(function)
    return function


@click.group()
def channel() -> None:
    """Make channels on a hub, and say who may do what on them.

    On the hub's own machine nothing needs to be named; elsewhere pass --hub and KACHERY_HUB_TOKEN (or --token).
    The six permissions are requestFiles, provideFiles, requestFeeds, provideFeeds, requestTasks and provideTasks;
    "all" stands for every one. A node is named by its label, its id, or the first digits of its id.
    """


@channel.command()
@click.argument("name")
@_hub_options
@command_errors
def create(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Make the channel NAME."""
    answer = _ask(hub_url, token, "createChannel", name=name)
    emit(answer, f"The channel {name!r} was made. Invite nodes with: kachery-fast channel invite {name}", as_json)


@channel.command("list")
@_hub_options
@command_errors
def list_(hub_url: str | None, token: str | None, as_json: bool) -> None:
    """List your channels."""
    answer = _ask(hub_url, token, "listChannels")

    def human() -> str:
        if not answer["channels"]:
            return f"{answer['owner']} has no channels yet. Make one with: kachery-fast channel create NAME"
        return "\n".join(f"{item['name']}  {_count(item['members'], 'node')}" for item in answer["channels"])

    emit(answer, human, as_json)


@channel.command()
@click.argument("name")
@_hub_options
@command_errors
def show(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Show the settings of the channel NAME, its nodes, their permissions, and its open invitations."""
    answer = _ask(hub_url, token, "showChannel", channel=name)
    emit(answer, lambda: "\n".join(_describe(answer)), as_json)


@channel.command("set")
@click.argument("name")
@click.option("--private/--public", default=None, help="Whether objects are read by the channel's nodes alone, by "
                                                       "signed URLs, or by everybody who knows their names.")
@click.option("--listed/--unlisted", default=None, help="Whether it has a public page.")
@click.option("--description", metavar="TEXT", help="What people are told about it.")
@click.option("--inviters", type=click.Choice(["owner", "members"]), help="Who may invite: the owner alone, or every "
                                                                           "owner of a node on it.")
@click.option("--size-max", metavar="SIZE|none", help="How much its objects may take together, such as 2TB.")
@click.option("--unread-days-max", metavar="N|none", help="Objects that nobody has read for as long go.")
@click.option("--node-day-max", metavar="SIZE|none", help="How much one node may upload in a day (UTC).")
@_hub_options
@command_errors
def set_(
    name: str, private: bool | None, listed: bool | None, description: str | None, inviters: str | None,
    size_max: str | None, unread_days_max: str | None, node_day_max: str | None, hub_url: str | None,
    token: str | None, as_json: bool,
) -> None:
    """Change settings of the channel NAME; what is not named stays as it is."""
    named = {
        "private": private, "listed": listed, "description": description, "inviters": inviters,
        "sizeBytesMax": _limit(size_max, "--size-max", size_of),
        "unreadDaysMax": _limit(unread_days_max, "--unread-days-max", _days_of),
        "nodeDayBytesMax": _limit(node_day_max, "--node-day-max", size_of),
    }
    fields = {field: None if value == _NONE else value for field, value in named.items() if value is not None}
    if not fields:
        raise InvalidArgument(what="Name at least one setting. See: kachery-fast channel set --help")
    answer = _ask(hub_url, token, "changeChannel", channel=name, **fields)
    emit(answer, lambda: f"{answer['channel']}: {_settings(answer)}", as_json)


@channel.command()
@click.argument("name")
@click.option("--permissions", default="requestFiles,provideFiles", show_default=True, metavar="P,P",
              help="What the invited nodes are granted.")
@click.option("--uses", default="1", show_default=True, metavar="N", help='How many nodes may use it, or "any".')
@click.option("--days", type=float, default=7.0, show_default=True, help="How long it holds.")
@_hub_options
@command_errors
def invite(
    name: str, permissions: str, uses: str, days: float, hub_url: str | None, token: str | None, as_json: bool
) -> None:
    """Make an invitation to the channel NAME and print its link."""
    if uses != "any" and not uses.isdecimal():
        raise InvalidArgument(what=f'--uses takes a number or "any", not {uses!r}.')
    answer = _ask(
        hub_url, token, "invite", channel=name, days=days, uses=None if uses == "any" else int(uses),
        permissions=[word.strip() for word in permissions.split(",") if word.strip()])
    emit(answer, f"On the machine that is to join:\n    kachery-fast node join {answer['link']}\n"
                 f"It holds until {_moment(answer['expires'])}, for "
                 + ("any number of nodes." if uses == "any" else f"{_count(int(uses), 'node')}."), as_json)


@channel.command()
@click.argument("name")
@_hub_options
@command_errors
def uninvite(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Make all invitations to the channel NAME useless."""
    answer = _ask(hub_url, token, "closeInvitations", channel=name)
    emit(answer, f"{_count(answer['closed'], 'invitation')} closed.", as_json)


@channel.command()
@click.argument("name")
@click.argument("node")
@click.argument("permissions", nargs=-1, required=True, metavar="PERMISSION...")
@_hub_options
@command_errors
def grant(
    name: str, node: str, permissions: tuple[str, ...], hub_url: str | None, token: str | None, as_json: bool
) -> None:
    """Grant NODE permissions on the channel NAME."""
    answer = _ask(hub_url, token, "grant", channel=name, node=node, permissions=list(permissions))
    emit(answer, lambda: _standing(answer), as_json)


@channel.command()
@click.argument("name")
@click.argument("node")
@click.argument("permissions", nargs=-1, required=True, metavar="PERMISSION...|all")
@_hub_options
@command_errors
def revoke(
    name: str, node: str, permissions: tuple[str, ...], hub_url: str | None, token: str | None, as_json: bool
) -> None:
    """Take permissions on the channel NAME from NODE, at once."""
    answer = _ask(hub_url, token, "revoke", channel=name, node=node, permissions=list(permissions))
    emit(answer, lambda: _standing(answer), as_json)


@channel.command("remove-node")
@click.argument("name")
@click.argument("node")
@_hub_options
@command_errors
def remove_node(name: str, node: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Take NODE off the channel NAME; only a new invitation lets it in again."""
    answer = _ask(hub_url, token, "removeNode", channel=name, node=node)
    emit(answer, f"The node {answer['node'][:16]} is no longer on {name!r}.", as_json)


@channel.command()
@click.argument("name")
@click.confirmation_option(prompt="Delete the channel, its members' rights and every object in its bucket?")
@_hub_options
@command_errors
def delete(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Delete the channel NAME and the objects in its bucket. The nodes keep their own files."""
    answer = _ask(hub_url, token, "deleteChannel", channel=name)
    objects = _count(answer["objectsRemoved"], "object")
    emit(answer, f"The channel {name!r} was deleted, and {objects} with it.", as_json)


def _ask(hub_url: str | None, token: str | None, kind: str, **fields: Any) -> dict[str, Any]:
    settings = load_settings(hub_token=token)
    url, token = _find_hub(settings, hub_url)

    async def ask() -> dict[str, Any]:
        from ..net.hub import OwnerClient

        async with OwnerClient(url, token, settings) as client:
            return await client.call(kind, **fields)

    return asyncio.run(ask())


def _find_hub(settings: Settings, hub_url: str | None) -> tuple[str, str]:
    """Return address and token of the hub that was named, or of the one on this machine."""
    local_url = _read(settings.hub_dir / "address")
    url = hub_url or local_url
    if not url:
        raise InvalidArgument(what=f"No hub was named, and none runs on {settings.hub_dir}. Pass --hub URL, or start "
                                   "one with: kachery-fast hub")
    token = settings.hub_token
    if not token and local_url is not None and url.rstrip("/") == local_url:
        # The token in the directory is this hub's; it is never sent to another.
        token = _read(settings.hub_dir / "owner-token") or ""
    if not token:
        raise InvalidArgument(what=f"The hub {url} wants its owner's token. Set KACHERY_HUB_TOKEN, or pass --token; "
                                   "the hub's own machine keeps it in the file owner-token of the hub's directory.")
    return url, token


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DiskError(action="reading", path=str(path), why=error.strerror) from None


def _describe(answer: dict[str, Any]) -> list[str]:
    lines = [f"{answer['channel']}, owned by {answer['owner']}: {_count(len(answer['members']), 'node')}",
             f"  {_settings(answer)}"]
    if answer["description"]:
        lines.append(f"  {answer['description']}")
    for member in answer["members"]:
        lines.append(f"  {member['node'][:16]}  {member['label'] or '(no label)'}  "
                     f"{' '.join(member['permissions']) or 'nothing permitted'}  seen {_moment(member['lastSeen'])}")
        withheld = sorted(set(member["requested"]) - set(member["granted"]))
        if withheld:
            lines.append(f"    asks for, and is not granted: {' '.join(withheld)}")
    for item in answer["invitations"]:
        uses = "any number of nodes" if item["usesLeft"] is None else _count(item["usesLeft"], "node")
        lines.append(f"  open invitation for {uses} until {_moment(item['expires'])}: {' '.join(item['permissions'])}")
    for item in answer["damage"]:
        lines.append(f"  damaged and removed {_moment(item['time'])}: {item['sha1']}")
    return lines


def _limit(text: str | None, option: str, read: Callable[[str, str], int]) -> int | str | None:
    """A limit, ``_NONE`` for no limit, None where none was named."""
    return text if text is None or text == _NONE else read(text, option)


def _days_of(text: str, option: str) -> int:
    if not text.isdecimal():
        raise InvalidArgument(what=f'{option} takes a number of days or "{_NONE}", not {text!r}.')
    return int(text[:9])


def _settings(answer: dict[str, Any]) -> str:
    parts = ["private" if answer["private"] else "public", "listed" if answer["listed"] else "unlisted",
             "its members invite" if answer["inviters"] == "members" else "its owner invites"]
    if answer["sizeBytesMax"] is not None:
        parts.append(f"up to {human_size(answer['sizeBytesMax'])}")
    if answer["unreadDaysMax"] is not None:
        parts.append(f"objects go unread for {_count(answer['unreadDaysMax'], 'day')}")
    if answer["nodeDayBytesMax"] is not None:
        parts.append(f"a node uploads up to {human_size(answer['nodeDayBytesMax'])} a day")
    return ", ".join(parts)


def _standing(answer: dict[str, Any]) -> str:
    return f"{answer['node'][:16]} on {answer['channel']}: {' '.join(answer['permissions']) or 'nothing permitted'}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _moment(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M")
