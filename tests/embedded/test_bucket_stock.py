"""What the embedded bucket knows of its objects: how much there is, who moved what, and when each was last read."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_fast.embedded.bucket_files import LAST_READ_STEP_SECONDS, ObjectFiles
from kachery_fast.embedded.bucket_names import KINDS
from kachery_fast.embedded.bucket_stock import Total, walk
from kachery_fast.errors import ObjectExists, ObjectMissing

from .bucket_server import NAME, Bucket, get_request, put_request, running_bucket, wait_until

DAY = 24 * 3600.0
NODE = "ab" * 32
RESULT = "ch1/task_results/11/22/33/1122330000000000000000000000000000000000"


class Seen:
    """An observer that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    def arrived(self, object_name: str, node_id: str, size_bytes: int) -> None:
        self.told.append(("arrived", object_name, node_id, str(size_bytes)))

    def found(self, object_name: str) -> None:
        self.told.append(("found", object_name))

    def sent(self, object_name: str, node_id: str, size_bytes: int) -> None:
        self.told.append(("sent", object_name, node_id, str(size_bytes)))


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def bucket(tmp_path: Path, seen: Seen) -> Iterator[Bucket]:
    with running_bucket(tmp_path / "root", observer=seen) as running:
        yield running


def name_of(data: bytes, channel: str = "ch1") -> str:
    sha1 = hashlib.sha1(data).hexdigest()
    return f"{channel}/sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"


def create(files: ObjectFiles, name: str, data: bytes, *, replace: bool = False) -> None:
    incoming = files.create(name, len(data), replace=replace)
    try:
        os.pwrite(incoming.fd, data, 0)
        incoming.commit()
    finally:
        incoming.close()


# --- who moved what


def test_an_upload_is_told_with_the_node_that_it_was_signed_for(bucket: Bucket, seen: Seen) -> None:
    request = put_request(bucket.sign(NAME, 3, node_id=NODE), b"abc")
    assert (bucket.talk(request).status, bucket.talk(request).status) == (200, 412)
    assert seen.told == [("arrived", NAME, NODE, "3"), ("found", NAME)]


def test_the_node_is_part_of_what_is_signed(bucket: Bucket, seen: Seen) -> None:
    signed = bucket.sign(NAME, 3, node_id=NODE)
    named = f"&X-Kachery-Node={NODE}"
    for replaced in ((NODE, "cd" * 32), (named, ""), (named, "&X-Kachery-Node="), (named, named * 2), (NODE, "%C3%A4")):
        assert bucket.talk(put_request(signed, b"abc", replace=replaced)).status == 403
    assert (seen.told, bucket.files()) == ([], [])


def test_uploads_that_break_off_or_are_refused_are_not_told(bucket: Bucket, seen: Seen) -> None:
    with bucket.connect() as sock:
        sock.sendall(put_request(bucket.sign(NAME, 3, node_id=NODE), b"ab", content_length="3"))
    assert bucket.talk(put_request(bucket.sign(NAME, 3, node_id=NODE), b"abcd")).status == 413
    assert seen.told == []


def test_of_a_download_what_was_sent_is_told(bucket: Bucket, seen: Seen) -> None:
    bucket.put(NAME, b"0123456789")
    del seen.told[:]
    assert bucket.talk(get_request(f"/bucket/{NAME}")).status == 200
    assert bucket.talk(get_request(f"/bucket/{NAME}", range="bytes=2-4")).body == b"234"
    assert bucket.talk(get_request(f"/bucket/{NAME}", method="HEAD"), head_only=True).status == 200
    assert bucket.talk(get_request(f"/bucket/{NAME}", range="bytes=20-")).status == 416
    assert bucket.talk(get_request(f"/bucket/{name_of(b'absent')}")).status == 404
    wait_until(lambda: len(seen.told) >= 2)
    assert seen.told == [("sent", NAME, "", "10"), ("sent", NAME, "", "3")]


