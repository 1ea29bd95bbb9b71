"""``kachery-fast channel usage | objects | traffic``: what a bucket holds, and what moves there and on the bands."""

from __future__ import annotations

from typing import Any

import click

from .output import command_errors, emit, human_size
from .owner import ask_hub, count_text, hub_options, moment_text

__all__ = ["objects", "traffic", "usage"]

_KINDS = {"files": "sha1", "feeds": "feeds", "results": "task_results"}
_WORDS = {kind: word for word, kind in _KINDS.items()}


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
@hub_options
@command_errors
def traffic(name: str, hub_url: str | None, token: str | None, as_json: bool) -> None:
    """Show what was published on the bands of the channel NAME in the last minute, and which nodes listen."""
    answer = ask_hub(hub_url, token, "showTraffic", channel=name)

    def human() -> str:
        lines = [f"{line['band']:<14}{count_text(sum(line['messages']), 'message'):>16}  "
                 f"{human_size(line['sizeBytes']):>9}  {count_text(line['listeners'], 'node')} listening"
                 for line in answer["bands"]]
        nodes = [f"{node['node'][:16]}  {node['label']}".rstrip() for node in answer["nodes"]]
        return "\n".join([*(lines or ["Its pub/sub service does not tell what moves."]), *nodes])

    emit(answer, human, as_json)


def _moved(line: dict[str, Any]) -> str:
    return (f"{count_text(line['uploads'], 'upload')} ({human_size(line['uploadBytes'])}), "
            f"{count_text(line['downloads'], 'download')} ({human_size(line['downloadBytes'])})")


def _node(line: dict[str, Any]) -> str:
    return f"{line['node'][:16]} {line['label']}".rstrip() if line["node"] else "whoever reads"


def _stored(answer: dict[str, Any]) -> str:
    parts = [f"{count_text(kind['objects'], 'object')} of {_WORDS[kind['kind']]} ({human_size(kind['sizeBytes'])})"
             for kind in answer["stored"]]
    return "In the bucket: " + ", ".join(parts) + ("" if answer["counted"] else "; still being counted")
