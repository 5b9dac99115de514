"""The trained arrays of any method, as a ``.safetensors`` file whose metadata describe the run.

Prompts have another format (``prompt_file``), which other programs read.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from prompt_tuning_jax.checkpoints.array_files import (
    METHOD,
    map_safetensors,
    require_at_most,
    require_finite,
    safetensors_of,
    tuned_by,
)
from prompt_tuning_jax.checkpoints.parameters import parameter_shapes
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    metadata_from_strings,
    metadata_to_strings,
    this_program,
)
from prompt_tuning_jax.config.methods import MethodConfig
from prompt_tuning_jax.config.overrides import method_from_json
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import ModelConfig
from prompt_tuning_jax.storage import atomic_write
from prompt_tuning_jax.typing import HostArray
from prompt_tuning_jax.untrusted_input import json_text, read_json

_TASKS = "tasks"
_ALWAYS_READ = 2**24  # numbers, for a model of any size
# Sizes up to this are accepted whatever a file's arrays are, because they cost nothing.  A field
# that is not used may be larger than any axis of the arrays.
_SMALL = 1024


@dataclass(frozen=True, kw_only=True)
class TunedCheckpoint:
    """Trained arrays by their path in a ``TunedModel``, and the method that they belong to.

    ``method`` is its config as JSON; ``tasks`` are the names of the tasks it was trained on
    together.
    """

    trainable: Mapping[str, HostArray]
    method: str
    metadata: PromptMetadata
    tasks: tuple[str, ...] = ()


def save_tuned(path: Path, stored: TunedCheckpoint) -> None:
    """Writes the file atomically; the same input gives the same bytes."""
    metadata = stored.metadata
    if not metadata.created_by:
        metadata = dataclasses.replace(metadata, created_by=this_program())
    strings = metadata_to_strings(metadata) | {METHOD: stored.method}
    if stored.tasks:
        strings[_TASKS] = json_text(stored.tasks)
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors_of(stored.trainable, metadata=strings))


def is_tuned_file(path: Path) -> bool:
    """Returns whether this is such a file, by its content; False if it cannot be read."""
    return tuned_by(path) is not None


def open_tuned(path: Path) -> TunedCheckpoint:
    """Returns a file of ``save_tuned``, with memory-mapped arrays; UserError if it is damaged."""
    mapped = map_safetensors(path)
    tasks = read_json(mapped.metadata.get(_TASKS, "[]"), of=f"{path}: its metadata's {_TASKS}")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{path}: its metadata's tasks are not a list of names")
    return TunedCheckpoint(
        trainable=mapped.arrays,
        method=mapped.metadata.get(METHOD, ""),
        metadata=metadata_from_strings(mapped.metadata, path=path),
        tasks=tuple(tasks),
    )


def read_tuned(path: Path, config: ModelConfig) -> TunedCheckpoint:
    """Returns a file of ``save_tuned`` in memory, for a model of this configuration.

    UserError for a file that is damaged, has NaN or infinity, or is far too large for the model.
    """
    stored = open_tuned(path)
    require_plausible(stored.trainable, config, of=str(path))
    require_finite(stored.trainable, of=str(path))
    trainable = {name: np.array(array) for name, array in stored.trainable.items()}
    return dataclasses.replace(stored, trainable=trainable)


def require_plausible(arrays: Mapping[str, HostArray], config: ModelConfig, *, of: str) -> None:
    """Raises UserError if the arrays have more than twice as many numbers as the whole model."""
    whole = sum(map(prod, parameter_shapes(config).values()))
    most = 2 * whole + _ALWAYS_READ
    require_at_most(arrays, most, of=of, why="the most that are read for a model of this size is")


def method_of(stored: TunedCheckpoint, path: str | Path) -> MethodConfig:
    """Returns the method that a file's arrays belong to.

    The metadata is checked against the arrays before it is used.  Raises UserError, naming the
    file, for an unknown method, invalid fields, or sizes that the arrays do not have.
    """
    try:
        method = method_from_json(stored.method, of="the method in its metadata")
        shapes = {name: tuple(array.shape) for name, array in stored.trainable.items()}
        require_sizes(method.as_trained(), shapes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return method


def require_sizes(method: MethodConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError for invalid fields and for sizes larger than any axis of the arrays."""
    for complaint in method.config_errors():
        raise UserError(complaint)
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    claimed = [(field.name, getattr(method, field.name)) for field in dataclasses.fields(method)]
    for name, value in [*claimed, ("template", method.prompt_positions())]:
        sizes = value if isinstance(value, tuple) else (value,)
        if len(sizes) > max(largest, _SMALL):
            raise UserError(f"method.{name} has {len(sizes)} entries, and no array has so many")
        for size in sizes:
            # A population of tokens is cut to the vocabulary, and allocates nothing.
            if type(size) is not int or name == "init_population":
                continue
            if method.training_only.get(name) == size:
                continue
            if size > max(largest, _SMALL):
                raise UserError(
                    f"method.{name} is {size}, and the largest axis of its arrays is {largest}"
                )
