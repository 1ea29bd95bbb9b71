"""What a provider of tasks keeps in its head: each task, who of the backends could run it, and whose turn it is."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import InvalidArgument
from .task_bodies import TaskRequest
from .task_errors import CRASHED, HUNG, error_report
from .task_events import BackendInfo, FunctionInfo, Report
from .tasks import canonical_kwargs, check_kwargs, check_task_id, task_id

__all__ = ["Job", "Refusal", "TaskProvideLimits", "TurnQueue", "Workers", "admit", "error_of", "is_same"]

_KNOWN_IDS_MAX = 50
_WAITING_SIZE_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True)
class TaskProvideLimits:
    """The provider's share of the settings table. ``keep_seconds``: how often the hub hears that a task still runs."""

    requests_max: int
    kwargs_size_bytes_max: int
    progress_interval_seconds: float
    keep_seconds: float


class Refusal(NamedTuple):
    """Why a task is not taken: the fields of ``TaskDeclined``."""

    reason: str
    detail: str


def admit(body: TaskRequest, functions: dict[str, set[str]], limits: TaskProvideLimits, waiting: int,
          waiting_size_bytes: int) -> bytes | Refusal:
    """Return the arguments as canonical JSON, or why the task is not taken.

    :param functions: what can be run: id -> the kinds that it is registered as.
    :param waiting: how many tasks there are already; :param waiting_size_bytes: how long their arguments are together.
    """
    kinds = functions.get(body.function)
    if kinds is None:
        known = sorted(functions)
        more = f" and {len(known) - _KNOWN_IDS_MAX} more" if len(known) > _KNOWN_IDS_MAX else ""
        return Refusal("unregistered", f"it runs {', '.join(known[:_KNOWN_IDS_MAX]) or 'nothing'}{more}")
    if body.kind not in kinds:
        return Refusal("wrong-type", f"here it is of the type {' or '.join(sorted(kinds))}, not {body.kind}")
    try:
        data = check_kwargs(body.kwargs, limits.kwargs_size_bytes_max)
        check_task_id(body.kind, body.task)
    except InvalidArgument as error:
        return Refusal("bad-arguments", error.message)
    if body.kind == "pure-calculation" and task_id(body.function, data) != body.task:
        return Refusal("bad-arguments", "the id of the task is not that of its function and arguments")
    if waiting >= limits.requests_max or waiting_size_bytes + len(data) > _WAITING_SIZE_BYTES_MAX:
        return Refusal("busy", f"{waiting} tasks wait here already")
    return data


@dataclass(eq=False)
class Job:
    """One task. ``stage`` is ``queued``, ``claiming``, ``checking``, ``noting``, ``running``, ``ending`` or ``gone``;
    ``backend`` is the one that has a worker set aside for it; ``waiters`` are (sender, request); ``kwargs_json`` is of
    ``tasks.check_kwargs``."""

    place: str
    task: str
    function: str
    kind: str
    kwargs_json: bytes
    stage: str = "queued"
    waiters: set[tuple[str, str]] = field(default_factory=set)
    backend: str | None = None
    run: str = ""
    idempotent: bool = False
    cancelled: bool = False
    returns: int = 0
    said_at: float = 0.0
    progress: float | None = None
    text: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What it is called here: its place and its id."""
        return self.place, self.task

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments as the function receives them."""
        return canonical_kwargs(self.kwargs_json)

    @property
    def held(self) -> bool:
        """Whether the claim at the hub is this node's."""
        return self.stage in ("checking", "noting", "running", "ending")


def is_same(job: Job, body: TaskRequest, kwargs_size_bytes_max: int) -> bool:
    """Whether a request is for this task: its id may have been taken for another one."""
    if (job.function, job.kind) != (body.function, body.kind):
        return False
    if body.kind == "pure-calculation":
        return True  # function and arguments are in its id
    try:
        return check_kwargs(body.kwargs, kwargs_size_bytes_max) == job.kwargs_json
    except InvalidArgument:
        return False


def error_of(report: Report) -> dict[str, str] | None:
    """Return what is told of a run that failed; None of one that finished."""
    if report.status == "finished":
        return None
    told = report.error or {}
    kind = {"hung": HUNG, "crashed": CRASHED}.get(report.status, str(told.get("type") or "Exception"))
    return error_report(kind, str(told.get("message", "")), str(told.get("traceback", "")))


class Workers:
    """The backends that are connected, and how many workers of each are set aside."""

    def __init__(self) -> None:
        self._backends: dict[str, BackendInfo] = {}
        self._busy: Counter[str] = Counter()

    @property
    def any_free(self) -> bool:
        """Whether any backend has a worker left."""
        return any(self._busy[backend.id] < backend.workers for backend in self._backends.values())

    def add(self, backend: BackendInfo) -> None:
        """Take a backend on."""
        self._backends[backend.id] = backend

    def remove(self, backend: str) -> bool:
        """Forget a backend; False when it is not known."""
        self._busy.pop(backend, None)
        return self._backends.pop(backend, None) is not None

    def take(self, job: Job, backend: str) -> None:
        """Set a worker aside for a task."""
        job.backend = backend
        self._busy[backend] += 1

    def free(self, job: Job) -> None:
        """Give back the worker of a task, if it has one."""
        if job.backend in self._backends:
            self._busy[job.backend] -= 1
        job.backend = None

    def functions(self, place: str) -> dict[str, set[str]] | None:
        """Return the ids that the backends of a place know, with the kinds they are known as; None without a
        backend."""
        serving = [backend for backend in self._backends.values() if backend.serves(place)]
        if not serving:
            return None
        functions: dict[str, set[str]] = {}
        for backend in serving:
            for function in backend.functions.values():
                functions.setdefault(function.id, set()).add(function.kind)
        return functions

    def find(self, job: Job) -> tuple[BackendInfo, FunctionInfo, int] | None:
        """Return the backend for a task that has most workers left, what it knows of the function, and how many."""
        best: tuple[BackendInfo, FunctionInfo, int] | None = None
        for backend in self._backends.values():
            function = backend.functions.get(job.function)
            left = backend.workers - self._busy[backend.id]
            if (function is not None and function.kind == job.kind and backend.serves(job.place)
                    and (best is None or left > best[2])):
                best = backend, function, left
        return best


class TurnQueue:
    """Tasks that wait for a worker. Requesters and functions take turns, task by task."""

    def __init__(self) -> None:
        self._queues: OrderedDict[tuple[str, str, str], deque[Job]] = OrderedDict()  # place, function, sender

    def put(self, job: Job) -> None:
        """Put a task at the end of its requester's line. It leaves its place when its stage is no more ``queued``."""
        sender = min(job.waiters)[0] if job.waiters else ""
        self._queues.setdefault((job.place, job.function, sender), deque()).append(job)

    def first(self) -> Iterator[Job]:
        """Yield the first of each line. A line whose first is taken meanwhile (its stage changed) goes to the end."""
        for turn in list(self._queues):
            queue = self._queues[turn]
            while queue and queue[0].stage != "queued":
                queue.popleft()  # it was withdrawn
            if not queue:
                del self._queues[turn]
                continue
            yield queue[0]
            if queue[0].stage != "queued":
                queue.popleft()
                self._queues.move_to_end(turn)
