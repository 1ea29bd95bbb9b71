"""The program as a whole: quick, complete, and helpful when called wrongly."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import kachery_fast
from kachery_fast import cli, errors
from tests.cli.commands import PROGRAM, Program

HEAVY = ("numpy", "ably", "aiohttp", "sqlalchemy", "rich", "uvloop", "cryptography", "fsspec", "asyncio", "msgspec")


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path / "store")


def modules_after(program: Program, code: str) -> set[str]:
    """The names of all modules loaded after some code has run in a fresh interpreter."""
    script = f"import sys, json, contextlib, io\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.__stdout__)"
    done = subprocess.run([sys.executable, "-c", script], env=program.env, capture_output=True, text=True,
                          timeout=60, check=True)
    return set(json.loads(done.stdout))


def test_the_import_loads_nothing_heavy(program: Program) -> None:
    assert modules_after(program, "import kachery_fast").isdisjoint({*HEAVY, "http.client", "click"})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["store", "--help"], ["node", "--help"]])
def test_help_loads_nothing_heavy(program: Program, arguments: list[str]) -> None:
    code = f"""
from kachery_fast.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main({arguments!r})
"""
    assert modules_after(program, code).isdisjoint(HEAVY)


def test_a_store_loads_no_network(program: Program, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    code = f"import kachery_fast\nkachery_fast.store_file({str(tmp_path / 'x')!r})"
    assert modules_after(program, code).isdisjoint({"numpy", "ably", "aiohttp", "sqlalchemy", "rich", "uvloop"})


# --- the front door


def test_every_public_name_is_there_and_documented() -> None:
    assert kachery_fast.__all__ == sorted(kachery_fast.__all__)
    assert set(kachery_fast.__all__) <= set(dir(kachery_fast))
    for name in kachery_fast.__all__:
        value = getattr(kachery_fast, name)
        if name not in ("__version__", "ProgressCallback"):
            assert inspect.getdoc(value), name
            assert value.__module__.startswith("kachery_fast."), name


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = kachery_fast.nonsense


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    assert found is not None
    assert kachery_fast.__version__ == found[1]


# --- the command line


def test_every_command_of_the_table_exists_with_its_help() -> None:
    context = click.Context(cli.program)
    help_page = CliRunner().invoke(cli.program, ["--help"]).output
    for name in cli.program.list_commands(context):
        command = cli.program.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.help
        assert f"\n  {name} " in help_page


def test_every_command_offers_json_and_every_option_has_help() -> None:
    def check(path: str, command: click.Command) -> None:
        names = {option for parameter in command.params for option in parameter.opts}
        if isinstance(command, click.Group):
            for name, child in command.commands.items():
                check(f"{path} {name}", child)
        else:
            assert "--json" in names, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (path, parameter.opts)

    context = click.Context(cli.program)
    for name in cli.program.list_commands(context):
        command = cli.program.get_command(context, name)
        assert command is not None
        check(name, command)


def test_the_version_is_printed(program: Program) -> None:
    assert program.ok("--version").strip().endswith(kachery_fast.__version__)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["store"], ["load"], ["load", "a", "b"],
                                       ["store", "--nonsense"], ["cat", "x", "--start", "-1"], ["node", "nonsense"]])
def test_a_wrong_call_is_a_usage_error(program: Program, arguments: list[str]) -> None:
    done = program.run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: kachery-fast" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unusable_setting_is_a_usage_error(program: Program) -> None:
    program.env["KACHERY_DAEMON_PORT"] = "many"
    done = program.run("info")
    assert done.returncode == errors.InvalidSetting.exit_code
    assert "KACHERY_DAEMON_PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_script_and_the_module_are_one_program(program: Program) -> None:
    script = Path(sys.executable).with_name("kachery-fast")
    if not script.exists():
        script = Path(sys.prefix) / "bin" / "kachery-fast"
    done = subprocess.run([script, "--help"], env=program.env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == program.ok("--help")
    assert PROGRAM[-1] == "kachery_fast"
