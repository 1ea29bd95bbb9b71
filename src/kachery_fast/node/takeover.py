"""Taking over what the daemon of 2022 left in the storage directory, at a node's start."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..config import Settings
from ..errors import Cancelled, KacheryError
from ..store.takeover import take_over_in_place
from .faults import logged_fault

__all__ = ["take_over"]

log = logging.getLogger("kachery_fast.node")

_FAILED = "the mutables and feeds of 2022 could not be taken over; the next start tries again: %s"


def take_over(settings: Settings, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Take over mutables and feeds of 2022; whatever is wrong with them, it is logged and the node goes on.

    :param is_stopped: whether the node is to end; the take-over is broken off then.
    """
    def check() -> None:
        if is_stopped():
            raise Cancelled(what="The taking over of mutables and feeds of 2022")

    try:
        take_over_in_place(settings.storage_dir, mutable_size_bytes_max=settings.mutable_size_bytes_max,
                           message_size_bytes_max=settings.feed_message_size_bytes_max, check=check)
    except Cancelled as error:
        log.info("%s The next start goes on with it.", error)
    except KacheryError as error:
        log.error(_FAILED, error)
    except Exception as error:
        log.error(_FAILED, logged_fault(error, "the taking over of mutables and feeds of 2022"))
