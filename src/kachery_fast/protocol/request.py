"""The requester: how a node gets the chunks of one file from one channel.

A pure state machine. ``Requester.handle(event, now)`` takes what happened and returns what to do; the caller performs
the effects and feeds their outcome back as events. It also hands in a ``Tick`` when ``deadline`` has passed.

    LOCATE   learn the file's size and chunks: from the bucket, else from the nodes' offers
    PREPARE  lay out the destination; what a former attempt left there and is sound need not come again
    MOVE     load chunks from the bucket (``loading``); ask nodes for those that are not there (``providers``)
    DONE, FAILED

A cut that turns out to be false, or that nobody offers any more, is given up and the request starts over with another
that is on offer: back to LOCATE, at most ``corrupt_retries_max`` times. As long as a request is not over, an effect is
under way, or ``deadline`` is set, or it is ``resting``.
"""

from __future__ import annotations

from typing import Any, get_args

from ..errors import CorruptFile, KacheryError
from .asking import Answers, Asking, RequestLimits
from .bodies import Assign, Cancel, Failed, Offer, Ready, Want, compress
from .chunks import ChunkBook, State
from .inquiry import Inquiry
from .loading import Loading
from .locating import Locating
from .manifest import Chunk, Manifest
from .providers import ProviderPool
from .request_events import (
    BandRestored,
    Broken,
    BucketMoved,
    ChunkEvent,
    Discard,
    Effect,
    Event,
    Fail,
    Heard,
    Located,
    LocateEvent,
    Need,
    Phase,
    Prepare,
    Prepared,
    Say,
    SayFailed,
    Succeed,
    Tick,
    WholeDamaged,
    WholeGood,
)

__all__ = ["Phase", "Requester"]


