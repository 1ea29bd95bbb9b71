"""The provider: how a node serves the files that it has to one channel.

A pure state machine beside ``request.Requester``: ``Provider.handle(event, now)`` returns the effects. Nothing is
uploaded before a node that may request files has asked for it. An object that several requests want is uploaded
once; all of them are told. Requests take turns, object by object, so that a long one does not starve a short one.

A node without the file keeps silent; one that has it and cannot serve it says why. The requests of 2022 (one message,
one object, ``started`` and ``finished``) are served by the same queue.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from .canonical import object_sha1
from .manifest import CHUNK_SIZE_BYTES_MAX, Chunk, Manifest
from .messages import (
    Assign,
    Cancel,
    Failed,
    Offer,
    Progress,
    Ready,
    RequestFile2022,
    UploadFileStatus2022,
    Want,
    compress,
    expand,
)
from .names import is_sha1

__all__ = ["Asked", "FileProvider", "LookUp", "LookedUp", "ProvideLimits", "Said", "Tick", "Upload", "Uploaded"]

_MANIFEST = -1  # stands for the manifest among the chunk indices of a job
_RECENT_UPLOADS_MAX = 20_000


@dataclass(frozen=True)
class ProvideLimits:
    """The provider's share of the settings table; times in seconds."""

    requests_max: int
    uploads_ahead_max: int
    progress_interval_seconds: float
    ready_batch_seconds: float


# --- events


@dataclass(frozen=True)
class Asked:
    """A message of a node that may request files on this channel."""

    body: Want | Assign | Cancel | RequestFile2022
    sender: str


@dataclass(frozen=True)
class LookedUp:
    """The store's answer to ``LookUp``: the size and manifest of a file that is here, or ``reason`` and ``detail``.

    ``reason`` is None when the file is here, ``unknown`` when it never was, else a word of ``Failed.REASONS``.
    """

    query: LookUp
    size: int = 0
    manifest: Manifest | None = None
    manifest_sha1: str | None = None
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Uploaded:
    """An object is in the bucket now, or (with a ``reason``) could not be brought there."""

    sha1: str
    reason: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Asked | LookedUp | Uploaded | Tick


# --- effects


@dataclass(frozen=True)
class LookUp:
    """Look a file up in the local store: it, its size, its manifest (``manifest_sha1`` if given, else its own)."""

    sha1: str
    manifest_sha1: str | None
    asked: Asked


@dataclass(frozen=True)
class Upload:
    """Bring the bytes ``start`` to ``end`` of a stored file into the bucket under the name ``sha1``.

    With ``check`` hash them first: the name came from outside, or an earlier upload of it turned out damaged.
    """

    sha1: str
    file_sha1: str
    start: int
    end: int
    check: bool


@dataclass(frozen=True)
class Said:
    """Publish a message on the provideFiles band; the caller adds channel, time and id where the kind has them."""

    kind: type[Offer] | type[Ready] | type[Progress] | type[Failed] | type[UploadFileStatus2022]
    fields: dict[str, Any]


Effect = LookUp | Upload | Said


@dataclass
class _Job:
    """What one request is still owed."""

    request: str
    pending: deque[tuple[int, str, str, int, int, bool]] = field(default_factory=deque)
    under_way: dict[str, list[int]] = field(default_factory=dict)
    owed: set[int] = field(default_factory=set)
    ready: list[int] = field(default_factory=list)
    bytes: int = 0
    ready_at: float = 0.0
    progress_at: float = 0.0
    file_key: dict[str, Any] | None = None


