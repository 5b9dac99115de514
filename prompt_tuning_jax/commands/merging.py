"""Merges what a run has tuned into the model's weights."""

import os
from pathlib import Path

from prompt_tuning_jax.checkpoints.convert_model import (
    MAX_SHARD_BYTES,
    Converted,
    StoredAs,
    written,
)
from prompt_tuning_jax.checkpoints.staged import require_free, require_outside, staged
from prompt_tuning_jax.model_export import export_model


def merge(
    source: str | Path,
    destination: str | Path,
    *,
    member: str = "",
    dtype: StoredAs = "stored",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes the best model of a run's folder as a Hugging Face folder of a plain T5.

    For LoRA, IA3, and runs that trained the model's own weights.  Of several members ``member``
    names one.  ``stored`` is the dtype that the run held its weights in; merged weights are rounded
    to what is written.  What exists stays unless ``overwrite``, and after an error nothing is left.
    Raises UserError.
    """
    destination = Path(os.path.abspath(Path(destination).expanduser()))
    require_free(destination, overwrite=overwrite, folder=True)
    require_outside(source, destination)
    with staged(destination, overwrite=overwrite, folder=True) as aside:
        has_words = export_model(
            source, aside, member=member, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
    notes = [] if has_words else ["it has no vocabulary, since the model that was tuned has none"]
    return written("the merged model as a Hugging Face folder", destination, notes=notes)
