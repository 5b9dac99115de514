"""A micro T5 with words, prompts for it and an engine that all tests of the server share."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from prompt_tuning_jax.checkpoints.load import load_model
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata, save_prompt
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.serving.engine import Engine
from prompt_tuning_jax.serving.shapes import Shapes, Targets
from prompt_tuning_jax.serving.tasks import ServedPrompt
from tests.tiny_run import LABELS, model_folder

D = 16
SHAPES = Shapes(
    lengths=(8, 16),
    batch_sizes=(1, 4),
    prompt_lengths=(3, 7),
    targets=(Targets(number=4, length=2), Targets(number=1, length=6)),
    max_new_tokens=6,
    slots=4,
    long_slots=4,
)


@functools.cache
def micro_model() -> T5:
    return load_model(str(model_folder()))


@functools.cache
def micro_engine() -> Engine:
    """Compiled once; a test that breaks it must ``reset`` it."""
    engine = Engine(micro_model(), shapes=SHAPES, cache_rows=6)
    engine.compile()
    return engine


def made_prompt(length: int, *, seed: int = 0, placement: int = 0) -> ServedPrompt:
    drawn = np.random.default_rng(seed).normal(size=(length, D)).astype(np.float32)
    return ServedPrompt(
        name=f"seed_{seed}", prompt_PD=drawn, metadata=PromptMetadata(), placement=placement
    )


def write_prompt(
    path: Path, length: int = 5, *, seed: int = 0, labels: Sequence[str] = LABELS, **about: object
) -> Path:
    drawn = np.random.default_rng(seed).normal(size=(length, D)).astype(np.float32)
    metadata = PromptMetadata(labels=tuple(labels), seed=seed, **about)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_prompt(path, drawn, metadata=metadata if path.suffix != ".npy" else None)
    return path


def ids_of(text: str) -> tuple[int, ...]:
    return (*micro_model().vocabulary.encode(text), 1)