class Requester:
    """One request for one file on one channel.

    :param inquiry: the account to keep; its ``providers`` are those who may be asked.
    :param sha1: the file.
    :param manifest_sha1: the manifest that the URI names, if any.
    :param request_id: the id under which the nodes know this request.
    """

    def __init__(self, inquiry: Inquiry, sha1: str, manifest_sha1: str | None, request_id: str,
                 limits: RequestLimits) -> None:
        self.inquiry, self.sha1, self.request_id = inquiry, sha1, request_id
        self.phase, self.whole = Phase.LOCATE, False
        self.manifest: Manifest | None = None
        self.size: int | None = None
        self._limits = limits
        self._asking = Asking(limits)
        self._pool = ProviderPool(inquiry, limits)
        self._locating = Locating(sha1, manifest_sha1, self._pool, self._asking, inquiry, limits)
        self._loading = Loading((), self._pool, self._asking, inquiry, limits)
        self._needs: dict[Need, None] = {}
        self._effects: list[Effect] = []
        self._started = False
        self._restarts = 0

    # --- the outside

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` (seconds, monotonic) and return what to do, in this order."""
        try:
            if not self._is_over:
                _HANDLERS[type(event)](self, event, now)
            if not self._is_over:
                self._pump(now)
        except KacheryError as error:
            self._fail(error)
        effects, self._effects = self._effects, []
        return effects

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks of the file; none while its cut is unknown."""
        return self._loading.chunks

    @property
    def book(self) -> ChunkBook:
        """Where each chunk is."""
        return self._loading.book

    @property
    def bytes_held(self) -> int:
        """Bytes of the chunks that are here."""
        return self._loading.bytes_held

    @property
    def deadline(self) -> float | None:
        """When a ``Tick`` is due, or None."""
        if self._is_over:
            return None
        times = (self._pool.deadline, self._asking.deadline, self._loading.pause_until, self._locating.retry_at)
        return min((time for time in times if time is not None), default=None)

    @property
    def resting(self) -> bool:
        """Whether every chunk that is needed so far is here, though not the whole file is."""
        return (self.phase is Phase.MOVE and not self.whole
                and self.book.count_in(State.GOOD) == self.book.needed_count)

    def covers(self, start: int | None, end: int | None) -> bool:
        """Whether the bytes ``start`` to ``end`` (exclusive; None: the file's) are here and verified."""
        return self.phase in (Phase.MOVE, Phase.DONE) and self.book.all_good(self.span(start, end))

    def span(self, start: int | None, end: int | None) -> range:
        """Return the indices of the chunks that hold these bytes."""
        if self.manifest is None:
            return range(len(self.chunks))
        size = self.manifest.size
        return self.manifest.chunk_span(start or 0, size if end is None else min(end, size))

    @property
    def waiting(self) -> str:
        """What the request waits for, for people."""
        if self._asking.active:
            count = len(self.inquiry.providers)
            return f"asking {count} node{'s' * (count != 1)}"
        if self.phase is Phase.LOCATE:
            return "looking in the bucket" if self._pool.idle else f"waiting for {self._pool.names()}"
        if self.phase is Phase.PREPARE:
            return "preparing the destination"
        if self.book.count_in(State.LOADING, State.READY):
            return "waiting for the bucket" if self._loading.failing else "downloading"
        if not self._pool.idle:
            return f"waiting for {self._pool.names()}"
        return "verifying"

    # --- locate and prepare

    def _on_need(self, event: Need, now: float) -> None:
        self._needs[Need() if event.start is None and event.end is None else event] = None
        if not self._started:
            self._started = True
            self._asking.start(now)
            self._effects.append(self._locating.look())
        elif self.phase is Phase.MOVE:
            self._widen(event)

    def _on_locating(self, event: LocateEvent, now: float) -> None:
        cut = self._locating.handle(event, now)
        if cut is not None:
            self._lay_out(cut)

    def _lay_out(self, cut: Located) -> None:
        self.manifest, self._locating.manifest_sha1, self.size = cut.manifest, cut.manifest_sha1, cut.size
        chunks: tuple[Chunk, ...] = (Chunk(0, cut.size, self.sha1),) if cut.size else ()
        if cut.manifest is not None:
            chunks = cut.manifest.chunks
        self._loading = Loading(chunks, self._pool, self._asking, self.inquiry, self._limits,
                                all_absent=self._locating.object_absent and cut.manifest is None)
        self.phase = Phase.PREPARE
        self._effects.append(Prepare(cut.manifest, cut.manifest_sha1, cut.size, chunks))

    def _on_prepared(self, event: Prepared, now: float) -> None:
        if self.phase is not Phase.PREPARE:
            return
        self.phase = Phase.MOVE
        self._asking.start(now)
        self._loading.recovered(event.good)
        for need in self._needs:
            self._widen(need)

    def _widen(self, need: Need) -> None:
        self.whole = self.whole or (need.start is None and need.end is None)
        self._loading.need(self.span(need.start, need.end))

    # --- load and verify

    def _on_chunk(self, event: ChunkEvent, now: float) -> None:
        self._effects += self._loading.handle(event, now)

    def _on_whole_good(self, event: WholeGood, now: float) -> None:
        if self.phase is Phase.MOVE:
            self._finish()
            self.phase = Phase.DONE
            self._effects.append(Succeed())

    def _on_whole_damaged(self, event: WholeDamaged, now: float) -> None:
        if self.phase is not Phase.MOVE:
            return
        error = CorruptFile(path=self.inquiry.uri, found=event.found, sha1=self.sha1,
                            advice="Its manifest describes another file; get the URI anew from its source.")
        self._locating.refuse(error)
        self._start_over(now)

    def _start_over(self, now: float) -> None:
        """Begin anew with another cut that is on offer."""
        self._restarts += 1
        if self._restarts > self._limits.corrupt_retries_max:
            raise self.inquiry.error(f"{self._restarts} ways to cut the file were tried, and none made it")
        self._effects.append(Discard())
        self.phase = Phase.LOCATE
        self.manifest, self.size = None, None
        self._locating.begin_again()
        self._loading = Loading((), self._pool, self._asking, self.inquiry, self._limits)
        self._asking.start(now)

    # --- ask

    def _on_heard(self, event: Heard, now: float) -> None:
        body, sender = event.body, event.sender
        if body.request != self.request_id:
            return
        if isinstance(body, Offer):
            self._on_offer(body, sender, now)
            return
        owes = self._pool.heard(sender, now)
        if isinstance(body, Ready):
            self._on_ready(body, sender, now)
        elif isinstance(body, Failed):
            self._pool.failed(sender, body)
            if body.reason == "busy":
                self._asking.answered(now)
        elif owes:
            self._asking.alive(now)
        elif not self._pool.knows(sender):
            self.inquiry.note(sender, "was looking it up")
            self._asking.expect(now)

    def _on_offer(self, offer: Offer, sender: str, now: float) -> None:
        if not self._locating.is_sane(offer):
            self.inquiry.note(sender, "offered something else than was asked for")
        elif self._pool.add(sender, offer, now):
            self._asking.offered(now)

    def _on_ready(self, body: Ready, sender: str, now: float) -> None:
        if body.manifest_ready and self._pool.manifest_uploaded(sender) and self.phase is Phase.LOCATE:
            self._asking.alive(now)
            self._effects.append(self._locating.announced(sender))
        self._loading.announced(body, sender, now)

    def _on_say_failed(self, event: SayFailed, now: float) -> None:
        if self._asking.gives_up(event.error):
            raise event.error

    def _on_band_restored(self, event: BandRestored, now: float) -> None:
        self._pool.reset()
        self._asking.interrupted(now)

    def _on_bucket_moved(self, event: BucketMoved, now: float) -> None:
        self._asking.bucket_moved(now)
        self._locating.object_absent = False
        self._loading.bucket_moved()

    def _on_broken(self, event: Broken, now: float) -> None:
        raise event.error

    def _on_tick(self, event: Tick, now: float) -> None:
        """Time is looked at after every event."""

    def _ask(self, now: float) -> None:
        if not self.inquiry.providers:
            raise self.inquiry.error("no other node on the channel may provide files")
        if self._pool.all_refused:
            raise self.inquiry.error("every node that may provide files has declined or failed")
        if self._asking.plan(now):
            return
        if self.phase is Phase.MOVE and self._loading.under_way:
            return  # a chunk that arrives renews the patience
        if self.phase is Phase.MOVE and self._pool.has_other_cut(self._cut):
            self._start_over(now)
            return
        raise self.inquiry.error(self._asking.account(ever_offered=self._pool.knows()))

    # --- what follows from the state, after every event

    def _pump(self, now: float) -> None:
        if self._pool.lose_silent(now) and self._asking.out_of_patience(now):
            raise self.inquiry.error("those who offered it bring nothing")
        if self.phase is Phase.MOVE:
            self._effects += self._loading.start(now)
        elif self._locating.retry_at is not None and now >= self._locating.retry_at:
            self._effects.append(self._locating.look())
        if self._asking.active:
            self._go_on_asking(now)
        if not self._asking.active and self.phase is Phase.MOVE:
            self._assign(now)
        if not self._asking.active and self.phase is Phase.LOCATE and self._needs_nodes:
            self._ask_for_manifest(now)
        if self._asking.due(now):
            self._want()

    @property
    def _needs_nodes(self) -> bool:
        if self.phase is Phase.LOCATE:
            return self._started and not self._locating.busy
        return self.phase is Phase.MOVE and self.book.count_in(State.ABSENT) > 0

    def _go_on_asking(self, now: float) -> None:
        if not self._needs_nodes:
            self._asking.stop()
            return
        declined = self._pool.all_lost
        if self._asking.answers(now, everybody_declined=declined,
                                everybody_answered=self._pool.all_answered) is Answers.NONE:
            if declined and not self._asking.begun:
                raise self.inquiry.error("every node that may provide files has declined")
            self._ask(now)

    def _ask_for_manifest(self, now: float) -> None:
        if not self._pool.idle:
            return
        self._pool.lay_out(self.book)
        offer = self._locating.choose()
        if offer is None:
            self._ask(now)
        elif offer.manifest is None:
            self._lay_out(Located(None, None, offer.size))
        else:
            self._locating.manifest_sha1 = offer.manifest
            node_id = self._pool.ask_for_manifest((offer.manifest, offer.size), now)
            self._say(Assign, provider=node_id, send_manifest=True)

    def _assign(self, now: float) -> None:
        shares: dict[str, list[int]] | None = {}
        if self._needs_nodes:
            shares = self._pool.assign(self._cut, now)
            if shares is None and self.bytes_held == 0 and self._pool.has_other_cut(self._cut):
                self._start_over(now)
            elif shares is None:
                self._ask(now)
        elif self.book.count_in(State.ASSIGNED):
            shares = self._pool.reassign(self._cut, now)
        if self.book.count_in(State.ASSIGNED) and self._pool.call_for_help(now):
            self._want()
        for node_id, indices in (shares or {}).items():
            self._say(Assign, provider=node_id, chunks=compress(indices))

    # --- small parts

    @property
    def _is_over(self) -> bool:
        return self.phase in (Phase.DONE, Phase.FAILED)

    @property
    def _cut(self) -> tuple[str | None, int]:
        return self._locating.manifest_sha1, self.size or 0

    def _say(self, kind: type[Want] | type[Assign], **fields: Any) -> None:
        self._effects.append(Say(kind, {"request": self.request_id, "sha1": self.sha1,
                                        "manifest": self._locating.manifest_sha1, **fields}))

    def _want(self) -> None:
        self.inquiry.rounds += 1
        self._pool.forgive()
        self._say(Want)

    def _finish(self) -> None:
        if self.inquiry.rounds:
            self._effects.append(Say(Cancel, {"request": self.request_id}))

    def _fail(self, error: KacheryError) -> None:
        self._effects = [effect for effect in self._effects if isinstance(effect, Discard)]
        self._finish()
        self.phase = Phase.FAILED
        error.details.setdefault("account", self.inquiry.to_dict())
        self._effects.append(Fail(error))


_HANDLERS: dict[type[Any], Any] = {
    Need: Requester._on_need,
    Prepared: Requester._on_prepared,
    WholeGood: Requester._on_whole_good,
    WholeDamaged: Requester._on_whole_damaged,
    Heard: Requester._on_heard,
    SayFailed: Requester._on_say_failed,
    BandRestored: Requester._on_band_restored,
    BucketMoved: Requester._on_bucket_moved,
    Broken: Requester._on_broken,
    Tick: Requester._on_tick,
    **dict.fromkeys(get_args(LocateEvent), Requester._on_locating),
    **dict.fromkeys(get_args(ChunkEvent), Requester._on_chunk),
}
