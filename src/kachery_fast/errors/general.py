"""What goes wrong with files, nodes, hubs, buckets and bands."""

from __future__ import annotations

from .tree import KacheryError

__all__ = [
    "AlreadyExists", "BadMessage", "BandUnreachable", "BucketUnreachable", "Cancelled", "CannotLink",
    "ChannelUnknown", "ClientAuthRefused", "ClientOffline", "CorruptFile", "CorruptObject", "DatabaseUnusable",
    "DiskError", "DiskFull", "FileChanged", "FileElsewhere", "HubError", "HubUnreachable", "InvalidArgument",
    "InvalidFeedUri", "InvalidName", "InvalidSetting", "InvalidUri", "LinkInvalid", "LocalFileMissing",
    "LocalFileUnreadable", "ManifestInvalid", "MutableMissing", "NoChannel", "NodeError", "NodeNotRunning",
    "NotADataFile", "NotAvailable", "NotInStore", "NotOnHub", "NotPermitted", "ObjectExists", "ObjectMissing",
    "OwnerTokenRefused", "PartialTransfer", "RateLimited", "RegistryUnreachable", "SignatureInvalid", "StaleMessage",
    "Stalled", "TooLarge", "TooSlow", "UnsafePickle", "UploadRefused", "UrlExpired", "WrongFormat", "WrongSize",
]

# --- 2: the call itself is wrong


class InvalidArgument(KacheryError):
    """{what}"""

    exit_code = 2
    http_status = 400


class InvalidUri(InvalidArgument):
    """{uri!r} is not a content URI: {why}. A content URI looks like
    sha1://<40 hex digits>/<label>?manifest=<40 hex digits>."""


class InvalidName(InvalidArgument):
    """{name!r} cannot be the name of a {kind}: {why}."""


class InvalidSetting(InvalidArgument):
    """The setting {name} = {value!r} (from {source}) is not usable: {why}."""


class NotADataFile(InvalidArgument):
    """{path} is {kind}, not a regular file. Name one file, or several."""


class NoChannel(InvalidArgument):
    """{uri} is not in the local store, and no channel was named to ask on. Pass channel=, use --channel, or set
    KACHERY_CHANNEL."""

    exit_code = 3
    http_status = 404


class InvalidFeedUri(InvalidArgument):
    """{uri!r} is not the URI of a feed: {why}. It looks like feed://<64 hex digits>/<name of a subfeed>."""


class WrongFormat(InvalidArgument):
    """{what} is not {format}: {why}."""


class UnsafePickle(InvalidArgument):
    """{what} holds {found}, which is not among the types that are safe to load from a pickle: numbers, text, bytes,
    lists, tuples, dicts, sets, ranges, slices, dates and times, and numpy arrays and scalars of these."""


class TooLarge(InvalidArgument):
    """{what} is {size} bytes; the limit is {limit} bytes ({setting})."""

    http_status = 413


class BadMessage(InvalidArgument):
    """A message could not be read: {why}."""


# --- 3: not found


class LocalFileMissing(KacheryError):
    """There is no file {path}. Check the path."""

    exit_code = 3
    http_status = 404


class NotInStore(KacheryError):
    """sha1://{sha1} is not in the local store {store}. Load it from a channel (channel=, --channel), or store it
    first."""

    exit_code = 3
    http_status = 404


class ChannelUnknown(KacheryError):
    """This node is not on the channel {channel!r} (it is on: {known}). Join it with: kachery-fast node join
    LINK, where LINK comes from the channel's owner."""

    exit_code = 3
    http_status = 404


class NotAvailable(KacheryError):
    """{uri} could not be loaded from the channel {channel!r}: {why}. Tried: {tried}."""

    exit_code = 3
    http_status = 404


class NotOnHub(KacheryError):
    """The hub has no {kind} {name!r}. {advice}"""

    exit_code = 3
    http_status = 404


class MutableMissing(KacheryError):
    """There is no mutable with the key {key}. See which there are with: kachery-fast mutable list"""

    exit_code = 3
    http_status = 404


class ObjectMissing(KacheryError):
    """The bucket has no object {object}."""

    exit_code = 3
    http_status = 404


# --- 4: not permitted


class OwnerTokenRefused(KacheryError):
    """The hub refused the owner's token: {why}. Pass the right one with --token or KACHERY_HUB_TOKEN; a hub's own
    machine keeps it in the file owner-token of the hub's directory."""

    exit_code = 4
    http_status = 401


class NotPermitted(KacheryError):
    """{who} may not {action} on the channel {channel!r}: {why}."""

    exit_code = 4
    http_status = 403


class ClientAuthRefused(KacheryError):
    """The node refused this client: {why}. A client must be able to read {path}."""

    exit_code = 4
    http_status = 403


class SignatureInvalid(KacheryError):
    """A message that claims to come from {who} is not signed by it. It was refused."""

    exit_code = 4
    http_status = 403


class StaleMessage(KacheryError):
    """A request signed at {time} arrived at {now} ({why}); {limit} s are allowed. Check the clock of this
    machine."""

    exit_code = 4
    http_status = 403


