"""Which examples and which length a step has, where batches are formed from length buckets."""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prompt_tuning_jax.data.batching.buckets import Buckets, bucket_of
from prompt_tuning_jax.data.random_draws import random_bits

# Batches that are formed together where several sets are mixed.
WINDOW = 128


class _Block(NamedTuple):
    """A stretch of the stream, put in the order in which its rows are read; the same for all seeds.

    Row i is number ``positions[i]`` of the endless epochs of set ``sets[i]``, and its batch has at
    least the bucket ``buckets[i]``.
    """

    sets: np.ndarray
    positions: np.ndarray
    buckets: np.ndarray


class BucketPlan:
    """Endless shuffled epochs cut into batches of inputs that are about equally long.

    A set's examples are put in buckets once, by length.  An epoch is the set in a new order; it is
    sorted by bucket, cut into batches, and the batches are shuffled.  So every batch is a random
    draw from one bucket, every epoch holds every example once, and all examples count the same.

    The order of buckets is the same for every seed, and a seed decides which of a bucket's examples
    come when: then the batches of all seeds have one length at each step, and a seed's batches are
    the same whoever is beside it.

    One set: the buckets hold whole batches each, the longest inputs that are left over being with
    the next longer bucket.  What is left of an epoch behind its last batch is from the shortest
    bucket, and so is the beginning of the next epoch that fills up this batch.

    Several sets: batches are formed within windows of ``WINDOW`` batches of the mixture instead of
    epochs, in which each set has its share of rows; what is left over of a bucket in a window
    fills up a batch of the next longer one.

    Everything is a hash of its names, and any step can be asked for without those before it.
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
        """Put examples in buckets.

        Args:
          lengths: of the inputs of each set, in tokens.
          limit: what longer inputs are cut to.
          batch_size: B.
          buckets: how the lengths of batches are chosen.
          rates: of the sets, all the same unless given.
          num_seeds: how many seeds will be asked for, for what is worth keeping in memory.
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
        # Examples by bucket, the shortest first.
        self._ordered = [np.argsort(each, kind="stable") for each in self._bucket_of]
        # A step may reach into the next epoch, or window.
        near = 2 * len(capped) + 2
        self._block = functools.lru_cache(maxsize=4)(self._make_block)
        self._pattern = functools.lru_cache(maxsize=near)(self._make_pattern)
        self._drawn = functools.lru_cache(maxsize=num_seeds * near)(self._draw)

    def length_for(self, step: int) -> int:
        """The inputs' length at ``step``, for all seeds."""
        parts = self._parts(step)
        return self.lengths[max(int(block.buckets[rows].max()) for block, rows in parts)]

    def indices_for(self, step: int, seed: int) -> np.ndarray:
        """[B] int64: examples, counted through the sets, that ``seed`` sees at ``step``."""
        found = []
        for block, rows in self._parts(step):
            sets_B, positions_B = block.sets[rows], block.positions[rows]
            indices_B = np.empty(len(sets_B), np.int64)
            for number, size in enumerate(self._sizes):
                of_set_B = np.flatnonzero(sets_B == number)
                epochs, places = np.divmod(positions_B[of_set_B], size)
                for epoch in np.unique(epochs).tolist():
                    now = epochs == epoch
                    ranks = self._pattern(number, epoch)[places[now]]
                    indices_B[of_set_B[now]] = (
                        self._drawn(seed, number, epoch)[ranks] + self._first[number]
                    )
            found.append(indices_B)
        return np.concatenate(found)

    def _parts(self, step: int) -> list[tuple[_Block, slice]]:
        """The rows of a step: stretches of blocks."""
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
            epochs, places = np.divmod(positions[of_set], self._sizes[each])
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                ranks = self._pattern(each, epoch)[places[now]]
                buckets[of_set[now]] = bucket_N[self._ordered[each]][ranks]
        by_bucket = np.lexsort((_random(size, "rows", number), buckets))
        order, piece_of_row = self._cut(by_bucket, start, number)
        buckets = buckets[order]
        # A batch has the bucket of its longest row.
        longest = np.zeros(piece_of_row[-1] + 1, np.int64)
        np.maximum.at(longest, piece_of_row, buckets)
        return _Block(sets[order], positions[order], longest[piece_of_row])

    def _cut(self, by_bucket: np.ndarray, start: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows, shortest first, -> rows in the order of their batches, and each one's batch.

        The batches that the block has only a part of are its first and its last.
        """
        size, width = self._block_size, self._batch_size
        head = min(-start % width, size)
        tail = (start + size) % width if size > head else 0
        whole = by_bucket[head + tail :].reshape(-1, width)
        whole = whole[np.argsort(_random(len(whole), "batches", number), kind="stable")]
        order = np.concatenate([by_bucket[:head], whole.ravel(), by_bucket[head : head + tail]])
        return order, (np.arange(size) + start) // width - start // width

    def _shares(self, rows: int) -> np.ndarray:
        """[sets] int64: how many of the first ``rows`` rows each set has.

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
        """Place in an epoch -> rank among the set's examples by bucket; the same for all seeds."""
        return np.argsort(_random(self._sizes[number], "pattern", number, epoch), kind="stable")

    def _draw(self, seed: int, number: int, epoch: int) -> np.ndarray:
        """Rank by bucket -> example: the examples of each bucket shuffled."""
        ordered = self._ordered[number]
        keys = _random(len(ordered), "seed", seed, number, epoch)
        drawn = ordered[np.lexsort((keys, self._bucket_of[number][ordered]))]
        return drawn.astype(np.int32)  # there is one for each seed


def _whole_batches(
    lengths_N: np.ndarray, batch_size: int, buckets: Buckets, limit: int
) -> tuple[tuple[int, ...], np.ndarray]:
    """Lengths, and [N] the bucket of each example, of whole batches each.

    The first has more where the set is no whole number of batches, and enough for the parts of
    batches at both ends of an epoch.
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
    """[count] uint64; the same for the same name, on any machine."""
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    seed = int.from_bytes(digest[:8], "big")
    indices = np.arange(count, dtype=np.uint64)
    return random_bits(1, seed=seed, purpose=0, indices_B=indices)[:, 0]
