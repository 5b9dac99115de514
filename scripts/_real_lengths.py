"""SuperGLUE's texts as batches of token ids, with different kinds of padding."""

import numpy as np

from prompt_tuning_jax.data.batching.buckets import FIXED, Buckets
from prompt_tuning_jax.data.batching.loader import TrainBatches
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples, tokenize
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary

TASKS = ("rte", "cb", "wic", "copa", "wsc", "multirc", "boolq")


class LongestInBatch(TrainBatches):
    """Batches as without buckets, each padded to its longest input."""

    multiple = 1  # lengths are rounded up to a multiple of this

    def lengths_for(self, step: int) -> tuple[int, int]:
        fixed, targets_length = super().lengths_for(step)
        longest = max(self._real_N[self.indices_for(step, seed)].max() for seed in self._seeds)
        return min(fixed, -(-int(longest) // self.multiple) * self.multiple), targets_length


def open_examples(
    name: str, words: AnyVocabulary, *, data_dir: str, inputs_length: int, targets_length: int
) -> TokenizedExamples:
    """Returns a task's training examples, or the validation split if they are incomplete."""

    def opened(split: str) -> TokenizedExamples:
        return tokenize(
            get_task(f"taskless_super_glue_{name}_v102"),
            split,
            words,
            inputs_length=inputs_length,
            targets_length=targets_length,
            data_dir=data_dir,
            use_cache=False,
        )

    examples = opened("train")
    return opened("validation") if examples.note else examples


def padded(
    examples: TokenizedExamples, way: str, *, batch_size: int, beside: int, multiple: int = 8
) -> TrainBatches:
    """Returns batches padded to ``fixed``, ``longest`` (in the batch), or as ``data.buckets``."""
    buckets = FIXED if way in ("fixed", "longest") else Buckets.from_text(way, beside=beside)
    kind = LongestInBatch if way == "longest" else TrainBatches
    batches = kind(examples, batch_size=batch_size, seeds=(0,), buckets=buckets)
    if isinstance(batches, LongestInBatch):
        batches.multiple = multiple
    return batches


def spread(batches: TrainBatches, steps: int) -> list[dict[str, np.ndarray]]:
    """Returns batches of an epoch at evenly spaced quantiles of the batches' lengths."""
    epoch = range(max(1, batches.examples_per_epoch // batches.batch_size))
    ordered = sorted(epoch, key=batches.lengths_for)
    chosen = [ordered[int((i + 0.5) * len(ordered) / steps)] for i in range(steps)]
    return [batches[step] for step in chosen]
