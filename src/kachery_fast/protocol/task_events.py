"""What can happen to a provider of tasks, and what it can ask to be done: the vocabularies of ``task_providing``.

``place`` names a channel at a hub; it is opaque here. ``task`` is the id of a task on it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from .hub_bodies import TaskClaim
from .task_bodies import TaskCancel, TaskDeclined, TaskRequest, TaskStatus

__all__ = [
    "Asked", "BackendGone", "BackendInfo", "BackendReady", "CancelRun", "Claim", "Claimed", "Effect", "Event", "Finish",
    "FunctionInfo", "Keep", "LookUp", "LookedUp", "Note", "Noted", "PlaceGone", "Report", "RunFunction", "Said",
    "SignReceipt", "SignedReceipt", "Store", "Stored", "Tick",
]


class FunctionInfo(Struct, frozen=True):
    """A function that a task backend has registered. ``idempotent``: an action that may be started twice."""

    id: str
    kind: str
    idempotent: bool = False


class BackendInfo(Struct, frozen=True):
    """A process that runs functions, ``workers`` at once, for some places (None: for every one)."""

    id: str
    workers: int
    functions: dict[str, FunctionInfo]
    places: frozenset[str] | None = None

    def serves(self, place: str) -> bool:
        """Whether it runs tasks of this place."""
        return self.places is None or place in self.places


# --- events


class BackendReady(Struct, frozen=True):
    """A task backend has registered."""

    backend: BackendInfo


class BackendGone(Struct, frozen=True):
    """The connection of a task backend has ended, and with it whatever it ran."""

    backend: str


class PlaceGone(Struct, frozen=True):
    """This node has left a channel, or may not provide tasks there any more."""

    place: str


class Asked(Struct, frozen=True):
    """A message of a node that may request tasks on this channel."""

    place: str
    body: TaskRequest | TaskCancel
    sender: str


class Claimed(Struct, frozen=True):
    """The answer to ``Claim``: what the hub said, or (None) why it could not be asked."""

    place: str
    task: str
    claim: TaskClaim | None
    why: str = ""


class LookedUp(Struct, frozen=True):
    """The answer to ``LookUp``: whether a good result is in the cache."""

    place: str
    task: str
    found: bool


class Noted(Struct, frozen=True):
    """The answer to ``Note``; ``why`` tells that it could not be noted, and the action must not start."""

    place: str
    task: str
    why: str = ""


class Report(Struct, frozen=True):
    """What a backend says of a run: ``running`` (with ``progress`` from 0 to 1 and a ``text``), or how it ended.

    ``status`` is ``running``, ``finished`` (``result``: ``{"json": …}`` or ``{"file", "format"}``; None of an action),
    ``error``, ``hung``, ``crashed`` (``error``: of ``task_errors.error_report``) or ``cancelled``.
    """

    run: str
    status: str
    progress: float | None = None
    text: str = ""
    error: dict[str, str] | None = None
    result: dict[str, Any] | None = None


class Stored(Struct, frozen=True):
    """The answer to ``Store``: the result is in the bucket, or (``error``) could not be brought there."""

    place: str
    task: str
    error: dict[str, str] | None = None


class SignedReceipt(Struct, frozen=True):
    """The answer to ``SignReceipt``: it is kept on the disk, and on its way to the hub."""

    place: str
    task: str
    receipt: dict[str, Any]


class Tick(Struct, frozen=True):
    """Time has passed."""


Event = (BackendReady | BackendGone | PlaceGone | Asked | Claimed | LookedUp | Noted | Report | Stored | SignedReceipt
         | Tick)


# --- effects


class Claim(Struct, frozen=True):
    """Ask the hub for the right to run this task; answer with ``Claimed``."""

    place: str
    task: str
    kind: str
    function: str
    idempotent: bool


class LookUp(Struct, frozen=True):
    """Look whether the result of this calculation is in the bucket by now; answer with ``LookedUp``."""

    place: str
    task: str


class Note(Struct, frozen=True):
    """Write to the disk that this action starts; answer with ``Noted``."""

    place: str
    task: str


class RunFunction(Struct, frozen=True):
    """Have a backend call a function; it answers with ``Report`` under the name ``run``."""

    backend: str
    run: str
    place: str
    task: str
    function: str
    kind: str
    kwargs: dict[str, Any]


class CancelRun(Struct, frozen=True):
    """Tell a backend that nobody needs a run any more. It still has to report how the run ended."""

    backend: str
    run: str


class Store(Struct, frozen=True):
    """Sign a result and bring it, and the file that it may be, into the bucket; answer with ``Stored``."""

    place: str
    task: str
    run: str
    function: str
    kind: str
    kwargs: dict[str, Any]
    result: dict[str, Any]


class SignReceipt(Struct, frozen=True):
    """Sign the receipt of an action, keep it on the disk, and deliver it to the hub; answer with ``SignedReceipt``."""

    place: str
    task: str
    run: str
    function: str
    kwargs: dict[str, Any]
    error: dict[str, str] | None


class Finish(Struct, frozen=True):
    """Tell the hub that a claimed task has ended: ``finished``, ``failed``, ``unknown`` or ``released``."""

    place: str
    task: str
    kind: str
    state: str


class Keep(Struct, frozen=True):
    """Tell the hub that these tasks still run."""

    place: str
    tasks: list[str]


class Said(Struct, frozen=True):
    """Publish a message on the provideTasks band."""

    place: str
    kind: type[TaskStatus] | type[TaskDeclined]
    fields: dict[str, Any] = msgspec.field(default_factory=dict)


Effect = Claim | LookUp | Note | RunFunction | CancelRun | Store | SignReceipt | Finish | Keep | Said
