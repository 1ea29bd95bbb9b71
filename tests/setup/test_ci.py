"""The set-up and the CI configuration: what they name exists, and failures are failures."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

# What pytest itself reads its configuration with, where Python has no reader of its own.
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def workflow(name: str) -> dict[str, Any]:
    # BaseLoader: all scalars stay text; YAML 1.1 would read the key "on" as true.
    text = (ROOT / ".github" / "workflows" / name).read_text("utf-8")
    found: dict[str, Any] = yaml.load(text, Loader=yaml.BaseLoader)
    return found


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return found


def supported() -> set[str]:
    """The minor versions of Python that the package says it supports."""
    classifiers = project()["project"]["classifiers"]
    return {match[1] for text in classifiers if (match := re.fullmatch(r".* :: (3\.\d+)", text))}


def test_there_is_a_workflow_for_tests_wheels_and_benchmarks() -> None:
    assert {path.stem for path in WORKFLOWS} == {"tests", "wheels", "benchmarks"}


@every_workflow
def test_a_workflow_is_complete(path: Path) -> None:
    content = workflow(path.name)
    assert content["permissions"] == {"contents": "read"}
    assert "on" in content
    for job in content["jobs"].values():
        assert int(job["timeout-minutes"]) <= 60
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), "actions are pinned by their major version"


@every_workflow
def test_what_a_workflow_calls_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = path.read_text("utf-8")
    assert set(re.findall(r"\bmake (?:-C \w+ )?([a-z]+)", text)) <= targets
    for named in re.findall(r"(?:head/|bash )?((?:\.ci|benchmarks|tests)/[\w./]+)", text):
        assert (ROOT / named).exists(), named


def test_tests_run_on_every_supported_python_on_linux_and_macos() -> None:
    matrix = workflow("tests.yml")["jobs"]["versions"]["strategy"]["matrix"]
    assert set(matrix["python"]) == supported() == {"3.10", "3.11", "3.12", "3.13"}
    assert {name.split("-")[0] for name in matrix["os"]} == {"ubuntu", "macos"}


def test_wheels_are_built_for_every_supported_python_and_both_architectures() -> None:
    config = project()["tool"]["cibuildwheel"]
    assert set(config["build"]) == {f"cp{version.replace('.', '')}-*" for version in supported()}
    runners = workflow("wheels.yml")["jobs"]["wheels"]["strategy"]["matrix"]["os"]
    assert len(runners) == 4
    for named in re.findall(r"\{project\}/([\w/.]+)", " ".join(config["test-command"])):
        assert (ROOT / named).exists()


def test_every_system_program_that_tests_want_is_installed_for_ci() -> None:
    packages = {"nginx": {"nginx-light"}, "curl": {"curl"}, "gcc": {"gcc", "libc6-dev"}, "cc": {"gcc", "libc6-dev"},
                "clang": {"clang", "libclang-rt-dev"}, "qemu-aarch64": {"qemu-user"}, "make": {"make"},
                "aarch64-linux-gnu-gcc": {"gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"},
                "mount": {"util-linux"}, "umount": {"util-linux"}, "setarch": {"util-linux"}, "strace": {"strace"},
                "ext2": {"e2fsprogs"}, "btrfs": {"btrfs-progs"}, "xfs": {"xfsprogs"},
                "openssl": {"openssl"}, "rclone": {"rclone"}, "node": {"nodejs", "npm"},
                "nats-server": {"nats-server"}}
    run = (ROOT / ".ci" / "run").read_text("utf-8")
    lists = re.findall(r"(?:^| )PACKAGES\+?=\((.*)\)$", run, re.MULTILINE)
    installed = {package for words in lists for package in words.split()}
    wanted: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text("utf-8")
        if ("need_program(" in text or "mounted(" in text) and path != Path(__file__):
            # By a literal, or by a name that stands somewhere in the file.
            wanted |= set(re.findall(r"need_program\(\"([^\"]+)\"\)", text))
            wanted |= {name for name in packages if f'"{name}"' in text}
    assert {"nginx", "curl", "clang", "qemu-aarch64", "btrfs"} <= wanted
    assert {package for name in wanted for package in packages[name]} <= installed


# --- finding a Python


def find_python(**environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / ".ci" / "find-python"], env={**os.environ, "PYTHON": "", **environ},
                          capture_output=True, text=True, timeout=60)


def fake(place: Path, exit_code: int) -> str:
    path = place / "python"
    path.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    path.chmod(0o755)
    return str(path)


def test_the_python_that_is_named_is_taken() -> None:
    done = find_python(PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(sys.executable)


@pytest.mark.parametrize(("exit_code", "said"), [(10, "older than Python 3.10"), (11, "python3-venv"),
                                                 (12, "python3-dev"), (1, "no Python 3.10 or newer")])
def test_what_is_lacking_is_said(tmp_path: Path, exit_code: int, said: str) -> None:
    done = find_python(PYTHON=fake(tmp_path, exit_code))
    assert done.returncode == 1
    assert said in done.stderr
    assert not done.stdout


def test_a_missing_compiler_is_said(tmp_path: Path) -> None:
    done = find_python(PYTHON=sys.executable, PATH=str(tmp_path), CC="no-such-compiler")
    assert done.returncode == 1
    assert "no C compiler" in done.stderr


def test_make_stops_when_there_is_no_python(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    done = subprocess.run(["make", "setup"], cwd=tmp_path, env={**os.environ, "PYTHON": fake(tmp_path, 10)},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "older than Python 3.10" in done.stderr
    assert not (tmp_path / ".venv").exists()


# --- comparing benchmarks


def comparison() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_benchmarks", ROOT / ".ci" / "compare_benchmarks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(path: Path, **seconds: float) -> None:
    entries = [{"name": name, "stats": {"min": value}} for name, value in seconds.items()]
    path.write_text(json.dumps({"benchmarks": entries}))


def test_only_what_is_slower_in_most_rounds_fails(tmp_path: Path) -> None:
    for number, (steady, slow) in enumerate([(1.0, 1.3), (3.0, 1.3), (1.1, 1.0)], start=1):
        save(tmp_path / f"base-{number}.json", steady=1.0, slow=1.0)
        save(tmp_path / f"head-{number}.json", steady=steady, slow=slow, fresh=5.0)
    lines, passed = comparison().compare(tmp_path)
    assert not passed
    table = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert "ok" in table["steady"]
    assert "slower" in table["slow"]
    assert "new" in table["fresh"]


def test_a_head_without_results_fails(tmp_path: Path) -> None:
    save(tmp_path / "base-1.json", steady=1.0)
    with pytest.raises(SystemExit, match="no results"):
        comparison().compare(tmp_path)
    assert comparison().RATIO_MAX == 1.25
