"""The functions that a user offers as tasks: registered by a decorator, known by an id on the whole channel."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import InvalidArgument
from ..protocol.tasks import check_function, check_kind

__all__ = ["TaskFunction", "find_function", "registered_functions", "taskfunction"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class TaskFunction:
    """A registered function. ``kind`` is "pure-calculation", "query" or "action"; no ``timeout_seconds``: no limit."""

    id: str
    kind: str
    function: Callable[..., Any]
    timeout_seconds: float | None
    idempotent: bool

    def to_dict(self) -> dict[str, Any]:
        """Return what a node is told of it."""
        return {"id": self.id, "kind": self.kind, "timeoutSeconds": self.timeout_seconds,
                "idempotent": self.idempotent}


_registry: dict[str, TaskFunction] = {}


def taskfunction(function_id: str, *, type: str = "pure-calculation",  # noqa: A002 - name of 2022
                 timeout_seconds: float | None = None, idempotent: bool = False) -> Callable[[Function], Function]:
    """Register a function as a task; the function itself stays as it is, and can be called as before.

    It is called with the arguments of a request as keywords, all of them JSON. A calculation or query returns JSON, a
    numpy array or bytes; what is long is passed on as a file. What an action returns is not passed on.

    :param function_id: its name on the channel, 1 to 200 printable characters. Change it when the function changes, so
        that no result of the old one is taken for one of the new one: ``"lab/count-spikes/2"``.
    :param type: "pure-calculation": the result depends on the arguments alone, and is computed once for all; "query":
        run on each request, the last result standing in when no node runs it; "action": done at most once, and has no
        result.
    :param timeout_seconds: break the function off when it runs for longer; None: never.
    :param idempotent: an action that may be done again when it is not known whether it was done.
    :raises InvalidName: the id cannot be one.
    :raises InvalidArgument: another type or time limit, something else than a plain function, or the id is taken.
    """
    check_function(function_id)
    check_kind(type)
    if timeout_seconds is not None and not (timeout_seconds > 0 and math.isfinite(timeout_seconds)):
        raise InvalidArgument(what=f"timeout_seconds={timeout_seconds!r} is no time limit; use a number above 0.")
    if idempotent and type != "action":
        raise InvalidArgument(what=f"Only an action can be idempotent; a {type} may be run again anyway.")

    def register(function: Function) -> Function:
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise InvalidArgument(what=f"{function!r} is not a plain function; write one that calls asyncio.run.")
        known = _registry.get(function_id)
        if known is not None and _place(known.function) != _place(function):
            raise InvalidArgument(what=f"The id {function_id!r} is that of {_place(known.function)} already; "
                                       f"{_place(function)} needs another.")
        _registry[function_id] = TaskFunction(function_id, type, function, timeout_seconds, idempotent)
        return function

    return register


def registered_functions(ids: Iterable[str] | None = None) -> list[TaskFunction]:
    """Return the registered functions, all of them without ``ids``.

    :raises InvalidArgument: there is none, or none of one of these ids.
    """
    if not _registry:
        raise InvalidArgument(what="No function is registered; put @kf.taskfunction('id') above one.")
    if ids is None:
        return list(_registry.values())
    wanted = [ids] if isinstance(ids, str) else list(ids)
    unknown = [name for name in wanted if name not in _registry]
    if unknown or not wanted:
        missing = ", ".join(repr(name) for name in unknown) or "no id"
        raise InvalidArgument(what=f"No function is registered as {missing}; there are: {', '.join(_registry)}.")
    return [_registry[name] for name in dict.fromkeys(wanted)]


def find_function(function: Callable[..., Any] | str) -> tuple[str, TaskFunction | None]:
    """Return the id of a function given by itself or by its id, and what is known of it here.

    :raises InvalidArgument, InvalidName: it is not registered, or that cannot be an id.
    """
    if isinstance(function, str):
        return check_function(function), _registry.get(function)
    for known in _registry.values():
        if known.function == function:
            return known.id, known
    raise InvalidArgument(what=f"{function!r} is not a registered function; put @kf.taskfunction('id') above it, or "
                               "pass its id.")


def _place(function: Callable[..., Any]) -> str:
    """Where a function was defined; the same when a notebook's cell or a module is run again."""
    module = getattr(function, "__module__", "?")
    return f"{module}.{getattr(function, '__qualname__', repr(function))}"
