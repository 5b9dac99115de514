"""Weights of the model in an adapter: copies of its own, and those that were trained.

PEFT saves the latter for ``modules_to_save`` and for ``bias``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray
from prompt_tuning_jax.checkpoints.parameters import EMBEDDING, parameter_shapes
from prompt_tuning_jax.checkpoints.peft.adapter_file import in_float32, shown
from prompt_tuning_jax.checkpoints.peft.modules import PREFIX, TheirTensor, their_tensors
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.models.quantization import Quantization, quantized
from prompt_tuning_jax.typing import Array, HostArray

# A parameter of the model, in memory or not.
Parameter: TypeAlias = Array | HostArray | LazyArray
BIASES = ("none", "all", "lora_only")
_BIAS, _BASE = ".bias", ".base_layer."
_DOUBLES = (".modules_to_save.", ".original_module.")
_QUANTIZED: tuple[Quantization, ...] = ("int8", "int4")


@dataclass(frozen=True, kw_only=True)
class SavedWeights:
    """Trained weights of the model: parameters by path, and tables by their use."""

    parameters: Mapping[str, HostArray] = field(default_factory=dict)
    tables: Mapping[str, HostArray] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.parameters or self.tables)


def read_saved(
    arrays: Mapping[str, HostArray],
    described: Mapping[str, Any],
    config: ModelConfig,
    params: Mapping[str, Parameter],
    *,
    where: Path,
    file: Path,
) -> tuple[dict[str, HostArray], SavedWeights]:
    """Returns the arrays that are not the model's, and the trained weights among the others.

    Weights that the config does not declare as trained must equal the model's parameters
    ``params``.  Declared ones that all do count as not trained.  Raises UserError for a weight that
    does not fit, and for a declared one that is missing.
    """
    tensors, modules = their_tensors(config), _modules_to_save(described, where)
    tied = _tied_to_saved(tensors, modules) if described.get("ensure_weight_tying") else ()
    bias = described.get("bias") or "none"
    if bias not in BIASES:
        raise UserError(f"{where}: bias is {shown(bias)}; it is one of {', '.join(BIASES)}")
    rest: dict[str, HostArray] = {}
    declared: dict[str, HostArray] = {}
    changed = False
    for theirs, array in arrays.items():
        if _is_double(theirs, arrays):
            continue
        name = theirs.removeprefix(PREFIX).replace(_BASE, ".")
        if not theirs.startswith(PREFIX) or name not in tensors:
            rest[theirs] = array
            continue
        tensor = tensors[name]
        _require_shape(array, tensor, config, theirs, file)
        is_copy = all(_is_copy(part, path, params) for path, part in tensor.ours(array).items())
        is_bias = bias != "none" and name.endswith(_BIAS) and (bias == "all" or _BASE in theirs)
        if is_bias or name in tied or any(m.endswith(modules) for m in _modules_of(name)):
            declared[name] = array
            changed |= not (is_copy or tensor.unused)
        elif not is_copy:
            (path, *_) = tensor.parts
            raise UserError(
                f"{file}: {theirs} is not the {path} of this model; use the adapter with the model "
                "that it was trained on, or merge it there"
            )
    _require_all(declared, modules, tensors if bias == "all" else (), where=where, file=file)
    if not changed:
        return rest, SavedWeights()
    parameters: dict[str, HostArray] = {}
    tables: dict[str, HostArray] = {}
    for name, array in declared.items():
        tensor = tensors[name]
        weights = in_float32(array, of=f"{file}: {PREFIX}{name}")
        if tensor.use:
            tables[tensor.use] = weights
        elif not tensor.unused:
            parameters |= {p: np.ascontiguousarray(a) for p, a in tensor.ours(weights).items()}
    return rest, SavedWeights(parameters=parameters, tables=tables)


def written_saved(
    saved: SavedWeights, config: ModelConfig, adapted: Iterable[str]
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    """Returns the fields of an adapter's config about trained weights, and its arrays of them.

    ``adapted`` are transformers' names of the layers with an adapter.  Raises UserError for weights
    that PEFT saves only together with others.
    """
    tensors, adapted = their_tensors(config), set(adapted)
    if EMBEDDING in saved.parameters:
        raise UserError(
            f"PEFT has no counterpart of {EMBEDDING} in method.parameters: transformers' models "
            "have an embedding for each use; train method.copies of it instead"
        )
    chosen = {
        name: _joined(name, tensor, saved.parameters)
        for name, tensor in tensors.items()
        if tensor.parts.keys() & saved.parameters.keys() and not tensor.use
    }
    chosen |= {
        name: saved.tables[tensor.use]
        for name, tensor in tensors.items()
        if tensor.use in saved.tables
    }
    whole = [
        module
        for module in dict.fromkeys(map(_module, chosen))
        if module not in adapted
        and all(name in chosen for name in tensors if _module(name) == module)
        and any(not name.endswith(_BIAS) for name in chosen if _module(name) == module)
    ]
    biases = {name for name in chosen if _module(name) not in whole}
    by_option = {
        option: {name for name in tensors if name.endswith(_BIAS) and _module(name) in of}
        for option, of in (("lora_only", adapted), ("all", {*map(_module, tensors)} - {*whole}))
    }
    bias = next((option for option, names in by_option.items() if names == biases), "none")
    if biases and bias == "none":
        raise UserError(
            f"PEFT saves all biases, those of the layers with an adapter, or whole modules without "
            f"one, and method.parameters has {PREFIX}{min(biases)} apart from others"
        )
    theirs = {}
    for name, array in chosen.items():
        module, _, leaf = name.rpartition(".")
        inside = _BASE if module in adapted else "."
        theirs[f"{PREFIX}{module}{inside}{leaf}"] = array
    fields = {"bias": bias if biases else "none", "modules_to_save": sorted(whole) or None}
    return fields, theirs


def _is_double(theirs: str, arrays: Mapping[str, HostArray]) -> bool:
    """Returns whether PEFT saved this bias of a module in ``modules_to_save`` a second time."""
    return any(inside in theirs and theirs.replace(inside, ".") in arrays for inside in _DOUBLES)


def _joined(name: str, tensor: TheirTensor, parameters: Mapping[str, HostArray]) -> HostArray:
    missing = [path for path in tensor.parts if path not in parameters]
    if missing:
        raise UserError(
            f"transformers' {name} is {', '.join(tensor.parts)} in one, and PEFT saves all of it: "
            f"method.parameters lacks {missing[0]}"
        )
    return tensor.theirs(parameters)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _modules_of(name: str) -> list[str]:
    """Returns the modules around a tensor, from its own outward."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _modules_to_save(described: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    modules = described.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) and name for name in modules):
        raise UserError(
            f"{where}: modules_to_save is {shown(modules)}; it must be a list of names of modules"
        )
    return tuple(modules)


