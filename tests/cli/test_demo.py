"""``kachery-fast demo``: the main job, and that nothing of it is left, however it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest


def begin(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "kachery_fast", "demo", *arguments], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def programs_in(directory: Path) -> list[psutil.Process]:
    """The living hubs and nodes that work below ``directory``."""
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            if str(directory) in " ".join([*process.cmdline(), environ.get("KACHERY_STORAGE_DIR", "")]) and (
                    {"hub", "node"} & set(process.cmdline())):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_recording_made_on_the_spot_arrives_and_everything_is_removed(tmp_path: Path) -> None:
    done = begin("--size-mib", "45", "--dir", str(tmp_path))
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err.decode()
    text = out.decode()
    assert "identical, byte by byte" in text
    assert "load it on B, through the channel" in text
    assert "largest resident memory: hub" in text
    assert "follow a feed on B while A appends" in text
    assert "B asks again, the backend is gone: from the cache" in text
    assert not list(tmp_path.iterdir())
    assert not programs_in(tmp_path)


def test_a_file_of_the_user_is_moved_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "my recording.dat"
    # An odd length: the last byte is half a sample.
    content = np.tile(np.array([0, 2000], dtype="<i2"), 64_000).tobytes() + b"x"
    file.write_bytes(content)
    done = begin(str(file), "--dir", str(tmp_path / "work"), "--json")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err.decode()
    found = json.loads(out)
    assert found["identical"] is True
    assert found["size"] == 256_001
    assert found["calculation"]["result"] == {"samples": 128_000, "crossings": 64_000}
    assert found["feed"]["messages"] == 41
    assert 0 <= found["feed"]["medianDelaySeconds"] <= found["feed"]["longestDelaySeconds"]
    assert set(found["peakRssBytes"]) == {"hub", "node A", "node B"}
    assert file.read_bytes() == content
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_and_removes_everything(tmp_path: Path, number: int) -> None:
    process = begin("--size-mib", "400", "--dir", str(tmp_path))
    end = time.monotonic() + 60
    while len(programs_in(tmp_path)) < 3:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())
    assert not programs_in(tmp_path)


def test_what_is_no_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "missing.dat", 3), (tmp_path, 2)):
        process = begin(str(path), "--dir", str(tmp_path / "work"))
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert err.decode().startswith("Error: ")
    assert not (tmp_path / "work").exists()
