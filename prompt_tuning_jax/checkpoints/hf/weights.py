"""The tensors of a Hugging Face folder, read part by part.

Safetensors, Flax msgpack and torch files, single or sharded with an index.  Tensors have torch's
names and layout (kernels [out, in]).
"""

import mmap
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints.array_files import require_stored
from prompt_tuning_jax.checkpoints.hf.flax_msgpack import FlaxArray, scan_msgpack
from prompt_tuning_jax.checkpoints.lazy_arrays import Index, LazyArray
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import read_json_file, require_whole

# Whether a tensor, by torch's name, is not to be read.
IsUnused: TypeAlias = Callable[[str], bool]

SAFETENSORS = "model.safetensors"
FLAX = "flax_model.msgpack"
TORCH = "pytorch_model.bin"
_LARGEST_INDEX = 2**24  # bytes
_LONGEST_NAME = 255  # bytes, on all file systems
INDEX_SUFFIX = ".index.json"

_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_weights(
    folder: Path, *, is_unused: IsUnused = lambda name: False, flax: bool = True
) -> tuple[Path, dict[str, LazyArray]]:
    """Returns the file or index of the weights, and its tensors by torch's names.

    Of several formats, the first of safetensors, Flax and torch is used.  Only headers are read
    before an array is.  Tensors for which ``is_unused`` is true are left out, and may be of any
    type; with ``flax=False``, files of Flax are not used.  Raises UserError for missing or damaged
    files.
    """
    for kind in _FORMATS:
        if kind.file == FLAX and not flax:
            continue
        single, index = folder / kind.file, folder / (kind.file + INDEX_SUFFIX)
        if single.is_file():
            return single, kind.open(single, is_unused)
        if index.is_file():
            return index, _open_sharded(index, kind, is_unused)
    read = f"{SAFETENSORS}, {FLAX} or {TORCH}" if flax else f"{SAFETENSORS} or {TORCH}"
    raise UserError(
        f"{folder} has no weights: no {read}, and no {SAFETENSORS}{INDEX_SUFFIX} of shards"
    )


@dataclass(frozen=True, kw_only=True)
class _Format:
    """A format: ``open`` reads arrays by torch's names; ``torch_name`` translates an index."""

    file: str
    open: Callable[[Path, IsUnused], dict[str, LazyArray]]
    torch_name: Callable[[str], str] = str


def _open_sharded(index: Path, kind: _Format, is_unused: IsUnused) -> dict[str, LazyArray]:
    listed = {kind.torch_name(name): shard for name, shard in _weight_map(index).items()}
    shard_of = {name: shard for name, shard in listed.items() if not is_unused(name)}
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise UserError(
            f"{index} lists {len(missing)} of {len(shards)} shards that are missing, "
            f"for instance {missing[0]}; fetch them again"
        )
    arrays = {shard: kind.open(index.parent / shard, is_unused) for shard in shards}
    for name, shard in shard_of.items():
        if name not in arrays[shard]:
            raise UserError(f"{index} lists {name} in {shard}, which does not contain it")
    for shard in shards:
        unlisted = sorted(name for name in arrays[shard] if shard_of.get(name) != shard)
        if unlisted:
            raise UserError(f"{index} does not list {unlisted[0]}, which {shard} contains")
    return {name: arrays[shard][name] for name, shard in shard_of.items()}


def _weight_map(index: Path) -> dict[str, str]:
    read = read_json_file(index, of=f"{index} is not an index of shards", max_bytes=_LARGEST_INDEX)
    weight_map = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index} is not an index of shards: its weight_map is empty or not an object"
        )
    for name, shard in weight_map.items():
        # Only the text is checked: in the hub's cache the files are links out of the folder.
        if not _is_file_name(shard):
            raise UserError(
                f"{index}: {name[:200]} is in {repr(shard)[:200]}; it must name a file in "
                "this folder"
            )
    return weight_map


def _is_file_name(name: Any) -> bool:
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0"):
        return False
    return len(name.encode()) <= _LONGEST_NAME


