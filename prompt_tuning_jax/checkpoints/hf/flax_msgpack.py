"""Locates the arrays in a file of ``flax.serialization`` without reading them.

Flax's ``msgpack_restore`` copies the whole file into memory; here an array is a view of the mapped
file.  Format: https://github.com/msgpack/msgpack/blob/master/spec.md and, for the arrays,
flax/serialization.py (extension type 1 holds shape, dtype name and bytes; arrays above 1 GiB are
maps of flat chunks).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.lazy_arrays import Index
from prompt_tuning_jax.typing import HostArray

_NDARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_DEEPEST = 64
_MOST_VALUES = 2**21  # a value of one byte in the file may take 64 bytes in memory


@dataclass(frozen=True, kw_only=True)
class FlaxArray:
    """An array as the pieces of the file with its bytes, in C order."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[memoryview, ...]

    def check(self, dtype: np.dtype) -> None:
        """Raises ValueError unless the pieces have the length of the shape."""
        size = prod(self.shape) * dtype.itemsize
        stored = sum(map(len, self.pieces))
        if stored != size or any(len(piece) % dtype.itemsize for piece in self.pieces):
            raise ValueError(f"{stored} bytes for {list(self.shape)} of {dtype}")

    def read(self, bounds: Index, dtype: np.dtype) -> HostArray:
        """Reads a part; ``bounds`` are slices with explicit ends.  Several pieces are copied."""
        if not self.shape:
            return np.frombuffer(self.pieces[0], dtype).reshape(())
        row = prod(self.shape[1:])
        start, stop = bounds[0].start, max(bounds[0].start, bounds[0].stop)
        parts, offset = [], 0
        for piece in self.pieces:
            flat = np.frombuffer(piece, dtype)
            low, high = max(start * row - offset, 0), min(stop * row - offset, flat.size)
            if low < high:
                parts.append(flat[low:high])
            offset += flat.size
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, dtype)])
        return rows.reshape(stop - start, *self.shape[1:])[(slice(None), *bounds[1:])]


def scan_msgpack(buffer: memoryview) -> dict[str, FlaxArray]:
    """Returns the arrays of a nested map by their path, ``encoder/final_layer_norm/weight``.

    Raises ValueError for a truncated file, or anything but such a map.
    """
    return dict(_leaves(scan_tree(buffer), ""))


def scan_tree(buffer: memoryview) -> dict[str, Any]:
    """Returns a map of maps, lists, texts, numbers and ``FlaxArray``s.

    Large arrays are maps of chunks.

    Allocates memory for the file's actual content, not for the lengths that it claims.  Raises
    ValueError as ``scan_msgpack`` does.
    """
    scanner = _Scanner(buffer)
    tree = scanner.value()
    if scanner.position != len(buffer):
        raise ValueError(f"{len(buffer) - scanner.position} bytes follow the end")
    if not isinstance(tree, dict):
        raise ValueError("not a map of arrays")
    return tree


def whole_arrays(tree: Any, dtype_of: Callable[[str], np.dtype]) -> Any:
    """Returns the tree with each ``FlaxArray`` read; ValueError if one has a wrong length."""
    if isinstance(tree, dict) and _CHUNKED in tree:
        tree = _joined(tree)
    if isinstance(tree, dict):
        return {name: whole_arrays(child, dtype_of) for name, child in tree.items()}
    if not isinstance(tree, FlaxArray):
        return tree
    dtype = dtype_of(tree.dtype)
    tree.check(dtype)
    return tree.read(tuple(slice(0, size) for size in tree.shape), dtype)


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, FlaxArray]]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            value = _joined(value) if _CHUNKED in value else value
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}/")
        elif isinstance(value, FlaxArray):
            yield path, value
        else:
            raise ValueError(f"{path} is not an array")


def _joined(parts: dict[str, Any]) -> FlaxArray:
    try:
        shape = [parts["shape"][str(i)] for i in range(len(parts["shape"]))]
        chunks = [parts["chunks"][str(i)] for i in range(len(parts["chunks"]))]
        (dtype,) = {chunk.dtype for chunk in chunks}
        pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("an array with missing chunks") from error
    return FlaxArray(shape=_whole(shape), dtype=dtype, pieces=pieces)


def _whole(shape: list[Any]) -> tuple[int, ...]:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {shape}")
    return tuple(shape)


class _Scanner:
    def __init__(self, buffer: memoryview, *, values: int = 0) -> None:
        self.buffer = buffer
        self.position = 0
        self.values = values

    def take(self, size: int) -> memoryview:
        part = self.buffer[self.position : self.position + size]
        if len(part) != size:
            raise ValueError("it is truncated")
        self.position += size
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def value(self, depth: int = 0) -> Any:
        """Returns the next object; arrays as FlaxArray, other binary data as views."""
        if depth > _DEEPEST:
            raise ValueError("maps are nested too deeply")
        self.values += 1
        if self.values > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES} values")
        tag = self.number(1)
        if tag <= 0x7F:
            return tag
        if tag <= 0x8F:
            return self.map(tag & 0x0F, depth)
        if tag <= 0x9F:
            return [self.value(depth + 1) for _ in range(tag & 0x0F)]
        if tag <= 0xBF:
            return str(self.take(tag & 0x1F), "utf-8")
        if tag in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[tag]
        if 0xC4 <= tag <= 0xC6:
            return self.take(self.number(1 << (tag - 0xC4)))
        if 0xC7 <= tag <= 0xC9:
            return self.extension(self.number(1 << (tag - 0xC7)), depth)
        if tag in (0xCA, 0xCB):
            size = 4 << (tag - 0xCA)
            return float(np.frombuffer(self.take(size), f">f{size}")[0])
        if 0xCC <= tag <= 0xCF:
            return self.number(1 << (tag - 0xCC))
        if 0xD0 <= tag <= 0xD3:
            return int.from_bytes(self.take(1 << (tag - 0xD0)), "big", signed=True)
        if tag >= 0xE0:
            return tag - 0x100
        if 0xD4 <= tag <= 0xD8:
            return self.extension(1 << (tag - 0xD4), depth)
        if 0xD9 <= tag <= 0xDB:
            return str(self.take(self.number(1 << (tag - 0xD9))), "utf-8")
        if tag in (0xDC, 0xDD):
            return [self.value(depth + 1) for _ in range(self.number(2 << (tag - 0xDC)))]
        if tag in (0xDE, 0xDF):
            return self.map(self.number(2 << (tag - 0xDE)), depth)
        raise ValueError(f"an object of kind {tag:#x}, which is in no file of parameters")

    def map(self, size: int, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for _ in range(size):
            name = self.value(depth + 1)
            if not isinstance(name, str) or name in entries:
                raise ValueError(f"the name {name!r} twice, or no text")
            entries[name] = self.value(depth + 1)
        return entries

    def extension(self, size: int, depth: int) -> FlaxArray:
        code, payload = self.number(1), self.take(size)
        inner = _Scanner(payload, values=self.values)
        parts = inner.value(depth + 1) if code in (_NDARRAY, _SCALAR) else None
        self.values = inner.values
        match parts:
            case [list(shape), str(dtype), memoryview() as data]:
                return FlaxArray(shape=_whole(shape), dtype=dtype, pieces=(data,))
        raise ValueError("an object that is not an array")
