"""A node's key and its client code: the files of 2022, private, and sound after any start."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kachery_fast.errors import DiskError, NodeError
from kachery_fast.node.identity import ClientAuth, load_identity, write_whole
from kachery_fast.protocol.signing import private_key, public_id

# RFC 8410 §10.3, whose key is an Ed25519 one in PKCS#8, version 1, as in 2022.
RFC_PRIVATE = "MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC"
RFC_PUBLIC = "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_key(directory: Path, text: str, mode: int = 0o600) -> Path:
    path = directory / "private.pem"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_first_start_makes_a_key_and_later_ones_find_it(tmp_path: Path) -> None:
    first = load_identity(tmp_path / "new")
    assert load_identity(tmp_path / "new").node_id == first.node_id
    assert mode(tmp_path / "new" / "private.pem") == 0o600
    assert mode(tmp_path / "new" / "public.pem") == 0o600
    assert (tmp_path / "new" / "kachery-node-id").read_text() == first.node_id
    assert not list((tmp_path / "new").glob(".private*"))


def test_the_files_are_those_of_2022(tmp_path: Path) -> None:
    write_key(tmp_path, f"-----BEGIN PRIVATE KEY-----\n{RFC_PRIVATE}\n-----END PRIVATE KEY-----\n")
    assert load_identity(tmp_path).node_id == RFC_PUBLIC
    public = (tmp_path / "public.pem").read_text().splitlines()
    assert public[1] == "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="
    made = load_identity(tmp_path / "made", make_seed=lambda: bytes(range(32)))
    assert len((tmp_path / "made" / "private.pem").read_text().splitlines()) == 3
    openssl = subprocess.run(["openssl", "pkey", "-in", str(tmp_path / "made" / "private.pem"), "-text", "-noout"],
                             check=True, capture_output=True, text=True).stdout
    assert made.node_id in "".join(openssl.split()).replace(":", "")


@pytest.mark.parametrize("text", [
    f"-----BEGIN PRIVATE KEY-----{RFC_PRIVATE}-----END PRIVATE KEY-----",
    f"-----BEGIN PRIVATE KEY-----\r\n{RFC_PRIVATE[:40]}\r\n{RFC_PRIVATE[40:]}\r\n-----END PRIVATE KEY-----\r\n",
])
def test_line_ends_do_not_matter(tmp_path: Path, text: str) -> None:
    write_key(tmp_path, text)
    assert load_identity(tmp_path).node_id == RFC_PUBLIC


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, open_to: int) -> None:
    load_identity(tmp_path)
    (tmp_path / "private.pem").chmod(open_to)
    with pytest.raises(NodeError, match="chmod 600"):
        load_identity(tmp_path)


@pytest.mark.parametrize("text", [
    "", "rubbish", f"-----BEGIN PRIVATE KEY-----\n{RFC_PRIVATE[:-8]}\n-----END PRIVATE KEY-----\n",
    f"-----BEGIN PUBLIC KEY-----\n{RFC_PRIVATE}\n-----END PUBLIC KEY-----\n",
    "-----BEGIN PRIVATE KEY-----\n====\n-----END PRIVATE KEY-----\n",
    f"-----BEGIN PRIVATE KEY-----\nMC8{RFC_PRIVATE[3:]}\n-----END PRIVATE KEY-----\n",
    "-----BEGIN PRIVATE KEY-----\n\u00e9\u00e9\n-----END PRIVATE KEY-----\n",
])
def test_a_damaged_key_is_not_replaced(tmp_path: Path, text: str) -> None:
    path = write_key(tmp_path, text)
    with pytest.raises(NodeError, match=r"private\.pem is not an Ed25519 private key"):
        load_identity(tmp_path)
    assert path.read_text() == text


def test_wrong_public_parts_are_mended(tmp_path: Path) -> None:
    node_id = load_identity(tmp_path).node_id
    (tmp_path / "kachery-node-id").write_text("ab" * 32)
    (tmp_path / "public.pem").unlink()
    assert load_identity(tmp_path).node_id == node_id
    assert (tmp_path / "kachery-node-id").read_text() == node_id
    assert (tmp_path / "public.pem").exists()


def test_a_directory_whose_key_is_not_there_is_made_no_other_nodes(tmp_path: Path) -> None:
    seed = bytes(range(32)).hex()
    for name, start in (("variable", lambda root: load_identity(root, seed)), ("file", load_identity)):
        root = tmp_path / name
        node_id = start(root).node_id
        (root / "private.pem").unlink(missing_ok=True)
        for lost in ((), ("public.pem",), ("kachery-node-id",)):
            kept = {path.name: path.read_bytes() for path in root.iterdir()}
            for found in lost:
                (root / found).unlink()
            before = {path.name: path.read_bytes() for path in root.iterdir()}
            for other in ("", "ab" * 32):
                with pytest.raises(NodeError, match="KACHERY_NODE_PRIVATE_KEY") as told:
                    load_identity(root, other)
                assert node_id[:16] in told.value.message
                assert ("private.pem" in told.value.message) == (not other)
                assert {path.name: path.read_bytes() for path in root.iterdir()} == before
            for name, data in kept.items():
                (root / name).write_bytes(data)
    assert load_identity(tmp_path / "variable", seed).node_id == public_id(private_key(bytes.fromhex(seed)))
    for path in (tmp_path / "file").iterdir():
        path.unlink()  # as the error says
    load_identity(tmp_path / "file")


def test_public_parts_that_say_nothing_are_not_overwritten_either(tmp_path: Path) -> None:
    (tmp_path / "kachery-node-id").write_text("")
    for seed in ("", "ab" * 32):
        with pytest.raises(NodeError, match="is the directory of a node"):
            load_identity(tmp_path, seed)
    assert [path.name for path in tmp_path.iterdir()] == ["kachery-node-id"]


def test_a_storage_directory_that_is_none_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        load_identity(tmp_path / "file")
    (tmp_path / "odd" / "private.pem").mkdir(parents=True)
    with pytest.raises(DiskError, match=r"private\.pem"):
        load_identity(tmp_path / "odd")


def test_first_starts_at_once_agree(tmp_path: Path) -> None:
    program = ("import sys, pathlib; from kachery_fast.node.identity import load_identity;"
               "sys.stdin.read(); print(load_identity(pathlib.Path(sys.argv[1])).node_id)")
    children = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "s")], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    ids = set()
    for child in children:
        assert child.stdout is not None
        with child.stdout:
            ids.add(child.stdout.read().strip())
        assert child.wait() == 0
    assert ids == {load_identity(tmp_path / "s").node_id}


def test_the_last_code_stays_valid_and_the_one_before_does_not(tmp_path: Path) -> None:
    auth = ClientAuth(tmp_path)
    codes = []
    for _ in range(3):
        auth.rotate()
        codes.append((tmp_path / "client-auth").read_text())
        assert mode(tmp_path / "client-auth") == 0o640
    assert [auth.accepts(code) for code in codes] == [False, True, True]
    assert len(codes[0]) == 12
    assert codes[0].isalpha()
    assert not auth.accepts("")
    assert not auth.accepts("\udcff\ud800"[:1])
    auth.remove()
    assert not auth.accepts(codes[2])
    assert not (tmp_path / "client-auth").exists()


def test_a_code_that_cannot_be_written_leaves_the_last_one_valid(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    auth = ClientAuth(tmp_path / "store")
    auth.rotate()
    code = auth.path.read_text()
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(DiskError):
        auth.rotate()
    assert auth.accepts(code)


def test_the_code_of_another_node_of_the_store_is_left_alone(tmp_path: Path) -> None:
    running, second = ClientAuth(tmp_path), ClientAuth(tmp_path)
    running.rotate()
    second.remove()
    assert running.accepts((tmp_path / "client-auth").read_text())


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "note"
    write_whole(path, "old", 0o600)
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new\udc00", 0o600)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_a_key_can_be_made_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    identity = load_identity(tmp_path)
    assert load_identity(tmp_path).node_id == identity.node_id
    assert not list(tmp_path.glob(".private.*"))
