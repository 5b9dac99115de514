"""PEFT's LoRA and IA3 adapters: a folder with ``adapter_config.json`` and arrays by module.

The formats are those of peft 0.21, tuners/lora, tuners/ia3 and utils/save_and_load.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints.hf.pretrained import TRANSPOSED
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray
from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.checkpoints.peft.adapter_file import (
    CONFIG,
    WEIGHTS,
    read_config,
    read_tensors,
    shown,
)
from prompt_tuning_jax.checkpoints.peft.modules import (
    adapter_path,
    linear_shapes,
    matching_layers,
    model_names,
    module_names,
    patterns_for,
    peft_name,
)
from prompt_tuning_jax.checkpoints.tuned_checkpoint import require_plausible
from prompt_tuning_jax.config.methods import IA3, LoRA
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.quantization import Quantization, quantized
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.storage import atomic_write_folder
from prompt_tuning_jax.typing import Array, HostArray
from prompt_tuning_jax.untrusted_input import json_text

TYPES = ("LORA", "IA3")
_TASK_TYPE = "SEQ_2_SEQ_LM"
# A parameter of the model, in memory or not.
Parameter: TypeAlias = Array | HostArray | LazyArray
_QUANTIZED: tuple[Quantization, ...] = ("int8", "int4")
_A, _B, _SCALE = "lora_A.weight", "lora_B.weight", "ia3_l"
# Fields that may have any value: they are read here, or do not change what the adapter computes.
_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type", "target_modules", "exclude_modules", "feedforward_modules"),
    *("layers_pattern", "layers_to_transform", "init_ia3_weights", "init_lora_weights"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "eva_config", "runtime_config", "modules_to_save"),
}
# Values of init_lora_weights that leave the model's weights unchanged.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class PeftWeights:
    """A PEFT adapter as a method, its trained arrays by path, and its origin by its config.

    Paths are those of a ``TunedModel``: ``model/encoder/layers_0/attention/query/adapter/...``.
    """

    method: LoRA | IA3
    trainable: dict[str, HostArray]
    base_model_name_or_path: str
    peft_version: str


def peft_kind(folder: str | Path) -> str:
    """The ``peft_type`` of an adapter's folder, for instance ``LORA``; "" if there is none."""
    kind = read_config(Path(folder) / CONFIG).get("peft_type")
    return kind if isinstance(kind, str) else ""


def read_peft_weights(
    folder: str | Path, config: T5Config, params: Mapping[str, Parameter] | None = None
) -> PeftWeights:
    """The adapter in a folder, for a model of this configuration.

    PEFT also saves some of the model's weights: an output head that has an adapter, and embeddings
    whose number of rows has changed.  They are ignored if they equal the model's parameters
    ``params``, by path.

    Raises UserError for another type of adapter, for variants that compute something else (DoRA,
    ranks per module, trained biases), for weights that are not the model's, for arrays that do not
    fit the model or the config, and for missing or damaged files.
    """
    folder = Path(folder)
    described = read_config(folder / CONFIG)
    where = folder / CONFIG
    kind = described.get("peft_type")
    if kind not in TYPES:
        raise UserError(f"{where}: peft_type is {shown(kind)}; supported: {' and '.join(TYPES)}")
    if described.get("task_type") not in (None, _TASK_TYPE):
        task = shown(described.get("task_type"))
        raise UserError(f"{where}: task_type is {task}; for a T5 it is {_TASK_TYPE}")
    _require_plain(described, where)
    arrays, file = read_tensors(folder)
    arrays = _without_params(arrays, config, params or {}, file=file)
    require_plausible(arrays, config, of=str(file))
    shapes = linear_shapes(config)
    read = _lora if kind == "LORA" else _ia3
    method, trainable = read(described, where, _by_map(arrays, shapes, file), shapes, file)
    return PeftWeights(
        method=method,
        trainable=trainable,
        base_model_name_or_path=str(described.get("base_model_name_or_path") or ""),
        peft_version=str(described.get("peft_version") or ""),
    )


