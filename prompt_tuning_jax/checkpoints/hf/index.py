"""Writes a Hugging Face folder: configuration, safetensors in one file or in shards, tokenizer."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prompt_tuning_jax.checkpoints.hf.config import CONFIG
from prompt_tuning_jax.checkpoints.hf.weights import INDEX_SUFFIX, SAFETENSORS
from prompt_tuning_jax.checkpoints.lazy import LazyArray
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.storage import folder_written_aside

_KINDS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_SHARDS = "model-*-of-*.safetensors"


def write_folder(
    folder: Path,
    arrays: Mapping[str, LazyArray],
    *,
    describe: Callable[[str], Mapping[str, Any]],
    tokenizer: Mapping[str, Path | dict[str, Any]],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Writes arrays under torch's names and in its layout.

    ``describe`` makes config.json from the name of the dtype that most of the numbers have;
    ``tokenizer`` names further files and says what to copy or which JSON to write.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    dtypes = _dtypes(arrays, dtype)
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes} and must be above 0")
    shards = _shards(arrays, dtypes, most=max_shard_bytes)
    described = describe(_most_common(arrays, dtypes))
    with folder_written_aside(folder) as aside:
        _write_json(aside / CONFIG, described)
        for file, names in shards.items():
            # safetensors writes the memory as it lies, whatever the strides say.
            held = {n: np.ascontiguousarray(arrays[n].whole(), dtypes[n]) for n in names}
            try:
                save_file(held, aside / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
            # safetensors lets the owner alone read what it writes.
            shutil.copymode(aside / CONFIG, aside / file)
        if len(shards) > 1:
            size = sum(_size(array, dtypes[name]) for name, array in arrays.items())
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            _write_json(aside / (SAFETENSORS + INDEX_SUFFIX), index)
        for name, source in tokenizer.items():
            if isinstance(source, Path):
                shutil.copyfile(source, aside / name)
            else:
                _write_json(aside / name, source)
        # Last, so that what fails above leaves the old model; a kill from here on leaves an index
        # without its shards, which a reader reports, and no mixture of two models.
        _remove_weights(folder, keep={SAFETENSORS} & shards.keys())


def _dtypes(arrays: Mapping[str, LazyArray], dtype: str) -> dict[str, np.dtype]:
    if dtype != "stored" and dtype not in _KINDS:
        known = ", ".join(_KINDS)
        raise UserError(f"weights are written as stored, {known}, not as {dtype!r}")
    found = {name: _KINDS.get(dtype, array.dtype) for name, array in arrays.items()}
    for name, kind in found.items():
        if kind not in _KINDS.values():
            raise UserError(f"{name} is {kind}; only {', '.join(_KINDS)} are written")
    return found


def _most_common(arrays: Mapping[str, LazyArray], dtypes: Mapping[str, np.dtype]) -> str:
    numbers = dict.fromkeys(_KINDS, 0)
    for name, array in arrays.items():
        numbers[dtypes[name].name] += int(np.prod(array.shape))
    return max(numbers, key=lambda kind: numbers[kind])


def _shards(
    arrays: Mapping[str, LazyArray], dtypes: Mapping[str, np.dtype], *, most: int
) -> dict[str, list[str]]:
    """Which arrays go into which file; one that is too large alone has a file of its own."""
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
