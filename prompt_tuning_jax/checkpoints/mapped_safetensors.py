"""The arrays of a ``.safetensors`` file, mapped: what a header claims costs no memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import read_json, require_whole

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_MAX_HEADER = 2**24  # bytes: a line for each array, and the metadata with its labels
_CHUNK = 2**22  # numbers looked at together


@dataclass(frozen=True, kw_only=True)
class MappedArrays:
    """``arrays`` by their names, sorted, and the file's metadata."""

    arrays: dict[str, HostArray]
    metadata: dict[str, str]


def map_safetensors(path: Path) -> MappedArrays:
    """The arrays in a file, of which nothing but the header is read.

    Raises UserError for a file that is damaged, or holds numbers of another type than NumPy's.
    """
    from safetensors import SafetensorError, safe_open

    require_whole(path)
    try:
        length, described = read_header(path)
        # The library looks whether the arrays fill the file, one behind the other, each as long as
        # its shape.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is a damaged .safetensors file: {_line(error)}") from error
    # Repeated names would be read otherwise here than there: shapes and places are looked at again.
    metadata = described.pop("__metadata__", None) or {}
    size, arrays = path.stat().st_size, {}
    for name, entry in sorted(described.items()):
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name} holds {entry['dtype']}, which is not read")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if not 0 <= start <= stop <= size or stop - start != prod(shape) * dtype.itemsize:
            raise UserError(f"{path} is a damaged .safetensors file: {name} is not where it says")
        arrays[name] = _mapped(path, start, dtype, shape)
    return MappedArrays(arrays=arrays, metadata=metadata)


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """The length of the header and what it says; UserError where it is none, or OSError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise UserError(f"{path} is a damaged .safetensors file: a header of {length} bytes")
        header = file.read(length)
    described = read_json(header, of=f"{path} is a damaged .safetensors file: its header")
    if not isinstance(described, dict):
        raise UserError(f"{path} is a damaged .safetensors file: its header is no object")
    return length, described


def require_at_most(arrays: Mapping[str, HostArray], most: int, *, of: str, why: str) -> None:
    """UserError where there are more numbers than that; ``why`` ends the sentence."""
    numbers = sum(array.size for array in arrays.values())
    if numbers > most:
        raise UserError(f"{of} holds {numbers} numbers, {why} {most}")


def require_finite(arrays: Mapping[str, HostArray], *, of: str) -> None:
    """UserError that names the first array with NaN or infinity; some at a time are looked at."""
    for name, array in arrays.items():
        flat = array.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            if not np.isfinite(flat[start : start + _CHUNK].astype(np.float32)).all():
                raise UserError(f"{of}: {name} holds numbers that are not finite (NaN or infinity)")


def _mapped(path: Path, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> HostArray:
    if not prod(shape):
        return np.empty(shape, dtype)
    flat = np.memmap(path, np.uint8, mode="r", offset=start, shape=(prod(shape) * dtype.itemsize,))
    array: HostArray = np.asarray(flat).view(dtype).reshape(shape)
    return array


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
