"""PEFT's LoRA and IA3 adapters: a folder with ``adapter_config.json`` and arrays by module.

The formats are those of peft 0.21, tuners/lora, tuners/ia3 and utils/save_and_load.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.peft.adapter_file import (
    CONFIG,
    WEIGHTS,
    read_config,
    read_tensors,
    require_task,
    shown,
)
from prompt_tuning_jax.checkpoints.peft.copies import Parameter, without_copies
from prompt_tuning_jax.checkpoints.peft.ia3 import SCALE, read_ia3, written_ia3
from prompt_tuning_jax.checkpoints.peft.lora import A, B, read_lora, written_lora
from prompt_tuning_jax.checkpoints.peft.modules import (
    TheirLinear,
    linear_layers,
    stores_kernels_as_here,
    task_type,
)
from prompt_tuning_jax.checkpoints.tuned_checkpoint import require_plausible
from prompt_tuning_jax.config.methods import IA3, LoRA
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.storage import atomic_write_folder
from prompt_tuning_jax.typing import Array, HostArray
from prompt_tuning_jax.untrusted_input import json_text

TYPES = ("LORA", "IA3")
# Fields that may have any value: they are read here, or do not change what the adapter computes.
_IGNORED = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type", "target_modules", "exclude_modules", "feedforward_modules"),
    *("layers_pattern", "layers_to_transform", "init_ia3_weights", "init_lora_weights"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "eva_config", "runtime_config", "modules_to_save", "fan_in_fan_out"),
}
# Fields with a number for each of some layers.
_PATTERNS = ("rank_pattern", "alpha_pattern")


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
    folder: str | Path, config: ModelConfig, params: Mapping[str, Parameter] | None = None
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
    require_task(described, task_type(config), where)
    layers = linear_layers(config)
    _require_plain(described, layers, where)
    arrays, file = read_tensors(folder)
    arrays = without_copies(arrays, config, params or {}, file=file)
    require_plausible(arrays, config, of=str(file))
    found = _by_layer(arrays, layers, file)
    method: LoRA | IA3
    if kind == "LORA":
        method, trainable = read_lora(described, where, found, layers, file)
    else:
        method, trainable = read_ia3(found, layers, file)
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
    config: ModelConfig,
    base_model_name_or_path: str,
) -> None:
    """Write the trained arrays of one member as a folder that PEFT's ``from_pretrained`` loads.

    ``trainable`` are by path in a ``TunedModel``.  The folder is written atomically; in an existing
    one, other files stay.  Raises UserError for arrays that are not this method's, and for inputs
    of a fused projection that are scaled differently.
    """
    layers = linear_layers(config)
    described: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "exclude_modules": None,
        "fan_in_fan_out": stores_kernels_as_here(config),
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "task_type": task_type(config),
    }
    arrays = {name: np.asarray(array, np.float32) for name, array in trainable.items()}
    if isinstance(method, LoRA):
        fields, theirs = written_lora(method, arrays, layers)
    else:
        fields, theirs = written_ia3(method, arrays, layers)
    from safetensors.numpy import save

    with atomic_write_folder(Path(folder)) as temporary:
        text = json_text(described | fields, indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG).write_text(text)
        contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(theirs.items())}
        (temporary / WEIGHTS).write_bytes(save(contiguous, {"format": "pt"}))


def _require_plain(
    described: Mapping[str, Any], layers: Mapping[str, TheirLinear], where: Path
) -> None:
    """Raises UserError for a field that changes what the adapter computes."""
    for field, value in described.items():
        if field in _PATTERNS and isinstance(value, dict) and _of_fused(field, value, layers):
            continue
        if field not in _IGNORED and value and value != "none":
            raise UserError(
                f"{where}: {field} is {shown(value)}, which is not supported; only plain "
                f"{' and '.join(TYPES)} are"
            )


def _of_fused(field: str, pattern: Mapping[str, Any], layers: Mapping[str, TheirLinear]) -> bool:
    """Whether a pattern has numbers for whole names of fused projections, as written here."""
    kinds = (int,) if field == "rank_pattern" else (int, float)
    return all(
        name in layers and len(layers[name].parts) > 1 and type(value) in kinds and value > 0
        for name, value in pattern.items()
    )


def _by_layer(
    arrays: Mapping[str, HostArray], layers: Mapping[str, TheirLinear], file: Path
) -> dict[str, dict[str, HostArray]]:
    """The arrays in float32 by the name of their linear layer, then by the end of their name."""
    ends = (A, B, SCALE)
    known = {layer.array(end): (name, end) for name, layer in layers.items() for end in ends}
    found: dict[str, dict[str, HostArray]] = {}
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
        found.setdefault(name, {})[end] = array
    if not found:
        raise UserError(f"{file} contains no array")
    return found
