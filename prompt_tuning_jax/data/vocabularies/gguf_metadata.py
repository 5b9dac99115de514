"""The metadata of a GGUF file: keys and values, which describe the model and its tokenizer.

Reads only the beginning of the file, and checks every length against the file's size.  The format
is described in ggml's ``docs/gguf.md``.
"""

import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from prompt_tuning_jax.errors import UserError

GGUF_SUFFIX = ".gguf"
Metadata: TypeAlias = Mapping[str, Any]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 has 32-bit lengths
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_MOST_KEYS = 2**14
_LONGEST_KEY = 2**16  # bytes
_LONGEST_STRING = 2**24  # bytes
_MOST_ITEMS = 2**23  # of all arrays together; each string takes some 60 bytes of memory


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a GGUF file of version 2 or 3.

    Strings are str, numbers are int, float or bool, arrays of numbers are NumPy arrays, and arrays
    of strings are lists.  Raises UserError, in one line that names the file, for a file that cannot
    be read, is not GGUF, is truncated or claims more than it holds.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < len(_MAGIC):
                raise UserError(f"{path}: not a GGUF file: it is shorter than the format's header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, path).read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._size, self._path = data, len(data), path
        self._at = 0
        self._items = 0

    def read(self) -> dict[str, Any]:
        if self._data[:4] != _MAGIC:
            raise UserError(f"{self._path}: not a GGUF file: it does not begin with 'GGUF'")
        self._at = 4
        version = self._unsigned(4)
        if version not in _VERSIONS:
            known = " and ".join(map(str, _VERSIONS))
            raise UserError(
                f"{self._path}: GGUF version {version}, but only versions {known} in little-endian "
                "order are read; convert the file again with llama.cpp"
            )
        self._unsigned(8)  # the number of tensors
        number = self._unsigned(8)
        if number > _MOST_KEYS:
            raise self._damaged(f"{number} keys")
        values: dict[str, Any] = {}
        for _ in range(number):
            key = self._string(_LONGEST_KEY)
            if key in values:
                raise self._damaged(f"the key {key[:80]!r} occurs twice")
            values[key] = self._value(self._unsigned(4), key)
        return values

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(_LONGEST_STRING)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._damaged(f"the value of {key[:80]!r} has the unknown type {kind}")
        return self._numbers(_SCALARS[kind], 1)[0].item()

    def _array(self, key: str) -> Any:
        kind, number = self._unsigned(4), self._unsigned(8)
        self._items += number
        if self._items > _MOST_ITEMS:
            raise self._damaged(f"{key[:80]!r} is an array of {number} items")
        if kind == _STRING:
            return [self._string(_LONGEST_STRING) for _ in range(number)]
        if kind not in _SCALARS:
            raise self._damaged(f"{key[:80]!r} is an array of the unsupported type {kind}")
        return self._numbers(_SCALARS[kind], number)

    def _numbers(self, dtype: np.dtype, number: int) -> np.ndarray:
        start = self._advance(dtype.itemsize * number)
        return np.frombuffer(self._data[start : self._at], dtype)

    def _string(self, longest: int) -> str:
        length = self._unsigned(8)
        if length > longest:
            raise self._damaged(f"a string of {length} bytes")
        start = self._advance(length)
        try:
            return self._data[start : self._at].decode()
        except UnicodeDecodeError:
            raise self._damaged(f"the string at byte {start} is not UTF-8") from None

    def _unsigned(self, size: int) -> int:
        start = self._advance(size)
        (value,) = struct.unpack_from("<I" if size == 4 else "<Q", self._data, start)
        return int(value)

    def _advance(self, size: int) -> int:
        start = self._at
        if size > self._size - start:
            raise self._damaged(f"{size} bytes are missing at byte {start}")
        self._at = start + size
        return start

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._path}: damaged or incomplete GGUF metadata: {what}")
