"""URIs and names: what is accepted, what is refused, and that nothing crafted points elsewhere."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_fast.errors import InvalidName, InvalidUri
from kachery_fast.protocol.names import (
    BAND_KINDS,
    FileUri,
    ObjectKind,
    ObjectName,
    band_name,
    check_channel_name,
    check_node_id,
    check_owner_id,
    check_sha1,
    is_sha1,
    object_name,
    parse_file_uri,
    parse_object_name,
)

SHA1 = "025b4666424a0116c45970c27af4e2f90177af69"
MANIFEST = "b76b000000000000000000000000000000000000"
sha1s = st.text("0123456789abcdef", min_size=40, max_size=40)


@given(sha1s, st.text(st.characters(exclude_categories=["Cs"])), st.none() | sha1s)
def test_a_uri_reads_back_as_what_it_was_made_of(sha1: str, label: str, manifest: str | None) -> None:
    uri = FileUri(sha1, label, manifest)
    assert parse_file_uri(str(uri)) == uri
    assert str(uri).isascii()
    assert not set(str(uri)) & set(' "<>#\n\t')


@given(st.text())
def test_any_text_is_a_uri_or_a_clear_error(text: str) -> None:
    try:
        uri = parse_file_uri(text)
    except InvalidUri as error:
        reasons = error.details
    else:
        reasons = {"uri": text, "why": "none"}
        assert parse_file_uri(str(uri)) == uri
    assert reasons["uri"] == text
    assert reasons["why"]


def test_a_label_that_no_text_can_hold_does_not_break_the_uri() -> None:
    assert str(FileUri(SHA1, "na\udcffme\ud800")) == f"sha1://{SHA1}/na%3Fme%3F"


@pytest.mark.parametrize(("text", "expected"), [
    (SHA1, FileUri(SHA1)),
    (f"sha1://{SHA1}", FileUri(SHA1)),
    (f"sha1://{SHA1}/", FileUri(SHA1)),
    (f"sha1://{SHA1}/a/b.dat", FileUri(SHA1, "a/b.dat")),
    (f"sha1://{SHA1}/a%20b?manifest={MANIFEST}", FileUri(SHA1, "a b", MANIFEST)),
    (f"sha1://{SHA1}?manifest={MANIFEST}&other=1", FileUri(SHA1, "", MANIFEST)),
    (f"sha1://{SHA1}/x?other=1", FileUri(SHA1, "x")),
    (f"sha1://{SHA1}/x?", FileUri(SHA1, "x")),
])
def test_forms_that_are_read(text: str, expected: FileUri) -> None:
    assert parse_file_uri(text) == expected


@pytest.mark.parametrize("text", [
    "", "sha1:/", "sha1://", "sha1:///", f"SHA1://{SHA1}", f"sha1://{SHA1.upper()}", f"sha1://{SHA1[:-1]}",
    f"sha1://{SHA1}0", f"feed://{SHA1}", f" sha1://{SHA1}", f"sha1://{SHA1}?manifest=", f"sha1://{SHA1}?manifest=x",
    f"sha1://{SHA1}?manifest={MANIFEST}&manifest={MANIFEST}", f"sha1://{SHA1}\n", f"{SHA1}\n", "sha1://../../etc",
])
def test_forms_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidUri):
        parse_file_uri(text)


@pytest.mark.parametrize("name", ["lab", "a", "9", "A.b-c_d", "x" * 64])
def test_channel_names(name: str) -> None:
    assert check_channel_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "..", "a/b", "a b", "ä", "x" * 65, "a\n", "a\x00", "٣"])
def test_bad_channel_names(name: str) -> None:
    with pytest.raises(InvalidName):
        check_channel_name(name)
    with pytest.raises(InvalidName):
        object_name(name, SHA1)
    with pytest.raises(InvalidName):
        band_name(name, "requestFiles")


def test_ids() -> None:
    assert check_node_id("0a" * 32) == "0a" * 32
    assert check_sha1(SHA1) == SHA1
    assert check_owner_id("someone@example.org") == "someone@example.org"
    for bad in ("", "0A" * 32, "0a" * 31, "0a" * 32 + "\n"):
        with pytest.raises(InvalidName):
            check_node_id(bad)
    for bad in ("", SHA1.upper(), SHA1[:-1], SHA1 + "\n"):
        with pytest.raises(InvalidName):
            check_sha1(bad)
    for bad in ("", "a b", "a/b", "<a>", "a'b", "a" * 255, "a\n", "a\u2028b"):
        with pytest.raises(InvalidName):
            check_owner_id(bad)
    for value in (None, 5, b"0" * 40, ["0"] * 40):
        assert not is_sha1(value)


def test_the_names_of_objects_and_bands() -> None:
    assert object_name("ch1", SHA1) == f"ch1/sha1/02/5b/46/{SHA1}"
    assert [band_name("ch1", kind) for kind in BAND_KINDS] == [
        "ch1-requestFiles", "ch1-provideFiles", "ch1-requestFeeds", "ch1-provideFeeds", "ch1-requestTasks",
        "ch1-provideTasks"]
    with pytest.raises(InvalidName):
        band_name("ch1", "requestfiles")


@given(st.text(), st.text())
def test_no_object_name_leaves_its_channel(channel: str, sha1: str) -> None:
    try:
        name = object_name(channel, sha1)
    except InvalidName:
        return
    assert name.startswith(channel + "/sha1/")
    assert name.count("/") == 5
    assert ".." not in name.split("/")


feeds = st.text("0123456789abcdef", min_size=64, max_size=64)
channels = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
kinds: list[ObjectKind] = ["file", "result", "index", "segment"]


@given(channels, st.sampled_from(kinds), sha1s, feeds, sha1s)
def test_the_name_of_an_object_comes_apart_into_what_it_was_made_of(
    channel: str, kind: ObjectKind, sha1: str, feed: str, subfeed: str
) -> None:
    in_feed = kind in ("index", "segment")
    name = ObjectName(channel, kind, sha1, feed if in_feed else "", subfeed if kind == "segment" else "")
    assert parse_object_name(str(name)) == name
    for wrong in (f"{name}/", f"/{name}", f"{name}0", str(name)[:-1], str(name).replace("/", "//", 1)):
        with pytest.raises(InvalidName):
            parse_object_name(wrong)


@given(st.text() | st.lists(st.sampled_from(["lab", "sha1", "feeds", "..", "", "02", SHA1]), max_size=14).map("/".join))
def test_any_text_is_the_name_of_an_object_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidName):
        assert str(parse_object_name(text)) == text
