"""A small world in virtual time: nodes with the real state machines, a bucket, and a network that may fail.

Pure: no sockets, no clock, no sleeping. Everything that happens is an entry of one queue, ordered by virtual time and
then by the order of scheduling; the randomness is one seeded generator, so a run is its seed.

Objects are their names: an object in the bucket is "right" when its content is its name, so that damage is a word.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha1
from typing import Any

from kachery_fast.errors import BucketUnreachable, KacheryError, ManifestInvalid, WrongSize
from kachery_fast.protocol import messages
from kachery_fast.protocol.asking import RequestLimits
from kachery_fast.protocol.bodies import Assign, Cancel, Want
from kachery_fast.protocol.chunks import State
from kachery_fast.protocol.inquiry import Inquiry
from kachery_fast.protocol.manifest import Chunk, Manifest
from kachery_fast.protocol.provide import (
    Asked,
    FileProvider,
    LookedUp,
    LookUp,
    ProvideLimits,
    Said,
    Upload,
    Uploaded,
)
from kachery_fast.protocol.provide import BucketMoved as ProvideBucketMoved
from kachery_fast.protocol.provide import Tick as ProvideTick
from kachery_fast.protocol.request import Phase, Requester
from kachery_fast.protocol.request_events import (
    BandRestored,
    BucketMoved,
    ChunkAbsent,
    ChunkDamaged,
    ChunkFailed,
    ChunkGood,
    ChunkHeld,
    DamageChecked,
    Discard,
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
    Succeed,
    Tick,
    WholeDamaged,
    WholeGood,
)

__all__ = ["LIMITS", "PROVIDE_LIMITS", "File", "Net", "Outcome", "Provider", "World", "forge", "make_file", "name_of"]

Objects = dict[str, tuple[str, int]]

CHUNK = 20 * 1024 * 1024
LIMITS = RequestLimits(
    offer_wait_seconds=3.0, offer_gather_seconds=0.1, want_rounds_max=2, patience_seconds=45.0,
    provider_silence_seconds=8.0, provider_stall_seconds=600.0, assign_chunks_max=64, stripe_providers_max=8,
    download_concurrency=4, corrupt_retries_max=3, absent_probes_max=4, retry_base_seconds=0.25,
    retry_cap_seconds=15.0)
PROVIDE_LIMITS = ProvideLimits(requests_max=64, uploads_ahead_max=12, progress_interval_seconds=1.0,
                               ready_batch_seconds=0.25)
# A machine that gets so many events without time moving on is running hot.
_EVENTS_PER_INSTANT_MAX = 5_000


def name_of(text: str) -> str:
    """A SHA-1 to stand for some content."""
    return sha1(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of the world; ``manifest`` is None when it is one piece."""

    sha1: str
    size: int
    manifest: Manifest | None
    manifest_sha1: str | None


