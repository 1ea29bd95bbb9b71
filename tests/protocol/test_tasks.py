"""Tasks: what a task is known by, and which results and receipts are believed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_fast.errors import (
    BadMessage,
    InvalidArgument,
    InvalidName,
    ResultRefused,
    SignatureInvalid,
    TaskCrashed,
    TaskFailed,
    TaskHung,
    TooLarge,
)
from kachery_fast.protocol import tasks
from kachery_fast.protocol.canonical import canonical_bytes, object_sha1
from kachery_fast.protocol.signing import private_key, public_id, sign
from kachery_fast.protocol.task_errors import CRASHED, HUNG, error_report, task_error
from kachery_fast.protocol.tasks import (
    FUNCTION_LENGTH_MAX,
    TaskResult,
    canonical_kwargs,
    check_function,
    check_json,
    check_kind,
    check_kwargs,
    check_receipt,
    check_result,
    check_result_value,
    check_task_id,
    result_id,
    sign_receipt,
    sign_result,
    task_id,
)

KEY, OTHER = private_key(b"1" * 32), private_key(b"2" * 32)
NODE = public_id(KEY)
LAB = "lab"
ACTION = "ab" * 16
KWARGS: dict[str, Any] = {"uri": "sha1://" + "00" * 20, "bins": [1, 2.5], "deep": {"a": None}}
PURE = task_id("spikes.sort", KWARGS)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8)


def made(result: dict[str, Any] | None = None, **changed: Any) -> bytes:
    fields: dict[str, Any] = {
        "channel": LAB, "task": PURE, "function": "spikes.sort", "kind": "pure-calculation", "kwargs": KWARGS,
        "result": {"json": 1.0} if result is None else result, "started_ms": 10, "finished_ms": 20, "key": KEY,
        **changed}
    return sign_result(**fields)


def resigned(change: dict[str, Any], key: Any = KEY) -> bytes:
    """A result with a changed body, and a signature that holds."""
    body = msgspec.json.encode({**json.loads(made())["body"], **change})
    signature: str = key.sign(body).hex()
    return b'{"body":' + body + b',"signature":"' + signature.encode() + b'"}'


def refusal(data: bytes, found_as: str = PURE, channel: str = LAB) -> str:
    with pytest.raises(ResultRefused) as raised:
        check_result(data, found_as, channel)
    assert raised.value.details["task"] == found_as
    return raised.value.message


# --- identity


def test_a_calculation_is_known_by_its_function_and_arguments_as_in_2022() -> None:
    text = '{"functionId":"spikes.sort","kwargs":{"a":1,"b":"x"}}'
    assert task_id("spikes.sort", {"b": "x", "a": 1}) == hashlib.sha1(text.encode()).hexdigest()
    found_as = result_id("pure-calculation", "spikes.sort", {"a": 1, "b": "x"})
    assert found_as == task_id("spikes.sort", b'{"a":1,"b":"x"}')


def test_the_result_of_a_query_is_known_by_its_type_too_and_an_action_has_none() -> None:
    assert result_id("query", "f", {"a": 1}) == object_sha1({"functionId": "f", "kwargs": {"a": 1}, "type": "query"})
    with pytest.raises(InvalidArgument, match="action"):
        result_id("action", "f", {})


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_what_a_function_receives_depends_on_the_identity_alone(kwargs: dict[str, Any]) -> None:
    data = check_kwargs(kwargs, 1 << 20)
    received = canonical_kwargs(data)
    assert task_id("f", received) == task_id("f", data) == task_id("f", kwargs)
    # Over a band and back, as msgspec writes it.
    assert check_kwargs(msgspec.json.decode(msgspec.json.encode(received)), 1 << 20) == data


def test_whole_numbers_are_one_argument_however_they_are_written() -> None:
    assert canonical_kwargs(check_kwargs({"x": 1.0, "y": -0.0, "z": 1e20}, 100)) == {"x": 1, "y": 0, "z": 1e20}
    assert type(canonical_kwargs(check_kwargs({"x": 1.0}, 100))["x"]) is int
    assert type(canonical_kwargs(check_kwargs({"z": 1e20}, 100))["z"]) is float


@pytest.mark.parametrize(("kwargs", "place"), [
    ([1], "dict"), (None, "dict"), ({"a": {1: 2}}, "kwargs['a'] has a key"), ({"a": [0, {1, 2}]}, "kwargs['a'][1]"),
    ({"a": float("nan")}, "kwargs['a'] is nan"), ({"a": [float("inf")]}, "kwargs['a'][0] is inf"),
    ({"a": "\ud800"}, "kwargs['a']"), ({"\ud800": 1}, "a key of kwargs"), ({"a": b"x"}, "bytes"),
    ({"a": 2**53}, "beyond 9007199254740991"), ({"a": object()}, "object")])
def test_arguments_that_json_cannot_hold_are_refused_by_their_place(kwargs: Any, place: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        check_kwargs(kwargs, 1000)
    assert place in raised.value.message
    raised.value.message.encode()


def test_arguments_that_are_nested_too_deep_or_too_long_are_refused() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidArgument, match="200 deep"):
        check_kwargs({"a": deep}, 1 << 20)
    assert len(check_kwargs({"a": "x" * 92}, 100)) == 100
    with pytest.raises(TooLarge, match=r"101 bytes.*task_kwargs_size_bytes_max.*file"):
        check_kwargs({"a": "x" * 93}, 100)


@pytest.mark.parametrize("name", ["", " a", "a ", "a\n", "a\x1b[2J", "x" * (FUNCTION_LENGTH_MAX + 1), 5, "\ud800"])
def test_functions_need_names(name: Any) -> None:
    with pytest.raises(InvalidName) as raised:
        check_function(name)
    assert "task function" in raised.value.message
    assert check_function("spikes.sort v2") == "spikes.sort v2"


@pytest.mark.parametrize(("kind", "task"), [
    ("pure-calculation", "ab" * 16), ("action", "ab" * 20), ("query", "AB" * 16), ("action", 5),
    ("query", "ab" * 16 + "\n")])
def test_ids_have_their_length(kind: str, task: Any) -> None:
    with pytest.raises(InvalidName, match="hex digits"):
        check_task_id(kind, task)
    assert check_task_id("action", ACTION) == ACTION


@pytest.mark.parametrize("kind", ["", "pure", ["query"], None])
def test_there_are_three_kinds(kind: Any) -> None:
    with pytest.raises(InvalidArgument, match="pure-calculation, query, action"):
        check_kind(kind)


# --- results


@given(json_values)
def test_a_result_comes_back_as_it_was_made(value: Any) -> None:
    found = check_result(made({"json": value}), PURE, LAB)
    assert found == TaskResult(NODE, PURE, "spikes.sort", "pure-calculation", KWARGS, {"json": value}, 10, 20)
    assert repr(found.result) == repr({"json": value})  # 1.0 is no 1


def test_long_integers_and_files_can_be_results() -> None:
    assert check_result(made({"json": [2**70, -(2**64)]}), PURE, LAB).result == {"json": [2**70, -(2**64)]}
    file = {"file": "sha1://" + "ab" * 20 + "/result.npy", "format": "npy"}
    assert check_result(made(file), PURE, LAB).result == file


def test_a_query_keeps_its_task_and_the_place_of_its_arguments() -> None:
    found_as = result_id("query", "now", {})
    data = made(kind="query", task=ACTION, function="now", kwargs={})
    assert check_result(data, found_as, LAB).task == ACTION
    assert "another task" in refusal(data, task_id("now", {}))


@pytest.mark.parametrize("result", [
    {}, {"json": 1, "file": "x"}, {"json": float("nan")}, {"json": {1: 2}}, {"json": {"a": {1, 2}}}, [], None,
    {"value": 1},
    {"file": "sha1://short", "format": "npy"}, {"file": "sha1://" + "ab" * 20, "format": "pickle"},
    {"file": 5, "format": "npy"}, {"file": "sha1://" + "ab" * 20, "format": ["npy"]}])
def test_what_is_no_result_is_not_signed(result: Any) -> None:
    with pytest.raises(InvalidArgument):
        check_result_value(result)
    if isinstance(result, dict):
        with pytest.raises(InvalidArgument):
            made(result)


@pytest.mark.parametrize("change", [
    {"kind": "action"}, {"task": "ab" * 16}, {"function": ""}, {"channel": "no channel"}])
def test_a_result_of_nothing_is_not_signed(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        made(**change)


@pytest.mark.parametrize(("change", "why"), [
    ({"version": 2}, "version 2"), ({"channel": "other"}, "'other'"), ({"kwargs": {"bins": 3}}, "another task"),
    ({"function": "spikes.sort2"}, "another task"), ({"function": " "}, "task function"), ({"kind": "query"}, "32 hex"),
    ({"kind": "action", "task": "ab" * 16}, "not kept"), ({"task": "cd" * 20}, "another task"),
    ({"kwargs": [1]}, "kwargs"), ({"result": 5}, "result"), ({"result": {}}, "a result is"),
    ({"started": -1}, "started"),
    ({"result": {"file": "sha1://x", "format": "npy"}}, "SHA-1"), ({"node": "me"}, "name the node"),
    ({"node": public_id(OTHER)}, "not signed by"), ({"type": "other"}, "other"), ({"finished": 2**60}, "finished"),
    ({"kwargs": {"a": "\x00" * 10}}, "another task")])
def test_a_result_with_another_body_is_refused(change: dict[str, Any], why: str) -> None:
    assert why in refusal(resigned(change))


def test_a_result_is_not_believed_elsewhere() -> None:
    assert "another task" in refusal(made(), task_id("spikes.sort", {}))
    assert "channel" in refusal(made(), channel="other")


@given(st.data())
def test_no_changed_byte_is_believed(data: st.DataObject) -> None:
    good = made({"json": "text"})
    at = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[at] ^= data.draw(st.integers(1, 255))
    refusal(bytes(changed))
    refusal(good[:at])
    refusal(good + good[at:])


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    refusal(data)
    end = b',"signature":"' + b"0" * 128 + b'"}'
    refusal(b'{"body":' + data + end)


def test_long_arguments_are_refused_before_their_canonical_form_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long to make, and whoever may provide tasks can put such a result into another one's place."""
    long = resigned({"kwargs": {"a": [1.5e-9] * 30_000}})
    monkeypatch.setattr(tasks, "canonical_bytes", lambda _value: pytest.fail("it was made"))
    assert "kwargs are no object, or longer" in refusal(long)


