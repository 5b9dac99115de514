"""Writes a Hugging Face folder: configuration, weights in one file or in shards, tokenizer."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints.hf.config_files import CONFIG
from prompt_tuning_jax.checkpoints.hf.weights import INDEX_SUFFIX, SAFETENSORS
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import atomic_write_folder

_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_SHARDS = "model-*-of-*.safetensors"


@dataclass(frozen=True, kw_only=True)
class HfModel:
    """What a folder holds.

    Attributes:
      arrays: with torch's names and layout.
      describe: returns config.json, given the name of the arrays' most common dtype.
      files: the names of other files -> a file to copy, or JSON to write.
    """

    arrays: Mapping[str, LazyArray]
    describe: Callable[[str], Mapping[str, Any]]
    files: Mapping[str, Path | dict[str, Any]] = field(default_factory=dict)


def with_dtype(described: Mapping[str, Any]) -> Callable[[str], Mapping[str, Any]]:
    """Returns ``HfModel.describe`` of a config.json in which only the dtype is missing."""
    return lambda stored: {**described, "torch_dtype": stored, "dtype": stored}


def write_folder(folder: Path, model: HfModel, *, dtype: str, max_shard_bytes: int) -> None:
    """Writes a model into a folder, which then has no weights of another one."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = model.arrays
    dtypes = _dtypes(arrays, dtype)
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes} and must be above 0")
    shards = _shards(arrays, dtypes, most=max_shard_bytes)
    described = model.describe(_most_common(arrays, dtypes))
    with atomic_write_folder(folder) as temporary:
        _write_json(temporary / CONFIG, described)
        for file, names in shards.items():
            # safetensors writes the memory in order and ignores strides.
            shard = {n: np.ascontiguousarray(arrays[n].whole(), dtypes[n]) for n in names}
            try:
                save_file(shard, temporary / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
            # safetensors writes files that only their owner can read.
            shutil.copymode(temporary / CONFIG, temporary / file)
        if len(shards) > 1:
            size = sum(_size(array, dtypes[name]) for name, array in arrays.items())
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            _write_json(temporary / (SAFETENSORS + INDEX_SUFFIX), index)
        for name, source in model.files.items():
            if isinstance(source, Path):
                shutil.copyfile(source, temporary / name)
            else:
                _write_json(temporary / name, source)
        # Last, so that earlier failures leave the old model intact.  A kill after this point leaves
        # an index without its shards, which readers report, and never a mixture of two models.
        _remove_weights(folder, keep={SAFETENSORS} & shards.keys())


def _dtypes(arrays: Mapping[str, LazyArray], dtype: str) -> dict[str, np.dtype]:
    if dtype != "stored" and dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise UserError(f"dtype is {dtype!r}; weights are written as stored, {known}")
    dtypes = {name: _DTYPES.get(dtype, array.dtype) for name, array in arrays.items()}
    for name, each in dtypes.items():
        if each not in _DTYPES.values():
            raise UserError(f"{name} is {each}; only {', '.join(_DTYPES)} are written")
    return dtypes


def _most_common(arrays: Mapping[str, LazyArray], dtypes: Mapping[str, np.dtype]) -> str:
    numbers = dict.fromkeys(_DTYPES, 0)
    for name, array in arrays.items():
        numbers[dtypes[name].name] += int(np.prod(array.shape))
    return max(numbers, key=lambda kind: numbers[kind])


def _shards(
    arrays: Mapping[str, LazyArray], dtypes: Mapping[str, np.dtype], *, most: int
) -> dict[str, list[str]]:
    """Returns the arrays of each file; an array larger than ``most`` has a separate file."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, array in arrays.items():
        size = _size(array, dtypes[name])
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SAFETENSORS: groups[0]}
    last = len(groups)
    return {f"model-{i:05d}-of-{last:05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _size(array: LazyArray, dtype: np.dtype) -> int:
    return int(np.prod(array.shape)) * dtype.itemsize


def _remove_weights(folder: Path, *, keep: set[str]) -> None:
    old = {SAFETENSORS, SAFETENSORS + INDEX_SUFFIX, *(p.name for p in folder.glob(_SHARDS))}
    for name in old - keep:
        (folder / name).unlink(missing_ok=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
