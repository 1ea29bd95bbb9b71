"""Compare two sides of pytest-benchmark results: ``python compare_benchmarks.py DIRECTORY``.

The directory holds ``base-1.json``, ``head-1.json``, ``base-2.json`` ...: rounds that ran in turn on one machine. For
each benchmark the ratio head / base of the fastest runs is taken in each round, and the median over the rounds; what
is slower by more than a quarter fails. Prints a Markdown table. Stands alone: it runs before the project is set up.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

RATIO_MAX = 1.25


def read(path: Path) -> dict[str, float]:
    """Return the shortest time of each benchmark in seconds; nothing when the side could not run at all."""
    if not path.exists():
        return {}
    return {entry["name"]: entry["stats"]["min"] for entry in json.loads(path.read_text())["benchmarks"]}


def compare(directory: Path) -> tuple[list[str], bool]:
    """Return the lines of the table, and whether everything is fast enough.

    :raises SystemExit: the head has no results.
    """
    rounds = [(read(directory / path.name.replace("head", "base", 1)), read(path))
              for path in sorted(directory.glob("head-*.json"))]
    names = sorted({name for _, head in rounds for name in head})
    if not names:
        raise SystemExit(f"{directory} holds no results of the head")
    lines = ["| benchmark | base, ms | head, ms | head / base | |", "|---|---:|---:|---:|---|"]
    passed = True
    for name in names:
        pairs = [(base[name], head[name]) for base, head in rounds if name in base and name in head]
        fastest = min(head[name] for _, head in rounds if name in head)
        if not pairs:
            lines.append(f"| {name} | | {fastest * 1e3:.3f} | | new |")
            continue
        ratio = statistics.median(head / base for base, head in pairs)
        slow = ratio > RATIO_MAX
        passed = passed and not slow
        lines.append(f"| {name} | {min(base for base, _ in pairs) * 1e3:.3f} | {fastest * 1e3:.3f} | {ratio:.2f} | "
                     f"{'slower' if slow else 'ok'} |")
    return lines, passed


def main(arguments: list[str]) -> int:
    """Print the table; 1 when something has become too slow."""
    lines, passed = compare(Path(arguments[0]))
    print("\n".join(lines))  # noqa: T201 - it is a program
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
