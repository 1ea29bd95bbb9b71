"""Envelopes on the bands and to the hub: round trips, what is refused, and what a hostile one can cost."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_fast.errors import BadMessage, SignatureInvalid
from kachery_fast.protocol import bodies as b
from kachery_fast.protocol import feed_bodies as f
from kachery_fast.protocol import hub_bodies as h
from kachery_fast.protocol import messages as m
from kachery_fast.protocol import task_bodies as t
from kachery_fast.protocol.signing import private_key, public_id, sign, sign_2022

KEY = private_key(bytes(range(32)))
OTHER = private_key(bytes(range(1, 33)))
SHA1 = "025b4666424a0116c45970c27af4e2f90177af69"
FEED = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
STAMP: dict[str, Any] = {"channel": "lab", "time": 1, "id": "0" * 32}
BODIES: list[m.BandBody] = [
    b.Want(**STAMP, request="r", sha1=SHA1, manifest=SHA1),
    b.Assign(**STAMP, request="r", provider="p", sha1=SHA1, chunks=[(0, 3), (5, 6)], send_manifest=True),
    b.Cancel(**STAMP, request="r"),
    b.Offer(**STAMP, request="r", sha1=SHA1, size=2**60, load=3),
    b.Ready(**STAMP, request="r", chunks=[(0, 1)], manifest_ready=True),
    b.Progress(**STAMP, request="r", bytes=1, queued=2),
    b.Failed(**STAMP, request="r", reason="busy", detail="é"),
    b.RequestFile2022(file_key={"sha1": SHA1}),
    b.UploadFileStatus2022(file_key={"sha1": SHA1}, status="started"),
    f.FeedSubscribe(**STAMP, request="r", feed_id=FEED, subfeed=SHA1, position=2**40, live=True),
    f.FeedShared(**STAMP, request="r", feed_id=FEED, subfeed=SHA1, head={"body": {"count": 5}},
                 segments=[f.Segment(0, 3, 700, SHA1), f.Segment(3, 5, 500, SHA1)]),
    f.FeedMessages(**STAMP, request="", feed_id=FEED, subfeed=SHA1, first=3, messages=[{"body": {"é": 1.5}}]),
    f.FeedFailed(**STAMP, request="r", feed_id=FEED, subfeed=SHA1, reason="forked", detail="at 7"),
    t.TaskRequest(**STAMP, request="r", task=SHA1, function="add.1", kind="pure-calculation", kwargs={"a": [1, None]}),
    t.TaskCancel(**STAMP, request="r", task="0" * 32),
    t.TaskStatus(**STAMP, task=SHA1, status="running", progress=0.5, text="half"),
    t.TaskStatus(**STAMP, task=SHA1, status="error", error={"type": "E", "message": "m", "traceback": "t"},
                 receipt={"body": {}}),
    t.TaskDeclined(**STAMP, request="r", task=SHA1, reason="unregistered", detail="sub.1"),
]
OF_TAG = {msgspec.to_builtins(body)["type"]: body for body in reversed(BODIES)}
HUB_BODIES: list[h.HubBody] = [
    h.JoinChannel(**STAMP, invitation="code", label="rig", permissions=["all"]),
    h.AskApproval(**STAMP, label="rig", version="1", permissions=["all"]), h.FindApproval(**STAMP),
    h.LeaveChannel(**STAMP), h.GetNodeConfig(**STAMP, label="rig", version="1"), h.GetPubsubToken(**STAMP),
    h.SignUploads(**STAMP, objects=[h.ObjectSpec(SHA1, 5)]),
    h.SignFeedUploads(**STAMP, feed_id=FEED, subfeed=SHA1, segments=[h.ObjectSpec(SHA1, 5)], index_size_bytes=9),
    h.SignFeedUploads(**STAMP, feed_id=FEED, subfeed=SHA1),
    h.SignTaskResult(**STAMP, result_id=SHA1, size=100, replace=True),
    h.SignDownloads(**STAMP, object_kind="segment", sha1s=[SHA1, SHA1], feed_id=FEED, subfeed=SHA1, head=True),
    h.SignDownloads(**STAMP, object_kind="file", sha1s=[]),
    h.ReportCorrupt(**STAMP, sha1=SHA1, found=SHA1, feed_id=FEED, subfeed=SHA1),
    h.ReportCorrupt(**STAMP, sha1=SHA1, found=""),
    h.ReportBadResult(**STAMP, result_id=SHA1),
    h.ClaimTask(**STAMP, task=SHA1, kind="action", function="park.1", idempotent=True, attempt="a"),
    h.KeepTasks(**STAMP, tasks=[SHA1, "0" * 32]),
    h.FinishTask(**STAMP, task=SHA1, state="finished", receipt={"body": {}}),
    h.FindTask(**STAMP, task=SHA1),
]
HUB_OF_TAG = {msgspec.to_builtins(body)["type"]: body for body in HUB_BODIES}
# What each kind of field may not be. (None is tried where a field may not be left out.)
BAD_TEXTS = ["", 5, ["x"]]
BAD_SHA1S = [*BAD_TEXTS, SHA1.upper(), SHA1[1:], SHA1 + "0", "../" + SHA1]
BAD_FEEDS = [*BAD_TEXTS, FEED.upper(), FEED[1:], SHA1]
BAD_IDS = [*BAD_TEXTS, "r" * 65]
BAD_COUNTS = [-1, 2**53 + 1, "1", 1.5, 10**30]
BAD_LISTS = [5, "text", {"a": 1}, [5], ["x"], [[]]]
BAD_OBJECTS = [5, "text", [1]]
BAD_OBJECT_LISTS = [*BAD_LISTS, [{"sha1": "x", "size": 1}], [{"sha1": SHA1, "size": -1}], [{"sha1": SHA1}]]
SEGMENT = {"first": 0, "end": 3, "size": 7, "sha1": SHA1}
BAD_SEGMENTS = [*BAD_LISTS, *([{**SEGMENT, **changes}] for changes in (
    {"first": 3}, {"first": 4}, {"first": -1}, {"end": 2**53 + 1}, {"end": "3"}, {"size": -1}, {"sha1": "x"},
    {"sha1": None}))]
MALFORMED: dict[str, dict[str, list[Any]]] = {
    "feedSubscribe": {"request": BAD_IDS, "feedId": BAD_FEEDS, "subfeed": BAD_SHA1S, "position": BAD_COUNTS,
                      "live": [5, "yes"]},
    "feedShared": {"request": ["r" * 65, 5], "feedId": BAD_FEEDS, "subfeed": BAD_SHA1S, "head": BAD_OBJECTS,
                   "segments": BAD_SEGMENTS},
    "feedMessages": {"request": ["r" * 65, 5], "feedId": BAD_FEEDS, "subfeed": BAD_SHA1S, "first": BAD_COUNTS,
                     "messages": BAD_LISTS, "head": BAD_OBJECTS},
    "feedFailed": {"request": BAD_IDS, "feedId": BAD_FEEDS, "subfeed": BAD_SHA1S, "reason": [5, None],
                   "detail": [5, None]},
    "taskRequest": {"request": BAD_IDS, "task": BAD_IDS, "function": [*BAD_TEXTS, "f" * 201],
                    "kind": [*BAD_TEXTS, "pure", "Action"], "kwargs": [5, "text", [1], None]},
    "taskCancel": {"request": BAD_IDS, "task": BAD_IDS},
    "taskStatus": {"task": BAD_IDS, "status": [*BAD_TEXTS, "paused", "Running"], "progress": ["half", [1]],
                   "text": [5, None], "error": [*BAD_OBJECTS, {"type": 5}], "receipt": BAD_OBJECTS},
    "taskDeclined": {"request": BAD_IDS, "task": BAD_IDS, "reason": [5, None], "detail": [5, None]},
}
BAD_CRCS = [-1, 2**32, "1", 1.5, []]
HUB_MALFORMED: dict[str, dict[str, list[Any]]] = {
    "signUploads": {"objects": BAD_OBJECT_LISTS},
    "signFeedUploads": {"feedId": BAD_FEEDS, "subfeed": BAD_SHA1S, "indexSizeBytes": BAD_COUNTS,
                        "segments": BAD_OBJECT_LISTS, "indexCrc32c": BAD_CRCS},
    "signTaskResult": {"resultId": BAD_SHA1S, "size": [-1, "1", 1.5, None], "replace": [5, "yes"],
                       "crc32c": BAD_CRCS},
    "signDownloads": {"objectKind": [*BAD_TEXTS, "chunk"], "sha1s": [5, SHA1, [5], ["x"], [SHA1, SHA1.upper()]],
                      "feedId": ["x", 5, SHA1], "subfeed": ["x", 5, FEED], "head": [5, "yes"]},
    "reportCorrupt": {"sha1": BAD_SHA1S, "found": ["x", 5], "feedId": ["x", 5, SHA1], "subfeed": ["x", 5, FEED]},
    "reportBadResult": {"resultId": BAD_SHA1S},
    "claimTask": {"task": BAD_IDS, "kind": [*BAD_TEXTS, "pure"], "function": [*BAD_TEXTS, "f" * 201],
                  "idempotent": [5, "yes"], "attempt": ["r" * 65, 5]},
    "keepTasks": {"tasks": [5, "text", [5], [""], ["r" * 65]]},
    "finishTask": {"task": BAD_IDS, "state": [5, None, "", "running", "claimed"], "receipt": BAD_OBJECTS,
                   "attempt": ["r" * 65, 5]},
    "findTask": {"task": BAD_IDS},
}


def each_bad(table: dict[str, dict[str, list[Any]]]) -> list[Any]:
    return [pytest.param(tag, name, value, id=f"{tag}-{name}-{str(value)[:30]}")
            for tag, fields in table.items() for name, values in fields.items() for value in values]


def decode(data: bytes, **options: Any) -> list[Any]:
    return m.decode_band(data, size_bytes_max=100_000, **options)


def envelope(body: dict[str, Any], key: Any = KEY, **changes: Any) -> bytes:
    return json.dumps({"body": body, "fromNodeId": public_id(key), "signature": sign(body, key), **changes}).encode()


def test_every_body_comes_back_with_its_sender() -> None:
    assert decode(m.encode_band(BODIES, KEY)) == [(body, public_id(KEY)) for body in BODIES]


def test_the_wire_form_of_2022_is_kept() -> None:
    data = json.loads(m.encode_band([BODIES[8]], KEY))
    assert data["messages"][0]["body"] == {
        "type": "uploadFileStatus", "fileKey": {"sha1": SHA1}, "status": "started"}
    assert data["messages"][0]["signature"] == sign_2022(data["messages"][0]["body"], KEY)


def test_a_lone_envelope_is_read_as_in_2022() -> None:
    body = {"type": "requestFile", "fileKey": {"sha1": SHA1}}
    data = json.dumps({"body": body, "fromNodeId": public_id(KEY), "signature": sign_2022(body, KEY)}).encode()
    assert decode(data) == [(BODIES[7], public_id(KEY))]


def test_a_body_of_ours_signed_as_in_2022_is_refused() -> None:
    body = msgspec.to_builtins(BODIES[0])
    data = json.dumps({"body": body, "fromNodeId": public_id(KEY), "signature": sign_2022(body, KEY)}).encode()
    assert isinstance(decode(data)[0], SignatureInvalid)


def test_a_key_that_a_newer_node_adds_is_covered_by_the_signature_and_ignored() -> None:
    body = {**msgspec.to_builtins(BODIES[2]), "urgency": 5}
    assert decode(envelope(body)) == [(BODIES[2], public_id(KEY))]
    stripped = json.loads(envelope(body))
    del stripped["body"]["urgency"]
    assert isinstance(decode(json.dumps(stripped).encode())[0], SignatureInvalid)


def test_kinds_of_other_versions_are_skipped_in_silence() -> None:
    assert decode(envelope({"type": "subscribeToSubfeed"})) == []
    assert decode(envelope({"type": 5})) == []
    assert decode(envelope({})) == []


def test_one_bad_message_does_not_spoil_the_others() -> None:
    batch = json.loads(m.encode_band([BODIES[0], BODIES[2], BODIES[3]], KEY))
    batch["messages"][1]["signature"] = "00" * 64
    first, second, third = decode(json.dumps(batch).encode())
    assert (first, third) == ((BODIES[0], public_id(KEY)), (BODIES[3], public_id(KEY)))
    assert isinstance(second, SignatureInvalid)


@pytest.mark.parametrize("data", [
    b"", b"{", b"\xff", b"5", b"[]", b"null", b'{"messages":5}', b'{"messages":[5]}', b'{"messages":[{}]}',
    b"[" * 90_000, b'{"body":{},"fromNodeId":5,"signature":""}',
    b'{"body":{},"fromNodeId":"","signature":"","extra":1}', b" " * 100_001,
])
def test_what_is_no_message_is_one_error_each(data: bytes) -> None:
    assert all(isinstance(entry, BadMessage) for entry in decode(data))
    assert len(decode(data)) == 1


@pytest.mark.parametrize("changes", [
    {"sha1": "x"}, {"sha1": SHA1.upper()}, {"manifest": "../x"}, {"request": ""}, {"request": "r" * 65}, {"request": 5},
    {"id": ""}, {"id": "0" * 65}, {"time": "1"}, {"time": 2**60}, {"time": -(2**60)}, {"time": 10**30},
    {"channel": 5},
])
def test_fields_out_of_bounds_are_refused_though_signed(changes: dict[str, Any]) -> None:
    body = {**msgspec.to_builtins(BODIES[0]), **changes}
    assert isinstance(decode(envelope(body))[0], BadMessage)


@pytest.mark.parametrize(("tag", "name", "value"), each_bad(MALFORMED))
def test_each_field_of_feeds_and_tasks_is_refused_when_malformed(tag: str, name: str, value: Any) -> None:
    body = msgspec.to_builtins(OF_TAG[tag])
    assert decode(envelope(body)) == [(OF_TAG[tag], public_id(KEY))]
    (found,) = decode(envelope({**body, name: value}))
    assert isinstance(found, BadMessage)
    assert tag in str(found)


def test_each_field_of_a_body_of_feeds_and_tasks_has_been_tried() -> None:
    stamps = {"type", "channel", "time", "id"}
    for tag, fields in MALFORMED.items():
        assert set(fields) == set(type(OF_TAG[tag]).__struct_encode_fields__) - stamps
    for tag, fields in HUB_MALFORMED.items():
        assert set(fields) == set(type(HUB_OF_TAG[tag]).__struct_encode_fields__) - stamps
    assert {tag for tag in OF_TAG if tag.startswith(("feed", "task"))} == set(MALFORMED)
    assert set(OF_TAG) == set(m._band_bodies)
    assert set(HUB_OF_TAG) == set(m._hub_bodies)


@pytest.mark.parametrize("tag", sorted(MALFORMED))
def test_fields_that_a_body_needs_cannot_be_left_out(tag: str) -> None:
    body = msgspec.to_builtins(OF_TAG[tag])
    for name in type(OF_TAG[tag]).__struct_encode_fields__:
        left = {key: value for key, value in body.items() if key != name}
        (found,) = decode(envelope(left))
        optional = name in ("channel", "live", "head", "messages", "detail", "kwargs", "progress", "text", "error",
                            "receipt")
        assert isinstance(found, BadMessage) != optional, name


@pytest.mark.parametrize("ranges", [[[0, 0]], [[1, 0]], [[-1, 5]], [[0, 2**41]], [[0, 10**30]], [[0]], [[0, 1, 2]], 5])
def test_ranges_that_are_none_are_refused(ranges: Any) -> None:
    body = {**msgspec.to_builtins(BODIES[4]), "chunks": ranges}
    assert isinstance(decode(envelope(body))[0], BadMessage)


def test_what_concerns_nobody_here_is_skipped_before_its_signature_is_checked() -> None:
    batch = json.loads(m.encode_band([BODIES[1], BODIES[2]], KEY))
    batch["messages"][0]["signature"] = "00" * 64
    seen = []

    def concerns(body: dict[str, Any]) -> bool:
        seen.append(body["type"])
        return bool(body["type"] != "assign")

    assert decode(json.dumps(batch).encode(), concerns=concerns) == [(BODIES[2], public_id(KEY))]
    assert seen == ["assign", "cancel"]


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    assert all(isinstance(entry, (tuple, BadMessage, SignatureInvalid)) for entry in decode(data))


# --- to the hub


@pytest.mark.parametrize("body", HUB_BODIES, ids=lambda body: type(body).__name__)
def test_a_request_to_the_hub_comes_back(body: h.HubBody) -> None:
    assert m.decode_hub_request(m.encode_hub_request(body, KEY)) == (body, public_id(KEY))


@pytest.mark.parametrize(("tag", "name", "value"), each_bad(HUB_MALFORMED))
def test_each_field_of_a_request_to_the_hub_is_refused_when_malformed(tag: str, name: str, value: Any) -> None:
    body = {**msgspec.to_builtins(HUB_OF_TAG[tag]), name: value}
    data = json.dumps({"body": body, "nodeId": public_id(KEY), "signature": sign(body, KEY)}).encode()
    with pytest.raises(BadMessage, match=tag):
        m.decode_hub_request(data)


def test_a_request_signed_by_another_node_is_refused() -> None:
    data = json.loads(m.encode_hub_request(h.GetNodeConfig(**STAMP), OTHER))
    data["nodeId"] = public_id(KEY)
    with pytest.raises(SignatureInvalid):
        m.decode_hub_request(json.dumps(data).encode())


def test_numbers_that_take_long_to_read_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"type": "findTask", "time": 1, "id": "i", "channel": "lab", "task": "t", "more": [1e300] * 1000}
    request = {"body": body, "nodeId": public_id(KEY), "signature": sign(body, KEY)}
    said = {"body": {**body, "type": "taskCancel", "request": "r"}, "fromNodeId": public_id(KEY),
            "signature": "0" * 128}
    monkeypatch.setattr(msgspec.json, "decode", lambda *_arguments, **_named: pytest.fail("30 ms for 6 kB"))
    assert m.decode_hub_request(json.dumps(request).encode())[1] == public_id(KEY)
    (refused,) = m.decode_band(json.dumps(said).encode(), size_bytes_max=100_000)
    assert isinstance(refused, SignatureInvalid)


def test_an_unknown_request_is_named() -> None:
    body = {"type": "fry", **STAMP}
    data = json.dumps({"body": body, "nodeId": public_id(KEY), "signature": sign(body, KEY)}).encode()
    with pytest.raises(BadMessage, match="fry"):
        m.decode_hub_request(data)


# --- ranges


@given(st.lists(st.integers(0, 300)))
def test_ranges_are_compressed_and_expanded_again(indices: list[int]) -> None:
    ranges = b.compress(indices)
    assert b.expand(ranges, 301) == sorted(set(indices))
    assert all(first < end for first, end in ranges)
    assert all(a[1] < b[0] for a, b in pairwise(ranges))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30))), st.integers(0, 60))
def test_overlaps_and_what_lies_beyond_count_once_or_not_at_all(pairs: list[tuple[int, int]], count: int) -> None:
    ranges = [(first, first + length) for first, length in pairs]
    expected = sorted({index for first, end in ranges for index in range(first, min(end, count))})
    assert b.expand(ranges, count) == expected


def test_hostile_ranges_cost_no_more_than_the_file_is_long() -> None:
    started = time.perf_counter()
    assert len(b.expand([(0, 1 << 40)] * 5_000, 100_000)) == 100_000
    assert time.perf_counter() - started < 5
