"""The file that a hub is moved in: a tar archive (ustar, POSIX.1-1988) that ends with its own digest.

Written and read in one pass and bounded memory. The digest proves that nothing was damaged or cut off, not who made it.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import msgspec

from ..errors import InvalidArgument

__all__ = ["COPY_BYTES", "ArchiveReader", "ArchiveWriter", "broken"]

COPY_BYTES = 1024 * 1024
_BLOCK_BYTES = 512
# Of a member that is held in memory.
_PART_SIZE_BYTES_MAX = 64 * 1024 * 1024


class ArchiveWriter:
    """Writes members one after another.

    :param file: where to; it need not be seekable.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def add(self, name: str, content: bytes) -> None:
        """Add a member that is in memory."""
        self.begin(name, len(content))
        self.put(content)
        self.pad(len(content))

    def begin(self, name: str, size_bytes: int) -> None:
        """Begin a member; ``put`` that many bytes, then ``pad``."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = size_bytes, 0o600
        self.put(info.tobuf(tarfile.USTAR_FORMAT))

    def put(self, data: bytes) -> None:
        """Write bytes as they are."""
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)

    def pad(self, size_bytes: int) -> None:
        """Fill the last block of a member of this size."""
        self.put(bytes(-size_bytes % _BLOCK_BYTES))

    def end(self) -> None:
        """Write the digest of what was written, and the two empty blocks that end an archive."""
        self.add("end.json", msgspec.json.encode({"sha256": self._digest.hexdigest()}))
        self.put(bytes(2 * _BLOCK_BYTES))


class ArchiveReader:
    """Reads members one after another. Only plain files are taken, and nothing is ever written under their names.

    :raises InvalidArgument: from every method: it is no such archive, or damaged.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._left = 0
        self._padding = 0

    def next(self) -> tuple[str, int] | None:
        """Return name and size of the next member, None after the last one, whose digest is right."""
        self._skip()
        before = self._digest.hexdigest()
        block = self._exactly(_BLOCK_BYTES)
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeError):
            raise broken("it is no archive of a hub, or it is cut off or damaged") from None
        if info.type != tarfile.REGTYPE or info.size < 0:
            raise broken(f"{info.name!r} is no plain file")
        self._left, self._padding = info.size, -info.size % _BLOCK_BYTES
        if info.name != "end.json":
            return info.name, info.size
        try:
            found = msgspec.json.decode(self.content(), type=dict[str, str])
        except msgspec.MsgspecError:
            raise broken("its end cannot be read") from None
        if found.get("sha256") != before:
            raise broken("its digest is not that of its content")
        return None

    def content(self) -> bytes:
        """Return the whole of the member that ``next`` told of."""
        if self._left > _PART_SIZE_BYTES_MAX:
            raise broken("a part of it is too long")
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """Yield the member that ``next`` told of in pieces."""
        while self._left:
            piece = self._exactly(min(self._left, COPY_BYTES))
            self._left -= len(piece)
            yield piece

    def _skip(self) -> None:
        for _ in self.pieces():
            pass
        self._exactly(self._padding)
        self._padding = 0

    def _exactly(self, size_bytes: int) -> bytes:
        data = self._file.read(size_bytes)
        if len(data) != size_bytes:
            raise broken("it is cut off")
        self._digest.update(data)
        return data


def broken(why: str) -> InvalidArgument:
    """What an archive that cannot be taken is refused with."""
    return InvalidArgument(what=f"The archive cannot be imported: {why}.")
