"""Why reads broke off whose answers had begun: HTTP has no place for an error once the head is out."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable

from ..errors import KacheryError

__all__ = ["Failures"]

_KEPT_MAX = 64
_KEPT_SECONDS = 60.0


class Failures:
    """The last errors, each under the name that its answer's head gave; few, and for a minute.

    :param clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: OrderedDict[str, tuple[float, KacheryError]] = OrderedDict()

    @staticmethod
    def make_name() -> str:
        """Return a name for an answer, of 16 hex digits, that no other has."""
        return secrets.token_hex(8)

    def keep(self, name: str, error: KacheryError) -> None:
        """Remember why the answer of this name broke off."""
        self._forget()
        self._kept[name] = self._clock(), error
        while len(self._kept) > _KEPT_MAX:
            self._kept.popitem(last=False)

    def find(self, name: str) -> KacheryError | None:
        """Return why the answer of this name broke off; None when nothing is known of that (any more)."""
        self._forget()
        found = self._kept.get(name)
        return None if found is None else found[1]

    def _forget(self) -> None:
        oldest = self._clock() - _KEPT_SECONDS
        while self._kept and next(iter(self._kept.values()))[0] < oldest:
            self._kept.popitem(last=False)
