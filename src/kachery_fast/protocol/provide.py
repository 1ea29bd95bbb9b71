"""The provider: how a node serves the files that it has to one channel.

A pure state machine beside ``request.Requester``: ``FileProvider.handle(event, now)`` returns the effects. Nothing is
uploaded before a node that may request files has asked for it. An object that several requests want is uploaded
once; all of them are told. Requests take turns, object by object, so that a long one does not starve a short one.

A node without the file keeps silent; one that has it and cannot serve it says why. As long as it owes an answer or an
object it says each second that it is at work, also while a look-up has to read a long file. A requester that
disappears leaves behind no more than what it asked for last: that is uploaded, and the job ends. The requests of 2022
(one message, one object, ``started`` and ``finished``) are served by the same queue.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .bodies import (
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
from .canonical import object_sha1
from .manifest import CHUNK_SIZE_BYTES_MAX, Chunk
from .names import is_sha1
from .provide_events import Asked, BucketMoved, Effect, Event, LookedUp, LookUp, Said, Tick, Upload, Uploaded

__all__ = ["Asked", "BucketMoved", "Effect", "Event", "FileProvider", "LookUp", "LookedUp", "ProvideLimits", "Said",
           "Tick", "Upload", "Uploaded"]

_MANIFEST = -1  # stands for the manifest among the chunk indices of a job
_RECENT_UPLOADS_MAX = 20_000
# Another request that wants an object within this time is told that it is there; later it may have been evicted.
_FRESH_SECONDS = 60.0
# What one request may be owed at a time, 16 times what ours ask for: bounds the queue, and a Ready to about 16 kB.
_OWED_MAX = 1024
# Questions that are being looked up; a flood beyond is dropped, and the honest ask again.
_LOOKUPS_MAX = 1024
# A job that nothing has happened to for so long is a leftover; reading the longest file takes less.
_JOB_AGE_SECONDS_MAX = 4 * 3600.0


@dataclass(frozen=True)
class ProvideLimits:
    """The provider's share of the settings table; times in seconds."""

    requests_max: int
    uploads_ahead_max: int
    progress_interval_seconds: float
    ready_batch_seconds: float


class _Item(NamedTuple):
    """One object that a job is owed: a chunk's index, its name, and where its bytes are."""

    place: int
    sha1: str
    source: tuple[str, int, int]  # file, start, end
    check: bool


