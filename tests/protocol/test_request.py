"""The requester, event by event: odd, late, repeated, hostile ones; and any sequence at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kachery_fast.errors import (
    BandUnreachable,
    BucketUnreachable,
    Cancelled,
    CorruptFile,
    CorruptObject,
    DiskFull,
    KacheryError,
    ManifestInvalid,
    NotAvailable,
    NotPermitted,
    UploadRefused,
)
from kachery_fast.protocol.bodies import Assign, Cancel, Failed, Offer, Progress, Ready, Want
from kachery_fast.protocol.chunks import State
from kachery_fast.protocol.inquiry import Inquiry
from kachery_fast.protocol.request import Phase, Requester
from kachery_fast.protocol.request_events import (
    BandRestored,
    Broken,
    BucketMoved,
    ChunkAbsent,
    ChunkDamaged,
    ChunkFailed,
    ChunkGood,
    ChunkHeld,
    DamageChecked,
    Discard,
    Fail,
    Heard,
    LoadChunk,
    Locate,
    Located,
    LocatedAbsent,
    LocateFailed,
    Need,
    Prepare,
    Prepared,
    ReportDamage,
    Say,
    SayFailed,
    Succeed,
    Tick,
    WholeDamaged,
    WholeGood,
)

from .simulation import LIMITS, File, make_file, name_of

FILE = make_file("recording", 10)
STAMP: dict[str, Any] = {"time": 0, "id": "0", "request": "r"}
DOWN = BucketUnreachable(object="x", why="it is down", attempts=5)


class Driver:
    """Feeds one requester, and remembers what it wanted."""

    def __init__(self, file: File = FILE, providers: str = "ab", *, manifest: bool = True, **limits: Any) -> None:
        self.now = 100.0
        self.file = file
        inquiry = Inquiry(f"sha1://{file.sha1}", "lab", dict.fromkeys(providers, ""))
        self.machine = Requester(inquiry, file.sha1, file.manifest_sha1 if manifest else None, "r",
                                 dataclasses.replace(LIMITS, **limits))

    def __call__(self, event: Any, after: float = 0.0) -> list[Any]:
        self.now += after
        return self.machine.handle(event, self.now)

    def offer(self, sender: str = "a", **changes: Any) -> list[Any]:
        fields = {"sha1": self.file.sha1, "size": self.file.size, "manifest": self.file.manifest_sha1, **changes}
        return self(Heard(Offer(**STAMP, **fields), sender))

    def ready(self, *ranges: tuple[int, int], sender: str = "a", manifest: bool = False) -> list[Any]:
        return self(Heard(Ready(**STAMP, chunks=list(ranges), manifest_ready=manifest), sender))

    def begin(self, *, absent: bool = True) -> Driver:
        """To MOVE, the bucket having the manifest and (``absent``) no chunk."""
        self(Need())
        self(Located(self.file.manifest, self.file.manifest_sha1, self.file.size))
        effects = self(Prepared())
        while absent and effects:
            effect = effects.pop()
            if isinstance(effect, LoadChunk):
                effects += self(ChunkAbsent(effect.index))
        return self

    def is_in(self, phase: Phase) -> bool:
        return self.machine.phase is phase

    def assigned(self) -> Driver:
        """To MOVE with the first chunks assigned to a."""
        self.begin()
        assert says(self.offer() + self(Tick(), after=0.2), Assign)
        return self

    @property
    def why(self) -> str:
        return str(self.machine.inquiry.tried())


def says(effects: list[Any], kind: type[Any]) -> list[dict[str, Any]]:
    return [effect.fields for effect in effects if isinstance(effect, Say) and effect.kind is kind]


def failure(effects: list[Any]) -> KacheryError:
    assert isinstance(effects[-1], Fail), effects
    error = effects[-1].error
    assert error.details["account"]["channel"] == "lab"
    return error


# --- the ordinary course


def test_the_first_wish_starts_the_request_and_only_the_first() -> None:
    drive = Driver()
    assert drive(Need()) == [Locate(FILE.manifest_sha1)]
    assert drive(Need(0, 5)) == []
    assert drive.machine.phase is Phase.LOCATE


def test_a_file_of_no_bytes_needs_no_chunk() -> None:
    drive = Driver(make_file("", 0))
    drive(Need())
    assert drive(Located(None, None, 0)) == [Prepare(None, None, 0, ())]
    assert drive(Prepared()) == []
    assert drive.machine.covers(None, None)
    assert drive(WholeGood()) == [Succeed()]
    assert drive.machine.phase is Phase.DONE
    assert drive.machine.deadline is None


def test_what_a_former_attempt_left_is_not_loaded_again() -> None:
    drive = Driver()
    drive(Need())
    drive(Located(FILE.manifest, FILE.manifest_sha1, FILE.size))
    effects = drive(Prepared((0, 1, 2, 3, 4, 5, 6, 8)))
    assert effects == [LoadChunk(7), LoadChunk(9)]
    assert drive.machine.bytes_held == sum(c.end - c.start for i, c in enumerate(FILE.manifest.chunks)  # type: ignore[union-attr]
                                           if i not in (7, 9))


def test_no_more_downloads_than_allowed_at_once() -> None:
    drive = Driver(download_concurrency=3).begin(absent=False)
    assert drive.machine.book.count_in(State.LOADING) == 3
    assert drive(ChunkHeld(0)) == [LoadChunk(3)]


def test_after_some_absent_chunks_the_rest_is_taken_to_be_absent_too() -> None:
    drive = Driver(absent_probes_max=2)
    drive.begin(absent=False)
    assert says(drive(ChunkAbsent(0)), Want)
    drive(ChunkAbsent(1))
    assert drive.machine.book.count_in(State.UNKNOWN) == 0
    assert drive.machine.book.count_in(State.ABSENT) == 7  # three more are still being tried


def test_nothing_is_said_after_the_end() -> None:
    drive = Driver().begin()
    assert failure(drive(Broken(Cancelled(what="It"))))
    for event in (Tick(), Need(), ChunkHeld(0), WholeGood(), BandRestored(), Heard(Progress(**STAMP, bytes=1), "a")):
        assert drive(event) == []
    assert drive.machine.deadline is None


# --- odd events


def test_messages_of_other_requests_are_not_ours() -> None:
    drive = Driver().begin()
    other = {**STAMP, "request": "another"}
    drive(Heard(Offer(**other, sha1=FILE.sha1, size=FILE.size, manifest=FILE.manifest_sha1), "a"))
    drive(Heard(Failed(**other, reason="busy"), "b"))
    assert drive.machine.inquiry.answers == {}


def test_a_chunk_announced_by_a_stranger_is_not_believed() -> None:
    drive = Driver().assigned()
    assert drive.ready((0, 10), sender="stranger") == []
    assert drive.machine.book.count_in(State.READY, State.LOADING) == 0


def test_a_chunk_announced_by_a_provider_that_was_given_up_too_early_is_believed_once() -> None:
    drive = Driver().assigned()
    drive(Tick(), after=LIMITS.provider_silence_seconds)
    assert "fell silent" in drive.why
    assert LoadChunk(0, announced=True) in drive.ready((0, 1))
    drive(ChunkAbsent(0))
    assert not any(isinstance(effect, LoadChunk) for effect in drive.ready((0, 1)))


def test_a_provider_that_goes_on_announcing_what_is_not_there_is_heard_no_more() -> None:
    drive = Driver(providers="a").assigned()
    loads = 0
    for _ in range(50):
        effects = drive.ready((0, 10))
        loads += sum(isinstance(effect, LoadChunk) for effect in effects)
        for effect in effects:
            if isinstance(effect, LoadChunk):
                effects = drive(ChunkAbsent(effect.index))
        if drive.machine.phase is Phase.FAILED:
            break
        drive(Tick(), after=0.2)
        drive.offer()
        drive(Tick(), after=0.2)
    assert drive.machine.phase is Phase.FAILED
    assert loads <= 10 * LIMITS.corrupt_retries_max
    assert "announced chunks that the bucket does not have" in drive.why


def test_ranges_beyond_the_end_and_repeated_messages_change_nothing() -> None:
    drive = Driver().assigned()
    first = drive.ready((0, 1), (0, 1), (9_999, 10_000))
    assert first.count(LoadChunk(0, announced=True)) == 1
    assert LoadChunk(0) not in drive.ready((0, 1))
    assert drive.offer() == []


def test_a_late_offer_is_taken_when_all_others_are_lost() -> None:
    drive = Driver().begin()
    drive(Tick(), after=LIMITS.offer_wait_seconds)  # the first round ends without an answer; a pause begins
    drive.offer("b")
    assert says(drive(Tick(), after=0.11), Assign)[0]["provider"] == "b"


@pytest.mark.parametrize("event", [
    ChunkHeld(99), ChunkHeld(-1), ChunkGood(99), ChunkGood(0), ChunkDamaged(5, "0" * 40), DamageChecked(5, True),
    ChunkAbsent(9), ChunkFailed(9, DOWN), LocatedAbsent(), Located(None, None, 5), LocateFailed(DOWN), Prepared((1, 2)),
])
def test_events_that_fit_no_state_are_ignored(event: Any) -> None:
    drive = Driver(download_concurrency=2).begin(absent=False)
    before = [drive.machine.book[index] for index in range(10)]
    assert drive(event) == []
    assert [drive.machine.book[index] for index in range(10)] == before
    assert drive.machine.phase is Phase.MOVE


# --- hostile offers


@pytest.mark.parametrize("changes", [
    {"sha1": name_of("another")}, {"manifest": None}, {"manifest": None, "size": 2**50}, {"size": 0}, {"size": -1},
    {"manifest": None, "size": 0}, {"manifest": None, "size": -1},
])
def test_an_offer_of_something_else_is_noted_and_not_taken(changes: dict[str, Any]) -> None:
    drive = Driver().begin()
    assert drive.offer(**changes) == []
    assert drive(Tick(), after=0.2) == []
    assert "node a: offered something else than was asked for" in drive.why


def test_the_cut_that_most_offer_is_taken_unless_the_uri_names_one_that_is_offered() -> None:
    for with_manifest, expected in ((False, name_of("x")), (True, FILE.manifest_sha1)):
        drive = Driver(providers="abc", manifest=with_manifest)
        drive(Need())
        drive(LocatedAbsent())
        drive.offer("a")
        drive.offer("b", manifest=name_of("x"))
        (assign,) = says(drive.offer("c", manifest=name_of("x")), Assign)
        assert assign["manifest"] == expected
        assert assign["send_manifest"]


def test_the_manifest_of_another_file_is_refused_with_its_provider_when_offered() -> None:
    drive = Driver(providers="a", manifest=False)
    drive(Need())
    drive(LocatedAbsent())
    other = make_file("another", 4)
    drive.offer(manifest=other.manifest_sha1)
    drive(Tick(), after=0.2)
    assert drive.ready(manifest=True) == [Locate(other.manifest_sha1, announced=True)]
    error = failure(drive(Located(other.manifest, other.manifest_sha1, other.size)))
    assert isinstance(error, NotAvailable)
    assert "does not make this file" in error.message


def test_the_manifest_of_another_file_in_the_uri_is_the_end() -> None:
    drive = Driver()
    drive(Need())
    other = make_file("another", 4)
    error = failure(drive(Located(other.manifest, FILE.manifest_sha1, other.size)))
    assert isinstance(error, CorruptFile)
    assert "URI puts together" in error.message


def test_what_is_announced_as_a_manifest_but_is_none_is_refused_with_its_provider() -> None:
    drive = Driver(manifest=False)
    drive(Need())
    drive(LocatedAbsent())
    drive.offer("a", manifest=name_of("bad"))
    drive(Tick(), after=0.2)
    drive.offer("b")
    drive.ready(manifest=True)
    effects = drive(LocateFailed(ManifestInvalid(manifest=name_of("bad"), why="it is none")))
    assert says(effects, Assign)[0]["provider"] == "b"


def test_a_manifest_that_nobody_was_asked_for_starts_no_search() -> None:
    drive = Driver(manifest=False)
    drive(Need())
    drive(LocatedAbsent())
    for _ in range(20):
        assert drive.ready(manifest=True, sender="b") == []
    assert drive.machine.phase is Phase.LOCATE


def test_text_of_another_node_cannot_steer_a_terminal_or_fill_it() -> None:
    drive = Driver().begin()
    drive(Heard(Failed(**STAMP, reason="busy", detail="\x1b[2J\r\n" + "x" * 50_000), "a"))
    assert "\x1b" not in drive.why
    assert "\n" not in drive.why
    assert len(drive.why) < 1000


# --- damage


def held(drive: Driver, index: int, sender: str = "a") -> None:
    drive.ready((index, index + 1), sender=sender)
    drive(ChunkHeld(index))


def test_a_damaged_chunk_is_reported_and_asked_for_from_another() -> None:
    drive = Driver(assign_chunks_max=5).begin()
    drive.offer("a")
    effects = drive.offer("b") + drive(Tick(), after=0.2)
    assigns = {fields["provider"]: fields["chunks"] for fields in says(effects, Assign)}
    assert assigns == {"a": [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)], "b": [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]}
    held(drive, 0)
    assert drive(ChunkDamaged(0, name_of("bad"))) == [ReportDamage(0, name_of("bad"))]
    assert drive.machine.bytes_held == 0
    drive(DamageChecked(0, True))
    (assign,) = says(drive.ready((1, 2), (3, 4), (5, 6), sender="b"), Assign)
    assert assign["provider"] == "b"
    assert (0, 1) in assign["chunks"]


def test_a_chunk_that_the_hub_finds_sound_is_loaded_again() -> None:
    drive = Driver().assigned()
    held(drive, 0)
    drive(ChunkDamaged(0, name_of("bad")))
    assert LoadChunk(0) in drive(DamageChecked(0, False))


def test_a_chunk_that_is_damaged_again_and_again_ends_the_request() -> None:
    drive = Driver(make_file("note", 1)).begin(absent=False)
    effects: list[Any] = []
    for _ in range(LIMITS.corrupt_retries_max + 1):
        drive(ChunkHeld(0))
        effects = drive(ChunkDamaged(0, name_of("bad")))
        if drive.is_in(Phase.MOVE):
            drive(DamageChecked(0, False))
            drive(Tick(), after=60.0)
    assert isinstance(failure(effects), CorruptObject)


def test_a_verified_chunk_may_turn_out_damaged_later() -> None:
    drive = Driver(download_concurrency=1).begin(absent=False)
    drive(ChunkHeld(0))
    drive(ChunkGood(0))
    drive(ChunkGood(0))
    assert drive.machine.book[0] is State.GOOD
    assert ReportDamage(0, "x") in drive(ChunkDamaged(0, "x"))
    assert drive.machine.bytes_held == 0


def test_the_whole_being_another_file_starts_over_with_another_cut() -> None:
    drive = Driver(manifest=False)
    drive(Need())
    drive(LocatedAbsent())
    bad = make_file("bad cut", 2, true_sha1=FILE.sha1)
    drive.offer("a", manifest=bad.manifest_sha1, size=bad.size)
    drive(Tick(), after=0.2)
    drive.ready(manifest=True)
    drive(Located(bad.manifest, bad.manifest_sha1, bad.size))
    drive(Prepared((0, 1)))
    drive.offer("b")
    effects = drive(WholeDamaged(name_of("another")))
    assert effects[0] == Discard()
    (assign,) = says(effects, Assign)
    assert (assign["provider"], assign["manifest"]) == ("b", FILE.manifest_sha1)
    assert drive.machine.chunks == ()
    assert drive.machine.size is None
    drive.offer("a", manifest=bad.manifest_sha1, size=bad.size)  # is not listened to any more
    assert drive.ready(manifest=True, sender="a") == []


# --- trouble


def test_a_download_that_failed_is_tried_again_after_a_pause_that_grows() -> None:
    drive = Driver(download_concurrency=1, absent_probes_max=99).begin(absent=False)
    drive(ChunkHeld(0))
    pauses = []
    for _ in range(4):
        assert drive(ChunkFailed(1, DOWN)) == []
        assert drive.machine.deadline is not None
        pauses.append(drive.machine.deadline - drive.now)
        assert drive(Tick(), after=pauses[-1]) == [LoadChunk(1)]
    assert pauses == [0.5, 1.0, 2.0, 4.0]
    assert drive.machine.waiting == "waiting for the bucket"


@pytest.mark.parametrize("error", [
    UploadRefused(action="the download", object="x", why="no", status=403),
    DiskFull(what="it", path="/", free=0, needed=1),
])
def test_an_error_that_does_not_pass_ends_the_request_at_once(error: KacheryError) -> None:
    drive = Driver().begin(absent=False)
    drive(ChunkHeld(0))
    assert failure(drive(ChunkFailed(1, error))) is error


def test_a_question_that_cannot_be_sent_ends_a_request_that_has_not_begun() -> None:
    error = BandUnreachable(channel="lab", why="down")
    assert failure(Driver().begin()(SayFailed(error))) is error
    drive = Driver().assigned()
    assert drive(SayFailed(error)) == []
    refused = NotPermitted(who="node", action="request files", channel="lab", why="no")
    assert failure(drive(SayFailed(refused))) is refused


def test_restored_bands_ask_anew_and_a_flapping_band_does_not_use_up_the_rounds() -> None:
    drive = Driver().begin()
    rounds = drive.machine.inquiry.rounds
    for _ in range(10):
        drive(BandRestored(), after=0.3)
        drive(Tick(), after=0.3)
    assert drive.is_in(Phase.MOVE)
    assert drive.machine.inquiry.rounds > rounds
    for _ in range(200):
        drive(BandRestored(), after=0.3)
        drive(Tick(), after=0.3)
    assert drive.is_in(Phase.FAILED)


def test_restored_bands_give_back_what_was_assigned() -> None:
    drive = Driver().assigned()
    assert drive.machine.book.count_in(State.ASSIGNED) > 0
    drive(BandRestored())
    assert drive.machine.book.count_in(State.ASSIGNED) == 0
    assert says(drive(Tick(), after=0.5), Want)


def test_a_request_at_rest_waits_for_nothing_and_does_not_fail() -> None:
    drive = Driver()
    drive(Need(0, 1))
    drive(Located(FILE.manifest, FILE.manifest_sha1, FILE.size))
    drive(Prepared())
    drive(ChunkAbsent(0))
    drive.ready((0, 1))  # nobody has offered yet: not believed
    drive.offer()
    drive(Tick(), after=0.2)
    drive.ready((0, 1))
    drive(ChunkHeld(0))
    drive(ChunkGood(0))
    assert drive.machine.resting
    assert drive.machine.deadline is None
    assert drive(Tick(), after=1e6) == []
    assert drive(Need(FILE.size - 1, FILE.size)) == [LoadChunk(9)]


def test_asking_that_is_overtaken_by_the_chunk_itself_does_not_end_the_request() -> None:
    drive = Driver(providers="a").assigned()
    drive(Tick(), after=LIMITS.provider_silence_seconds)
    assert drive.machine.waiting == "asking 1 node"
    drive.ready((0, 10))
    for _ in range(200):
        drive(Tick(), after=1.0)
    assert drive.machine.phase is Phase.MOVE  # the downloads take their time


def test_the_error_names_who_was_asked_who_declined_and_who_kept_silent() -> None:
    drive = Driver(providers="abc").begin()
    drive(Heard(Failed(**STAMP, reason="evicted"), "a"))
    drive(Heard(Failed(**STAMP, reason="not-permitted", detail="by the hub"), "b"))
    drive(Tick(), after=LIMITS.offer_wait_seconds)
    drive(Tick(), after=10.0)
    error = failure(drive(Tick(), after=10.0))
    assert error.message.endswith(
        "Tried: bucket: does not have it; asked 3 nodes 2 times; node a: evicted; node b: not-permitted: by the hub; "
        "no answer from node c (a node without the file keeps silent).")
    assert error.details["account"]["asked"] == [{"node": n, "label": ""} for n in "abc"]


def test_a_node_that_says_it_is_looking_is_waited_for() -> None:
    drive = Driver(providers="a").begin()
    for _ in range(20):
        drive(Heard(Progress(**STAMP, bytes=0), "a"), after=1.0)
    assert drive.machine.phase is Phase.MOVE
    assert says(drive.offer() + drive(Tick(), after=0.2), Assign)


# --- another bucket


def test_what_is_known_of_the_bucket_is_forgotten_when_the_channel_has_another() -> None:
    drive = Driver(make_file("recording", 40)).assigned()
    drive.ready((0, 8))
    book = drive.machine.book
    assert book.count_in(State.LOADING, State.READY) == 8
    drive(BucketMoved())
    assert book.count_in(State.READY, State.ABSENT) == 0
    looked_at = {effect.index for index in range(4) for effect in drive(ChunkHeld(index))
                 if isinstance(effect, LoadChunk) and not effect.announced}
    assert looked_at == {4, 5, 6, 7}, "it is looked for in the other bucket, and nobody has announced it there"


@pytest.mark.parametrize(("seconds", "believed"), [(0.0, True), (LIMITS.patience_seconds + 1, False)])
def test_who_announces_what_the_former_bucket_has_is_asked_again_for_a_while(seconds: float, believed: bool) -> None:
    drive = Driver(providers="a").assigned()
    drive(BucketMoved())
    for _ in range(int(seconds)):
        drive(Heard(Progress(**STAMP, bytes=0), "a"), after=1.0)
    drive.ready((0, 4))
    again = [effect for index in range(4) for effect in drive(ChunkAbsent(index))]
    assert bool(says(again, Assign)) is believed
    assert ("announced chunks" in drive.why) is not believed


def test_a_manifest_that_is_in_the_former_bucket_is_asked_for_again() -> None:
    drive = Driver(providers="a", manifest=False)
    drive(Need())
    drive(LocatedAbsent())
    assert says(drive.offer() + drive(Tick(), after=0.2), Assign)
    assert drive.ready(manifest=True) == [Locate(FILE.manifest_sha1, announced=True)]
    drive(BucketMoved())
    (said,) = says(drive(LocatedAbsent()), Assign)
    assert said["send_manifest"]
    assert "announced" not in drive.why


# --- any sequence

sha1s = st.sampled_from([FILE.sha1, name_of("another")])
manifests = st.sampled_from([FILE.manifest_sha1, name_of("bad"), None])
small = st.integers(0, 11)
errors = st.sampled_from([DOWN, ManifestInvalid(manifest="x", why="y"), CorruptObject(object="x", found="", sha1="y")])
ranges = st.lists(st.tuples(small, small).filter(lambda pair: pair[0] < pair[1]), max_size=3)
bodies = st.one_of(
    st.builds(Offer, sha1=sha1s, manifest=manifests, size=st.sampled_from([FILE.size, 0, 5, 2**50]), **{
        key: st.just(value) for key, value in STAMP.items()}),
    st.builds(Ready, chunks=ranges, manifest_ready=st.booleans(), **{k: st.just(v) for k, v in STAMP.items()}),
    st.builds(Progress, bytes=small, **{k: st.just(v) for k, v in STAMP.items()}),
    st.builds(Failed, reason=st.sampled_from(Failed.REASONS), **{k: st.just(v) for k, v in STAMP.items()}),
)
events = st.one_of(
    st.builds(Need, st.none() | small, st.none() | small), st.builds(LocatedAbsent), st.builds(LocateFailed, errors),
    st.sampled_from([Located(FILE.manifest, FILE.manifest_sha1, FILE.size), Located(None, None, 5),
                     Located(None, None, 0), Located(None, None, 2**50)]),
    st.builds(Prepared, st.lists(st.integers(0, 0), max_size=1).map(tuple)),
    *(st.builds(kind, small) for kind in (ChunkHeld, ChunkGood, ChunkAbsent)),
    st.builds(ChunkDamaged, small, st.just(name_of("bad"))), st.builds(DamageChecked, small, st.booleans()),
    st.builds(ChunkFailed, small, errors), st.just(WholeDamaged(name_of("x"))), st.just(BandRestored()),
    st.just(BucketMoved()), st.just(Tick()),
    st.builds(SayFailed, errors), *(st.builds(Heard, bodies, st.sampled_from("abcd")) for _ in range(4)),
)
LOADING = (State.LOADING, State.HELD, State.CHECKING)


@settings(max_examples=300, deadline=None)
@given(st.booleans(), st.lists(st.tuples(events, st.floats(0.0, 10.0)), max_size=60))
def test_no_sequence_of_events_breaks_the_machine_or_lets_it_hang_or_run_hot(
        with_manifest: bool, script: list[tuple[Any, float]]) -> None:
    drive = Driver(providers="abc", manifest=with_manifest)
    drive(Need())
    waits_for_bucket = True
    for event, pause in script:
        deadline = drive.machine.deadline
        if deadline is not None and deadline <= drive.now + pause:
            waits_for_bucket = follow(drive, drive(Tick(), after=max(0.0, deadline - drive.now)), waits_for_bucket)
        if isinstance(event, Located | LocatedAbsent | LocateFailed):
            waits_for_bucket = False
        waits_for_bucket = follow(drive, drive(event, after=pause), waits_for_bucket)
    for _ in range(2000):  # left alone, every request ends, rests, or waits for an effect that is under way
        deadline = drive.machine.deadline
        if deadline is None:
            break
        waits_for_bucket = follow(drive, drive(Tick(), after=max(0.0, deadline - drive.now)), waits_for_bucket)
    assert drive.machine.deadline is None


def follow(drive: Driver, effects: list[Any], waits_for_bucket: bool) -> bool:
    machine = drive.machine
    waits = waits_for_bucket or any(isinstance(effect, Locate) for effect in effects)
    over = machine.phase in (Phase.DONE, Phase.FAILED)
    assert over == (machine.phase is Phase.FAILED and any(isinstance(e, Fail) for e in effects)) or over
    if not over:
        under_way = waits or machine.phase is Phase.PREPARE or machine.book.count_in(*LOADING) > 0
        complete = machine.phase is Phase.MOVE and machine.book.count_in(State.GOOD) == machine.book.needed_count
        assert under_way or complete or machine.deadline is not None, machine.phase
    assert all(not isinstance(effect, Say) or effect.kind in (Want, Assign, Cancel) for effect in effects)
    return waits


def test_offers_are_waited_for_only_as_long_as_somebody_may_still_make_one() -> None:
    drive = Driver(providers="ab").begin()
    assert not says(drive.offer("a"), Assign), "b may offer too"
    assert says(drive.offer("b"), Assign)
    drive = Driver(providers="ab").begin()
    drive.offer("a")
    assert says(drive(Heard(Failed(**STAMP, reason="busy"), "b")), Assign)
