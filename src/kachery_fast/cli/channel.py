"""``kachery-fast channel``: what the owner of channels does, on whichever machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..errors import InvalidArgument
from .channel_bucket import bucket, engines, try_
from .channel_care import objects, traffic, usage
from .channel_migrate import migrate
from .channel_pubsub import pubsub
from .output import command_errors, emit, human_size, size_of
from .owner import ask_hub, count_text, hub_options, moment_text, split_list

__all__ = ["channel"]

_NONE = "none"

@click.group()
def channel() -> None:
    """Make channels on a hub, and say who may do what on them.

    On the hub's own machine nothing needs to be named; elsewhere pass --hub and KACHERY_HUB_TOKEN (or --token).
    The six permissions are requestFiles, provideFiles, requestFeeds, provideFeeds, requestTasks and provideTasks;
    "all" stands for every one. A node is named by its label, its id, or the first digits of its id.
    """


for _command in (bucket, pubsub, engines, migrate, try_, usage, objects, traffic):
    channel.add_command(_command)


@channel.command()
@click.argument("name")
@hub_options
@command_errors
def create(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Make the channel NAME."""
    answer = ask_hub(hub_url, token, "createChannel", name=name)
    emit(answer, f"The channel {name!r} was made. Invite nodes with: kachery-fast channel invite {name}", as_json)


@channel.command("list")
@hub_options
@command_errors
def list_(hub_url: str | None, token: str | None, as_json: bool) -> None:
    """List your channels."""
    answer = ask_hub(hub_url, token, "listChannels")

    def human() -> str:
        if not answer["channels"]:
            return f"{answer['owner']} has no channels yet. Make one with: kachery-fast channel create NAME"
        return "\n".join(f"{item['name']}  {count_text(item['members'], 'node')}" for item in answer["channels"])

    emit(answer, human, as_json)