class FileProvider:
    """Serves one channel. ``node_id`` is this node's own id."""

    def __init__(self, node_id: str, limits: ProvideLimits) -> None:
        self._node_id = node_id
        self._limits = limits
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._uploads: dict[str, int] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._effects: list[Effect] = []

    @property
    def load(self) -> int:
        """Objects that are queued or under way."""
        return len(self._uploads) + sum(len(job.pending) for job in self._jobs.values())

    @property
    def deadline(self) -> float | None:
        """When a ``Tick`` is due, or None."""
        times = [job.progress_at + self._limits.progress_interval_seconds
                 for job in self._jobs.values() if job.file_key is None]
        times += [job.ready_at + self._limits.ready_batch_seconds for job in self._jobs.values() if job.ready]
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` (seconds, monotonic) and return what to do."""
        if isinstance(event, Asked):
            self._on_asked(event)
        elif isinstance(event, LookedUp):
            self._on_looked_up(event, now)
        elif isinstance(event, Uploaded):
            self._on_uploaded(event)
        self._start_uploads()
        self._report(now)
        effects, self._effects = self._effects, []
        return effects

    # --- what is asked

    def _on_asked(self, asked: Asked) -> None:
        body = asked.body
        if isinstance(body, Cancel):
            self._jobs.pop(_key(asked.sender, body.request), None)
        elif isinstance(body, RequestFile2022):
            self._on_request_2022(asked, body)
        elif isinstance(body, Want) or body.provider == self._node_id:
            self._effects.append(LookUp(body.sha1, body.manifest, asked))

    def _on_request_2022(self, asked: Asked, body: RequestFile2022) -> None:
        sha1 = body.file_key.get("sha1")
        chunk_of = body.file_key.get("chunkOf")
        if isinstance(chunk_of, dict):
            whole = chunk_of.get("fileKey")
            sha1 = whole.get("sha1") if isinstance(whole, dict) else None
        if isinstance(sha1, str) and is_sha1(sha1) and is_sha1(body.file_key.get("sha1")):
            self._effects.append(LookUp(sha1, None, asked))

    def _on_looked_up(self, found: LookedUp, now: float) -> None:
        asked = found.query.asked
        body = asked.body
        if isinstance(body, RequestFile2022):
            if found.reason is None:
                self._begin_2022(asked, body, found)
        elif isinstance(body, (Want, Assign)):
            if found.reason == "unknown" and isinstance(body, Want):
                return
            if found.reason is not None:
                self._say(Failed, request=body.request, reason=found.reason, detail=found.detail)
            elif isinstance(body, Want):
                self._offer(asked.sender, body, found)
            else:
                self._begin(asked.sender, body, found, now)

    def _offer(self, sender: str, want: Want, found: LookedUp) -> None:
        if self._full(_key(sender, want.request)):
            self._say(Failed, request=want.request, reason="busy", detail=f"it serves {len(self._jobs)} requests")
            return
        self._say(Offer, request=want.request, sha1=want.sha1, size=found.size, manifest=found.manifest_sha1,
                  load=self.load)

    def _begin(self, sender: str, assign: Assign, found: LookedUp, now: float) -> None:
        key = _key(sender, assign.request)
        if self._full(key):
            self._say(Failed, request=assign.request, reason="busy", detail=f"it serves {len(self._jobs)} requests")
            return
        if assign.manifest != found.manifest_sha1:
            self._say(Failed, request=assign.request, reason="unknown", detail="it does not have that manifest")
            return
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(assign.request, ready_at=now - self._limits.ready_batch_seconds,
                                         progress_at=now)
        manifest = found.manifest
        if assign.send_manifest and manifest is not None and found.manifest_sha1 is not None:
            encoded_size = len(manifest.encode())
            self._owe(job, _MANIFEST, found.manifest_sha1, found.manifest_sha1, 0, encoded_size)
        chunks = manifest.chunks if manifest is not None else (Chunk(0, found.size, assign.sha1),)
        for index in expand(assign.chunks, len(chunks)):
            chunk = chunks[index]
            self._owe(job, index, chunk.sha1, assign.sha1, chunk.start, chunk.end)

    def _begin_2022(self, asked: Asked, body: RequestFile2022, found: LookedUp) -> None:
        key = _key(asked.sender, "2022:" + object_sha1(body.file_key))
        start, end = 0, found.size
        chunk_of = body.file_key.get("chunkOf")
        if isinstance(chunk_of, dict):
            start, end = chunk_of.get("startByte"), chunk_of.get("endByte")  # type: ignore[assignment]
        if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= found.size
                and end - start <= CHUNK_SIZE_BYTES_MAX):
            return
        if key in self._jobs or self._full(key):
            return
        job = self._jobs[key] = _Job("", file_key=body.file_key)
        self._say(UploadFileStatus2022, file_key=body.file_key, status="started")
        job.owed.add(0)
        job.pending.append((0, body.file_key["sha1"], found.query.sha1, start, end, True))

    def _owe(self, job: _Job, index: int, sha1: str, file_sha1: str, start: int, end: int) -> None:
        if index not in job.owed:
            job.owed.add(index)
            job.pending.append((index, sha1, file_sha1, start, end, sha1 in self._recent))

    def _full(self, key: str) -> bool:
        return key not in self._jobs and len(self._jobs) >= self._limits.requests_max

    # --- uploads

    def _start_uploads(self) -> None:
        progress = True
        while progress and len(self._uploads) < self._limits.uploads_ahead_max:
            progress = False
            for job in list(self._jobs.values()):
                if not job.pending:
                    continue
                progress = True
                index, sha1, file_sha1, start, end, check = job.pending.popleft()
                job.under_way.setdefault(sha1, []).append(index)
                if sha1 not in self._uploads:
                    self._uploads[sha1] = end - start
                    self._effects.append(Upload(sha1, file_sha1, start, end, check))
                if len(self._uploads) >= self._limits.uploads_ahead_max:
                    break

    def _on_uploaded(self, event: Uploaded) -> None:
        size = self._uploads.pop(event.sha1, 0)
        if event.reason is None:
            self._recent[event.sha1] = None
            if len(self._recent) > _RECENT_UPLOADS_MAX:
                self._recent.popitem(last=False)
        for key, job in list(self._jobs.items()):
            indices = job.under_way.pop(event.sha1, None)
            if indices is None:
                continue
            if event.reason is not None:
                del self._jobs[key]
                if job.file_key is None:
                    self._say(Failed, request=job.request, reason=event.reason, detail=event.detail)
                continue
            job.ready.extend(indices)
            job.bytes += size
            job.owed.difference_update(indices)

    # --- reports

    def _report(self, now: float) -> None:
        for key, job in list(self._jobs.items()):
            if job.file_key is not None:
                if not job.owed:
                    self._say(UploadFileStatus2022, file_key=job.file_key, status="finished")
                    del self._jobs[key]
                continue
            if job.ready and (not job.owed or now >= job.ready_at + self._limits.ready_batch_seconds):
                chunks = compress([index for index in job.ready if index != _MANIFEST])
                self._say(Ready, request=job.request, chunks=chunks, manifest_ready=_MANIFEST in job.ready)
                job.ready, job.ready_at = [], now
            if not job.owed and not job.ready:
                del self._jobs[key]
            elif now >= job.progress_at + self._limits.progress_interval_seconds:
                self._say(Progress, request=job.request, bytes=job.bytes, queued=len(job.owed))
                job.progress_at = now

    def _say(self, kind: Any, **fields: Any) -> None:
        self._effects.append(Said(kind, fields))


def _key(sender: str, request: str) -> str:
    return f"{sender}:{request}"
