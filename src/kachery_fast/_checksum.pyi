from typing import Any, TypeAlias

from numpy.typing import NDArray
from typing_extensions import Buffer

# NumPy's own stubs call an array a buffer from Python 3.12 on only.
_Bytes: TypeAlias = Buffer | NDArray[Any]

KERNELS: tuple[str, ...]

def crc32c(buffer: _Bytes, value: int = 0, *, kernel: str | None = None) -> int: ...