@dataclass
class _Job:
    """What one request is still owed. ``lookups`` are those under way; only a ``Want`` has no more than them."""

    request: str
    touched_at: float
    progress_at: float
    ready_at: float = float("-inf")
    pending: deque[_Item] = field(default_factory=deque)
    under_way: dict[str, list[_Item]] = field(default_factory=dict)
    owed: set[int] = field(default_factory=set)
    ready: list[int] = field(default_factory=list)
    bytes: int = 0
    lookups: list[LookUp] = field(default_factory=list)
    file_key: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be done for it."""
        return not (self.owed or self.ready or self.lookups)


class FileProvider:
    """Serves one channel. ``node_id`` is this node's own id."""

    def __init__(self, node_id: str, limits: ProvideLimits) -> None:
        self._node_id = node_id
        self._limits = limits
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._questions: dict[str, _Job] = {}
        self._uploads: dict[str, tuple[str, int, int]] = {}
        self._recent: OrderedDict[str, tuple[float, set[str]]] = OrderedDict()  # when, and which requests were told
        self._effects: list[Effect] = []

    @property
    def load(self) -> int:
        """Objects that are queued or under way."""
        return len(self._uploads) + sum(len(job.pending) for job in self._jobs.values())

    @property
    def deadline(self) -> float | None:
        """When a ``Tick`` is due, or None."""
        jobs = [job for job in self._all_jobs() if job.file_key is None]
        times = [job.progress_at + self._limits.progress_interval_seconds for job in jobs]
        times += [job.ready_at + self._limits.ready_batch_seconds for job in jobs if job.ready]
        times += [job.touched_at + _JOB_AGE_SECONDS_MAX for job in self._all_jobs() if job.file_key is not None]
        return min(times, default=None)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` (seconds, monotonic) and return what to do."""
        if isinstance(event, Asked):
            self._on_asked(event, now)
        elif isinstance(event, LookedUp):
            self._on_looked_up(event, now)
        elif isinstance(event, Uploaded):
            self._on_uploaded(event, now)
        elif isinstance(event, BucketMoved):
            self._recent.clear()
        self._start_uploads()
        self._report(now)
        effects, self._effects = self._effects, []
        return effects

    # --- what is asked

    def _on_asked(self, asked: Asked, now: float) -> None:
        body = asked.body
        if isinstance(body, RequestFile2022):
            self._on_request_2022(asked, body, now)
            return
        key = _key(asked.sender, body.request)
        if isinstance(body, Cancel):
            self._jobs.pop(key, None)
            self._questions.pop(key, None)
        elif isinstance(body, Want):
            self._look_up(self._questions, key, LookUp(body.sha1, body.manifest, asked), now)
        elif body.provider == self._node_id:
            if self._full(key):
                self._say_busy(body.request)
            else:
                self._look_up(self._jobs, key, LookUp(body.sha1, body.manifest, asked), now)

    def _on_request_2022(self, asked: Asked, body: RequestFile2022, now: float) -> None:
        sha1 = body.file_key.get("sha1")
        chunk_of = body.file_key.get("chunkOf")
        if isinstance(chunk_of, dict):
            whole = chunk_of.get("fileKey")
            sha1 = whole.get("sha1") if isinstance(whole, dict) else None
        if isinstance(sha1, str) and is_sha1(sha1) and is_sha1(body.file_key.get("sha1")):
            self._look_up(self._questions, _key_2022(asked.sender, body), LookUp(sha1, None, asked), now)

    def _look_up(self, jobs: dict[str, _Job], key: str, query: LookUp, now: float) -> None:
        job = jobs.get(key)
        if job is None:
            if len(jobs) >= _LOOKUPS_MAX:
                return
            job = jobs[key] = _Job(getattr(query.asked.body, "request", ""), now, now)
            if isinstance(query.asked.body, RequestFile2022):
                job.file_key = query.asked.body.file_key
        elif isinstance(query.asked.body, (Want, RequestFile2022)) or len(job.lookups) >= _LOOKUPS_MAX:
            return  # it is being looked up already
        job.touched_at = now
        job.lookups.append(query)
        self._effects.append(query)

    def _on_looked_up(self, found: LookedUp, now: float) -> None:
        asked = found.query.asked
        body = asked.body
        jobs = self._jobs if isinstance(body, Assign) else self._questions
        key = _key_2022(asked.sender, body) if isinstance(body, RequestFile2022) else _key(asked.sender, body.request)
        job = jobs.get(key)
        if job is None or found.query not in job.lookups:
            return  # cancelled meanwhile
        job.lookups.remove(found.query)
        job.touched_at = now
        if not isinstance(body, Assign):
            del self._questions[key]
        if isinstance(body, RequestFile2022):
            if found.reason is None:
                self._begin_2022(key, body, found, now)
        elif found.reason is None and isinstance(body, Want):
            self._offer(asked.sender, body, found)
        elif found.reason is None and isinstance(body, Assign):
            self._begin(key, job, body, found, now)
        elif found.reason is not None and isinstance(body, Assign):
            self._give_up(key, job, found.reason, found.detail)
        elif found.reason is not None and found.reason != "unknown":
            self._say(Failed, request=body.request, reason=found.reason, detail=found.detail)

    def _offer(self, sender: str, want: Want, found: LookedUp) -> None:
        if self._full(_key(sender, want.request)):
            self._say_busy(want.request)
            return
        self._say(Offer, request=want.request, sha1=want.sha1, size=found.size, manifest=found.manifest_sha1,
                  load=self.load)

    def _begin(self, key: str, job: _Job, assign: Assign, found: LookedUp, now: float) -> None:
        manifest = found.manifest
        if assign.manifest != found.manifest_sha1:
            self._give_up(key, job, "unknown", "it does not have that manifest")
            return
        if assign.send_manifest and manifest is not None and found.manifest_sha1 is not None:
            data = manifest.encode()
            if hashlib.sha1(data, usedforsecurity=False).hexdigest() != found.manifest_sha1:
                self._give_up(key, job, "unknown", "its manifest is not in the usual form, and cannot be sent")
                return
            self._owe(key, job, _Item(_MANIFEST, found.manifest_sha1, (found.manifest_sha1, 0, len(data)), False), now)
        chunks = manifest.chunks if manifest is not None else (Chunk(0, found.size, assign.sha1),)
        indices = expand(assign.chunks, len(chunks))
        if len(job.owed) + len(indices) > _OWED_MAX:
            self._give_up(key, job, "busy", f"{len(indices)} chunks were asked for at once; {_OWED_MAX} are possible")
            return
        for index in indices:
            chunk = chunks[index]
            self._owe(key, job, _Item(index, chunk.sha1, (assign.sha1, chunk.start, chunk.end), False), now)

    def _begin_2022(self, key: str, body: RequestFile2022, found: LookedUp, now: float) -> None:
        start, end = 0, found.size
        chunk_of = body.file_key.get("chunkOf")
        if isinstance(chunk_of, dict):
            start, end = chunk_of.get("startByte"), chunk_of.get("endByte")  # type: ignore[assignment]
        if type(start) is not int or type(end) is not int or not (0 <= start <= end <= found.size):
            return
        if end - start > CHUNK_SIZE_BYTES_MAX or key in self._jobs or self._full(key):
            return
        job = self._jobs[key] = _Job("", now, now, file_key=body.file_key)
        self._say(UploadFileStatus2022, file_key=body.file_key, status="started")
        job.owed.add(0)
        job.pending.append(_Item(0, body.file_key["sha1"], (found.query.sha1, start, end), True))

    def _owe(self, key: str, job: _Job, item: _Item, now: float) -> None:
        """Queue an object. One that this request was told of before has vanished or was damaged: it is checked."""
        if item.place in job.owed or item.place in job.ready:
            return
        uploaded_at, told = self._recent.get(item.sha1, (float("-inf"), ()))
        if key not in told and now < uploaded_at + _FRESH_SECONDS:
            self._recent[item.sha1][1].add(key)
            job.ready.append(item.place)
            return
        job.owed.add(item.place)
        job.pending.append(item._replace(check=key in told))

    # --- uploads

    def _start_uploads(self) -> None:
        """Give each request its turn: one object, then it goes to the end of the line."""
        waiting = [key for key, job in self._jobs.items() if job.pending]
        while waiting and len(self._uploads) < self._limits.uploads_ahead_max:
            still_waiting = []
            for key in waiting:
                if len(self._uploads) >= self._limits.uploads_ahead_max:
                    break
                job = self._jobs[key]
                item = job.pending.popleft()
                self._jobs.move_to_end(key)
                job.under_way.setdefault(item.sha1, []).append(item)
                if item.sha1 not in self._uploads:
                    self._uploads[item.sha1] = item.source
                    self._effects.append(Upload(item.sha1, *item.source, item.check))
                if job.pending:
                    still_waiting.append(key)
            waiting = still_waiting

    def _on_uploaded(self, event: Uploaded, now: float) -> None:
        source = self._uploads.pop(event.sha1, None)
        if source is None:
            return
        if event.reason is None:
            told = {key for key, job in self._jobs.items() if event.sha1 in job.under_way}
            self._recent[event.sha1] = now, told | self._recent.get(event.sha1, (now, set()))[1]
            self._recent.move_to_end(event.sha1)
            if len(self._recent) > _RECENT_UPLOADS_MAX:
                self._recent.popitem(last=False)
        for key, job in list(self._jobs.items()):
            items = job.under_way.pop(event.sha1, ())
            if event.reason is None:
                job.bytes += sum(item.source[2] - item.source[1] for item in items)
                job.ready.extend(item.place for item in items)
                job.owed.difference_update(item.place for item in items)
            elif any(item.source == source for item in items):
                self._give_up(key, job, event.reason, event.detail)
            else:  # a name that came from outside did not fit those bytes; this job has others for it
                job.pending.extendleft(items)
            if items:
                job.touched_at = now

    def _give_up(self, key: str, job: _Job, reason: str, detail: str) -> None:
        """Say what is ready, then why the rest will not come. The 2022 messages have no word for the latter."""
        self._jobs.pop(key, None)
        if job.file_key is None:
            if job.ready:
                self._say_ready(job)
            self._say(Failed, request=job.request, reason=reason, detail=detail)

    # --- reports

    def _report(self, now: float) -> None:
        interval = self._limits.progress_interval_seconds
        for key, job in list(self._jobs.items()):
            if now >= job.touched_at + _JOB_AGE_SECONDS_MAX:
                self._give_up(key, job, "disk-error", "its look-up or upload never came to an end")
            elif job.file_key is not None:
                if not job.owed:
                    self._say(UploadFileStatus2022, file_key=job.file_key, status="finished")
                    del self._jobs[key]
            elif job.ready and (not job.owed or now >= job.ready_at + self._limits.ready_batch_seconds):
                self._say_ready(job)
                job.ready_at = now
        for jobs in (self._jobs, self._questions):
            for key, job in list(jobs.items()):
                if job.file_key is None and job.is_over:
                    del jobs[key]
                elif job.file_key is None and now >= job.progress_at + interval:
                    self._say(Progress, request=job.request, bytes=job.bytes, queued=len(job.owed))
                    job.progress_at = now
                if jobs is self._questions and now >= job.touched_at + _JOB_AGE_SECONDS_MAX:
                    jobs.pop(key, None)

    def _say_ready(self, job: _Job) -> None:
        chunks = compress([index for index in job.ready if index != _MANIFEST])
        self._say(Ready, request=job.request, chunks=chunks, manifest_ready=_MANIFEST in job.ready)
        job.ready = []

    def _say_busy(self, request: str) -> None:
        self._say(Failed, request=request, reason="busy", detail=f"it serves {len(self._jobs)} requests")

    def _say(self, kind: Any, **fields: Any) -> None:
        self._effects.append(Said(kind, fields))

    def _full(self, key: str) -> bool:
        return key not in self._jobs and len(self._jobs) >= self._limits.requests_max

    def _all_jobs(self) -> list[_Job]:
        return [*self._jobs.values(), *self._questions.values()]


def _key(sender: str, request: str) -> str:
    return f"{sender}:{request}"


def _key_2022(sender: str, body: RequestFile2022) -> str:
    return f"{sender}:2022:{object_sha1(body.file_key)}"