class UploadRefused(KacheryError):
    """The bucket refused {action} of {object}: {why} (HTTP {status})."""

    exit_code = 4
    http_status = 403


class UrlExpired(KacheryError):
    """The signed URL for {object} is no longer valid ({why}). A new one is needed; if new ones expire too, check
    the clocks of this machine and of the hub."""

    exit_code = 4
    http_status = 403


# --- 5: unreachable


class NodeNotRunning(KacheryError):
    """No node answers at {url} ({why}). Start one with: kachery-fast node start"""

    exit_code = 5
    http_status = 503


class ClientOffline(NodeNotRunning):
    """{what} needs a node or the network, and this client is offline: KACHERY_OFFLINE_STORAGE_DIR is set to {path}.
    Unset it to work with a node."""


class HubUnreachable(KacheryError):
    """The hub {url} cannot be reached ({why}). Is it running, and the address right?"""

    exit_code = 5
    http_status = 503


class RegistryUnreachable(KacheryError):
    """The hub's registry {registry} cannot be reached ({why}). The hub goes on by itself when it is back; try again
    then."""

    exit_code = 5
    http_status = 503


class BandUnreachable(KacheryError):
    """The messages of the channel {channel!r} cannot be reached ({why}). The node keeps trying; try again when
    the hub is back."""

    exit_code = 5
    http_status = 503


class BucketUnreachable(KacheryError):
    """The bucket did not answer for {object} ({why}, {attempts} attempts)."""

    exit_code = 5
    http_status = 503


class TooSlow(KacheryError):
    """{what} did not come within {limit_seconds} s; the hub waits no longer."""

    exit_code = 5
    http_status = 408


class RateLimited(KacheryError):
    """{who} asked too often: {limit}. Try again in {retry_seconds} s."""

    exit_code = 5
    http_status = 429


class HubError(KacheryError):
    """The hub {url} failed: {why}."""

    exit_code = 5
    http_status = 502


class NodeError(KacheryError):
    """The node failed: {what}"""

    exit_code = 1
    http_status = 500


# --- 6: damaged or changed data


class CorruptFile(KacheryError):
    """{path} is damaged: its bytes have the SHA-1 {found}, its name says {sha1}. {advice}"""

    exit_code = 6
    http_status = 502


class CorruptObject(KacheryError):
    """The object {object} in the bucket is damaged: its bytes have the SHA-1 {found}, expected {sha1}."""

    exit_code = 6
    http_status = 502


class WrongSize(CorruptObject):
    """The object {object} in the bucket is damaged: it has {found} bytes, expected {expected}."""


class DatabaseUnusable(KacheryError):
    """The database {path} cannot be used: {why}. {advice}"""

    exit_code = 6
    http_status = 500


class ManifestInvalid(KacheryError):
    """The manifest {manifest} is not usable: {why}."""

    exit_code = 6
    http_status = 502


class LinkInvalid(KacheryError):
    """sha1://{sha1} was linked to {path}, which is no longer what it was ({why}). Restore that file, or store it
    anew: it has another name now."""

    exit_code = 6
    http_status = 410


class CannotLink(KacheryError):
    """{path} was not linked: a link is for a file on the machine of the node, in its store, which is {store}, and the
    local store {own} is another one. Link it there, or send a copy: store it with kf.store_file or kachery-fast store.
    Where the node's store is mounted here, set KACHERY_STORAGE_DIR to it."""

    exit_code = 9
    http_status = 409


class FileElsewhere(KacheryError):
    """{uri} is linked in place on the machine of the node, {machine}, at {path}, which is no path of this machine.
    Read it with load_bytes or cat, or give a place for a copy: dest=, --dest."""

    exit_code = 9
    http_status = 409


class FileChanged(KacheryError):
    """{path} changed while it was read ({why}). Nothing was stored; try again when nobody writes to it."""

    exit_code = 6
    http_status = 409


# --- 7: the disk


class DiskFull(KacheryError):
    """No room for {what}: {path} has {free} bytes free, {needed} are needed. Free some space and try again; what
    was already transferred is kept."""

    exit_code = 7
    http_status = 507


class DiskError(KacheryError):
    """The disk refused {action} of {path}: {why}."""

    exit_code = 7
    http_status = 500


class LocalFileUnreadable(DiskError):
    """{path} cannot be read: {why}. Check its permissions."""

    http_status = 403


# --- 8, 9, 130: timing and order


class Stalled(KacheryError):
    """{what} stalled: not a byte for {seconds} s."""

    exit_code = 8
    http_status = 504


class PartialTransfer(KacheryError):
    """{object} broke off after {received} of {expected} bytes."""

    exit_code = 8
    http_status = 502


class AlreadyExists(KacheryError):
    """{what} exists already. {advice}"""

    exit_code = 9
    http_status = 409


class ObjectExists(KacheryError):
    """The bucket has the object {object} already."""

    exit_code = 9
    http_status = 412


class Cancelled(KacheryError):
    """{what} was cancelled."""

    exit_code = 130
    http_status = 499
