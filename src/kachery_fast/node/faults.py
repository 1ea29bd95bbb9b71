"""Faults of the program: logged in full here, while others are told in a line."""

from __future__ import annotations

import logging

__all__ = ["logged_fault"]

log = logging.getLogger("kachery_fast.node")


def logged_fault(error: Exception, doing: str) -> str:
    """Log an error that nobody has foreseen, and return what clients and other nodes are told of it.

    :param doing: what failed, as the subject of a sentence.
    """
    log.error("%s failed", doing, exc_info=error)
    return f"a fault of the program: {error!r}"
