"""Snapshots: what is in them can be checked by anybody, those of 2022 are read, and tampering is found out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kachery_fast as kf
from kachery_fast import errors
from kachery_fast.client.feed_checks import check_subfeed, load_export
from kachery_fast.client.snapshots import make_snapshot, read_snapshot
from kachery_fast.protocol.feeds import Tail, sign_messages
from kachery_fast.protocol.names import subfeed_hash
from kachery_fast.protocol.signing import private_key, public_id, sign_2022

KEY = private_key(bytes(range(32)))
FEED = public_id(KEY)
MAIN = subfeed_hash("main")
TYPED = {"type": "spikes", "electrode": 3}
TIME_MS = 1_795_175_653_433
MESSAGES: list[dict[str, Any]] = [{"i": 0, "text": "é\u2028", "n": {"b": 1.0, "a": None}}, {}, {"i": 2, "x": 1e21}]


def signed(name: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found, _ = sign_messages(Tail(FEED, subfeed_hash(name)), messages, KEY, TIME_MS)
    return [json.loads(one) for one in found]


def signed_2022(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        body = {"message": message, "messageNumber": number, "timestamp": TIME_MS + number}
        if number:
            body["previousSignature"] = found[-1]["signature"]
        if number == 1:
            body["metaData"] = {"by": "somebody"}
        found.append({"body": body, "signature": sign_2022(body, KEY)})
    return found


def document() -> dict[str, Any]:
    return make_snapshot(FEED, [("main", MAIN, signed("main", MESSAGES)),
                                (TYPED, subfeed_hash(TYPED), signed(TYPED, [{"k": 1}])),
                                (None, subfeed_hash("old"), signed_2022(MESSAGES)),
                                ("empty", subfeed_hash("empty"), [])])


def stored(content: Any) -> kf.Feed:
    return kf.load_feed(kf.store_json(content, "feed.json"))


def test_a_snapshot_is_read_without_a_node(store_dir: Path) -> None:
    feed = stored(document())
    assert (feed.feed_id, feed.is_snapshot, feed.is_writeable) == (FEED, True, False)
    assert feed.uri.endswith("/feed.json")
    main = feed.load_subfeed("main")
    assert main.num_messages == main.get_num_local_messages() == 3
    assert main.get_next_messages(max_num_messages=2) == MESSAGES[:2]
    assert main.get_next_message(wait_msec=0, advance_position=False) == MESSAGES[2]
    assert main.position == 2
    assert main.get_next_messages(signed=True) == signed("main", MESSAGES)[2:]
    assert main.get_next_messages() == []
    main.set_position(1)
    assert list(main.message_stream()) == MESSAGES[1:]
    assert main.position == 3
    assert list(feed.load_subfeed(TYPED).message_stream()) == [{"k": 1}]
    assert list(feed.load_subfeed(f"~{subfeed_hash(TYPED)}").message_stream()) == [{"k": 1}]
    assert feed.load_subfeed("old").get_next_messages(signed=True) == signed_2022(MESSAGES)
    assert feed.load_subfeed("absent").get_next_messages(wait_msec=1000) == []
    assert feed.load_subfeed("absent").num_messages == 0
    assert {row["name"]: row["count"] for row in feed.describe()["subfeeds"] if not isinstance(row["name"], dict)} == {
        "main": 3, None: 3, "empty": 0}


def test_a_snapshot_has_the_layout_that_readers_of_2022_expect(store_dir: Path) -> None:
    found = json.loads(kf.load_text(stored(document()).uri))
    assert found["subfeeds"][MAIN]["messages"] == MESSAGES
    assert found["subfeeds"][MAIN]["subfeedHash"] == MAIN


def test_a_snapshot_of_2022_is_read_and_has_no_signatures(store_dir: Path) -> None:
    # The bytes that kachery-client 1.2 stored (traces-2022.md, feed.create_snapshot).
    text = ('{"subfeeds":{"b28b7af69320201d1cf206ebf28373980add1451":{"subfeedHash":'
            '"b28b7af69320201d1cf206ebf28373980add1451","messages":[{"i":0,"text":"\\u00e9","n":{"b":1.5,"a":null}},'
            '{"i":1},{"i":2}]}}}')
    uri = kf.store_text(text, "feed.json")
    assert uri == "sha1://a42bfd3723f15e5b63b19ae4edbf60c0b2103c7b/feed.json"
    feed = kf.load_feed(uri)
    assert feed.feed_id is None
    main = feed.load_subfeed("main")
    assert main.uri == f"{uri}?subfeedName=main"
    assert kf.load_subfeed(main.uri, position=1).get_next_message() == {"i": 1}
    assert [message["i"] for message in main.message_stream()] == [0, 1, 2]
    main.position = 0
    with pytest.raises(errors.InvalidArgument, match="holds no signatures"):
        main.get_next_messages(signed=True)
    with pytest.raises(errors.InvalidArgument, match="holds no signatures"):
        check_subfeed(feed, "main")


def test_a_subfeed_of_a_long_snapshot_has_a_uri_of_its_own(store_dir: Path) -> None:
    long = [{"i": number, "text": "x" * 100_000} for number in range(250)]
    feed = stored(make_snapshot(FEED, [("a b/c?&=é", subfeed_hash("a b/c?&=é"), signed("a b/c?&=é", long))]))
    assert "?manifest=" in feed.uri
    subfeed = feed.load_subfeed("a b/c?&=é")
    assert kf.load_subfeed(subfeed.uri).get_next_messages() == long
    with pytest.raises(errors.InvalidFeedUri, match="names a feed"):
        kf.load_subfeed(feed.uri)


def test_a_snapshot_takes_no_messages_and_is_not_deleted(store_dir: Path) -> None:
    feed = stored(document())
    with pytest.raises(errors.FeedNotWritable, match="snapshot"):
        feed.load_subfeed("main").append_message({"i": 3})
    with pytest.raises(errors.InvalidArgument, match="snapshot"):
        feed.delete()
    with pytest.raises(errors.InvalidArgument, match="snapshot already"):
        feed.create_snapshot(["main"])
    with pytest.raises(errors.InvalidArgument, match="can grow"):
        kf.watch_for_new_messages({"a": feed.load_subfeed("main")}, wait_msec=0)
    with pytest.raises(errors.InvalidArgument, match="not a name"):
        kf.load_feed(feed.uri, create=True)


# --- tampering


def change(act: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    found = copy.deepcopy(document())
    act(found["subfeeds"][MAIN])
    return found


def move(content: dict[str, Any], number: int, to: int) -> None:
    for key in ("messages", "signatures"):
        content[key].insert(to, content[key].pop(number))


def leave_out(content: dict[str, Any], number: int) -> None:
    for key in ("messages", "signatures"):
        del content[key][number]


@pytest.mark.parametrize(("act", "number"), [
    (lambda main: main["messages"][1].update(x=1), 1),
    (lambda main: main["messages"][0].update(text="e"), 0),
    (lambda main: main["signatures"][2].update(timestamp=TIME_MS + 1), 2),
    (lambda main: main["signatures"][2].update(signature="0" * 128), 2),
    (lambda main: main["signatures"][2].update(signature=None), 2),
    (lambda main: main["signatures"][1].update(version=3), 1),
    (lambda main: main["signatures"][1].pop("version"), 1),
    (lambda main: move(main, 0, 1), 0),
    (lambda main: leave_out(main, 0), 0),
    (lambda main: leave_out(main, 1), 1),
])
def test_what_was_changed_is_refused_at_its_number(
        store_dir: Path, act: Callable[[dict[str, Any]], object], number: int, tmp_path: Path) -> None:
    tampered = change(act)
    with pytest.raises(errors.FeedInvalid, match=rf"[Mm]essage {number}\b") as caught:
        stored(tampered)
    assert (caught.value.details["feed_id"], caught.value.exit_code) == (FEED, 6)
    (tmp_path / "export.json").write_text(json.dumps(tampered))
    found = check_subfeed(load_export(tmp_path / "export.json"), "main")
    assert (found.total, type(found.error)) == (number, type(caught.value))


def test_messages_cut_off_at_the_end_leave_a_true_prefix(store_dir: Path) -> None:
    assert stored(change(lambda main: leave_out(main, 2))).load_subfeed("main").num_messages == 2


def test_a_subfeed_cannot_be_passed_off_as_another(store_dir: Path) -> None:
    found = document()
    other = subfeed_hash("other")
    found["subfeeds"] = {other: {**found["subfeeds"][MAIN], "subfeedHash": other, "name": "other"}}
    with pytest.raises(errors.FeedInvalid, match="did not sign it"):
        stored(found)
    found = document()
    found["subfeeds"][MAIN]["name"] = "other"
    with pytest.raises(errors.WrongFormat, match="the name of another"):
        stored(found)


@pytest.mark.parametrize("content", [
    [], {}, {"subfeeds": []}, {"feedId": 3, "subfeeds": {}}, {"feedId": "x" * 64, "subfeeds": {}},
    {"feedId": FEED, "version": 3, "subfeeds": {}}, {"subfeeds": {"main": {"messages": []}}},
    {"subfeeds": {MAIN: []}}, {"subfeeds": {MAIN: {"messages": [1]}}}, {"subfeeds": {MAIN: {"messages": {}}}},
    {"feedId": FEED, "subfeeds": {MAIN: {"messages": [{}]}}},
    {"feedId": FEED, "subfeeds": {MAIN: {"messages": [{}], "signatures": [3]}}},
    {"feedId": FEED, "subfeeds": {MAIN: {"messages": [{}], "signatures": [{"signature": "", "more": 1}]}}},
    {"feedId": FEED, "subfeeds": {MAIN: {"messages": [{}], "signatures": []}}},
])
def test_other_files_are_no_snapshots(store_dir: Path, content: Any) -> None:
    with pytest.raises(errors.WrongFormat, match="not a snapshot of a feed"):
        stored(content)


def test_a_snapshot_without_its_feed_has_nothing_to_check(store_dir: Path) -> None:
    """Who strips the id strips the proof, and the feed says so: it is nobody's."""
    found = document()
    del found["feedId"], found["version"]
    found["subfeeds"][MAIN]["messages"][0]["i"] = 7
    feed = stored(found)
    assert feed.feed_id is None
    assert feed.load_subfeed("main").get_next_message(wait_msec=0) == {**MESSAGES[0], "i": 7}


# --- exports


def test_an_export_is_checked_message_by_message(store_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(json.dumps(document()))
    feed = load_export(tmp_path / "export.json")
    found = check_subfeed(feed, "main")
    assert (found.total, found.first_ms, found.last_ms, found.forks, found.error) == (3, TIME_MS, TIME_MS, [], None)
    found = check_subfeed(feed, "old")
    assert (found.total, found.first_ms, found.last_ms, found.error) == (3, TIME_MS, TIME_MS + 2, None)
    assert check_subfeed(feed, "empty")[1:4] == (0, None, None)
    assert not store_dir.exists()


def test_a_file_that_is_no_export_is_said_to_be_none(store_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.LocalFileMissing):
        load_export(tmp_path / "absent.json")
    with pytest.raises(errors.NotADataFile):
        load_export(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff\xfe{")
    with pytest.raises(errors.WrongFormat, match="not JSON"):
        load_export(tmp_path / "x")


def test_nothing_but_what_was_signed_is_put_together() -> None:
    found = read_snapshot(document(), "it")
    assert found.subfeeds[MAIN].signed == signed("main", MESSAGES)
    assert found.subfeeds[subfeed_hash("old")].signed == signed_2022(MESSAGES)
