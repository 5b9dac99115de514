"""PEFT's LoRA and IA3 adapters: a folder with ``adapter_config.json`` and arrays by module.

The formats are those of peft 0.21, tuners/lora, tuners/ia3 and utils/save_and_load.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.checkpoints.peft.adapter_file import (
    CONFIG,
    WEIGHTS,
    in_float32,
    read_config,
    read_tensors,
    require_options,
    require_task,
    shown,
    what_is_read,
)
from prompt_tuning_jax.checkpoints.peft.ia3 import SCALE, read_ia3, written_ia3
from prompt_tuning_jax.checkpoints.peft.lora import (
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    A,
    B,
    adapted_names,
    lora_layers,
    read_lora,
    written_lora,
)
from prompt_tuning_jax.checkpoints.peft.modules import (
    PREFIX,
    TheirLinear,
    adapter_path,
    as_base_model,
    linear_layers,
    matching_layers,
    of_language_model,
    other_modules,
    paths_of,
    patterns_for,
    renamed_head,
    stores_kernels_as_here,
    task_type,
    their_tensors,
)
from prompt_tuning_jax.checkpoints.peft.saved import (
    Parameter,
    SavedWeights,
    read_saved,
    written_saved,
)
from prompt_tuning_jax.checkpoints.tuned_checkpoint import require_plausible
from prompt_tuning_jax.config.methods import IA3, LoRA
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.param_tree import require_same_names
from prompt_tuning_jax.storage import atomic_write_folder
from prompt_tuning_jax.typing import Array, HostArray
from prompt_tuning_jax.untrusted_input import json_text

TYPES = ("LORA", "IA3")
TABLE = "table_VD"  # our copy of the embedding table, for one of its uses
_MODEL = "model/"  # begins the paths of the model's parameters in a ``TunedModel``
_OF_EMBEDDINGS = (EMBEDDING_A, EMBEDDING_B, MAGNITUDE)
# Options of the config that are read, by type.
_OPTIONS = {
    "LORA": (
        *("alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout"),
        *("modules_to_save", "r", "rank_pattern", "use_dora", "use_rslora"),
    ),
    "IA3": ("init_ia3_weights",),
}
# Fields that may have any value: they do not change what the adapter computes, or the names and
# shapes of its arrays tell the same.
_IGNORED = (
    *("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"),
    *("layers_to_transform", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("eva_config", "runtime_config", "modules_to_save", "fan_in_fan_out"),
)


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
    """Returns the ``peft_type`` of an adapter's folder, for instance ``LORA``.

    Returns "" if there is none.
    """
    kind = read_config(Path(folder) / CONFIG).get("peft_type")
    return kind if isinstance(kind, str) else ""


def read_peft_weights(
    folder: str | Path, config: ModelConfig, params: Mapping[str, Parameter] | None = None
) -> PeftWeights:
    """Returns the adapter in a folder, for a model of this configuration.

    PEFT also saves some of the model's weights: an output head that has an adapter, and embeddings
    whose number of rows has changed.  They are ignored if they equal the model's parameters
    ``params``, by path.  Weights that were trained with LoRA (``modules_to_save``, ``bias``) are
    read.

    Raises UserError for another type of adapter, for options that compute something else, for other
    weights that are not the model's, for arrays that do not fit the model or the config, and for
    missing or damaged files.
    """
    folder = Path(folder)
    described = read_config(folder / CONFIG)
    where = folder / CONFIG
    kind = described.get("peft_type")
    if kind not in TYPES:
        raise UserError(f"{where}: peft_type is {shown(kind)}; supported: {' and '.join(TYPES)}")
    require_task(described, task_type(config), where)
    require_options(described, where, known=(*_IGNORED, *_OPTIONS[kind]))
    arrays, file = read_tensors(folder)
    arrays, config = of_language_model(arrays, config)
    arrays = {renamed_head(name, config): array for name, array in arrays.items()}
    modules = described.get("modules_to_save")
    if isinstance(modules, list):
        named = [renamed_head(m, config) if isinstance(m, str) else m for m in modules]
        described = {**described, "modules_to_save": named}
    arrays, saved = read_saved(arrays, described, config, params or {}, where=where, file=file)
    arrays = _used(arrays, config)
    require_plausible(arrays, config, of=str(file))
    layers = lora_layers(config) if kind == "LORA" else linear_layers(config)
    by_layer = _by_layer(arrays, layers, file)
    method: LoRA | IA3
    if kind == "LORA":
        method, trainable = read_lora(described, where, by_layer, layers, file)
        method, trainable = _with_saved(method, trainable, saved, config)
    else:
        if saved:
            raise UserError(
                f"{where}: modules_to_save is {shown(described.get('modules_to_save'))}, and with "
                f"IA3 only modules that were not trained are read; {what_is_read()}"
            )
        method, trainable = read_ia3(by_layer, layers, file)
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
    base_model_type: str = "",
) -> None:
    """Writes the trained arrays of one member as a folder that PEFT's ``from_pretrained`` loads.

    ``trainable`` are by path in a ``TunedModel``.  ``base_model_type`` is the ``model_type`` of the
    base model if that is not the configuration's: of a model that reads images, too.  The folder is
    written atomically; in an existing one, other files stay.  Raises UserError for arrays that are
    not this method's, and for inputs of a fused projection that are scaled differently.
    """
    config = as_base_model(config, base_model_type)
    described: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name_or_path,
        "exclude_modules": other_modules(config),
        "fan_in_fan_out": stores_kernels_as_here(config),
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "task_type": task_type(config),
    }
    arrays = {name: np.asarray(array, np.float32) for name, array in trainable.items()}
    if isinstance(method, LoRA):
        fields, theirs = _written_lora(method, arrays, config)
    else:
        fields, theirs = written_ia3(method, arrays, linear_layers(config))
    from safetensors.numpy import save

    with atomic_write_folder(Path(folder)) as temporary:
        text = json_text(described | fields, indent=2, sort_keys=True) + "\n"
        (temporary / CONFIG).write_text(text, encoding="utf-8")
        contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(theirs.items())}
        (temporary / WEIGHTS).write_bytes(save(contiguous, {"format": "pt"}))


def _written_lora(
    method: LoRA, arrays: Mapping[str, HostArray], config: ModelConfig
) -> tuple[dict[str, Any], dict[str, HostArray]]:
    layers, shapes = lora_layers(config), parameter_shapes(config)
    parameters = matching_layers(method.parameters, shapes)
    tables = matching_layers(method.copies, paths_of(layers, embeddings=True))
    names = {path: f"{_MODEL}{path}" for path in parameters}
    names |= {use: adapter_path(use, TABLE) for use in tables}
    require_same_names(
        {name: None for name in names.values() if name in arrays},
        dict.fromkeys(names.values()),
        of="the tuned arrays",
        and_of="method.parameters and method.copies",
    )
    saved = SavedWeights(
        parameters={path: arrays[names[path]] for path in parameters},
        tables={use: arrays[names[use]] for use in tables},
    )
    own = {name: array for name, array in arrays.items() if name not in names.values()}
    fields, theirs = written_lora(method, own, layers)
    others, weights = written_saved(saved, config, adapted_names(method, layers))
    return fields | others, theirs | weights


def _with_saved(
    method: LoRA,
    trainable: Mapping[str, HostArray],
    saved: SavedWeights,
    config: ModelConfig,
) -> tuple[LoRA, dict[str, HostArray]]:
    """Returns the method and its arrays with trained weights of the model."""
    uses = paths_of(lora_layers(config), embeddings=True)
    method = replace(
        method,
        parameters=patterns_for(saved.parameters, parameter_shapes(config), usual=(".*/bias",)),
        copies=patterns_for(saved.tables, uses, usual=()),
    )
    parameters = {f"{_MODEL}{path}": array for path, array in saved.parameters.items()}
    tables = {adapter_path(use, TABLE): array for use, array in saved.tables.items()}
    return method, {**trainable, **parameters, **tables}


def _used(arrays: Mapping[str, HostArray], config: ModelConfig) -> dict[str, HostArray]:
    """Returns the arrays without a T5's ``shared``, which transformers and PEFT do not use."""
    unused = {_module(name) for name, tensor in their_tensors(config).items() if tensor.unused}
    begins = tuple(f"{PREFIX}{module}.{end}" for module in unused for end in _OF_EMBEDDINGS)
    return {name: array for name, array in arrays.items() if not name.startswith(begins)}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _by_layer(
    arrays: Mapping[str, HostArray], layers: Mapping[str, TheirLinear], file: Path
) -> dict[str, dict[str, HostArray]]:
    """Returns the arrays in float32 by linear layer, then by the end of their name."""
    ends = (A, B, MAGNITUDE, *_OF_EMBEDDINGS, SCALE)
    known = {layer.array(end): (name, end) for name, layer in layers.items() for end in ends}
    by_layer: dict[str, dict[str, HostArray]] = {}
    for theirs, array in arrays.items():
        if theirs not in known:
            raise UserError(
                f"{file} contains {theirs}, which belongs to no linear layer of this model"
            )
        name, end = known[theirs]
        by_layer.setdefault(name, {})[end] = in_float32(array, of=f"{file}: {theirs}")
    if not by_layer:
        raise UserError(f"{file} contains no array")
    return by_layer
