"""The page for users of 2022 has every name of the old packages, and names of ours that exist.

Those of kachery-client are read from the package itself, in ``.venv-2022``; those of kachery-daemon 1.2.1, a program
for Node.js, were read from its sources once.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast.config import SETTINGS
from tests.docs.test_pages import VARIABLES_OF_2022, check_call
from tests.legacy.client2022 import BIN, need_client

PAGE = Path(__file__).parents[2] / "docs" / "from-kc-to-kf.md"

# Run by the old client's own Python: every name of its package, its commands and its variables.
_LIST_NAMES = """
import ast, importlib.metadata, inspect, json, pathlib, re
import kachery_client as kc
from kachery_client import cli, main
from kachery_client._uri_handling import KacheryUri
from kachery_client.request_task import OutgoingTaskRequest

def arguments(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]

def members(kind):
    found = {}
    for name, member in vars(kind).items():
        if not name.startswith("_"):
            found[name] = arguments(member) if inspect.isfunction(member) else None
    return found

root = pathlib.Path(kc.__file__).parent
tree = ast.parse((root / "__init__.py").read_text())
names = [alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
         for alias in node.names]
source = "".join(path.read_text() for path in root.rglob("*.py"))
print(json.dumps({
    "calls": {name: arguments(getattr(kc, name)) if callable(getattr(kc, name)) else None for name in names},
    "members": {"feed": members(kc.Feed), "subfeed": members(kc.Subfeed), "task": members(OutgoingTaskRequest)},
    "methods": {"DirectClient": [*members(kc.DirectClient)], "ShellScript": [*members(kc.ShellScript)],
                "TemporaryDirectory": [*members(kc.TemporaryDirectory)],
                "KacheryUri": [*KacheryUri.__annotations__, *members(KacheryUri)]},
    "elsewhere": sorted({name for name, member in vars(main).items() if inspect.isfunction(member)
                         and not name.startswith("_")} - {*names}),
    "scripts": sorted(path.name for path in importlib.metadata.files("kachery_client")
                      if path.parent.name == "bin"),
    "commands": {name: [option for parameter in command.params for option in parameter.opts
                        if option.startswith("-")] for name, command in cli.cli.commands.items()},
    "variables": sorted(set(re.findall(r"(?:getenv|environ\\.get|_get_envvar_uri)\\(\\s*['\\"](\\w+)", source)
                            + re.findall(r"environ\\[['\\"](\\w+)", source))),
}))
"""

DAEMON_COMMANDS = ("kachery-daemon start", "kachery-daemon info", "kachery-daemon version", "kachery-daemon-start",
                   "kachery-daemon-info", "kachery-daemon-node start")
DAEMON_OPTIONS = ("--label", "--owner", "--verbose", "--method", "--node-arg", "--auth-group", "--kachery-hub-url")
DAEMON_ENDPOINTS = (
    "/probe", "/halt", "/stats", "/store", "/storeFile", "/linkFile", "/loadFile", "/downloadFileData", "/uploadFile",
    "/createSignedFileUploadUrl", "/feed/createFeed", "/feed/deleteFeed", "/feed/getFeedId", "/feed/getFeedInfo",
    "/feed/getNumLocalMessages", "/feed/appendMessages", "/feed/watchForNewMessages", "/mutable/set", "/mutable/get",
    "/mutable/delete", "/task/registerTaskFunctions", "/task/requestTask", "/task/waitForTaskResult",
    "/task/updateTaskStatus", "/task/createSignedTaskResultUploadUrl")
DAEMON_VARIABLES = ("KACHERY_STORAGE_DIR", "KACHERY_DAEMON_PORT", "KACHERY_DAEMON_HOST")
FILES = ("sha1/aa/bb/cc/HASH", "….link", "private.pem", "public.pem", "kachery-node-id", "owner", "client-auth",
         "mutables.db", "feeds.db", "kachery.yaml", "sha1-trash/", "tmp/", "store.file.*.tmp", "debug.log", "info.log",
         "warn.log", "error.log", "$TMPDIR/kachery-tmp")


def code() -> list[str]:
    """What stands on the page as code, spans and indented lines, in order."""
    text = PAGE.read_text("utf-8")
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`|^ {4}(\S.*)$", text, re.MULTILINE)
            for span in span if span]


def old_side() -> list[str]:
    """The code in the first cells of the tables, where the old names stand."""
    return [span for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")
            for span in re.findall(r"`([^`]+)`", line.split(" | ")[0])]


@functools.cache
def client() -> dict[str, Any]:
    need_client()
    done = subprocess.run([str(BIN / "python"), "-W", "ignore", "-c", _LIST_NAMES], capture_output=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr.decode()
    return dict(json.loads(done.stdout))


def signature(name: str, arguments: list[str] | None) -> str:
    return name if arguments is None else f"{name}({', '.join(arguments)})"


# --- the old packages


def test_every_call_is_there_with_its_arguments() -> None:
    for name, arguments in client()["calls"].items():
        assert signature(f"kc.{name}", arguments) in old_side()
    assert {f"kachery_client.main.{name}" for name in client()["elsewhere"]} <= {*old_side()}


@pytest.mark.parametrize("owner", ["feed", "subfeed", "task"])
def test_every_member_of_what_the_calls_return_is_there(owner: str) -> None:
    for name, arguments in client()["members"][owner].items():
        assert signature(f"{owner}.{name}", arguments) in old_side()


def test_every_method_of_the_other_classes_is_there() -> None:
    for name, methods in client()["methods"].items():
        rows = [line.split(" | ")[0] for line in PAGE.read_text("utf-8").splitlines()
                if re.match(rf"\| .*`(kc\.)?{name}\b", line)]
        spans = {span.removesuffix("()") for row in rows for span in re.findall(r"`([^`]+)`", row)}
        assert {*methods} <= spans, name


def test_every_command_is_there_with_its_options() -> None:
    found = client()
    spans = old_side()
    for script in found["scripts"]:
        assert any(re.match(rf"{script}( [^-]|$)", span) for span in spans), script
    for command, options in found["commands"].items():
        assert any(re.match(rf"kachery-client {command}\b", span) for span in spans), command
        for option in options:
            assert any(option in span.split() for span in spans), option


def test_every_variable_is_there() -> None:
    variables = {*client()["variables"], *DAEMON_VARIABLES}
    assert variables <= set(old_side())
    of_old_clients_alone = variables - {setting.env for setting in SETTINGS}
    assert {name for name in of_old_clients_alone if name.startswith("KACHERY_")} == VARIABLES_OF_2022


def test_everything_of_the_daemon_is_there() -> None:
    spans = old_side()
    assert {*DAEMON_COMMANDS, *DAEMON_ENDPOINTS, *FILES} <= set(spans)
    for option in DAEMON_OPTIONS:
        assert any(option in span.split() for span in spans), option


# --- ours


def test_every_call_of_ours_exists_with_the_arguments_that_are_named() -> None:
    named = [(span, name) for span in code() for name in re.findall(r"\bkf\.(\w+)", span)]
    assert len(named) > 40
    for span, name in named:
        assert name in kf.__all__, span
    for span in code():
        for name, arguments in re.findall(r"\bkf\.(\w+)\(([\w=, ]*)\)", span):
            given = [argument.strip() for argument in arguments.split(",") if argument.strip()]
            known = inspect.signature(getattr(kf, name)).parameters
            for argument in given:  # those that have to be given by name are written with a "="
                assert argument.rstrip("=") in known, span
                kind = known[argument.rstrip("=")].kind
                assert argument.endswith("=") or kind is not inspect.Parameter.KEYWORD_ONLY, span


@pytest.mark.parametrize("owner", ["feed", "subfeed", "task"])
def test_what_is_called_the_same_is_there_in_ours(owner: str) -> None:
    kinds = {"feed": kf.Feed, "subfeed": kf.Subfeed, "task": kf.Task}
    for line in PAGE.read_text("utf-8").splitlines():
        if not line.startswith(f"| `{owner}."):
            continue
        old, new = line.split(" | ")[:2]
        spans = re.findall(r"`([^`]+)`", old if new.startswith("the same") else new)
        for name in {name for span in spans for name in re.findall(rf"\b{owner}\.(\w+)", span)}:
            assert hasattr(kinds[owner], name), line


def test_every_command_of_ours_exists_with_its_options() -> None:
    calls = [span.removeprefix("kachery-fast ") for span in code() if span.startswith("kachery-fast ")]
    assert len(calls) > 20
    for call in calls:
        check_call(call.split())
