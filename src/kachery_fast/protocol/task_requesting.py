"""The asking side of tasks: how a node gets one task done by another node of a channel.

A pure state machine. ``TaskRequester.handle(event, now)`` takes what happened and returns what to do; the caller
performs the effects and feeds their outcome back as events. It also hands in a ``Tick`` when ``deadline`` has passed.

    CACHE     a pure calculation: perhaps the bucket has the result
    ASK       nobody has it: ask the channel, in rounds
    FOLLOW    somebody has it; who falls silent is looked up at the hub
    FETCH     a calculation or query is said to have finished: get its result from the bucket
    CONFIRM   an action is said to have ended, or nobody takes it: what does the hub know?
    FALLBACK  nobody runs the query: perhaps the bucket has an earlier result
    ENDED

What is said on the bands saves time, and is believed no further: a calculation or query has finished when its signed
result is in the bucket, an action when its receipt says so, or the hub. A task is asked for again only when the hub
knows of nobody who runs it, and the hub lets no action start twice, so that asking again is always safe.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import InvalidArgument, KacheryError
from .hub_bodies import TaskClaim
from .inquiry import harmless
from .task_account import TaskAccount
from .task_bodies import TaskDeclined, TaskStatus
from .task_request_events import (
    Ask,
    BandRestored,
    Cancel,
    Effect,
    Event,
    Find,
    Found,
    Heard,
    Look,
    Looked,
    ProvidersChanged,
    SayFailed,
    TaskRequestLimits,
    Withdraw,
)
from .task_rounds import TaskRounds, pause_seconds
from .task_view import Phase, TaskView, is_other, of_claim, of_failure, of_receipt, of_result, read_receipt
from .task_words import TaskWords

__all__ = ["TaskRequester"]

# How often a result that is said to be there is looked for.
_LOOKS_MAX = 3
_PERMISSION_EXIT_CODE = 4
_PASSING_EXIT_CODES = (5, 8)  # unreachable, timed out


class TaskRequester:
    """The request for one task on one channel.

    :param request_id: the id under which the nodes know this request. :param kwargs_sha1: of the canonical arguments.
    :param asked_ms: the present, in milliseconds since the epoch: a query that finished later is this one's answer.
    :param last_heard: when each node was last heard of, about any task; kept by the caller.
    """

    def __init__(self, *, channel: str, task: str, function: str, kind: str, kwargs_sha1: str, request_id: str,
                 asked_ms: int, limits: TaskRequestLimits, last_heard: Mapping[str, float]) -> None:
        self.channel, self.task, self.function, self.kind = channel, task, function, kind
        self.request_id, self._kwargs_sha1 = request_id, kwargs_sha1
        self.account = TaskAccount(function, task, channel)
        self.phase = Phase.CACHE
        self.view = TaskView()
        self.revision = 1
        self._asked_ms = asked_ms
        self._limits = limits
        self._rounds = TaskRounds(limits, self.account)
        self._effects: list[Effect] = []
        self._words = TaskWords(limits.provider_silence_seconds, last_heard)
        self._looking = self._finding = False
        self._due_at: float | None = None  # when to look or to ask the hub; None: that is under way
        self._alive_at = 0.0  # when somebody last was known to have it
        self._looks = self._finds = 0
        self._taken = False  # somebody has had it
        self._failed = False  # it has run and failed, and nobody has said how
        self._giving_up = ""  # why
        self._failure: KacheryError | None = None

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.phase is Phase.ENDED

    @property
    def deadline(self) -> float | None:
        """When a ``Tick`` is due, or None."""
        return self._rounds.deadline if self.phase is Phase.ASK else self._due_at

    def start(self, providers: dict[str, str], self_may: bool, now: float) -> list[Effect]:
        """Begin, at the time ``now`` (seconds, monotonic). ``providers``, ``self_may``: as in ``ProvidersChanged``."""
        self.account.providers, self.account.self_may = dict(providers), self_may
        self._alive_at = now
        if self.kind == "pure-calculation":
            self._look(fresh=False)
        else:
            self._ask_from(now)
        return self._leave(now)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` and return what to do."""
        if self.ended:
            return []
        if isinstance(event, Heard):
            if isinstance(event.body, TaskDeclined):
                self._on_declined(event.body, event.sender, now)
            else:
                self._on_status(event.body, event.sender, now)
        elif isinstance(event, Looked):
            self._looking = False
            self._on_looked(event, now)
        elif isinstance(event, Found):
            self._finding = False
            self._on_found(event, now)
        elif isinstance(event, SayFailed):
            self._on_say_failed(event.error)
        elif isinstance(event, ProvidersChanged):
            self.account.providers, self.account.self_may = dict(event.providers), event.self_may
        elif isinstance(event, BandRestored):
            if self.phase is Phase.ASK:
                self._rounds.interrupted(now)
            elif self.phase is Phase.FOLLOW:
                self._effects.append(Ask())
        elif isinstance(event, Cancel):
            self._effects += [Withdraw()] if self.account.rounds else []
            self._end(TaskView("cancelled"))
        return self._leave(now)

    def _leave(self, now: float) -> list[Effect]:
        """Do what is due by now, bring the view up to date, and hand out the effects."""
        if self.phase is Phase.ASK:
            self._ask(now)
        elif self._due_at is not None and now >= self._due_at:
            self._due_at = None
            if self.phase is Phase.FETCH:
                self._look(fresh=True)
            elif now < self._words.quiet_at(now) and self.phase is Phase.FOLLOW:
                self._due_at = self._words.quiet_at(now)
            elif self.phase in (Phase.FOLLOW, Phase.CONFIRM):
                self._find()
        if not self.ended:
            self._show(self._present())
        effects, self._effects = self._effects, []
        return effects

    # --- asking

    def _ask_from(self, at: float) -> None:
        """Nobody has it, as far as is known: ask from the time ``at`` on."""
        self.phase, self._due_at = Phase.ASK, None
        self._words.clear()
        self._rounds.begin(at)

    def _ask_again(self, why: str, now: float) -> None:
        """Whoever had it has it no more."""
        at = self._rounds.again_at(now, ran=self.view.status == "running")
        if at is None:
            self._give_up(why)
        else:
            self._ask_from(at)

    def _ask(self, now: float) -> None:
        if self.account.nobody:
            self._give_up("no node there may provide tasks")
        elif self._rounds.due(now):
            self._effects.append(Ask())
        elif why := self._rounds.over(now, self._alive_at, taken=self._taken):
            self._give_up(why)

    def _on_say_failed(self, error: KacheryError) -> None:
        if self.phase is not Phase.ASK:
            return
        if error.exit_code not in _PASSING_EXIT_CODES:
            self._fail(error)
        else:
            self._failure = error
            self._give_up(error.message)

    def _give_up(self, why: str) -> None:
        """Nobody takes it. Of a query there may be an earlier result; of an action the hub may know the end."""
        self._giving_up, self._due_at = why, None
        self._words.clear()
        if self.kind == "query":
            self.phase = Phase.FALLBACK
            self._look(fresh=True)
        elif self.kind == "action":
            self.phase = Phase.CONFIRM
            self._find()
        else:
            self._not_taken()

    def _not_taken(self) -> None:
        self._effects += [Withdraw()] if self.account.rounds else []
        if self._failure is not None:
            self._fail(self._failure)
        elif self._failed:
            self._end(of_failure(self.function, "", {"message": "what it raised was not heard"}, None,
                                 **self.account.details()))
        else:
            self._fail(self.account.not_taken(self._giving_up))

    # --- what is heard

    def _on_declined(self, body: TaskDeclined, sender: str, now: float) -> None:
        if body.request != self.request_id:
            return
        reason = body.reason if body.reason in TaskDeclined.REASONS else "busy"
        self.account.note(sender, f"declines, {reason}" + (f": {body.detail}" if body.detail else ""))
        self.account.declined[sender] = reason
        if self._words.lost_last(sender) and self.phase is Phase.FOLLOW:
            self._ask_again(f"{self.account.label(sender)} gave it back", now)

    def _on_status(self, body: TaskStatus, sender: str, now: float) -> None:
        if self.account.rounds == 0:
            return  # said to somebody else, perhaps about an earlier run
        self.account.note(sender, f"says {body.status}" + (f": {body.text}" if body.text else ""))
        if body.status in ("queued", "running"):
            self._on_alive(body, sender, now)
        elif self.kind == "action":
            self._on_action_ended(body, sender, now)
        elif body.status == "finished":
            if self.phase is not Phase.FETCH:
                self._fetch(now)
        elif body.status == "error":
            self._end(of_failure(self.function, sender, body.error or {}, None, **self.account.details()))
        elif self._words.lost_last(sender) and self.phase is Phase.FOLLOW:
            self._ask_again(f"{self.account.label(sender)} has lost it", now)

    def _on_alive(self, body: TaskStatus, sender: str, now: float) -> None:
        self.account.declined.pop(sender, None)
        self._words.note(sender, body, now)
        self._alive(now)
        if self.phase is not Phase.FETCH:
            self._follow(self._words.quiet_at(now))

    def _on_action_ended(self, body: TaskStatus, sender: str, now: float) -> None:
        """The receipt of the sender itself tells how; else the hub is asked."""
        if body.status in ("finished", "error"):
            receipt = read_receipt(body.receipt, self.function, self.channel, self.task, self._kwargs_sha1)
            if receipt is not None and receipt.node_id == sender:
                self._end(of_receipt(receipt, **self.account.details()))
                return
        if self.phase is not Phase.CONFIRM:
            self.phase, self._due_at = Phase.CONFIRM, None
            self._alive(now)
            self._find()

    def _alive(self, now: float) -> None:
        self._taken, self._alive_at = True, now
        self._giving_up, self._failure = "", None

    def _follow(self, find_at: float) -> None:
        self.phase = Phase.FOLLOW
        self._due_at = None if self._finding else find_at

    # --- what the bucket has

    def _fetch(self, now: float) -> None:
        self._alive(now)
        self.phase, self._looks, self._due_at = Phase.FETCH, 0, None
        self._look(fresh=True)

    def _look(self, *, fresh: bool) -> None:
        if not self._looking:
            self._looking = True
            self._effects.append(Look(fresh))

    def _on_looked(self, event: Looked, now: float) -> None:
        if self.phase not in (Phase.CACHE, Phase.FETCH, Phase.FALLBACK):
            return  # somebody has turned up meanwhile
        found = event.result
        # In place of the result of a query there may be that of a later one, as good, or that of an earlier one.
        another = found if found is not None and self.kind == "query" and found.task != self.task else None
        earlier = another is not None and another.finished_ms < self._asked_ms
        if found is not None and not (earlier and self.phase is Phase.FETCH):
            fallback = self.phase is Phase.FALLBACK and another is not None
            self._end(of_result(found, cached=fallback or self.phase is Phase.CACHE))
            return
        self.account.bucket = event.why if event.error is None else event.error.message
        self.account.bucket = "an earlier result" if earlier else self.account.bucket
        if self.phase is Phase.FALLBACK:
            self._not_taken()
        elif self.phase is Phase.FETCH:
            self._look_again(event.error, now)
        elif event.error is not None:
            self._fail(event.error)
        else:
            self._alive_at = now
            self._ask_from(now)

    def _look_again(self, error: KacheryError | None, now: float) -> None:
        self._looks += 1
        patient = error is not None and now <= self._alive_at + self._limits.patience_seconds
        if error is not None and not (patient and error.exit_code in _PASSING_EXIT_CODES):
            self._fail(error)
        elif error is None and self._looks >= _LOOKS_MAX:
            self._ask_again("it is said to be finished, and its result is not in the bucket", now)
        else:
            self._due_at = now + pause_seconds(self._limits, self._looks)

    # --- what the hub knows

    def _find(self) -> None:
        if not self._finding:
            self._finding = True
            self._effects.append(Find())

    def _on_found(self, event: Found, now: float) -> None:
        if self.phase not in (Phase.FOLLOW, Phase.CONFIRM):
            return
        if event.claim is None:
            self._on_hub_trouble(event.error, now)
            return
        claim = event.claim
        label = self.account.label(claim.node_id) if claim.node_id else ""
        self.account.hub = f"{claim.state}, by {label}" if label else claim.state
        self._words.forget_silent(now)
        if is_other(claim, self.function, self.kind, self._kwargs_sha1):
            self._fail(InvalidArgument(what=f"The id {self.task} is that of another task: the {claim.kind} "
                                            f"{harmless(claim.function)!r} with its arguments. Leave the id out."))
        elif claim.state == "claimed":
            self._on_claimed(now)
        elif self.kind == "action" and claim.state in ("finished", "failed", "unknown"):
            self._end_by_claim(claim, label)
        elif claim.state == "finished":
            self._fetch(now)
        elif self.phase is Phase.FOLLOW and self._words:
            self._follow(now + self._limits.provider_silence_seconds)  # it waits for its turn there
        elif self._giving_up:
            self._not_taken()
        else:
            self._failed = self._failed or claim.state == "failed"
            self._ask_again("who had it has lost it", now)

    def _on_claimed(self, now: float) -> None:
        """Somebody holds it: look again, soon when its end was told already, and have it speak if it does not."""
        self._finds = self._finds + 1 if self.phase is Phase.CONFIRM else 0
        pause = pause_seconds(self._limits, self._finds) if self._finds else self._limits.provider_silence_seconds
        self._alive(now)
        self._follow(now + pause)
        self._effects += [] if self._words else [Ask()]

    def _on_hub_trouble(self, error: KacheryError | None, now: float) -> None:
        self.account.hub = reason = "no answer" if error is None else error.message
        if error is not None and error.exit_code == _PERMISSION_EXIT_CODE:
            self._fail(error)
        elif not self._giving_up and now <= self._alive_at + self._limits.patience_seconds:
            self._finds += 1
            self._due_at = now + pause_seconds(self._limits, self._finds)
        else:
            asked = self._failure is None and self.account.rounds > 0
            self._giving_up = f"{self._giving_up or 'who had it fell silent'}, and the hub could not be asked: {reason}"
            if asked and self.kind == "action":
                self._unknown(self._giving_up)
            else:
                self._not_taken()

    # --- the end

    def _end_by_claim(self, claim: TaskClaim, label: str) -> None:
        view = of_claim(claim, self.function, self.account.details(), self._kwargs_sha1)
        if view is not None:
            self._end(view)
        else:
            self._unknown(f"{label} began it, and has not told how it ended", claim.node_id)

    def _unknown(self, why: str, node_id: str = "") -> None:
        self._end(TaskView("unknown", node=node_id or self.view.node, error=self.account.outcome_unknown(why)))

    def _fail(self, error: KacheryError) -> None:
        self._end(TaskView("error", node=self.view.node, error=error))

    def _end(self, view: TaskView) -> None:
        self.phase, self._due_at = Phase.ENDED, None
        self._words.clear()
        self._show(view)

    # --- what there is to see

    def _present(self) -> TaskView:
        if (said := self._words.view()) is not None:
            return said
        if self.phase in (Phase.FETCH, Phase.CONFIRM, Phase.FOLLOW) and self._taken:
            return TaskView("running", self.view.progress, self.view.text, self.view.node)
        text = "looking into the bucket" if self.phase in (Phase.CACHE, Phase.FALLBACK) else "asking who can run it"
        return TaskView("waiting", text=text)

    def _show(self, view: TaskView) -> None:
        if view != self.view:
            self.view = view
            self.revision += 1
