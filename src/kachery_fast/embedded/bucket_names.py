"""Which names objects of the embedded bucket can have."""

from __future__ import annotations

import re

__all__ = ["KINDS", "is_hashed", "is_object_name", "is_replaceable"]

#: The folders of a channel: files with their chunks and manifests, feeds, and results of tasks.
KINDS = ("feeds", "sha1", "task_results")

# WIRE-2022.md §4, and our segments. Each name but theirs repeats the head of its hash as three folders.
_OBJECT_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/(?:"
    r"(?:sha1|task_results)/([0-9a-f]{2})/([0-9a-f]{2})/([0-9a-f]{2})/\1\2\3[0-9a-f]{34}"
    r"|feeds/([0-9a-f]{2})/([0-9a-f]{2})/([0-9a-f]{2})/\4\5\6[0-9a-f]{58}"
    r"/subfeeds/([0-9a-f]{2})/([0-9a-f]{2})/([0-9a-f]{2})/\7\8\9[0-9a-f]{34}"
    r"/(?:subfeed\.json|segments/[0-9a-f]{40}|0|[1-9][0-9]{0,14})"
    r")", re.ASCII)


def is_object_name(text: str) -> bool:
    """Whether ``text`` is ``<channel>/(sha1|feeds|task_results)/...`` exactly as nodes build it."""
    return _OBJECT_NAME.fullmatch(text) is not None


def is_replaceable(name: str) -> bool:
    """Whether an object of this name (which must be one) may be replaced: a subfeed's index, a task's result."""
    return name.endswith("/subfeed.json") or name.split("/", 2)[1] == "task_results"


def is_hashed(name: str) -> bool:
    """Whether the name tells the SHA-1 of the object's bytes."""
    return "/segments/" in name or name.split("/", 2)[1] == "sha1"