def write_peft_weights(
    folder: str | Path,
    method: LoRA | IA3,
    trainable: Mapping[str, Array | HostArray],
    *,
    config: T5Config,
    base_model_name_or_path: str,
) -> None:
    """Write the trained arrays of one member as a folder that PEFT's ``from_pretrained`` loads.

    ``trainable`` are by path in a ``TunedModel``.  The folder is written atomically; in an existing
    one, other files stay.  Raises UserError for arrays that are not this method's.
    """
    shapes = linear_shapes(config)
    described: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "task_type": _TASK_TYPE,
    }
    wanted: dict[str, tuple[str, bool]]  # our path -> (PEFT's name, whether it is transposed)
    if isinstance(method, LoRA):
        targets = matching_layers(method.targets, shapes)
        wanted = {
            adapter_path(name, part): (peft_name(name, theirs), True)
            for name in targets
            for part, theirs in (("lora_a_DR", _A), ("lora_b_RF", _B))
        }
        described |= {
            "bias": "none",
            "init_lora_weights": True,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "peft_type": "LORA",
            "r": method.rank,
            "target_modules": module_names(targets, shapes),
            "use_dora": False,
            "use_rslora": method.rank_stabilized,
        }
    else:
        behind, before = (
            matching_layers(method.outputs, shapes),
            matching_layers(method.inputs, shapes),
        )
        parts = [(name, "scale_F") for name in behind] + [(name, "scale_D") for name in before]
        wanted = {
            adapter_path(name, part): (peft_name(name, _SCALE), False) for name, part in parts
        }
        feedforward = module_names(before, shapes)
        described |= {
            "feedforward_modules": feedforward,
            "init_ia3_weights": True,
            "peft_type": "IA3",
            "target_modules": [*module_names(behind, shapes), *feedforward],
        }
    require_same_names(trainable, wanted, of="the tuned arrays", and_of=type(method).__name__)
    arrays = {}
    for path, (theirs, transposed) in wanted.items():
        array = np.asarray(trainable[path], np.float32)
        if not transposed:  # [out, 1], or [1, in]
            array = array[None] if path.endswith("scale_D") else array[:, None]
        arrays[theirs] = np.ascontiguousarray(array.T if transposed else array)
    from safetensors.numpy import save

    with atomic_write_folder(Path(folder)) as temporary:
        (temporary / CONFIG).write_text(json_text(described, indent=2, sort_keys=True) + "\n")
        (temporary / WEIGHTS).write_bytes(save(dict(sorted(arrays.items())), {"format": "pt"}))


def _lora(
    described: Mapping[str, Any],
    where: Path,
    arrays: Mapping[str, Mapping[str, HostArray]],
    shapes: Mapping[str, tuple[int, int]],
    file: Path,
) -> tuple[LoRA, dict[str, HostArray]]:
    rank, init = described.get("r"), described.get("init_lora_weights")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where}: r is {shown(rank)}; it must be a positive integer")
    if init not in _INITS:
        raise UserError(
            f"{where}: init_lora_weights is {shown(init)}, which changes the model's weights; "
            "convert the adapter to plain LoRA with PEFT first"
        )
    trainable = {}
    for name, parts in arrays.items():
        inputs, outputs = shapes[name]
        _require_parts(name, parts, {_A: (rank, inputs), _B: (outputs, rank)}, file)
        trainable[adapter_path(name, "lora_a_DR")] = np.ascontiguousarray(parts[_A].T)
        trainable[adapter_path(name, "lora_b_RF")] = np.ascontiguousarray(parts[_B].T)
    method = LoRA(
        rank=rank,
        alpha=_number(described, "lora_alpha", 8.0, where),
        rank_stabilized=bool(described.get("use_rslora")),
        dropout=_number(described, "lora_dropout", 0.0, where),
        targets=patterns_for(arrays, shapes, usual=LoRA().targets),
    )
    for complaint in method.config_errors():
        raise UserError(f"{where}: {complaint}")
    return method, trainable


