"""Files by content URI: store, link, load, read a range, verify, ask why not.

What is in the local store is read from there, without a node. Storing goes straight into the store where this user
may write it, else through the node. Whatever else is wanted comes from a channel, by the node.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .._version import __version__
from ..config import Settings, load_settings
from ..errors import (
    DiskError,
    InvalidArgument,
    KacheryError,
    LinkInvalid,
    NoChannel,
    NodeNotRunning,
    NotInStore,
)
from ..protocol.names import FileUri, check_channel_name, parse_file_uri
from ..store import FileStore, Located, Verified
from ..store.disk import SourceFile, source_errors, translated
from .connection import NodeConnection
from .copies import SomePath, check_destination, copy_to
from .progress import Progress, ProgressCallback

__all__ = [
    "Loaded",
    "chosen_label",
    "info",
    "link_file",
    "load",
    "load_bytes",
    "load_file",
    "open_range",
    "store_bytes",
    "store_file",
    "store_files",
    "store_pieces",
    "verify",
    "verify_all",
    "why",
]

_SPAN_SIZE_BYTES = 8 * 1024 * 1024


class Loaded(NamedTuple):
    """A file that is here now.

    ``path`` is where, ``size`` its bytes, ``source`` "store" when it was here already and "channel" when it was
    fetched, ``seconds`` how long that took.
    """

    uri: str
    path: str
    size: int
    sha1: str
    source: str
    seconds: float


# --- storing


def store_file(path: SomePath, basename: str | None = None, *, label: str | None = None,
               progress: ProgressCallback | None = None) -> str:
    """Copy a file into the local store and return its content URI. Nothing is uploaded before somebody asks for it.

    :param path: the file; it must not change meanwhile.
    :param basename: the label in the URI, by its 2022 name; without either, the file's own name.
    :param label: the same.
    :param progress: called with the bytes done and in all, as the file is read.
    :raises LocalFileMissing, LocalFileUnreadable, NotADataFile, FileChanged: there is nothing to store.
    :raises DiskFull, DiskError: the store cannot take it.
    :raises NodeNotRunning: this user may not write the store, and there is no node that may.
    """
    label = chosen_label(label, basename, os.path.basename(os.fspath(path)))  # noqa: PTH119 - no Path needed
    settings = load_settings()
    if may_write(settings.storage_dir):
        stored = _store(settings).put_file(path, progress=_with_total(progress, path))
        return str(FileUri(stored.sha1, label, stored.manifest_sha1))
    with SourceFile(path) as source:
        uri = _store_by_node(settings, lambda: _source_pieces(source, progress), source.size, label)
        source.check_unchanged(source.size)
    return uri


def store_files(paths: Iterable[SomePath], *,
                on_done: Callable[[SomePath, str | KacheryError], None] | None = None) -> list[str | KacheryError]:
    """Copy many files into the store, small ones in batches; return for each its URI, or the error of that file.

    :param on_done: called with each path and its answer, batch by batch.
    :raises DiskFull, DiskError: the store cannot be written to at all.
    """
    settings = load_settings()
    paths = list(paths)
    if not may_write(settings.storage_dir):
        answers = []
        for path in paths:
            answers.append(_attempt(path))
            if on_done is not None:
                on_done(path, answers[-1])
        return answers

    def finished(path: Any, result: Any) -> None:
        if on_done is not None:
            on_done(path, _uri_or_error(path, result))

    results = _store(settings).put_files(paths, on_done=finished)
    return [_uri_or_error(path, result) for path, result in zip(paths, results, strict=True)]


def link_file(path: SomePath, basename: str | None = None, *, label: str | None = None,
              progress: ProgressCallback | None = None) -> str:
    """Make a file part of the store where it lies, and return its content URI. It must not be changed from then on.

    :param path, basename, label, progress: as ``store_file``.
    :raises LocalFileMissing, LocalFileUnreadable, NotADataFile, FileChanged: there is nothing to link.
    :raises DiskError: the store cannot be written to.
    """
    label = chosen_label(label, basename, os.path.basename(os.fspath(path)))  # noqa: PTH119
    stored = _store(load_settings()).link_file(path, progress=_with_total(progress, path))
    return str(FileUri(stored.sha1, label, stored.manifest_sha1))


def store_bytes(data: bytes, label: str) -> str:
    """Store bytes and return their content URI.

    :raises DiskFull, DiskError, NodeNotRunning: as ``store_file``.
    """
    settings = load_settings()
    if may_write(settings.storage_dir):
        stored = _store(settings).put_bytes(data)
        return str(FileUri(stored.sha1, label, stored.manifest_sha1))
    return _store_by_node(settings, lambda: [data], len(data), label)


def store_pieces(make_pieces: Callable[[], Iterable[Any]], size_bytes: int, label: str) -> str:
    """Store the bytes of buffers, one after the other, from their own memory; return the content URI.

    :param make_pieces: returns the buffers, ``size_bytes`` in all; the node may need them twice.
    :raises DiskFull, DiskError, NodeNotRunning: as ``store_file``.
    """
    settings = load_settings()
    if may_write(settings.storage_dir):
        stored = _store(settings).put_stream(make_pieces())
        return str(FileUri(stored.sha1, label, stored.manifest_sha1))
    return _store_by_node(settings, make_pieces, size_bytes, label)


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


def _store_by_node(settings: Settings, make_body: Callable[[], Iterable[Any]], size: int, label: str) -> str:
    try:
        answer = NodeConnection(settings).store(make_body, size)
    except NodeNotRunning as error:
        raise NodeNotRunning(url=error.details.get("url"), why=(
            f"{error.details.get('why')}; it is needed because you may not write {settings.storage_dir}")) from error
    return str(FileUri(str(answer["sha1"]), label, answer.get("manifestSha1")))


def _source_pieces(source: SourceFile, progress: ProgressCallback | None) -> Iterator[bytes]:
    position = 0
    with source_errors(source.path):
        while position < source.size:
            piece = os.pread(source.fd, min(_SPAN_SIZE_BYTES, source.size - position), position)
            if not piece:
                source.check_unchanged(position)
            position += len(piece)
            yield piece
            if progress is not None:
                progress(Progress(position, source.size))


def _with_total(progress: ProgressCallback | None, path: SomePath) -> Callable[[int], None] | None:
    if progress is None:
        return None
    total: int | None = None
    with suppress(OSError, ValueError):
        total = os.stat(path).st_size  # noqa: PTH116
    return lambda done: progress(Progress(done, total))


# --- loading


def load_file(uri: str, dest: SomePath | None = None, local_only: bool = False, channel: str | None = None, *,
              progress: ProgressCallback | None = None) -> str:
    """Return the path of a file, fetched from a channel when it is not in the local store.

    :param uri: ``sha1://…``, or 40 hex digits.
    :param dest: where to put a copy; it replaces a file of that name, at once and whole. Its path is returned then;
        without it the path of the store's own file, which must not be written to.
    :param local_only: look in the local store alone.
    :param channel: the channel to ask on; without it the one of the setting KACHERY_CHANNEL.
    :param progress: called about four times a second while the file comes in.
    :raises InvalidUri, InvalidName: the URI or channel is malformed.
    :raises NotInStore: ``local_only``, and it is not there.
    :raises NoChannel: it is not in the store, and no channel is named.
    :raises NodeNotRunning, ClientAuthRefused: there is no node to ask.
    :raises NotAvailable, NotPermitted, ChannelUnknown and others: the node could not get it, and why.
    :raises DiskFull, DiskError, NotADataFile: ``dest`` cannot be written.
    """
    return load(uri, dest=dest, local_only=local_only, channel=channel, progress=progress).path


def load(uri: str, *, dest: SomePath | None = None, local_only: bool = False, channel: str | None = None,
         progress: ProgressCallback | None = None) -> Loaded:
    """Do as ``load_file``, and return also the size, where it came from, and how long that took."""
    begun = time.monotonic()
    settings = load_settings()
    file_uri = parse_file_uri(uri)
    if dest is not None:
        check_destination(dest)
    try:
        located = _store(settings).find(file_uri.sha1)
        path, size, source = str(located.path), located.size, "store"
    except (NotInStore, LinkInvalid) as error:
        if local_only:
            raise
        asked = _chosen_channel(settings, channel, uri, error)
        answer = NodeConnection(settings).load(uri, asked, progress)
        path, size, source = str(answer["path"]), int(answer["size"]), str(answer.get("source", "channel"))
    if dest is not None:
        copy_to(path, dest)
        path = os.fspath(dest)
    return Loaded(uri, path, size, file_uri.sha1, source, time.monotonic() - begun)


def load_bytes(uri: str, start: int | None = None, end: int | None = None, *, channel: str | None = None) -> bytes:
    """Return bytes ``start`` (0) to ``end`` (exclusive; the file's end) of a file.

    Of a file that is not here, only the chunks that hold those bytes are fetched.

    :param channel: as ``load_file``, which also lists what else may be raised.
    :raises InvalidArgument: the range is not within the file.
    """
    with closing(open_range(uri, start, end, channel=channel)) as pieces:
        return b"".join(pieces)


def open_range(uri: str, start: int | None = None, end: int | None = None, *,
               channel: str | None = None) -> Generator[bytes, None, None]:
    """Yield the bytes of ``load_bytes`` piece by piece, in bounded memory. Close the generator to withdraw it."""
    settings = load_settings()
    file_uri = parse_file_uri(uri)
    start = 0 if start is None else start
    if start < 0 or (end is not None and end < start):
        raise InvalidArgument(what=f"Bytes {start} to {end} are not a range: use 0 <= start <= end.")
    try:
        file = _store(settings).open(file_uri.sha1)
    except (NotInStore, LinkInvalid) as error:
        asked = _chosen_channel(settings, channel, uri, error)
        yield from _read_by_node(settings, uri, asked, start, end)
        return
    with file:
        size = os.fstat(file.fileno()).st_size
        end = size if end is None else end
        if end > size or start > size:
            raise InvalidArgument(what=f"Bytes {start} to {end} are not within {uri}, which has {size}.")
        with translated("reading", uri):
            file.seek(start)
        while start < end:
            with translated("reading", uri):
                piece = file.read(min(_SPAN_SIZE_BYTES, end - start))
            if not piece:
                raise DiskError(action="reading", path=uri, why=f"it ends at byte {start} of {end}")
            start += len(piece)
            yield piece


def _read_by_node(settings: Settings, uri: str, channel: str, start: int, end: int | None) -> Iterator[bytes]:
    with NodeConnection(settings).read(uri, channel, start, end) as answer:
        if end is not None and answer.remaining_bytes is not None and answer.remaining_bytes < end - start:
            raise InvalidArgument(what=f"Bytes {start} to {end} are not within {uri}, which has "
                                       f"{start + answer.remaining_bytes} or fewer.")
        while piece := answer.read(1024 * 1024):
            yield piece


def _chosen_channel(settings: Settings, channel: str | None, uri: str, error: KacheryError) -> str:
    """Return the channel to ask on.

    :raises NoChannel: there is none; or LinkInvalid, ``error``, which says more.
    """
    chosen = settings.channel if channel is None else channel
    if not chosen:
        if isinstance(error, LinkInvalid):
            raise error
        raise NoChannel(uri=uri) from error
    return check_channel_name(chosen)


# --- asking


def verify(uri: str, *, progress: ProgressCallback | None = None) -> Located:
    """Read all bytes of a file in the local store and check that they have the name that ``uri`` says.

    :return: where it is.
    :raises NotInStore, LinkInvalid: it is not here.
    :raises CorruptFile: it is damaged; the error says what to do.
    """
    store = _store(load_settings())
    located = store.find(parse_file_uri(uri).sha1)
    return store.verify(located.sha1, progress=_with_total(progress, located.path))


def verify_all(on_result: Callable[[str, Located | KacheryError], None]) -> Verified:
    """Verify every file of the local store.

    :param on_result: called with each SHA-1, and where it is or what is wrong with it.
    :return: how many were sound and damaged, and the bytes read.
    """
    return _store(load_settings()).verify_all(on_result=on_result)


def why(uri: str, *, channel: str | None = None) -> dict[str, Any]:
    """Return where a file is or why it cannot be had, without loading it.

    :param channel: ask on this one alone; without it, and without KACHERY_CHANNEL, on all channels of the node.
    :return: ``uri``, ``verdict``, ``store`` (texts) and ``channels``: for each its ``bucket``, who was ``asked``, and
        the ``answers``.
    :raises NodeNotRunning, ClientAuthRefused: it is not in the local store, and there is no node to ask.
    """
    settings = load_settings()
    file_uri = parse_file_uri(uri)
    chosen = channel or settings.channel or None
    if chosen is not None:
        check_channel_name(chosen)
    try:
        return NodeConnection(settings).why(uri, chosen)
    except NodeNotRunning:
        try:
            located = _store(settings).find(file_uri.sha1)
        except NotInStore:
            located = None
        if located is None:
            raise
    text = f"linked in place at {located.path}" if located.linked else f"at {located.path}"
    return {"uri": uri, "verdict": "It is in the local store.", "store": f"{located.size} bytes {text}",
            "channels": []}


def info() -> dict[str, Any]:
    """Return the version, the storage directory and what it holds, the default channel, and the node's state.

    ``node`` is None when no node answers; ``nodeWhy`` says why then.
    """
    settings = load_settings()
    totals = _store(settings).totals()
    node: dict[str, Any] | None = None
    reason: str | None = None
    try:
        node = NodeConnection(settings).info()
    except KacheryError as error:
        reason = str(error)
    return {
        "version": __version__,
        "storageDir": str(settings.storage_dir),
        "channel": settings.channel,
        "store": totals._asdict(),
        "node": node,
        "nodeWhy": reason,
    }


def _store(settings: Settings) -> FileStore:
    return FileStore(settings.storage_dir, chunk_size_bytes=settings.chunk_size_bytes,
                     fingerprint_size_bytes=settings.fingerprint_size_bytes)
