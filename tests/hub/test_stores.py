"""Owners' buckets at either store, S3 or Google's: what nodes may do there, what the hub does, and what tests find."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import EngineUnusable, InvalidArgument
from kachery_fast.hub.engines.gcs_settings import GcsSettings, check_gcs_credentials, check_gcs_settings
from kachery_fast.hub.engines.s3_settings import S3Credentials, S3Settings, check_settings
from kachery_fast.protocol.names import ObjectName, object_name

from ..gcs_server import EMAIL, KEYS, service_account
from ..network import LOOPS, run_on
from ..store_server import BUCKET, StoreServer
from .browsing import browser, sign_in
from .support import CHANNEL, STEPS, Clock, running_world, sha1_of, use_bucket, world_on

parametrized = pytest.mark.parametrize("loop_kind", LOOPS)
# Where the keys make no difference.
either = pytest.mark.parametrize("store", ["s3", "both"], indirect=True)
FILES = ObjectName(CHANNEL, "file", "", "", "")


@pytest.mark.parametrize(("kind", "fields"), [
    *((kind, fields) for kind in ("s3", "gcs") for fields in (
        {"bucket": "../x"}, {"bucket": "a..b"}, {"bucket": "x/y"}, {"bucket": "a"}, {"bucket": "a b c"},
        {"prefix": "a/../b"}, {"prefix": "a//b"}, {"prefix": "a?b"}, {"prefix": "ä"},
        {"endpoint": "https://user@example.org"}, {"endpoint": "https://example.org/x"})),
    ("s3", {"region": "EU"}), ("s3", {"region": ""}), ("s3", {"region": "x.evil.example"}),
    ("gcs", {"bucket": "ab"}), ("gcs", {"bucket": "Upper"}), ("gcs", {"bucket": "la?"}), ("gcs", {"expire_days": -1}),
    ("gcs", {"expire_days": 5}), ("gcs", {"expire_days": 10**9, "prefix": "x"}),
])
def test_settings_that_could_lead_elsewhere_are_refused(kind: str, fields: dict[str, Any]) -> None:
    def check(**fields: Any) -> object:
        if kind == "gcs":
            return check_gcs_settings(GcsSettings(**fields))
        return check_settings(S3Settings(**{"region": "eu-central-1", **fields}))

    check(bucket="lab")
    with pytest.raises(InvalidArgument):
        check(**{"bucket": "lab", **fields})


def test_credentials_do_not_show_themselves() -> None:
    assert repr(S3Credentials("a", "b")) == "S3Credentials(…)"
    assert repr(check_gcs_credentials(service_account(), "", "")) == "GcsCredentials(…)"


# --- objects


@parametrized
def test_a_signed_upload_creates_one_object_of_its_length_in_its_time(
    tmp_path: Path, store: StoreServer, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, store) as world:
            await use_bucket(world, store)
            a = await world.member("a")
            assert await world.upload(a, b"a chunk") == 200
            assert await world.upload(a, b"a chunk") == 412
            sha1 = sha1_of(b"another")
            (signed,) = await a.sign_uploads(CHANNEL, [(sha1, 7)])
            # Google has the length in a header of its own, S3 in what is signed.
            long, short = (b"SignatureDoesNotMatch",) * 2 if store.kind == "s3" else (
                b"EntityTooLarge", b"EntityTooSmall")
            for data, headers, code in ((b"longer than it", signed.headers, long), (b"short", signed.headers, short),
                                        (b"another", {}, b"SignatureDoesNotMatch")):
                async with world.session.put(signed.url, data=data, headers=headers) as answer:
                    assert answer.status == (400 if code.startswith(b"Entity") else 403)
                    assert code in await answer.read()
            store.set(offset=301)
            async with world.session.put(signed.url, data=b"another", headers=signed.headers) as answer:
                assert answer.status == (403 if store.kind == "s3" else 400)
                assert b"expired" in await answer.read()
            store.set(offset=0)
            reads = await a.sign_downloads(FILES, [sha1_of(b"a chunk"), sha1])
            for url, status, body in zip(reads.urls, (200, 404), (b"a chunk", None), strict=True):
                async with world.session.get(url) as answer:
                    assert answer.status == status
                    assert body is None or await answer.read() == body
                async with world.session.get(url.partition("?")[0]) as answer:
                    assert answer.status == 403
                for request in (world.session.head, world.session.delete):
                    async with request(url) as answer:
                        assert answer.status == 403, "it was signed for GET"

    run_on(loop_kind, scenario())


@either
def test_nodes_are_told_where_the_bucket_is_and_that_reads_are_signed(tmp_path: Path, store: StoreServer) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, store) as world:
            a = await world.member("a")

            async def told() -> list[tuple[str, bool]]:
                (info,) = (await a.node_config()).channels
                _, answer = await world.post("/api/getChannelBucketBaseUrl", b'{"channelName": "lab"}')
                return [(info.bucket_url.rstrip("/"), info.private), (answer["url"], answer["private"])]

            own = await told()
            assert own == [(f"{world.url}/bucket", False)] * 2
            await use_bucket(world, store, prefix="deep/er")
            assert await told() == [(f"{store.url}/{BUCKET}/deep/er", True)] * 2
            await world.owner.call(store.action, **store.settings, name="open", publicReads=True)
            await world.owner.call("setBucket", channel=CHANNEL, engine="open")
            assert await told() == [(f"{store.url}/{BUCKET}", False)] * 2
            with pytest.raises(InvalidArgument, match="everybody may read"):
                await world.owner.call("changeChannel", channel=CHANNEL, private=True)
            await world.owner.call("setBucket", channel=CHANNEL, engine="mine")
            await world.owner.call("changeChannel", channel=CHANNEL, private=True)
            with pytest.raises(InvalidArgument, match="everybody may read"):
                await world.owner.call("setBucket", channel=CHANNEL, engine="open")
            await world.owner.call("setBucket", channel=CHANNEL, engine=None)
            assert [url for url, _ in await told()] == [url for url, _ in own]

    run_on("uvloop", scenario())


def test_the_owner_looks_into_his_bucket_and_empties_it(tmp_path: Path, store: StoreServer) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, store) as world:
            await use_bucket(world, store, prefix="p")
            a = await world.member("a")
            contents = [b"x" * number for number in range(1, 6)]
            for data in contents:
                assert await world.upload(a, data) == 200
            names = sorted(object_name(CHANNEL, sha1_of(data)) for data in contents)
            page = await world.owner.call("listObjects", channel=CHANNEL, limit=3)
            assert [line["name"] for line in page["objects"]] == names[:3]
            rest = await world.owner.call("listObjects", channel=CHANNEL, limit=3, after=page["next"])
            assert [line["name"] for line in rest["objects"]] == names[3:]
            assert rest["next"] is None
            assert (await world.owner.call("listObjects", channel=CHANNEL, kind="feeds"))["objects"] == []

            async def counted() -> bool:
                stored = (await world.owner.call("showUsage", channel=CHANNEL))["stored"]
                return {"kind": "sha1", "objects": 5, "sizeBytes": 15} in stored

            while not await counted():
                pass
            today = (await world.owner.call("showUsage", channel=CHANNEL))["days"][-1]
            assert (today["uploads"], today["uploadBytes"]) == (5, 15), "what was signed counts"
            removed = await world.owner.call("removeObjects", channel=CHANNEL, names=names[:2] + names[:1])
            assert (removed["removed"], len(removed["missing"])) == (2, 0)
            gone = await world.owner.call("deleteChannel", channel=CHANNEL)
            assert (gone["objectsRemoved"], gone["left"]) == (3, "")
            by_library = {line.split()[1] for line in store.requests() if line.startswith("JSON ")}
            assert by_library == ({"GET", "DELETE", "POST"} if "serviceAccount" in store.credentials else set()), (
                "what Google's library is for")

    run_on("uvloop", scenario())


def test_damage_is_looked_at_and_removed_there(tmp_path: Path, store: StoreServer) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, store) as world:
            await use_bucket(world, store)
            a = await world.member("a")
            good, bad = sha1_of(b"good"), sha1_of(b"what it should be")
            assert await world.upload(a, b"good") == 200
            assert await world.upload(a, b"something else", bad) == 200
            assert not await a.report_corrupt(CHANNEL, good, "0" * 40)
            assert await a.report_corrupt(CHANNEL, bad, "0" * 40)
            names = [line["name"] for line in (await world.owner.call("listObjects", channel=CHANNEL))["objects"]]
            assert names == [object_name(CHANNEL, good)]

    run_on("uvloop", scenario())


# --- credentials

_WRONG: list[dict[str, Any]] = [{"secretKey": 5}, {"accessKey": "with a space"}, {"more": 1}, {"name": ""},
                                {"name": "mine"}]
WRONG: dict[str, list[dict[str, Any]]] = {
    "s3": [*_WRONG, {"accessKey": None}, {"region": "?"}],
    "gcs": [*_WRONG, {"serviceAccount": service_account() + "x"}, {"serviceAccount": service_account() * 20},
            {"bucket": "?"}],
}


@either
def test_credentials_are_in_no_answer_log_audit_entry_file_or_page(
    tmp_path: Path, store: StoreServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    async def scenario() -> None:
        async with world_on(tmp_path, store) as world, browser(world) as mine:
            await use_bucket(world, store, prefix="p", **({} if store.kind == "s3" else {"expireDays": 5}))
            await world.owner.call("changeCredentials", engine="mine", **store.credentials)
            if store.kind == "gcs":
                await world.owner.call("setUpBucket", engine="mine")
            for kind in ("listEngines", "showAudit"):
                seen.append(json.dumps(await world.owner.call(kind)))
            for kind in ("showChannel", "testChannel", "showAudit"):
                seen.append(json.dumps(await world.owner.call(kind, channel=CHANNEL)))
            assert store.action in seen[1]
            assert BUCKET in seen[1]
            for fields in [*WRONG[store.kind], {"secretKey": f"{store.credentials['secretKey']} x"}]:
                status, answer = await world.ask(json.dumps(
                    {"type": store.action, "name": "other", **store.settings, **fields}).encode())
                assert status >= 400
                seen.append(json.dumps(answer))
            for some in ({"accessKey": store.credentials["accessKey"]}, {}):
                with pytest.raises(InvalidArgument) as refused:
                    await world.owner.call("changeCredentials", engine="mine", **some)
                seen.append(refused.value.message)
            a = await world.member("a")
            seen.append(str(await a.node_config()))
            store.remove_bucket()
            with pytest.raises(EngineUnusable) as gone:
                await world.owner.call("listObjects", channel=CHANNEL)
            seen.append(gone.value.message)
            assert ("NoSuchBucket" if store.kind == "s3" else "does not exist") in gone.value.message
            await sign_in(world, mine)
            for path in (f"/channels/{CHANNEL}", "/buckets", "/audit", "/api"):
                seen.append((await mine.get(path)).text)

    run_on("asyncio-debug", scenario())
    files = b"".join(path.read_bytes() for path in (tmp_path / "hub").glob("hub.db*"))
    for secret in store.secrets:
        for text in [*seen, caplog.text]:
            assert secret not in text
        assert secret.encode() not in files


# --- trying it out


@parametrized
@pytest.mark.parametrize("private", [False, True])
def test_a_channel_that_works_is_found_to(tmp_path: Path, store: StoreServer, loop_kind: str, private: bool) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, store) as world:
            await world.owner.call("changeChannel", channel=CHANNEL, private=private)
            await use_bucket(world, store)
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert tried["ok"], tried
            assert [step["name"] for step in tried["steps"]] == STEPS
            assert tried["bucket"] == "mine"
            assert (await world.owner.call("listObjects", channel=CHANNEL))["objects"] == []
            if "serviceAccount" not in store.credentials:
                methods = [line.split()[0] for line in store.requests()]
                assert methods[:7] == ["GET", "PUT", "PUT", "GET", "GET", "HEAD", "DELETE"]

    run_on(loop_kind, scenario())


WRONG_AT_S3: list[tuple[dict[str, Any], dict[str, Any], int, str, str]] = [
    ({"bucket": False}, {}, 0, "NoSuchBucket", "Make the bucket"),
    ({"region": "us-west-2"}, {}, 0, "expecting 'us-west-2'", "region"),
    ({"denied": ["PutObject"]}, {}, 1, "AccessDenied", "s3:PutObject"),
    ({"denied": ["DeleteObject"]}, {}, 5, "AccessDenied", "s3:DeleteObject"),
    ({"denied": ["ListBucket"]}, {}, 4, "AccessDenied", "s3:ListBucket"),
    ({"denied": ["GetObject"]}, {}, 0, "AccessDenied", "s3:ListBucket"),
    ({}, {"bucket": "another-bucket"}, 0, "NoSuchBucket", "correct its name"),
]
WRONG_AT_GOOGLE: list[tuple[dict[str, Any], dict[str, Any], int, str, str]] = [
    ({"bucket": False}, {}, 0, "NoSuchBucket", "Make the bucket"),
    ({"denied": ["storage.objects.create"]}, {}, 1, "storage.objects.create", "to upload"),
    ({"denied": ["storage.objects.delete"]}, {}, 5, "storage.objects.delete", "to remove"),
    ({"denied": ["storage.objects.list"]}, {}, 4, "storage.objects.list", "to list"),
    ({"denied": ["storage.objects.list"]}, {}, 0, "storage.objects.list", "cannot be told from what is forbidden"),
    ({"denied": ["storage.objects.get"]}, {}, 3, "storage.objects.get", "to read"),
    ({"offset": 700}, {}, 1, "ExpiredToken", "clock"),
]


@pytest.mark.parametrize(("store", "state", "fields", "step", "why", "advice"), [
    *(("s3", *case) for case in WRONG_AT_S3), *((keys, *case) for keys in KEYS for case in WRONG_AT_GOOGLE),
], indirect=["store"])
def test_what_is_wrong_is_named_with_what_to_do(
    tmp_path: Path, store: StoreServer, state: dict[str, Any], fields: dict[str, Any], step: int, why: str, advice: str
) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, store) as world:
            await use_bucket(world, store, **fields)
            store.set(**state)
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert not tried["ok"]
            found = tried["steps"][step]
            assert not found["ok"]
            assert why in found["why"]
            assert advice in found["advice"]
            assert tried["steps"][-1]["ok"], "the messages flow all the same"

    run_on("uvloop", scenario())


@pytest.mark.parametrize(("store", "fields", "why", "advice"), [
    ("s3", {"accessKey": "AKIAUNKNOWN"}, "InvalidAccessKeyId", "not known"),
    ("s3", {"secretKey": "wrong"}, "SignatureDoesNotMatch", "does not belong"),
    ("hmac", {"accessKey": "GOOG1EUNKNOWN"}, "InvalidAccessKeyId", "not known"),
    ("hmac", {"secretKey": "wrong"}, "SignatureDoesNotMatch", "give the credentials anew"),
    ("account", {"serviceAccount": service_account().replace(EMAIL, "another@lab.org")}, "SignatureDoesNotMatch",
     "give the credentials anew"),
], ids=["s3-unknown", "s3-wrong", "gcs-unknown", "gcs-wrong", "gcs-another's"], indirect=["store"])
def test_wrong_keys_are_named_and_can_be_changed(
    tmp_path: Path, store: StoreServer, fields: dict[str, Any], why: str, advice: str
) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, store) as world:
            await use_bucket(world, store, **fields)
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert why in tried["steps"][0]["why"]
            assert advice in tried["steps"][0]["advice"]
            assert [step["ok"] for step in (tried["steps"][0], tried["steps"][-1])] == [False, True]
            await world.owner.call("changeCredentials", engine="mine", **store.credentials)
            assert (await world.owner.call("testChannel", channel=CHANNEL))["ok"]

    run_on("uvloop", scenario())


@either
@pytest.mark.parametrize(("seconds", "said"), [(600, r"-(59\d|60[01])"), (-600, r"\+(599|60\d)")])
def test_clocks_that_differ_are_named(tmp_path: Path, store: StoreServer, seconds: int, said: str) -> None:
    async def scenario() -> None:
        clock = Clock()
        # With a clock that is behind the hub's own messages do not flow, and are not waited for.
        async with world_on(tmp_path, store, clock, connect_timeout_seconds=1.0) as world:
            await use_bucket(world, store)
            clock.now += seconds
            first = (await world.owner.call("testChannel", channel=CHANNEL))["steps"][0]
            assert re.search(f"its clock is {said} s from the hub's", first["why"]), first

    run_on("uvloop", scenario())


@pytest.mark.live
@pytest.mark.parametrize(("variable", "action"), [
    ("KACHERY_TEST_S3", "addS3Bucket"), ("KACHERY_TEST_GCS", "addGcsBucket")])
def test_a_real_bucket_works(tmp_path: Path, variable: str, action: str) -> None:
    """The variable has the fields of the action, as JSON."""
    fields = os.environ.get(variable)
    if not fields:
        pytest.skip(f"{variable} names no bucket")

    async def scenario() -> None:
        async with running_world(tmp_path) as world:
            await world.owner.call(action, name="real", **json.loads(fields))
            await world.owner.call("setBucket", channel=CHANNEL, engine="real")
            tried = await world.owner.call("testChannel", channel=CHANNEL)
            assert tried["ok"], tried
            await world.owner.call("deleteChannel", channel=CHANNEL)

    run_on("uvloop", scenario())


# --- the website


@parametrized
@either
def test_a_bucket_is_added_chosen_and_tested_on_the_website_without_a_script(
    tmp_path: Path, store: StoreServer, loop_kind: str
) -> None:
    async def scenario() -> None:
        async with world_on(tmp_path, store) as world, browser(world) as mine:
            await sign_in(world, mine)
            page = await mine.get("/buckets")
            page = await mine.submit(page.form(f"/do/{store.action}"), **{**store.settings, "name": "mine <b>"})
            assert "mine &lt;b&gt;" in page.text
            assert "mine <b>" not in page.text
            (line,) = (await world.owner.call("listEngines"))["engines"]
            assert (line["kind"], line["pathStyle"], line["createOnly"], line["publicReads"]) == (
                store.kind, True, True, False)
            page = await mine.get("/buckets")
            page = await mine.submit(page.form("/do/changeCredentials"), **store.credentials)
            assert "has other credentials now" in page.text
            page = await mine.get(f"/channels/{CHANNEL}")
            assert "Objects are in the hub's own bucket" in page.text
            page = await mine.submit(page.form("/do/setBucket"), engine=line["id"])
            assert "The bucket of lab was changed." in page.text
            tested = await mine.submit(page.form("/do/testChannel"))
            assert "Everything works." in tested.text
            store.remove_bucket()
            tested = await mine.submit(page.form("/do/testChannel"))
            assert "Something is wrong." in tested.text
            assert "NoSuchBucket" in tested.text
            page = await mine.submit(page.form("/do/setBucket"), engine="")
            page = await mine.submit((await mine.get("/buckets")).form("/do/removeEngine"))
            assert "The hub has forgotten mine" in page.text

    run_on(loop_kind, scenario())
