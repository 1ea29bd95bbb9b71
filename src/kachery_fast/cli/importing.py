"""The command import: everything of a storage directory of 2022, into the one of this machine."""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import Settings, load_settings
from ..errors import DiskError, InvalidArgument, LocalFileMissing, NodeError
from .output import command_errors, emit, human_size, json_option, progress_bar, quiet_option

if TYPE_CHECKING:
    from ..client.progress import ProgressCallback
    from ..store.tally import Tally

__all__ = ["import_directory"]

# The exit code where something was refused: damaged or changed data.
_REFUSED_EXIT_CODE = 6


@click.command("import", short_help="Take files, mutables and feeds from a directory of 2022.")
@click.argument("directory", metavar="DIR")
@click.option("--dry-run", is_flag=True, help="Read and check everything, say what would be taken, and change nothing.")
@quiet_option
@json_option
@command_errors
def import_directory(directory: str, dry_run: bool, quiet: bool, as_json: bool) -> Any:
    """Take what the storage directory DIR of a daemon of 2022 holds into the one of this machine.

    Files are copied, links made anew to the same files, each when its bytes have its name; mutables and feeds are added
    to those that are here, and nothing that is here is replaced, except a file that is found to be damaged when it is
    read: its bytes go to damaged/ in the storage directory. Feeds stay writable, so do not let the other daemon append
    to them any more. DIR itself is only read, and the identity of its node is not taken: this node keeps its own. Stop
    the node of this machine first, or the feeds are refused.

    The exit code is 6 when something was refused; the rest was taken. It may be repeated.
    """
    settings = load_settings()
    source = Path(directory).absolute()
    _check_directory(source, settings.storage_dir)
    _check_machine()
    with progress_bar("reading", hidden=quiet or as_json) as show:
        tally = _import(source, settings, dry_run, show)
    emit({"dryRun": dry_run, **tally.to_dict()}, lambda: _text(tally, dry_run), as_json)
    if tally.refused:
        sys.stdout.flush()
        sys.exit(_REFUSED_EXIT_CODE)


def _check_machine() -> None:
    from ..client.place import find_place

    place = find_place()
    if place.machine:
        raise InvalidArgument(what=f"{place.settings.storage_dir} is the store of the node on {place.machine}, and its "
                                   "databases must not be opened from two machines. Run this there.")


def _check_directory(source: Path, storage_dir: Path) -> None:
    if not source.is_dir():
        raise LocalFileMissing(path=str(source))
    if storage_dir.exists() and source.resolve() == storage_dir.resolve():
        raise InvalidArgument(what=f"{source} is the storage directory of this machine itself. What is in it is taken "
                                   "over when its node starts: kachery-fast node start")
    if not any((source / name).exists() for name in ("sha1", "mutables.db", "feeds.db")):
        raise InvalidArgument(what=f"{source} is no storage directory: it has neither sha1/ nor mutables.db nor "
                                   "feeds.db.")


def _import(source: Path, settings: Settings, dry_run: bool, show: ProgressCallback | None) -> Tally:
    from ..client.progress import Progress
    from ..store.importing import FileImport
    from ..store.takeover import take_over
    from ..store.tally import Tally

    def report(done_bytes: int) -> None:
        if show is not None:
            show(Progress(done_bytes, None, ""))

    tally = Tally()
    FileImport(source, settings.storage_dir, tally, chunk_size_bytes=settings.chunk_size_bytes,
               fingerprint_size_bytes=settings.fingerprint_size_bytes, dry_run=dry_run, progress=report).run()
    for name in ("kachery-fast-mutables.db", "kachery-fast-feeds.db"):
        if (source / name).exists():
            tally.refuse(str(source / name), "it is of kachery-fast itself, and not taken: two nodes that append to "
                                             "one feed would fork it")
    with (_feed_log_lock(settings.storage_dir, dry_run) as free,
          _target(source, settings.storage_dir, dry_run, with_feeds=free) as root):
        return take_over(source, root, mutable_size_bytes_max=settings.mutable_size_bytes_max,
                         message_size_bytes_max=settings.feed_message_size_bytes_max, with_feeds=free, tally=tally)


@contextmanager
def _feed_log_lock(storage_dir: Path, dry_run: bool) -> Iterator[bool]:
    """Keep a node from starting meanwhile, and yield whether none runs."""
    from ..node.identity import DirectoryLock

    if dry_run and not (storage_dir / ".node.lock").exists():
        yield True
        return
    storage_dir.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(storage_dir)
    try:
        lock.acquire()
    except NodeError:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def _target(source: Path, storage_dir: Path, dry_run: bool, *, with_feeds: bool) -> Iterator[Path]:
    """Yield where to write mutables and feeds: for a dry run into copies, so that it counts as the real one does."""
    if not dry_run:
        yield storage_dir
        return
    names = ["kachery-fast-mutables.db"] if (source / "mutables.db").exists() else []
    if with_feeds and (names or (source / "feeds.db").exists()):
        names.append("kachery-fast-feeds.db")
    with tempfile.TemporaryDirectory(prefix="kachery-fast-") as scratch:  # mode 0700: there are keys in it
        for name in names:
            if (storage_dir / name).exists():
                _copy_database(storage_dir / name, Path(scratch) / name)
        yield Path(scratch)


def _copy_database(source: Path, target: Path) -> None:
    """Copy a database as it is at one moment, though a node may write to it."""
    # Where there is no log nobody has it open, and SQLite need not make one; else it takes its locks.
    log = source.with_name(source.name + "-wal")
    uri = f"{source.absolute().as_uri()}?mode=ro{'' if log.exists() else '&immutable=1'}"
    try:
        target.touch(mode=0o600)  # it holds keys
        with closing(sqlite3.connect(uri, uri=True)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)
    except (OSError, sqlite3.Error) as error:
        raise DiskError(action="the copying", path=str(source), why=str(error)) from None


def _text(tally: Tally, dry_run: bool) -> str:
    word = "to take" if dry_run else "taken"
    lines = []
    for kind in ("files", "links", "mutables", "feeds", "messages"):
        count = getattr(tally, kind)
        size = f" ({human_size(count.size_bytes)})" if kind in ("files", "links") else ""
        lines.append(f"{kind + ':':10}{count.taken} {word}{size}, {count.here} here already")
    word = "to replace" if dry_run else "replaced"
    lines += [f"{word}: sha1://{sha1}: the file here is damaged{'' if dry_run else ', and was moved to damaged/'}"
              for sha1 in tally.replaced]
    lines += [f"refused: {what}: {why}" for what, why in tally.refused]
    return "\n".join(lines)
