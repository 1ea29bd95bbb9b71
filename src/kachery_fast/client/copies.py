"""Copying a stored file out of the store: whole or not at all, and never back into it."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import CorruptFile, DiskError, InvalidArgument, NotADataFile
from ..store.disk import check_room, display, translated
from ..store.layout import Layout

__all__ = ["SomePath", "check_destination", "copy_to", "write_to"]

SomePath = str | os.PathLike[str]

_SPAN_SIZE_BYTES = 8 * 1024 * 1024
_FICLONE = 0x40049409  # ioctl of Linux that shares a file's blocks, where the file system can (linux/fs.h)


def check_destination(dest: SomePath, storage_dir: Path) -> None:
    """Refuse, before anything is fetched, a place where no file can be put, or where none may be: in the store.

    :raises InvalidArgument: it is no path, or within ``storage_dir``, where it could take the name of other bytes.
    :raises NotADataFile: a directory or device is there.
    :raises DiskError: there is no such directory.
    """
    text = os.fspath(dest)
    path = Path(text)
    if not text or "\0" in text:
        raise InvalidArgument(what=f"dest={text!r} is not the path of a file.")
    with translated("writing", path):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        if text.endswith("/") or stat.S_ISDIR(mode):
            raise NotADataFile(path=display(text), kind="a directory")
        if not stat.S_ISREG(mode):
            raise NotADataFile(path=display(text), kind="a device or pipe")
        if not path.parent.is_dir():
            raise DiskError(action="the writing", path=display(text), why="there is no such directory")
    if _is_within(path.parent, storage_dir):
        raise InvalidArgument(what=f"{display(text)} is within the local store {display(storage_dir)}, where a file's "
                                   "name is the hash of its bytes. Choose a place outside of it.")


def _is_within(directory: Path, storage_dir: Path) -> bool:
    """Whether a directory is the store or below it, whatever links or mounts lead to either.

    The store's own directories may be links to other disks, so they are looked for too. Directories are compared by
    device and inode, since one may have several paths, and names that differ in case may be one.
    """
    layout = Layout(storage_dir)
    rooms = []
    for room in (layout.root, layout.files, layout.temp, layout.damaged):
        with suppress(OSError):
            rooms.append(room.stat())
    real = Path(os.path.realpath(directory))
    for place in (real, *real.parents):
        with suppress(OSError):
            found = place.stat()
            if any(os.path.samestat(found, room) for room in rooms):
                return True
    return real.is_relative_to(os.path.realpath(storage_dir))


def copy_to(source: str, dest: SomePath) -> None:
    """Copy a file beside ``dest``, then rename it: whoever opens ``dest`` sees the old or the new file, whole.

    A symbolic link at ``dest`` is replaced, never followed: it may lead into the store.
    """
    path = Path(dest)
    with suppress(OSError):
        if os.path.samefile(source, path) and not path.is_symlink():  # noqa: PTH121
            return
    with translated("reading", source):
        reader = open(source, "rb")  # noqa: PTH123, SIM115 - closed below
    with reader:
        size = os.fstat(reader.fileno()).st_size
        with _replacing(path, size) as writer:
            _copy_bytes(reader, writer, size)


def write_to(data: bytes, dest: SomePath) -> None:
    """Write a file as ``copy_to`` does: whole or not at all."""
    with _replacing(Path(dest), len(data)) as writer:
        writer.write(data)


def receive_to(pieces: Iterable[bytes], size: int, dest: SomePath, sha1: str, *, source: str, advice: str) -> None:
    """Write a file of ``size`` bytes as ``copy_to`` does, if they have the name ``sha1``.

    :param source, advice: where they come from, and what to do when they are damaged, for the error.
    :raises CorruptFile: they have another name; ``dest`` is as it was.
    :raises DiskFull: there is no room for them.
    """
    path = Path(dest)
    check_room(path.parent, size)
    digest = hashlib.sha1(usedforsecurity=False)
    with _replacing(path, size) as writer:
        for piece in pieces:
            digest.update(piece)
            writer.write(piece)
        if digest.hexdigest() != sha1:
            raise CorruptFile(path=source, found=digest.hexdigest(), sha1=sha1, advice=advice)


@contextmanager
def _replacing(path: Path, size: int) -> Iterator[BinaryIO]:
    temp = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        with translated("copying", path, needed=size):
            with temp.open("xb") as writer:
                yield writer
            temp.replace(path)
    except BaseException:
        with suppress(OSError):
            temp.unlink()
        raise


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, size: int) -> None:
    """Share the blocks where the file system can, else copy inside the kernel, else by reading and writing."""
    if hasattr(os, "copy_file_range"):
        import fcntl

        with suppress(OSError):
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
            return
        done = 0
        try:
            while done < size:
                count = os.copy_file_range(reader.fileno(), writer.fileno(), min(4 * _SPAN_SIZE_BYTES, size - done))
                if count == 0:
                    break
                done += count
            return
        except OSError as error:
            if done or error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
    shutil.copyfileobj(reader, writer, _SPAN_SIZE_BYTES)
