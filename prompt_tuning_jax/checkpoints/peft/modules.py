"""PEFT's names for a T5's linear layers and their arrays."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from prompt_tuning_jax.checkpoints.hf.pretrained import COPIES_OF_SHARED, hf_name
from prompt_tuning_jax.checkpoints.parameters import EMBEDDING, LOGITS, parameter_shapes
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.param_tree import matching

_PREFIX = "base_model.model."  # begins the name of every array
KERNEL = "/kernel"


def linear_shapes(config: T5Config) -> dict[str, tuple[int, int]]:
    """Input and output size of every linear layer, by path."""
    return {
        name.removesuffix(KERNEL): (shape[0], shape[1])
        for name, shape in parameter_shapes(config).items()
        if name.endswith(KERNEL)
    }


def peft_name(name: str, end: str) -> str:
    """The name of the array with this last part, of the linear layer of this path."""
    return f"{_PREFIX}{hf_name(name + KERNEL).removesuffix('weight')}{end}"


def model_names(config: T5Config) -> dict[str, str]:
    """Paths of the model's parameters by the names under which PEFT saves them."""
    theirs = {hf_name(name): name for name in parameter_shapes(config)}
    theirs |= dict.fromkeys(COPIES_OF_SHARED, EMBEDDING)
    if config.tie_embeddings:
        theirs[hf_name(LOGITS)] = EMBEDDING
    paths: dict[str, str] = {}
    for name, path in theirs.items():
        stem = name.removesuffix("weight")
        paths |= {f"{_PREFIX}{name}": path, f"{_PREFIX}{stem}base_layer.weight": path}
    return paths


def adapter_path(name: str, part: str) -> str:
    """The path of an adapter's array in a ``TunedModel``."""
    return f"model/{name}/adapter/{part}"


def matching_layers(patterns: Collection[str], shapes: Mapping[str, Any]) -> list[str]:
    """The linear layers whose whole path matches one of the patterns."""
    masks = [matching(shapes, pattern) for pattern in patterns]
    return [name for name in shapes if any(mask[name] for mask in masks)]


def patterns_for(
    names: Collection[str], shapes: Mapping[str, Any], *, usual: tuple[str, ...]
) -> tuple[str, ...]:
    """Regular expressions that match exactly these layers, preferably short ones."""
    if not names:
        return ()
    kinds = sorted({name.rpartition("/")[2] for name in names})
    for short in (usual, (f".*/({'|'.join(kinds)})",)):
        if set(matching_layers(short, shapes)) == set(names):
            return short
    return tuple(re.escape(name) for name in sorted(names))


def module_names(names: Collection[str], shapes: Mapping[str, Any]) -> list[str]:
    """PEFT's names for these layers: the last parts if they suffice, otherwise full names."""

    def end_of(name: str) -> str:
        return hf_name(name + KERNEL).removesuffix(".weight").rpartition(".")[2]

    ends = {end_of(name) for name in names}
    if {name for name in shapes if end_of(name) in ends} == set(names):
        return sorted(ends)
    return sorted(hf_name(name + KERNEL).removesuffix(".weight") for name in names)
