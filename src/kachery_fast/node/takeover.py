"""Taking over what the daemon of 2022 left in the storage directory, at a node's start."""

from __future__ import annotations

import logging

from ..config import Settings
from ..errors import KacheryError
from ..store.takeover import take_over_in_place
from .faults import logged_fault

__all__ = ["take_over"]

log = logging.getLogger("kachery_fast.node")

_FAILED = "the mutables and feeds of 2022 could not be taken over; the next start tries again: %s"


def take_over(settings: Settings) -> None:
    """Take over mutables and feeds of 2022; whatever is wrong with them, it is logged and the node goes on."""
    try:
        take_over_in_place(settings.storage_dir, mutable_size_bytes_max=settings.mutable_size_bytes_max,
                           message_size_bytes_max=settings.feed_message_size_bytes_max)
    except KacheryError as error:
        log.error(_FAILED, error)
    except Exception as error:
        log.error(_FAILED, logged_fault(error, "the taking over of mutables and feeds of 2022"))