def test_numbers_that_take_long_to_read_are_few_in_a_result() -> None:
    assert check_result(made({"json": [1e300] * 3000}), PURE, LAB).result == {"json": [1e300] * 3000}
    with pytest.raises(InvalidArgument, match="1e±270"):
        made({"json": [1e300] * 3001})
    assert "1e±270" in refusal(resigned({"result": {"json": [1e300] * 3001}}))


def test_deep_nesting_is_refused_and_no_crash() -> None:
    body = b'{"type":"taskResult","result":{"json":' + b"[" * 200_000
    refusal(b'{"body":' + body + b',"signature":"' + b"0" * 128 + b'"}')


# --- receipts


def receipt(**changed: Any) -> dict[str, Any]:
    return sign_receipt(**{"channel": LAB, "task": ACTION, "function": "mail", "kwargs": {"to": "me"},
                           "outcome": "finished", "error": None, "started_ms": 1, "finished_ms": 2, "key": KEY,
                           **changed})


def test_a_receipt_says_who_did_what_and_how_it_ended() -> None:
    found = check_receipt(receipt(), LAB, ACTION)
    assert (found.node_id, found.function, found.outcome, found.error) == (NODE, "mail", "finished", None)
    assert found.kwargs_sha1 == hashlib.sha1(b'{"to":"me"}').hexdigest()
    error = error_report("ValueError", "no such address", "Traceback …")
    failed = check_receipt(json.loads(json.dumps(receipt(outcome="error", error=error))), LAB, ACTION)
    assert (failed.outcome, failed.error, failed.started_ms, failed.finished_ms) == ("error", error, 1, 2)


