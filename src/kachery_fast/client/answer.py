"""A node's answer as it comes in, and what can be wrong with one."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import KacheryError, NodeError, Stalled
from .progress import Progress, ProgressCallback

__all__ = ["ANSWER_SIZE_BYTES_MAX", "Answer", "error_of", "node_errors", "object_of"]

_READ_HEADER = "X-Kachery-Read"
# Longest answer, and longest line of the progress stream, that is taken from a node.
ANSWER_SIZE_BYTES_MAX = 64 * 1024 * 1024
_LINE_SIZE_BYTES_MAX = 1024 * 1024


class Answer:
    """A node's answer while it comes in; its methods raise the project's errors alone."""

    def __init__(self, response: http.client.HTTPResponse, url: str, stall_seconds: float) -> None:
        self._response = response
        self._url = url
        self._stall_seconds = stall_seconds
        self.status = response.status
        #: what a node knows a read by, empty for other answers
        self.read_name = response.headers.get(_READ_HEADER, "")
        #: how many bytes of a raw body are still to come; None when the node did not say
        self.remaining_bytes: int | None = response.length

    def read(self, size_bytes: int) -> bytes:
        """Return up to ``size_bytes`` of the body, empty at its end."""
        with node_errors(self._url, self._stall_seconds):
            data = self._response.read(size_bytes)
            if not data and self._response.length:
                raise http.client.IncompleteRead(data, self._response.length)
        self.remaining_bytes = self._response.length
        return data

    def json(self) -> dict[str, Any]:
        """Return the body, which is one JSON object."""
        with node_errors(self._url, self._stall_seconds):
            return object_of(self._read_all())

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of a body that has one on each line, as they come in."""
        while True:
            with node_errors(self._url, self._stall_seconds):
                line = self._response.readline(_LINE_SIZE_BYTES_MAX)
                if not line:
                    return
                event = object_of(line)
            yield event

    def result(self, name: str, progress: ProgressCallback | None) -> dict[str, Any]:
        """Wait for the last line of a body that tells how something gets on; it says what came of it.

        :param name: what the node does, for an error.
        """
        for event in self.events():
            kind = event.get("type")
            if kind == "done":
                return event
            if kind == "error":
                raise KacheryError.from_dict(event)
            if progress is not None and kind == "progress":
                progress(Progress(int(event.get("received") or 0), event.get("total"),
                                  str(event.get("waiting") or "")))
        raise NodeError(what=f"it ended {name} without a result")

    def close(self) -> None:
        """Take nothing more of it."""
        self._response.close()

    def error(self) -> KacheryError:
        """Return the error that this answer reports."""
        with node_errors(self._url, self._stall_seconds):
            data = self._read_all()
        return error_of(self.status, data, self._response.reason)

    def _read_all(self) -> bytes:
        data = self._response.read(ANSWER_SIZE_BYTES_MAX)
        if len(data) == ANSWER_SIZE_BYTES_MAX:
            raise NodeError(what=f"its answer is longer than {ANSWER_SIZE_BYTES_MAX} bytes")
        return data


def error_of(status: int, data: bytes, reason: str = "") -> KacheryError:
    """Return the error that the body of an answer tells."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and "error" in content:
        return KacheryError.from_dict(content)
    text = data[:200].decode("utf-8", "replace").strip()
    return NodeError(what=f"HTTP {status} {text or reason}")


def object_of(data: bytes, read: Callable[[bytes], Any] = json.loads) -> dict[str, Any]:
    """Return the JSON object that ``read`` makes of an answer. :raises NodeError: it is none."""
    content = read(data)
    if not isinstance(content, dict):
        raise NodeError(what="its answer is not a JSON object")
    return content


@contextmanager
def node_errors(url: str, stall_seconds: float) -> Iterator[None]:
    """Translate what http.client, the socket and the JSON reader raise, once."""
    try:
        yield
    except TimeoutError as error:
        raise Stalled(what=f"the node at {url}", seconds=stall_seconds) from error
    except http.client.IncompleteRead as error:
        raise NodeError(what=f"its answer broke off, {error.expected} bytes before its end") from error
    except http.client.HTTPException as error:
        raise NodeError(what=f"its answer is not HTTP ({error!r})") from error
    except (ConnectionError, ValueError) as error:
        raise NodeError(what=f"its answer broke off or makes no sense ({error})") from error
