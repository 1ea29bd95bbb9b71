"""``kachery-fast nodes``: what the owner of nodes does at a hub, on whichever machine."""

from __future__ import annotations

from typing import Any

import click

from .output import command_errors, emit
from .owner import ask_hub, count_text, hub_options, moment_text

__all__ = ["nodes"]


@click.group()
def nodes() -> None:
    """Say which nodes are yours at a hub, and what they ask for on its channels.

    On the hub's own machine nothing needs to be named; elsewhere pass --hub and KACHERY_HUB_TOKEN (or --token). A node
    is named by its label, its id, or the first digits of its id. The six permissions are requestFiles, provideFiles,
    requestFeeds, provideFeeds, requestTasks and provideTasks; "all" stands for every one.
    """


@nodes.command()
@click.argument("code")
@click.option("--yes", is_flag=True, help="Do not ask: the code was seen on the node's own machine.")
@hub_options
@command_errors
def approve(code: str, yes: bool, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Take the node that shows CODE for yours. You own it from then on, and it asks for permissions in your name.

    Approve only what you have started yourself: whoever sends you a code wants a node of his to be yours.
    """
    if not yes:
        found = ask_hub(hub_url, token, "findApproval", code=code)
        click.echo("\n".join(_approval(found)), err=True)
        click.confirm("Is this your node, and does its screen show this code?", abort=True, err=True)
    answer = ask_hub(hub_url, token, "approveNode", code=code)
    emit(answer, lambda: "\n".join(_approved(answer)), as_json)


@nodes.command()
@click.argument("code")
@hub_options
@command_errors
def deny(code: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Refuse the node that shows CODE, and make the code useless."""
    answer = ask_hub(hub_url, token, "denyNode", code=code)
    emit(answer, f"The node {answer['node'][:16]} was not approved.", as_json)


@nodes.command("list")
@hub_options
@command_errors
def list_(hub_url: str | None, token: str | None, as_json: bool) -> None:
    """List your nodes."""
    answer = ask_hub(hub_url, token, "listNodes")

    def human() -> str:
        lines = [f"{node['node'][:16]}  {node['label'] or '(no label)'}  {count_text(node['channels'], 'channel')}  "
                 f"version {node['version'] or '?'}  seen {moment_text(node['lastSeen'])}" for node in answer["nodes"]]
        if not lines:
            return f"{answer['owner']} has no nodes yet. On a machine: kachery-fast node join {answer['hub']}"
        if answer["total"] > len(lines):
            lines.append(f"and {answer['total'] - len(lines)} that were seen before these")
        return "\n".join(lines)

    emit(answer, human, as_json)


@nodes.command()
@click.argument("node")
@hub_options
@command_errors
def show(node: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Show what NODE may do on which channel, and what keeps it from the rest."""
    answer = ask_hub(hub_url, token, "showNode", node=node)

    def human() -> str:
        lines = [f"{answer['label'] or '(no label)'}, version {answer['version'] or '?'}, "
                 f"seen {moment_text(answer['lastSeen'])}", f"  id {answer['node']}"]
        for membership in answer["memberships"]:
            lines += _membership(membership)
        return "\n".join(lines)

    emit(answer, human, as_json)


@nodes.command()
@click.argument("node")
@click.argument("channel")
@click.argument("permissions", nargs=-1, required=True, metavar="PERMISSION...|all")
@hub_options
@command_errors
def request(
    node: str, channel: str, permissions: tuple[str, ...], hub_url: str | None, token: str | None, as_json: bool
) -> None:
    """Ask for these permissions on CHANNEL for NODE, in place of those that it asked for before.

    In force is what the channel's owner grants of it.
    """
    answer = ask_hub(hub_url, token, "requestPermissions", node=node, channel=channel, permissions=list(permissions))
    emit(answer, lambda: "\n".join(_membership(answer)).strip(), as_json)


@nodes.command()
@click.argument("node")
@click.argument("channel")
@hub_options
@command_errors
def withdraw(node: str, channel: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Take NODE off CHANNEL, or take back its asking."""
    answer = ask_hub(hub_url, token, "withdraw", node=node, channel=channel)
    emit(answer, f"The node {answer['node'][:16]} is not on {channel!r} any more.", as_json)


@nodes.command()
@click.argument("node")
@hub_options
@command_errors
def forget(node: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Own NODE no longer: it leaves all its channels, and anybody may take it by a new code."""
    answer = ask_hub(hub_url, token, "forgetNode", node=node)
    emit(answer, f"The node {answer['node'][:16]} is not yours any more; it was on "
                 f"{count_text(len(answer['channels']), 'channel')}.", as_json)


def _approval(found: dict[str, Any]) -> list[str]:
    lines = [f"The node calls itself {found['label'] or '(nothing)'}, version {found['version'] or '?'}.",
             f"  id {found['node']}", f"  asked {moment_text(found['asked'])} from {found['address']}"]
    if found["owner"]:
        lines.append(f"  belongs to {found['owner']}")
    if found["channel"]:
        lines.append(f"  wants to be on the channel {found['channel']}: {' '.join(found['permissions'])}")
    return lines


def _approved(answer: dict[str, Any]) -> list[str]:
    lines = [f"The node {answer['label'] or answer['node'][:16]} is yours now ({answer['owner']})."]
    if answer["refused"]:
        lines.append(f"It is not on the channel that it asked for: {answer['refused']}")
    elif answer["membership"] is not None:
        lines += _membership(answer["membership"])
    return lines


def _membership(membership: dict[str, Any]) -> list[str]:
    if membership["state"] == "removed":
        return [f"  {membership['channel']}: removed, or declined, by the channel's owner"]
    if membership["state"] == "asked":
        return [f"  {membership['channel']}: waits for the channel's owner to grant "
                f"{' '.join(membership['requested'])}"]
    lines = [f"  {membership['channel']}: {' '.join(membership['permissions']) or 'nothing permitted'}"]
    of_interest = set(membership["requested"]) | set(membership["granted"])
    lines += [f"    not {name}: {why}" for name, why in membership["why"].items() if name in of_interest]
    return lines
