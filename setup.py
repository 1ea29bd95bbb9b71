"""Builds the three native extensions; everything else about the package is in pyproject.toml.

``KACHERY_COVERAGE=1`` builds them with line tracing, so that coverage.py sees the lines of the ``.pyx`` files.
"""

from __future__ import annotations

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

PACKAGE = "src/kachery_fast"
COVERAGE = os.environ.get("KACHERY_COVERAGE", "") == "1"


def extension(name: str, *c_names: str) -> Extension:
    """Return the extension ``kachery_fast.<name>``, made of its ``.pyx`` and the C files named.

    No ``-m`` flags: the kernels choose their instructions by function attributes and at run time, so that one wheel
    runs on every machine of its architecture.
    """
    macros: list[tuple[str, str | None]] = [("_FILE_OFFSET_BITS", "64")]
    if COVERAGE:
        macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]
    return Extension(
        f"kachery_fast.{name}",
        sources=[f"{PACKAGE}/{name}.pyx", *(f"{PACKAGE}/{c_name}.c" for c_name in c_names)],
        depends=[f"{PACKAGE}/{file}" for file in ("_sha1.h", "_crc32c.h", "_relay.h", "_disk.h", "_core.pxd")],
        include_dirs=[PACKAGE],
        define_macros=macros,
        extra_compile_args=["-O1" if COVERAGE else "-O3", "-fvisibility=hidden", "-pthread"],
        extra_link_args=["-pthread"],
    )


setup(
    ext_modules=cythonize(
        [extension("_core", "_sha1", "_relay"), extension("_chunker", "_sha1"), extension("_checksum", "_crc32c")],
        build_dir=None if COVERAGE else "build/cython",  # coverage.py looks for the C beside the source
        include_path=["src"],
        force=COVERAGE,
        compiler_directives={
            "language_level": "3",
            "embedsignature": True,
            "boundscheck": False,
            "wraparound": False,
            "linetrace": COVERAGE,
        },
    ),
)