def test_of_a_download_that_breaks_off_its_beginning_is_told(bucket: Bucket, seen: Seen) -> None:
    size = 64 * 1024 * 1024
    path = bucket.root / NAME
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(size)
    with bucket.connect() as sock:
        sock.sendall(get_request(f"/bucket/{NAME}"))
        received = 0
        while received < 1024 * 1024:
            received += len(sock.recv(1 << 16))
    wait_until(lambda: seen.told)
    (told,) = seen.told
    assert told[:3] == ("sent", NAME, "")
    assert 0 < int(told[3]) < size


# --- when it was last read


def last_read(bucket: Bucket, name: str = NAME) -> float:
    (found,) = bucket.server.objects(name)
    return found.last_read


def test_an_object_counts_as_read_when_it_comes(bucket: Bucket) -> None:
    bucket.clock.now += 400 * DAY
    bucket.put(NAME, b"abc")
    assert last_read(bucket) == pytest.approx(bucket.clock.now, abs=1)


@pytest.mark.parametrize("how", ["get", "range", "head", "put"])
def test_a_use_of_an_object_is_kept_to_the_hour_and_changes_nothing_else(bucket: Bucket, how: str) -> None:
    def use() -> str:
        if how == "put":
            assert bucket.put(NAME, b"abc").status == 412
            return bucket.talk(get_request(f"/bucket/{NAME}", method="HEAD"), head_only=True).headers["etag"]
        if how == "range":
            return bucket.talk(get_request(f"/bucket/{NAME}", range="bytes=1-1")).headers["etag"]
        request = get_request(f"/bucket/{NAME}", method="HEAD" if how == "head" else "GET")
        return bucket.talk(request, head_only=how == "head").headers["etag"]

    bucket.clock.now = time.time()  # many systems set access times too, by their own clock
    bucket.put(NAME, b"abc")
    etag = use()
    came = last_read(bucket)
    bucket.clock.now += LAST_READ_STEP_SECONDS / 2
    assert use() == etag
    assert last_read(bucket) == pytest.approx(came, abs=60)
    bucket.clock.now += 30 * DAY
    assert use() == etag
    assert last_read(bucket) == pytest.approx(bucket.clock.now, abs=1)
    assert (bucket.root / NAME).read_bytes() == b"abc"


def test_only_what_was_not_read_since_expires(bucket: Bucket) -> None:
    bucket.put(NAME, b"abc")
    came = bucket.clock.now
    assert not bucket.server.expire(NAME, came - 1)
    assert bucket.server.expire(NAME, came + 2)
    assert not bucket.server.expire(NAME, came + 2)
    assert bucket.files() == []


def test_an_object_that_is_being_read_does_not_expire(tmp_path: Path) -> None:
    with running_bucket(tmp_path / "root") as bucket:
        size = 64 * 1024 * 1024
        path = bucket.root / NAME
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(size)
        with bucket.connect() as sock:
            sock.sendall(get_request(f"/bucket/{NAME}"))
            received = len(sock.recv(100))
            assert received
            bucket.clock.now += 1000 * DAY
            assert not bucket.server.expire(NAME, bucket.clock.now)
            while piece := sock.recv(1 << 20):
                received += len(piece)
        assert received > size
        wait_until(lambda: bucket.server.expire(NAME, bucket.clock.now))


# --- how much there is


def test_what_changes_is_counted_by_kind_and_channel(bucket: Bucket) -> None:
    wait_until(lambda: bucket.server.counted)
    bucket.put(NAME, b"abc")
    bucket.put(NAME, b"abc")
    bucket.put(RESULT, b"first")
    bucket.put(RESULT, b"a longer one", replace=True)
    bucket.put(name_of(b"x", "ch2"), b"x")
    assert bucket.server.totals("ch1") == {"sha1": Total(1, 3), "task_results": Total(1, 12), "feeds": Total()}
    assert bucket.server.totals("ch2")["sha1"] == Total(1, 1)
    bucket.server.remove(NAME)
    assert bucket.server.expire(RESULT, bucket.clock.now + 10)
    assert bucket.server.totals("ch1") == dict.fromkeys(KINDS, Total())


