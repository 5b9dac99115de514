"""Copies of the model's own weights that PEFT saves in an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray
from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.checkpoints.peft.modules import model_tensors
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.quantization import Quantization, quantized
from prompt_tuning_jax.typing import Array, HostArray

# A parameter of the model, in memory or not.
Parameter: TypeAlias = Array | HostArray | LazyArray
_QUANTIZED: tuple[Quantization, ...] = ("int8", "int4")


def without_copies(
    arrays: Mapping[str, HostArray],
    config: ModelConfig,
    params: Mapping[str, Parameter],
    *,
    file: Path,
) -> dict[str, HostArray]:
    """The arrays without copies of the model's parameters; UserError for one that differs."""
    names = model_tensors(config)
    shapes = parameter_shapes(config)
    kept = {}
    for theirs, array in arrays.items():
        if theirs not in names:
            kept[theirs] = array
            continue
        name, transposed = names[theirs]
        array = array.T if transposed else array
        if array.shape != shapes[name]:
            raise UserError(
                f"{file}: {theirs} is {list(array.shape)}, but this model has "
                f"{list(shapes[name])}; adapters of a model with another number of embeddings are "
                "not supported: merge it into its model with PEFT (merge_and_unload) and use that"
            )
        if name not in params or not _is_copy(array, name, params):
            raise UserError(
                f"{file}: {theirs} is not the {name} of this model; use the adapter with the model "
                "that it was trained on, or merge it there"
            )
    return kept


def _is_copy(array: HostArray, name: str, params: Mapping[str, Parameter]) -> bool:
    """Whether the array equals a parameter, in the coarser of their dtypes."""
    ours = params[name]
    if isinstance(ours, LazyArray):
        ours = ours.whole()
    kind: Quantization | None = next((k for k in _QUANTIZED if str(ours.dtype) == k), None)
    if kind is not None:
        made = quantized(name, jnp.asarray(array, jnp.float32), kind)
        return all(
            np.array_equal(np.asarray(part), np.asarray(params[n])) for n, part in made.items()
        )
    parameter = np.asarray(ours)
    coarser = min(parameter.dtype, array.dtype, key=lambda dtype: dtype.itemsize)
    return np.array_equal(parameter.astype(coarser), array.astype(coarser))
