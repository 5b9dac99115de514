"""What a prompt on disk is, without a model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, Source, read_prompt
from prompt_tuning_jax.models.t5.config import PRESETS


@dataclass(frozen=True, kw_only=True)
class PromptDescription:
    """A stored prompt ``[length, width]``.

    ``left_out`` counts the rows of a PEFT adapter's second copy, see ``peft.PeftPrompt``;
    ``dtype`` is what is stored, the norms are Euclidean, over the width, one per position, and
    ``fits`` names the sizes in ``models.config.PRESETS`` that have this width.
    """

    format: Source
    length: int
    width: int
    dtype: str
    norm_min: float
    norm_mean: float
    norm_max: float
    metadata: PromptMetadata
    fits: tuple[str, ...]
    left_out: int


def describe_prompt(path: str | Path) -> PromptDescription:
    """Reads whatever ``load_prompt`` reads, with the same errors, and describes it."""
    stored = read_prompt(path)
    length, width = stored.prompt_PD.shape
    norms_P = np.linalg.norm(stored.prompt_PD.astype(np.float64), axis=1)
    return PromptDescription(
        format=stored.source,
        length=length,
        width=width,
        dtype=stored.prompt_PD.dtype.name,
        norm_min=float(norms_P.min()),
        norm_mean=float(norms_P.mean()),
        norm_max=float(norms_P.max()),
        metadata=stored.metadata,
        left_out=stored.adapter.left_out if stored.adapter else 0,
        fits=tuple(name for name, config in PRESETS.items() if config.embed_dim == width),
    )
