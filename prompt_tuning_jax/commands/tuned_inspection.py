"""Says what is kept of other methods than prompts: a run's files, and PEFT's adapters."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompt_tuning_jax.checkpoints.mapped_safetensors import require_finite
from prompt_tuning_jax.checkpoints.peft import CONFIG, read_config, read_tensors
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.tuned_file import open_tuned
from prompt_tuning_jax.opened_methods import method_of
from prompt_tuning_jax.overrides import to_dict

# What of an adapter's config says how it computes.
_OF_ADAPTERS = (
    *("r", "lora_alpha", "use_rslora", "target_modules", "feedforward_modules"),
    *("num_virtual_tokens", "num_layers", "num_tasks", "num_ranks", "token_dim"),
)


@dataclass(frozen=True, kw_only=True)
class TunedDescription:
    """What a method tuned: ``parameters`` are all numbers, ``dtypes`` how many of each type.

    ``method`` is the class of its config, of a PEFT adapter its ``peft_type``, and ``settings``
    what it says.
    """

    format: str
    method: str
    settings: dict[str, Any]
    parameters: int
    arrays: int
    dtypes: dict[str, int]
    metadata: PromptMetadata
    tasks: tuple[str, ...]


def describe_tuned(path: Path) -> TunedDescription:
    """Reads one of ``tuned_conversion.tuned_files``; UserError for a damaged one."""
    tasks: tuple[str, ...] = ()
    if path.is_dir():
        described = read_config(path / CONFIG)
        arrays, _ = read_tensors(path)
        version = f"peft {described.get('peft_version') or ''}".rstrip()
        metadata = PromptMetadata(
            model_name=str(described.get("base_model_name_or_path") or ""), created_by=version
        )
        kind = str(described.get("peft_type"))
        settings = {n: described[n] for n in _OF_ADAPTERS if described.get(n) is not None}
        form = "PEFT adapter"
    else:
        stored = open_tuned(path)
        require_finite(stored.tuned, of=str(path))
        method = method_of(stored, path)
        kind, settings, form = type(method).__name__, to_dict(method), "safetensors"
        arrays, metadata, tasks = dict(stored.tuned), stored.metadata, stored.tasks
    dtypes: Counter[str] = Counter()
    for array in arrays.values():
        dtypes[array.dtype.name] += array.size
    return TunedDescription(
        format=form,
        method=kind,
        settings=settings,
        parameters=dtypes.total(),
        arrays=len(arrays),
        dtypes=dict(dtypes),
        metadata=metadata,
        tasks=tasks,
    )
