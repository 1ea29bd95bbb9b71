"""Which manifest describes a file of the store: the noted one, the one somebody wants, or a new one."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .._core import Digests
from ..protocol.manifest import Manifest
from .objects import ObjectWriter

__all__ = ["ManifestShelf"]

# Answers to "is this manifest true?" that are remembered, about 200 bytes each.
PROVEN_MAX = 10_000

Progress = Callable[[int], None]

_log = logging.getLogger("kachery_fast.store")


class ManifestShelf:
    """Finds, proves and makes manifests.

    :param digest: reads the whole file of a SHA-1 with a chunk size in bytes, and tells how far it is; raises
        CorruptFile when it is damaged.
    """

    def __init__(self, writer: ObjectWriter, digest: Callable[[str, int, Progress | None], Digests]) -> None:
        self._writer = writer
        self._digest_all = digest
        self._proven: dict[tuple[str, str], bool] = {}

    def choose(
        self, sha1: str, size: int, *, noted: str | None, wanted: str | None, progress: Progress | None = None
    ) -> tuple[str | None, Manifest | None]:
        """Return the SHA-1 and content of a manifest of a file; ``(None, None)`` when it needs none.

        :param noted: what its sidecar or link says.
        :param wanted: what somebody else asked for.
        :param progress: called with 0 before the file is read, and then as ``digest`` does.
        :raises CorruptFile: the file had to be read, and is damaged.
        """
        writer = self._writer
        if wanted is not None and wanted != noted:
            manifest = writer.read_manifest(wanted, sha1, size)
            if manifest is not None and self._is_true(wanted, manifest, progress):
                if noted is None:
                    writer.note_manifest(sha1, wanted)
                return wanted, manifest
        if noted is not None:
            manifest = writer.read_manifest(noted, sha1, size)
            if manifest is not None:
                return noted, manifest
        if size <= writer.chunk_size_bytes:
            return None, None
        made = writer.keep_manifest_of(self._digest(sha1, writer.chunk_size_bytes, progress))
        if made is None:
            return None, None
        writer.note_manifest(sha1, made)
        return made, writer.read_manifest(made, sha1, size)

    def _digest(self, sha1: str, chunk_size_bytes: int, progress: Progress | None) -> Digests:
        if progress is not None:
            progress(0)
        return self._digest_all(sha1, chunk_size_bytes, progress)

    def _is_true(self, name: str, manifest: Manifest, progress: Progress | None) -> bool:
        key = (manifest.sha1, name)
        if key not in self._proven:
            if len(self._proven) >= PROVEN_MAX:
                self._proven.clear()
            self._proven[key] = self._prove(manifest, progress)
        return self._proven[key]

    def _prove(self, manifest: Manifest, progress: Progress | None) -> bool:
        """Whether the chunks of ``manifest`` are of one length and have the digests it says, by reading the file.

        A false manifest would make this node upload bytes under names that are not theirs.
        """
        length = manifest.chunks[0].end if manifest.chunks else 0
        if length == 0 or length % 64 or any(chunk.start % length for chunk in manifest.chunks):
            return False
        digests = self._digest(manifest.sha1, length, progress)
        true = digests.chunk_sha1s == tuple(chunk.sha1 for chunk in manifest.chunks)
        if not true:
            _log.warning("a manifest of sha1://%s in the store is false, and not used", manifest.sha1)
        return true
