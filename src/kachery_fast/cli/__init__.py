"""The command line: parse, call, print.

``kachery-fast --help`` has to be quick, so no command's module is imported before the command is used; the table here
holds the one line of help of each.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, NamedTuple

import click

from .._version import __version__
from .output import end_of_output, guard_output

__all__ = ["main", "program"]


class _Entry(NamedTuple):
    module: str
    attribute: str
    help: str


_COMMANDS = {
    "store": _Entry("files", "store", "Copy files into the local store and print their URIs."),
    "link": _Entry("files", "link", "Make files part of the local store where they lie."),
    "load": _Entry("files", "load", "Get a file by its URI and print where it is."),
    "cat": _Entry("files", "cat", "Write the bytes of a file, or a range of them, to the standard output."),
    "upload": _Entry("files", "upload", "Bring files into a channel's bucket before anybody asks."),
    "why": _Entry("files", "why", "Say where a file is, or why it cannot be had."),
    "verify": _Entry("files", "verify", "Read files of the local store and check their bytes."),
    "ls": _Entry("cache", "ls", "List the files of the local store."),
    "gc": _Entry("cache", "gc", "Evict cached copies until they are within their bound."),
    "pin": _Entry("cache", "pin", "Keep files from being evicted and removed."),
    "unpin": _Entry("cache", "unpin", "Take pins away."),
    "rm": _Entry("cache", "rm", "Remove files from the local store."),
    "trash": _Entry("cache", "trash", "List, restore and delete what was evicted or removed."),
    "feed": _Entry("feed", "feed", "Make, append to, read and follow feeds."),
    "task": _Entry("task", "task", "Have functions run by other nodes, and run them for others."),
    "import": _Entry("importing", "import_directory", "Take files, mutables and feeds from a directory of 2022."),
    "info": _Entry("node", "info", "Show the local store, the node and its channels."),
    "mutable": _Entry("mutable", "mutable", "Keep small values on this machine, by keys."),
    "node": _Entry("node", "node", "Start, stop and connect the node of this machine."),
    "hub": _Entry("hub", "hub", "Run a hub, with its embedded bucket and broker."),
    "nodes": _Entry("nodes", "nodes", "Say which nodes are yours at a hub, and what they ask for."),
    "channel": _Entry("channel", "channel", "Make channels on a hub, and say who may do what on them."),
    "demo": _Entry("demo", "demo", "Show what it does on this machine: a hub, two nodes, a recording, a feed, a task."),
    "bench": _Entry("bench", "bench", "Measure what this machine can do."),
}


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(f".{entry.module}", __name__), entry.attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.module}.{entry.attribute} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in _COMMANDS.items()])


@click.command(cls=_LazyGroup, name="kachery-fast", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kachery-fast")
def program() -> None:
    """Move multi-gigabyte recordings between workstations by content URI.

    Exit codes: 0 done, 1 internal, 2 usage, 3 not found, 4 not permitted, 5 unreachable, 6 damaged or changed data,
    7 disk, 8 timed out, 9 conflict, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and exit. Settings that cannot be used are errors like any other."""
    guard_output()
    try:
        code = program(arguments, prog_name="kachery-fast", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        # Ctrl-C outside a command, or a "no" to a question.
        click.echo("Aborted.", err=True)
        sys.exit(130)
    except OSError as error:  # help or version that could not be printed; commands see to their own
        code = end_of_output(error)
    sys.exit(code if isinstance(code, int) else 0)
