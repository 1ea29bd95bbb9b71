"""Files and links of another directory: what is here already, and an account that adds up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kachery_fast.store import FileStore
from kachery_fast.store.files import SMALL_SIZE_BYTES_MAX
from kachery_fast.store.importing import FileImport
from kachery_fast.store.tally import Tally

from .children import CHUNK_SIZE_BYTES
from .data import counter_stream, sha1_of
from .test_cache import evict_all, fetch, keeper_of, store_of


def imported(source: Path, root: Path, *, dry_run: bool = False) -> Tally:
    tally = Tally()
    FileImport(source, root, tally, chunk_size_bytes=CHUNK_SIZE_BYTES, fingerprint_size_bytes=1024,
               dry_run=dry_run).run()
    return tally


def linked(tmp_path: Path, data: bytes) -> Path:
    target = tmp_path / "linked.dat"
    target.write_bytes(data)
    store_of(tmp_path / "old").link_file(target)
    return tmp_path / "old"


def test_a_cached_copy_of_what_the_other_directory_links_becomes_an_original(tmp_path: Path) -> None:
    data = counter_stream(1000)
    source, root = linked(tmp_path, data), tmp_path / "store"
    sha1 = fetch(root, data)
    for dry_run in (True, False):
        tally = imported(source, root, dry_run=dry_run)
        assert (tally.links.taken, tally.links.here) == (0, 1)
        assert keeper_of(root).index.totals().files == int(dry_run)
    assert evict_all(root) == set()
    assert store_of(root).has(sha1)


def test_a_link_is_taken_where_the_cached_copy_cannot_be_claimed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = counter_stream(1000)
    source, root = linked(tmp_path, data), tmp_path / "store"
    sha1 = fetch(root, data)
    with monkeypatch.context() as patch:
        patch.setattr("kachery_fast.store.cache.CacheIndex.claim", lambda *_: False)
        assert imported(source, root).links.taken == 1
    assert evict_all(root) == set()  # what is linked as well stays
    store_of(root).find(sha1).path.unlink()
    assert store_of(root).find(sha1).linked


def test_a_link_that_is_here_is_kept_while_its_file_is_as_it_was(tmp_path: Path) -> None:
    data = counter_stream(1000)
    source, root = linked(tmp_path, data), tmp_path / "store"
    other = tmp_path / "other.dat"
    other.write_bytes(data)
    store_of(root).link_file(other)
    assert imported(source, root).links.here == 1
    assert store_of(root).find(sha1_of(data)).path == other
    other.unlink()
    assert imported(source, root).links.taken == 1
    assert store_of(root).find(sha1_of(data)).path == tmp_path / "linked.dat"


@pytest.mark.parametrize("size", [1000, SMALL_SIZE_BYTES_MAX + 1])
@pytest.mark.parametrize("damage", [b"", b"zeros"])
def test_a_damaged_file_that_is_here_is_set_aside_and_taken_anew(tmp_path: Path, size: int, damage: bytes) -> None:
    data = counter_stream(size)
    source, root = tmp_path / "old", tmp_path / "store"
    sha1, _, manifest_sha1 = store_of(source).put_bytes(data)
    store_of(root).put_bytes(data)
    here = 0 if manifest_sha1 is None else 1
    path = store_of(root).find(sha1).path
    damage = damage and bytes(size)
    path.write_bytes(damage)

    tally = imported(source, root, dry_run=True)
    assert (tally.files.taken, tally.files.here, tally.replaced, tally.refused) == (1, here, [sha1], [])
    assert path.read_bytes() == damage
    tally = imported(source, root)
    assert (tally.files.taken, tally.files.here, tally.replaced, tally.refused) == (1, here, [sha1], [])
    assert path.read_bytes() == data
    assert (root / "damaged" / sha1).read_bytes() == damage
    assert imported(source, root).files.here == here + 1


def test_a_damaged_file_stays_where_nothing_good_can_take_its_place(tmp_path: Path) -> None:
    source, root = tmp_path / "old", tmp_path / "store"
    for place in (source, root):
        sha1 = store_of(place).put_bytes(b"the good bytes").sha1
        store_of(place).find(sha1).path.write_bytes(b"its bad bytes.")
    tally = imported(source, root)
    assert (tally.files.taken, tally.files.here, tally.replaced) == (0, 0, [])
    (refused,) = tally.refused
    assert refused[0] == f"sha1://{sha1}"
    assert "damaged as well" in refused[1]
    assert store_of(root).find(sha1).path.read_bytes() == b"its bad bytes."


def test_a_link_takes_the_place_of_a_damaged_file(tmp_path: Path) -> None:
    data = counter_stream(1000)
    source, root = linked(tmp_path, data), tmp_path / "store"
    sha1 = store_of(root).put_bytes(data).sha1
    store_of(root).find(sha1).path.write_bytes(bytes(1000))
    tally = imported(source, root)
    assert (tally.links.taken, tally.replaced) == (1, [sha1])
    assert store_of(root).find(sha1).path == tmp_path / "linked.dat"


def test_bytes_of_a_small_file_that_changed_at_the_second_reading_are_not_counted(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, other = counter_stream(1000), b"another"
    for each in (data, other):
        store_of(tmp_path / "old").put_bytes(each)
    put_files = FileStore.put_files

    def change_first(store: FileStore, paths: list[Path]) -> Any:
        for path in paths:
            if path.name == sha1_of(data):
                path.chmod(0o644)
                path.write_bytes(b"changed")
        return put_files(store, paths)

    monkeypatch.setattr(FileStore, "put_files", change_first)
    tally = imported(tmp_path / "old", tmp_path / "store")
    assert (tally.files.taken, tally.files.size_bytes) == (1, len(other))
    assert [what for what, _ in tally.refused] == [f"sha1://{sha1_of(data)}"]
