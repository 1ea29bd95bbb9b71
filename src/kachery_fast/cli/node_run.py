"""``node run`` and ``node key``: a node for the time of one command, and the key of one that comes again."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import InvalidArgument
from .output import command_errors, emit, json_option

__all__ = ["key", "run"]

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command(short_help="Run a command with a node of its own, which ends with it.",
               context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] [COMMAND]...")
@click.option("--join", "link", metavar="LINK", help="Join a channel by this invitation.")
@click.option("--hub", metavar="URL", help="In place of an invitation, a hub where the node of "
                                           "KACHERY_NODE_PRIVATE_KEY is a member already.")
@click.option("--label", help="The node's name for people. [default: the host's name]")
@click.option("--channel", help="The channel to ask on where COMMAND names none. [default: the only one]")
@click.option("--dir", "directory", type=click.Path(path_type=Path),
              help="Where its storage directory is made, and removed. [default: the system's place]")
@click.option("--json", "as_json", is_flag=True, help="Print an error of node run itself as JSON, too.")
@command_errors
def run(command: tuple[str, ...], link: str | None, hub: str | None, label: str | None, channel: str | None,
        directory: Path | None, as_json: bool) -> int:
    """Run a command with a node of its own, which ends with it: for CI, and wherever nothing is to be left behind.

    The node's storage directory is a temporary one, and its key is never on the disk. The exit code is COMMAND's. A
    node leaves its channel at the end, unless its identity comes from KACHERY_NODE_PRIVATE_KEY. If the hub is away
    then, it is said how the channel's owner removes the node. With neither --join nor --hub the node is on no
    channel; with a key, one of them has to be named.
    """
    if not command:
        raise InvalidArgument(what="There is no command to run. Write it after two dashes: "
                                   "kachery-fast node run --join LINK -- python script.py")
    from ..client.ephemeral import ephemeral_node

    with _Signals() as signals:
        with ephemeral_node(link, hub=hub, channel=channel, label=label, directory=directory):
            code = signals.run(command)
        return code if code >= 0 else 128 - code  # as a shell tells of a signal


class _Signals:
    """The signals that end this program: before and after the command they do so as Ctrl-C does, during it they are the
    command's.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_running = False
        self._early: list[int] = []
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for number in _FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup, for one
                self._former[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """Run the command, hand signals on to it, and return its exit code, negative for a signal.

        :raises InvalidArgument: it cannot be run.
        """
        self._is_running = True
        try:
            self._process = subprocess.Popen(command)  # noqa: S603 - what the user says
            for number in self._early:
                self._forward(number)
            return self._process.wait()
        except OSError as error:
            raise InvalidArgument(
                what=f"The command {command[0]!r} cannot be run: {error.strerror or error}.") from None
        finally:
            self._is_running = False

    def _heard(self, number: int, frame: Any) -> None:
        if not self._is_running:
            raise KeyboardInterrupt
        if self._process is None:
            self._early.append(number)
        elif not (number == signal.SIGINT and _terminal_tells_all()):
            self._forward(number)

    def _forward(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)  # not reaped yet, so the id is still its own


def _terminal_tells_all() -> bool:
    """Whether Ctrl-C on the terminal reaches this program's children too, so that they need not be told."""
    for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return os.tcgetpgrp(stream.fileno()) == os.getpgrp()  # type: ignore[union-attr]
    return False


@click.command(short_help="Make a key for KACHERY_NODE_PRIVATE_KEY.")
@json_option
@command_errors
def key(as_json: bool) -> None:
    """Make a new random key for KACHERY_NODE_PRIVATE_KEY, and show it with the id of its node.

    Nothing is written. Keep the key as a secret of the CI; the id may be known to all.
    """
    from ..protocol.signing import private_key, public_id

    seed = secrets.token_bytes(32)
    node_id = public_id(private_key(seed))
    emit({"privateKey": seed.hex(), "nodeId": node_id},
         f"KACHERY_NODE_PRIVATE_KEY={seed.hex()}\nnode id: {node_id}", as_json)
