"""What all commands share: how results, errors and progress are shown.

Results go to the standard output, one line each or as JSON; everything else to the standard error. An error is one
line there and an exit code by kind (errors.py); with ``--json`` it also is the JSON result. A progress bar is drawn
only on a terminal.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import DiskError, InvalidArgument, KacheryError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..client.progress import Progress, ProgressCallback

__all__ = [
    "command_errors",
    "emit",
    "emit_error",
    "end_of_output",
    "guard_output",
    "human_size",
    "json_line",
    "json_option",
    "progress_bar",
    "quiet_option",
    "show_error",
    "size_of",
]

# What a shell reports for a program ended by SIGINT and by SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
          "TIB": 2**40}

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result, or the error, as JSON.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Show no progress.")


def command_errors(command: Command) -> Command:
    """Wrap a command's function: a KacheryError becomes a line on the standard error and its exit code.

    With the option of ``json_option`` among the command's own, the error is also printed as JSON. Ctrl-C ends with
    130, a closed pipe with 141, both quietly; an output that cannot be written is an error of the disk. Put it next to
    the function, below click's decorators.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            try:
                result = command(*args, **kwargs)
                sys.stdout.flush()
            except KacheryError as error:
                emit_error(error, as_json=bool(kwargs.get("as_json")))
                sys.exit(error.exit_code)
            except KeyboardInterrupt:
                _forget_output()
                click.echo("Interrupted.", err=True)
                sys.exit(INTERRUPTED)
        except OSError as error:
            sys.exit(end_of_output(error))
        return result

    return wrapped  # type: ignore[return-value]


class _OutputFailed(OSError):
    """The standard output could not be written."""


class _Output(io.FileIO):
    """The standard output's file, whose errors can be told from those of any other."""

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _OutputFailed(error.errno, error.strerror) from error


def guard_output() -> None:
    """Make errors of the standard output known to ``end_of_output``, for the rest of the program."""
    plain = sys.stdout
    if plain is None:  # closed by who started us: what is printed is wanted by nobody
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - it lives as long as we do
        return
    if plain is not sys.__stdout__ or not isinstance(plain, io.TextIOWrapper):
        return  # somebody else's, of a program that calls this one
    plain.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Output(plain.fileno(), "wb", closefd=False)), encoding=plain.encoding, errors=plain.errors,
        line_buffering=plain.isatty())


def _forget_output() -> None:
    """Write nothing more. A line that Ctrl-C met just after it was written is still in the buffer, too."""
    if isinstance(getattr(getattr(sys.stdout, "buffer", None), "raw", None), _Output):
        nobody = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nobody, sys.stdout.fileno())
        os.close(nobody)


def end_of_output(error: OSError) -> int:
    """Return the exit code for an ``error`` of the standard output, having said what it was.

    A closed pipe is what ``head`` does and needs no words. Any other error is raised again: those of files and sockets
    never arrive here as OSError, so it is a fault of the program.
    """
    if not isinstance(error, _OutputFailed | BrokenPipeError):
        raise error
    # Whatever is still buffered has no reader; give it to nobody, or Python complains when it ends.
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    failed = DiskError(action="the writing", path="the standard output", why=error.strerror or str(error))
    try:
        show_error(failed)
    except OSError:  # the same disk
        os.dup2(nobody, sys.stderr.fileno())
    return failed.exit_code


def emit(data: Any, human: str | Callable[[], str], as_json: bool) -> None:
    """Print a result: ``data`` as JSON, or ``human``, a text or what makes one."""
    if as_json:
        click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        return
    text = human if isinstance(human, str) else human()
    if text:
        click.echo(_printable(text))


def emit_error(error: KacheryError, *, as_json: bool) -> None:
    """Print an error to the standard error, and with ``as_json`` as the JSON result."""
    show_error(error)
    if as_json:
        click.echo(json.dumps(error.to_dict(), indent=2, ensure_ascii=False))


def show_error(error: KacheryError) -> None:
    """Print an error as one line to the standard error."""
    click.echo(f"Error: {_printable(' '.join(str(error).split()))}", err=True)


def json_line(value: Any) -> str:
    """Return ``value`` as JSON on one line, in which no character can do anything to a terminal."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def human_size(size_bytes: float) -> str:
    """Return a length for people, in powers of 1000: ``20.5 MB``."""
    if size_bytes < 1000:
        return f"{size_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        size_bytes /= 1000
        if size_bytes < 999.95 or unit == "TB":
            break
    return f"{size_bytes:.1f} {unit}"


def size_of(text: str, option: str) -> int:
    """Read a length in bytes, such as ``50GiB``. :raises InvalidArgument: it is none; the error names ``option``."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]*)\s*", text)
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None:
        raise InvalidArgument(
            what=f"{option} {text!r} is no size; write bytes, or a number with MB, GB, TB, MiB, GiB or TiB.")
    return int(float(found[1]) * unit)


def _printable(text: str) -> str:
    """Return ``text`` without control characters: names and messages come from other people's machines."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


@contextmanager
def progress_bar(title: str, *, hidden: bool) -> Iterator[ProgressCallback | None]:
    """Yield a callback that draws a bar (bytes, rate, time left, what is waited for), or None where none is wanted.

    :param hidden: whether the user asked for quiet; without a terminal at the standard error there is no bar either.
    """
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    bars = Bars(TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[waiting]}", style="dim", markup=False),
                console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
    with bars:
        task = bars.add_task(_printable(title), total=None, waiting="")

        def show(progress: Progress) -> None:
            bars.update(task, completed=progress.done_bytes, total=progress.total_bytes,
                        waiting=_printable(progress.waiting))

        yield show
