"""The settings table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.config import SETTINGS, Setting, Settings, load_settings
from kachery_fast.errors import InvalidSetting

BY_NAME = {setting.name: setting for setting in SETTINGS}
NUMBERS = [setting for setting in SETTINGS if isinstance(setting.default, int | float)]
UNITS = {"seconds": "_seconds", "bytes": "_bytes", "days": "_days"}


def test_the_table_and_the_object_agree_in_order() -> None:
    assert [setting.name for setting in SETTINGS] == [field.name for field in dataclasses.fields(Settings)]


def test_names_and_variables_are_unique_and_follow_the_rule() -> None:
    assert len({setting.env for setting in SETTINGS}) == len(SETTINGS)
    exceptions = {"node_host": "KACHERY_DAEMON_HOST", "node_port": "KACHERY_DAEMON_PORT"}  # as in 2022
    for setting in SETTINGS:
        assert setting.env == exceptions.get(setting.name, f"KACHERY_{setting.name.upper()}")
        assert setting.help.endswith(".")
        if setting.unit in UNITS:
            assert UNITS[setting.unit] in setting.name


def test_defaults_are_usable() -> None:
    settings = load_settings({})
    for setting in SETTINGS:
        value = getattr(settings, setting.name)
        assert isinstance(value, Path if setting.unit == "path" else type(setting.default))
    assert settings.node_port == 20431
    assert settings.chunk_size_bytes == 20 * 1024 * 1024
    assert settings.storage_dir == Path.home() / "kachery-storage"


def test_the_environment_comes_before_defaults_and_a_call_before_the_environment() -> None:
    environ = {"KACHERY_DAEMON_PORT": "5", "KACHERY_CHANNEL": "lab", "KACHERY_STORAGE_DIR": "~/x",
               "KACHERY_STALL_SECONDS": "1.5", "KACHERY_HUB_HOST": ""}
    settings = load_settings(environ)
    assert (settings.node_port, settings.channel, settings.stall_seconds) == (5, "lab", 1.5)
    assert settings.storage_dir == Path.home() / "x"
    assert settings.hub_host == "127.0.0.1"
    assert load_settings(environ, node_port=6, channel=None).node_port == 6
    assert load_settings(environ, channel=None).channel == "lab"


def test_a_relative_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings({"KACHERY_STORAGE_DIR": "store"}).storage_dir == tmp_path / "store"


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("text", ["x", "-1e9", "nan", "1,5", " "])
def test_a_number_that_is_none_or_too_small_is_refused_and_named(setting: Setting, text: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        load_settings({setting.env: text})
    assert setting.env in caught.value.message
    assert setting.name in caught.value.message


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.name)
def test_every_minimum_is_allowed_and_what_is_below_it_is_not(setting: Setting) -> None:
    smallest = type(setting.default)(setting.minimum)
    if setting.name == "chunk_size_bytes":
        smallest = 64
    assert getattr(load_settings({}, **{setting.name: smallest}), setting.name) == smallest
    with pytest.raises(InvalidSetting):
        load_settings({}, **{setting.name: smallest - 1})


@pytest.mark.parametrize("value", [63, 65, 20_000_001])
def test_a_chunk_is_a_multiple_of_the_hash_block(value: int) -> None:
    with pytest.raises(InvalidSetting):
        load_settings({}, chunk_size_bytes=value)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="there is no such setting"):
        load_settings({}, colour="blue")


def test_settings_are_frozen() -> None:
    settings: Any = load_settings({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.node_port = 1
