"""What PEFT calls a T5's linear maps and the arrays that it keeps for them."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from prompt_tuning_jax.checkpoints.hf.pretrained import COPIES_OF_SHARED, hf_name
from prompt_tuning_jax.checkpoints.names import EMBEDDING, LOGITS, parameter_shapes
from prompt_tuning_jax.models.t5.config import T5Config
from prompt_tuning_jax.param_tree import matching

_FRONT = "base_model.model."  # of every array's name
KERNEL = "/kernel"


def linear_shapes(config: T5Config) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear map, by path."""
    return {
        name.removesuffix(KERNEL): (shape[0], shape[1])
        for name, shape in parameter_shapes(config).items()
        if name.endswith(KERNEL)
    }


def peft_name(name: str, end: str) -> str:
    """The name of an array whose own name ends so, of the map of this path."""
    return f"{_FRONT}{hf_name(name + KERNEL).removesuffix('weight')}{end}"


def own_names(config: T5Config) -> dict[str, str]:
    """What PEFT calls the model's own parameters, where it saves them: their paths by its names."""
    theirs = {hf_name(name): name for name in parameter_shapes(config)}
    theirs |= dict.fromkeys(COPIES_OF_SHARED, EMBEDDING)
    if config.tie_embeddings:
        theirs[hf_name(LOGITS)] = EMBEDDING
    found: dict[str, str] = {}
    for name, path in theirs.items():
        stem = name.removesuffix("weight")
        found |= {f"{_FRONT}{name}": path, f"{_FRONT}{stem}base_layer.weight": path}
    return found


def adapter_path(name: str, part: str) -> str:
    """The path of what is around a map, in a ``TunedModel``."""
    return f"model/{name}/adapter/{part}"


def maps_chosen_by(patterns: Collection[str], shapes: Mapping[str, Any]) -> list[str]:
    """The maps whose whole path matches one of the patterns."""
    masks = [matching(shapes, pattern) for pattern in patterns]
    return [name for name in shapes if any(mask[name] for mask in masks)]


def patterns_for(
    names: Collection[str], shapes: Mapping[str, Any], *, usual: tuple[str, ...]
) -> tuple[str, ...]:
    """Regular expressions that choose these maps of the model and no others, if they can short."""
    if not names:
        return ()
    kinds = sorted({name.rpartition("/")[2] for name in names})
    for short in (usual, (f".*/({'|'.join(kinds)})",)):
        if set(maps_chosen_by(short, shapes)) == set(names):
            return short
    return tuple(re.escape(name) for name in sorted(names))


def module_names(names: Collection[str], shapes: Mapping[str, Any]) -> list[str]:
    """What PEFT calls these maps: by the ends of their names where that says all, or in full."""

    def end_of(name: str) -> str:
        return hf_name(name + KERNEL).removesuffix(".weight").rpartition(".")[2]

    ends = {end_of(name) for name in names}
    if {name for name in shapes if end_of(name) in ends} == set(names):
        return sorted(ends)
    return sorted(hf_name(name + KERNEL).removesuffix(".weight") for name in names)
