"""Files by content URI for everything that reads through fsspec: pandas, zarr, xarray, h5py, dask.

    with fsspec.open("sha1://<sha1>/recording.dat?manifest=<sha1>", channel="my-lab") as file:
        file.seek(10**9); block = file.read(4096)

What is in the local store is opened there. Of what is not, the node fetches only the chunks that are read. The length
of such a file stands in its manifest; a URI that names none is of a file of one chunk, which is loaded whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from ..config import load_settings
from ..errors import FileElsewhere, InvalidArgument, LinkInvalid, NoChannel, NotAvailable, NotInStore
from ..protocol.manifest import parse_manifest
from ..protocol.names import FileUri, parse_file_uri
from ..store import FileStore
from .files import load, load_bytes
from .place import local_settings
from .storing import open_store

__all__ = ["KacheryFileSystem"]

# A divisor of the 20 MiB of a chunk, and aligned, so that no block needs two chunks.
_BLOCK_SIZE_BYTES = 4 * 1024 * 1024


class KacheryFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The read-only file system of the protocol ``sha1``; errors are the project's, as of ``load_file``.

    :param channel: the channel to ask on; without it the one of the setting KACHERY_CHANNEL.
    :param block_size: how many bytes of a remote file are read ahead, and kept for the next read; 4 MiB without it.
    """

    protocol = "sha1"
    root_marker = ""

    def __init__(self, channel: str | None = None, block_size: int | None = None, **options: Any) -> None:
        super().__init__(channel=channel, block_size=block_size, **options)
        self.channel = channel
        self.blocksize = block_size or min(_BLOCK_SIZE_BYTES, load_settings().chunk_size_bytes)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return str(path).removeprefix("sha1://").rstrip("/")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return ``name``, ``size`` in bytes, ``type`` "file" and ``sha1``; at most a manifest is fetched.

        :raises NotInStore, NoChannel, NotAvailable and others: as ``load_file``.
        """
        uri = _uri_of(path)
        return {"name": self._strip_protocol(path), "size": self._size_of(uri), "type": "file", "sha1": uri.sha1}

    def _size_of(self, uri: FileUri) -> int:
        try:
            return _store().find(uri.sha1).size
        except (NotInStore, LinkInvalid):
            pass
        if uri.manifest_sha1 is None:
            try:
                return load(str(uri), channel=self.channel).size
            except FileElsewhere as error:
                return int(error.details["size"])
        data = load_bytes(f"sha1://{uri.manifest_sha1}", channel=self.channel)
        manifest = parse_manifest(data, name=uri.manifest_sha1)
        if manifest.sha1 != uri.sha1:
            raise InvalidArgument(what=f"{uri} names the manifest of another file, sha1://{manifest.sha1}.")
        return manifest.size

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Return the one file that ``path`` names: content URIs form no directories."""
        entry = self.info(path)
        return [entry] if detail else [entry["name"]]

    def glob(self, path: str, maxdepth: int | None = None, **_: Any) -> list[str]:
        """Return ``path``: the question mark of a URI is no wildcard."""
        return [self._strip_protocol(path)]

    def exists(self, path: str, **_: Any) -> bool:
        """Whether the file is in the local store, or can be had from the channel.

        :raises InvalidUri: ``path`` is malformed.
        """
        uri = _uri_of(path)
        try:
            self._size_of(uri)
        except (NotInStore, NotAvailable, NoChannel):
            return False
        return True

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return bytes ``start`` to ``end`` of a file; negative ones count from its end, as everywhere in fsspec."""
        uri = _uri_of(path)
        if (start or 0) < 0 or (end or 0) < 0:
            size = self._size_of(uri)
            start = None if start is None else max(start + size, 0) if start < 0 else start
            end = None if end is None else max(end + size, 0) if end < 0 else end
        return load_bytes(str(uri), start, end, channel=self.channel)

    def get(self, rpath: Any, lpath: Any, recursive: bool = False, callback: Any = None, maxdepth: int | None = None,
            **_: Any) -> None:
        """Copy a file, or a list of files, to local paths; into a directory under their labels."""
        several = isinstance(rpath, list)
        for index, one in enumerate(rpath if several else [rpath]):
            dest = Path(lpath[index] if isinstance(lpath, list) else lpath)
            if dest.is_dir():
                uri = _uri_of(one)
                dest /= Path(uri.label).name or uri.sha1
            self.get_file(one, dest)

    def get_file(self, rpath: str, lpath: Any, callback: Any = None, **_: Any) -> None:
        """Copy a file to the local path ``lpath``."""
        load(str(_uri_of(rpath)), dest=lpath, channel=self.channel)

    def ukey(self, path: str) -> str:
        """Return the SHA-1, which changes when the content does: never."""
        return _uri_of(path).sha1

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, autocommit: bool = True,
              cache_options: dict[str, Any] | None = None, **options: Any) -> BinaryIO:
        if mode != "rb":
            raise InvalidArgument(what=f"Files by content URI are opened with mode 'rb', not {mode!r}: their name is "
                                       "the hash of their bytes. Use store_file to make a new one.")
        uri = _uri_of(path)
        try:
            return _store().open(uri.sha1)
        except (NotInStore, LinkInvalid):
            pass
        options.setdefault("cache_type", "blockcache")
        file: BinaryIO = _RemoteFile(self, str(uri), mode, block_size or self.blocksize, autocommit,
                                     cache_options=cache_options, size=self._size_of(uri), **options)
        return file


class _RemoteFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file that is read block by block through the node."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        return load_bytes(self.path, start, min(end, self.size), channel=self.fs.channel)


def _uri_of(path: str) -> FileUri:
    text = str(path)
    return parse_file_uri(text if text.startswith("sha1://") else f"sha1://{text}")


def _store() -> FileStore:
    return open_store(local_settings())


fsspec.register_implementation("sha1", KacheryFileSystem, clobber=True)
