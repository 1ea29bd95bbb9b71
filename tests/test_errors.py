"""The error tree: messages that say what to do, exit codes, and the way over HTTP and back."""

from __future__ import annotations

import inspect
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from kachery_fast import errors
from kachery_fast.errors import KacheryError, NodeError

CLASSES: list[type[KacheryError]] = [value for value in vars(errors).values()
                                     if isinstance(value, type) and issubclass(value, KacheryError)]
EXIT_CODES = {1, 2, 3, 4, 5, 6, 7, 8, 9, 130}


def details_of(kind: type[KacheryError]) -> dict[str, Any]:
    names = set(re.findall(r"\{(\w+)[^}]*\}", str(inspect.getdoc(kind))))
    return dict.fromkeys(names, "something")


def test_every_class_is_public_and_the_list_is_in_order() -> None:
    assert set(errors.__all__) == {kind.__name__ for kind in CLASSES}
    assert sorted(errors.__all__, key=str.lower) == sorted(set(errors.__all__), key=str.lower)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_docstring_is_the_message_with_its_details(kind: type[KacheryError]) -> None:
    error = kind(**details_of(kind))
    assert str(error) == error.message
    assert error.message.count("?") == str(inspect.getdoc(kind)).count("?")
    assert "{" not in error.message
    assert "\n" not in error.message
    if kind is not KacheryError:
        assert inspect.getdoc(kind) != inspect.getdoc(kind.__bases__[0]) or details_of(kind) == {"what": "something"}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_missing_detail_shows_as_a_question_mark_and_does_not_raise(kind: type[KacheryError]) -> None:
    assert kind().message


@pytest.mark.parametrize("kind", CLASSES)
def test_codes_are_among_those_that_are_documented(kind: type[KacheryError]) -> None:
    assert kind.exit_code in EXIT_CODES
    assert 400 <= kind.http_status < 600
    documented = {int(code) for code in re.findall(r"\b(\d+)\b", str(errors.__doc__).partition("Exit codes:")[2])}
    assert documented == EXIT_CODES


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_comes_back_over_http_as_what_it_was(kind: type[KacheryError]) -> None:
    error = kind(**details_of(kind), extra={"path": Path("/x"), "list": [1, None, {2}]})
    data = json.loads(json.dumps(error.to_dict()))
    back = KacheryError.from_dict(data)
    assert type(back) is kind
    assert back.message == error.message
    assert back.details["extra"] == {"path": "/x", "list": [1, None, [2]]}


def test_an_error_of_a_newer_node_keeps_its_text() -> None:
    back = KacheryError.from_dict({"error": "SomethingNew", "message": "It broke. Mend it."})
    assert isinstance(back, NodeError)
    assert "It broke. Mend it." in back.message


@pytest.mark.parametrize("data", [{}, {"error": None}, {"error": "NodeError", "details": None},
                                  {"error": "NotAvailable", "details": [1]}, {"error": 5, "message": 5}])
def test_nonsense_becomes_an_error_all_the_same(data: dict[str, Any]) -> None:
    assert KacheryError.from_dict(data).message


def test_a_detail_with_braces_is_not_a_template() -> None:
    assert NodeError(what="{path} {0} {").message == "The node failed: {path} {0} {"


def test_every_error_names_a_remedy_or_what_happened_in_a_sentence() -> None:
    for kind in CLASSES:
        text = " ".join(str(inspect.getdoc(kind)).split())
        assert text.endswith((".", "}", "?")) or "kachery-fast" in text, kind


def test_an_error_survives_the_way_between_processes() -> None:
    error = errors.NotInStore(sha1="0" * 40, store="/x")
    state = pickle.loads(pickle.dumps(error.to_dict()))
    assert KacheryError.from_dict(state).message == error.message
