"""What can happen to a provider, and what it can ask to be done: the two vocabularies of ``provide.FileProvider``."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from .bodies import Assign, Cancel, Failed, Offer, Progress, Ready, RequestFile2022, UploadFileStatus2022, Want
from .manifest import Manifest

__all__ = ["Asked", "BucketMoved", "Effect", "Event", "LookUp", "LookedUp", "Said", "Tick", "Upload", "Uploaded"]

# --- events


class Asked(Struct, frozen=True):
    """A message of a node that may request files on this channel."""

    body: Want | Assign | Cancel | RequestFile2022
    sender: str


class LookedUp(Struct, frozen=True):
    """The store's answer to ``LookUp``: the size and manifest of a file that is here, or ``reason`` and ``detail``.

    ``reason`` is None when the file is here, ``unknown`` when it never was, else a word of ``Failed.REASONS``.
    """

    query: LookUp
    size: int = 0
    manifest: Manifest | None = None
    manifest_sha1: str | None = None
    reason: str | None = None
    detail: str = ""


class Uploaded(Struct, frozen=True):
    """An object is in the bucket now, or (with a ``reason``) could not be brought there."""

    sha1: str
    reason: str | None = None
    detail: str = ""


class BucketMoved(Struct, frozen=True):
    """The channel has another bucket; what was uploaded so far is in the former one."""


class Tick(Struct, frozen=True):
    """Time has passed."""


Event = Asked | LookedUp | Uploaded | BucketMoved | Tick


# --- effects


class LookUp(Struct, frozen=True):
    """Look a file up in the local store: it, its size, its manifest (``manifest_sha1`` if given, else its own)."""

    sha1: str
    manifest_sha1: str | None
    asked: Asked


class Upload(Struct, frozen=True):
    """Bring the bytes ``start`` to ``end`` of a stored file into the bucket under the name ``sha1``.

    With ``check`` hash them first: the name came from outside, or an earlier upload of it turned out damaged.
    """

    sha1: str
    file_sha1: str
    start: int
    end: int
    check: bool


class Said(Struct, frozen=True):
    """Publish a message on the provideFiles band; the caller adds channel, time and id where the kind has them."""

    kind: type[Offer] | type[Ready] | type[Progress] | type[Failed] | type[UploadFileStatus2022]
    fields: dict[str, Any]


Effect = LookUp | Upload | Said