@pytest.mark.parametrize("changed", [
    {"outcome": "unknown"}, {"outcome": "error"}, {"error": error_report("E", "")}, {"task": PURE}, {"function": ""}])
def test_what_is_no_outcome_is_not_signed(changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        receipt(**changed)


@pytest.mark.parametrize("change", [
    {"channel": "other"}, {"task": "cd" * 16}, {"version": 2}, {"outcome": "unknown"}, {"outcome": "error"},
    {"error": {"type": "E"}}, {"error": 5}, {"type": "other"}, {"started": "1"}])
def test_a_receipt_of_something_else_is_refused(change: dict[str, Any]) -> None:
    body = {**receipt()["body"], **change}
    with pytest.raises(BadMessage):
        check_receipt({"body": body, "signature": sign(body, KEY)}, LAB, ACTION)


@pytest.mark.parametrize("broken", [None, 5, "x", [], {}, {"body": 1, "signature": "x"},
                                    {"body": {}, "signature": "x"}])
def test_what_is_no_receipt_is_refused(broken: Any) -> None:
    with pytest.raises(BadMessage):
        check_receipt(broken, LAB, ACTION)


def test_a_forged_receipt_is_refused() -> None:
    good = receipt()
    for body in ({**good["body"], "node": public_id(OTHER)}, {**good["body"], "finished": 3}, {**good["body"], "x": 1}):
        with pytest.raises(SignatureInvalid):
            check_receipt({**good, "body": body}, LAB, ACTION)
    with pytest.raises(SignatureInvalid):
        check_receipt({**good, "body": {**good["body"], "node": "me"}}, LAB, ACTION)


# --- errors


@given(st.text(max_size=20), st.text(max_size=5000), st.text(max_size=20_000))
def test_an_error_fits_a_message_twice(kind: str, message: str, traceback: str) -> None:
    report = error_report(kind, message, traceback)
    assert len(msgspec.json.encode(report)) < 12_000
    assert len(msgspec.json.encode(error_report(kind * 40, "\x00" * 5000, "\x00\ud800" * 20_000))) < 12_000
    assert len(canonical_bytes(report)) < 12_000


def test_the_end_of_a_long_traceback_is_kept() -> None:
    report = error_report("E", "m" * 3000, "first\n" + "x\n" * 10_000 + "the last line")
    assert report["traceback"].startswith("…")
    assert report["traceback"].endswith("the last line")
    assert report["message"].startswith("mmm")
    assert report["message"].endswith("…")
    assert error_report("E", "short", "tb") == {"type": "E", "message": "short", "traceback": "tb"}


def test_reports_become_errors() -> None:
    raised = task_error("f", error_report("ValueError", "bad", "Traceback\n  line"), node="n")
    assert type(raised) is TaskFailed
    assert raised.message == "'f' raised ValueError: bad"
    assert raised.details["traceback"] == "Traceback\n  line"
    assert raised.details["node"] == "n"
    assert isinstance(task_error("f", error_report(CRASHED, "signal 9")), TaskCrashed)
    hung = task_error("f", error_report(HUNG, "it had 2.5 s"))
    assert isinstance(hung, TaskHung)
    assert "2.5 s" in hung.message
    assert task_error("f", {}).message.startswith("'f' raised an error")


def test_what_comes_from_another_node_steers_no_terminal() -> None:
    error = task_error("f", {"type": "\x1b[31mE", "message": "a\x1b[2Jb", "traceback": "one\n\ttwo\x07"})
    assert error.details["type"] == " [31mE"
    assert error.details["reason"] == "a [2Jb"
    assert error.details["traceback"] == "one\n\ttwo "


def test_values_can_be_held_to_json_without_a_bound_on_integers() -> None:
    check_json({"a": (1, 2**80, [1.5, None, True])}, "it")
    with pytest.raises(InvalidArgument, match=r"it\[1\]"):
        check_json([1.0, float("inf")], "it")
