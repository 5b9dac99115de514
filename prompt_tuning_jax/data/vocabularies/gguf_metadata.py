"""The header of a GGUF file: metadata on the model and its tokenizer, and a list of the tensors.

Reads only the beginning of the file, and checks every length against the file's size.  The format
is described in ggml's ``docs/gguf.md``.
"""

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
_MOST_TENSORS = 2**16
_ALIGNMENTS = tuple(2**i for i in range(17))
_LONGEST_KEY = 2**16  # bytes
_LONGEST_STRING = 2**24  # bytes
_MOST_ITEMS = 2**23  # of all arrays together; each string takes some 60 bytes of memory


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the metadata of a GGUF file of version 2 or 3.

    Strings are str, numbers are int, float or bool, arrays of numbers are NumPy arrays, and arrays
    of strings are lists.  Raises UserError, in one line that names the file, for a file that cannot
    be read, is not GGUF, is truncated or claims more than it holds.
    """
    path = Path(path)
    with _open(path) as reader:
        return reader.read()


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor of a GGUF file.

    Attributes:
      shape: its sizes, rows first; the file lists them in the opposite order.
      kind: the number of its type (``ggml_type``).
      offset: the byte in the file at which it begins.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Returns the metadata of a GGUF file as ``read_metadata`` returns it, and its tensors by name.

    Whether the file is long enough for the tensors depends on their types and is not checked.
    Raises UserError like ``read_metadata``.
    """
    with _open(Path(path)) as reader:
        return reader.read(), reader.read_tensors()


@contextmanager
def _open(path: Path) -> Iterator["_Reader"]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < len(_MAGIC):
                raise UserError(f"{path}: not a GGUF file: it is shorter than the format's header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield _Reader(data, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._size, self._path = data, len(data), path
        self._at = 0
        self._items = 0
        self._tensors = 0
        self._alignment = 32

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
        self._tensors = self._unsigned(8)
        number = self._unsigned(8)
        if number > _MOST_KEYS:
            raise self._damaged(f"{number} keys")
        values: dict[str, Any] = {}
        for _ in range(number):
            key = self._string(_LONGEST_KEY)
            if key in values:
                raise self._damaged(f"the key {key[:80]!r} occurs twice")
            values[key] = self._value(self._unsigned(4), key)
        alignment = values.get("general.alignment", self._alignment)
        if type(alignment) is not int or alignment not in _ALIGNMENTS:
            raise self._damaged(f"general.alignment is {str(alignment)[:80]}")
        self._alignment = alignment
        return values

    def read_tensors(self) -> dict[str, TensorInfo]:
        """Returns the tensors, which are listed behind the metadata."""
        if self._tensors > _MOST_TENSORS:
            raise self._damaged(f"{self._tensors} tensors")
        infos: dict[str, TensorInfo] = {}
        for _ in range(self._tensors):
            name = self._string(_LONGEST_KEY)
            dimensions = self._unsigned(4)
            if name in infos or not 0 < dimensions <= 4:
                what = "occurs twice" if name in infos else f"has {dimensions} dimensions"
                raise self._damaged(f"the tensor {name[:80]!r} {what}")
            sizes = [self._unsigned(8) for _ in range(dimensions)]
            kind, offset = self._unsigned(4), self._unsigned(8)
            infos[name] = TensorInfo(shape=tuple(reversed(sizes)), kind=kind, offset=offset)
        start = -(-self._at // self._alignment) * self._alignment
        return {name: replace(info, offset=start + info.offset) for name, info in infos.items()}

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
