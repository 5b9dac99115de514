"""The tensors of a GGUF file, dequantized part by part as they are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints.lazy_arrays import Index, LazyArray
from prompt_tuning_jax.data.vocabularies.gguf_metadata import TensorInfo
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import HostArray

# Types that are stored as such; all others are blocks of small integers with scales.
_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
PLAIN_TYPES = tuple(_PLAIN)
# Types whose blocks weights may keep: the dtype of their integers, and their first byte in a block.
_KEPT = {
    "Q8_0": (np.dtype(np.int8), 2),
    "Q4_0": (np.dtype(ml_dtypes.int4), 2),
    "Q4_1": (np.dtype(ml_dtypes.uint4), 4),
}
KEPT_TYPES, BLOCK = tuple(_KEPT), 32
_ADVICE = "convert it with llama.cpp, for instance to Q8_0"
_MOST_ELEMENTS = 2**40
# Elements that are dequantized at once: the intermediate arrays take several times as much.
_CHUNK = 1 << 20


def open_tensors(path: Path, infos: Mapping[str, TensorInfo]) -> dict[str, LazyArray]:
    """Returns the tensors by name, rows first; quantized ones are float32.

    Raises UserError for types that cannot be dequantized, and for a file that is too short.
    """
    size = path.stat().st_size
    try:
        mapped = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return {name: _lazy(path, name, info, mapped, size) for name, info in infos.items()}


@dataclass(frozen=True, kw_only=True)
class StoredBlocks:
    """A tensor as its file stores it: integers, and numbers of each block of columns.

    Element ``[r, c]`` is ``whole[r, c] * scale[r, c // 32]``, plus ``minimum[r, c // 32]`` if there
    is one.
    """

    whole: LazyArray
    scale: LazyArray
    minimum: LazyArray | None

    def mapped(self, change: Callable[[LazyArray], LazyArray]) -> "StoredBlocks":
        """Returns the blocks with a change of rows, or of the order of axes, in each array."""
        minimum = None if self.minimum is None else change(self.minimum)
        return StoredBlocks(whole=change(self.whole), scale=change(self.scale), minimum=minimum)


def open_blocks(path: Path, name: str, info: TensorInfo) -> StoredBlocks | None:
    """Returns the blocks of a tensor that was opened.

    Returns None for a type whose blocks cannot be kept.
    """
    kind, size = stored_type(info)
    if kind not in _KEPT or len(info.shape) != 2:
        return None
    dtype, start = _KEPT[kind]
    rows, columns = info.shape
    mapped = np.memmap(path, np.uint8, mode="r")
    stored = mapped[info.offset : info.offset + size].reshape(rows, columns // BLOCK, -1)
    where = f"{path}: {name[:200]}"

    def halves(at: int) -> LazyArray:
        """Returns the float16 numbers at these bytes of each block."""

        def read(index: Index) -> HostArray:
            pair = np.ascontiguousarray(stored[(*index, slice(at, at + 2))])
            return pair.view(np.float16)[..., 0]

        shape = (rows, columns // BLOCK)
        return LazyArray(shape=shape, dtype=np.dtype(np.float16), where=where, read=read)

    def whole(index: Index) -> HostArray:
        first, last, _ = index[1].indices(columns)
        blocks = slice(first // BLOCK, max(first, last - 1) // BLOCK + 1)
        packed = stored[index[0], blocks, start:]
        if kind == "Q8_0":
            values = packed.view(np.int8)
        else:  # the low halves of all bytes come before the high ones
            values = np.concatenate([packed & 15, packed >> 4], axis=2).view(np.int8)
            if kind == "Q4_0":
                values = values - np.int8(8)
        part = values.reshape(len(packed), -1)
        begin = blocks.start * BLOCK
        return part[:, first - begin : max(first, last) - begin].astype(dtype)

    integers = LazyArray(shape=info.shape, dtype=dtype, where=where, read=whole)
    minimum = halves(2) if kind == "Q4_1" else None
    return StoredBlocks(whole=integers, scale=halves(0), minimum=minimum)


def same_bytes(path: Path, left: TensorInfo, right: TensorInfo) -> bool:
    """Returns whether two tensors that were opened have the same type, shape and bytes."""
    if (left.kind, left.shape) != (right.kind, right.shape):
        return False
    _, size = stored_type(left)
    mapped = np.memmap(path, np.uint8, mode="r")
    step = _CHUNK * 16
    return all(
        np.array_equal(
            mapped[left.offset + at : left.offset + min(at + step, size)],
            mapped[right.offset + at : right.offset + min(at + step, size)],
        )
        for at in range(0, size, step)
    )


def stored_type(info: TensorInfo) -> tuple[str, int]:
    """Returns the name of an opened tensor's type, and its bytes."""
    known = _type(info.kind)
    assert known is not None, "opened tensors have known types"
    kind, block, block_bytes = known
    return kind, prod(info.shape) // block * block_bytes


def _lazy(path: Path, name: str, info: TensorInfo, mapped: HostArray, size: int) -> LazyArray:
    where = f"{path}: {name[:200]}"
    known = _type(info.kind)
    if known is None:
        raise UserError(f"{where} has the type {info.kind}, which is not supported; {_ADVICE}")
    kind, block, block_bytes = known
    columns = info.shape[-1]
    if kind not in _PLAIN and not _can_dequantize(kind):
        raise UserError(f"{where} is stored as {kind}, which is not supported; {_ADVICE}")
    if columns % block or not 0 < prod(info.shape) <= _MOST_ELEMENTS:
        raise UserError(
            f"{where} is damaged: its shape is {list(info.shape)}, and {kind} has blocks of {block}"
        )
    row_bytes = columns // block * block_bytes
    rows = prod(info.shape[:-1])
    end = info.offset + rows * row_bytes
    if end > size:
        raise UserError(
            f"{where} ends at byte {end}, but the file has only {size}: the copy is incomplete"
        )
    stored = mapped[info.offset : end].reshape(*info.shape[:-1], row_bytes)
    dtype = _PLAIN.get(kind, np.dtype(np.float32))

    def read(index: Index) -> HostArray:
        start, stop, _ = index[-1].indices(columns)
        first, last = start // block, max(start, stop - 1) // block + 1
        blocks = stored[(*index[:-1], slice(first * block_bytes, last * block_bytes))]
        part = _values(blocks, kind, dtype, (last - first) * block)
        return part[..., start - first * block : max(start, stop) - first * block]

    return LazyArray(shape=info.shape, dtype=dtype, where=where, read=read)


def _values(blocks: HostArray, kind: str, dtype: np.dtype, columns: int) -> HostArray:
    shape = (*blocks.shape[:-1], columns)
    if kind in _PLAIN:
        return np.ascontiguousarray(blocks).view(dtype).reshape(shape)
    rows = blocks.reshape(-1, blocks.shape[-1])
    values = np.empty((len(rows), columns), np.float32)
    step = max(1, _CHUNK // columns)
    with np.errstate(all="ignore"):  # a damaged scale is found later, with the array's name
        for at in range(0, len(rows), step):
            values[at : at + step] = _dequantize(kind)(rows[at : at + step])
    return values.reshape(shape)


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF files need the package gguf: pip install 'prompt_tuning_jax[gguf]'"
        ) from None
    return gguf


@cache
def _type(number: int) -> tuple[str, int, int] | None:
    """Returns a type's name, the elements of a block and its bytes; None for an unknown type."""
    gguf = _package()
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        return None
    return kind.name, block, block_bytes


def _dequantize(kind: str) -> Callable[[HostArray], HostArray]:
    from gguf import GGMLQuantizationType, quants

    number = GGMLQuantizationType[kind]
    return lambda rows: quants.dequantize(np.ascontiguousarray(rows), number)


@cache
def _can_dequantize(kind: str) -> bool:
    gguf = _package()
    _, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    try:
        with np.errstate(all="ignore"):
            _dequantize(kind)(np.zeros((1, block_bytes), np.uint8))
    except (NotImplementedError, KeyError):
        return False
    return True
