"""Decoders, which call a function from tokens, position and cache to logits instead of a model."""

from prompt_tuning_jax.inference.decoding.beam import (
    BeamRule,
    Beams,
    HuggingFaceRule,
    T5XRule,
    beam_search,
)
from prompt_tuning_jax.inference.decoding.greedy import Decoded, StepFn, greedy
from prompt_tuning_jax.inference.decoding.logits_processors import (
    LogitsProcessors,
    logits_processors,
)
from prompt_tuning_jax.inference.decoding.rank import rank, sequence_log_probs
from prompt_tuning_jax.inference.decoding.sampling import sample

__all__ = [
    "BeamRule",
    "Beams",
    "Decoded",
    "HuggingFaceRule",
    "LogitsProcessors",
    "StepFn",
    "T5XRule",
    "beam_search",
    "greedy",
    "logits_processors",
    "rank",
    "sample",
    "sequence_log_probs",
]
