"""Tasks: their identity, the signed object that holds a result, and the signed receipt of an action.

**Identity.** The id of a pure calculation is the SHA-1 of the canonical JSON of ``{"functionId", "kwargs"}``, as in
2022; its result has the same id. A query or an action has a random id, chosen by who asks; the result of a query is
kept under the SHA-1 of ``{"functionId", "kwargs", "type": "query"}``, and replaced by each newer one; an action has
none. JSON knows one kind of number: ``1`` and ``1.0`` are the same argument, and a function receives both as ``1``
(``canonical_kwargs``), so that what is computed depends on the identity alone.

**Result.** The object ``<channel>/task_results/…`` is ``{"body":{…},"signature":"<128 hex>"}``, without a space; the
signature is that of the node that ran the function, over the bytes of the body as they stand there. Canonical JSON
would make ``1`` of a result of ``1.0``, and cost ten times more to check.

**Receipt.** ``{"body": {...}, "signature"}``, the word of the node that ran an action on how it ended.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..errors import BadMessage, InvalidArgument, InvalidName, InvalidUri, ResultRefused, SignatureInvalid, TooLarge
from . import plain_json
from .canonical import canonical_bytes
from .names import check_channel_name, is_node_id, parse_file_uri
from .signing import public_id, sign, verify, verify_bytes
from .task_bodies import TASK_KINDS

__all__ = [
    "FILE_FORMATS", "FUNCTION_LENGTH_MAX", "RECEIPT_OUTCOMES", "RESULT_FRAME_SIZE_BYTES", "Receipt", "TaskResult",
    "canonical_kwargs", "check_function", "check_json", "check_kind", "check_kwargs", "check_receipt", "check_result",
    "check_result_value", "check_task_id", "result_id", "sign_receipt", "sign_result", "task_id",
]

FILE_FORMATS = ("npy", "bytes", "json", "text")
"""How a result that is a file is to be read."""

RECEIPT_OUTCOMES = ("finished", "error")

FUNCTION_LENGTH_MAX = 200
"""Characters of the id of a function."""

RESULT_FRAME_SIZE_BYTES = 64 * 1024  # around value and arguments: names, times, signature, JSON written less tersely
_KWARGS_SIZE_BYTES_MAX = 128 * 1024  # in a result, twice what a message carries: to make them canonical takes long
_INTEGER_MAX = 2**53 - 1
_DEPTH_MAX = 200
_SIGNATURE = re.compile(rb"[0-9a-f]{128}")
_HEAD, _MIDDLE, _TAIL = b'{"body":', b',"signature":"', b'"}'
_SIGNATURE_LENGTH = 128

_Time = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


# --- identity


def check_function(function: object) -> str:
    """Return ``function`` when it can be the id of a function: 1 to 200 printable characters without outer spaces.

    :raises InvalidName: it cannot.
    """
    if (not isinstance(function, str) or not 0 < len(function) <= FUNCTION_LENGTH_MAX or not function.isprintable()
            or function != function.strip()):
        raise InvalidName(name=str(function)[:100], kind="task function",
                          why=f"use 1 to {FUNCTION_LENGTH_MAX} printable characters, without spaces at the ends")
    return function


def check_kind(kind: object) -> str:
    """Return ``kind`` when it is one of the three kinds of task.

    :raises InvalidArgument: it is not.
    """
    if not isinstance(kind, str) or kind not in TASK_KINDS:
        raise InvalidArgument(what=f"{str(kind)[:60]!r} is no kind of task; the kinds are {', '.join(TASK_KINDS)}")
    return kind


def check_json(value: object, what: str, *, integer_max: int | None = None) -> None:
    """Make sure that JSON can hold ``value`` without changing it.

    :raises InvalidArgument: it holds something else than dicts with texts as keys, lists, texts, numbers, bools and
        None; a number that is not finite; an integer beyond ``integer_max``; or it is nested more than 200 deep. The
        error names the place.
    """
    _check_json(value, what, 0, integer_max)


def _check_json(value: object, where: str, depth: int, integer_max: int | None) -> None:
    if value is None or isinstance(value, bool):
        return
    if depth > _DEPTH_MAX:
        raise InvalidArgument(what=f"{where[:100]}… is nested more than {_DEPTH_MAX} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidArgument(what=f"{where} is not text that UTF-8 can write") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidArgument(what=f"{where} has a key that is no text: {key!r:.60}")
            _check_json(key, f"a key of {where}", depth + 1, None)
            _check_json(item, f"{where}[{key!r:.60}]", depth + 1, integer_max)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if type(item) is float and item - item == 0.0:  # the bulk of long results
                continue
            _check_json(item, f"{where}[{index}]", depth + 1, integer_max)
    elif isinstance(value, int):
        if integer_max is not None and abs(value) > integer_max:
            raise InvalidArgument(what=f"{where} is an integer beyond {integer_max}; write it as text")
    elif isinstance(value, float):
        if value - value != 0.0:
            raise InvalidArgument(what=f"{where} is {value}, which JSON cannot hold")
    else:
        raise InvalidArgument(what=f"{where} is of type {type(value).__name__}, which JSON cannot hold")


def check_kwargs(kwargs: object, size_bytes_max: int) -> bytes:
    """Return the canonical JSON of the arguments of a task.

    :raises InvalidArgument: they are no dict with texts as keys, JSON cannot hold them, or an integer is beyond
        2**53 - 1, so that two of them would have one canonical form (RFC 8785, 3.2.2.3). The error names the place.
    :raises TooLarge: they are longer than ``size_bytes_max``.
    """
    if not isinstance(kwargs, dict):
        raise InvalidArgument(what=f"The arguments of a task are a dict, not {type(kwargs).__name__}")
    check_json(kwargs, "kwargs", integer_max=_INTEGER_MAX)
    data = canonical_bytes(kwargs)
    if len(data) > size_bytes_max:
        raise TooLarge(what="The arguments of the task, as JSON,", size=len(data), limit=size_bytes_max,
                       setting="task_kwargs_size_bytes_max; pass what is long as a file, by its URI")
    return data


def canonical_kwargs(data: bytes) -> dict[str, Any]:
    """Return the arguments as a function receives them: ``data`` of ``check_kwargs``, read."""
    kwargs: dict[str, Any] = json.loads(data, parse_int=_number)
    return kwargs


def _number(text: str) -> int | float:
    """Read an integer of canonical JSON; what a double does not hold exactly as one can only have been a float."""
    number = int(text)
    return number if abs(number) <= _INTEGER_MAX else float(number)


def task_id(function: str, kwargs: dict[str, Any] | bytes) -> str:
    """Return the id of a pure calculation: 40 hex digits.

    :param kwargs: the arguments, or their canonical JSON (``check_kwargs``).
    """
    return _identity(function, kwargs, b"")


def result_id(kind: str, function: str, kwargs: dict[str, Any] | bytes) -> str:
    """Return the id under which the result of a pure calculation or a query is kept: 40 hex digits.

    :raises InvalidArgument: an action has no result to keep.
    """
    if kind == "pure-calculation":
        return task_id(function, kwargs)
    if kind == "query":
        return _identity(function, kwargs, b',"type":"query"')
    raise InvalidArgument(what=f"The result of a task of the kind {kind!r} is not kept")


def _identity(function: str, kwargs: dict[str, Any] | bytes, more: bytes) -> str:
    data = kwargs if isinstance(kwargs, bytes) else canonical_bytes(kwargs)
    # The keys stand in the order of RFC 8785.
    text = b'{"functionId":' + canonical_bytes(function) + b',"kwargs":' + data + more + b"}"
    return hashlib.sha1(text, usedforsecurity=False).hexdigest()


def check_task_id(kind: str, task: object) -> str:
    """Return ``task`` when it can be the id of a task of this kind: 40 hex digits for a pure calculation, else 32.

    :raises InvalidName: it cannot.
    """
    digits = 40 if kind == "pure-calculation" else 32
    if not isinstance(task, str) or re.fullmatch(f"[0-9a-f]{{{digits}}}", task) is None:
        raise InvalidName(name=str(task)[:100], kind=kind, why=f"its id is {digits} hex digits, in lower case")
    return task


# --- results


@dataclass(frozen=True)
class TaskResult:
    """A result whose signature holds. ``node_id`` signed it and ran the function; times are milliseconds since the
    epoch; ``result`` is ``{"json": value}`` or ``{"file": URI, "format": one of FILE_FORMATS}``."""

    node_id: str
    task: str
    function: str
    kind: str
    kwargs: dict[str, Any]
    result: dict[str, Any]
    started_ms: int
    finished_ms: int


class _ResultBody(msgspec.Struct, tag="taskResult", tag_field="type"):
    version: int
    channel: str
    task: str
    function: str
    kind: str
    kwargs: msgspec.Raw
    result: dict[str, Any]
    node: str
    started: _Time
    finished: _Time


def check_result_value(result: object) -> dict[str, Any]:
    """Return ``result`` when it is ``{"json": value}`` or ``{"file": URI, "format": …}``.

    :raises InvalidArgument: it is neither, or JSON cannot hold the value.
    """
    found = _check_shape(result)
    if "json" in found:
        check_json(found["json"], "the result")
    return found


def _check_shape(result: object) -> dict[str, Any]:
    if isinstance(result, dict):
        if set(result) == {"json"}:
            return result
        if set(result) == {"file", "format"} and isinstance(result["file"], str) and result["format"] in FILE_FORMATS:
            parse_file_uri(result["file"])
            return result
    raise InvalidArgument(what='a result is {"json": value}, or {"file": URI, "format": one of '
                               f'{", ".join(FILE_FORMATS)}}}')


def sign_result(*, channel: str, task: str, function: str, kind: str, kwargs: dict[str, Any], result: dict[str, Any],
                started_ms: int, finished_ms: int, key: Ed25519PrivateKey) -> bytes:
    """Return the object that holds a result, signed by the key of the node that ran the function.

    :param result: ``{"json": value}`` or ``{"file": URI, "format": one of FILE_FORMATS}``.
    :raises InvalidArgument: an argument is not as documented, or JSON cannot hold the result.
    """
    check_channel_name(channel)
    check_function(function)
    if kind not in ("pure-calculation", "query"):
        raise InvalidArgument(what=f"The result of a task of the kind {kind!r} is not kept")
    check_task_id(kind, task)
    check_result_value(result)
    body = msgspec.json.encode(_ResultBody(1, channel, task, function, kind, msgspec.Raw(msgspec.json.encode(kwargs)),
                                           result, public_id(key), started_ms, finished_ms))
    plain_json.check_numbers(body)
    return _HEAD + body + _MIDDLE + key.sign(body).hex().encode() + _TAIL


def check_result(data: bytes, result_id: str, channel: str) -> TaskResult:
    """Read the object that holds a result.

    What is left to the caller: whether ``node_id`` may provide tasks on the channel.

    :param result_id: the id under which it was found, of which it must be the result.
    :raises ResultRefused: it is malformed, another task's or channel's, or the signature does not hold.
    """
    def refuse(why: str) -> NoReturn:
        raise ResultRefused(task=result_id, why=why)

    end = len(data) - len(_TAIL) - _SIGNATURE_LENGTH
    start = end - len(_MIDDLE)
    if (start < len(_HEAD) or data[:len(_HEAD)] != _HEAD or data[start:end] != _MIDDLE or data[-len(_TAIL):] != _TAIL
            or _SIGNATURE.fullmatch(data, end, end + _SIGNATURE_LENGTH) is None):
        refuse("it is not a body and a signature")
    signed = data[len(_HEAD):start]
    try:
        plain_json.check_numbers(signed)
        body = msgspec.json.decode(signed, type=_ResultBody)
        kwargs = _read_kwargs(body.kwargs)
        value = _check_shape(body.result)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        refuse(f"its body is not as documented ({error})")
    except (InvalidArgument, InvalidUri) as error:
        refuse(error.message)
    if body.version != 1:
        refuse(f"it is of version {body.version}, and this program reads version 1")
    if body.channel != channel:
        refuse(f"it was signed for the channel {body.channel[:64]!r}")
    if not is_node_id(body.node):
        refuse("it does not name the node that signed it")
    _check_identity(body, kwargs, result_id, refuse)
    if not verify_bytes(signed, data[end:end + _SIGNATURE_LENGTH].decode(), body.node):
        refuse(f"it is not signed by the node {body.node[:16]} that it names")
    return TaskResult(body.node, body.task, body.function, body.kind, kwargs, value, body.started, body.finished)


def _read_kwargs(data: msgspec.Raw) -> dict[str, Any]:
    if len(data) > _KWARGS_SIZE_BYTES_MAX or bytes(data)[:1] != b"{":
        raise InvalidArgument(what=f"its kwargs are no object, or longer than {_KWARGS_SIZE_BYTES_MAX} bytes")
    return msgspec.json.decode(data, type=dict[str, Any])


def _check_identity(body: _ResultBody, kwargs: dict[str, Any], wanted: str, refuse: Callable[[str], NoReturn]) -> None:
    try:
        check_function(body.function)
        check_task_id(check_kind(body.kind), body.task)
        found = result_id(body.kind, body.function, kwargs)
    except (InvalidArgument, BadMessage) as error:
        refuse(error.message)
    if found != wanted or (body.kind == "pure-calculation" and body.task != wanted):
        refuse(f"it is the result of another task: of {body.function!r} with other arguments")


# --- receipts


@dataclass(frozen=True)
class Receipt:
    """How an action ended, by the word of the node that ran it. ``outcome`` is ``finished`` or ``error``; ``error`` is
    ``{"type", "message", "traceback"}`` or None; times are milliseconds since the epoch."""

    node_id: str
    task: str
    function: str
    kwargs_sha1: str
    outcome: str
    error: dict[str, str] | None
    started_ms: int
    finished_ms: int


class _ReceiptBody(msgspec.Struct, tag="taskReceipt", tag_field="type", rename="camel"):
    version: int
    channel: str
    task: str
    function: str
    kwargs_sha1: str
    outcome: str
    node: str
    started: _Time
    finished: _Time
    error: dict[str, str] | None = None


class _SignedReceipt(msgspec.Struct, forbid_unknown_fields=True):
    body: dict[str, Any]
    signature: str


def sign_receipt(*, channel: str, task: str, function: str, kwargs: dict[str, Any], outcome: str,
                 error: dict[str, str] | None, started_ms: int, finished_ms: int,
                 key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the receipt of an action, signed by the key of the node that ran it.

    :param outcome: ``finished``, or ``error`` with ``error`` of ``error_report``.
    :raises InvalidArgument: an argument is not as documented.
    """
    check_channel_name(channel)
    check_function(function)
    check_task_id("action", task)
    if outcome not in RECEIPT_OUTCOMES or (outcome == "error") != (error is not None):
        raise InvalidArgument(what=f"an action ends as {' or '.join(RECEIPT_OUTCOMES)}, the latter with its error")
    body = {
        "type": "taskReceipt", "version": 1, "channel": channel, "task": task, "function": function,
        "kwargsSha1": _sha1(canonical_bytes(kwargs)), "outcome": outcome, "error": error, "node": public_id(key),
        "started": started_ms, "finished": finished_ms}
    return {"body": body, "signature": sign(body, key)}


def check_receipt(receipt: object, channel: str, task: str) -> Receipt:
    """Read the receipt of an action.

    What is left to the caller: whether ``node_id`` is the one that held the claim.

    :raises BadMessage: it is malformed, or another task's or channel's.
    :raises SignatureInvalid: it is not signed by the node that it names.
    """
    try:
        envelope = msgspec.convert(receipt, _SignedReceipt)
        body = msgspec.convert(envelope.body, _ReceiptBody)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise BadMessage(why=f"the receipt is not as documented ({error})") from None
    if body.version != 1 or body.channel != channel or body.task != task:
        raise BadMessage(why=f"it is no receipt of the task {task} on the channel {channel!r}")
    if body.outcome not in RECEIPT_OUTCOMES or (body.outcome == "error") != (body.error is not None):
        raise BadMessage(why="the receipt does not tell how the action ended")
    if not is_node_id(body.node) or not verify(envelope.body, envelope.signature, body.node):
        raise SignatureInvalid(who=f"node {body.node[:16]}")
    return Receipt(body.node, body.task, body.function, body.kwargs_sha1, body.outcome, body.error, body.started,
                   body.finished)


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
