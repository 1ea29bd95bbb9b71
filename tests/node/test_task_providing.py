"""Running tasks for a channel: claims, the cache, results and their files, receipts, and what a crash leaves behind."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import BucketUnreachable, DiskError, HubUnreachable, NotPermitted, TaskUnknown, UrlExpired
from kachery_fast.node.task_backends import Backend
from kachery_fast.protocol import claims
from kachery_fast.protocol.tasks import check_receipt, sign_receipt, sign_result
from kachery_fast.store.files import FileStore
from tests.network import LOOPS, run_on
from tests.node.support import CHANNEL, CHUNK, Network, data_of, identity_of, nothing_left, other_tasks, until
from tests.node.tasks import Asker, Runner, running, served

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
TASK = "ab" * 16
NOT_THERE = "sha1://" + "ab" * 20


def state(net: Network, task: str) -> str:
    """How the hub has a task."""
    found = net.hub.claims.get((net.channel, task))
    return "none" if found is None else found.state


def has_state(net: Network, task: str, wanted: str) -> bool:
    return state(net, task) == wanted


# --- calculations and queries


def test_a_calculation_is_run_once_and_its_signed_result_is_in_the_bucket(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        askers = [Asker(net.peers[0], n=1) for _ in range(100)]
        asker = askers[0]
        run = await a.told(backend)
        assert (run["function"], run["kwargs"], run["channel"], run["kind"]) == (
            "sum.1", {"n": 1}, CHANNEL, "pure-calculation")
        a.report(backend, run, "running", progress=0.5, text="half")
        await until(lambda: any(getattr(body, "text", "") == "half" for body in asker.answers))
        a.report(backend, run, "finished", result={"json": {"sum": 0.1}})
        await asyncio.gather(*(each.heard("finished") for each in askers))
        assert asker.statuses() == ["queued", "running", "finished"]
        found = asker.result()
        assert (found.node_id, found.result, found.kwargs) == (a.peer.identity.node_id, {"json": {"sum": 0.1}},
                                                               {"n": 1})
        assert 0 < found.started_ms <= found.finished_ms
        await until(lambda: state(net, asker.task) == "finished")
        assert len(net.hub.granted) == 1
    served(loop_kind, tmp_path, work)


@pytest.mark.parametrize("kind", ["pure-calculation", "action"])
def test_nothing_ends_before_it_began_even_when_the_clock_is_set_back(
        loop_kind: str, tmp_path: Path, kind: str) -> None:
    async def work() -> None:
        async with running(tmp_path) as (net, (a,)):
            backend = a.connect()
            asker = Asker(net.peers[0], kind, "sum.1" if kind == "pure-calculation" else "mail.1")
            run = await a.told(backend)
            net.hub.clock = lambda: time.time() - 30.0
            a.report(backend, run, "finished", result={"json": 1})
            told = await asker.heard("finished")
            found = asker.result() if kind == "pure-calculation" else check_receipt(told.receipt, CHANNEL, asker.task)
            assert 0 < found.started_ms <= found.finished_ms
    run_on(loop_kind, work(), 60)


def test_of_several_nodes_one_runs_it(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, "a", "c", "d") as (net, runners):
            backends = [runner.connect() for runner in runners]
            asker = Asker(net.peers[0], n=1)
            lines = [asyncio.ensure_future(runner.told(backend))
                     for runner, backend in zip(runners, backends, strict=True)]
            done, waiting = await asyncio.wait(lines, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0.05)
            assert len([line for line in lines if line.done()]) == 1
            winner = lines.index(done.pop())
            runners[winner].report(backends[winner], lines[winner].result(), "finished", result={"json": 1})
            await asker.heard("finished")
            for line in waiting:
                line.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert asker.result().node_id == runners[winner].peer.identity.node_id
    run_on(loop_kind, work(), 60)


def test_a_result_that_is_there_by_now_is_not_computed_again(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], n=1)
        await a.ends(backend, asker, result={"json": 1})
        again = Asker(net.peers[0], n=1)
        await again.heard("finished")
        assert len(net.hub.granted) == 2
        assert len(net.bucket.puts) == 1
    served(loop_kind, tmp_path, work)


def test_a_result_of_a_node_that_may_not_give_one_is_reported_and_replaced(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], n=1)
        run = await a.told(backend)
        net.bucket.objects[asker.object_name] = sign_result(
            channel=CHANNEL, task=asker.task, function="sum.1", kind="pure-calculation", kwargs={"n": 1},
            result={"json": "a lie"}, started_ms=1, finished_ms=2, key=identity_of("stranger").key)
        a.report(backend, run, "finished", result={"json": "the truth"})
        await asker.heard("finished")
        assert asker.result().result == {"json": "the truth"}
        assert net.hub.bad_results == [asker.task]
        # Also before a run.
        net.bucket.objects[asker.object_name] = b"rubbish"
        again = Asker(net.peers[0], n=1)
        await a.ends(backend, again, result={"json": 2})
        assert asker.result().result == {"json": 2}
    served(loop_kind, tmp_path, work)


def test_a_query_is_run_each_time_and_its_result_replaces_the_one_before(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        for number in range(3):
            asker = Asker(net.peers[0], "query", "now.1", day="Monday")
            await a.ends(backend, asker, result={"json": number})
            found = asker.result()
            assert (found.result, found.task) == ({"json": number}, asker.task)
    served(loop_kind, tmp_path, work)


def test_the_file_of_a_result_is_in_the_bucket_before_the_result_is(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        data = data_of(10 * CHUNK + 5)
        uri = a.peer.put(data)
        there = data[CHUNK:2 * CHUNK]  # one chunk was uploaded before
        net.bucket.objects[net.object(a.peer.store.put_bytes(there).sha1)] = there
        net.bucket.puts.clear()
        asker = Asker(net.peers[0], n=1)
        await a.ends(backend, asker, result={"file": str(uri), "format": "bytes"})
        assert asker.result().result == {"file": str(uri), "format": "bytes"}
        assert net.bucket.puts[-1] == asker.object_name
        assert len(net.bucket.puts) == 1 + 10 + 1  # the manifest, the chunks that were not there, the result
        assert max(len(batch) for batch in net.hub.signed) == 4
        assert a.peer.traffic.uploaded_objects == 11
        c = await net.peer("c")
        a.peer.providing.heard = lambda *_: None  # type: ignore[method-assign]
        assert await c.load(uri) == data  # from the bucket alone
    served(loop_kind, tmp_path, work, sign_batch_max=4)


def test_a_small_result_file_has_no_manifest_and_equal_chunks_go_once(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        for number, (data, puts) in enumerate([(b"small", 2), (b"", 2), (bytes(5 * CHUNK), 3)]):
            net.bucket.puts.clear()
            uri = a.peer.put(data)
            asker = Asker(net.peers[0], n=number)
            await a.ends(backend, asker, result={"file": str(uri), "format": "text"})
            assert len(net.bucket.puts) == puts
    served(loop_kind, tmp_path, work)


def test_a_result_file_that_cannot_be_uploaded_is_the_error_of_the_task(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        uri = a.peer.put(data_of(3 * CHUNK))
        chunk = net.object(a.peer.store.put_bytes(data_of(3 * CHUNK)[:CHUNK]).sha1)
        net.bucket.fail(chunk, *[BucketUnreachable(object=chunk, why="gone", attempts=1)] * 1000)
        asker = Asker(net.peers[0], n=1)
        error = (await a.ends(backend, asker, heard="error", result={"file": str(uri), "format": "bytes"})).error
        assert error["type"] == "BucketUnreachable"
        assert error["message"].startswith("its result could not be shared: ")
        assert chunk in error["message"]
        assert asker.object_name not in net.bucket.objects
        await until(lambda: state(net, asker.task) == "released")
        missing = Asker(net.peers[0], n=2)
        told = await a.ends(backend, missing, heard="error", result={"file": NOT_THERE, "format": "bytes"})
        assert told.error["type"] == "NotInStore"
    served(loop_kind, tmp_path, work, patience_seconds=0.2)


def test_a_result_outlives_a_hub_and_a_bucket_that_are_away(loop_kind: str, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], n=1)
        run = await a.told(backend)
        trouble = BucketUnreachable(object=asker.object_name, why="gone", attempts=1)
        net.bucket.fail(asker.object_name, trouble, trouble)
        troubles = [HubUnreachable(url="http://hub", why="connection refused")] * 2
        sign = a.peer.link.hub.sign_task_result

        async def signed(*arguments: Any, **named: Any) -> Any:
            if troubles:
                raise troubles.pop()
            return await sign(*arguments, **named)

        monkeypatch.setattr(a.peer.link.hub, "sign_task_result", signed)
        a.report(backend, run, "finished", result={"json": 1})
        await asker.heard("finished")
        found = asker.result()
        assert found.result == {"json": 1}
        assert 0 < found.started_ms <= found.finished_ms
        assert not troubles
    served(loop_kind, tmp_path, work, patience_seconds=30)


def test_a_result_that_is_too_long_for_an_answer_is_an_error(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], n=1)
        told = await a.ends(backend, asker, heard="error", result={"json": "x" * 70_000})
        assert told.error["type"] == "TooLarge"
    served(loop_kind, tmp_path, work, task_result_size_bytes_max=1000)


def test_an_expired_url_for_a_result_is_signed_anew_and_not_for_ever(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], n=1)
        name = asker.object_name
        run = await a.told(backend)
        net.bucket.fail(name, *[UrlExpired(object=name, why="expired")] * 2)
        a.report(backend, run, "finished", result={"json": 1})
        await asker.heard("finished")
        asker = Asker(net.peers[0], n=2)
        name = asker.object_name
        run = await a.told(backend)
        net.bucket.fail(name, *[UrlExpired(object=name, why="expired")] * 3)
        a.report(backend, run, "finished", result={"json": 1})
        assert (await asker.heard("error")).error["type"] == "UrlExpired"
    served(loop_kind, tmp_path, work)


def test_a_function_that_raised_is_told_with_its_traceback(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], n=1)
        error = {"type": "ValueError", "message": "\x00" * 5000, "traceback": "\x1b é" * 50_000}
        told = (await a.ends(backend, asker, "error", error=error)).error
        assert told["type"] == "ValueError"
        assert told["traceback"].endswith("\x1b é")
        await until(lambda: state(net, asker.task) == "failed")
    served(loop_kind, tmp_path, work)


def test_a_report_that_is_not_a_backends_own_is_refused(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (net, (a,)):
            mine, other = a.connect(), a.connect()
            asker = Asker(net.peers[0], n=1)
            await until(lambda: mine.runs or other.runs)
            mine, other = (mine, other) if mine.runs else (other, mine)
            run = await a.told(mine)
            with pytest.raises(TaskUnknown):
                a.report(other, run, "finished", result={"json": "a lie"})
            a.report(mine, run, "finished", result={"json": 1})
            with pytest.raises(TaskUnknown):
                a.report(mine, run, "finished", result={"json": 2})
            await asker.heard("finished")
            assert asker.result().result == {"json": 1}
    run_on(loop_kind, work(), 60)


# --- actions


def test_an_action_has_a_receipt_that_the_hub_has_too(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        for outcome, hub_state in (("finished", "finished"), ("error", "failed")):
            asker = Asker(net.peers[0], "action", "mail.1", to="x")
            run = await a.told(backend)
            assert [entry.state for entry in a.ledger.left(net.hub.url, CHANNEL)] == ["started"]
            a.report(backend, run, outcome, error={"type": "E"} if outcome == "error" else None)
            receipt = check_receipt((await asker.heard(outcome)).receipt, CHANNEL, asker.task)
            assert (receipt.outcome, receipt.node_id) == (outcome, a.peer.identity.node_id)
            await until(partial(has_state, net, asker.task, hub_state))
            await until(lambda: a.ledger.left(net.hub.url, CHANNEL) == [])
        assert net.bucket.objects == {}  # an action has no result
    served(loop_kind, tmp_path, work)


def test_an_action_that_the_disk_cannot_note_is_not_started(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        keep = a.ledger.set

        def full(hub: str, channel: str, task: str, now: str, *more: Any) -> None:
            if now == "started":
                raise DiskError(action="writing", path="tasks.db", why="no space left")
            keep(hub, channel, task, now, *more)

        monkeypatch.setattr(a.ledger, "set", full)
        asker = Asker(net.peers[0], "action", "mail.1")
        assert "no space left" in (await asker.heard("busy")).detail
        await until(lambda: state(net, asker.task) == "released")
        assert backend.runs == set()
    served(loop_kind, tmp_path, work)


def test_a_receipt_that_the_disk_does_not_take_is_told_all_the_same(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any) -> None:
        raise DiskError(action="writing", path="tasks.db", why="no space left")

    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], "action", "mail.1")
        run = await a.told(backend)
        with monkeypatch.context() as patched:
            patched.setattr(a.ledger, "set", full)
            patched.setattr(a.ledger, "remove", full)
            a.report(backend, run, "finished")
            check_receipt((await asker.heard("finished")).receipt, CHANNEL, asker.task)
            await until(lambda: state(net, asker.task) == "finished")
            await asyncio.sleep(0.05)
        # The next run of the node says that it does not know; the hub knows better.
        await a.providing.close()
        assert [entry.state for entry in a.ledger.left(net.hub.url, CHANNEL)] == ["started"]
        a.serve()
        await until(lambda: a.ledger.left(net.hub.url, CHANNEL) == [])
        assert state(net, asker.task) == "finished"
    served(loop_kind, tmp_path, work)


def test_an_action_that_another_node_has_is_forgotten_here(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, "a", "c") as (net, (a, c)):
            await c.peer.link.hub.claim_task(CHANNEL, TASK, "action", "mail.1", attempt="x" * 16)
            backend = a.connect()
            asker = Asker(net.peers[0], "action", "mail.1", task=TASK)
            await asker.heard("queued")
            await until(lambda: a.backends.describe()["running"] == 0)
            assert a.ledger.left(net.hub.url, CHANNEL) == []
            assert backend.runs == set()
    run_on(loop_kind, work(), 60)


def test_a_claim_that_the_hub_refuses_is_forgotten(loop_kind: str, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_arguments: Any, **_named: Any) -> Any:
        raise NotPermitted(who="This node", action="claim tasks", channel=CHANNEL, why="it was revoked")

    async def work() -> None:
        async with running(tmp_path) as (net, (a,)):
            a.connect()
            monkeypatch.setattr(a.peer.link.hub, "claim_task", refused)
            asker = Asker(net.peers[0], "action", "mail.1")
            assert "it was revoked" in (await asker.heard("hub")).detail
            assert a.ledger.left(net.hub.url, CHANNEL) == []
    run_on(loop_kind, work(), 60)


def test_a_receipt_outlives_a_hub_that_is_away(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], "action", "mail.1")
        run = await a.told(backend)
        net.hub.down = True
        a.report(backend, run, "finished")
        check_receipt((await asker.heard("finished")).receipt, CHANNEL, asker.task)
        await asyncio.sleep(0.2)
        assert [entry.state for entry in a.ledger.left(net.hub.url, CHANNEL)] == ["finished"]
        net.hub.down = False
        await until(lambda: state(net, asker.task) == "finished")
        await until(lambda: a.ledger.left(net.hub.url, CHANNEL) == [])
    served(loop_kind, tmp_path, work)


def test_an_action_whose_backend_goes_is_unknown_for_ever(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], "action", "mail.1")
        await a.told(backend)
        backend.close()
        await asker.heard("unknown")
        await until(lambda: state(net, asker.task) == "unknown")
        second = a.connect()
        again = Asker(net.peers[0], "action", "mail.1", task=asker.task)
        await again.heard("unknown")
        assert len(net.hub.granted) == 1
        assert second.runs == set()
    served(loop_kind, tmp_path, work)


@pytest.mark.parametrize(("kind", "function"), [("query", "now.1"), ("action", "touch.1")])
def test_what_may_run_twice_is_taken_up_by_the_next_backend(
        loop_kind: str, tmp_path: Path, kind: str, function: str) -> None:
    async def work() -> None:
        async with running(tmp_path) as (net, (a,)):
            first = a.connect()
            asker = Asker(net.peers[0], kind, function)
            await a.told(first)
            second = a.connect()
            first.close()
            await a.ends(second, asker, result={"json": 1})
            await until(lambda: state(net, asker.task) == "finished")
            await until(lambda: a.ledger.left(net.hub.url, CHANNEL) == [])
    run_on(loop_kind, work(), 60)


def test_another_node_takes_over_what_a_backend_left(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, "a", "c") as (net, (a, c)):
            first = a.connect()
            asker = Asker(net.peers[0], n=1)
            await a.told(first)
            second = c.connect()
            first.close()
            await asker.heard("unregistered")
            await until(lambda: state(net, asker.task) == "released")
            asker.ask()
            await c.ends(second, asker, result={"json": 1})
            assert asker.result().node_id == c.peer.identity.node_id
    run_on(loop_kind, work(), 60)


# --- what a crash leaves


@pytest.mark.parametrize(("left", "told"), [
    (["claiming"], "released"), (["claiming", "started"], "unknown"),
    (["claiming", "started", "finished"], "finished")])
def test_the_next_run_of_a_node_tells_what_it_knows(
        loop_kind: str, tmp_path: Path, left: list[str], told: str) -> None:
    async def work() -> None:
        async with running(tmp_path) as (net, (a,)):
            await a.peer.link.hub.claim_task(CHANNEL, TASK, "action", "mail.1", attempt="x" * 16)
            receipt = sign_receipt(channel=CHANNEL, task=TASK, function="mail.1", kwargs={}, outcome="finished",
                                   error=None, started_ms=1, finished_ms=2, key=a.peer.identity.key)
            await a.providing.close()
            for each in left:
                if each == "claiming":
                    a.ledger.begin(net.hub.url, CHANNEL, TASK, "mail.1", "x" * 16)
                else:
                    a.ledger.set(net.hub.url, CHANNEL, TASK, each, receipt if each == "finished" else None)
            net.hub.down = True
            a.serve()
            backend = a.connect()
            await asyncio.sleep(0.05)
            asker = Asker(net.peers[0], "action", "mail.1", task=TASK)
            # Before the hub hears of it, nothing is started, and what is known is told.
            await asker.heard({"released": "hub", "unknown": "unknown", "finished": "finished"}[told])
            assert backend.runs == set()
            net.hub.down = False
            await until(lambda: state(net, TASK) == told)
            await until(lambda: a.ledger.left(net.hub.url, CHANNEL) == [])
            again = Asker(net.peers[0], "action", "mail.1", task=TASK)
            if told == "released":
                await a.ends(backend, again)
            else:
                await again.heard(told)
                assert backend.runs == set()
    run_on(loop_kind, work(), 60)


def test_a_ledger_that_cannot_be_read_stops_actions_alone(
        loop_kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with running(tmp_path) as (net, (a,)):
            await a.providing.close()
            a.peer.settings.storage_dir.mkdir(exist_ok=True)
            (a.peer.settings.storage_dir / "kachery-fast-tasks.db").write_bytes(b"rubbish" * 1000)
            a.serve()
            backend = a.connect()
            action = Asker(net.peers[0], "action", "mail.1")
            assert "kachery-fast-tasks.db" in (await action.heard("hub")).detail
            asker = Asker(net.peers[0], n=1)
            await a.ends(backend, asker, result={"json": 1})
            assert "earlier runs of this node" in caplog.text
    run_on(loop_kind, work(), 60)


def test_what_the_hub_does_not_take_is_not_told_for_ever(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (net, (a,)):
            await a.providing.close()
            a.ledger.begin(net.hub.url, CHANNEL, TASK, "mail.1", "x" * 16)  # never claimed
            a.serve()
            await until(lambda: a.ledger.left(net.hub.url, CHANNEL) == [])
            assert state(net, TASK) == "none"
    run_on(loop_kind, work(), 60)


def test_a_claim_whose_answer_is_lost_is_given_back(loop_kind: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        hub = a.peer.link.hub
        claim = hub.claim_task

        async def lost(*arguments: Any, **named: Any) -> Any:
            await claim(*arguments, **named)
            net.hub.down = True
            await net.hub.reached()

        for kind, function in (("action", "mail.1"), ("query", "now.1")):
            monkeypatch.setattr(hub, "claim_task", lost, raising=False)
            asker = Asker(net.peers[0], kind, function)
            assert "connection refused" in (await asker.heard("hub")).detail
            net.hub.down = False
            if kind == "action":
                await until(partial(has_state, net, asker.task, "released"))
                await until(lambda: a.ledger.left(net.hub.url, CHANNEL) == [])
            monkeypatch.setattr(hub, "claim_task", claim)
            asker.ask()
            await a.ends(backend, asker, result={"json": 1})
    served(loop_kind, tmp_path, work)


def test_an_action_whose_claim_lapsed_while_the_machine_slept_is_not_begun(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        note, slept = a.ledger.set, 0.0

        def sleeping(hub: str, channel: str, task: str, state: str, receipt: Any = None) -> None:
            note(hub, channel, task, state, receipt)
            if state == "started":
                net.hub.clock = lambda: time.time() + slept
                if asked:
                    found = net.hub.claims[CHANNEL, task]
                    net.hub.claims[CHANNEL, task] = claims.look(found, net.hub.now_ms())

        monkeypatch.setattr(a.ledger, "set", sleeping)
        for asked in (True, False):
            slept += net.hub.lease_seconds + 1
            asker = Asker(net.peers[0], "action", "mail.1")
            if asked:
                assert "lapsed" in (await asker.heard("busy")).detail
                await until(lambda: a.ledger.left(net.hub.url, CHANNEL) == [])
                assert (backend.runs, state(net, asker.task)) == (set(), "unknown")
            else:  # nobody has noticed: the claim is renewed, and the action begins
                await a.ends(backend, asker)
    served(loop_kind, tmp_path, work)


def test_claims_are_kept_alive_for_as_long_as_the_function_runs(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, task_lease_seconds=0.6) as (net, (a,)):
            net.hub.lease_seconds = 0.6
            backend = a.connect()
            asker = Asker(net.peers[0], "action", "mail.1")
            run = await a.told(backend)
            expires = net.hub.claims[CHANNEL, asker.task].expires_ms
            await until(lambda: net.hub.claims[CHANNEL, asker.task].expires_ms > expires + 1000)
            net.hub.down = True
            await asyncio.sleep(0.3)
            net.hub.down = False
            await until(lambda: net.hub.now_ms() < net.hub.claims[CHANNEL, asker.task].expires_ms)
            a.report(backend, run, "finished")
            await asker.heard("finished")
            await until(lambda: state(net, asker.task) == "finished")
    run_on(loop_kind, work(), 60)


def test_a_receipt_turns_unknown_into_knowledge(
        loop_kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], "action", "mail.1")
        run = await a.told(backend)
        clock = net.hub.clock
        net.hub.clock = lambda: clock() + 100.0  # nobody has kept the claim
        assert (await net.hub.find_task(CHANNEL, asker.task)).state == "unknown"
        await until(lambda: "has lapsed while it runs" in caplog.text)
        a.report(backend, run, "finished")
        await until(lambda: state(net, asker.task) == "finished")
    served(loop_kind, tmp_path, work, task_lease_seconds=0.6)


# --- withdrawing and ending


def test_a_run_that_nobody_waits_for_is_broken_off(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        asker = Asker(net.peers[0], n=1)
        run = await a.told(backend)
        asker.cancel()
        assert await a.told(backend, "cancel") == {"type": "cancel", "run": run["run"]}
        a.report(backend, run, "cancelled")
        await until(lambda: state(net, asker.task) == "released")
        assert a.backends.describe()["running"] == 0
    served(loop_kind, tmp_path, work)


def test_closing_tells_the_hub_and_leaves_nothing_running(loop_kind: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (net, (a,)):
            before = other_tasks()
            backend = a.connect(2)
            asker = Asker(net.peers[0], n=1)
            action = Asker(net.peers[0], "action", "mail.1")
            for _ in range(2):
                await a.told(backend)
            backend.close()
            await a.providing.close()
            assert (state(net, asker.task), state(net, action.task)) == ("released", "unknown")
            assert [task for task in other_tasks() if task not in before] == []
            a.serve()
    with nothing_left(tmp_path):
        run_on(loop_kind, work(), 60)


def test_closing_in_the_middle_of_an_upload_breaks_it_off(loop_kind: str, tmp_path: Path) -> None:
    async def work(net: Network, a: Runner, backend: Backend) -> None:
        uri = a.peer.put(data_of(5 * CHUNK))
        asker = Asker(net.peers[0], n=1)
        run = await a.told(backend)
        net.bucket.gate.clear()
        a.report(backend, run, "finished", result={"file": str(uri), "format": "bytes"})
        await asyncio.sleep(0.05)
        await asyncio.wait_for(a.providing.close(), 10)
        assert net.bucket.puts == []
        assert asker.statuses()[-1] == "running"
        net.bucket.gate.set()
        a.serve()
    served(loop_kind, tmp_path, work)


def test_closing_does_not_wait_until_a_long_file_has_been_read(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = threading.Event()

    def endless(_store: FileStore, _sha1: str, _wanted: str | None = None, *, progress: Any) -> Any:
        while True:
            progress(0)
            reading.set()
            time.sleep(0.001)

    async def work(net: Network, a: Runner, backend: Backend) -> None:
        uri = a.peer.put(data_of(5 * CHUNK))
        asker = Asker(net.peers[0], n=1)
        run = await a.told(backend)
        with monkeypatch.context() as patched:
            patched.setattr(FileStore, "manifest_for", endless)
            a.report(backend, run, "finished", result={"file": str(uri), "format": "bytes"})
            await until(reading.is_set)
            await asyncio.wait_for(a.providing.close(), 10)
        assert asker.statuses()[-1] == "running"
        a.serve()
    served(loop_kind, tmp_path, work)


def test_a_fault_of_the_program_is_an_answer_too(
        loop_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any) -> None:
        raise RuntimeError("broken")

    async def work(net: Network, a: Runner, backend: Backend) -> None:
        monkeypatch.setattr(a.ledger, "begin", broken)
        action = Asker(net.peers[0], "action", "mail.1")
        assert "fault of the program" in (await action.heard("hub")).detail
        monkeypatch.setattr(FileStore, "find", broken)
        asker = Asker(net.peers[0], n=1)
        told = await a.ends(backend, asker, heard="error", result={"file": NOT_THERE, "format": "bytes"})
        assert "fault of the program" in told.error["message"]
    served(loop_kind, tmp_path, work)
