"""Reads and writes decoder-only models as Hugging Face folders, by ``hf.families``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.causal_parameters import causal_parameter_shapes
from prompt_tuning_jax.checkpoints.hf.config_reader import ConfigReader
from prompt_tuning_jax.checkpoints.hf.config_writer import ConfigWriter
from prompt_tuning_jax.checkpoints.hf.families import FAMILIES
from prompt_tuning_jax.checkpoints.hf.index import write_folder
from prompt_tuning_jax.checkpoints.hf.names import NameTable
from prompt_tuning_jax.checkpoints.hf.weights import open_weights
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, equal_bits
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.untrusted_input import read_json_file

_CONFIG = "config.json"
_GENERATION_CONFIG = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LARGEST = 2**20  # bytes


def causal_config(raw: Mapping[str, Any], path: Path) -> CausalLMConfig:
    """The configuration of ``raw``, which ``path`` holds beside its generation_config.json.

    In a model that reads images, too, this is the configuration of its language model.
    """
    family = FAMILIES[raw["model_type"]]
    if family.text_type:
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise UserError(f"{path} has no text_config, the description of its language model")
        ids = {key: raw[key] for key in _TOKEN_IDS if key in raw}
        raw = {**text, **ids, "model_type": family.text_type}
    beside = path.with_name(_GENERATION_CONFIG)
    generation = read_json_file(beside, max_bytes=_LARGEST) if beside.is_file() else {}
    if not isinstance(generation, dict):
        raise UserError(f"{beside} is a {type(generation).__name__} and not a JSON object")
    reader = ConfigReader(raw, generation=generation, path=path)
    family.describe(reader)
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
    table = FAMILIES[raw["model_type"]].names
    path, stored = open_weights(folder, is_unused=table.is_unused, flax=False)
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


def write_causal(
    folder: Path,
    config: CausalLMConfig,
    params: Mapping[str, LazyArray],
    *,
    tokenizer: Mapping[str, Path | dict[str, Any]],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Writes a model, whose parameters are checked already; see ``write_hf``.

    Raises UserError, before anything is written, if ``config.json`` would describe another model.
    """
    described = described_config(config)
    generation = {key: described[key] for key in _TOKEN_IDS} | {
        "eos_token_id": _one_or_all(config.token_ids.all_eos)
    }
    reader = ConfigReader(described, generation=generation, path=folder / _CONFIG)
    FAMILIES[config.model_type].describe(reader)
    again = reader.config()
    if again != config:
        differing = [
            f"{field.name} ({getattr(config, field.name)!r})"
            for field in dataclasses.fields(config)
            if getattr(again, field.name) != getattr(config, field.name)
        ]
        raise UserError(
            f"transformers' {config.model_type} cannot have this model's {', '.join(differing)}"
        )
    write_folder(
        folder,
        FAMILIES[config.model_type].names.write(params, config.head_dim),
        describe=lambda stored: {**described, "torch_dtype": stored, "dtype": stored},
        tokenizer={_GENERATION_CONFIG: generation, **tokenizer},
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def described_config(config: CausalLMConfig) -> dict[str, Any]:
    """config.json for transformers 4 and 5, without the dtype of the weights."""
    if config.model_type not in FAMILIES or FAMILIES[config.model_type].text_type:
        known = ", ".join(name for name, family in FAMILIES.items() if not family.text_type)
        raise UserError(f"model_type is {config.model_type!r}; written are: {known}")
    family = FAMILIES[config.model_type]
    writer = ConfigWriter(config)
    family.describe(writer)
    return {"architectures": [family.architecture], **writer.raw}


def _one_or_all(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


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
