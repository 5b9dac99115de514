"""Batches for training and evaluation; training batches are a pure function of (seed, step)."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from prompt_tuning_jax.data.batching.buckets import FIXED, BucketPlan, Buckets, bucket_of
from prompt_tuning_jax.data.batching.tokenize import TokenizedExamples
from prompt_tuning_jax.errors import UserError

if TYPE_CHECKING:
    import grain

_REMEMBERED = 10_000  # steps

Batch: TypeAlias = dict[str, np.ndarray]
# (inputs [B, T], seed, step, the numbers of these rows in the batch) -> the changed inputs.
Augment: TypeAlias = Callable[[np.ndarray, int, int, np.ndarray], np.ndarray]


class TrainBatches:
    """Endless shuffled epochs, split into batches that can be requested in any order.

    ``batches[step]`` is a dict of int32 arrays: ``inputs`` [B, T] (uint8 for images) and
    ``targets`` [B, S]; with several seeds each has a leading axis E.  With several sets there is
    also ``task_index`` [B], the number of each example's set, and with ``weights``,
    ``example_weights`` [B] float32.  Every epoch has every example once, in a new order; a batch
    may extend over the end of an epoch, so sets smaller than a batch work.

    A batch depends only on the examples, ``batch_size``, ``rates``, ``buckets``, the seed and the
    step: not on other seeds, on earlier requests, or on the process.

    ``lengths_for`` and ``indices_for`` are the complete plan of a step.  With ``buckets``, the
    examples of a batch have similar lengths, and T is the length of their bucket (``BucketPlan``);
    otherwise, or if one length suffices, T is constant and examples are in the order of the draw.
    """

    def __init__(
        self,
        examples: TokenizedExamples | Sequence[TokenizedExamples],
        *,
        batch_size: int,
        seeds: int | Sequence[int],
        rates: Sequence[float] = (),
        buckets: Buckets = FIXED,
        rows: slice | np.ndarray = slice(None),
        weights: np.ndarray | None = None,
        augment: Augment | None = None,
    ) -> None:
        """Plans the batches.

        Args:
          examples: one set, or several to be mixed; of equal lengths.
          batch_size: B, for each seed.
          seeds: an int gives batches without the axis E; a sequence gives one slice to each seed.
          rates: of drawing an example of each set, relative to the others (default: equal).  The
            sets interleave evenly, in the same pattern for all seeds; with ``buckets``, each
            window of batches has their shares, and not each batch.
          buckets: how T is chosen; at most the sets' ``inputs_length``.
          rows: the rows of a batch to gather (a slice, or indices), for one process of several
            that share a plan.
          weights: [N], of all examples of all sets in order: their weights in the loss.
          augment: changes the inputs of a batch at random.
        """
        self._sets = (examples,) if isinstance(examples, TokenizedExamples) else tuple(examples)
        if batch_size < 1:
            raise UserError(f"training.batch_size is {batch_size} and must be at least 1")
        lengths = {(s.inputs_length, s.targets_length) for s in self._sets}
        if len(lengths) != 1:
            raise ValueError(f"the sets of a mixture differ in their lengths: {sorted(lengths)}")
        if rates and len(rates) != len(self._sets):
            raise ValueError(f"{len(self._sets)} sets and {len(rates)} rates")
        self.batch_size = batch_size
        self._token_ids = self._sets[0].token_ids
        inputs_length, self._targets_length = lengths.pop()
        # An example's number: its index in its set plus the sizes of the sets before.
        self._first = np.cumsum([0, *(len(s) for s in self._sets)])
        self._one_seed = isinstance(seeds, int)
        self._seeds = (seeds,) if isinstance(seeds, int) else tuple(seeds)
        self._rows = rows
        self._augment = augment
        if weights is not None and len(weights) != self._first[-1]:
            raise ValueError(f"{self._first[-1]} examples and {len(weights)} weights")
        self._weights_N = None if weights is None else np.asarray(weights, np.float32)
        # [examples] of all sets: tokens after truncation.
        self._real_N = np.minimum(
            np.concatenate([s.inputs.lengths for s in self._sets]), inputs_length
        )
        plan = BucketPlan(
            [s.inputs.lengths for s in self._sets],
            limit=inputs_length,
            batch_size=batch_size,
            buckets=buckets,
            rates=rates,
            num_seeds=len(self._seeds),
        )
        self.inputs_lengths = plan.lengths
        self._real_of: dict[int, int] = {}
        self._plan = plan if len(plan.lengths) > 1 else None
        self._orders = {seed: self._order(seed, tuple(rates)) for seed in self._seeds}

    @property
    def examples_per_epoch(self) -> int:
        """The number of examples in all sets."""
        return int(self._first[-1])

    @property
    def reads_images(self) -> bool:
        """Whether the inputs are pixels, which have no padding."""
        return self._sets[0].inputs.dtype == np.uint8

    def lengths_for(self, step: int) -> tuple[int, int]:
        """Returns (T, S) of the batch at ``step``.

        They are the same for all seeds, whose slices form one array.
        """
        if self._plan is None:
            return self.inputs_lengths[0], self._targets_length
        return self._plan.length_for(step), self._targets_length

    def indices_for(self, step: int, seed: int) -> np.ndarray:
        """Returns [B] int64: the numbers of the examples that ``seed`` sees at ``step``."""
        if step < 0:
            raise IndexError(f"step {step}")
        if self._plan is not None:
            return self._plan.indices_for(step, seed)
        return np.asarray(self._orders[seed][step], np.int64)

    def digest(self) -> str:
        """Returns a digest of the examples, in their order."""
        return " ".join(examples.digest() for examples in self._sets)

    def padding(self, start_step: int, stop_step: int) -> float:
        """Returns the percentage of padding in the inputs of these steps.

        All rows and seeds are included.
        """
        steps = range(start_step, stop_step)
        real = sum(self._real_of.get(step) or self._count_real(step) for step in steps)
        lengths = sum(self.lengths_for(step)[0] for step in steps)
        return 100 * (1 - real / max(lengths * self.batch_size * len(self._seeds), 1))

    def empty_batches(self, start_step: int, stop_step: int) -> list[Batch]:
        """Returns a batch of each shape that these steps have, all padding."""
        indices_EB = np.zeros((len(self._seeds), self.batch_size), np.int8)[:, self._rows]
        leading = indices_EB.shape[1:] if self._one_seed else indices_EB.shape
        lengths = sorted({self.lengths_for(step) for step in range(start_step, stop_step)})
        return [
            self._with_tasks(
                {
                    "inputs": self._no_inputs((*leading, inputs_length)),
                    "targets": np.full((*leading, targets_length), self._token_ids.fill, np.int32),
                },
                np.zeros(leading, np.int32),
                np.zeros(leading, np.int32),
            )
            for inputs_length, targets_length in lengths
        ]

    def __getitem__(self, step: int) -> Batch:
        inputs_length, targets_length = self.lengths_for(step)
        indices_EB = self._indices(step)
        self._count_real(step, indices_EB)
        indices_EB = indices_EB[:, self._rows]
        shape_EB = indices_EB.shape
        sets_N = np.searchsorted(self._first, indices_EB.ravel(), side="right") - 1
        inputs_NT, targets_NS = self._gather(
            indices_EB.ravel(), sets_N, inputs_length, targets_length
        )
        if self._augment is not None:
            inputs_EBT = inputs_NT.reshape(*shape_EB, inputs_length)
            rows_B = np.arange(self.batch_size)[self._rows]
            changed = [
                self._augment(inputs_BT, seed, step, rows_B)
                for inputs_BT, seed in zip(inputs_EBT, self._seeds, strict=True)
            ]
            inputs_NT = np.stack(changed)
        leading = shape_EB[1:] if self._one_seed else shape_EB
        batch = {
            "inputs": inputs_NT.reshape(*leading, inputs_length),
            "targets": targets_NS.reshape(*leading, targets_length),
        }
        return self._with_tasks(
            batch, sets_N.astype(np.int32).reshape(leading), indices_EB.reshape(leading)
        )

    def iterate(
        self, start_step: int, stop_step: int, *, num_threads: int = 1, prefetch: int = 8
    ) -> Iterator[Batch]:
        """Yields the batches of steps ``start_step`` to ``stop_step - 1``, prepared in threads."""
        import grain

        steps = grain.MapDataset.range(start_step, max(start_step, stop_step))
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        yield from steps.map(self.__getitem__).to_iter_dataset(options)

    def _with_tasks(self, batch: Batch, task_index: np.ndarray, number: np.ndarray) -> Batch:
        """Returns the batch with ``task_index`` of several sets, and with any weights."""
        batch = {**batch, "task_index": task_index} if len(self._sets) > 1 else batch
        if self._weights_N is None:
            return batch
        return {**batch, "example_weights": self._weights_N[number]}

    def _no_inputs(self, shape: tuple[int, ...]) -> np.ndarray:
        fill = 0 if self.reads_images else self._token_ids.fill
        return np.full(shape, fill, self._sets[0].inputs.dtype)

    def _indices(self, step: int) -> np.ndarray:
        return np.stack([self.indices_for(step, seed) for seed in self._seeds])

    def _count_real(self, step: int, indices_EB: np.ndarray | None = None) -> int:
        """Tokens of inputs at ``step``; cached for ``padding``."""
        chosen_EB = self._indices(step) if indices_EB is None else indices_EB
        self._real_of[step] = real = int(self._real_N[chosen_EB].sum())
        self._real_of.pop(step - _REMEMBERED, None)
        return real

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
        return mixed.batch(self.batch_size)

    def _gather(
        self,
        indices_N: np.ndarray,
        sets_N: np.ndarray,
        inputs_length: int,
        targets_length: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        fill = self._token_ids.fill
        inputs_NT = self._no_inputs((len(indices_N), inputs_length))
        targets_NS = np.empty((len(indices_N), targets_length), np.int32)
        for number, examples in enumerate(self._sets):
            of_set_N = sets_N == number
            local = indices_N[of_set_N] - self._first[number]
            inputs_NT[of_set_N] = examples.inputs.padded(local, inputs_length, padding=fill)
            targets_NS[of_set_N] = examples.targets.padded(local, targets_length, padding=fill)
        return inputs_NT, targets_NS


def eval_batches(
    examples: TokenizedExamples, *, batch_size: int, buckets: Buckets = FIXED
) -> Iterator[Batch]:
    """Yields all examples once, in batches of one size and of the lengths that ``buckets`` chooses.

    In addition to the arrays of a training batch: ``example_index`` [B] int32, into
    ``examples.texts``, and ``row_mask`` [B] bool.  Examples are in order if all batches have the
    same length, and otherwise sorted by length.  One batch (the last, or that of the shortest
    inputs) may have spare rows at its end: they repeat an input without targets, with index -1 and
    mask False.
    """
    for index_B, inputs_length in eval_plan(examples, batch_size=batch_size, buckets=buckets):
        mask_B = index_B >= 0
        rows_B = np.where(mask_B, index_B, index_B[0])
        ids = examples.token_ids
        inputs_BT = examples.inputs.padded(rows_B, inputs_length, padding=ids.fill)
        targets_BS = examples.targets.padded(rows_B, examples.targets_length, padding=ids.fill)
        targets_BS[~mask_B] = ids.fill
        yield {
            "inputs": inputs_BT,
            "targets": targets_BS,
            "example_index": index_B,
            "row_mask": mask_B,
        }


def eval_plan(
    examples: TokenizedExamples, *, batch_size: int, buckets: Buckets = FIXED
) -> list[tuple[np.ndarray, int]]:
    """Returns the ``example_index`` and the inputs' length of each batch of ``eval_batches``."""
    if batch_size < 1:
        raise UserError(f"evaluation.batch_size is {batch_size} and must be at least 1")
    number, limit = len(examples), examples.inputs_length
    lengths_N = np.minimum(examples.inputs.lengths, limit)
    order = np.argsort(lengths_N, kind="stable")
    spare = np.full(-number % batch_size, -1)
    # Spare rows cost least among the shortest.
    index_MB = np.concatenate([spare, order]).astype(np.int32).reshape(-1, batch_size)
    longest_M = lengths_N[index_MB[:, -1]]
    lengths = buckets.choose(longest_M, limit=limit)
    if len(lengths) == 1:
        index_MB = np.concatenate([np.arange(number), spare]).astype(np.int32)
        return [(index_B, lengths[0]) for index_B in index_MB.reshape(-1, batch_size)]
    index_MB[0] = np.roll(index_MB[0], -len(spare))
    in_bucket_M = bucket_of(longest_M, lengths)
    return [(index_B, lengths[k]) for index_B, k in zip(index_MB, in_bucket_M, strict=True)]


def eval_padding(plan: Sequence[tuple[np.ndarray, int]], examples: TokenizedExamples) -> float:
    """Returns the percentage of padding in the inputs of an ``eval_plan``.

    Spare rows are included.
    """
    computed = sum(len(index_B) * length for index_B, length in plan)
    real = int(np.minimum(examples.inputs.lengths, examples.inputs_length).sum())
    return 100 * (1 - real / max(computed, 1))


def _shuffle_seed(seed: int, number: int) -> int:
    # Hashed: grain shuffles epoch e with seed + e, and seed 1 would repeat seed 0 an epoch ahead.
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
