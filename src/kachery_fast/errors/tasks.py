"""What goes wrong with tasks."""

from __future__ import annotations

from .tree import KacheryError

__all__ = [
    "ResultRefused", "TaskCrashed", "TaskFailed", "TaskHung", "TaskNotTaken", "TaskOutcomeUnknown", "TaskPending",
    "TaskUnknown",
]


class TaskNotTaken(KacheryError):
    """Nobody on the channel {channel!r} runs {function!r}: {why}. Asked: {asked}."""

    exit_code = 3
    http_status = 404


class TaskUnknown(KacheryError):
    """This node knows no task {task!r}. It forgets the ones that ended after task_keep_seconds."""

    exit_code = 3
    http_status = 404


class TaskFailed(KacheryError):
    """{function!r} raised {type}: {reason}"""

    exit_code = 1
    http_status = 500


class TaskCrashed(TaskFailed):
    """The process that ran {function!r} died: {reason}"""


class TaskHung(TaskFailed):
    """{function!r} hangs: {reason}"""

    exit_code = 8
    http_status = 504


class TaskPending(KacheryError):
    """The task {task!r} ({function!r}) has not ended after {seconds} s; it is {status}. Wait on, or ask again later."""

    exit_code = 8
    http_status = 504


class TaskOutcomeUnknown(KacheryError):
    """Whether the action {function!r} was carried out is not known: {why}. It is never started twice; look at what it
    was to change, and ask for a new action if need be."""

    exit_code = 9
    http_status = 409


class ResultRefused(KacheryError):
    """The result of the task {task!r} in the bucket was refused: {why}."""

    exit_code = 6
    http_status = 502
