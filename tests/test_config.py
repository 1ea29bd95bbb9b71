"""The settings table."""

from __future__ import annotations

import dataclasses
import socket
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


def test_what_changes_between_two_calls_counts_in_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KACHERY_STORAGE_DIR", "store")
    monkeypatch.setenv("KACHERY_CHANNEL", "lab")
    monkeypatch.chdir(tmp_path)
    first = load_settings()
    assert load_settings() is first
    assert (first.storage_dir, first.channel) == (tmp_path / "store", "lab")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert load_settings().storage_dir == tmp_path / "below" / "store"
    monkeypatch.setenv("KACHERY_STORAGE_DIR", "~/store")
    assert load_settings().storage_dir == tmp_path / "home" / "store"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings().storage_dir == tmp_path / "store"
    monkeypatch.setenv("KACHERY_CHANNEL", "other")
    assert load_settings().channel == "other"
    assert load_settings(channel="lab").channel == "lab"
    assert load_settings({}).channel == ""
    assert load_settings().channel == "other"
    monkeypatch.setenv("KACHERY_DAEMON_PORT", "x")
    for _ in range(2):
        with pytest.raises(InvalidSetting, match="KACHERY_DAEMON_PORT"):
            load_settings()
    monkeypatch.delenv("KACHERY_DAEMON_PORT")
    monkeypatch.delenv("HOME")
    assert load_settings().storage_dir == Path("~/store").expanduser()


def test_settings_are_read_where_the_working_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setenv("KACHERY_STORAGE_DIR", str(tmp_path / "store"))
    (tmp_path / "gone").rmdir()
    assert load_settings().storage_dir == load_settings().storage_dir == tmp_path / "store"
    monkeypatch.chdir(tmp_path)  # so that it can be gone back to


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("text", ["x", "-1e9", "nan", "inf", "-inf", "1e300", "9" * 20,
                                  "1,5", " "])
def test_a_number_that_is_none_or_out_of_bounds_is_refused_and_named(setting: Setting, text: str) -> None:
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


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.name)
def test_every_maximum_is_allowed_and_what_is_above_it_is_not(setting: Setting) -> None:
    largest = type(setting.default)(setting.maximum)
    if setting.name == "chunk_size_bytes":
        largest -= largest % 64
    assert getattr(load_settings({}, **{setting.name: largest}), setting.name) == largest
    for value in (setting.maximum + 64, float("inf")):
        with pytest.raises(InvalidSetting):
            load_settings({}, **{setting.name: value})


@pytest.mark.parametrize("name", ["node_port", "hub_port"])
def test_a_port_is_one_of_65536(name: str) -> None:
    env = BY_NAME[name].env
    assert getattr(load_settings({env: "65535"}), name) == 65535
    with pytest.raises(InvalidSetting, match="at most 65535 port"):
        load_settings({env: "65536"})
    with pytest.raises(InvalidSetting):
        load_settings({env: "-1"})


def test_a_socket_takes_the_longest_time() -> None:
    with socket.socket() as connection:
        connection.settimeout(max(setting.maximum for setting in SETTINGS if setting.unit == "seconds"))
        assert connection.connect_ex(("127.0.0.1", 1)) != 0


@pytest.mark.parametrize(("text", "host"), [
    ("127.0.0.2", "127.0.0.2"), ("localhost", "localhost"), ("Rig-2.lab.example.", "Rig-2.lab.example."),
    ("my_rig", "my_rig"), ("::1", "::1"), ("[::1]", "::1"), ("fe80::1%eth0", "fe80::1%eth0"),
    ("::ffff:10.0.0.1", "::ffff:10.0.0.1"), ("münchen.example", "münchen.example"), ("a" * 63, "a" * 63),
])
@pytest.mark.parametrize("name", ["node_host", "hub_host"])
def test_a_host_is_a_name_or_an_address(name: str, text: str, host: str) -> None:
    assert getattr(load_settings({BY_NAME[name].env: text}), name) == host


@pytest.mark.parametrize("text", ["bad host", "a..b", ".a", " ", "a\nb", "a/b", "http://a", "a:b:x", "127.0.0.1:80",
                                  "a" * 64, "ä" * 64, "ä..b", "ä b", "\udc80", "[", "[]", "a@b", "a?b", "\0"])
@pytest.mark.parametrize("name", ["node_host", "hub_host"])
def test_what_no_host_can_be_called_is_refused(name: str, text: str) -> None:
    with pytest.raises(InvalidSetting, match="a host's name or address"):
        load_settings({BY_NAME[name].env: text})


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
