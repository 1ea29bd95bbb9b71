from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from numpy.typing import NDArray
from typing_extensions import Buffer

# NumPy's own stubs call an array a buffer from Python 3.12 on only.
_Bytes: TypeAlias = Buffer | NDArray[Any]

KERNELS: tuple[str, ...]

def kernel() -> str: ...

class Digests(NamedTuple):
    size: int
    sha1: str
    chunk_sha1s: tuple[str, ...]

class Sha1:
    def __init__(self, data: _Bytes = b"", *, kernel: str | None = None) -> None: ...
    def update(self, buffer: _Bytes) -> None: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...
    def copy(self) -> Sha1: ...

class FusedSha1:
    def __init__(self, chunk_size_bytes: int, *, kernel: str | None = None) -> None: ...
    def update(self, buffer: _Bytes) -> None: ...
    def finish(self) -> Digests: ...

def digest_buffer(buffer: _Bytes, chunk_size_bytes: int, *, kernel: str | None = None) -> Digests: ...
def digest_file(
    fd: int, chunk_size_bytes: int, *, progress: Callable[[int], None] | None = None
) -> Digests: ...
def copy_file(
    source_fd: int,
    target_fd: int,
    chunk_size_bytes: int,
    *,
    progress: Callable[[int], None] | None = None,
    begin_writeback: bool = False,
) -> Digests: ...