def _open_safetensors(path: Path, is_unused: IsUnused) -> dict[str, LazyArray]:
    require_whole(path)
    from safetensors import SafetensorError, safe_open

    def damaged(error: Exception) -> UserError:
        return UserError(f"{path} is damaged, or not a safetensors file: {_line(error)}")

    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(error) from error

    def lazy(name: str, part: Any) -> LazyArray:
        shape = tuple(part.get_shape())

        def read(index: Index) -> HostArray:
            bounds = _bounds(index, shape)
            if any(part.start >= part.stop for part in bounds):  # safetensors raises an error
                return np.empty([max(0, part.stop - part.start) for part in bounds], dtype)
            try:
                return np.asarray(file.get_slice(name)[bounds])
            except (SafetensorError, OSError) as error:
                raise damaged(error) from error

        stored = part.get_dtype()
        dtype = _dtype(_SAFETENSORS_DTYPES.get(stored, stored), where=f"{path}: {name}")
        return LazyArray(shape=shape, dtype=dtype, where=f"{path}: {name}", read=read)

    return {name: lazy(name, part) for name, part in slices.items() if not is_unused(name)}


def _open_flax(path: Path, is_unused: IsUnused) -> dict[str, LazyArray]:
    require_whole(path)
    try:
        with path.open("rb") as file:
            # The arrays are views of the mapped file, and keep it open.
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        leaves = scan_msgpack(mapped)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged, or not a Flax file: {_line(error)}") from error

    def lazy(name: str, leaf: FlaxArray) -> LazyArray:
        where = f"{path}: {name}"
        dtype = _dtype(leaf.dtype, where=where)
        try:
            leaf.check(dtype)
        except ValueError as error:
            raise UserError(f"{where} is damaged: {error}") from error
        array = LazyArray(
            shape=leaf.shape,
            dtype=dtype,
            where=where,
            read=lambda index: leaf.read(_bounds(index, leaf.shape), dtype),
        )
        return array.transposed() if name.endswith("/kernel") else array

    by_name = {_name_of_flax(name): (name, leaf) for name, leaf in leaves.items()}
    return {torch: lazy(*leaf) for torch, leaf in by_name.items() if not is_unused(torch)}


def _name_of_flax(name: str) -> str:
    """lm_head/kernel -> lm_head.weight, shared/embedding -> shared.weight."""
    *path, last = name.split("/")
    return ".".join([*path, "weight" if last in ("kernel", "embedding") else last])


def _open_torch(path: Path, is_unused: IsUnused) -> dict[str, LazyArray]:
    require_whole(path)
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} is a torch file: install torch (pip install torch), "
            f"or convert the model to {SAFETENSORS}"
        ) from None
    try:
        # Files of torch before 1.6 are not archives and cannot be mapped.
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    # torch raises many types for damaged files.
    except Exception as error:
        raise UserError(
            f"{path} is damaged, or contains more than tensors, which is refused: {_line(error)}"
        ) from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} contains a {type(state).__name__} and not tensors by name")

    def lazy(name: str, tensor: Any) -> LazyArray:
        where = f"{path}: {name}"
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise UserError(f"{where} is a {type(tensor).__name__} and not a plain tensor")
        require_stored(tensor, of=where)
        dtype = _dtype(str(tensor.dtype).removeprefix("torch."), where=where)
        shape = tuple(tensor.shape)

        def read(index: Index) -> HostArray:
            part = tensor.detach()[_bounds(index, shape)].contiguous()
            if part.dtype == torch.bfloat16:  # numpy has no bfloat16
                return np.asarray(part.view(torch.int16).numpy()).view(dtype)
            return np.asarray(part.numpy())

        return LazyArray(shape=shape, dtype=dtype, where=where, read=read)

    return {str(n): lazy(n, tensor) for n, tensor in state.items() if not is_unused(str(n))}


_FORMATS = (
    _Format(file=SAFETENSORS, open=_open_safetensors),
    _Format(file=FLAX, open=_open_flax, torch_name=_name_of_flax),
    _Format(file=TORCH, open=_open_torch),
)


def _dtype(name: str, *, where: str) -> np.dtype:
    if name not in _DTYPES:
        raise UserError(f"{where} is stored as {name[:40]}; supported: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _bounds(index: Index, shape: tuple[int, ...]) -> Index:
    """Returns the slices with explicit ends, because libraries differ in what they accept."""
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
