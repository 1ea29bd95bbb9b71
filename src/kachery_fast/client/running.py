"""What happens where a registered function runs: in a worker process, a thread, or wherever an executor takes it.

A ``Job`` goes there and an ``Outcome`` comes back, both of plain data, so that nothing that a function returns or
raises has to be pickled. What it returns is put into the store where it was made: a gigabyte is not sent between
processes. Progress goes to the backend in datagrams over loopback, whatever the executor.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import math
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidArgument, KacheryError
from ..protocol.task_errors import error_report
from ..protocol.tasks import check_json

__all__ = ["Job", "Outcome", "encode_result", "leave_ticket", "report_progress", "run_job"]

_TEXT_LENGTH_MAX = 500
_TICKET = "kachery-fast-{}"
_TICKET_SECONDS = 10


@dataclass(frozen=True)
class Job:
    """One call of a function. ``token`` is what its progress is known by at ``port`` of loopback on ``host``;
    ``storage_dir`` is where the backend stores, and ``size_bytes_max`` how long a result in an answer may be. ``once``:
    it begins only with the ticket that ``leave_ticket`` has left for it."""

    function_id: str
    function: Callable[..., Any]
    kind: str
    kwargs: dict[str, Any]
    token: str
    host: str
    port: int
    storage_dir: str
    size_bytes_max: int
    once: bool = False


@dataclass(frozen=True)
class Outcome:
    """How it ended. ``status`` is "finished", "error", "crashed", "hung" or, of what is yet to be stored by the
    backend, "returned" with the ``value``; ``result`` is as ``protocol.tasks`` has it, ``error`` an error's report."""

    status: str
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    value: Any = None


_current: contextvars.ContextVar[Job | None] = contextvars.ContextVar("kachery_fast_job", default=None)


def run_job(job: Job) -> Outcome:
    """Call the function of a job, and store what it returns; nothing is raised."""
    token = _current.set(job)
    try:
        if job.once and not _takes_ticket(job.token):
            return Outcome("cancelled", error=error_report("WorkerLost", "Dask lost the worker that had begun it"))
        _tell(job, {})
        value = job.function(**job.kwargs)
    except BaseException as error:  # SystemExit too: a function does not end the process it runs in
        return Outcome("error", error=describe_error(error, job))
    finally:
        _current.reset(token)
    if job.kind == "action":
        return Outcome("finished")
    if not _stores_there(job):
        return Outcome("returned", value=value)
    return encoded(job.function_id, value, job.size_bytes_max)


def leave_ticket(client: Any, token: str) -> Any:
    """Leave with Dask's scheduler what a job that begins once takes before it begins; to be closed when it has ended.

    Dask calls a function again when its worker is lost, also after it has returned, or while it still runs where the
    scheduler does not see it. Whoever comes second finds no ticket.
    """
    import distributed

    untyped: Any = distributed
    ticket = untyped.Queue(_TICKET.format(token), client=client)
    ticket.put(True, timeout=_TICKET_SECONDS)
    return ticket


def _takes_ticket(token: str) -> bool:
    import distributed

    untyped: Any = distributed
    ticket = untyped.Queue(_TICKET.format(token), client=untyped.get_client())
    try:
        return bool(ticket.get(batch=True))  # at once
    finally:
        ticket.close()


def encoded(function_id: str, value: Any, size_bytes_max: int) -> Outcome:
    """Return the outcome of a function that returned ``value``; what cannot be passed on is an error of its own."""
    try:
        return Outcome("finished", result=encode_result(value, size_bytes_max))
    except InvalidArgument as error:
        return Outcome("error", error=error_report(
            "TypeError", f"What {function_id!r} returned cannot be passed on: {error.message.rstrip('.')}. A task "
                         "returns JSON, a numpy array or bytes; store anything else as a file, and return its URI."))
    except KacheryError as error:
        return Outcome("error", error=error_report(type(error).__name__, error.message))
    except BaseException as error:
        return Outcome("error", error=describe_error(error))


def encode_result(value: Any, size_bytes_max: int) -> dict[str, Any]:
    """Return ``{"json": value}``, or ``{"file": URI, "format": …}`` of an array, of bytes, and of what is longer than
    ``size_bytes_max`` as JSON.

    :raises InvalidArgument: it is none of these. :raises DiskFull, DiskError: it could not be stored.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        from .formats import store_npy

        return {"file": store_npy(value, label="result.npy"), "format": "npy"}
    if isinstance(value, bytes | bytearray | memoryview):
        from .storing import store_bytes

        return {"file": store_bytes(bytes(value), "result.dat"), "format": "bytes"}
    try:
        check_json(value, "the result")
    except InvalidArgument:
        if numpy is None:
            raise
        value = _without_scalars(value, numpy.generic)
        check_json(value, "the result")
    if _is_short(value, size_bytes_max):
        return {"json": value}
    from .formats import store_json, store_text

    if isinstance(value, str):
        return {"file": store_text(value, label="result.txt"), "format": "text"}
    return {"file": store_json(value, label="result.json"), "format": "json"}


def report_progress(fraction: float, text: str = "") -> None:
    """Tell how far the function is that calls this, when it runs as a task; without effect when it does not.

    It costs some microseconds, and what is told too often is passed on less often.

    :param fraction: 0 to 1. :param text: what it is at, for people; at most 500 characters are passed on.
    :raises InvalidArgument: ``fraction`` is no number.
    """
    try:
        number = float(fraction)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise InvalidArgument(what=f"report_progress({fraction!r}): use a number from 0 to 1.")
    job = _current.get()
    if job is not None:
        _tell(job, {"progress": min(max(number, 0.0), 1.0), "text": str(text)[:_TEXT_LENGTH_MAX]})


def describe_error(error: BaseException, job: Job | None = None) -> dict[str, str]:
    """Return the report of what a function raised, with the traceback from the function on."""
    kind = type(error)
    plain = kind.__module__ in ("builtins", "__main__")
    name = kind.__qualname__ if plain else f"{kind.__module__}.{kind.__qualname__}"
    try:
        message = str(error)
    except Exception as failed:  # of a class of theirs
        message = f"it has no text ({failed!r})"
    trace = error.__traceback__
    if job is not None and trace is not None:
        trace = trace.tb_next  # without the frame of this module
    try:
        lines = traceback.format_exception(kind, error, trace)
    except Exception:
        lines = []
    return error_report(name, message, "".join(lines))


def _tell(job: Job, what: dict[str, Any]) -> None:
    """Send a datagram to the backend. One that is lost costs a message, and one that nobody hears nothing."""
    if job.host != socket.gethostname():
        return
    data = json.dumps({"token": job.token, **what}, ensure_ascii=True).encode("ascii")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(data, ("127.0.0.1", job.port))


def _stores_there(job: Job) -> bool:
    """Whether what is stored here is stored where the backend looks for it."""
    from .place import client_settings

    return job.host == socket.gethostname() and job.storage_dir == str(client_settings().storage_dir)


def _is_short(value: Any, size_bytes_max: int) -> bool:
    if isinstance(value, str):
        return len(value) <= size_bytes_max and len(json.dumps(value)) <= size_bytes_max
    return len(json.dumps(value, separators=(",", ":"))) <= size_bytes_max


def _without_scalars(value: Any, scalar: type) -> Any:
    """Return ``value`` with plain numbers in the place of numpy's."""
    if isinstance(value, scalar):
        return value.item()  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return {_without_scalars(key, scalar): _without_scalars(item, scalar) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_scalars(item, scalar) for item in value]
    return value
