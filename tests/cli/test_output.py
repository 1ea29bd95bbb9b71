"""Results, errors and progress as they are shown."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kachery_fast import errors
from kachery_fast.cli.output import command_errors, emit, human_size, json_line, json_option, progress_bar, show_error
from kachery_fast.client.progress import Progress


def all_errors(kind: type[errors.KacheryError] = errors.KacheryError) -> list[type[errors.KacheryError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in all_errors(child))]


def command(act: Any) -> click.Command:
    @click.command()
    @json_option
    @command_errors
    def run(as_json: bool) -> None:
        emit({"value": act()}, "fine", as_json)

    return run


def failing(error: BaseException) -> click.Command:
    def act() -> None:
        raise error

    return command(act)


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_is_one_line_and_its_exit_code(kind: type[errors.KacheryError]) -> None:
    done = CliRunner().invoke(failing(kind(what="first\nsecond", path="x")), [])
    assert done.exit_code == kind.exit_code != 0
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_an_error_with_json_is_the_result_too() -> None:
    error = errors.DiskFull(what="x", path="/y", free=1, needed=2)
    done = CliRunner().invoke(failing(error), ["--json"])
    assert done.exit_code == 7
    assert json.loads(done.stdout) == error.to_dict()
    assert str(errors.KacheryError.from_dict(json.loads(done.stdout))) == str(error)
    assert done.stderr == f"Error: {error}\n"


def test_an_interrupt_ends_with_130() -> None:
    done = CliRunner().invoke(failing(KeyboardInterrupt()), [])
    assert (done.exit_code, done.stderr) == (130, "Interrupted.\n")


INTERRUPTED_AFTER_WRITING = """
import sys
import click
from kachery_fast.cli import output

write = output._Output.write

def write_and_be_interrupted(self, data):
    output._Output.write = write
    write(self, data)
    raise KeyboardInterrupt

output._Output.write = write_and_be_interrupted
output.guard_output()
output.command_errors(lambda: click.echo("a line"))()
"""


def test_a_line_that_ctrl_c_met_when_it_was_written_is_not_written_again() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_AFTER_WRITING], capture_output=True, text=True, timeout=60,
                          check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "a line\n", "Interrupted.\n")


def test_an_unknown_error_is_not_hidden() -> None:
    done = CliRunner().invoke(failing(ZeroDivisionError("a fault of the program")), [])
    assert isinstance(done.exception, ZeroDivisionError)


def test_a_result_is_text_or_json() -> None:
    assert CliRunner().invoke(command(lambda: "é"), []).stdout == "fine\n"
    assert json.loads(CliRunner().invoke(command(lambda: "é"), ["--json"]).stdout) == {"value": "é"}


def test_nothing_from_elsewhere_reaches_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    emit(None, "a\x1b]0;title\x07b\u202e", as_json=False)
    show_error(errors.KacheryError(what="\x1b[2J"))
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\x07" not in out
    assert "\\x1b" in out


@pytest.mark.parametrize(("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"),
                                            (999_960, "1.0 MB"), (8 * 2**30, "8.6 GB"), (5e15, "5000.0 TB")])
def test_sizes_are_in_powers_of_a_thousand(size: float, text: str) -> None:
    assert human_size(size) == text


def test_a_line_of_json_is_one_line_that_a_terminal_only_shows() -> None:
    value = {"é": ["\n\x1b\x9b\u202e\u2028\U000e0001\ud800", 1.5, None]}
    line = json_line(value)
    assert line == '{"é": ["\\n\\u001b\\u009b\\u202e\\u2028\\udb40\\udc01\\ud800", 1.5, null]}'
    assert line.isprintable()
    assert json.loads(line) == value


def test_there_is_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("x", hidden=False) as progress:
        assert progress is None
    assert capsys.readouterr() == ("", "")
    assert Progress(1) == (1, None, "")
