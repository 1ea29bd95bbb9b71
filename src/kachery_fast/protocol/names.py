"""URIs, ids, and the names of objects and bands.

Formats of 2022 (WIRE-2022.md §4, §5): ``sha1://<sha1>/<label>?manifest=<sha1>``; an object of a channel's bucket is
``<channel>/sha1/aa/bb/cc/<sha1>``; a band is ``<channel>-<kind>`` with one of six kinds.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, quote, unquote

from ..errors import InvalidFeedUri, InvalidName, InvalidUri

__all__ = [
    "BAND_KINDS",
    "FeedUri",
    "FileUri",
    "ObjectKind",
    "ObjectName",
    "band_name",
    "check_channel_name",
    "check_feed_id",
    "check_node_id",
    "check_owner_id",
    "check_sha1",
    "is_node_id",
    "is_sha1",
    "object_name",
    "parse_feed_uri",
    "parse_file_uri",
    "parse_object_name",
    "result_object_name",
    "segment_object_name",
    "subfeed_hash",
    "subfeed_object_name",
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


def is_node_id(text: object) -> bool:
    """Whether ``text`` is 64 lower-case hex digits, as the ids of nodes and feeds are."""
    return isinstance(text, str) and _NODE_ID.fullmatch(text) is not None


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


class FeedUri(NamedTuple):
    """The parts of ``feed://<feed id>[/<subfeed>]``.

    ``name`` is the subfeed's name, a text or (written ``~<hash>``) one of which only the hash is known; both None: the
    URI is that of the feed.
    """

    feed_id: str
    name: str | None = None
    subfeed: str | None = None

    def __str__(self) -> str:
        if self.name is not None:
            return f"feed://{self.feed_id}/{quote(self.name, safe='', errors='replace')}"
        return f"feed://{self.feed_id}" + (f"/~{self.subfeed}" if self.subfeed else "")


def subfeed_hash(name: Any) -> str:
    """Return the hash that a subfeed is known by, of its name: a text, a ``~<hash>``, or a dict (WIRE-2022.md §5).

    SHA-1 of the text, or of ``json.dumps(name, sort_keys=True, separators=(",", ":"))``, as the clients of 2022 made
    it.

    :raises InvalidName: it is neither, or not JSON.
    """
    if isinstance(name, str):
        if name.startswith("~"):
            if not is_sha1(name[1:]):
                raise InvalidName(name=name[:100], kind="subfeed",
                                  why="after ~ stands the hash of a name, 40 hex digits in lower case")
            return name[1:]
        text = name
    elif isinstance(name, dict):
        try:
            text = json.dumps(name, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidName(name=str(name)[:100], kind="subfeed", why=f"it is not JSON ({error})") from None
    else:
        raise InvalidName(name=str(name)[:100], kind="subfeed", why="use a text, or a dict of JSON")
    try:
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    except UnicodeEncodeError:
        raise InvalidName(name=repr(name)[:100], kind="subfeed", why="it is not text that UTF-8 can write") from None


def parse_feed_uri(text: str) -> FeedUri:
    """Read the URI of a feed or subfeed, or a bare feed id.

    :raises InvalidFeedUri: it is neither; the error says which part is wrong.
    """
    if is_node_id(text):
        return FeedUri(text)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme != "feed":
        raise InvalidFeedUri(uri=text, why="it does not begin with feed://")
    feed_id, slash, name = rest.partition("/")
    if not is_node_id(feed_id):
        raise InvalidFeedUri(uri=text, why=f"{feed_id!r} is not a feed's id of 64 hex digits in lower case")
    if not slash or not name:
        return FeedUri(feed_id)
    if name.startswith("~"):
        if not is_sha1(name[1:]):
            raise InvalidFeedUri(uri=text, why=f"{name!r} is not ~ and the 40 hex digits of a subfeed's hash")
        return FeedUri(feed_id, None, name[1:])
    name = unquote(name)
    return FeedUri(feed_id, name, subfeed_hash(name))


def check_feed_id(text: str) -> str:
    """Return ``text`` when it is a feed's id: an Ed25519 public key as 64 hex digits.

    :raises InvalidName: it is not.
    """
    if not is_node_id(text):
        raise InvalidName(name=text, kind="feed", why="a feed's id is 64 hex digits, in lower case")
    return text


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
    if not is_node_id(text):
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
    return f"{check_channel_name(channel)}/sha1/{_spread(check_sha1(sha1))}"


def subfeed_object_name(channel: str, feed_id: str, subfeed: str) -> str:
    """The name of a subfeed's index in the bucket, ``<channel>/feeds/…/subfeeds/…/subfeed.json`` (WIRE-2022.md §4).

    :raises InvalidName: a part is not well-formed.
    """
    return _subfeed_folder(channel, feed_id, subfeed) + "subfeed.json"


def segment_object_name(channel: str, feed_id: str, subfeed: str, sha1: str) -> str:
    """The name of a segment of a subfeed in the bucket, ``<channel>/feeds/…/subfeeds/…/segments/<sha1>``.

    :raises InvalidName: a part is not well-formed.
    """
    return _subfeed_folder(channel, feed_id, subfeed) + f"segments/{check_sha1(sha1)}"


def _subfeed_folder(channel: str, feed_id: str, subfeed: str) -> str:
    return (f"{check_channel_name(channel)}/feeds/{_spread(check_feed_id(feed_id))}"
            f"/subfeeds/{_spread(check_sha1(subfeed))}/")


def result_object_name(channel: str, result_id: str) -> str:
    """The name of a task's result in the bucket: ``<channel>/task_results/aa/bb/cc/<result id>`` (WIRE-2022.md §4).

    :raises InvalidName: a part is not well-formed.
    """
    return f"{check_channel_name(channel)}/task_results/{_spread(check_sha1(result_id))}"


ObjectKind = Literal["file", "segment", "index", "result"]


class ObjectName(NamedTuple):
    """The parts of an object's name; ``str`` puts them together.

    ``sha1``: of a file, chunk, manifest or segment; the hash of a subfeed's name for its index; a result id.
    ``feed_id``: of a segment and an index. ``subfeed``: of a segment.
    """

    channel: str
    kind: ObjectKind
    sha1: str
    feed_id: str = ""
    subfeed: str = ""

    def __str__(self) -> str:
        """:raises InvalidName: a part is not well-formed."""
        if self.kind == "file":
            return object_name(self.channel, self.sha1)
        if self.kind == "result":
            return result_object_name(self.channel, self.sha1)
        if self.kind == "index":
            return subfeed_object_name(self.channel, self.feed_id, self.sha1)
        return segment_object_name(self.channel, self.feed_id, self.subfeed, self.sha1)


def parse_object_name(text: str) -> ObjectName:
    """Take the name of an object apart.

    :raises InvalidName: it is none that these functions build.
    """
    parts = text.split("/")
    found: ObjectName | None = None
    if len(parts) == 6:
        found = ObjectName(parts[0], "file" if parts[1] == "sha1" else "result", parts[5])
    elif len(parts) == 12:
        found = ObjectName(parts[0], "index", parts[10], parts[5])
    elif len(parts) == 13:
        found = ObjectName(parts[0], "segment", parts[12], parts[5], parts[10])
    if found is None or str(found) != text:
        raise InvalidName(name=text, kind="object", why="it is not <channel>/(sha1|feeds|task_results)/...")
    return found


def _spread(digits: str) -> str:
    """Return ``aa/bb/cc/<digits>``: objects are spread over folders by the head of their name."""
    return f"{digits[0:2]}/{digits[2:4]}/{digits[4:6]}/{digits}"


def band_name(channel: str, kind: str) -> str:
    """The pub/sub name of one of a channel's six bands, ``<channel>-<kind>``.

    :raises InvalidName: the channel's name is not well-formed, or there is no such kind.
    """
    check_channel_name(channel)
    if kind not in BAND_KINDS:
        raise InvalidName(name=kind, kind="band", why="the kinds are " + ", ".join(BAND_KINDS))
    return f"{channel}-{kind}"
