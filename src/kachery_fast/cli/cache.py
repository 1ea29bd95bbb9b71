"""Commands on what the local store keeps: ls, gc, pin, unpin, rm, trash."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from ..errors import CacheElsewhere, CacheOfAnother, DiskError
from .output import command_errors, emit, human_size, json_option, size_of

if TYPE_CHECKING:
    from ..config import Settings
    from ..store.eviction import CacheKeeper, Listed

__all__ = ["gc", "ls", "pin", "rm", "trash", "unpin"]

_DAY_SECONDS = 86400.0

uris_argument = click.argument("uris", nargs=-1, required=True, metavar="URI...")


@click.command(short_help="List the files of the local store.")
@click.option("--cached", is_flag=True, help="Only copies fetched from a channel; the others are not evicted.")
@click.option("--originals", is_flag=True, help="Only files that were stored on this machine.")
@click.option("--linked", is_flag=True, help="Only links.")
@click.option("--pinned", is_flag=True, help="Only what is pinned, of these.")
@click.option("--long", "-l", "as_table", is_flag=True, help="Show also size, kind, pin and last use.")
@json_option
@command_errors
def ls(cached: bool, originals: bool, linked: bool, pinned: bool, as_table: bool, as_json: bool) -> None:
    """List the files of the local store, in the order of the SHA-1; manifests are files too.

    --cached, --originals and --linked may be given together. With --json each line is an object: a store of millions is
    listed as it is read. Which files are copies, and which are pinned, is known to the owner of the storage directory
    alone; to others all are originals.
    """
    _, keeper = _keeper()
    _tell_unknown(keeper)
    kinds = {kind for kind, wanted in (("cached", cached), ("original", originals), ("linked", linked)) if wanted}
    for found in keeper.list():
        if (kinds and found.kind.value not in kinds) or (pinned and not found.pinned):
            continue
        if as_json:
            click.echo(json.dumps({"uri": f"sha1://{found.sha1}", "size": found.size, "kind": found.kind.value,
                                   "pinned": found.pinned, "usedMs": found.used_ms}))
        else:
            click.echo(_row(found) if as_table else f"sha1://{found.sha1}")


@click.command(short_help="Evict cached copies until they are within their bound.")
@click.option("--dry-run", is_flag=True, help="Change nothing, and list what would go.")
@click.option("--to", "size", metavar="SIZE", help="The bound, such as 50GiB, 500MB or 0; without it the settings'.")
@click.option("--now", "at_once", is_flag=True, help="Delete at once, past the trash: this frees the disk.")
@json_option
@command_errors
def gc(dry_run: bool, size: str | None, at_once: bool, as_json: bool) -> None:
    """Evict cached copies until they are within their bound, old and large ones first.

    Only copies that were fetched from a channel go. What was stored on this machine, is linked, pinned, or was used
    within KACHERY_CACHE_KEEP_SECONDS stays. Copies go to the trash, which still takes room on the disk, unless --now is
    given or the disk has less than 5 % free.
    """
    from ..store.quota import quota_of

    settings, keeper = _keeper()
    bound = quota_of(settings.storage_dir, settings.cache_size_bytes_max) if size is None else size_of(size, "--to")
    before = keeper.index.totals().bytes
    if bound is None:
        emit({"files": 0, "bytes": 0, "cachedBytes": before, "boundBytes": None, "dryRun": dry_run, "copies": [],
              "failed": 0, "reasons": []},
             f"No bound is set, so nothing is evicted; {human_size(before)} are cached. Set "
             "KACHERY_CACHE_SIZE_BYTES_MAX, or give --to.", as_json)
        return
    copies: list[dict[str, Any]] = []

    def show(copy: Any) -> None:
        if as_json:
            copies.append({"uri": f"sha1://{copy.sha1}", "size": copy.size, "usedMs": copy.used_ms})
        elif dry_run:
            click.echo(f"sha1://{copy.sha1}  {human_size(copy.size)}, last used {_moment(copy.used_ms / 1000)}")

    done = keeper.evict(bound, now=time.time(), keep_seconds=settings.cache_keep_seconds, dry_run=dry_run,
                        at_once=at_once, on_copy=show)
    verb = "would be" if dry_run else "were"
    where = "deleted" if done.at_once else "moved to the trash"
    text = (f"{done.files} cached copies, {human_size(done.bytes)}, {verb} {where}; "
            f"{human_size(done.left_bytes)} {'would be' if dry_run else 'are'} left of at most {human_size(bound)}.")
    if done.left_bytes > bound:
        text += " The rest is pinned, or was used a moment ago" + (", or cannot be moved." if done.failed else ".")
    emit({"files": done.files, "bytes": done.bytes, "cachedBytes": done.left_bytes, "boundBytes": bound,
          "dryRun": dry_run, "copies": copies, "failed": done.failed, "reasons": list(done.reasons)}, text, as_json)
    if done.failed:
        click.echo(f"Error: {done.failed} copies could not be moved. " + " ".join(done.reasons), err=True)
        sys.stdout.flush()
        sys.exit(DiskError.exit_code)


@click.command(short_help="Keep files from being evicted and removed.")
@uris_argument
@json_option
@command_errors
def pin(uris: tuple[str, ...], as_json: bool) -> None:
    """Keep files of the local store from being evicted, and from being removed with rm."""
    _, keeper = _keeper()
    _each(uris, as_json, lambda sha1: {"pinned": True, "changed": keeper.pin(sha1)}, "pinned")


@click.command(short_help="Take pins away.")
@uris_argument
@json_option
@command_errors
def unpin(uris: tuple[str, ...], as_json: bool) -> None:
    """Take pins away. A file that was stored on this machine is not evicted without one either."""
    _, keeper = _keeper()
    _each(uris, as_json, lambda sha1: {"pinned": False, "changed": keeper.unpin(sha1)}, "unpinned")


@click.command(short_help="Remove files from the local store.")
@uris_argument
@click.option("--now", "at_once", is_flag=True, help="Delete at once, past the trash.")
@click.option("--force", is_flag=True, help="Also what was stored here, and may be nowhere else.")
@json_option
@command_errors
def rm(uris: tuple[str, ...], at_once: bool, force: bool, as_json: bool) -> None:
    """Remove files from the local store: cached copies, and links, whose files stay where they lie.

    A file that was stored on this machine is only removed with --force, a pinned one not at all. Files go to the trash,
    from which trash restore brings them back.
    """
    _, keeper = _keeper()
    _tell_unknown(keeper)
    _each(uris, as_json, lambda sha1: {"size": keeper.remove(sha1, at_once=at_once, force=force)}, "removed")


@click.group()
def trash() -> None:
    """List, restore and delete what was evicted or removed. The node deletes it after KACHERY_TRASH_KEEP_DAYS.

    What a program of 2022 left in sha1-trash is listed and restored as well; only trash empty deletes it.
    """


@trash.command("list", short_help="List what is in the trash.")
@json_option
@command_errors
def list_trash(as_json: bool) -> None:
    """List what is in the trash, each with its size and since when. With --json each line is an object."""
    _, keeper = _keeper()
    for found in keeper.list_trash():
        if as_json:
            click.echo(json.dumps({"uri": f"sha1://{found.sha1}", "size": found.size, "since": found.since,
                                   "old": found.old}))
        else:
            click.echo(f"sha1://{found.sha1}  {human_size(found.size)}, since {_moment(found.since)}"
                       + (", in sha1-trash" if found.old else ""))


@trash.command(short_help="Bring files back from the trash.")
@uris_argument
@json_option
@command_errors
def restore(uris: tuple[str, ...], as_json: bool) -> None:
    """Bring files back from the trash, having read them. They are not evicted again by themselves.

    A file that the store has is kept as it is, and counts as stored here; what the trash had is dropped.
    """
    _, keeper = _keeper()

    def act(sha1: str) -> dict[str, Any]:
        done = keeper.restore(sha1)
        words = {"text": f"kept      sha1://{sha1}: the store has it"} if done.was_there else {}
        return {"path": str(done.path), "wasThere": done.was_there, **words}

    _each(uris, as_json, act, "restored")


@trash.command(short_help="Delete what is in the trash.")
@click.option("--older-than-days", type=click.FloatRange(min=0), default=0.0, metavar="DAYS",
              help="Only what has been there for so long.")
@json_option
@command_errors
def empty(older_than_days: float, as_json: bool) -> None:
    """Delete what is in the trash, for good; also what a program of 2022 left in sha1-trash."""
    _, keeper = _keeper()
    before = time.time() - older_than_days * _DAY_SECONDS if older_than_days else float("inf")
    files, size = keeper.empty_trash(before=before, old=True)
    emit({"files": files, "bytes": size}, f"{files} files, {human_size(size)}, were deleted.", as_json)


def _keeper() -> tuple[Settings, CacheKeeper]:
    from ..client.place import find_place
    from ..store.eviction import CacheKeeper

    place = find_place()
    return place.settings, CacheKeeper(place.settings.storage_dir, machine=place.machine)


def _tell_unknown(keeper: CacheKeeper) -> None:
    if keeper.index.exists:
        try:
            keeper.index.check_mine()
        except CacheOfAnother as error:
            click.echo(f"Note: only {error.details['owner']} can see which files are cached copies or pinned; all "
                       "count as stored here.", err=True)
        except CacheElsewhere as error:
            click.echo(f"Note: only on {error.details['machine']}, the machine of the node, is known which files are "
                       "cached copies or pinned; all count as stored here.", err=True)


def _each(uris: tuple[str, ...], as_json: bool, act: Callable[[str], dict[str, Any]], done: str) -> None:
    from ..protocol.names import parse_file_uri
    from .files import Answers

    answers = Answers(as_json)
    for uri in uris:
        answers.attempt({"uri": uri}, lambda uri=uri: {  # type: ignore[misc]
            "text": f"{done}  {uri}", **act(parse_file_uri(uri).sha1)})
    answers.end()


def _row(found: Listed) -> str:
    size = "-" if found.size is None else human_size(found.size)
    used = "" if found.used_ms is None else f"  last used {_moment(found.used_ms / 1000)}"
    return f"sha1://{found.sha1}  {size:>11}  {found.kind.value:8}  {'pinned' if found.pinned else '':6}{used}".rstrip()


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M")
