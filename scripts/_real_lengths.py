"""SuperGLUE's texts as batches of token ids, padded in the ways that are compared."""

import numpy as np

from prompt_tuning_jax.data.batching.buckets import FIXED, Buckets
from prompt_tuning_jax.data.batching.loader import TrainBatches
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples, tokenize
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary

TASKS = ("rte", "cb", "wic", "copa", "wsc", "multirc", "boolq")


class LongestInBatch(TrainBatches):
    """The same batches as without buckets, each padded to its longest input."""

    multiple = 1  # of which lengths are

    def lengths_for(self, step: int) -> tuple[int, int]:
        fixed, targets_length = super().lengths_for(step)
        longest = max(self._real_N[self.indices_for(step, seed)].max() for seed in self._seeds)
        return min(fixed, -(-int(longest) // self.multiple) * self.multiple), targets_length


def open_examples(
    name: str, words: AnyVocabulary, *, data_dir: str, inputs_length: int, targets_length: int
) -> TokenizedExamples:
    """The training examples of a task; the validation split where those are but a part."""

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
    """Batches of the examples: ``fixed``, ``longest`` (in the batch), or as in ``data.buckets``."""
    own_plan = way in ("fixed", "longest")
    buckets = FIXED if own_plan else Buckets.from_text(way, beside=beside)
    kind = LongestInBatch if way == "longest" else TrainBatches
    batches = kind(examples, batch_size=batch_size, seeds=(0,), buckets=buckets)
    if isinstance(batches, LongestInBatch):
        batches.multiple = multiple
    return batches


def spread(batches: TrainBatches, steps: int) -> list[dict[str, np.ndarray]]:
    """Batches of an epoch whose lengths are evenly spaced among those of all its batches."""
    epoch = range(max(1, batches.examples_per_epoch // batches.batch_size))
    ordered = sorted(epoch, key=batches.lengths_for)
    chosen = [ordered[int((i + 0.5) * len(ordered) / steps)] for i in range(steps)]
    return [batches[step] for step in chosen]
