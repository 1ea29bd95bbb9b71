"""URIs, ids, and the names of objects and bands.

Formats of 2022 (WIRE-2022.md §4, §5): ``sha1://<sha1>/<label>?manifest=<sha1>``; an object of a channel's bucket is
``<channel>/sha1/aa/bb/cc/<sha1>``; a band is ``<channel>-<kind>`` with one of six kinds.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote

from ..errors import InvalidName, InvalidUri

__all__ = [
    "BAND_KINDS",
    "FileUri",
    "band_name",
    "check_channel_name",
    "check_node_id",
    "check_owner_id",
    "check_sha1",
    "is_sha1",
    "object_name",
    "parse_file_uri",
]

BAND_KINDS = ("requestFiles", "provideFiles", "requestFeeds", "provideFeeds", "requestTasks", "provideTasks")

_SHA1 = re.compile(r"[0-9a-f]{40}")
_NODE_ID = re.compile(r"[0-9a-f]{64}")
_CHANNEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OWNER = re.compile(r"[^\s/<>\"'\\\x00-\x1f\x7f]{1,254}")


class FileUri(NamedTuple):
    """The parts of a file's content URI. ``label`` is for people and may be empty."""

    sha1: str
    label: str = ""
    manifest_sha1: str | None = None

    def __str__(self) -> str:
        text = f"sha1://{self.sha1}"
        if self.label:
            # The name of a file may hold what no text can (lone surrogates); a label is for people, and need not.
            text += "/" + quote(self.label, safe="!$&'()*+,;=:@~/", errors="replace")
        if self.manifest_sha1:
            text += f"?manifest={self.manifest_sha1}"
        return text


def is_sha1(text: object) -> bool:
    """Whether ``text`` is 40 lower-case hex digits."""
    return isinstance(text, str) and _SHA1.fullmatch(text) is not None


def check_sha1(text: str) -> str:
    """Return ``text`` when it is a SHA-1 in lower-case hex.

    :raises InvalidName: it is not.
    """
    if not is_sha1(text):
        raise InvalidName(name=text, kind="file", why="a SHA-1 is 40 hex digits, in lower case")
    return text


def parse_file_uri(text: str) -> FileUri:
    """Read a content URI, or a bare SHA-1.

    :raises InvalidUri: it is neither; the error says which part is wrong.
    """
    if is_sha1(text):
        return FileUri(text)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme != "sha1":
        raise InvalidUri(uri=text, why="it does not begin with sha1://")
    path, _, query = rest.partition("?")
    sha1, _, label = path.partition("/")
    if not is_sha1(sha1):
        raise InvalidUri(uri=text, why=f"{sha1!r} is not a SHA-1 of 40 hex digits in lower case")
    manifest: str | None = None
    if query:
        manifests = parse_qs(query, keep_blank_values=True).get("manifest", [])
        if len(manifests) > 1:
            raise InvalidUri(uri=text, why="it names more than one manifest")
        if manifests:
            manifest = manifests[0]
            if not is_sha1(manifest):
                raise InvalidUri(uri=text, why=f"its manifest {manifest!r} is not a SHA-1 of 40 hex digits")
    return FileUri(sha1, unquote(label), manifest)


def check_channel_name(text: str) -> str:
    """Return ``text`` when it can be a channel's name: a letter or digit, then up to 63 of letters, digits, ``._-``.

    :raises InvalidName: it cannot.
    """
    if _CHANNEL.fullmatch(text) is None:
        raise InvalidName(name=text, kind="channel",
                          why="use 1 to 64 letters, digits, dots, dashes and underscores, the first a letter or digit")
    return text


def check_node_id(text: str) -> str:
    """Return ``text`` when it is a node's id: an Ed25519 public key as 64 hex digits.

    :raises InvalidName: it is not.
    """
    if _NODE_ID.fullmatch(text) is None:
        raise InvalidName(name=text, kind="node", why="a node's id is 64 hex digits, in lower case")
    return text


def check_owner_id(text: str) -> str:
    """Return ``text`` when it can name an owner: an e-mail address or another word without spaces.

    :raises InvalidName: it cannot.
    """
    if _OWNER.fullmatch(text) is None:
        raise InvalidName(name=text, kind="owner", why="use an e-mail address, or a word without spaces or quotes")
    return text


def object_name(channel: str, sha1: str) -> str:
    """The name of a file, chunk or manifest in the bucket: ``<channel>/sha1/aa/bb/cc/<sha1>``.

    :raises InvalidName: a part is not well-formed, so no crafted part can point elsewhere.
    """
    check_channel_name(channel)
    check_sha1(sha1)
    return f"{channel}/sha1/{sha1[0:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"


def band_name(channel: str, kind: str) -> str:
    """The pub/sub name of one of a channel's six bands, ``<channel>-<kind>``.

    :raises InvalidName: the channel's name is not well-formed, or there is no such kind.
    """
    check_channel_name(channel)
    if kind not in BAND_KINDS:
        raise InvalidName(name=kind, kind="band", why="the kinds are " + ", ".join(BAND_KINDS))
    return f"{channel}-{kind}"
