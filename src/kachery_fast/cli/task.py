"""Commands on tasks: ask for one, look how it stands, run a backend."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidArgument, KacheryError, LocalFileMissing
from .output import command_errors, emit, json_option, quiet_option

if TYPE_CHECKING:
    from ..client.tasks import Task

__all__ = ["task"]

# How often a wait looks up, to show what has changed.
_LOOK_SECONDS = 1.0


@click.group(short_help="Have functions run by other nodes, and run them for others.")
def task() -> None:
    """Have registered functions run by other nodes of a channel, and run them for others."""


@task.command(short_help="Ask for a task, and print its result.")
@click.argument("function")
@click.argument("arguments", nargs=-1, metavar="[NAME=VALUE...]")
@click.option("--kwargs", metavar="JSON", help="The arguments as one JSON object; NAME=VALUE goes on top.")
@click.option("--type", "kind", type=click.Choice(["pure-calculation", "query", "action"]), default="pure-calculation",
              show_default=True, help="What the function is registered as.")
@click.option("--channel", metavar="NAME", help="The channel to ask on; without it the one of KACHERY_CHANNEL.")
@click.option("--id", "task_id", metavar="ID", help="Ask about this query or action of before, not for a new one.")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(min=0), metavar="SECONDS",
              help="Wait no longer; the task goes on. 0 does not wait at all.")
@quiet_option
@json_option
@command_errors
def request(function: str, arguments: tuple[str, ...], kwargs: str | None, kind: str, channel: str | None,
            task_id: str | None, timeout_seconds: float | None, quiet: bool, as_json: bool) -> None:
    """Ask for a task, wait for it, and print its result as JSON, or the URI of the file that it is.

    FUNCTION is the id under which a backend has registered it. A VALUE is JSON where it can be read as such, else
    text: n=3 name=probe bins=[1,2]. Ctrl-C takes the request back.
    """
    from ..client.tasks import request_task

    asked = request_task(function, _read_kwargs(kwargs, arguments), channel=channel, type=kind, task_id=task_id)
    try:
        _wait(asked, timeout_seconds, show=not quiet and not as_json and sys.stderr.isatty())
    except KeyboardInterrupt:
        asked.cancel()
        raise
    if asked.status != "finished" and timeout_seconds != 0:
        asked.raise_unless_finished()
    emit(asked.state, lambda: _result_text(asked.state), as_json)


@task.command(short_help="Show how a task stands.")
@click.argument("request_id", metavar="REQUEST")
@json_option
@command_errors
def status(request_id: str, as_json: bool) -> None:
    """Show how a task stands that was asked for at this node; REQUEST is its first column in task list."""
    from ..client.tasks import task_state

    found = task_state(request_id)
    emit(found, lambda: "\n".join([_line(found), *_details(found)]), as_json)


@task.command("list", short_help="List the tasks asked for at this node.")
@json_option
@command_errors
def list_(as_json: bool) -> None:
    """List the tasks that were asked for at this node, those that have ended for task_keep_seconds."""
    from ..client.tasks import list_tasks

    found = list_tasks()
    emit(found, lambda: "\n".join(_line(state) for state in found), as_json)


@task.command(short_help="Run the functions of a module or script for other nodes.")
@click.argument("source", metavar="MODULE_OR_FILE")
@click.option("--channel", "channels", multiple=True, metavar="NAME",
              help="Run them for this channel alone; may be repeated.")
@click.option("--function", "functions", multiple=True, metavar="ID",
              help="Offer this function alone; may be repeated.")
@click.option("--verbose", is_flag=True, help="Log what happens.")
@json_option
@command_errors
def backend(source: str, channels: tuple[str, ...], functions: tuple[str, ...], verbose: bool, as_json: bool) -> None:
    """Run the functions that a module or a Python file registers with kf.taskfunction, in processes of their own,
    until Ctrl-C or SIGTERM.

    The setting KACHERY_TASK_WORKERS says how many run at once.
    """
    from ..client.backend import run_task_backend

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kachery_fast").setLevel(logging.INFO if verbose else logging.WARNING)
    _import(source)
    from ..client.functions import registered_functions

    offered = [function.id for function in registered_functions(functions or None)]

    def ready(names: list[str]) -> None:
        emit({"functions": offered, "channels": names},
             f"Offering {', '.join(offered)} on {', '.join(names) or 'no channel yet'}. Ctrl-C ends it.", as_json)
        sys.stdout.flush()

    run_task_backend(channels or None, functions or None, on_ready=ready)


# --- arguments


def _read_kwargs(text: str | None, arguments: tuple[str, ...]) -> dict[str, Any]:
    found: Any = {}
    if text is not None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(what=f"--kwargs is not JSON: {error}.") from None
        if not isinstance(found, dict):
            raise InvalidArgument(what='--kwargs is a JSON object: {"name": value, ...}.')
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name:
            raise InvalidArgument(what=f"{argument!r} is no argument of a function; write NAME=VALUE.")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return dict(found)


def _import(source: str) -> None:
    """Import a module or a file, so that its functions are registered.

    A file is imported under its name, from its directory, so that worker processes find it there too.

    :raises LocalFileMissing, InvalidArgument: there is none, or it raises.
    """
    path = Path(source)
    is_file = source.endswith(".py") or path.is_file()
    if is_file and not path.is_file():
        raise LocalFileMissing(path=path)
    sys.path.insert(0, str(path.resolve().parent if is_file else Path.cwd()))
    name = path.stem if is_file else source
    try:
        if is_file:
            _import_file(name, path.resolve())
        else:
            importlib.import_module(name)
    except KacheryError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise InvalidArgument(what=f"There is no module {name!r}, nor a file of that name.") from None
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InvalidArgument(what=f"{source} cannot be imported: {type(error).__name__}: {error} "
                                   f"({place.filename}, line {place.lineno}).") from error


def _import_file(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidArgument(what=f"{path} is not a Python file; its name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


# --- waiting and text


def _wait(asked: Task, timeout_seconds: float | None, *, show: bool) -> None:
    if not show:
        asked.wait(timeout_seconds)
        return
    shown = ""
    left = timeout_seconds
    while left is None or left > 0:
        if asked.wait(_LOOK_SECONDS if left is None else min(_LOOK_SECONDS, left)):
            return
        left = None if left is None else left - _LOOK_SECONDS
        line = _standing(asked.state)
        if line != shown:
            click.echo(line, err=True)
            shown = line


def _result_text(state: dict[str, Any]) -> str:
    result = state.get("result")
    if state.get("status") != "finished":
        return f"{state.get('request')}  {_standing(state)}"
    if not isinstance(result, dict):
        return "Done."
    if "file" in result:
        return str(result["file"])
    return json.dumps(result.get("json"), indent=2, ensure_ascii=False)


def _standing(state: dict[str, Any]) -> str:
    words = [str(state.get("status"))]
    if state.get("progress") is not None and state.get("status") == "running":
        words.append(f"{100 * float(state['progress']):.0f} %")
    if state.get("cached"):
        words.append("(from the cache)")
    if state.get("text"):
        words.append(str(state["text"]))
    return " ".join(words)


def _line(state: dict[str, Any]) -> str:
    return f"{state.get('request')}  {state.get('function')}  {state.get('channel')}  {_standing(state)}"


def _details(state: dict[str, Any]) -> list[str]:
    lines = []
    if state.get("node"):
        lines.append(f"  by {state.get('nodeLabel') or state['node'][:10]}")
    if state.get("resultTime"):
        when = datetime.fromtimestamp(state["resultTime"] / 1000, timezone.utc)
        lines.append(f"  computed {when:%Y-%m-%d %H:%M:%S} UTC")
    error = state.get("error")
    if isinstance(error, dict):
        lines.append(f"  {error.get('message')}")
        trace = (error.get("details") or {}).get("traceback")
        lines += [f"    {line}" for line in str(trace or "").splitlines()]
    elif state.get("status") == "finished":
        lines.append(f"  {_result_text(state)}")
    return lines
