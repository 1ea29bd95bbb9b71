"""Move multi-gigabyte recordings between workstations by content URI.

    import kachery_fast as kf

    uri = kf.store_file("recording.dat")             # on one machine
    path = kf.load_file(uri, channel="my-lab")       # on another

This is the front door: public names only, each loaded from its room when it is first used, so that the import costs
next to nothing. Everything raises errors of the one tree under ``KacheryError``; nothing returns None for failure.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .client.backend import run_task_backend
    from .client.ephemeral import EphemeralNode, ephemeral_node
    from .client.feeds import (
        Feed,
        create_feed,
        delete_feed,
        get_feed_id,
        list_feeds,
        load_feed,
        load_subfeed,
        watch_for_new_messages,
    )
    from .client.files import (
        Loaded,
        info,
        load,
        load_bytes,
        load_file,
        verify,
        why,
    )
    from .client.formats import (
        load_json,
        load_npy,
        load_pkl,
        load_text,
        store_json,
        store_npy,
        store_pkl,
        store_text,
    )
    from .client.functions import taskfunction
    from .client.mutables import delete, get, set  # noqa: A004 - its name since 2022
    from .client.progress import Progress, ProgressCallback
    from .client.running import report_progress
    from .client.storing import link_file, store_file, store_files
    from .client.subfeeds import Subfeed
    from .client.tasks import Task, request_task
    from .client.uploading import upload_file
    from .errors import KacheryError

__all__ = [
    "EphemeralNode",
    "Feed",
    "KacheryError",
    "Loaded",
    "Progress",
    "ProgressCallback",
    "Subfeed",
    "Task",
    "__version__",
    "create_feed",
    "delete",
    "delete_feed",
    "ephemeral_node",
    "get",
    "get_feed_id",
    "info",
    "link_file",
    "list_feeds",
    "load",
    "load_bytes",
    "load_feed",
    "load_file",
    "load_json",
    "load_npy",
    "load_pkl",
    "load_subfeed",
    "load_text",
    "report_progress",
    "request_task",
    "run_task_backend",
    "set",
    "store_file",
    "store_files",
    "store_json",
    "store_npy",
    "store_pkl",
    "store_text",
    "taskfunction",
    "upload_file",
    "verify",
    "watch_for_new_messages",
    "why",
]

_ROOMS = {
    "EphemeralNode": "client.ephemeral",
    "Feed": "client.feeds",
    "KacheryError": "errors",
    "Loaded": "client.files",
    "Progress": "client.progress",
    "ProgressCallback": "client.progress",
    "Subfeed": "client.subfeeds",
    "Task": "client.tasks",
    "create_feed": "client.feeds",
    "delete": "client.mutables",
    "delete_feed": "client.feeds",
    "ephemeral_node": "client.ephemeral",
    "get": "client.mutables",
    "get_feed_id": "client.feeds",
    "info": "client.files",
    "link_file": "client.storing",
    "list_feeds": "client.feeds",
    "load": "client.files",
    "load_bytes": "client.files",
    "load_feed": "client.feeds",
    "load_file": "client.files",
    "load_json": "client.formats",
    "load_npy": "client.formats",
    "load_pkl": "client.formats",
    "load_subfeed": "client.feeds",
    "load_text": "client.formats",
    "report_progress": "client.running",
    "request_task": "client.tasks",
    "run_task_backend": "client.backend",
    "set": "client.mutables",
    "store_file": "client.storing",
    "store_files": "client.storing",
    "store_json": "client.formats",
    "store_npy": "client.formats",
    "store_pkl": "client.formats",
    "store_text": "client.formats",
    "taskfunction": "client.functions",
    "upload_file": "client.uploading",
    "verify": "client.files",
    "watch_for_new_messages": "client.feeds",
    "why": "client.files",
}


def __getattr__(name: str) -> Any:
    room = _ROOMS.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{room}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # not set(): that may be the mutables' by then