def make_file(label: str, chunk_count: int, *, chunk_size: int = CHUNK, true_sha1: str | None = None) -> File:
    """A file of so many chunks; ``true_sha1`` makes a manifest that claims to be of that file."""
    if chunk_count == 0:
        return File(name_of(""), 0, None, None)
    whole = true_sha1 or name_of(label)
    if chunk_count == 1:
        return File(whole, chunk_size // 2, None, None)
    chunks = tuple(Chunk(i * chunk_size, (i + 1) * chunk_size, name_of(f"{label}/{i}")) for i in range(chunk_count))
    manifest = Manifest(chunk_count * chunk_size, whole, chunks)
    return File(whole, chunk_count * chunk_size, manifest, manifest.name)


FORGED: set[Manifest | None] = set()


def forge(file: File, label: str) -> File:
    """A file whose manifest claims to be of ``file``, but is not."""
    forged = make_file(label, 3, true_sha1=file.sha1)
    FORGED.add(forged.manifest)
    return forged


@dataclass
class Net:
    """How the network and the bucket behave. Times in seconds; faults end at ``faults_end``."""

    delay: tuple[float, float] = (0.002, 0.02)
    loss: float = 0.0
    duplication: float = 0.0
    reorder: float = 0.0
    download_bytes_per_second: float = 100e6
    bucket_failure: float = 0.0
    damage: float = 0.0
    faults_end: float = float("inf")
    bucket_down: tuple[float, float] = (0.0, 0.0)


@dataclass
class Outcome:
    """What became of one request."""

    started: float
    ended: float = 0.0
    error: KacheryError | None = None
    succeeded: bool = False
    downloads: int = 0
    discards: int = 0

    @property
    def is_over(self) -> bool:
        """Whether it ended."""
        return self.succeeded or self.error is not None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.started


class World:
    """The queue, the bucket, the bands and the nodes."""

    def __init__(self, seed: int = 0, net: Net | None = None) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.net = net or Net()
        self.bucket: Objects = {}  # the one for which the hub gives leave just now
        self.providers: dict[str, Provider] = {}
        self.requests: list[_Request] = []
        self.uploads: Counter[str] = Counter()
        self.said: Counter[str] = Counter()
        self.handled: Counter[str] = Counter()
        self.events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do something at a time."""
        self._order += 1
        heapq.heappush(self._queue, (when, self._order, what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        """Do something after a while."""
        self.at(self.now + seconds, what)

    def run(self, until: float) -> None:
        """Let things happen until the time ``until``, or until nothing is left to happen."""
        in_this_instant = 0
        while self._queue and self._queue[0][0] <= until:
            when, _, what = heapq.heappop(self._queue)
            in_this_instant = in_this_instant + 1 if when <= self.now else 0
            if in_this_instant > _EVENTS_PER_INSTANT_MAX * (1 + len(self.providers)):
                raise AssertionError(f"the world runs hot at {self.now}")
            self.now = max(self.now, when)
            self.events += 1
            what()

    @property
    def faulty(self) -> bool:
        """Whether random faults still happen."""
        return self.now < self.net.faults_end

    @property
    def bucket_is_down(self) -> bool:
        """Whether the bucket is out of reach."""
        first, end = self.net.bucket_down
        return first <= self.now < end

    # --- nodes

    def provider(self, node_id: str, *files: File, **traits: Any) -> Provider:
        """Add a node that may provide, and has these files."""
        node = self.providers[node_id] = Provider(self, node_id, files, **traits)
        return node

    def request(self, file: File, *, manifest: bool = True, start: int | None = None, end: int | None = None,
                limits: RequestLimits = LIMITS) -> Outcome:
        """Begin to load a file, or a range of it."""
        node_id = f"requester-{len(self.requests)}"
        request = _Request(self, node_id, file, file.manifest_sha1 if manifest else None, limits)
        self.requests.append(request)
        request.post(Need(start, end))
        return request.outcome

    # --- bands

    def publish(self, sender: str, body: Any, to: list[Callable[[Any, str], None]]) -> None:
        """Deliver a message to everybody on a band, as the network pleases."""
        self.said[type(body).__name__] += 1
        for receive in to:
            copies = 1
            if self.faulty:
                if self.random.random() < self.net.loss:
                    continue
                copies += self.random.random() < self.net.duplication
            for _ in range(copies):
                delay = self.random.uniform(*self.net.delay)
                if self.faulty and self.random.random() < self.net.reorder:
                    delay += self.random.uniform(0.0, 5.0)
                self.after(delay, partial(receive, body, sender))

    def move(self, *, copied: bool, providers_hear: float, requesters_hear: float) -> None:
        """The channel moves to another bucket; of that the nodes hear after so many seconds."""
        self.bucket = dict(self.bucket) if copied else {}
        for provider in self.providers.values():
            self.after(providers_hear, provider.hear_of_bucket)
        for request in self.requests:
            self.after(requesters_hear, request.hear_of_bucket)

    def restore_bands(self) -> None:
        """The bands were away, and are back: every requester is told."""
        for request in self.requests:
            request.post(BandRestored())


class Provider:
    """A node that provides.

    :param rate: bytes a second, shared by its uploads.
    :param lookup_seconds: how long it looks a file up.
    :param trait: ``honest``; ``mute`` (offers, then says nothing); ``idler`` (offers, says it is at work, does
        nothing); ``liar`` (announces at once what it has not uploaded); ``spoiler`` (uploads damaged objects);
        ``decliner`` (says why not); ``busy``.
    """

    def __init__(self, world: World, node_id: str, files: tuple[File, ...], *, rate: float = 100e6,
                 lookup_seconds: float = 0.001, trait: str = "honest", concurrency: int = 4) -> None:
        self.world, self.node_id, self.rate, self.trait = world, node_id, rate, trait
        self.files = {file.sha1: file for file in files}
        self.lookup_seconds = lookup_seconds
        self.concurrency = concurrency
        self.alive = True
        self.uploaded_bytes = 0
        self.received = 0
        self.on_upload: Callable[[], None] | None = None
        self._life = 0
        self._bucket = world.bucket
        self._start()

    def _start(self) -> None:
        self.machine = FileProvider(self.node_id, PROVIDE_LIMITS)
        self._busy_until = [self.world.now] * self.concurrency
        self._timer: float | None = None

    def crash(self) -> None:
        """Die at once; what was under way is lost."""
        self.alive = False
        self._life += 1

    def restart(self) -> None:
        """Come back with an empty memory and the same store."""
        if not self.alive:
            self.alive = True
            self._start()

    def receive(self, body: Any, sender: str) -> None:
        """A message of the requestFiles band. What is said to other providers is not looked at further."""
        if not self.alive or (isinstance(body, Assign) and body.provider != self.node_id):
            return
        self.received += 1
        self.world.handled[self.node_id] += 1
        if self.trait in ("decliner", "busy") and isinstance(body, Want) and body.sha1 in self.files:
            reason = "busy" if self.trait == "busy" else "disk-error"
            self._say("Failed", {"request": body.request, "reason": reason, "detail": "as it is"})
        elif self.trait == "honest" or isinstance(body, (Want, Cancel)):
            self.post(Asked(body, sender))
        elif isinstance(body, Assign) and self.trait == "liar":
            self._say("Ready", {"request": body.request, "chunks": body.chunks, "manifest_ready": body.send_manifest})
        elif isinstance(body, Assign) and self.trait == "idler":
            self._idle(body.request)
        elif isinstance(body, Assign) and self.trait == "spoiler":
            self.post(Asked(body, sender))

    def _idle(self, request: str) -> None:
        if self.alive and self.world.now < 5_000:
            self._say("Progress", {"request": request, "bytes": 1})
            self.world.after(1.0, lambda: self._idle(request))

    def post(self, event: Any) -> None:
        """Hand the machine an event and perform what it decides."""
        if not self.alive:
            return
        for effect in self.machine.handle(event, self.world.now):
            if isinstance(effect, LookUp):
                self._later(self.lookup_seconds, partial(self._answer, effect))
            elif isinstance(effect, Upload):
                self._upload(effect)
            elif isinstance(effect, Said):
                self._say(effect.kind.__name__, effect.fields)
        self._set_timer()

    def hear_of_bucket(self) -> None:
        """The hub says that the channel has another bucket."""
        self._bucket = self.world.bucket
        self.post(ProvideBucketMoved())

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        life = self._life
        self.world.after(seconds, lambda: what() if life == self._life else None)

    def _set_timer(self) -> None:
        deadline = self.machine.deadline
        if deadline is not None and (self._timer is None or deadline < self._timer or self._timer <= self.world.now):
            self._timer = deadline
            life = self._life
            self.world.at(max(deadline, self.world.now), lambda: self._tick(life))

    def _tick(self, life: int) -> None:
        if life == self._life:
            self._timer = None
            self.post(ProvideTick())

    def _answer(self, query: LookUp) -> None:
        self.post(self._look_up(query))

    def _look_up(self, query: LookUp) -> LookedUp:
        file = self.files.get(query.sha1)
        if file is None:
            return LookedUp(query, reason="unknown")
        return LookedUp(query, file.size, file.manifest, file.manifest_sha1)

    def _upload(self, effect: Upload) -> None:
        if self.on_upload is not None:
            self.on_upload()
        length = effect.end - effect.start
        slot = min(range(self.concurrency), key=lambda i: self._busy_until[i])
        start = max(self.world.now, self._busy_until[slot])
        self._busy_until[slot] = start + length / (self.rate / self.concurrency)
        leave, known = self.world.bucket, self._bucket
        self._later(self._busy_until[slot] - self.world.now, lambda: self._uploaded(effect, length, leave, known))

    def _uploaded(self, effect: Upload, length: int, leave: Objects, known: Objects) -> None:
        world = self.world
        if world.bucket_is_down or (world.faulty and world.random.random() < world.net.bucket_failure):
            self.post(Uploaded(effect.sha1, "bucket", "it did not answer"))
            return
        world.uploads[effect.sha1] += 1
        self.uploaded_bytes += length
        spoiled = self.trait == "spoiler" or (world.faulty and world.random.random() < world.net.damage)
        if effect.sha1 not in leave:  # create-only
            leave[effect.sha1] = (name_of("damage") if spoiled else effect.sha1, length)
        if self._bucket is known:
            self.post(Uploaded(effect.sha1))
        else:
            self._upload(effect)

    def _say(self, kind: str, fields: dict[str, Any]) -> None:
        body = getattr(messages, kind)(time=0, id="0", **fields)
        self.world.publish(self.node_id, body, [r.receive for r in self.world.requests if not r.outcome.is_over])


@dataclass
class _Request:
    """A node that requests: what ``node/transfer.py`` does, without disk and network."""

    world: World
    node_id: str
    file: File
    manifest_sha1: str | None
    limits: RequestLimits
    outcome: Outcome = field(init=False)
    machine: Requester = field(init=False)

    def __post_init__(self) -> None:
        self.outcome = Outcome(self.world.now)
        providers = dict.fromkeys(self.world.providers, "")
        self.machine = Requester(Inquiry(f"sha1://{self.file.sha1}", "lab", providers), self.file.sha1,
                                 self.manifest_sha1, f"request-of-{self.node_id}", self.limits)
        self._timer: float | None = None
        self._generation = 0
        self._bucket = self.world.bucket
        self._under_way = 0
        self._link_free_at = self.world.now
        self._content: dict[int, str] = {}
        self.cost_events = 0

    def hear_of_bucket(self) -> None:
        """The hub says that the channel has another bucket."""
        if self._bucket is not self.world.bucket:
            self._bucket = self.world.bucket
            self.post(BucketMoved())

    def receive(self, body: Any, sender: str) -> None:
        """A message of the provideFiles band."""
        if not self.outcome.is_over and body.request == self.machine.request_id:
            self.world.handled[self.node_id] += 1
            self.post(Heard(body, sender))

    def post(self, event: Any) -> None:
        """Hand the machine an event and perform what it decides."""
        if self.outcome.is_over:
            return
        self.cost_events += 1
        for effect in self.machine.handle(event, self.world.now):
            self._perform(effect)
        self._verify_whole()
        self._set_timer()
        self._check_alive()

    def _check_alive(self) -> None:
        """The promise of the machine: over, resting, an effect under way, or a deadline."""
        machine = self.machine
        if not (self.outcome.is_over or machine.resting or self._under_way or machine.deadline is not None):
            raise AssertionError(f"{self.node_id} hangs in {machine.phase} at {self.world.now}: {machine.waiting}")

    def _set_timer(self) -> None:
        deadline = self.machine.deadline
        if deadline is None or self.outcome.is_over:
            return
        if self._timer is None or deadline < self._timer or self._timer <= self.world.now:
            self._timer = deadline
            self.world.at(max(deadline, self.world.now), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.post(Tick())

    def _effect(self, seconds: float, outcome: Callable[[], Any]) -> None:
        self._under_way += 1
        generation = self._generation

        def done() -> None:
            if generation == self._generation:
                self._under_way -= 1
                self.post(outcome())

        self.world.after(seconds, done)

    def _perform(self, effect: Any) -> None:
        if isinstance(effect, Locate):
            self._effect(0.01, lambda: self._locate(effect))
        elif isinstance(effect, Prepare):
            self._effect(0.001, lambda: Prepared(()))
        elif isinstance(effect, LoadChunk):
            self._load(effect)
        elif isinstance(effect, ReportDamage):
            self._effect(0.02, lambda: self._report(effect.index))
        elif isinstance(effect, Discard):
            self.outcome.discards += 1
            self._generation += 1
            self._under_way = 0
            self._content.clear()
        elif isinstance(effect, Say):
            fields = effect.fields if effect.kind is not Cancel else {"request": effect.fields["request"]}
            body = effect.kind(time=0, id="0", **fields)
            self.world.publish(self.node_id, body, [node.receive for node in self.world.providers.values()])
        elif isinstance(effect, Succeed):
            self.outcome.succeeded, self.outcome.ended = True, self.world.now
        elif isinstance(effect, Fail):
            self.outcome.error, self.outcome.ended = effect.error, self.world.now

    def _fails(self) -> bool:
        world = self.world
        return world.bucket_is_down or (world.faulty and world.random.random() < world.net.bucket_failure)

    def _moved(self, effect: Locate | LoadChunk, bucket: Objects) -> bool:
        """Whether something that ``bucket`` lacks is to be looked for in another; if it was announced, ask the hub."""
        if effect.announced:
            self.world.after(0.0, self.hear_of_bucket)
        return bucket is not (self.world.bucket if effect.announced else self._bucket)

    def _locate(self, effect: Locate) -> Any:
        manifest_sha1 = effect.manifest_sha1
        name = manifest_sha1 or self.file.sha1
        if self._fails():
            return LocateFailed(BucketUnreachable(object=name, why="it is down", attempts=5))
        found = self._bucket.get(name)
        if found is None:
            if not self._moved(effect, self._bucket):
                return LocatedAbsent()
            self._effect(0.01, lambda: self._locate(effect))
            return Tick()
        if found[0] != name:
            del self._bucket[name]  # reported, and removed
            return LocatedAbsent()
        if manifest_sha1 is None:
            return Located(None, None, found[1])
        for file in (self.file, *(f for node in self.world.providers.values() for f in node.files.values())):
            if file.manifest is not None and file.manifest_sha1 == manifest_sha1:
                return Located(file.manifest, manifest_sha1, file.manifest.size)
        return LocateFailed(ManifestInvalid(manifest=manifest_sha1, why="it is no manifest"))

    def _load(self, effect: LoadChunk) -> None:
        world, index, bucket = self.world, effect.index, self._bucket
        chunk = self.machine.chunks[index]
        self.outcome.downloads += 1
        found = bucket.get(chunk.sha1)
        if self._fails():
            error = BucketUnreachable(object=chunk.sha1, why="it is down", attempts=5)
            self._effect(1.0, lambda: ChunkFailed(index, error))
        elif found is None:
            self._effect(0.01, lambda: self._absent(effect, bucket))
        elif found[1] != chunk.end - chunk.start:
            self._effect(0.01, lambda: ChunkFailed(index, WrongSize(object=chunk.sha1, found=found[1], expected=1)))
        else:
            self._link_free_at = max(world.now, self._link_free_at) + found[1] / world.net.download_bytes_per_second
            self._effect(self._link_free_at - world.now, lambda: self._held(index, found[0]))

    def _absent(self, effect: LoadChunk, bucket: Objects) -> Any:
        if not self._moved(effect, bucket):
            return ChunkAbsent(effect.index)
        self._effect(0.01, lambda: self._again(effect))
        return Tick()

    def _again(self, effect: LoadChunk) -> Tick:
        self._load(effect)
        return Tick()

    def _held(self, index: int, content: str) -> ChunkHeld:
        self._content[index] = content
        good = content == self.machine.chunks[index].sha1
        self._effect(0.005, lambda: ChunkGood(index) if good else ChunkDamaged(index, content))
        return ChunkHeld(index)

    def _report(self, index: int) -> DamageChecked:
        name = self.machine.chunks[index].sha1
        found = self.world.bucket.get(name)
        length = self.machine.chunks[index].end - self.machine.chunks[index].start
        removed = found is not None and (found[0] != name or found[1] != length)
        if removed:
            del self.world.bucket[name]
        return DamageChecked(index, removed)

    def _verify_whole(self) -> None:
        machine = self.machine
        if (machine.phase is Phase.MOVE and machine.whole and not self._under_way
                and machine.book.count_in(State.GOOD) == len(machine.chunks)):
            true = machine.manifest not in FORGED
            self._effect(0.001, lambda: WholeGood() if true else WholeDamaged(name_of("another file")))
