"""What the README shows of feeds and tasks, copied out of it and run on two machines' worth of nodes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kachery_fast.cli.lab import Lab, LabNode
from tests.system.support import QUICK, store, wait_until

README = Path(__file__).parent.parent.parent / "README.md"


def examples() -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(found) == 5
    return found[1:]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("lab"), channel="lab", environ=QUICK) as lab:
        lab.start_hub()
        for name in ("A", "B"):
            lab.add_node(name, permissions=["all"])
        yield lab


@contextmanager
def running(node: LabNode, script: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-u", str(script)], env=node.environ, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def run(node: LabNode, script: Path) -> str:
    done = subprocess.run([sys.executable, "-W", "error", str(script)], env=node.environ, check=False,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_notebook_is_written_on_one_machine_and_read_on_another(lab: Lab, tmp_path: Path) -> None:
    write, read = tmp_path / "write.py", tmp_path / "read.py"
    write.write_text(examples()[0])
    uri = run(lab.nodes["A"], write).strip()
    text = examples()[1]
    assert "feed://…/trials" in text
    read.write_text(text.replace("feed://…/trials", uri))
    with running(lab.nodes["B"], read) as reader:
        assert reader.stdout is not None
        assert ast.literal_eval(reader.stdout.readline()) == {"trial": 1, "outcome": "hit"}
        run(lab.nodes["A"], write)  # the same feed once more, while it is followed
        assert ast.literal_eval(reader.stdout.readline()) == {"trial": 1, "outcome": "hit"}


def test_a_function_runs_where_the_recording_is(lab: Lab, tmp_path: Path) -> None:
    recording = tmp_path / "recording.dat"
    np.array([3, 4, 8], dtype=np.int16).tofile(recording)
    uri = store(lab.nodes["A"], recording)
    offer, ask = tmp_path / "offer.py", tmp_path / "ask.py"
    offer.write_text(examples()[2])
    text = examples()[3]
    assert '"sha1://…"' in text
    ask.write_text(text.replace('"sha1://…"', repr(uri)))
    with running(lab.nodes["A"], offer):
        wait_until(lambda: bool(lab.nodes["A"].connection.info()["taskBackends"]["backends"]),
                   "the backend is known to its node", 60)
        assert run(lab.nodes["B"], ask) == "5.0 False A\n"
    assert run(lab.nodes["B"], ask).startswith("5.0 True")
