"""A bucket that is a folder which the hub and the nodes share (``node/directory_bucket.py`` is the nodes' side).

Who may read and write there is a matter of the file system; the hub says, as of any bucket, which node may upload, and
nodes that are as they should be heed it. It sees neither what arrives nor what is read, but nodes note reads in the
files' access times, so unread objects can expire. Only below folders that the hub's admin has named
(``hub_bucket_folders``): an owner could else have the hub read, and remove, what is others'.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import msgspec

from ...config import Settings
from ...embedded.bucket_files import ObjectFiles
from ...embedded.bucket_mark import is_marked
from ...errors import EngineUnusable, InvalidArgument, KacheryError, ObjectMissing
from . import BucketTotals, ObjectRecord, SignedRead, SignedUrl
from .counting import Counts

__all__ = ["DIRECTORY", "DirectoryBucket", "DirectorySettings", "check_folder"]

DIRECTORY = "directory"


class DirectorySettings(msgspec.Struct, frozen=True, rename="camel"):
    """A folder. ``mark``: by which nodes know that it is what the hub means (``embedded.bucket_mark``)."""

    folder: str
    mark: str

    @property
    def public_reads(self) -> bool:
        """Whoever the file system lets read there may read; the hub is not asked."""
        return True

    @property
    def url_base(self) -> str:
        """What nodes are told: where it is, and its mark."""
        return f"file://{quote(self.folder)}#{self.mark}"


def check_folder(folder: str, settings: Settings) -> Path:
    """Return a folder that an owner may have as a bucket, without symbolic links in its path.

    :raises InvalidArgument: the hub's admin has named none above it, or it is not there.
    """
    if "\0" in folder:
        raise InvalidArgument(what="The path of a folder has no NUL in it.")
    path = Path(os.path.realpath(folder))
    allowed = [Path(os.path.realpath(name)) for name in settings.hub_bucket_folders.split(os.pathsep) if name]
    if not Path(folder).is_absolute():
        raise InvalidArgument(what=f"{folder!r} is not a whole path. Give it from / on, as all machines have it.")
    if not any(path == root or root in path.parents for root in allowed):
        raise InvalidArgument(what=f"The hub does not use {folder!r} as a bucket: its admin names folders for that "
                                   "with KACHERY_HUB_BUCKET_FOLDERS.")
    if not path.is_dir():
        raise InvalidArgument(what=f"There is no folder {folder!r} on the hub's machine. Make it, or mount it there.")
    return path


class DirectoryBucket:
    """A ``BucketEngine`` over such a folder.

    :param counter: runs what counts objects. :param clock: seconds since the epoch.
    """

    watched, notes_reads = False, True

    def __init__(self, settings: DirectorySettings, counter: Executor, clock: Callable[[], float]) -> None:
        self.url_base = settings.url_base
        self._settings = settings
        self._clock = clock
        self._opened: ObjectFiles | None = None
        self._counts = Counts(self._all, counter, clock)

    def sign_put(
        self, object_name: str, size_bytes: int, life_seconds: float, *, replace: bool = False, node_id: str = "",
        crc32c: int | None = None,
    ) -> SignedUrl:
        """See ``BucketEngine``. There is nothing to sign: the headers tell whether it may be in another's place."""
        return SignedUrl(f"file://{quote(self._settings.folder)}/{object_name}", {"replace": "1"} if replace else {})

    def totals(self, channel: str) -> BucketTotals:
        """See ``BucketEngine``."""
        return self._counts.totals(channel)

    def size(self, object_name: str) -> int | None:
        """See ``BucketEngine``."""
        try:
            return self._files().size(object_name)
        except ObjectMissing:
            return None

    def objects(self, channel: str, *, kind: str = "", after: str = "", limit: int) -> list[ObjectRecord]:
        """See ``BucketEngine``."""
        prefix = f"{channel}/{kind}/" if kind else f"{channel}/"
        return list(islice(self._all(prefix, after), limit))

    def expire(self, object_name: str, unread_since: float) -> bool:
        """See ``BucketEngine``: by the access times that nodes keep. Who reads it just now, reads on."""
        size_bytes = self.size(object_name)
        expired = self._files().expire(object_name, unread_since)
        if expired and size_bytes is not None:
            self._counts.removed(object_name, size_bytes)
        return expired

    def sign_get(self, object_name: str, life_seconds: float, *, head: bool = False) -> SignedRead:
        """See ``BucketEngine``. :raises EngineUnusable: always; no reads are signed here."""
        raise EngineUnusable(what=f"The folder {self._settings.folder}", why="it has no URLs",
                             advice="It is read by nodes on machines that have it.")

    def sha1(self, object_name: str) -> str:
        """See ``BucketEngine``."""
        return self._files().sha1(object_name)

    def read(self, object_name: str, limit_bytes: int) -> tuple[bytes, str]:
        """See ``BucketEngine``."""
        return self._files().read(object_name, limit_bytes)

    def write(self, object_name: str, data: bytes, *, replace: bool = False) -> bool:
        """See ``BucketEngine``."""
        return self._files().write(object_name, data, replace=replace)

    def remove(self, object_name: str, *, etag: str | None = None) -> bool:
        """See ``BucketEngine``."""
        try:
            self._files().remove(object_name, etag=etag)
        except ObjectMissing:
            return False
        self._counts.removed(object_name)
        return True

    def remove_channel(self, channel: str) -> int:
        """See ``BucketEngine``."""
        removed = sum(self.remove(found.name) for found in self._all(f"{channel}/"))
        self._counts.forget(channel)
        return removed

    def _all(self, prefix: str, after: str = "") -> Iterator[ObjectRecord]:
        return (ObjectRecord(*found) for found in self._files().objects(prefix, after))

    def _files(self) -> ObjectFiles:
        """The folder. :raises EngineUnusable: it is not what it was, as when its file system is not mounted."""
        folder = Path(self._settings.folder)
        if os.path.realpath(folder) != str(folder) or not is_marked(folder, self._settings.mark):
            raise EngineUnusable(what=f"The folder {folder}", why="it does not bear the hub's mark",
                                 advice="Is its file system mounted on the hub's machine?")
        if self._opened is None:
            try:
                self._opened = ObjectFiles(folder, fsync=True, shared=True, clock=self._clock)
            except KacheryError as error:
                raise EngineUnusable(what=f"The folder {folder}", why=error.message,
                                     advice="Let the hub's user read and write there.") from None
        return self._opened
