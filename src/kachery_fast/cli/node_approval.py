"""``kachery-fast node join HUB_URL``: what is shown while a node waits for its owner, and when he has approved it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ..config import Settings
from .output import emit, json_line

if TYPE_CHECKING:
    from ..protocol.hub_bodies import ApprovalAsked

__all__ = ["join_by_approval", "joined_text"]


def join_by_approval(
    settings: Settings, url: str, *, label: str | None, channel: str | None, permissions: list[str] | None,
    as_json: bool,
) -> dict[str, Any]:
    """Show a code and wait until somebody has entered it at the hub; return the result as JSON has it."""
    from ..node.approval import join_hub

    def show(asked: ApprovalAsked, life_seconds: float) -> None:
        if as_json:
            click.echo(json_line({"state": "waiting", "hub": url, "code": asked.code, "link": asked.link,
                                  "expires": asked.expires}))
        else:
            emit(None, f"Open {asked.link} in a browser where you are signed in, and enter the code\n\n"
                       f"    {asked.code}\n\nor, where your token is:\n"
                       f"    kachery-fast nodes approve {asked.code} --hub {url}\n"
                       f"The code holds for {life_seconds / 60:.0f} minutes. Waiting; Ctrl-C ends that.", False)
        sys.stdout.flush()

    try:
        joined = join_hub(settings, url, label=label, channel=channel, permissions=permissions, show=show)
    except KeyboardInterrupt:
        click.echo("To go on, run the same command again. If the code was approved by then it is done, else there is a "
                   "new one.", err=True)
        raise
    return {"state": "approved", "hub": joined.hub, "nodeId": joined.node_id, "owner": joined.owner,
            "channel": channel, "standing": joined.standing, "channels": joined.channels}


def joined_text(joined: dict[str, Any]) -> str:
    """Say whose the node is now, and what happens next."""
    text = f"This node belongs to {joined['owner']} at {joined['hub']}."
    channel, channels = joined["channel"], joined["channels"]
    if channel is None and not channels:
        return (f"{text}\nIt is on no channel there yet. Ask for one with: kachery-fast node join {joined['hub']} "
                "--channel NAME")
    if channel is None:
        return f"{text} It is on: {', '.join(channels)}"
    if joined["standing"] == "member":
        permitted = ", ".join(channels.get(channel, [])) or "nothing yet"
        return f"{text} It is on the channel {channel}, and may {permitted}."
    if joined["standing"] == "asked":
        return (f"{text} It asks to be let in to the channel {channel}, whose owner grants that with:\n"
                f"    kachery-fast channel grant {channel} {joined['nodeId'][:16]} requestFiles provideFiles\n"
                "The node takes it up by itself then.")
    return (f"{text} It is not on the list of the channel {channel}; its owner can invite it. Why not, says:\n"
            f"    kachery-fast nodes show {joined['nodeId'][:16]}")
