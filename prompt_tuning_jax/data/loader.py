"""Batches in an order that is a pure function of (seed, step)."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from prompt_tuning_jax.data.tokenize import TokenizedExamples
from prompt_tuning_jax.data.vocab import PAD_ID
from prompt_tuning_jax.errors import UserError

if TYPE_CHECKING:
    import grain

Batch: TypeAlias = dict[str, np.ndarray]


class TrainBatches:
    """Endless shuffled epochs, cut into batches that can be asked for in any order.

    ``batches[step]`` is a dict of int32 arrays: ``encoder_input_tokens`` [B, T],
    ``decoder_target_tokens`` [B, S] and ``decoder_input_tokens`` [B, S]; with several seeds each
    has a leading axis E.  Every epoch holds every example once, in an order of its own; a batch may
    reach across the end of an epoch, so that sets smaller than a batch work.

    What a batch holds depends on the examples, ``batch_size``, ``rates``, the seed and the step,
    and on nothing else: not on the seeds beside it, nor on the steps asked for before.

    The seam for batches by length: ``lengths_for`` and ``indices_for`` are the whole plan of a
    step, and all that ``__getitem__`` asks for.
    """

    def __init__(
        self,
        examples: TokenizedExamples | Sequence[TokenizedExamples],
        *,
        batch_size: int,
        seeds: int | Sequence[int],
        rates: Sequence[float] = (),
    ) -> None:
        """Plan the batches.

        Args:
          examples: one set, or several to be mixed; of equal lengths.
          batch_size: B, for each seed.
          seeds: an int gives batches without the axis E; a sequence gives one slice to each seed.
          rates: how often an example of each set is drawn, relative to the others (default: all
            the same).  The sets interleave evenly, in the same pattern for all seeds.
        """
        self._sets = (examples,) if isinstance(examples, TokenizedExamples) else tuple(examples)
        if batch_size < 1:
            raise UserError(f"training.batch_size is {batch_size} and must be at least 1")
        lengths = {(s.inputs_length, s.targets_length) for s in self._sets}
        if len(lengths) != 1:
            raise ValueError(f"the sets of a mixture differ in their lengths: {sorted(lengths)}")
        if rates and len(rates) != len(self._sets):
            raise ValueError(f"{len(self._sets)} sets and {len(rates)} rates")
        self._batch_size = batch_size
        self._lengths = lengths.pop()
        # An example's number: its index in its set plus the sizes of the sets before.
        self._first = np.cumsum([0, *(len(s) for s in self._sets)])
        self._one_seed = isinstance(seeds, int)
        self._seeds = (seeds,) if isinstance(seeds, int) else tuple(seeds)
        self._orders = {seed: self._order(seed, tuple(rates)) for seed in self._seeds}

    @property
    def examples_per_epoch(self) -> int:
        """The number of examples in all sets."""
        return int(self._first[-1])

    def lengths_for(self, step: int) -> tuple[int, int]:
        """(T, S) of the batch at ``step``: the same for all seeds, whose slices form one array."""
        del step
        return self._lengths

    def indices_for(self, step: int, seed: int) -> np.ndarray:
        """[B] int64: the numbers of the examples that ``seed`` sees at ``step``."""
        if step < 0:
            raise IndexError(f"step {step}")
        return np.asarray(self._orders[seed][step], np.int64)

    def __getitem__(self, step: int) -> Batch:
        inputs_length, targets_length = self.lengths_for(step)
        indices_EB = np.stack([self.indices_for(step, seed) for seed in self._seeds])
        shape_EB = indices_EB.shape
        inputs_NT, targets_NS = self._gather(indices_EB.ravel(), inputs_length, targets_length)
        leading = shape_EB[1:] if self._one_seed else shape_EB
        return make_batch(
            inputs_NT.reshape(*leading, inputs_length),
            targets_NS.reshape(*leading, targets_length),
        )

    def iterate(
        self, start_step: int, stop_step: int, *, num_threads: int = 1, prefetch: int = 8
    ) -> Iterator[Batch]:
        """Yield the batches of steps ``start_step`` to ``stop_step - 1``, prepared in threads."""
        import grain

        steps = grain.MapDataset.range(start_step, max(start_step, stop_step))
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        yield from steps.map(self.__getitem__).to_iter_dataset(options)

    def _order(self, seed: int, rates: tuple[float, ...]) -> "grain.MapDataset[np.ndarray]":
        # Imported here: grain brings in JAX and Orbax.
        import grain

        shuffled = [
            grain.MapDataset.range(int(first), int(last))
            .shuffle(seed=_shuffle_seed(seed, number))
            .repeat()
            for number, (first, last) in enumerate(
                zip(self._first[:-1], self._first[1:], strict=True)
            )
        ]
        if len(shuffled) == 1:
            mixed = shuffled[0]
        else:
            mixed = grain.MapDataset.mix(shuffled, weights=rates or None)
        return mixed.batch(self._batch_size)

    def _gather(
        self, indices_N: np.ndarray, inputs_length: int, targets_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        inputs_NT = np.empty((len(indices_N), inputs_length), np.int32)
        targets_NS = np.empty((len(indices_N), targets_length), np.int32)
        sets_N = np.searchsorted(self._first, indices_N, side="right") - 1
        for number, examples in enumerate(self._sets):
            of_set_N = sets_N == number
            local = indices_N[of_set_N] - self._first[number]
            inputs_NT[of_set_N] = examples.inputs.padded(local, inputs_length)
            targets_NS[of_set_N] = examples.targets.padded(local, targets_length)
        return inputs_NT, targets_NS


def make_batch(inputs: np.ndarray, targets: np.ndarray) -> Batch:
    """[..., T] and [..., S] -> the dict that a training step takes; decoder inputs start from 0."""
    decoder_inputs = np.full_like(targets, PAD_ID)
    decoder_inputs[..., 1:] = targets[..., :-1]
    return {
        "encoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_input_tokens": decoder_inputs,
    }


def eval_batches(examples: TokenizedExamples, *, batch_size: int) -> Iterator[Batch]:
    """Yield all examples once, in order, in batches of one size.

    Beside the arrays of a training batch: ``example_index`` [B] int32, into ``examples.texts``, and
    ``row_mask`` [B] bool.  Where the last batch has rows to spare, these repeat the first inputs
    with no targets, their index is -1 and their mask False.
    """
    if batch_size < 1:
        raise UserError(f"evaluation.batch_size is {batch_size} and must be at least 1")
    for start in range(0, len(examples), batch_size):
        index_B = np.arange(start, start + batch_size, dtype=np.int32)
        mask_B = index_B < len(examples)
        rows_B = np.where(mask_B, index_B, 0)
        targets_BS = examples.targets.padded(rows_B, examples.targets_length)
        targets_BS[~mask_B] = PAD_ID
        yield {
            **make_batch(examples.inputs.padded(rows_B, examples.inputs_length), targets_BS),
            "example_index": np.where(mask_B, index_B, -1).astype(np.int32),
            "row_mask": mask_B,
        }


def _shuffle_seed(seed: int, number: int) -> int:
    # Hashed: grain shuffles epoch e with seed + e, and seed 1 would repeat seed 0 an epoch ahead.
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
