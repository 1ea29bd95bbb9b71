"""Files that the node has, or brings: where they are here, or their bytes through its API."""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path

from ..config import Settings
from ..errors import FileElsewhere, InvalidArgument, LinkInvalid, NodeError, NotInStore
from ..protocol.names import parse_file_uri
from ..store import FileStore, Located
from ..store.layout import Layout
from .connection import NodeConnection
from .copies import SomePath, receive_to
from .place import PlaceKind, find_place
from .progress import Progress, ProgressCallback
from .storing import open_store

__all__ = ["check_range", "load_by_node", "read_by_node"]

# A network file system shows what another machine has written only after a while, unless it is made to look anew.
_SEEN_SECONDS = 5.0
_SEEN_PAUSE_SECONDS = 0.05
_ADVICE = "Have the node verify its store with: kachery-fast verify"
_TAKING_OVER = "taking it over from the node"


def load_by_node(settings: Settings, uri: str, channel: str | None, dest: SomePath | None,
                 progress: ProgressCallback | None) -> tuple[str, int, str]:
    """Have the node bring a file into its store, and return its path here, its size, and where the node had it from.

    The node tells a path of its machine. Here the file is in the local store, where that is the same directory,
    whatever the path that it is mounted at; else it is at the node's path, if it has the right name; else it is
    fetched through the node's API, as a cached copy. A file that is linked on the node's machine has no place in a
    store that is shared with it: its bytes go to ``dest`` alone.

    :param channel: None: only what the node has. :param dest: where a copy is wanted anyway.
    :raises FileElsewhere: it is linked there, and there is no ``dest``.
    :raises CorruptFile: the node sent other bytes; nothing was kept. For the rest see ``NodeConnection.load``.
    """
    answer = NodeConnection(settings).load(uri, channel or "", progress)
    sha1, size, path = parse_file_uri(uri).sha1, int(answer["size"]), Path(str(answer["path"]))
    source = str(answer.get("source", "channel"))
    place = find_place()
    store = open_store(settings, place.machine)
    linked = path.name != sha1
    shared = place.kind is PlaceKind.SHARED
    located = _see(store, sha1, patient=shared and not linked)
    if located is not None:
        return str(located.path), located.size, source
    if not linked and _is_here(path, size):
        return str(path), size, source
    with closing(read_by_node(settings, uri, channel, 0, None)) as pieces:
        if linked and shared:
            if dest is None:
                raise FileElsewhere(uri=uri, path=path, machine=settings.node_host, size=size)
            receive_to(_told(pieces, size, progress), size, dest, sha1, source=f"what the node sent of {uri}",
                       advice=_ADVICE)
            return os.fspath(dest), size, source
        with store.stream_writer(expected_size_bytes=size) as writer:
            for piece in _told(pieces, size, progress):
                writer.write(piece)
            located = writer.adopt(sha1, source=f"what the node sent of {uri}", advice=_ADVICE)
    return str(located.path), located.size, source


def _told(pieces: Generator[bytes, None, None], size: int,
          progress: ProgressCallback | None) -> Generator[bytes, None, None]:
    done = 0
    for piece in pieces:
        yield piece
        done += len(piece)
        if progress is not None:
            progress(Progress(done, size, _TAKING_OVER))


def _see(store: FileStore, sha1: str, *, patient: bool) -> Located | None:
    """Return where a file is in the local store, None when it is not there.

    :param patient: it has to be there, so look until it shows.
    """
    end = time.monotonic() + _SEEN_SECONDS
    while True:
        with suppress(NotInStore, LinkInvalid):
            return store.find(sha1)
        if not patient or time.monotonic() > end:
            return None
        # To list a directory is what makes a client of NFS look again for names that it has found to be missing.
        root = store.root
        for directory in reversed([place for place in Layout(root).file(sha1).parents if place.is_relative_to(root)]):
            with suppress(OSError), os.scandir(directory) as entries:
                next(entries, None)
        with suppress(NotInStore, LinkInvalid):
            return store.find(sha1)
        time.sleep(_SEEN_PAUSE_SECONDS)


def _is_here(path: Path, size: int) -> bool:
    """Whether a path of the node's machine is one of this machine too, and leads to a file of that size."""
    try:
        return os.access(path, os.R_OK) and path.stat().st_size == size
    except OSError:
        return False


def read_by_node(settings: Settings, uri: str, channel: str | None, start: int,
                 end: int | None) -> Generator[bytes, None, None]:
    """Yield the bytes ``start`` to ``end`` (None: the file's end) of a file, as the node has or fetches them.

    :raises InvalidArgument: they are not within the file. For the rest see ``NodeConnection.read``.
    """
    connection = NodeConnection(settings)
    with connection.read(uri, channel or "", start, end) as answer:
        # The node cuts the range at the file's end. Nothing left of it leaves open how long the file is.
        length = answer.remaining_bytes
        cut = length is not None and end is not None and length < end - start
        if length is not None and (cut or (start and not length)):
            check_range(uri, start, end, start + length if length or not start else
                         _size_by_node(connection, uri, channel))
        while piece := answer.read(1024 * 1024):
            yield piece


def _size_by_node(connection: NodeConnection, uri: str, channel: str | None) -> int:
    with connection.read(uri, channel or "", 0, None) as answer:  # its head alone; leaving takes the rest back
        if answer.remaining_bytes is None:
            raise NodeError(what=f"it does not say how long {uri} is")
        return answer.remaining_bytes


def check_range(uri: str, start: int, end: int | None, size: int) -> None:
    """:raises InvalidArgument: bytes ``start`` to ``end`` are not within a file of ``size`` bytes."""
    if max(start, end or 0) > size:
        what = f"Bytes from {start} on" if end is None else f"Bytes {start} to {end}"
        raise InvalidArgument(what=f"{what} are not within {uri}, which has {size} bytes.")
