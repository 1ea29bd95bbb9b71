"""Commands on feeds: feed create, append, read, watch, export, verify, list, info, delete."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidArgument
from .feed_messages import batches, follow, read_on
from .output import command_errors, emit, json_line, json_option, show_error

if TYPE_CHECKING:
    from ..client.feeds import Feed
    from ..client.subfeeds import Subfeed

__all__ = ["feed"]

channel_option = click.option("--channel", metavar="NAME", help=(
    "The channel to ask on for another node's feed; without it the one of KACHERY_CHANNEL. \"*local*\": ask nobody."))
signed_option = click.option("--signed", is_flag=True, help="Print the messages as they were signed.")


@click.group(short_help="Make, append to, read and follow feeds.")
def feed() -> None:
    """Make, append to, read and follow feeds: append-only logs of JSON messages, signed by the node that owns them.

    FEED is the name of one of this node's feeds, feed://<feed id>, or the content URI of a snapshot. SUBFEED is
    feed://<feed id>/<subfeed>, or FEED/SUBFEED with the name of one of this node's feeds. A subfeed whose name is a
    dict is written as that JSON, or as ~ and the hash of the name.
    """


@feed.command(short_help="Make a feed on this node and print its URI.")
@click.argument("name", required=False)
@json_option
@command_errors
def create(name: str | None, as_json: bool) -> None:
    """Make a feed on this node and print its URI. NAME is what this node knows it by; an existing one is kept."""
    from ..client.feeds import create_feed

    made = create_feed(name)
    emit({"uri": made.uri, "feedId": made.feed_id, "name": name}, made.uri, as_json)


@feed.command(short_help="Append messages to a subfeed.")
@click.argument("subfeed", metavar="SUBFEED")
@click.argument("messages", nargs=-1, metavar="[MESSAGE...]")
@json_option
@command_errors
def append(subfeed: str, messages: tuple[str, ...], as_json: bool) -> None:
    """Append messages to a subfeed of one of this node's feeds.

    MESSAGE is a JSON object; all that are given are appended together, or none. Without any, the standard input is
    read, one on each line; lines that come together, up to 1000, are appended together.
    """
    target = _subfeed(subfeed, None)
    first = end = -1
    for batch in batches(messages):
        numbers = target.append_messages(batch)
        first, end = (numbers.start if first < 0 else first), numbers.stop
    first, end = max(first, 0), max(end, 0)
    emit({"uri": target.uri, "first": first, "end": end},
         f"{end - first} {'message' if end - first == 1 else 'messages'} appended, the last is number {end - 1}."
         if end > first else "Nothing was appended.", as_json)


@feed.command(short_help="Print the messages of a subfeed.")
@click.argument("subfeed", metavar="SUBFEED")
@click.option("--position", type=click.IntRange(min=0), default=0, show_default=True, metavar="NUMBER",
              help="The message to begin with.")
@click.option("--max", "limit", type=click.IntRange(min=1), metavar="COUNT", help="At most so many.")
@click.option("--wait", "wait_seconds", type=click.FloatRange(min=0, max=86400), default=10.0, show_default=True,
              metavar="SECONDS", help="How long to wait for the first of them, of another node's feed.")
@channel_option
@signed_option
@json_option
@command_errors
def read(subfeed: str, position: int, limit: int | None, wait_seconds: float, channel: str | None, signed: bool,
         as_json: bool) -> None:
    """Print the messages of a subfeed, one JSON object on each line. For SUBFEED see kachery-fast feed --help.

    The exit code is 3 when there are more that could not be had; those that could are printed all the same.
    """
    target = _subfeed(subfeed, channel)
    target.position = position
    found, missing = read_on(target, wait_seconds * 1000, limit, signed)
    if missing is not None and not found:
        raise missing
    emit({"uri": target.uri, "first": position, "position": target.position, "messages": found},
         lambda: "\n".join(map(json_line, found)), as_json)
    if missing is not None:
        show_error(missing)
        sys.stdout.flush()
        sys.exit(missing.exit_code)


@feed.command(short_help="Print the messages of subfeeds as they come.")
@click.argument("subfeeds", nargs=-1, required=True, metavar="SUBFEED...")
@click.option("--position", type=click.IntRange(min=0), default=0, show_default=True, metavar="NUMBER",
              help="The message to begin with.")
@click.option("--new", "only_new", is_flag=True, help="Begin after the messages that this node holds.")
@click.option("--max", "limit", type=click.IntRange(min=1), metavar="COUNT", help="End after so many.")
@channel_option
@signed_option
@json_option
@command_errors
def watch(subfeeds: tuple[str, ...], position: int, only_new: bool, limit: int | None, channel: str | None,
          signed: bool, as_json: bool) -> None:
    """Print the messages of subfeeds, and go on with new ones as they come, until Ctrl-C.

    Of a single subfeed the lines are its messages; of several, and with --json, they are {"uri", "number", "message"}.
    """
    targets = [_subfeed(name, channel) for name in subfeeds]
    for target in targets:
        target.position = target.get_num_local_messages() if only_new else position
    for printed, (target, number, message) in enumerate(follow(targets, signed), 1):
        named = as_json or len(targets) > 1
        click.echo(json_line({"uri": target.uri, "number": number, "message": message} if named else message))
        if printed == limit:
            return


@feed.command(short_help="Write subfeeds to a file, with their signatures.")
@click.argument("feed_name", metavar="FEED")
@click.argument("subfeeds", nargs=-1, metavar="[SUBFEED...]")
@click.option("--dest", type=click.Path(), help="The file to write; without it the standard output.")
@click.option("--store", "to_store", is_flag=True,
              help="Store it as a snapshot instead, and print its content URI, which loads as a feed anywhere.")
@json_option
@command_errors
def export(feed_name: str, subfeeds: tuple[str, ...], dest: str | None, to_store: bool,
           as_json: bool) -> None:
    """Write what this node holds of a feed to a file, with all signatures.

    kachery-fast feed verify FILE checks it anywhere, without a node. SUBFEED is the name of a subfeed, or ~ and the
    hash of the name; without any, all that this node holds.
    """
    from ..client.copies import check_destination, write_to
    from ..client.feeds import load_feed
    from ..client.place import local_settings

    if dest is not None and to_store:
        raise InvalidArgument(what="Give --dest or --store, not both.")
    source = load_feed(feed_name)
    names = [_subfeed_name(name) for name in subfeeds] or _names_of(source)
    if to_store:
        snapshot = source.create_snapshot(names)
        emit({"uri": snapshot.uri, "subfeeds": len(names)}, snapshot.uri, as_json)
        return
    if dest is not None:
        check_destination(dest, local_settings().storage_dir)
    text = json.dumps(source.export(names), allow_nan=False, separators=(",", ":")) + "\n"
    if dest is None:
        click.echo(text, nl=False)
        return
    write_to(text.encode("ascii"), dest)
    emit({"path": dest, "subfeeds": len(names)}, dest, as_json)


@feed.command(short_help="Check every signature of a feed, message by message.")
@click.argument("target", metavar="TARGET")
@click.argument("subfeeds", nargs=-1, metavar="[SUBFEED...]")
@json_option
@command_errors
def verify(target: str, subfeeds: tuple[str, ...], as_json: bool) -> None:
    """Check every signature of a feed, message by message, and that nothing was left out or moved.

    TARGET is a file that feed export wrote (no node is needed for it), the content URI of a snapshot, or a FEED of
    which this node holds messages. Prints a line for each subfeed, and both signed messages of a fork. The exit code
    is 6 when anything is wrong.
    """
    from ..client.feed_checks import check_subfeed

    source = _verifiable(target)
    exit_code = 0
    rows = []
    for name in [_subfeed_name(name) for name in subfeeds] or _names_of(source):
        found = check_subfeed(source, name)
        row = {"uri": found.uri, "count": found.total, "first": found.first_ms, "last": found.last_ms,
               "forks": found.forks}
        if found.error is not None:
            exit_code = exit_code or found.error.exit_code
            show_error(found.error)
            row |= found.error.to_dict()
        rows.append(row)
        if not as_json:
            emit(None, _verified_text(row), as_json=False)
    if as_json:
        emit(rows, "", as_json=True)
    if exit_code:
        sys.stdout.flush()
        sys.exit(exit_code)


@feed.command("list", short_help="List the feeds of this node, and those it holds copies of.")
@json_option
@command_errors
def list_(as_json: bool) -> None:
    """List the feeds of this node, and those it holds copies of, each with its subfeeds."""
    from ..client.feeds import list_feeds

    found = list_feeds()
    emit(found, lambda: "\n".join(map(_feed_text, found)), as_json)


@feed.command(short_help="Show a feed and its subfeeds.")
@click.argument("feed_name", metavar="FEED")
@json_option
@command_errors
def info(feed_name: str, as_json: bool) -> None:
    """Show a feed and its subfeeds. For FEED see kachery-fast feed --help."""
    from ..client.feeds import load_feed

    found = load_feed(feed_name).describe()
    emit(found, lambda: _feed_text(found), as_json)


@feed.command(short_help="Delete a feed from this node.")
@click.argument("feed_name", metavar="FEED")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@command_errors
def delete(feed_name: str, yes: bool, as_json: bool) -> None:
    """Delete a feed from this node: its messages, and its key if this node owns it.

    Without the key nobody can ever append to the feed again. Copies on other nodes stay.
    """
    from ..client.feeds import delete_feed, load_feed

    uri = load_feed(feed_name).uri
    if not yes:
        click.confirm(f"Delete {uri} and all of its messages from this node?", abort=True, err=True)
    delete_feed(uri)
    emit({"uri": uri, "deleted": True}, f"Deleted {uri}", as_json)


# --- names


def _subfeed(text: str, channel: str | None) -> Subfeed:
    """Return the subfeed that a user names.

    :raises InvalidArgument: it names none.
    """
    from ..client.feeds import load_feed, load_subfeed

    if "://" in text:
        return load_subfeed(text, channel=channel)
    feed_name, slash, name = text.partition("/")
    if not slash or not name:
        raise InvalidArgument(what=f"{text!r} names no subfeed: write FEED/SUBFEED, or feed://<feed id>/<subfeed>.")
    return load_feed(feed_name).load_subfeed(_subfeed_name(name), channel=channel)


def _subfeed_name(text: str) -> Any:
    """Return a subfeed's name: a dict where the text is that of one."""
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(what=f"{text[:100]!r} is not a subfeed's name: it is not JSON ({error}).") from None


