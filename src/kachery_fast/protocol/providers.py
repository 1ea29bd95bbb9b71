"""The nodes that have offered a file, and which chunk each of them is to upload."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .chunks import ChunkBook, State
from .inquiry import Inquiry
from .messages import Offer

__all__ = ["Provider", "ProviderPool"]

_MANIFEST = -1  # stands for the manifest among the chunks that a provider owes


@dataclass
class Provider:
    """A node that has offered the file, and what it owes."""

    node_id: str
    offer: Offer
    heard_at: float
    outstanding: set[int] = field(default_factory=set)
    uploaded_count: int = 0

    def begin(self, now: float) -> None:
        """Note that it was asked for the manifest."""
        self.outstanding.add(_MANIFEST)
        self.heard_at = now


class ProviderPool:
    """Providers of one request.

    :param share_max: chunks that one provider may owe at a time.
    :param silence_seconds: how long a provider that owes something may keep silent.
    """

    def __init__(self, inquiry: Inquiry, share_max: int, silence_seconds: float) -> None:
        self._inquiry = inquiry
        self._share_max = share_max
        self._silence_seconds = silence_seconds
        self._live: dict[str, Provider] = {}
        self._lost: set[str] = set()
        self._sources: dict[int, str] = {}
        self._blamed: dict[int, set[str]] = {}

    @property
    def idle(self) -> bool:
        """Whether no provider owes anything."""
        return not any(provider.outstanding for provider in self._live.values())

    @property
    def lost_count(self) -> int:
        """How many providers have declined, failed or fallen silent since they last offered."""
        return len(self._lost)

    def names(self) -> str:
        """Name those who owe something, for people."""
        return ", ".join(self._inquiry.label(node_id) for node_id, p in self._live.items() if p.outstanding)

    def add(self, node_id: str, offer: Offer, now: float) -> None:
        """Take an offer, also one of a node that was lost before."""
        known = self._live.get(node_id)
        if known is None:
            self._live[node_id] = Provider(node_id, offer, now)
        else:
            known.offer, known.heard_at = offer, now
        self._lost.discard(node_id)
        self._inquiry.note(node_id, "offered it")

    def heard(self, node_id: str, now: float) -> None:
        """Note a sign of life."""
        if node_id in self._live:
            self._live[node_id].heard_at = now

    def uploaded(self, node_id: str, index: int) -> None:
        """Note that a provider has announced a chunk."""
        self._sources[index] = node_id
        provider = self._live.get(node_id)
        if provider is not None:
            provider.outstanding.discard(index)
            provider.outstanding.discard(_MANIFEST)
            provider.uploaded_count += 1

    def manifest_uploaded(self, node_id: str) -> None:
        """Note that a provider has announced the manifest."""
        if node_id in self._live:
            self._live[node_id].outstanding.discard(_MANIFEST)

    def source(self, index: int) -> str | None:
        """Return who announced a chunk."""
        return self._sources.get(index)

    def forget_source(self, index: int) -> None:
        """A verified chunk needs no source any more."""
        self._sources.pop(index, None)
        self._blamed.pop(index, None)

    def blame(self, index: int) -> None:
        """Prefer others than the source of a damaged chunk when it is asked for again."""
        source = self._sources.pop(index, None)
        if source is not None:
            self._blamed.setdefault(index, set()).add(source)

    def lose(self, node_id: str, why: str, book: ChunkBook) -> None:
        """Give a provider up; what it owes is to be asked for elsewhere."""
        self._inquiry.note(node_id, why)
        self._lost.add(node_id)
        provider = self._live.pop(node_id, None)
        if provider is not None:
            _give_back(provider, book)

    def lose_silent(self, now: float, book: ChunkBook) -> None:
        """Give up those who owe something and have kept silent for too long."""
        for provider in list(self._live.values()):
            if provider.outstanding and now - provider.heard_at >= self._silence_seconds:
                count = provider.uploaded_count
                done = f"after uploading {count} chunk{'s' * (count != 1)}" if count else "before uploading anything"
                self.lose(provider.node_id, f"offered it, then fell silent {done}", book)

    def forgive(self) -> None:
        """Let those who were lost be asked again."""
        self._lost.clear()

    def refuse_manifest(self, manifest_sha1: str) -> None:
        """Give up everybody who offers a manifest that turned out to be false."""
        for provider in list(self._live.values()):
            if provider.offer.manifest == manifest_sha1:
                self.lose(provider.node_id, "offered a manifest that does not make this file", ChunkBook(0))

    def reset(self, book: ChunkBook) -> None:
        """Forget all offers: messages may have been lost."""
        for provider in self._live.values():
            _give_back(provider, book)
        self._live.clear()
        self._lost.clear()

    def silence_deadline(self) -> float | None:
        """When the next silent provider has to be given up."""
        times = [provider.heard_at + self._silence_seconds for provider in self._live.values() if provider.outstanding]
        return min(times, default=None)

    def choose_geometry(self, manifest_sha1: str | None) -> Provider | None:
        """Choose whose manifest to take: the wanted one where offered, else the one most offered; then the least load.
        """
        if not self._live:
            return None
        offers = list(self._live.values())
        wanted = [provider for provider in offers if provider.offer.manifest == manifest_sha1]
        if not wanted or manifest_sha1 is None:
            counts = Counter((provider.offer.manifest, provider.offer.size) for provider in offers)
            choice = counts.most_common(1)[0][0]
            wanted = [provider for provider in offers if (provider.offer.manifest, provider.offer.size) == choice]
        return min(wanted, key=lambda provider: provider.offer.load)

    def assign(self, book: ChunkBook, manifest_sha1: str | None, size: int, now: float) -> dict[str, list[int]] | None:
        """Deal absent chunks, in order, to those who owe least; return the new shares by node.

        None when nobody is left who has offered this geometry.
        """
        able = [provider for provider in self._live.values()
                if provider.offer.manifest == manifest_sha1 and provider.offer.size == size]
        if not able:
            return None
        hungry = [provider for provider in able if len(provider.outstanding) <= self._share_max // 2]
        shares: dict[str, list[int]] = {}
        while hungry:
            index = book.take(State.ABSENT, State.ASSIGNED)
            if index is None:
                break
            blamed = self._blamed.get(index, ())
            provider = min(hungry, key=lambda p: (p.node_id in blamed, len(p.outstanding), p.offer.load))
            if not provider.outstanding:
                provider.heard_at = now
            provider.outstanding.add(index)
            self._sources.pop(index, None)
            shares.setdefault(provider.node_id, []).append(index)
            if len(provider.outstanding) >= self._share_max:
                hungry.remove(provider)
        return shares


def _give_back(provider: Provider, book: ChunkBook) -> None:
    for index in provider.outstanding:
        if index != _MANIFEST and book[index] is State.ASSIGNED:
            book.move(index, State.ABSENT)
    provider.outstanding.clear()
