"""Processes that use a store and die: ``python -m tests.store.children COMMAND ARGUMENTS``.

The process itself forks the ones that matter, after all imports, so that each takes a millisecond.
"""

# The parent reads what is printed.
# ruff: noqa: T201

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kachery_fast.errors import KacheryError
from kachery_fast.store import FileStore
from kachery_fast.store import disk as _disk
from kachery_fast.store.eviction import CacheKeeper

__all__ = ["CHUNK_SIZE_BYTES", "OPERATIONS", "run_child", "start_child"]

CHUNK_SIZE_BYTES = 64 * 1024
PROJECT = Path(__file__).resolve().parents[2]

# What Python reports (sys.addaudithook) of the calls that change a directory or a lock.
EVENTS = ("open", "os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock", "os.listdir", "os.utime",
          "os.write")


def start_child(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.store.children", *map(str, arguments)],
        cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )


def run_child(*arguments: str | Path) -> list[str]:
    """Run a command to its end, and return the lines it printed."""
    with start_child(*arguments) as child:
        output, _ = child.communicate(timeout=120)
    assert child.returncode == 0, output
    return output.splitlines()


def _put_file(store: FileStore, source: Path) -> None:
    store.put_file(source)


def _put_bytes(store: FileStore, source: Path) -> None:
    store.put_bytes(source.read_bytes())


def _put_stream(store: FileStore, source: Path) -> None:
    with source.open("rb") as file:
        store.put_stream(file)


def _put_files(store: FileStore, source: Path) -> None:
    small = source.with_suffix(".small")
    answers = store.put_files([small, source, small])
    assert not any(isinstance(answer, KacheryError) for answer in answers)


def _link_file(store: FileStore, source: Path) -> None:
    store.link_file(source)


def _remove(store: FileStore, source: Path) -> None:
    store.remove(store.put_file(source).sha1)


def _adopt(store: FileStore, source: Path) -> None:
    twin = FileStore(store.root.with_suffix(".twin"), chunk_size_bytes=CHUNK_SIZE_BYTES, durable=False)
    sha1 = twin.put_file(source).sha1
    manifest = twin.manifest_for(sha1)[1]
    assert manifest is not None
    part = store.part_path(sha1)
    part.write_bytes(source.read_bytes())
    store.adopt(part, sha1, manifest=manifest.encode())


def _evict(store: FileStore, source: Path) -> None:
    _adopt(store, source)
    CacheKeeper(store.root).evict(0, now=time.time() + 3600, keep_seconds=0)


OPERATIONS: dict[str, Callable[[FileStore, Path], None]] = {
    "put_file": _put_file,
    "put_bytes": _put_bytes,
    "put_stream": _put_stream,
    "put_files": _put_files,
    "link_file": _link_file,
    "remove": _remove,
    "adopt": _adopt,
    "evict": _evict,
}


def _die_at(stage: int) -> None:
    """Kill this process, as a power cut would, at the ``stage``-th call of the kinds above."""
    left = stage

    def watch(event: str, _arguments: object) -> None:
        nonlocal left
        if event in EVENTS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    write, fsync = os.write, os.fsync

    def watched_write(fd: int, data: memoryview) -> int:
        watch("os.write", ())
        # Half of it, so that one can die between two parts of a file.
        return write(fd, data[: max(1, len(data) // 2)])

    def watched_fsync(fd: int) -> None:
        watch("os.write", ())
        fsync(fd)

    os.write, os.fsync = watched_write, watched_fsync  # type: ignore[assignment]


def _forked(body: Callable[[], None]) -> int:
    """Run ``body`` in a forked process; return 0, or the number of the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0
    return 0


def _stages(operation: str, roots: str, source: str) -> None:
    """Run ``operation`` again and again, each in a store of its own, dying one call later each time."""
    act = OPERATIONS[operation]
    for stage in range(1, 1000):
        root = Path(roots) / str(stage)

        def body(stage: int = stage, root: Path = root) -> None:
            _die_at(stage)
            act(FileStore(root, chunk_size_bytes=CHUNK_SIZE_BYTES, durable=stage % 2 == 0), Path(source))

        ended = _forked(body)
        print(root, "killed" if ended == signal.SIGKILL else "done")
        if ended == 0:
            return


def _loop(operation: str, root: str, source: str) -> None:
    """Store, then forget, without end; the parent kills this at some moment."""
    store = FileStore(Path(root), chunk_size_bytes=CHUNK_SIZE_BYTES)
    print("ready", flush=True)
    while True:
        OPERATIONS[operation](store, Path(source))
        for located in list(store.list()):
            store.remove(located.sha1)


def _together(operation: str, root: str, source: str, count: str) -> None:
    """Store the same file from ``count`` processes at once."""
    gate, go = os.pipe()
    pids = []
    for _ in range(int(count)):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(gate, 1)
            try:
                OPERATIONS[operation](FileStore(Path(root), chunk_size_bytes=CHUNK_SIZE_BYTES), Path(source))
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    os.close(go)
    print(all(os.waitpid(pid, 0)[1] == 0 for pid in pids))


def _members(root: str, source: str, group: str, *users: str) -> None:
    """Store and link ``source``, and clean, as one user of a group after the other."""
    for number, user in enumerate(users):

        def body(user: str = user, number: int = number) -> None:
            os.setgroups([int(group)])
            os.setgid(int(user))
            os.setuid(int(user))
            os.umask(0o002)
            store = FileStore(Path(root), chunk_size_bytes=CHUNK_SIZE_BYTES)
            stored = store.put_file(source)
            store.verify(stored.sha1)
            store.put_bytes(b"of user %d" % number)
            store.put_files([source, source + ".small"])
            store.part_path(stored.sha1)
            store.clean(now=0.0, partial_keep_days=1.0)
            if number == len(users) - 1:
                store.remove(stored.sha1)
                store.link_file(source)
                store.verify(stored.sha1)

        print(_forked(body))


def _hold(root: str) -> None:
    """Begin a file, and wait for the parent."""
    with FileStore(Path(root)).stream_writer() as writer, _disk.TempFile(Path(root) / "tmp"):
        writer.write(b"half of it")
        print("ready", flush=True)
        sys.stdin.readline()
        print(writer.commit().sha1)


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {
        "stages": _stages, "loop": _loop, "together": _together, "members": _members, "hold": _hold,
    }
    commands[sys.argv[1]](*sys.argv[2:])
