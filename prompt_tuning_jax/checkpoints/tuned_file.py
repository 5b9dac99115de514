"""What a run of any method keeps: a ``.safetensors`` file of tuned arrays that says what made them.

Prompts have a form of their own (``prompt_file``), which other programs know.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prompt_tuning_jax.checkpoints.atomic import written_aside
from prompt_tuning_jax.checkpoints.prompt_array import one_line, safetensors_of
from prompt_tuning_jax.checkpoints.prompt_file import (
    PromptMetadata,
    metadata_from_strings,
    metadata_to_strings,
    this_program,
)
from prompt_tuning_jax.checkpoints.tuned_kind import METHOD, tuned_by
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.typing import HostArray

_TASKS = "tasks"


@dataclass(frozen=True, kw_only=True)
class StoredTuned:
    """Tuned arrays by their path in an ``Attached``, and the method that they belong to.

    ``method`` is its config as JSON; ``tasks`` are the names of those trained on together.
    """

    tuned: Mapping[str, HostArray]
    method: str
    metadata: PromptMetadata
    tasks: tuple[str, ...] = ()


def save_tuned(path: Path, stored: StoredTuned) -> None:
    """Writes the file aside and renames it; the same input gives the same bytes."""
    metadata = stored.metadata
    if not metadata.created_by:
        metadata = dataclasses.replace(metadata, created_by=this_program())
    strings = metadata_to_strings(metadata) | {METHOD: stored.method}
    if stored.tasks:
        strings[_TASKS] = json.dumps(stored.tasks)
    with written_aside(path) as aside:
        aside.write_bytes(safetensors_of(stored.tuned, metadata=strings))


def is_tuned_file(path: Path) -> bool:
    """Whether this is such a file, by its content; False for what cannot be read."""
    return tuned_by(path) is not None


def read_tuned(path: Path) -> StoredTuned:
    """What ``save_tuned`` wrote; UserError for a file that is damaged or not finite."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            strings = file.metadata() or {}
            tuned = {name: file.get_tensor(name) for name in sorted(file.keys())}
        tasks = json.loads(strings.get(_TASKS, "[]"))
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is a damaged .safetensors file: {one_line(error)}") from error
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise UserError(f"{path}: its metadata has tasks that are no list of names")
    for name, array in tuned.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite (NaN or infinity)")
    return StoredTuned(
        tuned=tuned,
        method=strings.get(METHOD, ""),
        metadata=metadata_from_strings(strings, path=path),
        tasks=tuple(tasks),
    )
