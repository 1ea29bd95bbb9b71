"""Commands on mutables: get, set, delete, list."""

from __future__ import annotations

import json
from typing import Any

import click

from ..errors import InvalidArgument, MutableMissing
from .output import command_errors, emit, json_line, json_option

__all__ = ["mutable"]

parse_option = click.option("--parse", is_flag=True, help="Read KEY and VALUE as JSON; without it they are texts.")


@click.group()
def mutable() -> None:
    """Keep small values on this machine, by keys: JSON that may change and is not shared."""


@mutable.command(short_help="Print the value of a key.")
@click.argument("key")
@parse_option
@json_option
@command_errors
def get(key: str, parse: bool, as_json: bool) -> None:
    """Print the value of a key: a text as it is, anything else as JSON.

    With --json the value is JSON in any case. The exit code is 3 when there is no value.
    """
    from ..client import mutables

    name = _read(key, parse, "KEY")
    found, value = mutables.find(name)
    if not found:
        raise MutableMissing(key=_show(name))
    emit(value, lambda: _show(value), as_json)


@mutable.command("set", short_help="Set the value of a key.")
@click.argument("key")
@click.argument("value")
@parse_option
@click.option("--no-update", is_flag=True, help="Leave a value that is there already.")
@json_option
@command_errors
def set_value(key: str, value: str, parse: bool, no_update: bool, as_json: bool) -> None:
    """Set the value of a key. It is on the disk when the command ends.

    Prints whether it was set, which only --no-update can prevent.
    """
    from ..client import mutables

    changed = mutables.set(_read(key, parse, "KEY"), _read(value, parse, "VALUE"), update=not no_update)
    emit({"changed": changed}, "set" if changed else "left as it was", as_json)


@mutable.command(short_help="Delete a key.")
@click.argument("key")
@parse_option
@json_option
@command_errors
def delete(key: str, parse: bool, as_json: bool) -> None:
    """Delete a key with its value. The exit code is 3 when there is none."""
    from ..client import mutables

    name = _read(key, parse, "KEY")
    if not mutables.delete(name):
        raise MutableMissing(key=_show(name))
    emit({"changed": True}, "deleted", as_json)


@mutable.command("list", short_help="Print all keys and values.")
@json_option
@command_errors
def list_all(as_json: bool) -> None:
    """Print all keys and values, as JSON with a tab between, one on each line."""
    from ..client import mutables

    found = mutables.items()
    emit([{"key": key, "value": value} for key, value in found],
         lambda: "\n".join(f"{json_line(key)}\t{json_line(value)}" for key, value in found), as_json)


def _read(text: str, parse: bool, what: str) -> Any:
    if not parse:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(what=f"{what} {text[:100]!r} is not JSON ({error}); without --parse it is a text."
                              ) from None


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json_line(value)
