"""What is told of a function that raised: cut to what a message can carry, and read as an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import KacheryError, TaskCrashed, TaskFailed, TaskHung
from .inquiry import harmless

__all__ = ["CRASHED", "HUNG", "error_report", "task_error"]

HUNG = TaskHung.__name__
"""The type in the report of a function that did not end in time; the message names the seconds it had."""

CRASHED = TaskCrashed.__name__
"""The type in the report of a function whose process died."""

# An error travels in one message of a band, twice: as such, and in the receipt.
_TYPE_BYTES = 200
_MESSAGE_BYTES = 2000
_TRACEBACK_BYTES = 8000
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def error_report(type_name: str, message: str, traceback: str = "") -> dict[str, str]:
    """Return what is told of a function that raised: ``{"type", "message", "traceback"}``, cut to what a message can
    carry. Of a long traceback the end is kept."""
    return {"type": _cut(type_name, _TYPE_BYTES), "message": _cut(message, _MESSAGE_BYTES),
            "traceback": _cut(traceback, _TRACEBACK_BYTES, keep_end=True)}


def task_error(function: str, report: Mapping[str, Any], **details: Any) -> KacheryError:
    """Return the error that a report of ``error_report``, as it came from another node, tells of.

    :param details: what else the error is to carry.
    """
    kind, message = harmless(str(report.get("type") or "an error")), _lines(str(report.get("message", "")))
    details = {**details, "function": function, "type": kind, "reason": message,
               "traceback": _lines(str(report.get("traceback", "")))}
    if kind == CRASHED:
        return TaskCrashed(**details)
    if kind == HUNG:
        found = _NUMBER.search(message)
        return TaskHung(**details, seconds=found[0] if found else "?")
    return TaskFailed(**details)


def _lines(text: str) -> str:
    """Cut a foreign text of several lines, and blank what could steer a terminal."""
    return "".join(character if character.isprintable() or character in "\n\t" else " "
                   for character in text[:2 * _TRACEBACK_BYTES])


def _cut(text: str, size_bytes_max: int, *, keep_end: bool = False) -> str:
    """Cut a text to a number of bytes as it stands in JSON; what UTF-8 cannot write becomes a question mark."""
    text = text[-size_bytes_max - 1:] if keep_end else text[:size_bytes_max + 1]  # a character takes a byte or more
    text = text.encode("utf-8", "replace").decode()
    sizes = [len(msgspec.json.encode(character)) - 2 for character in text]
    if sum(sizes) <= size_bytes_max:
        return text
    room, kept = size_bytes_max - len("…".encode()), 0
    for size in reversed(sizes) if keep_end else sizes:
        room -= size
        if room < 0:
            break
        kept += 1
    return "…" + text[len(text) - kept:] if keep_end else text[:kept] + "…"
