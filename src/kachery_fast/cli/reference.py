"""The reference pages: every command from the command line itself, every setting from its table.

``python -m kachery_fast.cli.reference`` writes ``docs/commands.md`` and ``docs/settings.md`` into the directory that
it is given (``docs`` without one); a test compares them with what is committed.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..config import SETTINGS, Setting
from . import program

__all__ = ["commands_page", "main", "settings_page"]


def commands_page() -> str:
    """Return ``docs/commands.md``."""
    lines = ["# Commands", "",
             "Made by `python -m kachery_fast.cli.reference`; a test compares it with the program.", ""]
    with click.Context(program, info_name="kachery-fast") as context:
        for path, command in _walk(context, program):
            lines += _section(path, command)
    return "\n".join(lines).rstrip() + "\n"


def settings_page() -> str:
    """Return ``docs/settings.md``."""
    lines = [
        "# Settings", "",
        "Made by `python -m kachery_fast.cli.reference` from the table in `src/kachery_fast/config.py`; a test",
        "compares the two. Each is read from its environment variable when a program starts.", "",
        "| variable | default | unit | what it is |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{setting.env}` | {_default(setting)} | {setting.unit} | {_cell(setting.help)} |"
              for setting in SETTINGS]
    return "\n".join(lines) + "\n"


def _default(setting: Setting) -> str:
    if setting.default == "":
        return "empty"
    if isinstance(setting.default, float):
        return f"{setting.default:g}"
    return f"{setting.default}" if not isinstance(setting.default, str) else f"`{setting.default}`"


def _walk(context: click.Context, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield context.command_path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                with click.Context(child, info_name=name, parent=context) as inner:
                    yield from _walk(inner, child)


def _section(path: str, command: click.Command) -> list[str]:
    level = "#" * min(path.count(" ") + 2, 4)
    lines = [f"{level} {path}", ""]
    if not isinstance(command, click.Group) or command.invoke_without_command:
        arguments = [_argument(parameter) for parameter in command.params if isinstance(parameter, click.Argument)]
        options_last = command.context_settings.get("allow_interspersed_args", True)
        usage = [*arguments, "[OPTIONS]"] if options_last else ["[OPTIONS]", *arguments]
        lines += ["    " + " ".join([path, *usage]), ""]
    lines += [inspect.cleandoc(command.help or command.short_help or ""), ""]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if options:
        lines += ["| option | what it does |", "|---|---|"]
        lines += [f"| `{_cell(_option(option))}` | {_cell(_option_help(option))} |" for option in options]
        lines.append("")
    return lines


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    if not argument.metavar and argument.nargs == -1:
        name += "..."
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _option(option: click.Option) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    if option.is_flag or option.count:
        return names
    kind: Any = option.type
    metavar = option.metavar or ("|".join(kind.choices) if isinstance(kind, click.Choice) else kind.name.upper())
    return f"{names} {metavar}"


def _option_help(option: click.Option) -> str:
    text = option.help or ""
    if option.required:
        text += " Required."
    if option.show_default and option.default is not None:
        text += f" Default: {option.default}."
    if option.multiple:
        text += " May be given several times."
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str]) -> None:
    """Write both pages into the directory that is named, ``docs`` without one."""
    directory = Path(arguments[0] if arguments else "docs")
    (directory / "commands.md").write_text(commands_page(), encoding="utf-8")
    (directory / "settings.md").write_text(settings_page(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
