"""The chain of a feed: what extends it, what is refused and why, and what a fork is."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kachery_fast.errors import FeedChainBroken, FeedInvalid, HeadInvalid, InvalidArgument, TooLarge
from kachery_fast.protocol.canonical import canonical_bytes
from kachery_fast.protocol.feed_segments import SEGMENT_SIZE_BYTES_MAX
from kachery_fast.protocol.feeds import (
    Extension,
    Fork,
    Tail,
    extend,
    payload,
    read_head,
    sign_head,
    sign_messages,
    signature_of,
    tail_after,
)
from kachery_fast.protocol.signing import sign, sign_2022, verify

from .chains import ELSEWHERE, FEED, KEY, OTHER, START, SUBFEED, TIME_MS, mixed, of_2022, ours, plain, resigned
from .test_canonical import VECTORS

CONTENTS: list[dict[str, Any]] = [{"i": 0}, {"é": [1.5, None, True]}, {}, {"nested": {"~": "😀"}}]
CHAIN = ours(CONTENTS)


def tail_of(chain: list[bytes], count: int) -> Tail:
    return tail_after(FEED, SUBFEED, chain[count - 1]) if count else START


def add(batch: list[Any], first: int = 0, *, held: list[bytes] | None = None, subfeed: str = SUBFEED) -> Extension:
    found = take(batch, first, held=held, subfeed=subfeed)
    assert isinstance(found, Extension)
    return found


def take(batch: list[Any], first: int, *, held: list[bytes] | None = None, subfeed: str = SUBFEED) -> Extension | Fork:
    held = held or []
    tail = tail_of(held, len(held)) if held else Tail(FEED, subfeed)
    return extend(tail, first, batch, held.__getitem__)


def reason(found: Extension) -> str:
    assert isinstance(found.error, FeedInvalid)
    return str(found.error.details.get("why", found.error))


# --- signing


def test_a_signed_message_is_canonical_and_binds_number_time_subfeed_and_the_one_before() -> None:
    for number, (data, content) in enumerate(zip(CHAIN, CONTENTS, strict=True)):
        signed = json.loads(data)
        assert data == canonical_bytes(signed)
        assert signed["body"] == {
            "message": content, "messageNumber": number, "subfeed": SUBFEED, "timestamp": TIME_MS, "version": 2,
            **({"previousSignature": json.loads(CHAIN[number - 1])["signature"]} if number else {})}
        assert signature_of(data) == signed["signature"]
        assert verify(signed["body"], signed["signature"], FEED)  # the canonical bytes themselves, not their SHA-1
        assert payload(data) == payload(signed) == content


def test_signing_goes_on_where_it_ended() -> None:
    first, tail = sign_messages(START, CONTENTS[:2], KEY, TIME_MS)
    rest, end = sign_messages(tail, CONTENTS[2:], KEY, TIME_MS)
    assert [*first, *rest] == CHAIN
    assert end == tail_of(CHAIN, 4) == Tail(FEED, SUBFEED, 4, signature_of(CHAIN[3]), 2)
    assert sign_messages(end, [], KEY, TIME_MS) == ([], end)


@pytest.mark.parametrize("message", [
    5, None, [1], "text", {"a": float("nan")}, {"a": float("inf")}, {1: 2}, {"a": object()}, {"a": "\ud800"},
    {"a": {"b": [2**53]}}, {"a": -(2**53)}, {"a": 10**400},
], ids=lambda message: repr(message).partition(" at 0x")[0])
def test_what_json_cannot_hold_is_not_signed(message: Any) -> None:
    with pytest.raises(InvalidArgument, match="Message 1 of the batch"):
        sign_messages(START, [{}, message], KEY, TIME_MS)


def test_the_largest_integers_and_large_floats_are_kept() -> None:
    content = {"a": 2**53 - 1, "b": -(2**53) + 1, "c": 1e17, "d": True, "e": "9007199254740993"}
    assert payload(ours([content])[0]) == content


def nested(depth: int, leaf: Any = 1) -> dict[str, Any]:
    """Objects and lists within each other, ``depth`` of them."""
    for number in range(depth - 1):
        leaf = [leaf, "[{"] if number % 2 else {"a": leaf}
    return {"a": leaf}


@pytest.mark.parametrize("leaf", [1, 1.5e300])
def test_what_is_nested_too_deep_for_some_readers_is_neither_signed_nor_taken(leaf: float) -> None:
    deepest = ours([nested(200, leaf), {"a": [[]] * 1000}])
    assert add(plain(deepest)).error is None
    with pytest.raises(InvalidArgument, match="more than 200 deep"):
        sign_messages(START, [nested(201, leaf)], KEY, TIME_MS)
    with pytest.raises(InvalidArgument, match="more than 200 deep"):
        sign_messages(START, [nested(200, {})], KEY, TIME_MS)
    found = add([resigned(ours([{}])[0], message=nested(201, leaf))])
    assert "more than 200 deep" in reason(found)


def test_a_message_that_no_segment_could_carry_is_not_signed() -> None:
    with pytest.raises(TooLarge):
        sign_messages(START, [{"a": "x" * SEGMENT_SIZE_BYTES_MAX}], KEY, TIME_MS)
    longest = ours([{"a": "x" * (SEGMENT_SIZE_BYTES_MAX - 1024 - 8)}])
    assert len(longest[0]) < SEGMENT_SIZE_BYTES_MAX


# --- extending


def test_a_chain_is_taken_whole_and_in_parts() -> None:
    whole = add(plain(CHAIN))
    assert whole == Extension(CHAIN, tail_of(CHAIN, 4))
    assert add(plain(CHAIN[2:]), 2, held=CHAIN[:2]) == Extension(CHAIN[2:], tail_of(CHAIN, 4))
    assert add([], 2, held=CHAIN[:2]) == Extension([], tail_of(CHAIN, 2))


def test_another_spelling_of_the_same_json_is_the_same_message() -> None:
    spaced = json.loads(json.dumps(json.loads(CHAIN[0]), indent=3, ensure_ascii=True))
    assert add([spaced]).new == CHAIN[:1]


def test_what_is_held_is_passed_over() -> None:
    assert add(plain(CHAIN), 0, held=CHAIN[:3]) == Extension(CHAIN[3:], tail_of(CHAIN, 4))
    assert add(plain(CHAIN), 0, held=CHAIN) == Extension([], tail_of(CHAIN, 4))


def test_what_is_held_and_not_at_hand_is_left_unchecked() -> None:
    assert extend(tail_of(CHAIN, 3), 2, [5, json.loads(CHAIN[3])], lambda number: None) == Extension(
        CHAIN[3:], tail_of(CHAIN, 4))


@pytest.mark.parametrize("legacy", [False, True])
def test_chains_of_2022_are_taken_in_both_forms_with_and_without_meta_data(legacy: bool) -> None:
    for meta in (None, {"a": 1}):
        chain = of_2022(CONTENTS, legacy=legacy, meta=meta)
        assert add(plain(chain)) == Extension(chain, Tail(FEED, SUBFEED, 4, signature_of(chain[-1]), 0))
        assert [payload(message) for message in chain] == CONTENTS


def test_the_golden_message_of_2022_verifies() -> None:
    vector = next(vector for vector in VECTORS if "messageNumber" in vector["canonical"])
    message = {"body": json.loads(vector["canonical"]), "signature": vector["sig"]}
    assert payload(add([message]).new[0]) == {"i": 1}
    assert "did not sign" in reason(add([{**message, "signature": VECTORS[0]["sig"]}]))


def test_a_feed_of_2022_goes_on_with_messages_of_ours_and_never_back() -> None:
    chain = mixed(2, 2)
    assert add(plain(chain)) == Extension(chain, Tail(FEED, SUBFEED, 4, signature_of(chain[-1]), 2))
    back = of_2022([{"i": 4}], tail_of(chain, 4))
    assert "form of 2022" in reason(add(plain(back), 4, held=chain))


def test_the_good_messages_before_a_bad_one_are_kept() -> None:
    found = add([*plain(CHAIN[:2]), 5, json.loads(CHAIN[3])])
    assert (found.new, found.tail) == (CHAIN[:2], tail_of(CHAIN, 2))
    assert isinstance(found.error, FeedInvalid)
    assert found.error.details["number"] == 2


def spoiled() -> dict[str, tuple[Any, str]]:
    """Name -> what stands in place of message 1, and a word of the refusal."""
    good = json.loads(CHAIN[1])
    body, signature = good["body"], good["signature"]
    return {
        "nothing": (None, "not a signed message"),
        "a number": (5, "not a signed message"),
        "a list": ([], "not a signed message"),
        "no body": ({"signature": signature}, "not a signed message"),
        "more than body and signature": ({**good, "extra": 1}, "not a signed message"),
        "a body that is none": ({"body": [], "signature": signature}, "not a signed message"),
        "no signature": ({"body": body, "signature": None}, "signature is malformed"),
        "a short signature": ({"body": body, "signature": signature[:-2]}, "signature is malformed"),
        "a signature in capitals": ({"body": body, "signature": signature.upper()}, "signature is malformed"),
        "a signature with spaces": ({"body": body, "signature": signature[:-1] + " "}, "signature is malformed"),
        "another's signature": ({"body": body, "signature": sign(body, OTHER)}, "did not sign"),
        "the signature of another": ({"body": body, "signature": signature_of(CHAIN[0])}, "did not sign"),
        "a signature over the SHA-1": ({"body": body, "signature": sign_2022(body, KEY)}, "did not sign"),
        "other content": ({"body": {**body, "message": {"i": 7}}, "signature": signature}, "did not sign"),
        "another time": ({"body": {**body, "timestamp": 7}, "signature": signature}, "did not sign"),
        "another number": (resigned(CHAIN[1], messageNumber=2), "number 2"),
        "no number": (resigned(CHAIN[1], messageNumber=True), "number True"),
        "a number as a float": (resigned(CHAIN[1], messageNumber=1.0), "number 1.0"),
        "another subfeed": (resigned(CHAIN[1], subfeed=ELSEWHERE), "another subfeed"),
        "no subfeed": (resigned(CHAIN[1], subfeed=None), "another subfeed"),
        "a newer version": (resigned(CHAIN[1], version=3), "version is '3'"),
        "a version that is none": (resigned(CHAIN[1], version="2"), "version is '2'"),
        "version 2 as a float": (resigned(CHAIN[1], version=2.0), "version is '2.0'"),
        "version null": (resigned(CHAIN[1], version=None), "version is 'None'"),
        "a field too many": (resigned(CHAIN[1], metaData={}), "lacks a field"),
        "a field too few": (resigned(CHAIN[1], drop=["timestamp"]), "lacks a field"),
        "content that is no object": (resigned(CHAIN[1], message=[1]), "not a JSON object"),
        "a time that is none": (resigned(CHAIN[1], timestamp=-1), "no time"),
        "a time as a float": (resigned(CHAIN[1], timestamp=1.5), "no time"),
        "a time as a truth": (resigned(CHAIN[1], timestamp=True), "no time"),
        "a time without end": (resigned(CHAIN[1], timestamp=2**53), "no time"),
        "nothing before it": (resigned(CHAIN[1], drop=["previousSignature"]), "none before it"),
        "something else before it": (resigned(CHAIN[1], previousSignature=5), "before it is malformed"),
        "capitals before it": (resigned(CHAIN[1], previousSignature=signature_of(CHAIN[0]).upper()), "is malformed"),
        "another one before it": (resigned(CHAIN[1], previousSignature=signature_of(CHAIN[2])), "two histories"),
        "a gap": (json.loads(CHAIN[2]), "number 2"),
        "a repetition": (json.loads(CHAIN[0]), "number 0"),
        "2022 without its number": (resigned(CHAIN[1], form=sign_2022, drop=["version", "subfeed", "messageNumber"]),
                                    "lacks a field"),
        "2022 with a subfeed": (resigned(CHAIN[1], form=sign_2022, drop=["version"]), "should not have"),
        "2022 with odd meta data": (resigned(CHAIN[1], form=sign_2022, drop=["version", "subfeed"], metaData=5),
                                    "not a JSON object"),
    }


@pytest.mark.parametrize("name", spoiled())
def test_what_is_no_next_message_is_refused_with_a_reason(name: str) -> None:
    item, word = spoiled()[name]
    for found in (add([json.loads(CHAIN[0]), item, json.loads(CHAIN[2])]), add([item], 1, held=CHAIN[:1])):
        assert found.tail == tail_of(CHAIN, 1)
        assert word in reason(found)
        assert isinstance(found.error, FeedInvalid)
        assert found.error.details["number"] == 1
        assert found.error.details["feed_id"] == FEED
        assert isinstance(found.error, FeedChainBroken) == (word == "two histories")


def test_the_first_message_has_none_before_it() -> None:
    item = resigned(CHAIN[1], messageNumber=0)
    assert "none before it" in reason(add([item]))


@pytest.mark.parametrize("first", [1, 100, -1, 2**60])
def test_a_gap_is_named(first: int) -> None:
    found = add(plain(CHAIN[1:]), first)
    assert (found.new, found.tail) == ([], START)
    assert f"begins with number {first}" in reason(found)


@pytest.mark.parametrize("feed", ["", "zz" * 32, "00" * 31])
def test_a_feed_whose_id_is_no_key_has_no_messages(feed: str) -> None:
    found = extend(Tail(feed, SUBFEED), 0, plain(CHAIN), lambda number: None)
    assert isinstance(found, Extension)
    assert "no public key" in reason(found)


def test_a_message_of_another_feed_is_refused() -> None:
    assert "did not sign" in reason(add(plain(ours(CONTENTS, key=OTHER))))


def test_a_message_cannot_be_moved_to_another_subfeed() -> None:
    assert "another subfeed" in reason(add(plain(CHAIN), subfeed=ELSEWHERE))


# --- forks


def test_two_different_messages_of_one_number_are_a_fork_with_both_as_evidence() -> None:
    rival = ours([{"i": "other"}, {"i": "more"}], tail_of(CHAIN, 2))
    found = take([*plain(CHAIN[:2]), *plain(rival)], 0, held=CHAIN[:3])
    assert found == Fork(2, CHAIN[2], rival[0], Extension([], tail_of(CHAIN, 3)))
    for evidence in (found.first, found.second):
        signed = json.loads(evidence)
        assert verify(signed["body"], signed["signature"], FEED)
        assert signed["body"]["messageNumber"] == 2


def test_a_fork_is_seen_too_where_only_the_later_part_of_the_other_history_is_shown() -> None:
    rival = ours([{"i": "other"}, {"i": "more"}], tail_of(CHAIN, 2))
    assert take(plain(rival[1:]), 3, held=CHAIN) == Fork(3, CHAIN[3], rival[1], Extension([], tail_of(CHAIN, 4)))


def test_the_same_content_at_another_time_is_a_fork() -> None:
    again = ours(CONTENTS[:1], time_ms=TIME_MS + 1)
    assert isinstance(take(plain(again), 0, held=CHAIN), Fork)


def test_a_forged_message_beside_one_that_is_held_is_no_fork() -> None:
    assert "did not sign" in reason(add(plain(ours([{"i": "other"}], key=OTHER)), 0, held=CHAIN))
    assert "another subfeed" in reason(add(plain(ours([{"i": "other"}], Tail(FEED, ELSEWHERE))), 0, held=CHAIN))
    copy = {"body": {**json.loads(CHAIN[0])["body"], "message": {"i": 7}}, "signature": signature_of(CHAIN[0])}
    assert add([copy], 0, held=CHAIN) == Extension([], tail_of(CHAIN, 4))  # passed over: what is held stays


def test_history_that_goes_on_from_another_past_is_named_as_such() -> None:
    rival = ours([{"i": number} for number in range(6)])
    found = add(plain(rival[4:]), 4, held=CHAIN)
    assert isinstance(found.error, FeedChainBroken)
    assert found.error.details["number"] == 4


def test_a_message_of_2022_is_evidence_only_where_it_follows_what_is_held() -> None:
    chain = of_2022(CONTENTS)
    rival = of_2022([{"i": "other"}], tail_of(chain, 2))
    assert take(plain(rival), 2, held=chain) == Fork(2, chain[2], rival[0], Extension([], tail_of(chain, 4)))
    moved = of_2022([{"of": "another subfeed"}] * 4)  # which the owner signed, and a liar shows here
    for number in range(4):
        assert "may be of another subfeed" in reason(add(plain(moved[number:]), number, held=chain))
        assert "may be of another subfeed" in reason(add(plain(moved[number:]), number, held=CHAIN))


def test_a_message_of_ours_is_evidence_against_one_of_2022() -> None:
    chain = of_2022(CONTENTS)
    rival = ours([{"i": "other"}])
    assert take(plain(rival), 0, held=chain) == Fork(0, chain[0], rival[0], Extension([], tail_of(chain, 4)))


# --- heads


def test_a_head_comes_back() -> None:
    for count in (0, 3):
        signed = json.loads(json.dumps(sign_head(tail_of(CHAIN, count), KEY, TIME_MS)))
        head = read_head(signed, FEED, SUBFEED)
        assert (head.count, head.time_ms, head.signed) == (count, TIME_MS, signed)
        assert head.signature == tail_of(CHAIN, count).signature


def bad_heads() -> dict[str, Any]:
    good = sign_head(tail_of(CHAIN, 3), KEY, TIME_MS)
    body = good["body"]

    def signed(drop: str = "", key: Any = KEY, **changes: Any) -> dict[str, Any]:
        changed = {name: value for name, value in {**body, **changes}.items() if name != drop}
        return {"body": changed, "signature": sign(changed, key)}

    return {
        "nothing": None, "a number": 5, "a list": [], "no body": {"signature": good["signature"]},
        "too much": {**good, "extra": 1}, "a body that is none": {"body": 5, "signature": good["signature"]},
        "another's": signed(key=OTHER), "changed": {"body": {**body, "count": 4}, "signature": good["signature"]},
        "no signature": {"body": body, "signature": None}, "an empty signature": {"body": body, "signature": ""},
        "another feed": signed(feedId=SUBFEED), "another subfeed": signed(subfeed=ELSEWHERE),
        "another version": signed(version=2), "version true": signed(version=True), "another type": signed(type="x"),
        "a field too many": signed(extra=1), "a field too few": signed("timestamp"), "less than none": signed(count=-1),
        "a count that is none": signed(count="3"), "a count as a float": signed(count=3.0),
        "no last signature": signed(lastSignature=""), "an odd last signature": signed(lastSignature="x" * 128),
        "a last signature of none": signed(lastSignature=None), "a last signature for nothing": signed(count=0),
        "a time that is none": signed(timestamp=None), "an endless time": signed(timestamp=2**60),
        "a message": json.loads(CHAIN[0]),
    }


@pytest.mark.parametrize("name", bad_heads())
def test_what_is_no_head_is_refused(name: str) -> None:
    with pytest.raises(HeadInvalid) as caught:
        read_head(bad_heads()[name], FEED, SUBFEED)
    assert caught.value.details["why"]


def test_a_head_is_no_message() -> None:
    assert "lacks a field" in reason(add([sign_head(START, KEY, TIME_MS)]))


# --- what it costs


def test_extending_costs_little_more_than_the_signatures() -> None:
    chain = ours([{"i": number, "label": "spike", "channels": [1, 2, 3]} for number in range(300)])
    batch = plain(chain)
    bodies = [(bytes.fromhex(signature_of(message)), message[len('{"body":'):-len(',"signature":""}') - 128])
              for message in chain]
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(FEED))

    def seconds(call: Any) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    def verify_all() -> None:
        for signature, body in bodies:
            key.verify(signature, body)

    ratios = []
    for _ in range(5):
        ratios.append(seconds(lambda: add(batch)) / seconds(verify_all))
    assert min(ratios) < 2
    assert min(seconds(lambda: add(batch, 0, held=chain)) / seconds(verify_all) for _ in range(5)) < 0.3
