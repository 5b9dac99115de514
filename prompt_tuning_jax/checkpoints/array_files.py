"""Reads and writes arrays in ``.npy`` and ``.safetensors`` files.

Files are memory-mapped, so that the sizes that a header claims cost no memory, and checked before
their numbers are used.  The same arrays are always written as the same bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import DType, HostArray
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
_MAX_HEADER = 2**24  # bytes; enough for the names of all arrays, and the metadata with its labels
_CHUNK = 2**22  # numbers that are checked together


@dataclass(frozen=True, kw_only=True)
class MappedArrays:
    """The arrays of a file, sorted by name, and its metadata."""

    arrays: dict[str, HostArray]
    metadata: dict[str, str]


def map_safetensors(path: Path) -> MappedArrays:
    """Returns the memory-mapped arrays of a file; only the header is read.

    Raises UserError for a damaged file, or a dtype that NumPy does not have.
    """
    from safetensors import SafetensorError, safe_open

    require_whole(path)
    try:
        length, described = read_header(path)
        # The library checks that the arrays fill the file one after another, each with the length
        # of its shape.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is a damaged .safetensors file: {one_line(error)}") from error
    # JSON parsers resolve repeated names differently, so shapes and offsets are checked again.
    metadata = described.pop("__metadata__", None) or {}
    size, arrays = path.stat().st_size, {}
    for name, entry in sorted(described.items()):
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path}: {name} has dtype {entry['dtype']}, which is not supported")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if not 0 <= start <= stop <= size or stop - start != prod(shape) * dtype.itemsize:
            raise UserError(f"{path} is a damaged .safetensors file: {name} has wrong offsets")
        arrays[name] = _mapped(path, start, dtype, shape)
    return MappedArrays(arrays=arrays, metadata=metadata)


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Returns the length of the header, and its JSON object; UserError if damaged, or OSError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise UserError(f"{path} is a damaged .safetensors file: a header of {length} bytes")
        header = file.read(length)
    described = read_json(header, of=f"{path} is a damaged .safetensors file: its header")
    if not isinstance(described, dict):
        raise UserError(f"{path} is a damaged .safetensors file: its header is not an object")
    return length, described


def require_at_most(arrays: Mapping[str, HostArray], most: int, *, of: str, why: str) -> None:
    """Raises UserError for more than ``most`` numbers; ``why`` is part of the message."""
    numbers = sum(array.size for array in arrays.values())
    if numbers > most:
        raise UserError(f"{of} has {numbers} numbers, and {why} {most}")


def require_stored(tensor: Any, *, of: str) -> None:
    """Raises UserError for a tensor of torch that repeats its numbers.

    A file of few bytes could otherwise fill the memory.
    """
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"{of} has more numbers than the file stores; save it with .contiguous()")


def require_finite(arrays: Mapping[str, HostArray], *, of: str) -> None:
    """Raises UserError that names the first array with NaN or infinity; checks block by block."""
    for name, array in arrays.items():
        flat = array.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            if not np.isfinite(flat[start : start + _CHUNK].astype(np.float32)).all():
                raise UserError(f"{of}: {name} has numbers that are not finite (NaN or infinity)")


def _mapped(path: Path, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> HostArray:
    if not prod(shape):
        return np.empty(shape, dtype)
    flat = np.memmap(path, np.uint8, mode="r", offset=start, shape=(prod(shape) * dtype.itemsize,))
    array: HostArray = np.asarray(flat).view(dtype).reshape(shape)
    return array


# The safetensors names of the dtypes of prompts.
_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
# The maximum of numbers in a prompt; the largest trained prompts have a thousandth of it.
_LARGEST = 2**28


def checked_prompt(prompt: HostArray, *, of: str, dtype: DType | None = np.float32) -> HostArray:
    """Returns a contiguous copy of a prompt as ``dtype``; error messages begin with ``of``.

    ``dtype=None`` keeps float16, bfloat16, float32 and float64, and converts others to float32.
    Raises UserError unless the array is ``[P,D]``, not empty, and of floating-point numbers that
    are finite as float32.
    """
    shape = list(prompt.shape)
    if prompt.ndim != 2:
        raise UserError(
            f"{of} has shape {shape}; a prompt has two dimensions, [length, model width]"
        )
    if not prompt.size:
        raise UserError(f"{of} is empty: it has shape {shape}")
    if prompt.size > _LARGEST:
        raise UserError(f"{of} has shape {shape}; a prompt has at most {_LARGEST} numbers")
    if prompt.dtype.kind != "f" and prompt.dtype.name != "bfloat16":
        raise UserError(f"{of} has dtype {prompt.dtype}; a prompt has floating-point numbers")
    with np.errstate(over="ignore"):  # overflows of float32 are reported below
        prompt_PD = np.array(prompt, np.float32, order="C")
    if not np.isfinite(prompt_PD).all():
        raise UserError(f"{of} has numbers that are not finite (NaN or infinity)")
    if dtype is None:
        if prompt.dtype.name not in _CODES:
            return prompt_PD
        dtype = prompt.dtype.newbyteorder("=")
    if np.dtype(dtype) == np.float32:
        return prompt_PD
    return np.array(prompt, dtype, order="C")


def read_npy(path: Path) -> HostArray:
    """Returns the memory-mapped array of an ``.npy`` file; UserError if damaged or pickled.

    A void dtype of two bytes is read as bfloat16.
    """
    require_whole(path)
    try:
        # With mmap, a header that claims more than the file has is an error, not an allocation.
        array: HostArray = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=10_000)
    except Exception as error:  # numpy raises many types for damaged headers
        line = one_line(error)
        if "Python objects" in line or "allow_pickle" in line:
            raise UserError(f"{path} contains Python objects, which are never loaded") from error
        if "mmap length" in line or "EOF" in line:
            raise UserError(f"{path} is a damaged .npy file: it is truncated") from error
        raise UserError(f"{path} is a damaged .npy file: {one_line(error)}") from error
    if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.names is None:
        # The format has no name for bfloat16; numpy writes it as void of two bytes.
        return array.view(ml_dtypes.bfloat16)
    return array


def read_safetensors(
    path: Path, *, key: str, of: str, hint: str = ""
) -> tuple[HostArray, dict[str, str]]:
    """Returns the memory-mapped array ``key`` of a ``.safetensors`` file, and the file's metadata.

    Raises UserError if the file is damaged or has other arrays.  Its message names the expected
    kind of file (``of``) and the remedy (``hint``).
    """
    mapped = map_safetensors(path)
    names = list(mapped.arrays)
    if names != [key]:
        listed = ", ".join(names[:5]) + ", ..." * (len(names) > 5) or "nothing"
        raise UserError(f"{path} contains {listed}; {of} has one array {key!r}{hint}")
    return mapped.arrays[key], mapped.metadata


def npy_safe(prompt_PD: HostArray) -> HostArray:
    """Converts bfloat16, which ``.npy`` lacks, to float32, exactly; others are unchanged."""
    return prompt_PD.astype(np.float32) if prompt_PD.dtype.name == "bfloat16" else prompt_PD


def safetensors_bytes(prompt_PD: HostArray, *, key: str, metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a ``.safetensors`` file of one array; see ``safetensors_of``."""
    return safetensors_of({key: prompt_PD}, metadata=metadata)


