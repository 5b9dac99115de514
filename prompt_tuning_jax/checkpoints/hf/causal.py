"""Reads and writes decoder-only models as Hugging Face folders, by ``hf.families``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.causal_parameters import EMBEDDING, causal_parameter_shapes
from prompt_tuning_jax.checkpoints.hf.config_files import (
    CONFIG,
    GENERATION_CONFIG,
    read_generation_config,
)
from prompt_tuning_jax.checkpoints.hf.config_reader import ConfigReader
from prompt_tuning_jax.checkpoints.hf.config_writer import ConfigWriter
from prompt_tuning_jax.checkpoints.hf.families import FAMILIES
from prompt_tuning_jax.checkpoints.hf.index import HfModel, with_dtype
from prompt_tuning_jax.checkpoints.hf.names import NameTable
from prompt_tuning_jax.checkpoints.hf.weights import open_weights
from prompt_tuning_jax.checkpoints.lazy_arrays import LazyArray, equal_bits
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig
from prompt_tuning_jax.models.config import ModelConfig

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def causal_config(raw: Mapping[str, Any], path: Path) -> CausalLMConfig:
    """Returns the configuration of ``raw``, which ``path`` holds beside its generation_config.json.

    In a model that reads images, too, this is the configuration of its language model.
    """
    family = FAMILIES[raw["model_type"]]
    if family.text_type:
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise UserError(f"{path} has no text_config, the description of its language model")
        ids = {key: raw[key] for key in TOKEN_IDS if key in raw}
        raw = {**text, **ids, "model_type": family.text_type}
    generation = read_generation_config(path)
    reader = ConfigReader(raw, generation=generation, path=path)
    family.describe(reader)
    return reader.config()


def open_causal(
    folder: Path, raw: Mapping[str, Any]
) -> tuple[CausalLMConfig, dict[str, LazyArray]]:
    """Returns a model as (configuration, parameters by our name in the stored dtype).

    An output head that is a copy of the embedding table is dropped if ``config.json`` ties the two;
    one that differs is kept, and the model is not tied.  See ``open_hf`` for the errors.
    """
    config = causal_config(raw, folder / CONFIG)
    table = FAMILIES[raw["model_type"]].names
    path, stored = open_weights(folder, is_unused=table.is_unused, flax=False)
    tensors = with_prefix(table, stored, path=path)
    if config.tie_embeddings and not drop_copied_head(table, tensors, of=EMBEDDING):
        config = dataclasses.replace(config, tie_embeddings=False)
    require_layers(table, tensors, {"decoder": config.num_layers}, path=path)
    shapes = causal_parameter_shapes(config)
    return config, read_params(table, tensors, shapes, head_dim=config.head_dim, path=path)


def read_params(
    table: NameTable,
    tensors: Mapping[str, LazyArray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    head_dim: int,
    path: Path,
) -> dict[str, LazyArray]:
    """Returns our parameters from their tensors; UserError for other names or shapes."""
    from prompt_tuning_jax.param_tree import require_same_names

    theirs = {name: table.tensor(name) for name in shapes}
    require_same_names(tensors, dict.fromkeys(theirs.values()), of=str(path), and_of=CONFIG)
    params = {
        name: table.read(name, tensors[source], shapes, head_dim) for name, source in theirs.items()
    }
    for name, array in params.items():
        if array.shape != shapes[name]:
            raise UserError(
                f"{path}: {theirs[name]} makes {name} {list(array.shape)}, "
                f"but by {CONFIG} it is {list(shapes[name])}"
            )
    return params


def causal_as_hf(config: CausalLMConfig, params: Mapping[str, LazyArray]) -> HfModel:
    """Returns a model as transformers has it.

    Raises UserError if config.json would describe another model.
    """
    described = described_config(config)
    generation = {key: described[key] for key in TOKEN_IDS} | {
        "eos_token_id": one_or_all(config.token_ids.all_eos)
    }
    reader = ConfigReader(described, generation=generation, path=Path(CONFIG))
    FAMILIES[config.model_type].describe(reader)
    require_same_config(reader.config(), config)
    return HfModel(
        arrays=FAMILIES[config.model_type].names.write(params, config.head_dim),
        describe=with_dtype(described),
        files={GENERATION_CONFIG: generation},
    )


def described_config(config: CausalLMConfig) -> dict[str, Any]:
    """Returns config.json for transformers 4 and 5, without the dtype of the weights."""
    if config.model_type not in FAMILIES or FAMILIES[config.model_type].text_type:
        known = ", ".join(name for name, family in FAMILIES.items() if not family.text_type)
        raise UserError(f"model_type is {config.model_type!r}; only these are written: {known}")
    family = FAMILIES[config.model_type]
    writer = ConfigWriter(config)
    family.describe(writer)
    return {"architectures": [family.architecture], **writer.raw}


def require_same_config(again: ModelConfig, config: ModelConfig, *, part: str = "") -> None:
    """Raises UserError unless what would be written reads back as the same configuration."""
    differing = [
        f"{part}{field.name} ({getattr(config, field.name)!r})"
        for field in dataclasses.fields(config)
        if getattr(again, field.name) != getattr(config, field.name)
    ]
    if differing:
        kind = getattr(config, "model_type", "")
        raise UserError(f"transformers' {kind} cannot have this model's {', '.join(differing)}")


def one_or_all(ids: tuple[int, ...]) -> int | list[int]:
    """Returns the ids as transformers writes them."""
    return ids[0] if len(ids) == 1 else list(ids)


def with_prefix(
    table: NameTable, stored: Mapping[str, LazyArray], *, path: Path
) -> dict[str, LazyArray]:
    """Returns the tensors by the names that the table has; UserError if two have the same."""
    tensors: dict[str, LazyArray] = {}
    for name, array in stored.items():
        whole = table.with_prefix(name)
        if whole in tensors:
            raise UserError(f"{path} has {whole} twice, as {name} and with another prefix")
        tensors[whole] = array
    return tensors


def drop_copied_head(table: NameTable, tensors: dict[str, LazyArray], *, of: str) -> bool:
    """Removes a head that is a copy of our parameter ``of``; returns whether there is no other."""
    head = tensors.get(f"{table.head}.weight")
    embedding = tensors.get(table.tensor(of))
    if head is None or embedding is None:
        return True
    if not equal_bits(head, embedding):
        return False
    del tensors[f"{table.head}.weight"]
    return True


def require_layers(
    table: NameTable, tensors: Mapping[str, LazyArray], numbers: Mapping[str, int], *, path: Path
) -> None:
    """Raises UserError for another number of layers than the file has, without listing them.

    ``numbers`` are those of each stack.
    """
    for stack, number in numbers.items():
        present = {layer for name in tensors if (layer := table.layer_of(name, stack)) is not None}
        missing = [i for i in range(number) if i not in present]
        if missing:
            some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            of = f"the {stack}'s " if len(numbers) > 1 else ""
            raise UserError(
                f"{path} has no tensors of {of}layers {some}, but {CONFIG} says {number} layers: "
                "the copy is incomplete, or the config is another model's"
            )
