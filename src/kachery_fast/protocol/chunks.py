"""Which chunks of a file are where: the book that a requester keeps.

Every operation costs about the same for a file of one chunk and of a hundred thousand: states are one byte a chunk,
searched and counted by the machine's own string search, and the queues are heaps whose stale entries are dropped when
they surface.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from heapq import heappop, heappush
from itertools import chain

__all__ = ["ChunkBook", "State"]


class State(IntEnum):
    """Where one chunk is."""

    UNKNOWN = 0   # nobody has looked
    ABSENT = 1    # not in the bucket; some node must be asked
    ASSIGNED = 2  # a provider is to upload it
    READY = 3     # in the bucket, as far as we were told
    LOADING = 4   # a download is under way
    HELD = 5      # on disk, not yet verified
    CHECKING = 6  # it arrived damaged; the hub looks at the object
    GOOD = 7      # on disk and verified


_TO_BE_LOADED = frozenset({State.UNKNOWN, State.ABSENT, State.ASSIGNED, State.READY, State.LOADING})


class ChunkBook:
    """States of the chunks of one file, and which of them are needed at all."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._states = bytearray(count)
        self._needed = bytearray(count)
        self._counts = [0] * len(State)
        self._queues: dict[State, list[int]] = {State.UNKNOWN: [], State.ABSENT: [], State.READY: []}
        self.needed_count = 0

    def __getitem__(self, index: int) -> State:
        return State(self._states[index])

    def need(self, indices: Iterable[int]) -> None:
        """Add chunks to those that are needed."""
        for index in indices:
            if not self._needed[index]:
                self._needed[index] = 1
                self.needed_count += 1
                state = State(self._states[index])
                self._counts[state] += 1
                if state in self._queues:
                    heappush(self._queues[state], index)

    def move(self, index: int, state: State) -> None:
        """Record that a chunk is now in ``state``."""
        if self._needed[index]:
            self._counts[self._states[index]] -= 1
            self._counts[state] += 1
            if state in self._queues:
                heappush(self._queues[state], index)
        self._states[index] = state

    def count_in(self, *states: State) -> int:
        """How many needed chunks are in one of ``states``."""
        return sum(self._counts[state] for state in states)

    def take(self, state: State, into: State) -> int | None:
        """Move the first needed chunk that is in ``state`` to ``into`` and return its index, or None."""
        queue = self._queues[state]
        while queue:
            index = heappop(queue)
            if self._states[index] == state:
                self.move(index, into)
                return index
        return None

    def needed_in(self, state: State) -> list[int]:
        """Return the needed chunks in ``state``, in order."""
        found: list[int] = []
        if self._counts[state]:
            index = self._states.find(state)
            while index >= 0:
                if self._needed[index]:
                    found.append(index)
                index = self._states.find(state, index + 1)
        return found

    def wanted_with(self, index: int) -> Iterator[int]:
        """Yield the other needed chunks that have not come yet, in order, from ``index`` on and round."""
        for following in chain(range(index + 1, self.count), range(index)):
            if self._needed[following] and self._states[following] in _TO_BE_LOADED:
                yield following

    def all_good(self, indices: range) -> bool:
        """Whether all these chunks, neighbours in order, are verified."""
        return self._states.count(State.GOOD, indices.start, indices.stop) == len(indices)
