"""``kachery-fast channel usage | objects | limits``: what moves through a bucket, what is in it, and its bounds."""

from __future__ import annotations

from typing import Any

import click

from ..errors import InvalidArgument
from .output import command_errors, emit, human_size
from .owner import ask_hub, count_text, hub_options, moment_text

__all__ = ["limits", "objects", "usage"]

_KINDS = {"files": "sha1", "feeds": "feeds", "results": "task_results"}
_WORDS = {kind: word for word, kind in _KINDS.items()}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@click.command()
@click.argument("name")
@click.option("--days", type=click.IntRange(1, 400), default=14, show_default=True, help="How many days (UTC) to show.")
@hub_options
@command_errors
def usage(name: str, days: int, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Show what was uploaded to and downloaded from the bucket of the channel NAME, by day and node, and what it holds.

    Uploads are counted for the node that made them. Whoever knows a channel's name may download from its bucket, so
    downloads are counted for nobody.
    """
    answer = ask_hub(hub_url, token, "showUsage", channel=name, days=days)

    def human() -> str:
        lines = [f"{day['date']}  {_moved(day)}" for day in answer["days"] if day["uploads"] or day["downloads"]]
        lines = lines or [f"Nothing was uploaded or downloaded in {count_text(days, 'day')}."]
        lines += [f"  {_node(node)}  {_moved(node)}" for node in answer["nodes"]]
        return "\n".join([*lines, _stored(answer)])

    emit(answer, human, as_json)


@click.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(list(_KINDS)), help="Only objects of this kind.")
@click.option("--after", default="", metavar="OBJECT", help="Begin after the object of this name.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="How many to list.")
@click.option("--remove", "removed", multiple=True, metavar="OBJECT",
              help="Remove this object instead of listing; may be given several times.")
@hub_options
@command_errors
def objects(
    name: str, kind: str | None, after: str, limit: int, removed: tuple[str, ...], hub_url: str | None,
    token: str | None, as_json: bool,
) -> None:
    """List what is in the bucket of the channel NAME, with size and last use, or remove some of it.

    What is removed is uploaded again when somebody asks for it and a node still has it.
    """
    if removed:
        answer = ask_hub(hub_url, token, "removeObjects", channel=name, names=list(removed))
        text = f"{count_text(answer['removed'], 'object')} removed ({human_size(answer['sizeBytes'])})."
        emit(answer, "\n".join([text, *(f"Not there: {missing}" for missing in answer["missing"])]), as_json)
        return
    answer = ask_hub(hub_url, token, "listObjects", channel=name, kind=_KINDS[kind] if kind else "", after=after,
                     limit=limit)

    def human() -> str:
        lines = [f"{line['name']}  {human_size(line['sizeBytes'])}  came {moment_text(line['created'])}  "
                 + ("" if line["lastRead"] is None else f"used {moment_text(line['lastRead'])}")
                 for line in answer["objects"]]
        if answer["next"] is not None:
            lines.append(f"More with: --after {answer['next']}")
        return "\n".join([*lines, _stored(answer)])

    emit(answer, human, as_json)


@click.command()
@click.argument("name")
@click.option("--size", metavar="SIZE|none", help='What its bucket may hold, e.g. 500GB or 2TiB; "none": no limit.')
@click.option("--unread-days", metavar="DAYS|none", help='Objects that nobody has read for as long go; "none": never.')
@click.option("--node-day", metavar="SIZE|none", help='What one node may upload in a day (UTC); "none": no limit.')
@hub_options
@command_errors
def limits(
    name: str, size: str | None, unread_days: str | None, node_day: str | None, hub_url: str | None, token: str | None,
    as_json: bool,
) -> None:
    """Show or set how much the bucket of the channel NAME may hold, for how long, and what a node may bring a day.

    Where unread objects go, those that nobody has read for longest also make room for new ones in a full bucket.
    """
    given = {"sizeBytesMax": None if size is None else [_size(size)],
             "unreadDaysMax": None if unread_days is None else [_days(unread_days)],
             "nodeDayBytesMax": None if node_day is None else [_size(node_day)]}
    changed = {field: value[0] for field, value in given.items() if value is not None}
    answer = ask_hub(hub_url, token, "changeChannel" if changed else "showChannel", channel=name, **changed)

    def human() -> str:
        days = answer["unreadDaysMax"]
        stay = "stay" if days is None else "go after " + count_text(days, "day")
        return "\n".join([
            f"bucket: {_limit(answer['sizeBytesMax'])}",
            f"unread objects: {stay}",
            f"uploads of one node in a day: {_limit(answer['nodeDayBytesMax'])}"])

    emit(answer, human, as_json)


def _size(text: str) -> int | None:
    """Read 500GB, 2TiB or a number of bytes; "none" is None."""
    if text.lower() == "none":
        return None
    digits = text.strip().lower().removesuffix("b")
    number = digits.rstrip("kmgti ")
    unit = digits[len(number):].strip()
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise InvalidArgument(what=f'{text!r} is no size. Write a number of bytes, 500GB, 2TiB, or "none".') from None


def _days(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal():
        raise InvalidArgument(what=f'--unread-days takes a number of days or "none", not {text!r}.')
    return int(text)


def _limit(size_bytes: int | None) -> str:
    return "no limit" if size_bytes is None else f"up to {human_size(size_bytes)}"


def _moved(line: dict[str, Any]) -> str:
    return (f"{count_text(line['uploads'], 'upload')} ({human_size(line['uploadBytes'])}), "
            f"{count_text(line['downloads'], 'download')} ({human_size(line['downloadBytes'])})")


def _node(line: dict[str, Any]) -> str:
    return f"{line['node'][:16]} {line['label']}".rstrip() if line["node"] else "whoever reads"


def _stored(answer: dict[str, Any]) -> str:
    parts = [f"{count_text(kind['objects'], 'object')} of {_WORDS[kind['kind']]} ({human_size(kind['sizeBytes'])})"
             for kind in answer["stored"]]
    return "In the bucket: " + ", ".join(parts) + ("" if answer["counted"] else "; still being counted")