def safetensors_of(arrays: Mapping[str, HostArray], *, metadata: Mapping[str, str]) -> bytes:
    """Returns the bytes of a ``.safetensors`` file; the same input gives the same bytes.

    The library's writer orders the metadata randomly.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    parts, end = [], 0
    for name, array in sorted(arrays.items()):
        part = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        offsets = [end, end := end + len(part)]
        code, shape = _CODES[array.dtype.name], list(array.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": offsets}
        parts.append(part)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    text += b" " * (-len(text) % 8)  # aligns the arrays to eight bytes
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def one_line(error: Exception) -> str:
    """Returns the message of an exception as one line of limited length."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


METHOD = "method"  # the metadata key of the method's config, as JSON


def tuned_by(path: Path) -> str | None:
    """Returns the class of the method whose arrays are in a ``.safetensors`` file.

    None for any other file and for unreadable ones; "" if the method has no name.
    """
    if not path.is_file():
        return None
    try:
        text = read_header(path)[1].get("__metadata__", {}).get(METHOD)
    except (UserError, OSError, AttributeError):
        return None
    if not isinstance(text, str):
        return None
    try:
        described = read_json(text, of="the method")
    except UserError:
        return ""
    name = described.get("class") if isinstance(described, dict) else None
    return name if isinstance(name, str) else ""