def _names_of(source: Feed) -> list[Any]:
    return [f"~{row['subfeed']}" if row["name"] is None else row["name"] for row in source.describe()["subfeeds"]]


def _verifiable(target: str) -> Feed:
    from ..client.feed_checks import load_export
    from ..client.feeds import load_feed
    from ..protocol.names import is_node_id

    if target.startswith(("feed://", "sha1://")) or is_node_id(target) or not Path(target).exists():
        return load_feed(target)
    return load_export(target)


# --- texts


def _feed_text(found: dict[str, Any]) -> str:
    kind = "" if found["writable"] else "  (of another node)"
    lines = [f"feed://{found['feedId']}{'  ' + found['name'] if found['name'] else ''}{kind}"]
    for row in found["subfeeds"]:
        name = f"~{row['subfeed']}" if row["name"] is None else row["name"]
        fork = "" if row["forkedAt"] is None else f", forked at {row['forkedAt']}"
        lines.append(f"  {name if isinstance(name, str) else json_line(name)}  {row['count']} messages{fork}")
    return "\n".join(lines)


def _verified_text(row: dict[str, Any]) -> str:
    lines = []
    if row["count"] or "error" not in row:
        span = f", from {_time(row['first'])} to {_time(row['last'])}" if row["count"] else ""
        lines.append(f"ok  {row['uri']}  {row['count']} messages{span}")
    for fork in row["forks"]:
        lines += [f"  forked at {fork['number']}:", *(f"    {json_line(fork[which])}" for which in ("first", "second"))]
    return "\n".join(lines)


def _time(time_ms: int) -> str:
    try:
        return datetime.fromtimestamp(time_ms / 1000, tz=timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return str(time_ms)