def _tied_to_saved(tensors: Mapping[str, TheirTensor], modules: tuple[str, ...]) -> set[str]:
    """Returns the uses of the embedding table.

    PEFT trains all of them if it is told to keep them tied.
    """
    uses = {name for name, tensor in tensors.items() if tensor.use}
    return uses if any(m.endswith(modules) for name in uses for m in _modules_of(name)) else set()


def _require_all(
    declared: Mapping[str, HostArray],
    modules: tuple[str, ...],
    with_biases: Iterable[str],
    *,
    where: Path,
    file: Path,
) -> None:
    around = {module for name in declared for module in _modules_of(name)}
    for module in modules:
        if not any(name.endswith(module) for name in around):
            raise UserError(
                f"{where}: modules_to_save has {shown(module)}, but {file.name} has no weights of "
                "such a module of this model"
            )
    for name in with_biases:
        if name.endswith(_BIAS) and name not in declared:
            raise UserError(f"{file} has no {PREFIX}{name}: the copy is incomplete")


def _require_shape(
    array: HostArray, tensor: TheirTensor, config: ModelConfig, theirs: str, file: Path
) -> None:
    shapes = parameter_shapes(config)
    parts = [shapes[path] for path in tensor.parts]
    wanted = (*parts[0][:-1], sum(part[-1] for part in parts))
    wanted = wanted[::-1] if tensor.transposed else wanted
    if array.shape != wanted:
        raise UserError(
            f"{file}: {theirs} is {list(array.shape)}, but this model has {list(wanted)}; adapters "
            "of a model with another number of embeddings are not supported: merge it into its "
            "model with PEFT (merge_and_unload) and use that"
        )


def _is_copy(array: HostArray, name: str, params: Mapping[str, Parameter]) -> bool:
    """Returns whether the array equals a parameter, in the coarser of their dtypes."""
    if name not in params:
        return False
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
