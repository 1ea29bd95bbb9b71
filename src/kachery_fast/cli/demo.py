"""``kachery-fast demo``: what the network does, on one machine, with real processes: hub, two nodes, one recording.

The recording is stored on node A, asked for on node B, moved through the hub's bucket, and compared byte by byte. Then
B follows a feed that A writes, and has A calculate something.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

from ..errors import CorruptFile, DiskError, NodeError
from ..store.disk import SourceFile, check_room
from .demo_acts import calculate, follow
from .lab import Lab, LabNode
from .output import command_errors, emit, human_size, json_option, progress_bar

__all__ = ["demo"]

_MIB = 1024 * 1024
_COMPARE_SPAN_BYTES = 8 * _MIB
# What a process may take of memory, whatever it moves (docs/design.md).
_MEMORY_BYTES_MAX = 512 * _MIB
# The recording, and a copy of it at node A, in the bucket, and at node B.
_COPIES = 3


class _Step(NamedTuple):
    what: str
    seconds: float
    size_bytes: int


@click.command(short_help="Show what it does on this machine: a hub, two nodes, a recording, a feed, a task.")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--size-mib", type=click.IntRange(1), default=1024, show_default=True,
              help="The size of the recording that is made when no FILE is named.")
@click.option("--dir", "directory", type=click.Path(path_type=Path),
              help="Where to work; a new directory is made there, and removed. [default: the system's place]")
@json_option
@command_errors
def demo(file: Path | None, size_mib: int, directory: Path | None, as_json: bool) -> None:
    """Show what it does on this machine: a hub and two nodes are started, a recording (FILE, or one made on the spot)
    is stored on the first, loaded on the second, and compared byte by byte. Then the second node follows a feed that
    the first one writes, and has it run a calculation. Everything is stopped and removed at the end, also on Ctrl-C.
    """
    if file is not None:
        SourceFile(file).close()
    with _workshop(directory) as place:
        size = file.stat().st_size if file is not None else size_mib * _MIB
        check_room(place, size * (_COPIES if file is not None else _COPIES + 1))
        with Lab(place) as lab:
            steps, result = _run(lab, file, size, quiet=as_json)
            lab.close()
            peaks = {"hub": lab.hub.peak_rss_bytes,
                     **{f"node {node.name}": node.program.peak_rss_bytes for node in lab.nodes.values()}}
            result["peakRssBytes"] = peaks
            if max(peaks.values()) > _MEMORY_BYTES_MAX:
                raise NodeError(what=f"a process needed more than {_MEMORY_BYTES_MAX} bytes of memory: {peaks}")
    emit(result, lambda: _table(steps, result), as_json)


@contextmanager
def _workshop(directory: Path | None) -> Iterator[Path]:
    """Make a directory to work in, and remove it whatever happens; SIGTERM and SIGHUP count as Ctrl-C."""
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix="kachery-demo-", dir=directory))
    except OSError as error:
        raise DiskError(action="the writing", path=str(directory), why=error.strerror or str(error)) from None
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for number, handler in former.items():
            signal.signal(number, handler)


def _run(lab: Lab, file: Path | None, size: int, *, quiet: bool) -> tuple[list[_Step], dict[str, Any]]:
    steps: list[_Step] = []

    def timed(what: str, size_bytes: int, work: Callable[[], Any]) -> Any:
        if not quiet:
            click.echo(f"{what} ...", err=True)
        begun = time.monotonic()
        result = work()
        steps.append(_Step(what, time.monotonic() - begun, size_bytes))
        return result

    def start_all() -> tuple[LabNode, LabNode]:
        lab.start_hub()
        return lab.add_node("A", permissions=("all",)), lab.add_node("B", permissions=("all",))

    if file is None:
        file = lab.directory / "recording.dat"
        timed(f"make a recording of {human_size(size)}", size, lambda: _make_recording(file, size, quiet=quiet))
    a, b = timed("start hub, node A, node B, and join the channel", 0, start_all)
    # Started once before, a program is quicker to start: what is timed from here on is its work.
    uri = str(timed("store it on A", size, lambda: a.json("store", str(file)))[0]["uri"])
    if any(lab.bucket_dir.glob("sha1/*")):
        raise NodeError(what="something was uploaded before anybody asked for it")
    path = str(timed("load it on B, through the channel", size, lambda: _load(b, uri, quiet=quiet)))
    again = str(timed("load it on B again, from its store", 0, lambda: b.json("load", uri))["path"])
    if again != path:
        raise NodeError(what=f"B has it at {path}, and gave {again}")
    timed("compare byte by byte", size, lambda: _compare(file, Path(path)))
    notebook = follow(a, b, timed)
    calculation = calculate(lab, a, b, uri, size, timed)
    result = {"uri": uri, "size": size, "path": path, "identical": True, "feed": notebook, "calculation": calculation,
              "steps": [{"what": step.what, "seconds": step.seconds, "bytes": step.size_bytes} for step in steps]}
    return steps, result


def _load(node: LabNode, uri: str, *, quiet: bool) -> str:
    with progress_bar("  load", hidden=quiet) as show:
        from ..client.progress import Progress

        def progress(state: Progress) -> None:
            if show is not None:
                show(state)

        return str(node.connection.load(uri, node.settings.channel, progress)["path"])


def _make_recording(path: Path, size: int, *, quiet: bool) -> None:
    """Write random bytes (they neither compress nor repeat) as sixteen-bit samples would be."""
    import numpy as np

    from ..client.progress import Progress

    generator = np.random.Generator(np.random.SFC64(20221120))
    with path.open("wb") as file, progress_bar("  make", hidden=quiet) as show:
        written = 0
        while written < size:
            span = min(16 * _MIB, size - written)
            file.write(generator.integers(0, 2**64, size=-(-span // 8), dtype=np.uint64).view(np.uint8)[:span].data)
            written += span
            if show is not None:
                show(Progress(written, size))


def _compare(original: Path, copy: Path) -> None:
    """:raises CorruptFile: the two differ."""
    position = 0
    with original.open("rb", buffering=0) as first, copy.open("rb", buffering=0) as second:
        while True:
            one, two = first.read(_COMPARE_SPAN_BYTES), second.read(_COMPARE_SPAN_BYTES)
            if one != two:
                raise CorruptFile(path=str(copy), found=f"other bytes from {position} on", sha1=copy.name,
                                  advice="This must never happen: please report it.")
            if not one:
                return
            position += len(one)


def _table(steps: list[_Step], result: dict[str, Any]) -> str:
    lines = ["", f"{'step':<55} {'time':>9} {'rate':>12}"]
    for step in steps:
        rate = f"{human_size(step.size_bytes / step.seconds)}/s" if step.size_bytes and step.seconds else ""
        lines.append(f"{step.what:<55} {step.seconds:>7.2f} s {rate:>12}")
    lines += ["", "largest resident memory: " + ", ".join(
        f"{name} {human_size(size)}" for name, size in result["peakRssBytes"].items())]
    feed, calculation = result["feed"], result["calculation"]
    lines += [
        f"messages of the feed were seen on B after {feed['medianDelaySeconds'] * 1000:.1f} ms (median; longest "
        f"{feed['longestDelaySeconds'] * 1000:.0f} ms)",
        f"calculated by A for B: {calculation['result']}", result["uri"],
        "The copy on B is identical, byte by byte. Everything was stopped and removed."]
    return "\n".join(lines)