@channel.command()
@click.argument("name")
@hub_options
@command_errors
def show(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Show the settings of the channel NAME, its nodes, their permissions, and its open invitations."""
    answer = ask_hub(hub_url, token, "showChannel", channel=name)
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
@hub_options
@command_errors
def set_(
    name: str, private: bool | None, listed: bool | None, description: str | None, inviters: str | None,
    size_max: str | None, unread_days_max: str | None, node_day_max: str | None, hub_url: str | None,
    token: str | None, as_json: bool,
) -> None:
    """Change settings of the channel NAME; what is not named stays as it is.

    Where unread objects go, those that nobody has read for longest also make room for new ones in a full bucket.
    """
    named = {
        "private": private, "listed": listed, "description": description, "inviters": inviters,
        "sizeBytesMax": _limit(size_max, "--size-max", size_of),
        "unreadDaysMax": _limit(unread_days_max, "--unread-days-max", _days_of),
        "nodeDayBytesMax": _limit(node_day_max, "--node-day-max", size_of),
    }
    fields = {field: None if value == _NONE else value for field, value in named.items() if value is not None}
    if not fields:
        raise InvalidArgument(what="Name at least one setting. See: kachery-fast channel set --help")
    answer = ask_hub(hub_url, token, "changeChannel", channel=name, **fields)
    emit(answer, lambda: f"{answer['channel']}: {_settings(answer)}", as_json)


@channel.command()
@click.argument("name")
@click.option("--permissions", default="requestFiles,provideFiles", show_default=True, metavar="P,P",
              help="What the invited nodes are granted.")
@click.option("--uses", default="1", show_default=True, metavar="N", help='How many nodes may use it, or "any".')
@click.option("--days", type=float, default=7.0, show_default=True, help="How long it holds.")
@hub_options
@command_errors
def invite(
    name: str, permissions: str, uses: str, days: float, hub_url: str | None, token: str | None, as_json: bool
) -> None:
    """Make an invitation to the channel NAME and print its link."""
    if uses != "any" and not uses.isdecimal():
        raise InvalidArgument(what=f'--uses takes a number or "any", not {uses!r}.')
    answer = ask_hub(
        hub_url, token, "invite", channel=name, days=days, uses=None if uses == "any" else int(uses),
        permissions=split_list(permissions))
    emit(answer, f"On the machine that is to join:\n    kachery-fast node join {answer['link']}\n"
                 f"It holds until {moment_text(answer['expires'])}, for "
                 + ("any number of nodes." if uses == "any" else f"{count_text(int(uses), 'node')}."), as_json)


@channel.command()
@click.argument("name")
@hub_options
@command_errors
def uninvite(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Make all invitations to the channel NAME useless."""
    answer = ask_hub(hub_url, token, "closeInvitations", channel=name)
    emit(answer, f"{count_text(answer['closed'], 'invitation')} closed.", as_json)


@channel.command()
@click.argument("name")
@click.argument("node")
@click.argument("permissions", nargs=-1, required=True, metavar="PERMISSION...")
@hub_options
@command_errors
def grant(
    name: str, node: str, permissions: tuple[str, ...], hub_url: str | None, token: str | None, as_json: bool
) -> None:
    """Grant NODE permissions on the channel NAME; who asks to be let in, is then."""
    answer = ask_hub(hub_url, token, "grant", channel=name, node=node, permissions=list(permissions))
    emit(answer, lambda: _standing(answer), as_json)


@channel.command()
@click.argument("name")
@click.argument("node")
@click.argument("permissions", nargs=-1, required=True, metavar="PERMISSION...|all")
@hub_options
@command_errors
def revoke(
    name: str, node: str, permissions: tuple[str, ...], hub_url: str | None, token: str | None, as_json: bool
) -> None:
    """Take permissions on the channel NAME from NODE, at once."""
    answer = ask_hub(hub_url, token, "revoke", channel=name, node=node, permissions=list(permissions))
    emit(answer, lambda: _standing(answer), as_json)


@channel.command("remove-node")
@click.argument("name")
@click.argument("node")
@hub_options
@command_errors
def remove_node(name: str, node: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Take NODE off the channel NAME, or decline its asking; only a new invitation lets it in again."""
    answer = ask_hub(hub_url, token, "removeNode", channel=name, node=node)
    emit(answer, f"The node {answer['node'][:16]} is no longer on {name!r}.", as_json)


@channel.command()
@click.argument("name")
@click.confirmation_option(prompt="Delete the channel, its members' rights and every object in its bucket?")
@hub_options
@command_errors
def delete(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Delete the channel NAME and the objects in its bucket. The nodes keep their own files."""
    answer = ask_hub(hub_url, token, "deleteChannel", channel=name)
    objects = count_text(answer["objectsRemoved"], "object")
    left = f" Some were left: {answer['left']}" if answer["left"] else ""
    emit(answer, f"The channel {name!r} was deleted, and {objects} with it.{left}", as_json)


def _describe(answer: dict[str, Any]) -> list[str]:
    members = [member for member in answer["members"] if member["state"] != "asked"]
    lines = [f"{answer['channel']}, owned by {answer['owner']}: {count_text(len(members), 'node')}",
             f"  {_settings(answer)}"]
    if answer["bucket"] is not None:
        lines.append(f"  in the bucket {answer['bucket']!r}")
    if answer["pubsub"] is not None:
        lines.append(f"  messages go by {answer['pubsub']!r}")
    if answer["description"]:
        lines.append(f"  {answer['description']}")
    for member in answer["members"]:
        who = f"  {member['node'][:16]}  {member['label'] or '(no label)'}  "
        if member["state"] == "asked":
            lines.append(f"{who}of {member['owner']}, asks to be let in: {' '.join(member['requested'])}")
            continue
        lines.append(f"{who}{' '.join(member['permissions']) or 'nothing permitted'}  "
                     f"seen {moment_text(member['lastSeen'])}")
        withheld = sorted(set(member["requested"]) - set(member["granted"]))
        if withheld:
            lines.append(f"    asks for, and is not granted: {' '.join(withheld)}")
    for item in answer["invitations"]:
        uses = "any number of nodes" if item["usesLeft"] is None else count_text(item["usesLeft"], "node")
        by = "" if item["owner"] == answer["owner"] else f" by {item['owner']}"
        lines.append(f"  open invitation{by} for {uses} until {moment_text(item['expires'])}: "
                     f"{' '.join(item['permissions'])}")
    for item in answer["damage"]:
        lines.append(f"  damaged and removed {moment_text(item['time'])}: {item['sha1']}")
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
        parts.append(f"objects go unread for {count_text(answer['unreadDaysMax'], 'day')}")
    if answer["nodeDayBytesMax"] is not None:
        parts.append(f"a node uploads up to {human_size(answer['nodeDayBytesMax'])} a day")
    return ", ".join(parts)


def _standing(answer: dict[str, Any]) -> str:
    return f"{answer['node'][:16]} on {answer['channel']}: {' '.join(answer['permissions']) or 'nothing permitted'}"
