"""The pages are true: links lead somewhere, examples run, generated parts are up to date."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import msgspec
import pytest

from kachery_fast.cli import program
from kachery_fast.config import SETTINGS
from kachery_fast.protocol import bodies, feed_bodies, hub_bodies, messages, task_bodies
from kachery_fast.store.links import parse_link

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# Read by kachery-client 1.2.0; its page names them, and no other page of ours has a use for them.
VARIABLES_OF_2022 = frozenset({"KACHERY_HUB_API_URI", "KACHERY_TEMP_DIR", "KACHERY_KEEP_TEMP_FILES"})
GENERATED = {"commands.md", "settings.md", "errors.md"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def script(name: str) -> ModuleType:
    """A program of the docs directory, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_page_for_everything() -> None:
    names = {page.name for page in PAGES}
    assert names >= {"README.md", "CHANGELOG.md", "concepts.md", "joining.md", "formats.md", "threat-model.md",
                     "design.md", "testing.md", *GENERATED}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(place), f"{page.name} links to {target}"


@every_page
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:src|tests|docs|benchmarks|\.ci|\.github)/[\w./-]+)(?:::(\w+))?`", page.read_text("utf-8"))
    for path, test in named:
        assert (ROOT / path).exists(), f"{page.name} names {path}"
        if test:
            assert f"def {test}(" in (ROOT / path).read_text("utf-8"), f"{page.name} names {path}::{test}"


@every_page
def test_variables_that_are_named_exist(page: Path) -> None:
    if page.name in GENERATED:
        return
    known = {setting.env for setting in SETTINGS} | {"KACHERY_TEST_NO_SKIP", "KACHERY_TEST_FRESH"}
    if page.name == "from-kc-to-kf.md":
        known |= VARIABLES_OF_2022
    named = set(re.findall(r"\bKACHERY_[A-Z0-9_]+\b", page.read_text("utf-8").replace("KACHERY_*", "")))
    assert named <= known, f"{page.name} names {sorted(named - known)}"


@every_page
def test_commands_that_are_named_exist(page: Path) -> None:
    if page.name in GENERATED:
        return
    text = page.read_text("utf-8").replace("\\\n", " ")
    calls = re.findall(r"^ {4}kachery-fast (.+)$|^ExecStart=\S*kachery-fast (.+)$|`kachery-fast ([^`]+)`", text,
                       re.MULTILINE)
    for words in (call.partition("#")[0].split() for found in calls for call in found if call):
        check_call(words)


def check_call(words: list[str]) -> None:
    """Follow a command line through the groups, and look for each of its options."""
    command: click.Command = program
    with click.Context(program) as context:
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(context, words[0])
            assert found is not None, f"there is no command {' '.join(words)}"
            command, words = found, words[1:]
    options = {"--help", *(name for parameter in command.params
                           for name in (*parameter.opts, *parameter.secondary_opts))}
    for word in words:
        if word == "--":
            break  # what follows is another program's
        assert not word.startswith("--") or word in options, f"{command.name} has no option {word}"


def test_the_python_example_runs(tmp_path: Path) -> None:
    example = blocks(ROOT / "README.md", "python")[0]  # those on feeds and tasks: tests/system/test_readme.py
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    recording = os.urandom(21 * 1024 * 1024)
    (tmp_path / "recording.dat").write_bytes(recording)
    environ = {**os.environ, "KACHERY_STORAGE_DIR": str(tmp_path / "store")}
    done = subprocess.run([sys.executable, "-W", "error", "-c", example], cwd=tmp_path, env=environ,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    uri, path, length = done.stdout.splitlines()
    assert re.fullmatch(r"sha1://[0-9a-f]{40}/recording\.dat\?manifest=[0-9a-f]{40}", uri)
    assert Path(path).read_bytes() == recording
    assert length == "4096"


def test_joining_takes_no_more_than_three_commands_a_machine() -> None:
    section = (ROOT / "README.md").read_text("utf-8").partition("## A lab's channel")[2].partition("From then on")[0]
    commands = re.findall(r"^ {4}(kachery-fast .+)$", section, re.MULTILINE)
    assert commands[0].startswith("kachery-fast hub")
    assert [command.split()[1:3] for command in commands[1:]] == [["node", "start"], ["node", "join"]]


def test_the_speed_table_has_every_figure_and_its_date() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    table = re.search(r"<!-- bench:begin -->\n(.*)\n<!-- bench:end -->", text, re.DOTALL)
    assert table is not None
    assert re.search(r"^Measured on 20\d\d-\d\d-\d\d: ", table[1], re.MULTILINE)
    source = (ROOT / "benchmarks" / "__main__.py").read_text("utf-8")
    names = re.findall(r'^    "([a-z0-9-]+)": ', source, re.MULTILINE)
    assert len(names) > 10
    page = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    for name in names:
        assert re.search(rf"^\| `{name}` \| .*\d", table[1], re.MULTILINE), name
        assert f"| `{name}` |" in page, name


def test_the_picture_is_as_drawn_and_readable_on_dark_pages() -> None:
    committed = (ROOT / "docs" / "transfer.svg").read_text("utf-8")
    assert committed == script("make_pictures").transfer_picture(), "run python docs/make_pictures.py"
    assert "prefers-color-scheme: dark" in committed


def test_the_errors_page_is_as_generated() -> None:
    committed = (ROOT / "docs" / "errors.md").read_text("utf-8")
    assert committed == script("make_errors").errors_page(), "run python docs/make_errors.py"


# --- formats


def wire_examples() -> list[dict[str, Any]]:
    found = [json.loads(block) for block in blocks(ROOT / "docs" / "formats.md", "json")]
    return [example for example in found if "type" in example]


def test_every_message_has_an_example_that_the_program_reads() -> None:
    kinds = {**messages._band_bodies, **messages._hub_bodies}
    examples = {example["type"]: example for example in wire_examples()}
    assert examples.keys() == kinds.keys()
    for tag, example in examples.items():
        body = msgspec.convert(example, kinds[tag], strict=True)
        names = {field.encode_name for field in msgspec.structs.fields(kinds[tag])} | {"type"}
        assert set(example) <= names, f"the example of {tag} has fields of its own"
        again = msgspec.to_builtins(body)
        assert {**example, **json.loads(json.dumps(again))} == example


def test_every_field_of_a_message_is_on_the_page() -> None:
    text = (ROOT / "docs" / "formats.md").read_text("utf-8")
    for kind in [*messages._band_bodies.values(), *messages._hub_bodies.values(), hub_bodies.Member,
                 hub_bodies.ChannelInfo, hub_bodies.NodeConfig, hub_bodies.PubsubInfo, hub_bodies.PubsubToken,
                 hub_bodies.SignedObject, hub_bodies.TaskClaim, hub_bodies.ApprovalAsked,
                 hub_bodies.ApprovalState, feed_bodies.Segment]:
        for field in msgspec.structs.fields(kind):
            assert re.search(rf"`{field.encode_name}`|\"{field.encode_name}\"", text), f"{kind.__name__}.{field.name}"


def test_every_reason_of_a_failure_is_on_the_page() -> None:
    text = (ROOT / "docs" / "formats.md").read_text("utf-8")
    for kind in (bodies.Failed, feed_bodies.FeedFailed, task_bodies.TaskDeclined):
        assert all(f"`{reason}`" in text for reason in kind.REASONS)
    assert all(f"`{status}`" in text for status in task_bodies.TaskStatus.STATUSES)


def test_the_link_example_is_one() -> None:
    [example] = [block for block in blocks(ROOT / "docs" / "formats.md", "json") if '"path"' in block]
    record = parse_link(example.encode(), sha1="0" * 40, record_path="docs/formats.md")
    assert record.size == 300
    assert json.loads(record.encode()) == json.loads(example)
