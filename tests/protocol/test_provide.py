"""The provider, event by event."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.protocol.bodies import (
    Assign,
    Cancel,
    Failed,
    Offer,
    Progress,
    Ready,
    RequestFile2022,
    UploadFileStatus2022,
    Want,
    expand,
)
from kachery_fast.protocol.manifest import CHUNK_SIZE_BYTES_MAX
from kachery_fast.protocol.provide import (
    Asked,
    BucketMoved,
    FileProvider,
    LookedUp,
    LookUp,
    ProvideLimits,
    Said,
    Tick,
    Upload,
    Uploaded,
)

from .simulation import File, make_file, name_of

FILE = make_file("recording", 40)
OTHER = make_file("other", 40)
NOTE = make_file("note", 1)
FILES = {file.sha1: file for file in (FILE, OTHER, NOTE, make_file("", 0))}
STAMP: dict[str, Any] = {"time": 0, "id": "0"}


class Driver:
    """Feeds one provider whose store answers at once, and remembers what it does."""

    def __init__(self, **limits: Any) -> None:
        self.now = 100.0
        self.store_answers = True
        self.lookups: list[LookUp] = []
        self.uploads: list[Upload] = []
        self.machine = FileProvider("me", ProvideLimits(**{
            "requests_max": 3, "uploads_ahead_max": 4, "progress_interval_seconds": 1.0, "ready_batch_seconds": 0.25,
            **limits}))

    def __call__(self, event: Any, after: float = 0.0) -> list[Said]:
        self.now += after
        said = []
        for effect in self.machine.handle(event, self.now):
            if isinstance(effect, LookUp):
                self.lookups.append(effect)
                if self.store_answers:
                    said += self(look_up(effect))
            elif isinstance(effect, Upload):
                self.uploads.append(effect)
            else:
                said.append(effect)
        return said

    def want(self, file: File = FILE, request: str = "r", sender: str = "b") -> list[Said]:
        return self(Asked(Want(**STAMP, request=request, sha1=file.sha1, manifest=file.manifest_sha1), sender))

    def assign(self, first: int, end: int, file: File = FILE, request: str = "r", sender: str = "b",
               **changes: Any) -> list[Said]:
        fields = {"provider": "me", "sha1": file.sha1, "manifest": file.manifest_sha1,
                  "chunks": [(first, end)] if end > first else [], **changes}
        return self(Asked(Assign(**STAMP, request=request, **fields), sender))

    def ask_2022(self, key: dict[str, Any], sender: str = "b") -> list[Said]:
        return self(Asked(RequestFile2022(file_key=key), sender))

    def upload_all(self, step: float = 0.0) -> list[Said]:
        said = []
        while self.uploads:
            said += self(Uploaded(self.uploads.pop(0).sha1), after=step)
        return said


def look_up(query: LookUp) -> LookedUp:
    file = FILES.get(query.sha1)
    if file is None:
        return LookedUp(query, reason="unknown")
    return LookedUp(query, file.size, file.manifest, file.manifest_sha1)


def kinds(said: list[Said]) -> list[str]:
    return [message.kind.__name__ for message in said]


def chunk(index: int, file: File = FILE) -> str:
    assert file.manifest is not None
    return file.manifest.chunks[index].sha1


def test_a_node_that_has_the_file_offers_it_and_uploads_nothing() -> None:
    drive = Driver()
    (offer,) = drive.want()
    assert offer == Said(Offer, {"request": "r", "sha1": FILE.sha1, "size": FILE.size,
                                 "manifest": FILE.manifest_sha1, "load": 0})
    assert drive.uploads == []
    assert drive.machine.deadline is None


def test_a_node_without_the_file_keeps_silent() -> None:
    drive = Driver()
    assert drive.want(make_file("unknown", 3)) == []
    assert drive.machine.deadline is None


def test_a_node_that_had_it_says_why_it_cannot() -> None:
    drive = Driver()
    drive.store_answers = False
    drive.want()
    (said,) = drive(LookedUp(drive.lookups[0], reason="changed-on-disk", detail="it was edited"))
    assert said == Said(Failed, {"request": "r", "reason": "changed-on-disk", "detail": "it was edited"})


def test_what_is_assigned_to_others_is_not_looked_up() -> None:
    drive = Driver()
    assert drive.assign(0, 3, provider="somebody-else") == []
    assert drive.lookups == []


def test_the_manifest_comes_first_and_chunks_as_many_at_once_as_allowed() -> None:
    drive = Driver()
    drive.assign(0, 10, send_manifest=True)
    assert [upload.sha1 for upload in drive.uploads] == [FILE.manifest_sha1, *(chunk(i) for i in range(3))]
    assert FILE.manifest is not None
    assert drive.uploads[0].end == len(FILE.manifest.encode())
    assert all(not upload.check for upload in drive.uploads)
    assert drive.machine.load == 4 + 7


def test_chunks_are_announced_in_batches_and_the_last_at_once() -> None:
    drive = Driver(ready_batch_seconds=0.25)
    drive.assign(0, 8)
    said = drive.upload_all(step=0.1)
    ready = [message.fields["chunks"] for message in said if message.kind is Ready]
    assert sum(len(expand(ranges, 100)) for ranges in ready) == 8
    assert 2 <= len(ready) <= 4
    assert drive.machine.deadline is None
    assert drive.machine.load == 0


def test_it_says_each_interval_that_it_is_at_work_and_stops_when_it_is_not() -> None:
    drive = Driver()
    drive.assign(0, 2)
    for _ in range(5):
        assert drive.machine.deadline == drive.now + 1.0
        (said,) = drive(Tick(), after=1.0)
        assert said == Said(Progress, {"request": "r", "bytes": 0, "queued": 2})
    drive.upload_all()
    assert drive.machine.deadline is None


@pytest.mark.parametrize("ask", ["want", "assign"])
def test_it_says_that_it_is_at_work_while_a_lookup_takes_long(ask: str) -> None:
    drive = Driver()
    drive.store_answers = False
    assert (drive.want() if ask == "want" else drive.assign(0, 2)) == []
    assert kinds(drive(Tick(), after=1.0)) == ["Progress"]
    assert kinds(drive(Tick(), after=1.0)) == ["Progress"]
    said = drive(look_up(drive.lookups[0]))
    assert kinds(said) == (["Offer"] if ask == "want" else [])
    assert bool(drive.uploads) == (ask == "assign")


def test_the_same_question_is_looked_up_once_while_the_answer_is_awaited() -> None:
    drive = Driver()
    drive.store_answers = False
    for _ in range(5):
        drive.want()
    assert len(drive.lookups) == 1
    assert kinds(drive(look_up(drive.lookups[0]))) == ["Offer"]
    drive.want()
    assert len(drive.lookups) == 2


def test_a_flood_of_questions_is_bounded() -> None:
    drive = Driver()
    drive.store_answers = False
    for number in range(5_000):
        drive.want(request=str(number))
    assert len(drive.lookups) <= 1024


def test_an_object_that_several_want_is_uploaded_once_and_all_are_told() -> None:
    drive = Driver()
    for request in "xyz":
        drive.assign(0, 4, request=request)
    assert len(drive.uploads) == 4
    said = drive.upload_all()
    assert {message.fields["request"] for message in said if message.kind is Ready} == set("xyz")
    assert sum(len(expand(message.fields["chunks"], 40)) for message in said) == 12


def test_an_object_uploaded_a_moment_ago_is_there_for_another_but_is_uploaded_anew_later() -> None:
    drive = Driver()
    drive.assign(0, 1, request="x")
    drive.upload_all()
    (ready,) = drive.assign(0, 1, request="y")
    assert ready == Said(Ready, {"request": "y", "chunks": [(0, 1)], "manifest_ready": False})
    assert drive.uploads == []
    drive.now += 100.0
    drive.assign(0, 1, request="z")
    assert [(upload.sha1, upload.check) for upload in drive.uploads] == [(chunk(0), False)]


def test_an_object_uploaded_a_moment_ago_is_not_there_any_more_when_the_channel_has_another_bucket() -> None:
    drive = Driver()
    drive.assign(0, 1, request="x")
    drive.upload_all()
    drive(BucketMoved())
    assert drive.assign(0, 1, request="y") == []
    assert [(upload.sha1, upload.check) for upload in drive.uploads] == [(chunk(0), False)]


def test_a_chunk_that_the_same_request_asks_for_again_is_checked_before_it_is_uploaded_anew() -> None:
    drive = Driver()
    drive.assign(0, 1)
    drive.upload_all()
    drive.assign(0, 1)
    assert [(upload.sha1, upload.check) for upload in drive.uploads] == [(chunk(0), True)]


def test_a_long_request_does_not_starve_a_short_one() -> None:
    drive = Driver(uploads_ahead_max=2)
    drive.assign(0, 40, request="long")
    drive.assign(0, 4, OTHER, request="short")
    order = []
    while drive.uploads:
        upload = drive.uploads.pop(0)
        order.append(upload.file_sha1)
        drive(Uploaded(upload.sha1))
    assert max(place for place, sha1 in enumerate(order) if sha1 == OTHER.sha1) <= 2 + 2 * 4
    assert Counter(order) == {FILE.sha1: 40, OTHER.sha1: 4}


def test_a_cancelled_request_is_forgotten_with_what_was_queued_or_looked_up_for_it() -> None:
    drive = Driver()
    drive.assign(0, 10)
    started = list(drive.uploads)
    assert drive(Asked(Cancel(**STAMP, request="r"), "b")) == []
    assert drive.upload_all() == []
    assert len(started) == 4
    assert drive.uploads == []
    assert drive.machine.deadline is None
    drive.store_answers = False
    drive.assign(10, 20)
    drive.want()
    drive(Asked(Cancel(**STAMP, request="r"), "b"))
    for query in drive.lookups[-2:]:
        assert drive(look_up(query)) == []
    assert drive.uploads == []


def test_nobody_can_cancel_the_request_of_another() -> None:
    drive = Driver()
    drive.assign(0, 1)
    drive(Asked(Cancel(**STAMP, request="r"), "somebody-else"))
    assert kinds(drive.upload_all()) == ["Ready"]


def test_when_it_serves_as_many_as_it_can_further_ones_are_told_that_it_is_busy() -> None:
    drive = Driver(requests_max=2)
    drive.assign(0, 1, request="x")
    drive.assign(1, 2, request="y")
    for said in (drive.want(request="z"), drive.assign(2, 3, request="z")):
        assert said == [Said(Failed, {"request": "z", "reason": "busy", "detail": "it serves 2 requests"})]
    assert kinds(drive.want(request="x")) == ["Offer"]
    drive.upload_all()
    assert kinds(drive.want(request="z")) == ["Offer"]


def test_when_one_upload_of_many_fails_what_is_ready_is_announced_before_the_failure() -> None:
    drive = Driver(ready_batch_seconds=10.0)
    drive.assign(0, 8, request="x")
    drive.assign(20, 21, request="y")
    drive(Uploaded(chunk(0)))
    assert drive(Uploaded(chunk(1))) == []
    said = drive(Uploaded(chunk(2), "bucket", "it did not answer"))
    assert said == [
        Said(Ready, {"request": "x", "chunks": [(1, 2)], "manifest_ready": False}),
        Said(Failed, {"request": "x", "reason": "bucket", "detail": "it did not answer"})]
    drive.uploads = [upload for upload in drive.uploads if upload.sha1 not in (chunk(0), chunk(1), chunk(2))]
    assert {message.fields["request"] for message in drive.upload_all()} == {"y"}


def test_a_manifest_that_it_does_not_have_is_a_reason() -> None:
    drive = Driver()
    (said,) = drive.assign(0, 1, manifest=name_of("another"))
    assert (said.kind, said.fields["reason"]) == (Failed, "unknown")
    assert drive.machine.deadline is None


def test_more_chunks_than_anybody_asks_for_at_once_are_refused() -> None:
    drive = Driver()
    long = make_file("long", 5_000)
    FILES[long.sha1] = long
    (said,) = drive.assign(0, 5_000, long)
    assert (said.kind, said.fields["reason"]) == (Failed, "busy")
    assert drive.uploads == []


def test_an_assignment_of_nothing_or_beyond_the_end_leaves_nothing_behind() -> None:
    drive = Driver()
    assert drive.assign(0, 0) == []
    assert drive.assign(1_000, 2_000) == []
    assert drive.machine.deadline is None


def test_a_requester_that_disappears_leaves_a_job_that_ends() -> None:
    drive = Driver()
    drive.assign(0, 30)
    drive.upload_all()
    assert drive.machine.deadline is None
    assert drive.machine.load == 0


def test_a_job_that_nothing_happens_to_does_not_live_for_ever() -> None:
    drive = Driver(requests_max=1)
    drive.assign(0, 2)
    drive.ask_2022({"sha1": NOTE.sha1})
    said: list[Said] = []
    for _ in range(40_000):
        if drive.machine.deadline is None:
            break
        said = drive(Tick(), after=max(0.0, drive.machine.deadline - drive.now)) or said
    assert drive.machine.deadline is None
    assert said[0].kind is Failed
    assert kinds(drive.want(request="another")) == ["Offer"]


# --- 2022


def chunk_of(start: Any, end: Any, sha1: str = chunk(0), whole: Any = FILE.sha1) -> dict[str, Any]:
    return {"sha1": sha1, "chunkOf": {"fileKey": {"sha1": whole}, "startByte": start, "endByte": end}}


@pytest.mark.parametrize(("key", "file", "start", "end"), [
    ({"sha1": NOTE.sha1}, NOTE, 0, NOTE.size),
    ({"sha1": NOTE.sha1, "manifestSha1": name_of("x")}, NOTE, 0, NOTE.size),
    (chunk_of(0, 20_000_000), FILE, 0, 20_000_000),
    (chunk_of(FILE.size - 5, FILE.size), FILE, FILE.size - 5, FILE.size),
    ({"sha1": name_of("")}, make_file("", 0), 0, 0),
])
def test_a_request_of_2022_is_started_checked_and_finished(key: dict[str, Any], file: File, start: int,
                                                           end: int) -> None:
    drive = Driver()
    assert drive.ask_2022(key) == [Said(UploadFileStatus2022, {"file_key": key, "status": "started"})]
    assert drive.uploads == [Upload(key["sha1"], file.sha1, start, end, True)]
    assert drive.upload_all() == [Said(UploadFileStatus2022, {"file_key": key, "status": "finished"})]
    assert drive.machine.deadline is None


@pytest.mark.parametrize("key", [
    {}, {"sha1": None}, {"sha1": "../../x"}, {"sha1": FILE.sha1.upper()}, {"sha1": FILE.sha1},
    chunk_of(-1, 5), chunk_of(5, 4), chunk_of(0, FILE.size + 1), chunk_of(0, CHUNK_SIZE_BYTES_MAX + 1),
    chunk_of("0", 5), chunk_of(0.0, 5.0), chunk_of(None, None), chunk_of(False, True), chunk_of(0, 2**80),
    chunk_of(0, 5, sha1="x"), chunk_of(0, 5, whole=5), chunk_of(0, 5, whole="../x"), chunk_of(0, 5, whole=name_of("?")),
    {"sha1": NOTE.sha1, "chunkOf": {"fileKey": 5}}, {"sha1": NOTE.sha1, "chunkOf": {}},
], ids=str)
def test_a_hostile_request_of_2022_is_met_with_silence(key: dict[str, Any]) -> None:
    drive = Driver()
    assert drive.ask_2022(key) == []
    assert drive.uploads == []
    assert drive.machine.deadline is None or drive.machine.deadline > drive.now + 3600


def test_a_name_from_outside_that_does_not_fit_its_bytes_harms_nobody_elses_request() -> None:
    drive = Driver()
    drive.ask_2022(chunk_of(5, 10, sha1=chunk(3)), sender="hostile")
    drive.assign(3, 4)
    assert [upload.start for upload in drive.uploads] == [5]
    assert drive(Uploaded(chunk(3), "changed-on-disk", "another SHA-1")) == []
    assert FILE.manifest is not None
    assert drive.uploads[-1].start == FILE.manifest.chunks[3].start
    assert kinds(drive(Uploaded(chunk(3)))) == ["Ready"]


# --- any sequence

names = st.sampled_from([FILE.sha1, OTHER.sha1, NOTE.sha1, name_of("unknown")])
requests = st.sampled_from("xyz")
manifests = st.sampled_from([FILE.manifest_sha1, OTHER.manifest_sha1, None])
stamp = {key: st.just(value) for key, value in STAMP.items()}
questions = st.one_of(
    st.builds(Want, request=requests, sha1=names, manifest=manifests, **stamp),
    st.builds(Assign, request=requests, provider=st.sampled_from(["me", "other"]), sha1=names, manifest=manifests,
              chunks=st.lists(st.tuples(st.integers(0, 50), st.integers(51, 60)), max_size=2),
              send_manifest=st.booleans(), **stamp),
    st.builds(Cancel, request=requests, **stamp),
    st.builds(RequestFile2022, file_key=st.sampled_from([{"sha1": NOTE.sha1}, chunk_of(0, 10), chunk_of(9, 5)])),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(questions, st.sampled_from(["upload", "fail", "look", "tick"])), max_size=60))
def test_no_sequence_leaves_anything_behind_once_the_work_is_done(script: list[Any]) -> None:
    drive = Driver()
    drive.store_answers = False
    asked_for: set[str] = set()
    for step in script:
        if step == "look" and drive.lookups:
            drive(look_up(drive.lookups.pop(0)))
        elif step in ("upload", "fail") and drive.uploads:
            drive(Uploaded(drive.uploads.pop(0).sha1, "bucket" if step == "fail" else None))
        elif step == "tick":
            drive(Tick(), after=0.7)
        elif not isinstance(step, str):
            asked_for.add(getattr(step, "sha1", ""))
            drive(Asked(step, "b"), after=0.1)
        assert len(drive.uploads) <= 4
    while drive.lookups or drive.uploads:
        while drive.lookups:
            drive(look_up(drive.lookups.pop(0)))
        drive.upload_all(step=0.1)
    for _ in range(3):
        drive(Tick(), after=1.0)
    assert drive.machine.deadline is None
    assert drive.machine.load == 0
