"""``kachery-fast channel migrate``: a channel moves to another bucket."""

from __future__ import annotations

import time
from typing import Any

import click

from ..errors import EngineUnusable, InvalidArgument
from .output import command_errors, emit, human_size
from .owner import ask_hub, count_text, hub_options

__all__ = ["migrate"]

_LOOK_SECONDS = 0.5
_RUNNING = ("copying", "following", "switched")
_STATES = {"copying": "copying to {}", "following": "copying to {} what came meanwhile",
           "switched": "{} is used now; copying what still came to the old one", "done": "{} is used now",
           "stopped": "the move to {} was stopped"}


@click.command()
@click.argument("name")
@click.option("--to", "target", metavar="BUCKET", help="One of your buckets that the hub knows (kachery-fast channel "
                                                       "engines; kachery-fast channel bucket makes one known).")
@click.option("--own", is_flag=True, help="To the hub's own bucket.")
@click.option("--switch", is_flag=True, help="Copy nothing: nodes upload again what is asked for.")
@click.option("--detach", is_flag=True, help="Do not wait for its end; the hub goes on by itself.")
@click.option("--status", is_flag=True, help="Say how far the last one has come.")
@click.option("--stop", is_flag=True, help="Leave the channel in the bucket that it has now.")
@hub_options
@command_errors
def migrate(
    name: str, target: str | None, own: bool, switch: bool, detach: bool, status: bool, stop: bool,
    hub_url: str | None, token: str | None, as_json: bool,
) -> None:
    """Have the channel NAME move to another bucket, with what is in the one that it has.

    The hub copies object by object and checks each; the old bucket is used until all is there. URIs stay the same,
    nodes need no change, and transfers go on. What is in the old bucket stays there. Ctrl-C ends this command, not the
    move.
    """
    if [target is not None, own, status, stop].count(True) != 1:
        raise InvalidArgument(what="Choose one of --to, --own, --status and --stop.")
    if switch and (status or stop):
        raise InvalidArgument(what="--switch goes with --to or --own.")
    if switch:
        answer = ask_hub(hub_url, token, "setBucket", channel=name, engine=target)
        emit(answer, f"{name}: {_bucket(answer['name'])} is used now. Nothing was copied.", as_json)
        return
    if status or stop:
        answer = ask_hub(hub_url, token, "bucketMove" if status else "stopMove", channel=name)
    else:
        answer = ask_hub(hub_url, token, "migrateBucket", channel=name, engine=target)
        if not detach:
            answer = _follow(hub_url, token, answer, quiet=as_json)
    emit(answer, lambda: _text(answer), as_json)
    if answer["state"] == "stopped" and not stop:
        click.get_current_context().exit(EngineUnusable.exit_code)


def _follow(hub_url: str | None, token: str | None, answer: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Wait for the end of a move, and tell on the standard error what comes of it."""
    told = ""
    while answer["state"] in _RUNNING:
        if not quiet and told != (text := _text(answer)):
            click.echo(text, err=True)
            told = text
        time.sleep(_LOOK_SECONDS)
        answer = ask_hub(hub_url, token, "bucketMove", channel=answer["channel"])
    return answer


def _text(answer: dict[str, Any]) -> str:
    text = (f"{answer['channel']}: {_STATES[answer['state']].format(_bucket(answer['target']))} "
            f"({count_text(answer['objects'], 'object')}, {human_size(answer['sizeBytes'])} copied)")
    if answer["damaged"]:
        text += f"; {count_text(answer['damaged'], 'damaged object')} stayed behind"
    return text + (f": {answer['why']}" if answer["why"] else "")


def _bucket(name: str | None) -> str:
    return "the hub's own bucket" if name is None else f"the bucket {name!r}"
