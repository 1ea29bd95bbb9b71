"""The root of the tree of errors."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

__all__ = ["KacheryError"]


class KacheryError(Exception):
    """{what}"""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, **details: Any) -> None:
        self.details = details
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The docstring of the class with the details filled in; a missing detail shows as ``?``."""
        text = " ".join((inspect.getdoc(type(self)) or type(self).__name__).split())
        return text.format_map(_Details(self.details)).strip()

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"error": class name, "message": text, "details": {...}}``, plain JSON."""
        return {"error": type(self).__name__, "message": self.message, "details": _plain(self.details)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> KacheryError:
        """Rebuild an error from ``to_dict``; an unknown class becomes a ``NodeError`` with the same text."""
        kind = _classes().get(str(data.get("error", "")))
        details = data.get("details")
        if kind is None:
            return _classes()["NodeError"](what=str(data.get("message", data)))
        return kind(**(details if isinstance(details, dict) else {}))


class _Details(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _classes() -> dict[str, type[KacheryError]]:
    found: dict[str, type[KacheryError]] = {}
    pending: list[type[KacheryError]] = [KacheryError]
    while pending:
        kind = pending.pop()
        found[kind.__name__] = kind
        pending.extend(kind.__subclasses__())
    return found
