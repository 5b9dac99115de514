"""A prompt as an array, and as bytes in the two plain formats: ``.npy`` and ``.safetensors``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints.mapped_safetensors import map_safetensors
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import DType, HostArray
from prompt_tuning_jax.untrusted_input import require_whole

# What a safetensors file calls the types that a prompt is stored in.
_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
# Numbers in a prompt; the longest that anybody trains have a thousandth of them.
_LARGEST = 2**28


def checked_prompt(prompt: HostArray, *, of: str, dtype: DType | None = np.float32) -> HostArray:
    """A contiguous copy as ``dtype``, if this is a prompt; ``of`` begins the error otherwise.

    ``dtype`` None keeps float16, bfloat16, float32 and float64 as they are and makes anything
    else float32.  Raises UserError unless it is ``[P,D]``, of floating-point numbers that are
    finite as float32, and not empty.
    """
    shape = list(prompt.shape)
    if prompt.ndim != 2:
        raise UserError(f"{of} has shape {shape}; a prompt has two axes, [length, model width]")
    if not prompt.size:
        raise UserError(f"{of} is empty: its shape is {shape}")
    if prompt.size > _LARGEST:
        raise UserError(f"{of} has shape {shape}; a prompt has at most {_LARGEST} numbers")
    if prompt.dtype.kind != "f" and prompt.dtype.name != "bfloat16":
        raise UserError(f"{of} holds {prompt.dtype}; a prompt holds floating-point numbers")
    with np.errstate(over="ignore"):  # what is too large for float32 is reported below
        prompt_PD = np.array(prompt, np.float32, order="C")
    if not np.isfinite(prompt_PD).all():
        raise UserError(f"{of} holds numbers that are not finite (NaN or infinity)")
    if dtype is None:
        if prompt.dtype.name not in _CODES:
            return prompt_PD
        dtype = prompt.dtype.newbyteorder("=")
    if np.dtype(dtype) == np.float32:
        return prompt_PD
    return np.array(prompt, dtype, order="C")


def read_npy(path: Path) -> HostArray:
    """The array in an ``.npy`` file, mapped; UserError if it is damaged or would need a pickle.

    Two bytes without a type are bfloat16.
    """
    require_whole(path)
    try:
        # Mapped: a header that claims more than the file has is an error, not an allocation.
        array: HostArray = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=10_000)
    except Exception as error:  # numpy raises many kinds for damaged headers
        line = one_line(error)
        if "Python objects" in line or "allow_pickle" in line:
            raise UserError(f"{path} holds Python objects, which are never loaded") from error
        if "mmap length" in line or "EOF" in line:
            raise UserError(f"{path} is a damaged .npy file: it is cut off") from error
        raise UserError(f"{path} is a damaged .npy file: {one_line(error)}") from error
    if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.names is None:
        # The format has no name for bfloat16, which is what numpy's writer calls two bytes.
        return array.view(ml_dtypes.bfloat16)
    return array


def read_safetensors(
    path: Path, *, key: str, of: str, hint: str = ""
) -> tuple[HostArray, dict[str, str]]:
    """The one array ``key`` in a ``.safetensors`` file, mapped, and the file's metadata.

    Raises UserError if the file is damaged or holds anything else; ``of`` says in the message what
    sort of file has ``key`` alone, ``hint`` what to do.
    """
    mapped = map_safetensors(path)
    names = list(mapped.arrays)
    if names != [key]:
        listed = ", ".join(names[:5]) + ", ..." * (len(names) > 5) or "nothing"
        raise UserError(f"{path} holds {listed}; {of} holds one array {key!r}{hint}")
    return mapped.arrays[key], mapped.metadata


def npy_safe(prompt_PD: HostArray) -> HostArray:
    """The same numbers in a type that ``.npy`` knows: bfloat16 becomes float32, exactly."""
    return prompt_PD.astype(np.float32) if prompt_PD.dtype.name == "bfloat16" else prompt_PD


def safetensors_bytes(prompt_PD: HostArray, *, key: str, metadata: Mapping[str, str]) -> bytes:
    """A ``.safetensors`` file of one array; see ``safetensors_of``."""
    return safetensors_of({key: prompt_PD}, metadata=metadata)


def safetensors_of(arrays: Mapping[str, HostArray], *, metadata: Mapping[str, str]) -> bytes:
    """A ``.safetensors`` file of arrays by their names, the same bytes for the same input.

    The library's own writer gives the metadata a random order.
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
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of eight
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def one_line(error: Exception) -> str:
    """An exception of a library in one line that is not too long."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
