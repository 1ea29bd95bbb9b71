"""Where things lie in a store's directory, as in 2022 (WIRE-2022.md, part B), and what is new.

====================================  =====================================================================
``sha1/aa/bb/cc/<sha1>``              a file; manifests are files too (2022)
``sha1/aa/bb/cc/<sha1>.link``         a file kept elsewhere: its path and what it looked like (2022, extended)
``sha1/aa/bb/cc/<sha1>.manifest``     40 hex digits: the manifest of this file or link (new)
``sha1/aa/bb/cc/<sha1>.part``         an unfinished download (new)
``tmp/``                              files being written (new use)
``tmp/<sha1>.part-of``                empty; says that there is, or was, a ``.part``, so that nobody has to search
``damaged/``                          files that ``verify`` was asked to set aside (new)
``trash/aa/bb/cc/<sha1>``             a file that was evicted or removed, until the trash is emptied (new)
``sha1-trash/aa/bb/cc/<sha1>``        the trash of 2022, which is only emptied by hand
``kachery-fast-cache.db``             which files are copies from a channel, and pins: see ``cache`` (new)
``store.file.*.tmp``                  what an interrupted daemon of 2022 left behind
====================================  =====================================================================
"""

from __future__ import annotations

from pathlib import Path

from ..protocol.names import check_sha1

__all__ = ["LINK_SUFFIX", "MARKER_SUFFIX", "SIDECAR_SUFFIX", "Layout"]

LINK_SUFFIX = ".link"
SIDECAR_SUFFIX = ".manifest"
PART_SUFFIX = ".part"
MARKER_SUFFIX = ".part-of"


class Layout:
    """The paths of one store. Every method that takes a SHA-1 raises InvalidName when it is malformed.

    :param files: the directory of the files; the trash is laid out alike.
    """

    def __init__(self, root: Path, *, files: str = "sha1") -> None:
        self.root = root
        self.files = root / files
        self.temp = root / "tmp"
        self.damaged = root / "damaged"
        self._prefix = str(self.files)

    def file_name(self, sha1: str) -> str:
        """The path of a file as a string: cheaper than a Path where thousands are looked up."""
        check_sha1(sha1)
        return f"{self._prefix}/{sha1[0:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"

    def file(self, sha1: str) -> Path:
        """The path of a file."""
        return Path(self.file_name(sha1))

    def link(self, sha1: str) -> Path:
        """The path of a link's record."""
        return Path(self.file_name(sha1) + LINK_SUFFIX)

    def sidecar(self, sha1: str) -> Path:
        """The path of the note that names a file's manifest."""
        return Path(self.file_name(sha1) + SIDECAR_SUFFIX)

    def part(self, sha1: str) -> Path:
        """The path of an unfinished download."""
        return Path(self.file_name(sha1) + PART_SUFFIX)

    def part_marker(self, sha1: str) -> Path:
        """The path of the note that says where an unfinished download may lie."""
        check_sha1(sha1)
        return self.temp / (sha1 + MARKER_SUFFIX)
