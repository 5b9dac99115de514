"""Reads decoder-only models from Hugging Face folders, by the tables in ``hf.families``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.causal_parameters import causal_parameter_shapes
from prompt_tuning_jax.checkpoints.hf.config_fields import ConfigReader
from prompt_tuning_jax.checkpoints.hf.families import FAMILIES
from prompt_tuning_jax.checkpoints.hf.names import NameTable
from prompt_tuning_jax.checkpoints.hf.weights import open_weights
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, equal_bits
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.untrusted_input import read_json_file

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_LARGEST = 2**20  # bytes


def causal_config(raw: Mapping[str, Any], path: Path) -> CausalLMConfig:
    """The configuration of ``raw``, which ``path`` holds beside its generation_config.json."""
    beside = path.with_name(_GENERATION_CONFIG)
    generation = read_json_file(beside, max_bytes=_LARGEST) if beside.is_file() else {}
    if not isinstance(generation, dict):
        raise UserError(f"{beside} is a {type(generation).__name__} and not a JSON object")
    reader = ConfigReader(raw, generation=generation, path=path)
    FAMILIES[raw["model_type"]].describe(reader)
    return reader.config()


def open_causal(
    folder: Path, raw: Mapping[str, Any]
) -> tuple[CausalLMConfig, dict[str, LazyArray]]:
    """A model as (configuration, parameters by our name in the stored dtype).

    An output head that is a copy of the embedding table is dropped if ``config.json`` ties the two;
    one that differs is kept, and the model is not tied.  See ``open_hf`` for the errors.
    """
    from prompt_tuning_jax.param_tree import require_same_names

    config = causal_config(raw, folder / _CONFIG)
    table = FAMILIES[config.model_type].names
    path, stored = open_weights(folder, is_unused=table.is_unused)
    if path.name.startswith("flax_model"):
        raise UserError(
            f"{path}: only the safetensors and torch files of a {config.model_type} are read"
        )
    tensors = _with_prefix(table, stored, path=path)
    config = _without_copied_head(config, table, tensors)
    _require_layers(config, table, tensors, path=path)
    shapes = causal_parameter_shapes(config)
    theirs = {name: table.tensor(name) for name in shapes}
    require_same_names(tensors, dict.fromkeys(theirs.values()), of=str(path), and_of=_CONFIG)
    params = {
        name: table.read(name, tensors[source], shapes, config.head_dim)
        for name, source in theirs.items()
    }
    for name, array in params.items():
        if array.shape != shapes[name]:
            raise UserError(
                f"{path}: {theirs[name]} makes {name} {list(array.shape)}, "
                f"but by {_CONFIG} it is {list(shapes[name])}"
            )
    return config, params


def _with_prefix(
    table: NameTable, stored: Mapping[str, LazyArray], *, path: Path
) -> dict[str, LazyArray]:
    tensors: dict[str, LazyArray] = {}
    for name, array in stored.items():
        whole = table.with_prefix(name)
        if whole in tensors:
            raise UserError(f"{path} has {whole} twice, as {name} and with another prefix")
        tensors[whole] = array
    return tensors


def _without_copied_head(
    config: CausalLMConfig, table: NameTable, tensors: dict[str, LazyArray]
) -> CausalLMConfig:
    head = tensors.get(f"{table.head}.weight")
    embedding = tensors.get(table.tensor("token_embedder/embedding"))
    if not config.tie_embeddings or head is None or embedding is None:
        return config
    if equal_bits(head, embedding):
        del tensors[f"{table.head}.weight"]
        return config
    return dataclasses.replace(config, tie_embeddings=False)


def _require_layers(
    config: CausalLMConfig, table: NameTable, tensors: Mapping[str, LazyArray], *, path: Path
) -> None:
    """Raises UserError for another number of layers than the file has, without listing them."""
    held = {number for name in tensors if (number := table.layer_of(name)) is not None}
    missing = [i for i in range(config.num_layers) if i not in held]
    if missing:
        some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{path} has no tensors of layers {some}, but {_CONFIG} says {config.num_layers} "
            "layers: the copy is incomplete, or the config is another model's"
        )
