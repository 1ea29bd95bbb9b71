"""What the page of formats shows of feeds is real: the program reads and verifies it, and makes the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kachery_fast.client.snapshots import make_snapshot, read_snapshot
from kachery_fast.protocol import feed_segments
from kachery_fast.protocol.canonical import canonical_bytes
from kachery_fast.protocol.feed_bodies import Segment
from kachery_fast.protocol.feed_segments import encode_segment, parse_index
from kachery_fast.protocol.feeds import Extension, Tail, extend, read_head, tail_after
from kachery_fast.protocol.names import segment_object_name, subfeed_hash, subfeed_object_name

from .test_pages import ROOT, blocks

PAGE = ROOT / "docs" / "formats.md"
EXAMPLES: list[dict[str, Any]] = [json.loads(block) for block in blocks(PAGE, "json")]
FEED = next(example["feedId"] for example in EXAMPLES if "feedId" in example)
SUBFEED = subfeed_hash("main")


def example(*keys: str) -> dict[str, Any]:
    [found] = [shown for shown in EXAMPLES if shown.keys() == set(keys)]
    return found


def signed_messages() -> list[dict[str, Any]]:
    """The two messages of the examples, put together by the program from the snapshot."""
    signed = read_snapshot(example("feedId", "version", "subfeeds"), "docs/formats.md").subfeeds[SUBFEED].signed
    assert signed is not None
    return signed


def take(messages: list[Any]) -> Tail:
    found = extend(Tail(FEED, SUBFEED), 0, messages, lambda number: None)
    assert isinstance(found, Extension)
    assert found.error is None
    return found.tail


def test_the_signed_messages_verify() -> None:
    ours, old = (shown for shown in EXAMPLES
                 if shown.keys() == {"body", "signature"} and "messageNumber" in shown["body"])
    assert ours == signed_messages()[1]
    assert take(signed_messages()).count == 2
    assert take([old]) == Tail(FEED, SUBFEED, 1, old["signature"], 0)


def test_the_head_verifies_wherever_it_is_shown() -> None:
    [head] = [shown for shown in EXAMPLES if shown.keys() == {"body", "signature"} and "count" in shown["body"]]
    assert read_head(head, FEED, SUBFEED).signature == signed_messages()[1]["signature"]
    assert example("messageCount", "head", "segments")["head"] == head
    assert next(shown for shown in EXAMPLES if shown.get("type") == "feedMessages")["head"] == head


def test_the_segment_has_the_name_and_size_that_the_index_and_the_band_say() -> None:
    signed = [canonical_bytes(message) for message in signed_messages()]
    data = encode_segment(signed)
    index = parse_index(json.dumps(example("messageCount", "head", "segments")).encode())
    assert index.segments == (Segment(0, 2, len(data), hashlib.sha1(data).hexdigest()),)
    shared = next(shown for shown in EXAMPLES if shown.get("type") == "feedShared")
    assert [Segment(**part) for part in shared["segments"]] == list(index.segments)
    assert next(shown for shown in EXAMPLES if shown.get("type") == "feedMessages")["messages"] == signed_messages()[1:]
    assert tail_after(FEED, SUBFEED, signed[1]).count == index.count


def test_the_snapshot_is_as_the_program_writes_it() -> None:
    assert make_snapshot(FEED, [("main", SUBFEED, signed_messages())]) == example("feedId", "version", "subfeeds")


def test_the_limits_and_names_are_those_of_the_program() -> None:
    text = Path(PAGE).read_text("utf-8")
    assert f"{feed_segments._CUT_SIZE_BYTES:,} bytes, at most\n  {feed_segments.SEGMENT_MESSAGES_MAX:,}" in text
    assert f"longer than {feed_segments.SEGMENT_SIZE_BYTES_MAX >> 20} MiB" in text
    folder = "lab/feeds/aa/bb/cc/aabbcc" + "0" * 58 + "/subfeeds/dd/ee/ff/ddeeff" + "0" * 34 + "/"
    assert subfeed_object_name("lab", "aabbcc" + "0" * 58, "ddeeff" + "0" * 34) == folder + "subfeed.json"
    assert segment_object_name("lab", "aabbcc" + "0" * 58, "ddeeff" + "0" * 34, SUBFEED) == (
        folder + "segments/" + SUBFEED)
