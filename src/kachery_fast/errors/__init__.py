"""One tree of errors.

Every class carries an ``exit_code`` (of the command line) and an ``http_status`` (of the node's and the hub's
API). Its docstring is the message: a sentence on what happened, to what, and what to do next, with the names of
the details in braces. ``to_dict`` and ``from_dict`` carry an error over HTTP without losing its type or details.

Exit codes: 1 internal, 2 usage, 3 not found, 4 not permitted, 5 unreachable, 6 damaged or changed data,
7 disk, 8 timed out, 9 conflict, 130 interrupted.
"""

from __future__ import annotations

from .cache import (
    CacheConfigInvalid,
    CacheElsewhere,
    CacheOfAnother,
    FilePinned,
    NotInTrash,
    OnlyCopyHere,
    StoredMeanwhile,
)
from .engines import AddressRefused, CredentialsUnreadable, EngineUnusable
from .feeds import (
    FeedChainBroken,
    FeedForked,
    FeedInvalid,
    FeedNotWritable,
    FeedUnknown,
    HeadInvalid,
    SubfeedNotAvailable,
)
from .general import (
    AlreadyExists,
    BadMessage,
    BandUnreachable,
    BucketUnreachable,
    Cancelled,
    CannotLink,
    ChannelUnknown,
    ClientAuthRefused,
    ClientOffline,
    CorruptFile,
    CorruptObject,
    DatabaseUnusable,
    DiskError,
    DiskFull,
    FileChanged,
    FileElsewhere,
    HubError,
    HubUnreachable,
    InvalidArgument,
    InvalidFeedUri,
    InvalidName,
    InvalidSetting,
    InvalidUri,
    LinkInvalid,
    LocalFileMissing,
    LocalFileUnreadable,
    ManifestInvalid,
    MutableMissing,
    NoChannel,
    NodeError,
    NodeNotRunning,
    NotADataFile,
    NotAvailable,
    NotInStore,
    NotOnHub,
    NotPermitted,
    ObjectExists,
    ObjectMissing,
    OwnerTokenRefused,
    PartialTransfer,
    RateLimited,
    RegistryUnreachable,
    SignatureInvalid,
    StaleMessage,
    Stalled,
    TooLarge,
    TooSlow,
    UnsafePickle,
    UploadRefused,
    UrlExpired,
    WrongFormat,
    WrongSize,
)
from .hub import ActionRefused, ChannelPrivate, NotApproved, QuotaExceeded, SignInRefused
from .sign_in import AccountTaken, IdentityRefused, IdTokenRefused, ProviderUnusable
from .tasks import (
    ResultRefused,
    TaskCrashed,
    TaskFailed,
    TaskHung,
    TaskNotTaken,
    TaskOutcomeUnknown,
    TaskPending,
    TaskUnknown,
)
from .tree import KacheryError

__all__ = [
    "AccountTaken", "ActionRefused", "AddressRefused", "AlreadyExists", "BadMessage", "BandUnreachable",
    "BucketUnreachable", "CacheConfigInvalid", "CacheElsewhere", "CacheOfAnother", "Cancelled", "CannotLink",
    "ChannelPrivate", "ChannelUnknown", "ClientAuthRefused", "ClientOffline", "CorruptFile", "CorruptObject",
    "CredentialsUnreadable", "DatabaseUnusable", "DiskError", "DiskFull", "EngineUnusable", "FeedChainBroken",
    "FeedForked", "FeedInvalid", "FeedNotWritable", "FeedUnknown", "FileChanged", "FileElsewhere", "FilePinned",
    "HeadInvalid", "HubError", "HubUnreachable", "IdTokenRefused", "IdentityRefused", "InvalidArgument",
    "InvalidFeedUri", "InvalidName", "InvalidSetting", "InvalidUri", "KacheryError", "LinkInvalid", "LocalFileMissing",
    "LocalFileUnreadable", "ManifestInvalid", "MutableMissing", "NoChannel", "NodeError", "NodeNotRunning",
    "NotADataFile", "NotApproved", "NotAvailable", "NotInStore", "NotInTrash", "NotOnHub", "NotPermitted",
    "ObjectExists", "ObjectMissing", "OnlyCopyHere", "OwnerTokenRefused", "PartialTransfer", "ProviderUnusable",
    "QuotaExceeded", "RateLimited", "RegistryUnreachable", "ResultRefused", "SignInRefused", "SignatureInvalid",
    "StaleMessage", "Stalled", "StoredMeanwhile", "SubfeedNotAvailable", "TaskCrashed", "TaskFailed", "TaskHung",
    "TaskNotTaken", "TaskOutcomeUnknown", "TaskPending", "TaskUnknown", "TooLarge", "TooSlow", "UnsafePickle",
    "UploadRefused", "UrlExpired", "WrongFormat", "WrongSize",
]
