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
from kachery_fast.protocol import hub_bodies as h
from kachery_fast.protocol import messages as m
from kachery_fast.protocol.signing import private_key, public_id, sign, sign_2022

KEY = private_key(bytes(range(32)))
OTHER = private_key(bytes(range(1, 33)))
SHA1 = "025b4666424a0116c45970c27af4e2f90177af69"
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
]


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


def test_a_request_to_the_hub_comes_back() -> None:
    body = h.SignUploads(**STAMP, objects=[h.ObjectSpec(SHA1, 5)])
    assert m.decode_hub_request(m.encode_hub_request(body, KEY)) == (body, public_id(KEY))


def test_a_report_need_not_know_what_the_bytes_are() -> None:
    body = h.ReportCorrupt(**STAMP, sha1=SHA1, found="")
    assert m.decode_hub_request(m.encode_hub_request(body, KEY))[0] == body


@pytest.mark.parametrize("item", [{"sha1": "x", "size": 1}, {"sha1": SHA1, "size": -1}, {"sha1": SHA1}])
def test_objects_out_of_bounds_are_refused(item: dict[str, Any]) -> None:
    body = {**msgspec.to_builtins(h.SignUploads(**STAMP, objects=[])), "objects": [item]}
    data = json.dumps({"body": body, "nodeId": public_id(KEY), "signature": sign(body, KEY)}).encode()
    with pytest.raises(BadMessage):
        m.decode_hub_request(data)


def test_a_request_signed_by_another_node_is_refused() -> None:
    data = json.loads(m.encode_hub_request(h.GetNodeConfig(**STAMP), OTHER))
    data["nodeId"] = public_id(KEY)
    with pytest.raises(SignatureInvalid):
        m.decode_hub_request(json.dumps(data).encode())


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