def test_what_an_earlier_run_left_is_counted(tmp_path: Path) -> None:
    with running_bucket(tmp_path / "root") as bucket:
        bucket.put(NAME, b"abc")
        bucket.put(RESULT, b"12345")
        (bucket.root / "ch1" / "stray").write_bytes(b"not an object")
    with running_bucket(tmp_path / "root") as bucket:
        wait_until(lambda: bucket.server.counted)
        assert bucket.server.totals("ch1") == {"sha1": Total(1, 3), "task_results": Total(1, 5), "feeds": Total()}


@pytest.mark.parametrize("again", [False, True], ids=["first count", "recount"])
def test_what_changes_while_all_is_counted_is_counted_once(tmp_path: Path, again: bool) -> None:
    """Other threads create, replace and remove all the while; in the end the count is what the disk says."""
    files = ObjectFiles(tmp_path / "root")
    names = [name_of(b"%d" % number, channel) for number in range(400) for channel in ("ch1", "ch2")]
    for name in names[:400]:
        create(files, name, b"x" * 10)
    if again:
        files.stock.count(threading.Event())
    done = threading.Event()

    def change(seed: int) -> None:
        chance = random.Random(seed)
        while not done.is_set():
            name = chance.choice(names) if chance.random() < 0.8 else name_of(chance.randbytes(4), f"ch{seed}")
            try:
                if chance.random() < 0.5:
                    create(files, name, b"x" * chance.randrange(100))
                else:
                    files.remove(name)
                create(files, RESULT.replace("ch1", f"ch{seed}"), b"x" * chance.randrange(100), replace=True)
            except (ObjectExists, ObjectMissing):
                continue

    changers = [threading.Thread(target=change, args=(seed,)) for seed in (1, 2, 3)]
    for thread in changers:
        thread.start()
    for _ in range(3):
        files.stock.count(threading.Event())
    done.set()
    for thread in changers:
        thread.join()
    for channel in ("ch1", "ch2", "ch3"):
        found = {kind: [one.size_bytes for one in files.objects(f"{channel}/{kind}/")] for kind in KINDS}
        assert files.stock.totals(channel) == {kind: Total(len(sizes), sum(sizes)) for kind, sizes in found.items()}


def test_objects_come_in_the_order_of_their_names_from_any_place_on(tmp_path: Path) -> None:
    files = ObjectFiles(tmp_path / "root")
    feed = "lab/feeds/" + "aa/bb/cc/" + "aabbcc" + "0" * 58 + "/subfeeds/11/22/33/112233" + "0" * 34
    names = [name_of(b"%d" % number, channel) for number in range(20) for channel in ("lab", "lab-2", "lab.x")]
    names += [f"{feed}/{last}" for last in ("subfeed.json", "0", "1", "10", f"segments/{'0' * 40}")]
    for name in names:
        create(files, name, b"x")
    found = [one.name for one in files.objects()]
    assert found == sorted(names)
    for after in (*names, "", "lab", "lab/", "lab/sha1", "lab/sha1/80", "lab0", "~"):
        assert [one.name for one in files.objects("", after)] == [name for name in sorted(names) if name > after]
        assert [one.name for one in files.objects("lab/", after)] == [
            name for name in sorted(names) if name > after and name.startswith("lab/")]


def test_empty_folders_go_with_their_last_object_and_come_back(tmp_path: Path) -> None:
    files = ObjectFiles(tmp_path / "root")
    for _ in range(2):
        create(files, NAME, b"x")
        files.remove(NAME)
        assert not (tmp_path / "root" / "ch1").exists()


def test_a_walk_follows_no_symbolic_links(tmp_path: Path) -> None:
    files = ObjectFiles(tmp_path / "root")
    create(files, NAME, b"x")
    (tmp_path / "root").rename(tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "ch1").symlink_to(tmp_path / "elsewhere" / "ch1")
    assert list(itertools.chain(files.objects(), files.objects("ch1/"), walk(tmp_path / "root", "ch1/sha1/"))) == []
