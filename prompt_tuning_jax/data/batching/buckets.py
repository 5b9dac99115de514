"""Batches padded to a few input lengths, chosen to minimize padding.

``Buckets`` chooses the lengths, and ``BucketPlan`` assigns examples and a length to each step.  N
inputs or batches, C lengths to choose from.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prompt_tuning_jax.config.field_syntax import parse_buckets
from prompt_tuning_jax.data.random_draws import random_bits

# The share of additional positions that fewer buckets (fewer shapes to compile) may cost.
_TOLERATED = 0.03
# Lengths that suit the hardware; shorter batches than the first are not faster.
_MULTIPLE, _SHORTEST = 8, 16


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """How input lengths are chosen: given, automatic, or fixed.

    Attributes:
      lengths: the lengths, shortest first; the limit is added if inputs are longer.
      most: the maximum number of automatic lengths, if ``lengths`` is empty; 0: only the limit.
      beside: further positions that are computed for every input, for instance a prompt's.
    """

    lengths: tuple[int, ...] = ()
    most: int = 0
    beside: int = 0

    @classmethod
    def from_text(cls, text: str, *, beside: int = 0) -> "Buckets":
        """Returns the choice that ``data.buckets`` describes; UserError for an invalid text."""
        lengths, most = parse_buckets(text)
        return cls(lengths=lengths, most=most, beside=beside) if lengths or most else FIXED

    def choose(
        self, lengths_N: np.ndarray, weights_N: np.ndarray | None = None, *, limit: int
    ) -> tuple[int, ...]:
        """Returns lengths, shortest first; the last is at least the longest of ``lengths_N``.

        ``lengths_N`` are lengths of inputs, or of each batch's longest input; ``weights_N`` is the
        number of rows of each.  Longer inputs are truncated to ``limit``.
        """
        needed = min(int(np.max(lengths_N, initial=0)), limit)
        if self.lengths:
            given = [length for length in self.lengths if length < limit]
            last = next((length for length in given if length >= needed), limit)
            return (*(length for length in given if length < last), last)
        if not self.most:
            return (limit,)
        if weights_N is None:
            weights_N = np.ones(len(lengths_N))
        return _choose(np.minimum(lengths_N, limit), weights_N, limit, self)


FIXED = Buckets()


def padded_size(number: int, *, least: int = 1) -> int:
    """Returns the smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is large enough.

    It is at least ``number`` and ``least``.

    Padding to these sizes gives few shapes, and at most a third is padding.
    """
    size = least
    while size < number:
        # Each power of two is followed by one and a half times it.
        size = size * 4 // 3 if size % 3 == 0 else max(size * 3 // 2, size + 1)
    return size


def few_lengths(limit: int) -> Buckets:
    """Returns lengths up to ``limit`` that do not depend on the data."""
    lengths = [_SHORTEST]
    while lengths[-1] < limit:
        lengths.append(padded_size(lengths[-1] + 1, least=_SHORTEST))
    return Buckets(lengths=tuple(length for length in lengths if length < limit) or (limit,))


def bucket_of(lengths_N: np.ndarray, bucket_lengths: tuple[int, ...]) -> np.ndarray:
    """Returns [N] int64: the first bucket that each length fits; truncated ones are in the last."""
    first = np.searchsorted(np.asarray(bucket_lengths), lengths_N)
    return np.minimum(first, len(bucket_lengths) - 1)


def _choose(
    lengths_N: np.ndarray, weights_N: np.ndarray, limit: int, buckets: Buckets
) -> tuple[int, ...]:
    """Returns the lengths with the fewest positions in total.

    Uses dynamic programming over the last length.
    """
    longest = max(_SHORTEST, -(-int(lengths_N.max()) // _MULTIPLE) * _MULTIPLE)
    offered = [*range(_SHORTEST, min(limit, longest), _MULTIPLE), min(limit, longest)]
    lengths_C = np.asarray(offered)
    rows_C = np.bincount(
        bucket_of(lengths_N, tuple(offered)), weights=weights_N, minlength=len(offered)
    ).cumsum()
    each_C = lengths_C + buckets.beside
    # cost_C[c]: positions of all rows up to length c, if c is the last bucket.
    cost_C = rows_C * each_C
    costs, before = [cost_C[-1]], []
    for _ in range(min(buckets.most, len(offered)) - 1):
        added_CC = (rows_C[None, :] - rows_C[:, None]) * each_C[None, :]
        total_CC = np.where(np.tri(len(offered), dtype=bool).T, cost_C[:, None] + added_CC, np.inf)
        before.append(total_CC.argmin(axis=0))
        cost_C = total_CC.min(axis=0)
        costs.append(cost_C[-1])
    number = next(i for i, cost in enumerate(costs) if cost <= costs[-1] * (1 + _TOLERATED))
    chosen = [len(offered) - 1]
    for previous_C in reversed(before[:number]):
        chosen.append(int(previous_C[chosen[-1]]))
    return tuple(sorted({offered[c] for c in chosen}))


# Batches that are formed together when several sets are mixed.
WINDOW = 128


class _Block(NamedTuple):
    """A block of the stream, in the order in which its rows are read; the same for all seeds.

    Row i is number ``positions[i]`` in the endless epochs of set ``sets[i]``, and its batch has at
    least the bucket ``buckets[i]``.
    """

    sets: np.ndarray
    positions: np.ndarray
    buckets: np.ndarray


class BucketPlan:
    """Endless shuffled epochs, split into batches of inputs of similar length.

    The examples of a set are assigned to buckets once, by length.  An epoch is a permutation of the
    set that is sorted by bucket and split into batches, which are then shuffled.  So every batch is
    a random draw from one bucket, and every epoch has every example once.

    The order of buckets is the same for every seed; the seed decides the order of examples within
    each bucket.  So the batches of all seeds have the same length at each step, and the batches of
    a seed do not depend on the other seeds.

    One set: every bucket has a whole number of batches; the longest inputs that remain join the
    next longer bucket.  The rest of an epoch after its last whole batch is from the shortest
    bucket, and so is the beginning of the next epoch, which completes this batch.

    Several sets: batches are formed within windows of ``WINDOW`` batches of the mixture, in which
    each set has its share of rows; the remainder of a bucket in a window completes a batch of the
    next longer bucket.

    All orders are hashes, so that any step can be computed without the steps before it.
    """

    def __init__(
        self,
        lengths: Sequence[np.ndarray],
        *,
        limit: int,
        batch_size: int,
        buckets: Buckets,
        rates: Sequence[float] = (),
        num_seeds: int = 1,
    ) -> None:
        """Assigns examples to buckets.

        Args:
          lengths: of the inputs of each set, in tokens.
          limit: longer inputs are truncated to it.
          batch_size: B.
          buckets: how the lengths of batches are chosen.
          rates: of the sets; default equal.
          num_seeds: the number of seeds that will be used, for the size of caches.
        """
        capped = [np.minimum(each, limit) for each in lengths]
        self._batch_size = batch_size
        self._sizes = [len(each) for each in capped]
        self._first = np.cumsum([0, *self._sizes])
        rates_S = np.asarray(rates or [1.0] * len(capped), np.float64)
        self._rates_S = rates_S / rates_S.sum()
        if len(capped) == 1:
            self._block_size = self._sizes[0]
            chosen, in_buckets = _whole_batches(capped[0], batch_size, buckets, limit)
            self._bucket_of = [in_buckets]
        else:
            self._block_size = WINDOW * batch_size
            weights = np.repeat(self._rates_S / self._sizes, self._sizes)
            chosen = buckets.choose(np.concatenate(capped), weights, limit=limit)
            self._bucket_of = [bucket_of(each, chosen) for each in capped]
        used = np.unique(np.concatenate(self._bucket_of))
        self.lengths = tuple(chosen[bucket] for bucket in used)
        self._bucket_of = [np.searchsorted(used, each) for each in self._bucket_of]
        # Examples by bucket, shortest first.
        self._ordered = [np.argsort(each, kind="stable") for each in self._bucket_of]
        # A step may extend into the next epoch or window.
        near = 2 * len(capped) + 2
        self._block = functools.lru_cache(maxsize=4)(self._make_block)
        self._pattern = functools.lru_cache(maxsize=near)(self._make_pattern)
        self._drawn = functools.lru_cache(maxsize=num_seeds * near)(self._draw)

    def length_for(self, step: int) -> int:
        """Returns the inputs' length at ``step``, for all seeds."""
        parts = self._parts(step)
        return self.lengths[max(int(block.buckets[rows].max()) for block, rows in parts)]

    def indices_for(self, step: int, seed: int) -> np.ndarray:
        """Returns [B] int64: examples, counted through the sets, that ``seed`` sees at ``step``."""
        parts = []
        for block, rows in self._parts(step):
            sets_B, positions_B = block.sets[rows], block.positions[rows]
            indices_B = np.empty(len(sets_B), np.int64)
            for number, size in enumerate(self._sizes):
                of_set_B = np.flatnonzero(sets_B == number)
                epochs, offsets = np.divmod(positions_B[of_set_B], size)
                for epoch in np.unique(epochs).tolist():
                    now = epochs == epoch
                    ranks = self._pattern(number, epoch)[offsets[now]]
                    indices_B[of_set_B[now]] = (
                        self._drawn(seed, number, epoch)[ranks] + self._first[number]
                    )
            parts.append(indices_B)
        return np.concatenate(parts)

    def _parts(self, step: int) -> list[tuple[_Block, slice]]:
        """Returns the rows of a step: slices of blocks."""
        start, stop = step * self._batch_size, (step + 1) * self._batch_size
        size = self._block_size
        return [
            (self._block(n), slice(max(start - n * size, 0), min(stop - n * size, size)))
            for n in range(start // size, (stop - 1) // size + 1)
        ]

    def _make_block(self, number: int) -> _Block:
        start, size = number * self._block_size, self._block_size
        begin_S, end_S = self._shares(start), self._shares(start + size)
        sets = np.repeat(np.arange(len(self._sizes)), end_S - begin_S)
        positions = np.concatenate(
            [np.arange(a, b) for a, b in zip(begin_S, end_S, strict=True)]
        ).astype(np.int64)
        buckets = np.empty(size, np.int64)
        for each, bucket_N in enumerate(self._bucket_of):
            of_set = np.flatnonzero(sets == each)
            epochs, offsets = np.divmod(positions[of_set], self._sizes[each])
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                ranks = self._pattern(each, epoch)[offsets[now]]
                buckets[of_set[now]] = bucket_N[self._ordered[each]][ranks]
        by_bucket = np.lexsort((_random(size, "rows", number), buckets))
        order, piece_of_row = self._cut(by_bucket, start, number)
        buckets = buckets[order]
        # The bucket of a batch is that of its longest row.
        longest = np.zeros(piece_of_row[-1] + 1, np.int64)
        np.maximum.at(longest, piece_of_row, buckets)
        return _Block(sets[order], positions[order], longest[piece_of_row])

    def _cut(self, by_bucket: np.ndarray, start: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows, shortest first, -> rows in the order of their batches, and the batch of each.

        The block may contain only a part of its first and its last batch.
        """
        size, width = self._block_size, self._batch_size
        head = min(-start % width, size)
        tail = (start + size) % width if size > head else 0
        whole = by_bucket[head + tail :].reshape(-1, width)
        whole = whole[np.argsort(_random(len(whole), "batches", number), kind="stable")]
        order = np.concatenate([by_bucket[:head], whole.ravel(), by_bucket[head : head + tail]])
        return order, (np.arange(size) + start) // width - start // width

    def _shares(self, rows: int) -> np.ndarray:
        """Returns [sets] int64: the number of rows of each set among the first ``rows``.

        Row i of a set is due at (i + 1/2) / rate, and the earliest are taken: Webster's method.
        """
        if len(self._sizes) == 1:
            return np.array([rows])
        sets = len(self._sizes)
        sure_S = np.maximum(np.floor(rows * self._rates_S).astype(np.int64) - sets, 0)
        open_SI = sure_S[:, None] + np.arange(3 * sets)
        due_SI = (open_SI + 0.5) / self._rates_S[:, None]
        of_set_SI = np.broadcast_to(np.arange(sets)[:, None], due_SI.shape)
        earliest = np.lexsort((of_set_SI.ravel(), due_SI.ravel()))[: rows - int(sure_S.sum())]
        return sure_S + np.bincount(of_set_SI.ravel()[earliest], minlength=sets)

    def _make_pattern(self, number: int, epoch: int) -> np.ndarray:
        """Position in an epoch -> rank of the example by bucket; the same for all seeds."""
        return np.argsort(_random(self._sizes[number], "pattern", number, epoch), kind="stable")

    def _draw(self, seed: int, number: int, epoch: int) -> np.ndarray:
        """Rank by bucket -> example; the examples of each bucket are shuffled."""
        ordered = self._ordered[number]
        keys = _random(len(ordered), "seed", seed, number, epoch)
        drawn = ordered[np.lexsort((keys, self._bucket_of[number][ordered]))]
        return drawn.astype(np.int32)  # one per seed, so worth being small


def _whole_batches(
    lengths_N: np.ndarray, batch_size: int, buckets: Buckets, limit: int
) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns bucket lengths, and [N] the bucket of each example.

    Buckets have whole numbers of batches.

    The first bucket also has the remainder of the set, and enough for the partial batches at both
    ends of an epoch.
    """
    order = np.argsort(lengths_N, kind="stable")
    spare = len(order) % batch_size
    first = spare + batch_size if spare else batch_size
    ends = np.arange(min(first, len(order)), len(order) + 1, batch_size)
    longest = lengths_N[order[ends - 1]]
    rows = np.diff(ends, prepend=0)
    lengths = buckets.choose(longest, rows, limit=limit)
    in_buckets = np.empty(len(order), np.int64)
    in_buckets[order] = np.repeat(bucket_of(longest, lengths), rows)
    return lengths, in_buckets


def _random(count: int, *name: str | int) -> np.ndarray:
    """Returns [count] uint64; the same for the same name, on any machine."""
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    seed = int.from_bytes(digest[:8], "big")
    indices = np.arange(count, dtype=np.uint64)
    return random_bits(1, seed=seed, purpose=0, indices_B=indices)[:, 0]
