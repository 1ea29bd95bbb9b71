"""The nodes that have offered a file, which chunk each of them is to upload, and how far each is to be believed.

Offers wait on a bench, by the cut they offer: a manifest and a size. A crew of a few works on the request; whoever
leaves it is replaced from the bench, so that a thousand offers cost no more per event than a dozen. A member of the
crew owes a few chunks at first and more as it delivers, so that a fast one does more than a slow one; at the end, when
nothing is left to deal, an idle one takes over what a slower one still owes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from heapq import nsmallest

from .asking import RequestLimits
from .bodies import Failed, Offer
from .chunks import ChunkBook, State
from .inquiry import Inquiry

__all__ = ["ProviderPool"]

Cut = tuple[str | None, int]  # the SHA-1 of the manifest (None: one piece), the size of the file in bytes

_MANIFEST = -1  # stands for the manifest among the chunks that a provider owes
# A first share, and what a provider is likely to be uploading at one moment (the default upload_concurrency).
_FIRST_SHARE_CHUNKS = 8
_UNDER_WAY_CHUNKS = 4
# These do not pass by themselves; the others (busy, hub, bucket) may.
_LASTING_REASONS = frozenset({"unknown", "not-permitted", "evicted", "changed-on-disk", "disk-error"})


@dataclass
class _Provider:
    """A node that has offered the file, and what it owes."""

    node_id: str
    offer: Offer
    heard_at: float
    moved_at: float
    owed: set[int] = field(default_factory=set)
    uploaded_count: int = 0

    @property
    def cut(self) -> Cut:
        """What it offered."""
        return self.offer.manifest, self.offer.size


class ProviderPool:
    """Providers of one request."""

    def __init__(self, inquiry: Inquiry, limits: RequestLimits) -> None:
        self._inquiry = inquiry
        self._limits = limits
        self._book = ChunkBook(0)
        self._bench: dict[Cut, dict[str, _Provider]] = {}
        self._crew: dict[str, _Provider] = {}
        self._cuts: dict[str, Cut] = {}
        self._owners: dict[int, list[str]] = {}
        self._sources: dict[int, str] = {}
        self._blamed: dict[int, Counter[str]] = {}
        self._vanished: dict[int, int] = {}
        self._known: set[str] = set()
        self._refused: set[str] = set()
        self._gone: set[str] = set()  # the refused and the lost
        self._strikes: dict[str, int] = {}
        self._bad_manifests: set[str | None] = set()
        self._called_at = float("-inf")

    # --- what it looks like

    @property
    def idle(self) -> bool:
        """Whether no provider owes anything."""
        return not any(provider.owed for provider in self._crew.values())

    @property
    def all_lost(self) -> bool:
        """Whether everybody who may provide has declined, failed or fallen silent since the last question."""
        providers = self._inquiry.providers
        return len(self._gone) >= len(providers) and self._gone >= providers.keys()

    @property
    def all_answered(self) -> bool:
        """Whether everybody who may provide has offered or declined."""
        count, providers = len(self._gone) + len(self._cuts), self._inquiry.providers
        return count >= len(providers) and providers.keys() <= self._gone | self._cuts.keys()

    @property
    def all_refused(self) -> bool:
        """Whether everybody who may provide has failed so often, or lied, that asking again is no use."""
        return self._refused >= self._inquiry.providers.keys()

    @property
    def deadline(self) -> float | None:
        """When the next provider that owes something has to be given up."""
        return min((self._patience_end(p) for p in self._crew.values() if p.owed), default=None)

    def names(self) -> str:
        """Name those who owe something, for people."""
        return ", ".join(self._inquiry.label(node_id) for node_id, p in self._crew.items() if p.owed)

    # --- offers

    def add(self, node_id: str, offer: Offer, now: float) -> bool:
        """Take an offer, also one of a node that was lost before; False when nothing from this node counts any more."""
        if node_id in self._refused or offer.manifest in self._bad_manifests:
            return False
        self._known.add(node_id)
        self._gone.discard(node_id)
        self._inquiry.note(node_id, "offered it")
        member = self._crew.get(node_id)
        if member is not None and member.cut == (offer.manifest, offer.size):
            member.offer, member.heard_at = offer, now
            return True
        self._remove(node_id)
        provider = _Provider(node_id, offer, now, now)
        self._cuts[node_id] = provider.cut
        self._bench.setdefault(provider.cut, {})[node_id] = provider
        return True

    def has_other_cut(self, cut: Cut) -> bool:
        """Whether somebody offers the file cut otherwise."""
        return any(offered != cut for offered in self._bench)

    def choose_cut(self, manifest_sha1: str | None) -> Offer | None:
        """Choose whose manifest to take: the wanted one where offered, else the one most offered; then by load."""
        if not self._bench:
            return None
        wanted = [cut for cut in self._bench if cut[0] == manifest_sha1 and manifest_sha1 is not None]
        cut = max(wanted or self._bench, key=lambda cut: len(self._bench[cut]))
        return min(self._bench[cut].values(), key=self._rank).offer

    def ask_for_manifest(self, cut: Cut, now: float) -> str:
        """Let the best of those who offer ``cut`` owe its manifest, and return its node id."""
        self._recruit(cut, 1)
        provider = next(iter(self._crew.values()))
        self._owe(provider, _MANIFEST, now)
        return provider.node_id

    def lay_out(self, book: ChunkBook) -> None:
        """The file is cut anew: nobody owes anything, and nothing has been announced."""
        self._book = book
        for provider in self._crew.values():
            provider.owed.clear()
            self._bench.setdefault(provider.cut, {})[provider.node_id] = provider
        for memory in (self._crew, self._owners, self._sources, self._blamed, self._vanished):
            memory.clear()

    def reset(self) -> None:
        """Forget all offers: messages may have been lost."""
        for node_id in list(self._cuts):
            self._remove(node_id)
        self.forgive()

    def forgive(self) -> None:
        """Let those who were lost be asked again."""
        self._gone = set(self._refused)

    # --- what providers say

    def heard(self, node_id: str, now: float) -> bool:
        """Note a sign of life; whether the node owes something."""
        provider = self._crew.get(node_id)
        if provider is None:
            return False
        provider.heard_at = now
        return bool(provider.owed)

    def knows(self, node_id: str | None = None) -> bool:
        """Whether this node (None: anybody) has offered the file at any time."""
        return bool(self._known) if node_id is None else node_id in self._known

    def uploaded(self, node_id: str, index: int, now: float) -> bool:
        """Note that a node has announced a chunk; whether that is to be believed.

        It is, when the node owes the chunk; and once also when it does not any more, having been given up too early.
        """
        provider = self._crew.get(node_id)
        owed = provider is not None and index in provider.owed
        if not owed and (node_id not in self._known or node_id in self._refused or index in self._vanished):
            return False
        for owner in self._owners.pop(index, ()):
            self._crew[owner].owed.discard(index)
        if provider is not None and owed:
            provider.uploaded_count += 1
            provider.moved_at = now
        self._sources[index] = node_id
        return True

    def manifest_uploaded(self, node_id: str) -> bool:
        """Note that a node has announced the manifest; whether it was asked for it."""
        provider = self._crew.get(node_id)
        if provider is None or _MANIFEST not in provider.owed:
            return False
        self._disown(provider, _MANIFEST)
        return True

    def failed(self, node_id: str, body: Failed) -> None:
        """A node cannot go on, or declines."""
        why = f"{body.reason}: {body.detail}" if body.detail else body.reason
        if node_id in self._cuts and body.reason in _LASTING_REASONS:
            self.strike(node_id, why)
        else:
            self.lose(node_id, why)

    # --- what became of it

    def source(self, index: int) -> str | None:
        """Return who announced a chunk."""
        return self._sources.get(index)

    def sound(self, index: int) -> None:
        """A chunk was verified: its source is trusted again."""
        self._blamed.pop(index, None)
        source = self._sources.pop(index, None)
        if source is not None:
            self._strikes.pop(source, None)

    def blame(self, index: int) -> int:
        """A chunk was damaged: prefer others than its source when it is asked for again.

        :return: how many nodes have been its source, at least 1.
        Its source is not given up: it may have found the object of somebody else in the bucket, and left it there.
        """
        source = self._sources.pop(index, None)
        if source is not None:
            self._blamed.setdefault(index, Counter())[source] += 1
            self._strikes[source] = self._strikes.get(source, 0) + 1
        return max(1, len(self._blamed.get(index, ())))

    def vanished(self, index: int, *, excused: bool) -> None:
        """A chunk that was announced is not in the bucket; ``excused``: that may be nobody's fault."""
        source = self._sources.pop(index, None)
        count = self._vanished[index] = self._vanished.get(index, 0) + 1
        removed = index in self._blamed and count <= self._limits.corrupt_retries_max
        if source is not None and not (excused or removed):  # removed under the eyes of whoever found it there, damaged
            self.strike(source, "announced chunks that the bucket does not have")

    def strike(self, node_id: str, why: str) -> None:
        """A node has failed in a way that is its own: give it up; for good when that happens again and again."""
        self._strikes[node_id] = self._strikes.get(node_id, 0) + 1
        if self._strikes[node_id] >= self._limits.corrupt_retries_max:
            self.refuse(node_id, why)
        else:
            self.lose(node_id, why)

    def refuse(self, node_id: str, why: str) -> None:
        """Give a node up for the rest of the request."""
        self.lose(node_id, why)
        self._refused.add(node_id)

    def refuse_manifest(self, manifest_sha1: str | None, why: str) -> None:
        """Give up, for the rest of the request, a manifest and everybody who offers it."""
        self._bad_manifests.add(manifest_sha1)
        for node_id, cut in list(self._cuts.items()):
            if cut[0] == manifest_sha1:
                self.refuse(node_id, why)

    def lose(self, node_id: str, why: str) -> None:
        """Give a provider up; what it owes is to be asked for elsewhere."""
        self._inquiry.note(node_id, why)
        self._gone.add(node_id)
        self._remove(node_id)

    def lose_silent(self, now: float) -> bool:
        """Give up those who owe something and have kept silent, or brought nothing, for too long.

        :return: whether somebody was given up who did not keep silent, but brought nothing.
        """
        stalled = False
        for provider in list(self._crew.values()):
            if provider.owed and now >= self._patience_end(provider):
                count = provider.uploaded_count
                done = f"after uploading {count} chunk{'s' * (count != 1)}" if count else "before uploading anything"
                if now >= provider.heard_at + self._limits.provider_silence_seconds:
                    self.lose(provider.node_id, f"offered it, then fell silent {done}")
                else:
                    stalled = True
                    self.strike(provider.node_id, "said it was at work, but brought nothing for "
                                                  f"{self._stall(provider):g} s {done}")
        return stalled

    # --- dealing

    def assign(self, cut: Cut, now: float) -> dict[str, list[int]] | None:
        """Deal absent chunks, in order, to those who owe least; return the new shares by node.

        None when nobody is left who offers this cut.
        """
        self._recruit(cut, self._limits.stripe_providers_max)
        if not self._crew:
            return None
        shares: dict[str, list[int]] = {}
        # Smaller shares towards the end, so that all finish together.
        fair = max(_FIRST_SHARE_CHUNKS, self._book.count_in(State.ABSENT) // (2 * len(self._crew)))
        hungry = [p for p in self._crew.values() if len(p.owed) <= min(fair, self._share(p)) // 2]
        while hungry:
            index = self._book.take(State.ABSENT, State.ASSIGNED)
            if index is None:
                break
            provider = self._choose(index, hungry)
            self._owe(provider, index, now)
            shares.setdefault(provider.node_id, []).append(index)
            if provider in hungry and len(provider.owed) >= min(fair, self._share(provider)):
                hungry.remove(provider)
        return shares

    def call_for_help(self, now: float) -> bool:
        """Whether to ask anew, not too often: nobody has brought anything for long, or of some chunk only damage."""
        stuck = all(self._is_stuck(provider, now) for provider in self._crew.values())
        spoiled = any(blamed.keys() >= self._crew.keys() for blamed in self._blamed.values())
        if now <= self._called_at + self._limits.patience_seconds or not (stuck or spoiled):
            return False
        self._called_at = now
        return True

    def reassign(self, cut: Cut, now: float) -> dict[str, list[int]]:
        """When all is dealt: let idle providers help with what others still owe; return the new shares by node."""
        self._recruit(cut, self._limits.stripe_providers_max)
        shares: dict[str, list[int]] = {}
        for helper in sorted(self._crew.values(), key=self._rank):
            if helper.owed:
                continue
            slowest = max(self._crew.values(), key=lambda p: (self._is_stuck(p, now), len(p.owed)))
            hopeless = self._is_stuck(slowest, now)
            alone = sorted(index for index in slowest.owed if self._may_help(helper, index, hopeless, now))
            faster = hopeless or helper.uploaded_count > 2 * slowest.uploaded_count
            keep = 0 if faster else max(len(alone) // 2, _UNDER_WAY_CHUNKS)
            for index in alone[keep:][:self._share(helper)]:
                self._owe(helper, index, now)
                shares.setdefault(helper.node_id, []).append(index)
        return shares

    # --- small parts

    def _choose(self, index: int, hungry: list[_Provider]) -> _Provider:
        blamed = self._blamed.get(index)
        if blamed:
            least = min(blamed[node_id] for node_id in self._crew)
            hungry = [p for p in self._crew.values() if blamed[p.node_id] == least]
        return min(hungry, key=lambda p: (self._strikes.get(p.node_id, 0), len(p.owed), p.offer.load))

    def _may_help(self, helper: _Provider, index: int, hopeless: bool, now: float) -> bool:
        if hopeless:
            return all(self._is_stuck(self._crew[owner], now) for owner in self._owners[index])
        return len(self._owners[index]) == 1 and helper.node_id not in self._blamed.get(index, ())

    def _share(self, provider: _Provider) -> int:
        return min(self._limits.assign_chunks_max, _FIRST_SHARE_CHUNKS + provider.uploaded_count)

    def _rank(self, provider: _Provider) -> tuple[int, int]:
        return self._strikes.get(provider.node_id, 0), provider.offer.load

    def _is_stuck(self, provider: _Provider, now: float) -> bool:
        return bool(provider.owed) and now > provider.moved_at + self._limits.patience_seconds

    def _patience_end(self, provider: _Provider) -> float:
        return min(provider.heard_at + self._limits.provider_silence_seconds, provider.moved_at + self._stall(provider))

    def _stall(self, provider: _Provider) -> float:
        """How long it may be at work without bringing anything: a manifest is short, and was read for the offer."""
        limits = self._limits
        return limits.patience_seconds if _MANIFEST in provider.owed else limits.provider_stall_seconds

    def _recruit(self, cut: Cut, count_max: int) -> None:
        bench = self._bench.get(cut, {})
        for provider in nsmallest(max(0, count_max - len(self._crew)), bench.values(), key=self._rank):
            self._crew[provider.node_id] = provider
            self._leave_bench(provider.node_id, cut)

    def _owe(self, provider: _Provider, index: int, now: float) -> None:
        if not provider.owed:
            provider.heard_at = provider.moved_at = now
        provider.owed.add(index)
        self._owners.setdefault(index, []).append(provider.node_id)
        self._sources.pop(index, None)

    def _disown(self, provider: _Provider, index: int) -> None:
        provider.owed.discard(index)
        owners = self._owners[index]
        owners.remove(provider.node_id)
        if not owners:
            del self._owners[index]
            if index != _MANIFEST and self._book[index] is State.ASSIGNED:
                self._book.move(index, State.ABSENT)

    def _remove(self, node_id: str) -> None:
        cut = self._cuts.pop(node_id, None)
        provider = self._crew.pop(node_id, None)
        if provider is not None:
            for index in list(provider.owed):
                self._disown(provider, index)
        elif cut is not None:
            self._leave_bench(node_id, cut)

    def _leave_bench(self, node_id: str, cut: Cut) -> None:
        del self._bench[cut][node_id]
        if not self._bench[cut]:
            del self._bench[cut]
