"""The book of chunks, against a plain model of it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kachery_fast.protocol.chunks import ChunkBook, State

COUNT = 12
indices = st.integers(0, COUNT - 1)
states = st.sampled_from(State)


class BookAgainstModel(RuleBasedStateMachine):
    """Moves, wishes and takings in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.book = ChunkBook(COUNT)
        self.states = [State.UNKNOWN] * COUNT
        self.needed: set[int] = set()

    @rule(wanted=st.sets(indices))
    def need(self, wanted: set[int]) -> None:
        self.book.need(sorted(wanted))
        self.needed |= wanted

    @rule(index=indices, state=states)
    def move(self, index: int, state: State) -> None:
        self.book.move(index, state)
        self.states[index] = state

    @rule(state=st.sampled_from([State.UNKNOWN, State.ABSENT, State.READY]), into=states)
    def take(self, state: State, into: State) -> None:
        expected = min((i for i in self.needed if self.states[i] is state), default=None)
        assert self.book.take(state, into) == expected
        if expected is not None:
            self.states[expected] = into

    @invariant()
    def agrees(self) -> None:
        assert [self.book[index] for index in range(COUNT)] == self.states
        assert self.book.needed_count == len(self.needed)
        for state in State:
            members = [i for i in range(COUNT) if i in self.needed and self.states[i] is state]
            assert self.book.count_in(state) == len(members)
            assert self.book.needed_in(state) == members
        for first in range(COUNT + 1):
            for end in range(COUNT + 1):
                good = all(self.states[i] is State.GOOD for i in range(first, end))
                assert self.book.all_good(range(first, end)) == good


TestBook = BookAgainstModel.TestCase
TestBook.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_an_empty_book_is_good_and_has_nothing_to_take() -> None:
    book = ChunkBook(0)
    assert book.all_good(range(0))
    assert book.take(State.UNKNOWN, State.LOADING) is None
