"""The reference pages are those that the program makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kachery_fast.cli import reference
from kachery_fast.config import SETTINGS

DOCS = Path(__file__).parents[2] / "docs"
AGAIN = "run python -m kachery_fast.cli.reference and commit what it wrote"


def test_the_command_reference_is_up_to_date() -> None:
    assert (DOCS / "commands.md").read_text(encoding="utf-8") == reference.commands_page(), AGAIN


def test_the_settings_table_is_up_to_date() -> None:
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == reference.settings_page(), AGAIN


def test_every_setting_is_documented() -> None:
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    for setting in SETTINGS:
        assert setting.help.endswith((".", "?")), setting.name
        assert page.count(f"| `{setting.env}` |") == 1


def test_the_pages_are_written_where_told(tmp_path: Path) -> None:
    reference.main([str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["commands.md", "settings.md"]


@pytest.mark.parametrize("command", ["store", "link", "load", "cat", "why", "verify", "info", "node start", "node join",
                                     "node leave", "node stop", "hub", "channel create", "bench cpu"])
def test_every_command_has_a_section(command: str) -> None:
    assert f"# kachery-fast {command}\n" in reference.commands_page()