def _ia3(
    described: Mapping[str, Any],
    where: Path,
    arrays: Mapping[str, Mapping[str, HostArray]],
    shapes: Mapping[str, tuple[int, int]],
    file: Path,
) -> tuple[IA3, dict[str, HostArray]]:
    trainable: dict[str, HostArray] = {}
    behind: list[str] = []
    before: list[str] = []
    for name, parts in arrays.items():
        inputs, outputs = shapes[name]
        # PEFT scales the input of feed-forward modules, with a row vector.
        is_row = _SCALE in parts and parts[_SCALE].shape == (1, inputs)
        _require_parts(name, parts, {_SCALE: (1, inputs) if is_row else (outputs, 1)}, file)
        (before if is_row else behind).append(name)
        trainable[adapter_path(name, "scale_D" if is_row else "scale_F")] = parts[_SCALE].reshape(
            -1
        )
    usual = IA3()
    method = IA3(
        outputs=patterns_for(behind, shapes, usual=usual.outputs),
        inputs=patterns_for(before, shapes, usual=usual.inputs),
    )
    return method, trainable


def _require_plain(described: Mapping[str, Any], where: Path) -> None:
    """Raises UserError for a field that changes what the adapter computes."""
    for field, value in described.items():
        if field not in _IGNORED and value and value != "none":
            raise UserError(
                f"{where}: {field} is {shown(value)}, which is not supported; only plain "
                f"{' and '.join(TYPES)} are"
            )


def _by_map(
    arrays: Mapping[str, HostArray], shapes: Mapping[str, tuple[int, int]], file: Path
) -> dict[str, dict[str, HostArray]]:
    """The arrays in float32 by the path of their linear layer, then by the end of their name."""
    ends = (_A, _B, _SCALE)
    known = {peft_name(name, end): (name, end) for name in shapes for end in ends}
    layers: dict[str, dict[str, HostArray]] = {}
    for theirs, array in arrays.items():
        if theirs not in known:
            raise UserError(
                f"{file} contains {theirs}, which belongs to no linear layer of this model"
            )
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise UserError(f"{file}: {theirs} has dtype {array.dtype}, not floating-point numbers")
        array = np.asarray(array, np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{file}: {theirs} has numbers that are not finite")
        name, end = known[theirs]
        layers.setdefault(name, {})[end] = array
    if not layers:
        raise UserError(f"{file} contains no array")
    return layers


def _without_params(
    arrays: Mapping[str, HostArray],
    config: T5Config,
    params: Mapping[str, Parameter],
    *,
    file: Path,
) -> dict[str, HostArray]:
    """The arrays without copies of the model's parameters; UserError for one that differs."""
    names = model_names(config)
    kept = {}
    for theirs, array in arrays.items():
        if (name := names.get(theirs)) is None:
            kept[theirs] = array
            continue
        wanted = parameter_shapes(config)[name]
        array = array.T if name.endswith(TRANSPOSED) else array
        if array.shape != wanted:
            raise UserError(
                f"{file}: {theirs} is {list(array.shape)}, but this model has {list(wanted)}; "
                "adapters of a model with another number of embeddings are not supported: merge it "
                "into its model with PEFT (merge_and_unload) and use that"
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


def _require_parts(
    name: str,
    parts: Mapping[str, HostArray],
    shapes: Mapping[str, tuple[int, int]],
    file: Path,
) -> None:
    for end in sorted(parts.keys() | shapes.keys()):
        if end not in shapes:
            raise UserError(
                f"{file} contains {peft_name(name, end)}, which belongs to another type of adapter"
            )
        if end not in parts:
            raise UserError(f"{file} has no {peft_name(name, end)}: the copy is incomplete")
        if parts[end].shape != shapes[end]:
            raise UserError(
                f"{file}: {peft_name(name, end)} is {list(parts[end].shape)}, but this model "
                f"and config require {list(shapes[end])}"
            )


def _number(described: Mapping[str, Any], field: str, default: float, where: Path) -> float:
    value = described.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise UserError(f"{where}: {field} is {shown(value)}; it must be a number")
    return float(value)
