"""The C files by themselves: under the sanitizers here, and the ARM kernels under an emulator of that processor."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import google_crc32c
import pytest

from tests.programs import need_program

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src" / "kachery_fast"
CHUNK_SIZE_BYTES = 128
LENGTHS = [*range(300), 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 24_847, 24_848, 24_849, 50_000]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror", f"-I{SOURCES}"]
COMPILERS = ["gcc", "clang"]
ARM_ROOT = "/usr/aarch64-linux-gnu"
C_FILES = {"kernel_check": ["_sha1.c"], "crc32c_check": ["_crc32c.c"], "relay_check": ["_sha1.c", "_relay.c"]}


def build(tmp_path: Path, compiler: str, name: str, *arguments: str) -> Path:
    """Compile one of the check programs with the C files of the package."""
    program = tmp_path / f"{name}-{compiler}"
    files = [HERE / f"{name}.c", *(SOURCES / source for source in C_FILES[name])]
    subprocess.run(
        [need_program(compiler), *WARNINGS, *arguments, *map(str, files), "-o", str(program), "-pthread"],
        check=True,
        timeout=120,
    )
    return program


def generated(length: int) -> bytes:
    """The bytes of the generator that kernel_check.c describes."""
    x, content = 1, bytearray()
    for _ in range(length):
        content.append(x >> 16 & 255)
        x = (x * 1103515245 + 12345) & 0xFFFFFFFF
    return bytes(content)


def check_kernels(command: list[str], kernels: set[str]) -> None:
    """Run kernel_check and hold every line against hashlib."""
    output = subprocess.run(
        [*command, str(CHUNK_SIZE_BYTES), *map(str, LENGTHS)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert output.stderr == ""
    data = generated(max(LENGTHS))
    seen = set()
    for line in output.stdout.splitlines():
        kernel, operation, length, *digests = line.split()
        content = data[: int(length)]
        pieces = [content]
        if operation == "fused":
            starts = range(0, len(content), CHUNK_SIZE_BYTES)
            pieces += [content[start : start + CHUNK_SIZE_BYTES] for start in starts]
        assert digests == [hashlib.sha1(piece).hexdigest() for piece in pieces], (kernel, operation, length)
        seen.add((kernel, operation, int(length)))
    assert seen == {(k, o, n) for k in kernels for o in ("single", "fused") for n in LENGTHS}


def check_crc32c_kernels(command: list[str], kernels: set[str]) -> None:
    """Run crc32c_check and hold every line against Google's own implementation."""
    output = subprocess.run([*command, *map(str, LENGTHS)], check=True, capture_output=True, text=True, timeout=120)
    assert output.stderr == ""
    data = generated(max(LENGTHS))
    found = {(kernel, int(length)): int(crc, 16) for kernel, length, crc in map(str.split, output.stdout.splitlines())}
    assert found == {(kernel, length): google_crc32c.value(data[:length]) for kernel in kernels for length in LENGTHS}


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("level", ["-O0", "-O3"])
def test_the_kernels_touch_no_byte_but_their_own(tmp_path: Path, compiler: str, level: str) -> None:
    from kachery_fast import _checksum
    from kachery_fast._core import KERNELS

    options = [level, "-std=c99", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    check_kernels([str(build(tmp_path, compiler, "kernel_check", *options))], set(KERNELS))
    check_crc32c_kernels([str(build(tmp_path, compiler, "crc32c_check", *options))], set(_checksum.KERNELS))


@pytest.mark.parametrize(
    ("compiler", "arguments"),
    [
        ("aarch64-linux-gnu-gcc", ["-O1"]),
        ("aarch64-linux-gnu-gcc", ["-O3"]),
        # As Apple's compiler, whose target has the instructions from the start.
        ("clang", ["--target=aarch64-linux-gnu", f"-I{ARM_ROOT}/include", "-march=armv8-a+crypto+crc", "-O3"]),
    ],
)
def test_the_arm_kernels_are_right_on_an_emulated_processor(
    tmp_path: Path, compiler: str, arguments: list[str]
) -> None:
    linker = need_program("aarch64-linux-gnu-gcc")
    emulator = need_program("qemu-aarch64")
    for name, check in (("kernel_check", check_kernels), ("crc32c_check", check_crc32c_kernels)):
        sources = [HERE / f"{name}.c", *(SOURCES / source for source in C_FILES[name])]
        for source in sources:
            command = [need_program(compiler), *WARNINGS, *arguments, "-std=c99", "-c", str(source)]
            subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
        objects = [f"{source.stem}.o" for source in sources]
        subprocess.run([linker, *objects, "-o", name], check=True, cwd=tmp_path, timeout=120)
        for processor in ("cortex-a57", "neoverse-n1"):
            check([emulator, "-L", ARM_ROOT, "-cpu", processor, str(tmp_path / name)], {"armv8", "portable"})


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_two_threads_of_a_relay_keep_out_of_each_other_s_way(tmp_path: Path, sanitizer: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content = os.urandom(19 * (1 << 20) + 11)
    source.write_bytes(content)
    program = build(tmp_path, "gcc", "relay_check", "-O1", "-g", f"-fsanitize={sanitizer}", "-std=gnu11")
    # The thread sanitizer of older compilers does not know how far newer kernels scatter addresses.
    output = subprocess.run(
        [need_program("setarch"), "-R", str(program), str(source), str(target)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (output.returncode, output.stderr) == (0, "")
    assert output.stdout.strip() == hashlib.sha1(content).hexdigest()
    assert target.read_bytes() == content
