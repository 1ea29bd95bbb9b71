"""Running the real command line, and nodes, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kachery_fast.cli.lab import free_port

__all__ = ["PROGRAM", "Program", "environment", "free_port"]

PROGRAM = [sys.executable, "-m", "kachery_fast"]


def environment(storage_dir: Path, port: int, **more: str) -> dict[str, str]:
    """The environment of a program whose node has this storage directory and port."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith("KACHERY_") or name.startswith(("KACHERY_TEST_", "KACHERY_COVERAGE"))}
    return {**kept, "KACHERY_STORAGE_DIR": str(storage_dir), "KACHERY_DAEMON_PORT": str(port), **more}


class Program:
    """The command line with one environment; ``env`` may be changed between runs."""

    def __init__(self, storage_dir: Path, port: int | None = None, **more: str) -> None:
        self.storage_dir = storage_dir
        self.port = port or free_port()
        self.env = environment(storage_dir, self.port, **more)

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end, with pipes for its output."""
        return subprocess.run([*PROGRAM, *arguments], env=self.env, cwd=cwd, capture_output=True, text=True,
                              timeout=60, check=False)

    def ok(self, *arguments: str) -> str:
        """Run it, demand success and silence on the standard error, and return its output."""
        done = self.run(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), (arguments, done)
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """Run it with ``--json``, demand success, and return the result."""
        return json.loads(self.ok(*arguments, "--json"))

    @contextmanager
    def node(self, *arguments: str) -> Iterator[dict[str, Any]]:
        """Run a node in the background, and stop it afterwards if it still runs."""
        started = self.json("node", "start", "--detach", *arguments)
        try:
            yield started
        finally:
            self.run("node", "stop")
