"""Bytes from a socket into a file, by splice and by copying."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kachery_fast.splice import FileReceiver, FileRefused

DATA = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(100_000))  # 3.2 MB
WAYS = [pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="only Linux has splice")), False]

pytestmark = pytest.mark.parametrize("use_splice", WAYS)


@contextmanager
def fed(data: bytes, timeout_seconds: float = 5.0) -> Iterator[socket.socket]:
    """A TCP socket at which ``data`` arrive, and nothing more."""
    with socket.create_server(("127.0.0.1", 0)) as listener, \
            socket.create_connection(listener.getsockname()) as sender:
        receiver, _ = listener.accept()
        with receiver:
            receiver.settimeout(timeout_seconds)
            thread = threading.Thread(target=sender.sendall, args=(data,))
            thread.start()
            yield receiver
            thread.join()


def test_bytes_land_at_their_offset_and_nowhere_else(tmp_path: Path, use_splice: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (len(DATA) + 200))
    fd = os.open(path, os.O_RDWR)
    with fed(DATA) as sock, FileReceiver(sock, fd, use_splice=use_splice) as receiver:
        done = 100
        receiver.write(b"head", 3)
        while done < len(DATA):
            count = receiver.move(done, len(DATA) - done)
            assert 0 < count <= len(DATA) - done
            done += count
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        assert sock.recv(100) == DATA[-100:]  # no more than asked for was taken
    os.close(fd)
    expected = b"x" * 3 + b"head" + b"x" * 93 + DATA[:-100] + b"x" * 200
    assert path.read_bytes() == expected


def test_the_limit_is_kept(tmp_path: Path, use_splice: bool) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with fed(DATA) as sock, FileReceiver(sock, fd, use_splice=use_splice) as receiver:
        assert [receiver.move(n, 1) for n in range(10)] == [1] * 10
        rest = len(DATA) - 10
        while rest:
            rest -= len(sock.recv(rest))
    assert os.pread(fd, 20, 0) == DATA[:10]
    os.close(fd)


def test_silence_times_out_and_the_end_is_zero(tmp_path: Path, use_splice: bool) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with fed(b"", timeout_seconds=0.05) as sock, FileReceiver(sock, fd, use_splice=use_splice) as receiver:
        with pytest.raises(TimeoutError):
            receiver.move(0, 10)
        sock.shutdown(socket.SHUT_RD)
        assert receiver.move(0, 10) == 0
    os.close(fd)


@pytest.mark.parametrize(("path", "flags"), [("/dev/full", os.O_RDWR), ("/dev/null", os.O_RDONLY)])
def test_a_file_that_refuses_is_told_from_a_socket_that_fails(path: str, flags: int, use_splice: bool) -> None:
    fd = os.open(path, flags)
    with fed(b"some bytes") as sock, FileReceiver(sock, fd, use_splice=use_splice) as receiver:
        with pytest.raises(FileRefused):
            receiver.move(0, 10)
        with pytest.raises(FileRefused):
            receiver.write(b"more", 0)
    os.close(fd)


def test_a_file_without_splice_gets_its_bytes_all_the_same(tmp_path: Path, use_splice: bool) -> None:
    """``O_APPEND`` is what every file system refuses to splice to; pwrite then appends."""
    path = tmp_path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    with fed(DATA) as sock, FileReceiver(sock, fd, use_splice=use_splice) as receiver:
        done = 0
        while done < len(DATA):
            done += receiver.move(done, len(DATA) - done)
    os.close(fd)
    assert path.read_bytes() == DATA
