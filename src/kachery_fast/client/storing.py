"""Storing files by content: from disk, from memory, or linked where they lie.

It goes straight into the local store where that is the node's, or where there is no node, and this user may write
there; else through the node.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config import Settings
from ..errors import CannotLink, ClientOffline, DiskError, InvalidArgument, KacheryError, NodeNotRunning
from ..protocol.names import FileUri
from ..store import FileStore
from ..store.disk import SourceFile, display, source_errors
from ..store.streams import byte_view
from .connection import NodeConnection
from .copies import SomePath
from .place import Place, PlaceKind, find_place
from .progress import Progress, ProgressCallback

__all__ = [
    "chosen_label",
    "link_file",
    "may_write",
    "open_store",
    "store_bytes",
    "store_file",
    "store_files",
    "store_pieces",
    "with_total",
]

_SPAN_SIZE_BYTES = 8 * 1024 * 1024


def store_file(path: SomePath, basename: str | None = None, *, label: str | None = None,
               progress: ProgressCallback | None = None) -> str:
    """Copy a file into the local store and return its content URI. Nothing is uploaded before somebody asks for it.

    :param path: the file; it must not change meanwhile.
    :param basename: the label in the URI, by its 2022 name; without either, the file's own name.
    :param label: the same.
    :param progress: called with the bytes done and in all, as the file is read.
    :raises LocalFileMissing, LocalFileUnreadable, NotADataFile, FileChanged: there is nothing to store.
    :raises DiskFull, DiskError: the store cannot take it.
    :raises NodeNotRunning, ClientAuthRefused: it has to go through the node, which does not answer or refuses.
    """
    label = chosen_label(label, basename, os.path.basename(os.fspath(path)))  # noqa: PTH119 - no Path needed
    place = find_place()
    if _stores_here(place):
        stored = open_store(place.settings, place.machine).put_file(path, progress=with_total(progress, path))
        return str(FileUri(stored.sha1, label, stored.manifest_sha1))
    with SourceFile(path) as source:
        return _store_by_node(place, lambda: _source_pieces(source, progress), source.size, label)


def store_files(paths: Iterable[SomePath], *,
                on_done: Callable[[SomePath, str | KacheryError], None] | None = None) -> list[str | KacheryError]:
    """Copy many files into the store, small ones in batches; return for each its URI, or the error of that file.

    :param on_done: called with each path and its answer, batch by batch.
    :raises DiskFull, DiskError: the store cannot be written to at all.
    """
    place = find_place()
    paths = list(paths)
    if not _stores_here(place):
        answers = []
        for path in paths:
            answers.append(_attempt(path))
            if on_done is not None:
                on_done(path, answers[-1])
        return answers

    def finished(path: Any, result: Any) -> None:
        if on_done is not None:
            on_done(path, _uri_or_error(path, result))

    results = open_store(place.settings, place.machine).put_files(paths, on_done=finished)
    return [_uri_or_error(path, result) for path, result in zip(paths, results, strict=True)]


def link_file(path: SomePath, basename: str | None = None, *, label: str | None = None,
              progress: ProgressCallback | None = None) -> str:
    """Make a file part of the store where it lies, and return its content URI. It must not be changed from then on.

    :param path, basename, label, progress: as ``store_file``.
    :raises LocalFileMissing, LocalFileUnreadable, NotADataFile, FileChanged: there is nothing to link.
    :raises DiskError: the store cannot be written to.
    :raises CannotLink: the local store is not the node's, which would not find the file.
    """
    label = chosen_label(label, basename, os.path.basename(os.fspath(path)))  # noqa: PTH119
    place = find_place()
    if place.kind is PlaceKind.APART:
        raise CannotLink(path=display(path), store=place.store, own=place.settings.storage_dir)
    stored = open_store(place.settings, place.machine).link_file(path, progress=with_total(progress, path))
    return str(FileUri(stored.sha1, label, stored.manifest_sha1))


def store_bytes(data: bytes, label: str) -> str:
    """Store bytes and return their content URI.

    :raises DiskFull, DiskError, NodeNotRunning: as ``store_file``.
    """
    place = find_place()
    if _stores_here(place):
        stored = open_store(place.settings, place.machine).put_bytes(data)
        return str(FileUri(stored.sha1, label, stored.manifest_sha1))
    return _store_by_node(place, lambda: [data], len(data), label)


def store_pieces(make_pieces: Callable[[], Iterable[Any]], size_bytes: int, label: str) -> str:
    """Store the bytes of buffers, one after the other, from their own memory; return the content URI.

    :param make_pieces: returns the buffers, ``size_bytes`` in all; the node may need them twice.
    :raises DiskFull, DiskError, NodeNotRunning: as ``store_file``.
    """
    place = find_place()
    if _stores_here(place):
        stored = open_store(place.settings, place.machine).put_stream(make_pieces())
        return str(FileUri(stored.sha1, label, stored.manifest_sha1))
    return _store_by_node(place, make_pieces, size_bytes, label)


def chosen_label(label: str | None, basename: str | None, default: str) -> str:
    """Return the label that a caller chose under either name.

    :raises InvalidArgument: both, and they differ.
    """
    if label is not None and basename is not None and label != basename:
        raise InvalidArgument(what=f"label={label!r} and basename={basename!r} name the same thing; give one of them.")
    chosen = label if label is not None else basename
    # A file's name may hold bytes that are not UTF-8; a URI cannot.
    return (default if chosen is None else chosen).encode("utf-8", "replace").decode("utf-8")


def may_write(storage_dir: Path) -> bool:
    """Whether this user may write the store, or make it where there is none yet."""
    try:
        rooms = [room for room in (storage_dir, storage_dir / "sha1", storage_dir / "tmp") if room.exists()]
        if not rooms:
            rooms = [next((parent for parent in storage_dir.parents if parent.exists()), storage_dir)]
    except OSError:  # not even to be looked at
        return False
    effective = os.access in os.supports_effective_ids
    return all(os.access(room, os.W_OK | os.X_OK, effective_ids=effective) for room in rooms)


def _stores_here(place: Place) -> bool:
    return place.kind is not PlaceKind.APART and may_write(place.settings.storage_dir)


def _attempt(path: SomePath) -> str | KacheryError:
    try:
        return store_file(path)
    except KacheryError as error:
        return error


def _uri_or_error(path: Any, result: Any) -> str | KacheryError:
    if isinstance(result, KacheryError):
        return result
    label = chosen_label(None, None, os.path.basename(os.fsdecode(path)))  # noqa: PTH119
    return str(FileUri(result.sha1, label, result.manifest_sha1))


def _store_by_node(place: Place, make_body: Callable[[], Iterable[Any]], size: int, label: str) -> str:
    settings = place.settings
    try:
        # As bytes: an array is neither true nor false, which http.client asks of each piece.
        answer = NodeConnection(settings).store(lambda: map(byte_view, make_body()), size)
    except ClientOffline as error:
        raise DiskError(action="the writing", path=settings.storage_dir, why=(
            "you may not write there, and no node is asked because KACHERY_OFFLINE_STORAGE_DIR is set")) from error
    except NodeNotRunning as error:
        otherwise = f"you may not write {settings.storage_dir}"
        raise NodeNotRunning(url=error.details.get("url"), why=(
            f"{error.details.get('why')}; it is needed because {place.why_node(otherwise)}")) from error
    return str(FileUri(str(answer["sha1"]), label, answer.get("manifestSha1")))


def _source_pieces(source: SourceFile, progress: ProgressCallback | None) -> Iterator[bytes]:
    """Yield the bytes of a file. The last ones only if it has not changed: a body without them the node throws away."""
    position = 0
    with source_errors(source.path):
        while position < source.size:
            piece = os.pread(source.fd, min(_SPAN_SIZE_BYTES, source.size - position), position)
            position += len(piece)
            if not piece or position == source.size:
                source.check_unchanged(position)
            yield piece
            if progress is not None:
                progress(Progress(position, source.size))


def with_total(progress: ProgressCallback | None, path: SomePath) -> Callable[[int], None] | None:
    """Return a callback for the store that tells ``progress`` also how long the file at ``path`` is."""
    if progress is None:
        return None
    total: int | None = None
    with suppress(OSError, ValueError):
        total = os.stat(path).st_size  # noqa: PTH116
    return lambda done: progress(Progress(done, total))


def open_store(settings: Settings, machine: str = "") -> FileStore:
    """Return the local store as the settings have it.

    :param machine: the one of the place, to write there.
    """
    return FileStore(settings.storage_dir, machine=machine, chunk_size_bytes=settings.chunk_size_bytes,
                     fingerprint_size_bytes=settings.fingerprint_size_bytes)
