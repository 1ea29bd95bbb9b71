"""The requester: how a node gets the chunks of one file from one channel.

A pure state machine. ``Requester.handle(event, now)`` takes what happened and returns what to do; the caller performs
the effects and feeds their outcome back as events. It also hands in a ``Tick`` when ``deadline`` has passed.

    LOCATE   learn the file's size and chunks: from the bucket, else from the nodes' offers
    PREPARE  lay out the destination; what a former attempt left there and is sound need not come again
    MOVE     load chunks from the bucket; ask nodes for those that are not there; verify; report damaged objects
    DONE, FAILED

The bucket is looked at first. After ``absent_probes_max`` absent chunks in a row the rest is taken to be absent too: a
provider that finds one in the bucket counts it as uploaded, so a wrong guess costs nothing. Providers are given
``assign_chunks_max`` chunks at a time and more as they finish, so that a fast one does more than a slow one.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from ..errors import CorruptFile, CorruptObject, KacheryError
from .asking import Answers, Asking, RequestLimits
from .chunks import ChunkBook, State
from .inquiry import Inquiry
from .manifest import CHUNK_SIZE_BYTES_MAX, Chunk, Manifest
from .messages import Assign, Cancel, Failed, Offer, Ready, Want, compress, expand
from .providers import ProviderPool
from .request_events import (
    BandRestored,
    Broken,
    ChunkAbsent,
    ChunkDamaged,
    ChunkFailed,
    ChunkGood,
    ChunkHeld,
    DamageChecked,
    Discard,
    Effect,
    Event,
    Fail,
    Heard,
    LoadChunk,
    Locate,
    Located,
    LocatedAbsent,
    LocateFailed,
    Need,
    Prepare,
    Prepared,
    ReportDamage,
    Say,
    SayFailed,
    Succeed,
    Tick,
    WholeDamaged,
    WholeGood,
)

__all__ = ["Phase", "Requester"]

PERMISSION_EXIT_CODE = 4


class Phase(Enum):
    """Where a request stands."""

    LOCATE = "locate"
    PREPARE = "prepare"
    MOVE = "move"
    DONE = "done"
    FAILED = "failed"


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
        self.phase = Phase.LOCATE
        self.manifest: Manifest | None = None
        self.manifest_sha1 = manifest_sha1
        self.size: int | None = None
        self.chunks: tuple[Chunk, ...] = ()
        self.book = ChunkBook(0)
        self.whole = False
        self.bytes_held = 0
        self._uri_manifest_sha1 = manifest_sha1
        self._limits = limits
        self._pool = ProviderPool(inquiry, limits.assign_chunks_max, limits.provider_silence_seconds)
        self._needs: list[Need] = []
        self._effects: list[Effect] = []
        self._bad_manifests: set[str] = set()
        self._started = False
        self._locating = False
        self._object_absent = False
        self._asking = Asking(limits)
        self._absent_streak = 0
        self._bucket_failures = 0
        self._load_after: float | None = None
        self._manifest_misses = 0
        self._damages: dict[int, int] = {}
        self._vanished: dict[int, int] = {}

    # --- the outside

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` (seconds, monotonic) and return what to do, in this order."""
        if self.phase in (Phase.DONE, Phase.FAILED):
            return []
        _HANDLERS[type(event)](self, event, now)
        self._pump(now)
        effects, self._effects = self._effects, []
        return effects

    @property
    def deadline(self) -> float | None:
        """When a ``Tick`` is due, or None."""
        if self.phase in (Phase.DONE, Phase.FAILED):
            return None
        times = (self._pool.silence_deadline(), self._asking.deadline, self._load_after)
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
            return "downloading"
        if self._bucket_failures:
            return "waiting for the bucket"
        if not self._pool.idle:
            return f"waiting for {self._pool.names()}"
        return "verifying"

    # --- locate and prepare

    def _on_need(self, event: Need, now: float) -> None:
        if not self._started:
            self._started = True
            self._asking.start(now)
            self._locate()
        if self.phase is Phase.MOVE:
            self._widen(event)
        else:
            self._needs.append(event)

    def _locate(self) -> None:
        self._locating = True
        self._effects.append(Locate(self.manifest_sha1))

    def _on_located(self, event: Located, now: float) -> None:
        if event.manifest is None and event.size > CHUNK_SIZE_BYTES_MAX:
            self._on_located_absent(LocatedAbsent(), now)  # too long for one piece: some node has its manifest
            return
        self._locating = False
        if event.manifest is not None and event.manifest.sha1 != self.sha1:
            self._bad_manifests.add(event.manifest_sha1 or "")
            self._fail(CorruptFile(path=f"the manifest {event.manifest_sha1}", found=event.manifest.sha1,
                                   sha1=self.sha1, advice="The URI puts together a file and another file's manifest."))
            return
        self.manifest, self.manifest_sha1, self.size = event.manifest, event.manifest_sha1, event.size
        if event.manifest is not None:
            self.chunks = event.manifest.chunks
        else:
            self.chunks = (Chunk(0, event.size, self.sha1),) if event.size else ()
        self.book = ChunkBook(len(self.chunks))
        self.phase = Phase.PREPARE
        self._effects.append(Prepare(self.manifest, self.manifest_sha1, event.size, self.chunks))

    def _on_located_absent(self, event: LocatedAbsent, now: float) -> None:
        self._locating = False
        self.inquiry.bucket = "does not have it"
        if self.manifest_sha1 is None:
            self._object_absent = True
        if self.inquiry.rounds:
            self._manifest_misses += 1
            if self._manifest_misses > self._limits.corrupt_retries_max:
                self._fail(self.inquiry.error("its manifest was announced, but never came to the bucket"))
                return
        self._ask(now)

    def _on_locate_failed(self, event: LocateFailed, now: float) -> None:
        self._locating = False
        self.inquiry.bucket = event.error.message
        self._fail(event.error)

    def _on_prepared(self, event: Prepared, now: float) -> None:
        self.phase = Phase.MOVE
        for index in event.good:
            self.book.move(index, State.GOOD)
            self.bytes_held += self._length(index)
        needs, self._needs = self._needs, []
        for need in needs:
            self._widen(need)
        if self._object_absent and self.manifest is None:
            self._presume_absent()
        elif self.inquiry.bucket == "not looked at":
            self.inquiry.bucket = "has some of it"

    def _widen(self, need: Need) -> None:
        self.whole = self.whole or (need.start is None and need.end is None)
        self.book.need(self.span(need.start, need.end))

    # --- load and verify

    def _on_held(self, event: ChunkHeld, now: float) -> None:
        self.book.move(event.index, State.HELD)
        self.bytes_held += self._length(event.index)
        self._asking.progressed(now)
        self._absent_streak = self._bucket_failures = 0

    def _on_good(self, event: ChunkGood, now: float) -> None:
        if self.book[event.index] is not State.GOOD:
            self.book.move(event.index, State.GOOD)
        self._pool.forget_source(event.index)

    def _on_damaged(self, event: ChunkDamaged, now: float) -> None:
        index = event.index
        if self.book[index] in (State.HELD, State.GOOD):
            self.bytes_held -= self._length(index)
        self._damages[index] = self._damages.get(index, 0) + 1
        if self._damages[index] > self._limits.corrupt_retries_max:
            self._fail(CorruptObject(object=self.chunks[index].sha1, found=event.found, sha1=self.chunks[index].sha1))
            return
        self._pool.blame(index)
        self.book.move(index, State.CHECKING)
        self._effects.append(ReportDamage(index, event.found))

    def _on_damage_checked(self, event: DamageChecked, now: float) -> None:
        self.book.move(event.index, State.ABSENT if event.removed else State.READY)

    def _on_absent(self, event: ChunkAbsent, now: float) -> None:
        index = event.index
        source = self._pool.source(index)
        if source is None:
            self.inquiry.bucket = ("does not have it" if self.inquiry.bucket in ("not looked at", "does not have it")
                                   else "has some of it")
            self._absent_streak += 1
        else:
            self._vanished[index] = self._vanished.get(index, 0) + 1
            if self._vanished[index] > self._limits.corrupt_retries_max:
                self._pool.lose(source, "announced chunks that the bucket does not have", self.book)
        self.book.move(index, State.ABSENT)
        if self._absent_streak >= self._limits.absent_probes_max:
            self._presume_absent()

    def _presume_absent(self) -> None:
        while self.book.take(State.UNKNOWN, State.ABSENT) is not None:
            pass

    def _on_chunk_failed(self, event: ChunkFailed, now: float) -> None:
        self.inquiry.bucket = event.error.message
        self._bucket_failures += 1
        if event.error.exit_code == PERMISSION_EXIT_CODE or self._asking.out_of_patience(now):
            self._fail(event.error)
            return
        pause = self._limits.retry_base_seconds * 2 ** min(self._bucket_failures, 16)
        self._load_after = now + min(pause, self._limits.retry_cap_seconds)
        self.book.move(event.index, State.READY if self._pool.source(event.index) else State.UNKNOWN)

    def _on_whole_good(self, event: WholeGood, now: float) -> None:
        self._finish()
        self.phase = Phase.DONE
        self._effects.append(Succeed())

    def _on_whole_damaged(self, event: WholeDamaged, now: float) -> None:
        if self.manifest_sha1 is None or self.manifest_sha1 == self._uri_manifest_sha1:
            self._fail(CorruptFile(path=self.inquiry.uri, found=event.found, sha1=self.sha1,
                                   advice="Its manifest describes another file; get the URI anew from its source."))
            return
        self._bad_manifests.add(self.manifest_sha1)
        self._pool.refuse_manifest(self.manifest_sha1)
        self._effects.append(Discard())
        self._needs = [Need()]
        self.manifest_sha1, self.manifest, self.size = self._uri_manifest_sha1, None, None
        self.bytes_held, self.book = 0, ChunkBook(0)
        self.phase = Phase.LOCATE
        self._ask(now)

    # --- ask

    def _ask(self, now: float) -> None:
        if not self.inquiry.providers:
            self._fail(self.inquiry.error("no other node on the channel may provide files"))
        elif not self._asking.plan(now):
            if self._pool.lost_count >= len(self.inquiry.providers):
                why = "every node that may provide files has declined or failed"
            elif self._asking.begun:
                why = f"every provider was lost, and none came back within {self._limits.patience_seconds:g} s"
            else:
                why = "no node has offered it"
            self._fail(self.inquiry.error(why))

    def _on_heard(self, event: Heard, now: float) -> None:
        body, sender = event.body, event.sender
        if body.request != self.request_id:
            return
        if isinstance(body, Offer):
            self._on_offer(body, sender, now)
            return
        self._pool.heard(sender, now)
        if isinstance(body, Failed):
            self._pool.lose(sender, f"{body.reason}: {body.detail}" if body.detail else body.reason, self.book)
        elif isinstance(body, Ready):
            self._on_ready(body, sender, now)

    def _on_offer(self, offer: Offer, sender: str, now: float) -> None:
        if offer.sha1 != self.sha1 or offer.manifest in self._bad_manifests or (
                offer.manifest is None and offer.size > CHUNK_SIZE_BYTES_MAX):
            self.inquiry.note(sender, "offered something else than was asked for")
            return
        self._pool.add(sender, offer, now)
        self._asking.offered(now)

    def _on_ready(self, body: Ready, sender: str, now: float) -> None:
        if body.manifest_ready:
            self._pool.manifest_uploaded(sender)
            if self.phase is Phase.LOCATE and not self._locating:
                self._locate()
        for index in expand(body.chunks, self.book.count):
            self._pool.uploaded(sender, index)
            if self.book[index] in (State.UNKNOWN, State.ABSENT, State.ASSIGNED):
                self.book.move(index, State.READY)
                if index not in self._vanished:
                    self._asking.progressed(now)

    def _on_say_failed(self, event: SayFailed, now: float) -> None:
        if not self._asking.begun or event.error.exit_code == PERMISSION_EXIT_CODE:
            self._fail(event.error)

    def _on_band_restored(self, event: BandRestored, now: float) -> None:
        self._pool.reset(self.book)
        if self._asking.active or (self.phase is Phase.LOCATE and not self._locating):
            self._ask(now)

    def _on_broken(self, event: Broken, now: float) -> None:
        self._fail(event.error)

    def _on_tick(self, event: Tick, now: float) -> None:
        """Time is looked at after every event."""

    # --- what follows from the state, after every event

    def _pump(self, now: float) -> None:
        if self.phase in (Phase.DONE, Phase.FAILED):
            return
        self._pool.lose_silent(now, self.book)
        if self._asking.active:
            self._go_on_asking(now)
        if self.phase is Phase.MOVE:
            self._load(now)
            self._assign(now)
        elif self.phase is Phase.LOCATE and self._started and not (self._locating or self._asking.active):
            self._ask_for_manifest(now)
        if self._asking.due(now):
            self.inquiry.rounds += 1
            self._pool.forgive()
            self._say(Want, sha1=self.sha1, manifest=self.manifest_sha1)

    def _go_on_asking(self, now: float) -> None:
        declined = self._pool.lost_count >= len(self.inquiry.providers)
        if self._asking.answers(now, declined) is not Answers.NONE:
            return
        if declined and not self._asking.begun:
            self._fail(self.inquiry.error("every node that may provide files has declined"))
        else:
            self._ask(now)

    def _ask_for_manifest(self, now: float) -> None:
        if not self._pool.idle:
            return
        provider = self._pool.choose_geometry(self._uri_manifest_sha1)
        if provider is None:
            self._ask(now)
        elif provider.offer.manifest is None:
            self._on_located(Located(None, None, provider.offer.size), now)
        else:
            self.manifest_sha1 = provider.offer.manifest
            provider.begin(now)
            self._say(Assign, provider=provider.node_id, sha1=self.sha1, manifest=self.manifest_sha1,
                      send_manifest=True)

    def _load(self, now: float) -> None:
        if self._load_after is not None and now < self._load_after:
            return
        self._load_after = None
        while self.book.count_in(State.LOADING) < self._limits.download_concurrency:
            index = self.book.take(State.READY, State.LOADING)
            if index is None:
                index = self.book.take(State.UNKNOWN, State.LOADING)
            if index is None:
                return
            self._effects.append(LoadChunk(index))

    def _assign(self, now: float) -> None:
        if not self.book.count_in(State.ABSENT) or self._asking.active:
            return
        shares = self._pool.assign(self.book, self.manifest_sha1, self.size or 0, now)
        if shares is None:
            self._ask(now)
            return
        for node_id, indices in shares.items():
            self._say(Assign, provider=node_id, sha1=self.sha1, manifest=self.manifest_sha1, chunks=compress(indices))

    # --- small parts

    def _say(self, kind: type[Want] | type[Assign] | type[Cancel], **fields: Any) -> None:
        self._effects.append(Say(kind, {"request": self.request_id, **fields}))

    def _length(self, index: int) -> int:
        return self.chunks[index].end - self.chunks[index].start

    def _finish(self) -> None:
        if self.inquiry.rounds:
            self._say(Cancel)

    def _fail(self, error: KacheryError) -> None:
        self._effects.clear()
        self._finish()
        self.phase = Phase.FAILED
        error.details.setdefault("account", self.inquiry.to_dict())
        self._effects.append(Fail(error))


_HANDLERS: dict[type[Any], Any] = {
    Need: Requester._on_need,
    Located: Requester._on_located,
    LocatedAbsent: Requester._on_located_absent,
    LocateFailed: Requester._on_locate_failed,
    Prepared: Requester._on_prepared,
    ChunkHeld: Requester._on_held,
    ChunkGood: Requester._on_good,
    ChunkDamaged: Requester._on_damaged,
    ChunkAbsent: Requester._on_absent,
    ChunkFailed: Requester._on_chunk_failed,
    DamageChecked: Requester._on_damage_checked,
    WholeGood: Requester._on_whole_good,
    WholeDamaged: Requester._on_whole_damaged,
    Heard: Requester._on_heard,
    SayFailed: Requester._on_say_failed,
    BandRestored: Requester._on_band_restored,
    Broken: Requester._on_broken,
    Tick: Requester._on_tick,
}

