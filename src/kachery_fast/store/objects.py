"""Putting bytes under their name, and manifests beside them.

The order of writing is what makes a crash harmless: first the manifest (a file of its own, right by its own name),
then the file, by rename, then the sidecar that ties the two together. Whatever is missing after a crash is made
again when it is next needed. A sidecar is not flushed: it is only believed when the manifest it names has that name's
bytes and describes the file.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from .._core import Digests, digest_buffer
from ..errors import DiskFull, ManifestInvalid
from ..protocol.manifest import MANIFEST_SIZE_BYTES_MAX, Manifest, make_manifest, parse_manifest
from ..protocol.names import is_sha1
from .cache import CacheIndex
from .disk import TempFile, check_room, find_size, translated, write_all
from .layout import Layout

__all__ = ["Located", "ObjectWriter", "Stored", "read_small"]


class Stored(NamedTuple):
    """What was stored. ``size`` is in bytes; ``manifest_sha1`` is None when the file fits one chunk."""

    sha1: str
    size: int
    manifest_sha1: str | None


class Located(NamedTuple):
    """Where the bytes of ``sha1`` are. ``path`` is the linked file's own path when ``linked``."""

    sha1: str
    path: Path
    size: int
    linked: bool


def read_small(path: Path, size_bytes_max: int) -> bytes | None:
    """Return the content of a small file, or None when there is none.

    :raises DiskError: it cannot be read, or is longer than ``size_bytes_max``.
    """
    with translated("reading", path):
        try:
            with path.open("rb") as file:
                data = file.read(size_bytes_max + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(data) > size_bytes_max:
            raise OSError(errno.EFBIG, f"it is longer than {size_bytes_max} bytes")
    return data


class ObjectWriter:
    """Writes files of the store under ``layout``, each whole or not at all."""

    def __init__(self, layout: Layout, *, chunk_size_bytes: int, durable: bool, machine: str = "") -> None:
        self.layout = layout
        self.chunk_size_bytes = chunk_size_bytes
        self.durable = durable
        self.cache = CacheIndex(layout.root, machine=machine)

    def temp(self) -> TempFile:
        """Begin a file that ``finish`` will name."""
        return TempFile(self.layout.temp, durable=self.durable)

    def holds(self, sha1: str, size: int) -> bool:
        """Whether the store has a file of this name and length; a shorter one is damage, and is replaced."""
        return find_size(self.layout.file_name(sha1)) == size

    def keeps(self, sha1: str, size: int) -> bool:
        """Whether the store has a file of this name and length, and will not evict it from now on.

        Otherwise the caller writes its own, which takes the place of a cached copy and is none.
        """
        if not self.holds(sha1, size) or not self.cache.claim(sha1, self.layout.file_name(sha1)):
            return False
        # It may have been evicted just before it was claimed; without an index nothing evicts.
        return not self.cache.exists or self.holds(sha1, size)

    def finish(self, temp: TempFile, digests: Digests) -> Stored:
        """Name the bytes in ``temp``, whose digests are given; discard them when the store has them already.

        :raises DiskFull, DiskError: nothing was stored.
        """
        manifest_sha1 = self.keep_manifest_of(digests)
        if self.keeps(digests.sha1, digests.size):
            temp.discard()
        else:
            temp.publish(self.layout.file(digests.sha1), durable=self.durable)
        if manifest_sha1 is not None:
            self.note_manifest(digests.sha1, manifest_sha1)
        return Stored(digests.sha1, digests.size, manifest_sha1)

    def keep_small(self, view: memoryview, digests: Digests) -> Stored:
        """Store bytes that are in memory and were digested already; writes nothing when the store has them.

        :raises DiskFull, DiskError: nothing was stored.
        """
        if len(digests.chunk_sha1s) <= 1 and self.keeps(digests.sha1, digests.size):
            return Stored(digests.sha1, digests.size, None)
        check_room(self.layout.root, view.nbytes)
        with self.temp() as temp:
            with translated("writing", temp.path, needed=view.nbytes):
                write_all(temp.fd, view)
            return self.finish(temp, digests)

    def keep_manifest_of(self, digests: Digests) -> str | None:
        """Store the manifest that the digests make, and return its SHA-1; None when the file fits one chunk.

        :raises DiskFull, DiskError: it was not stored.
        """
        if len(digests.chunk_sha1s) <= 1:
            return None
        manifest = make_manifest(digests.size, digests.sha1, digests.chunk_sha1s, self.chunk_size_bytes)
        return self.keep_manifest(manifest.encode())

    def keep_manifest(self, data: bytes) -> str:
        """Store a manifest as the ordinary file that it is, and return its SHA-1.

        :raises DiskFull, DiskError: it was not stored.
        """
        digests = digest_buffer(data, self.chunk_size_bytes)
        if not self.keeps(digests.sha1, len(data)):
            with self.temp() as temp:
                with translated("writing", temp.path, needed=len(data)):
                    write_all(temp.fd, memoryview(data))
                temp.publish(self.layout.file(digests.sha1), durable=self.durable)
        return digests.sha1

    def note_manifest(self, sha1: str, manifest_sha1: str) -> None:
        """Write the sidecar of ``sha1``.

        :raises DiskFull, DiskError: it was not written; the file is stored all the same.
        """
        if self.noted_manifest(sha1) == manifest_sha1:
            return
        with self.temp() as temp:
            with translated("writing", temp.path, needed=len(manifest_sha1)):
                os.write(temp.fd, manifest_sha1.encode())
            temp.publish(self.layout.sidecar(sha1), durable=False)

    def noted_manifest(self, sha1: str) -> str | None:
        """Return what the sidecar of ``sha1`` says; None when there is none, or it is torn."""
        data = read_small(self.layout.sidecar(sha1), 1024)
        text = "" if data is None else data.decode("ascii", "replace").strip()
        return text if is_sha1(text) else None

    def read_manifest(self, manifest_sha1: str, sha1: str, size: int) -> Manifest | None:
        """Return the manifest of that name when the store has it and it is one of the file ``sha1``, else None.

        :raises DiskError: it is there but cannot be read.
        """
        path = self.layout.file(manifest_sha1)
        length = find_size(path)
        if length is None or length > MANIFEST_SIZE_BYTES_MAX:
            return None
        data = read_small(path, MANIFEST_SIZE_BYTES_MAX)
        if data is None:
            return None
        try:
            manifest = parse_manifest(data, name=manifest_sha1)
        except ManifestInvalid:
            return None
        return manifest if (manifest.sha1, manifest.size) == (sha1, size) else None

    def prepare(self, size_bytes: int) -> None:
        """Refuse at once what cannot fit.

        :raises DiskFull: the file system of the store has less than ``size_bytes`` bytes free.
        """
        try:
            check_room(self.layout.root, size_bytes)
        except DiskFull as error:
            raise DiskFull(**{**error.details, "what": f"a file of {size_bytes} bytes"}) from None
