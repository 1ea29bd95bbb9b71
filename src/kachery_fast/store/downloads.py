"""Making a verified download a file of the store, noted as a copy that may be evicted."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from .._core import digest_buffer
from ..errors import ManifestInvalid
from ..protocol.manifest import parse_manifest
from .disk import translated, write_all
from .flushing import flush_file
from .naming import name_new, rename_into
from .objects import Located, ObjectWriter

__all__ = ["adopt", "adopt_bytes"]


def adopt(writer: ObjectWriter, part: Path, sha1: str, manifest: bytes | None) -> Located:
    """Make ``part`` the file ``sha1``, with the bytes of its manifest; see ``FileStore.adopt``.

    :raises ManifestInvalid: the manifest is not one of this file; nothing was changed.
    :raises DiskFull, DiskError: it could not be written.
    """
    with translated("opening", part):
        size = part.stat().st_size
    manifest_sha1: str | None = None
    if manifest is not None:
        manifest_sha1 = digest_buffer(manifest, writer.chunk_size_bytes).sha1
        found = parse_manifest(manifest, name=manifest_sha1)
        if (found.sha1, found.size) != (sha1, size):
            raise ManifestInvalid(manifest=manifest_sha1, why=f"it is of sha1://{found.sha1}, not of sha1://{sha1}")
        if not writer.holds(manifest_sha1, len(manifest)):
            with writer.temp() as temp:
                with translated("writing", temp.path, needed=len(manifest)):
                    write_all(temp.fd, memoryview(manifest))
                _name(writer, temp.path, manifest_sha1, len(manifest), manifest_of=sha1)
    path = writer.layout.file(sha1)
    _name(writer, part, sha1, size)
    with translated("removing", part), suppress(FileNotFoundError):
        writer.layout.part_marker(sha1).unlink()
    if manifest_sha1 is not None:
        writer.note_manifest(sha1, manifest_sha1)
    return Located(sha1, path, size, linked=False)


def adopt_bytes(writer: ObjectWriter, data: bytes, sha1: str) -> Located:
    """Make bytes the file ``sha1``; see ``FileStore.adopt_bytes``. Several may do so at once."""
    with writer.temp() as temp:
        with translated("writing", temp.path, needed=len(data)):
            write_all(temp.fd, memoryview(data))
        return adopt(writer, temp.path, sha1, None)


def _name(writer: ObjectWriter, part: Path, sha1: str, size: int, *, manifest_of: str | None = None) -> None:
    """Make ``part`` the file ``sha1``, unless the store has it, and note it as a copy."""
    path = writer.layout.file(sha1)
    with translated("writing", path):
        if not writer.holds(sha1, size):
            if writer.durable:
                flush_file(part)
            # Before it has its name: from then on somebody may store it and so make it an original.
            writer.cache.note(sha1, part.stat(), now_ms=time.time_ns() // 1_000_000, manifest_of=manifest_of)

            def forget() -> None:
                # A rename may take the place of what somebody stores at this moment, so what is there then is no copy.
                writer.cache.forget(sha1)

            named = name_new(part, path, durable=writer.durable, before_unsure=forget)
            if not named and not writer.holds(sha1, size):  # what was there is damaged
                forget()
                rename_into(part, path, durable=writer.durable)
        part.unlink(missing_ok=True)
