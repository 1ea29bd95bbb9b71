"""Whole transfers between simulated nodes, in virtual time: no schedule hangs, and a good provider suffices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kachery_fast.errors import BucketUnreachable, CorruptFile, KacheryError, NotAvailable
from kachery_fast.protocol.request_events import Need

from .simulation import LIMITS, Net, Outcome, World, forge, make_file, name_of

TRAITS = ("honest", "mute", "idler", "liar", "spoiler", "decliner", "busy")
# Two idlers in a row, each as long as a provider may claim to be at work, then patience; and once more for each
# damaged chunk before its uploader is refused.
SECONDS_MAX = 2 * LIMITS.provider_stall_seconds + 3 * LIMITS.patience_seconds


def run(world: World, outcome: Outcome) -> Outcome:
    world.run(until=100_000.0)
    assert outcome.is_over
    assert outcome.succeeded or isinstance(outcome.error, KacheryError)
    if outcome.error is not None:
        assert "account" in outcome.error.details
    return outcome


# --- the ordinary course


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 100])
def test_a_file_of_any_length_arrives(count: int, with_manifest: bool) -> None:
    world = World()
    file = make_file("recording", count)
    world.provider("a", file)
    world.provider("without-it")
    outcome = run(world, world.request(file, manifest=with_manifest))
    assert outcome.succeeded
    assert set(world.uploads.values()) <= {1}
    assert world.said["Want"] == 1


def test_what_is_in_the_bucket_needs_no_provider() -> None:
    world = World()
    file = make_file("recording", 10)
    world.provider("a", file)
    assert run(world, world.request(file)).succeeded
    said = dict(world.said)
    assert run(world, world.request(file)).succeeded
    assert dict(world.said) == said
    assert set(world.uploads.values()) == {1}


def test_nothing_is_uploaded_before_it_is_asked_for() -> None:
    world = World()
    world.provider("a", make_file("recording", 10))
    world.run(until=1000.0)
    assert not world.uploads
    assert not world.said


def test_a_range_moves_its_chunks_alone_and_the_rest_follows_when_the_whole_is_needed() -> None:
    world = World()
    file = make_file("recording", 50)
    chunk_size = file.size // 50
    world.provider("a", file)
    outcome = world.request(file, start=3 * chunk_size + 1, end=5 * chunk_size)
    world.run(until=1000.0)
    machine = world.requests[0].machine
    assert machine.resting
    assert machine.covers(3 * chunk_size, 5 * chunk_size)
    assert not machine.covers(3 * chunk_size, 5 * chunk_size + 1)
    assert sum(world.uploads.values()) == 1 + 2  # the manifest, two chunks
    world.requests[0].post(Need())
    assert run(world, outcome).succeeded
    assert sum(world.uploads.values()) == 1 + 50


def test_many_who_want_the_same_file_cause_one_upload_of_each_chunk() -> None:
    world = World()
    file = make_file("recording", 30)
    world.provider("a", file)
    outcomes = [world.request(file) for _ in range(20)]
    world.run(until=10_000.0)
    assert all(outcome.succeeded for outcome in outcomes)
    assert set(world.uploads.values()) == {1}


# --- pace


@pytest.mark.parametrize(("rates", "ratio_max"), [
    ((100e6,), 1.05),
    ((100e6, 100e6), 1.1),
    ((100e6, 10e6), 1.1),
    ((100e6, 1e6), 1.1),
    ((50e6,) * 8, 1.25),
    ((100e6, 50e6, 10e6, 5e6), 1.25),
])
def test_striping_takes_little_longer_than_all_rates_together(rates: Sequence[float], ratio_max: float) -> None:
    world = World(net=Net(download_bytes_per_second=1e9))
    file = make_file("recording", 200)
    for number, rate in enumerate(rates):
        world.provider(f"provider-{number}", file, rate=rate)
    outcome = run(world, world.request(file))
    assert outcome.succeeded
    assert outcome.seconds <= ratio_max * file.size / sum(rates)
    assert sum(world.uploads.values()) <= 201 + 8 * len(rates)


def test_uploads_and_downloads_overlap() -> None:
    world = World(net=Net(download_bytes_per_second=100e6))
    file = make_file("recording", 100)
    world.provider("a", file, rate=100e6)
    outcome = run(world, world.request(file))
    assert outcome.seconds <= 1.15 * file.size / 100e6


# --- faults


def test_an_offer_that_leads_to_nothing_is_replaced() -> None:
    for trait in ("mute", "liar", "spoiler", "decliner", "busy"):
        world = World()
        file = make_file("recording", 10)
        world.provider("bad", file, trait=trait)
        world.provider("good", file)
        outcome = run(world, world.request(file))
        assert outcome.succeeded, (trait, outcome.error)
        assert outcome.seconds < 2 * LIMITS.provider_silence_seconds + 15


def test_a_provider_that_only_claims_to_be_at_work_is_helped_out() -> None:
    world = World()
    file = make_file("recording", 1)
    world.provider("bad", file, trait="idler")
    world.provider("good", file)
    outcome = run(world, world.request(file))
    assert outcome.succeeded
    assert outcome.seconds < LIMITS.patience_seconds + 5


@pytest.mark.parametrize(("trait", "words"), [
    ("mute", "fell silent before uploading anything"),
    ("idler", "brought nothing for 45 s"),
    ("liar", "which the bucket does not have"),
    ("spoiler", "which the bucket does not have"),
    ("decliner", "disk-error: as it is"),
    ("busy", "busy: as it is"),
])
def test_the_account_says_what_became_of_the_one_who_has_it(trait: str, words: str) -> None:
    world = World()
    file = make_file("recording", 10)
    world.provider("bad", file, trait=trait)
    world.provider("without-it")
    outcome = run(world, world.request(file))
    assert isinstance(outcome.error, NotAvailable)
    assert words in outcome.error.message
    assert "no answer from node without-" in outcome.error.message
    assert outcome.error.details["account"]["rounds"] >= 1
    assert outcome.seconds <= SECONDS_MAX


def test_nobody_has_it() -> None:
    world = World()
    world.provider("a")
    world.provider("b")
    outcome = run(world, world.request(make_file("recording", 10)))
    assert isinstance(outcome.error, NotAvailable)
    assert "no node has offered it" in outcome.error.message
    assert "no answer from node a, node b" in outcome.error.message
    assert outcome.seconds < LIMITS.want_rounds_max * LIMITS.offer_wait_seconds + 1


def test_another_provider_takes_over_when_one_dies_half_way() -> None:
    world = World()
    file = make_file("recording", 100)
    first = world.provider("first", file)
    world.provider("second", file)
    outcome = world.request(file)
    world.at(5.0, first.crash)
    run(world, outcome)
    assert outcome.succeeded
    assert "fell silent after uploading" in world.requests[0].machine.inquiry.answers["first"]
    assert 8 < outcome.seconds < 45


def test_a_sole_provider_may_come_back_within_patience() -> None:
    world = World()
    file = make_file("recording", 100)
    node = world.provider("a", file)
    outcome = world.request(file)
    world.at(5.0, node.crash)
    world.at(35.0, node.restart)
    run(world, outcome)
    assert outcome.succeeded


def test_a_sole_provider_that_stays_away_is_named() -> None:
    world = World()
    file = make_file("recording", 100)
    node = world.provider("a", file)
    outcome = world.request(file)
    world.at(5.0, node.crash)
    run(world, outcome)
    assert isinstance(outcome.error, NotAvailable)
    assert "node a: offered it, then fell silent after uploading" in outcome.error.message
    assert "none came back within 45 s" in outcome.error.message
    assert outcome.seconds < 5 + LIMITS.provider_silence_seconds + LIMITS.patience_seconds + 10


def test_a_provider_may_take_long_over_a_chunk_and_over_a_lookup() -> None:
    world = World()
    file = make_file("recording", 4)
    world.provider("a", file, rate=1e6, lookup_seconds=30.0)
    outcome = run(world, world.request(file))
    assert outcome.succeeded
    assert world.said["Want"] <= 4  # now and then the channel is asked whether somebody else can help


@settings(max_examples=150, deadline=None)
@example(5.0, False, 0.0, 0.0, 1).via("both hear at once")
@example(5.0, False, 25.0, 0.0, 1).via("the provider hears last")
@example(5.0, False, 0.0, 25.0, 1).via("the requester hears last")
@example(0.04, False, 25.0, 0.0, 1).via("while the manifest is on its way")
@given(st.floats(0.0, 25.0), st.booleans(), st.sampled_from([0.0, 0.05, 0.3, 3.0, 25.0]),
       st.sampled_from([0.0, 0.05, 0.3, 3.0, 25.0]), st.integers(0, 2))
def test_the_channel_may_move_to_another_bucket_while_a_file_is_on_its_way(
        when: float, copied: bool, provider_hears: float, requester_hears: float, providers_more: int) -> None:
    world = World(net=Net(download_bytes_per_second=50e6))
    file = make_file("recording", 60)
    for number in range(1 + providers_more):
        world.provider(f"provider-{number}", file)
    outcome = world.request(file, manifest=False)
    world.at(when, lambda: world.move(copied=copied, providers_hear=provider_hears, requesters_hear=requester_hears))
    assert run(world, outcome).succeeded, outcome.error
    assert world.said["Want"] == 1, "nobody was given up"
    assert outcome.seconds < 60


def test_a_liar_is_found_out_though_the_channel_has_moved() -> None:
    world = World()
    file = make_file("recording", 60)
    world.provider("bad", file, trait="liar")
    outcome = world.request(file)
    world.at(0.5, lambda: world.move(copied=False, providers_hear=0.0, requesters_hear=0.0))
    assert isinstance(run(world, outcome).error, NotAvailable)
    assert outcome.seconds < 2 * LIMITS.patience_seconds


def test_what_was_uploaded_lately_is_uploaded_to_the_other_bucket_too() -> None:
    world = World()
    file = make_file("recording", 20)
    world.provider("a", file)
    assert run(world, world.request(file)).succeeded
    world.move(copied=False, providers_hear=0.0, requesters_hear=0.0)
    world.run(until=world.now)
    outcome = run(world, world.request(file))
    assert outcome.succeeded, outcome.error
    assert world.said["Want"] == 2
    assert set(world.uploads.values()) == {2}


def test_a_bucket_out_of_reach_at_the_start_fails_clearly_and_soon() -> None:
    world = World(net=Net(bucket_down=(0.0, 1e9)))
    file = make_file("recording", 10)
    world.provider("a", file)
    outcome = run(world, world.request(file))
    assert isinstance(outcome.error, BucketUnreachable)
    assert outcome.seconds < 10


@pytest.mark.parametrize(("away_seconds", "succeeds"), [(20.0, True), (200.0, False)])
def test_a_bucket_out_of_reach_half_way_is_waited_for(away_seconds: float, succeeds: bool) -> None:
    world = World(net=Net(bucket_down=(5.0, 5.0 + away_seconds)))
    file = make_file("recording", 100)
    world.provider("a", file)
    outcome = run(world, world.request(file))
    assert outcome.succeeded is succeeds
    if not succeeds:
        assert isinstance(outcome.error, BucketUnreachable | NotAvailable)
        assert "it is down" in outcome.error.message or "bucket: it did not answer" in outcome.error.message
        assert outcome.seconds < 5 + 3 * LIMITS.patience_seconds


# --- manifests that are not this file's


def test_a_forged_manifest_is_given_up_for_a_true_one() -> None:
    world = World()
    file = make_file("recording", 3)
    world.provider("forger", forge(file, "forged"))
    outcome = world.request(file, manifest=False)
    world.at(0.5, lambda: None)
    world.provider("good", file)
    run(world, outcome)
    assert outcome.succeeded
    assert world.requests[0].machine.manifest == file.manifest


def test_a_forged_manifest_and_nothing_else_fails_and_names_the_forger() -> None:
    world = World()
    file = make_file("recording", 3)
    world.provider("forger", forge(file, "forged"))
    outcome = run(world, world.request(file, manifest=False))
    assert isinstance(outcome.error, NotAvailable)
    assert "node forger: offered a manifest that does not make this file" in outcome.error.message
    assert outcome.discards == 1


def test_a_forged_manifest_in_the_uri_is_the_uris_fault() -> None:
    world = World()
    forged = forge(make_file("recording", 3), "forged")
    world.provider("a", forged)
    outcome = run(world, world.request(forged))
    assert isinstance(outcome.error, CorruptFile)
    assert "get the URI anew" in outcome.error.message


def test_many_forged_manifests_end() -> None:
    world = World()
    file = make_file("recording", 3)
    for number in range(10):
        world.provider(f"forger-{number}", forge(file, f"forged-{number}"))
    outcome = run(world, world.request(file, manifest=False))
    assert isinstance(outcome.error, NotAvailable)
    assert outcome.discards <= LIMITS.corrupt_retries_max


def test_a_cut_that_nobody_offers_any_more_is_given_up_for_one_that_is() -> None:
    world = World()
    file = make_file("recording", 20)
    other_cut = dataclasses.replace(make_file("recording", 20, chunk_size=20_000_000))
    other = make_file("other cut", 21, chunk_size=20_000_000, true_sha1=file.sha1)
    assert other_cut.sha1 == file.sha1
    world.bucket[str(file.manifest_sha1)] = (str(file.manifest_sha1), 2000)  # the manifest is there, no chunk is
    world.provider("a", other)
    outcome = run(world, world.request(file))
    assert outcome.succeeded
    assert world.requests[0].machine.manifest == other.manifest


@pytest.mark.parametrize("length", [0, 5])
def test_an_object_of_the_wrong_length_is_removed_and_asked_for_anew(length: int) -> None:
    world = World()
    file = make_file("note", 1)
    world.bucket[file.sha1] = (name_of("damage"), length)
    world.provider("a", file)
    outcome = run(world, world.request(file))
    assert outcome.succeeded
    assert world.bucket[file.sha1] == (file.sha1, file.size)


# --- any schedule


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, int, list[str], Net, list[tuple[float, str, int]], bool]:
    traits = draw(st.lists(st.sampled_from(TRAITS), max_size=4))
    faults = [
        (draw(st.floats(0.0, 40.0)), draw(st.sampled_from(["crash", "restart", "bands"])), draw(st.integers(0, 4)))
        for _ in range(draw(st.integers(0, 6)))
    ]
    net = Net(loss=draw(st.sampled_from([0.0, 0.1, 0.4])), duplication=draw(st.sampled_from([0.0, 0.3])),
              reorder=draw(st.sampled_from([0.0, 0.3])), bucket_failure=draw(st.sampled_from([0.0, 0.0, 0.2])),
              damage=draw(st.sampled_from([0.0, 0.0, 0.1])), faults_end=draw(st.floats(0.0, 25.0)))
    return (draw(st.integers(0, 2**32)), draw(st.sampled_from([0, 1, 2, 5, 17, 70])), traits, net, faults,
            draw(st.booleans()))


def play(schedule: tuple[int, int, list[str], Net, list[tuple[float, str, int]], bool], *, good: bool) -> Outcome:
    seed, count, traits, net, faults, with_manifest = schedule
    world = World(seed, net)
    file = make_file("recording", count)
    nodes = [world.provider(f"{number}-{trait}", file, trait=trait) for number, trait in enumerate(traits)]
    if good:
        world.provider("good", file)
    limits = dataclasses.replace(LIMITS, want_rounds_max=20)
    for when, what, number in faults:
        if what == "bands":
            world.at(when, world.restore_bands)
        elif nodes:
            node = nodes[number % len(nodes)]
            world.at(when, node.crash if what == "crash" else node.restart)
    return run(world, world.request(file, manifest=with_manifest, limits=limits))


@settings(max_examples=150, deadline=None)
@given(schedules())
def test_every_schedule_ends_in_success_or_a_named_error_in_bounded_time(
        schedule: tuple[int, int, list[str], Net, list[tuple[float, str, int]], bool]) -> None:
    spoilers = schedule[2].count("spoiler")
    assert play(schedule, good=False).seconds <= (1 + LIMITS.corrupt_retries_max * spoilers) * SECONDS_MAX


# One offer came twice, the second time after the bands were restored and before the channel was asked anew: only the
# node that damages objects was still known, and it alone was asked for the chunk again and again.
@example((142595796, 2, ["honest", "spoiler"], Net(duplication=0.3, reorder=0.3, faults_end=1.0),
          [(0.5, "bands", 0), (0.0, "crash", 0)], False))
@settings(max_examples=150, deadline=None)
@given(schedules())
def test_a_good_provider_and_a_working_bucket_suffice(
        schedule: tuple[int, int, list[str], Net, list[tuple[float, str, int]], bool]) -> None:
    seed, count, traits, net, faults, with_manifest = schedule
    if net.loss:  # whoever damages objects on purpose, while the good one does not hear the question, can win
        traits = [trait for trait in traits if trait != "spoiler"]
    net = dataclasses.replace(net, bucket_failure=0.0, damage=0.0)
    outcome = play((seed, count, traits, net, faults, with_manifest), good=True)
    assert outcome.succeeded, outcome.error


# --- growth


def test_a_node_without_the_file_does_the_same_for_a_long_transfer_as_for_a_short_one() -> None:
    handled = {}
    for chunk_count in (2, 500):
        world = World()
        file = make_file("recording", chunk_count)
        for number in range(3):
            world.provider(f"has-it-{number}", file)
        bystanders = [world.provider(f"bystander-{number}") for number in range(20)]
        assert run(world, world.request(file)).succeeded
        handled[chunk_count] = [node.received for node in bystanders]
    assert handled[2] == handled[500] == [2] * 20  # one Want, one Cancel


@pytest.mark.parametrize("node_count", [2, 10, 100, 1000])
def test_the_time_of_a_transfer_does_not_grow_with_the_channel(node_count: int) -> None:
    world = World()
    file = make_file("recording", 20)
    world.provider("has-it", file)
    for number in range(node_count - 2):
        world.provider(f"bystander-{number}")
    outcome = run(world, world.request(file))
    assert outcome.succeeded
    assert outcome.seconds < 6
    assert sum(world.said.values()) < 50


def test_a_thousand_offers_cost_no_more_messages_than_a_few() -> None:
    world = World()
    file = make_file("recording", 100)
    for number in range(1000):
        world.provider(f"has-it-{number}", file)
    outcome = run(world, world.request(file))
    assert outcome.succeeded
    assert world.said["Offer"] == 1000
    assert sum(node.uploaded_bytes > 0 for node in world.providers.values()) <= LIMITS.stripe_providers_max + 1
    assert sum(world.said.values()) - 1000 < 300


def test_a_hundred_thousand_chunks_cost_the_requester_little_each() -> None:
    world = World(net=Net(download_bytes_per_second=1e12))
    counts = []
    for chunk_count in (1_000, 20_000):
        file = make_file(f"recording of {chunk_count}", chunk_count)
        world.provider(f"has-{chunk_count}", file, rate=1e12)
        request = world.request(file)
        world.run(until=1e6)
        assert request.succeeded
        counts.append(world.requests[-1].cost_events / chunk_count)
    assert counts[1] <= 1.5 * counts[0] < 10
