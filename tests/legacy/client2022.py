"""kachery-client 1.2.0 itself, in an environment of its own that ``make test`` builds: a user of our node."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.cli.lab import Lab, LabNode

__all__ = ["BIN", "Client2022", "need_client"]

BIN = Path(__file__).parents[2] / ".venv-2022" / "bin"


def need_client() -> None:
    """Skip the test unless kachery-client 1.2.0 is installed."""
    if not (BIN / "kachery-client").exists():
        pytest.skip("kachery-client 1.2.0 is not installed in .venv-2022 (make test does that)")


class Client2022:
    """A user of ``node`` with the old package and its commands. The old client takes a hub's address without a port
    only, so it finds the hub by way of a proxy, which the hub itself is for its own requests."""

    def __init__(self, lab: Lab, node: LabNode, directory: Path) -> None:
        need_client()
        directory.mkdir(exist_ok=True)
        self.directory = directory
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("KACHERY_DAEMON", "PYTHON"))}
        self.environ = {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
                        "KACHERY_DAEMON_HOST": "127.0.0.1", "KACHERY_DAEMON_PORT": str(node.port),
                        "KACHERY_HUB_API_URI": "http://hub.example", "HTTP_PROXY": lab.hub_url,
                        "NO_PROXY": "127.0.0.1,localhost",
                        "KACHERY_TEMP_DIR": str(directory / "temporary")}

    def command(self, *arguments: str, code: int = 0) -> bytes:
        """Run one of its commands and return what it printed."""
        done = subprocess.run([str(BIN / arguments[0]), *arguments[1:]], env=self.environ, cwd=self.directory,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr.decode()
        return done.stdout

    def begin(self, script: str) -> subprocess.Popen[bytes]:
        """Start a script of its user."""
        path = self.directory / f"script-{len(list(self.directory.iterdir()))}.py"
        path.write_text("import json, sys\nimport numpy as np\nimport kachery_client as kc\n" + textwrap.dedent(script))
        return subprocess.Popen([str(BIN / "python"), "-W", "ignore", str(path)], env=self.environ, cwd=self.directory,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, script: str, timeout_seconds: float = 120) -> Any:
        """Run a script, and return what it gave to ``print(json.dumps(…))`` last."""
        process = self.begin(script)
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0, err.decode()
        return json.loads(out.splitlines()[-1])
