"""Links: files that stay where they are, and how to tell that they still are what they were.

The record is the JSON of 2022, which its tools read, with a key of our own::

    {"path": "/abs", "manifestSha1": null, "stat": {"size": 300, "mtime": 1795175277.6742039},
     "_writingProcess": "kachery-fast",
     "kacheryFast": {"mtimeNs": 1795175277674203900, "fingerprintSizeBytes": 65536, "head": "…", "tail": "…"}}

``head`` and ``tail`` are the XXH3 (64 bits, seed 0) of that many bytes at either end, as 16 hex digits. They are no
proof, only a cheap check that a hundred-gigabyte file was not rewritten behind an unchanged time; ``verify`` proves.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any, BinaryIO, NamedTuple

import xxhash

from ..errors import LinkInvalid
from ..protocol.names import is_sha1
from .disk import display

__all__ = [
    "FINGERPRINT_SIZE_BYTES_MAX",
    "LINK_SIZE_BYTES_MAX",
    "Fingerprint",
    "LinkRecord",
    "fingerprint_of",
    "open_link",
    "parse_link",
]

# 2022 kept seconds in a double and compared with this tolerance (WIRE-2022.md, POST /linkFile).
MTIME_TOLERANCE_SECONDS = 0.002
# The longest record that is read: the longest path of Linux, each byte as \udcNN, and the rest.
LINK_SIZE_BYTES_MAX = 64 * 1024
# Both ends are read at each look-up of a link, and held in memory for it.
FINGERPRINT_SIZE_BYTES_MAX = 16 * 1024 * 1024


class Fingerprint(NamedTuple):
    """XXH3 of the first and the last ``size_bytes`` bytes of a file (of all of it where it is shorter), in hex."""

    size_bytes: int
    head: str
    tail: str


class LinkRecord(NamedTuple):
    """What a link says of its file. ``mtime_ns`` and ``fingerprint`` are None in links of 2022."""

    path: str
    size: int
    mtime_seconds: float
    manifest_sha1: str | None
    mtime_ns: int | None = None
    fingerprint: Fingerprint | None = None

    def encode(self) -> bytes:
        """Return the record as JSON; bytes of the path that are not UTF-8 become ``\\udcNN`` escapes."""
        data: dict[str, Any] = {
            "path": self.path,
            "manifestSha1": self.manifest_sha1,
            "stat": {"size": self.size, "mtime": self.mtime_seconds},
            "_writingProcess": "kachery-fast",
        }
        if self.fingerprint is not None:
            size_bytes, head, tail = self.fingerprint
            data["kacheryFast"] = {
                "mtimeNs": self.mtime_ns, "fingerprintSizeBytes": size_bytes, "head": head, "tail": tail,
            }
        return json.dumps(data).encode()


def fingerprint_of(fd: int, size: int, size_bytes: int) -> Fingerprint:
    """Fingerprint the open file ``fd`` of ``size`` bytes.

    :raises OSError: it cannot be read.
    """
    head = os.pread(fd, min(size, size_bytes), 0)
    tail = os.pread(fd, min(size, size_bytes), max(0, size - size_bytes))
    return Fingerprint(size_bytes, xxhash.xxh3_64_hexdigest(head), xxhash.xxh3_64_hexdigest(tail))


def parse_link(data: bytes, *, sha1: str, record_path: str) -> LinkRecord:
    """Read a link's record.

    :param record_path: where it was found, for the error.
    :raises LinkInvalid: it is not the record of a link.
    """
    try:
        found = json.loads(data)
        own = found.get("kacheryFast")
        path, size, manifest_sha1 = found["path"], found["stat"]["size"], found.get("manifestSha1")
        if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
            raise ValueError("its path is not absolute")
        mtime_ns, fingerprint = None, None
        if own is not None:
            mtime_ns = int(own["mtimeNs"])
            fingerprint = Fingerprint(int(own["fingerprintSizeBytes"]), str(own["head"]), str(own["tail"]))
            if not 1 <= fingerprint.size_bytes <= FINGERPRINT_SIZE_BYTES_MAX:
                raise ValueError(f"its fingerprint is of {fingerprint.size_bytes} bytes")
        return LinkRecord(path, int(size), float(found["stat"]["mtime"]),
                          manifest_sha1 if is_sha1(manifest_sha1) else None, mtime_ns, fingerprint)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise LinkInvalid(sha1=sha1, path="a file that its record does not tell",
                          why=f"the record {record_path} cannot be read: {error}") from None


def open_link(record: LinkRecord, sha1: str) -> BinaryIO:
    """Open the file of a link and check that it still is what it was.

    The check is made of the open file, so what the caller reads is what was checked.

    :raises LinkInvalid: it is gone, cannot be read, or has changed; the error says what.
    """
    def invalid(why: str) -> LinkInvalid:
        return LinkInvalid(sha1=sha1, path=display(record.path), why=why)

    try:
        fd = os.open(record.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise invalid("it is gone") from None
    except OSError as error:
        raise invalid(f"it cannot be opened: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise invalid("it is not a regular file any more")
        if found.st_size != record.size:
            raise invalid(f"it had {record.size} bytes, now {found.st_size}")
        if record.mtime_ns is not None:
            same_time = found.st_mtime_ns == record.mtime_ns
        else:
            same_time = abs(found.st_mtime - record.mtime_seconds) <= MTIME_TOLERANCE_SECONDS
        if not same_time:
            raise invalid("it was written to after it was linked")
        try:
            kept = record.fingerprint
            same = kept is None or fingerprint_of(fd, found.st_size, kept.size_bytes) == kept
        except OSError as error:
            raise invalid(f"it cannot be read: {error.strerror}") from None
        if not same:
            raise invalid("other bytes stand at its head or tail")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise
