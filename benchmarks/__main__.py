"""``python -m benchmarks [NAME ...]``: measure, and print one table (or ``--json``)."""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import digests, engines, feeds, hub_load, legacy, moving, objects, storing, tasks
from benchmarks.measure import Figure

Measurement = Callable[[Path], Figure]


def _without_place(measure: Callable[[], Figure]) -> Measurement:
    return lambda _: measure()


FIGURES: dict[str, Measurement] = {
    "digests": _without_place(digests.fused_versus_hashlib),
    "digests-two-passes": _without_place(digests.fused_versus_two_passes),
    "digests-blake3": _without_place(digests.fused_versus_blake3),
    "store": storing.store_versus_openssl,
    "store-durable": storing.durable_store_versus_cp_and_fsync,
    "link": storing.link_versus_openssl,
    "small-files": storing.small_files_versus_cp,
    "receive": objects.receive_versus_rclone,
    "load": moving.load_versus_rclone,
    "load-openssl": moving.load_versus_rclone_and_openssl,
    "upload": objects.upload_versus_curl,
    "node-to-node": moving.node_to_node_versus_its_halves,
    "node-to-node-held": moving.node_to_node_held_to_a_rate,
    "node-to-node-held-sum": moving.node_to_node_held_versus_the_sum,
    "memory": moving.memory_of_a_moving_node,
    "feed-append": feeds.append_versus_sqlite,
    "feed-append-journal": feeds.append_versus_sqlite_as_it_comes,
    "feed-append-log": feeds.log_append_versus_sqlite,
    "feed-batch": feeds.batches_of_appends,
    "feed-live-p50": feeds.appended_to_seen_median,
    "feed-live-p99": feeds.appended_to_seen_tail,
    "feed-replay": feeds.replay_versus_signatures,
    "task-cached": tasks.cached_versus_get,
    "task-cached-kept": tasks.cached_versus_kept_get,
    "task-known": tasks.known_versus_get,
    **hub_load.FIGURES,
    **engines.FIGURES,
    "legacy-store": legacy.store_versus_counting,
    "legacy-store-durable": legacy.durable_store_versus_counting,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for, and say what could not be measured and why."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(FIGURES)} (all of them)")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument("--dir", type=Path, default=None, help="where to work; 30 GB free, not a tmpfs")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in FIGURES]
    if unknown:
        parser.error(f"no such figure: {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    if options.dir is not None:
        options.dir.mkdir(parents=True, exist_ok=True)
    done: dict[str, Figure] = {}
    for name in options.names or FIGURES:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        found = _measure(FIGURES[name], options.dir)
        if isinstance(found, str):
            print(f"  skipped: {found}", file=sys.stderr, flush=True)
            continue
        done[name] = found
        print("  " + _row(found), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"machine": _machine(), "date": time.strftime("%Y-%m-%d"),
                          "figures": {name: asdict(found) for name, found in done.items()}}, indent=1))
    else:
        print(_markdown(done) if options.markdown else "\n".join([_machine(), *map(_row, done.values())]))
    return 0


def _measure(measure: Measurement, directory: Path | None) -> Figure | str:
    place = Path(tempfile.mkdtemp(prefix="kachery-bench-", dir=directory))
    try:
        return measure(place)
    except FileNotFoundError as error:
        return str(error)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _row(found: Figure) -> str:
    met = {True: "met", False: "MISSED", None: ""}[is_met(found)]
    return (f"{found.name:<52} {found.ours:8.2f} {found.rival:8.2f} {found.unit:<8} {found.ratio:6.2f} "
            f"({found.low:.2f} to {found.high:.2f})  bar {found.bar:<8} {met}")


def is_met(found: Figure) -> bool | None:
    """Whether the median ratio meets the bar; None for a figure that is only shown."""
    match = re.fullmatch(r"(>=|<=) ([0-9.]+)", found.bar)
    if match is None:
        return None
    limit = float(match[2])
    return found.ratio >= limit if match[1] == ">=" else found.ratio <= limit


def _markdown(done: dict[str, Figure]) -> str:
    lines = [f"Measured on {time.strftime('%Y-%m-%d')}: {_machine()}.", "",
             "| `make bench` | ours / rival | ours | rival | ratio (spread) | bar |", "|---|---|---|---|---|---|"]
    for name, found in done.items():
        missed = ", **missed**" if is_met(found) is False else ""
        lines.append(f"| `{name}` | {found.name}; {found.note} | {found.ours:.2f} {found.unit} | "
                     f"{found.rival:.2f} {found.unit} | {found.ratio:.2f} ({found.low:.2f} to {found.high:.2f}) | "
                     f"{found.bar or 'shown'}{missed} |")
    return "\n".join(lines)


def _machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if names:
            model = f"{len(names)} x {names[0]}"
    return f"{model}, {platform.system()} {platform.release()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
