"""The few input lengths that batches are padded to, chosen so that little of them is padding.

N inputs or batches, C lengths to choose from.
"""

from dataclasses import dataclass

import numpy as np

from prompt_tuning_jax.config.field_syntax import parse_buckets

# Of the positions that the most buckets compute: what fewer, each a shape less to compile, may add.
_TOLERATED = 0.03
# Lengths that hardware likes, and none so short that its batches cost what the next one's do.
_MULTIPLE, _SHORTEST = 8, 16


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """How input lengths are chosen: given ones, at most so many automatic ones, or a fixed one.

    Attributes:
      lengths: these and no others, shortest first; the limit is added where inputs are longer.
      most: choose at most so many for the data, where ``lengths`` is empty; 0: the limit alone.
      beside: positions that are computed with every input whatever its length, as a prompt's.
    """

    lengths: tuple[int, ...] = ()
    most: int = 0
    beside: int = 0

    @classmethod
    def from_text(cls, text: str, *, beside: int = 0) -> "Buckets":
        """The choice that ``data.buckets`` describes; UserError for an invalid text."""
        lengths, most = parse_buckets(text)
        return cls(lengths=lengths, most=most, beside=beside) if lengths or most else FIXED

    def choose(
        self, lengths_N: np.ndarray, weights_N: np.ndarray | None = None, *, limit: int
    ) -> tuple[int, ...]:
        """Lengths, shortest first, of which the last holds the longest of ``lengths_N``.

        ``lengths_N`` are those of inputs, or of each batch's longest; ``weights_N`` says how many
        rows each stands for.  Longer ones than ``limit`` are cut to it.
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
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on, from ``least``, that holds it.

    What is padded to these alone has few shapes, and a third of it at most is padding.
    """
    size = least
    while size < number:
        # From a power of two to one and a half of it, from there to the next.
        size = size * 4 // 3 if size % 3 == 0 else max(size * 3 // 2, size + 1)
    return size


def few_lengths(limit: int) -> Buckets:
    """Lengths that are the same whatever is padded to them."""
    lengths = [_SHORTEST]
    while lengths[-1] < limit:
        lengths.append(padded_size(lengths[-1] + 1, least=_SHORTEST))
    return Buckets(lengths=tuple(length for length in lengths if length < limit) or (limit,))


def bucket_of(lengths_N: np.ndarray, bucket_lengths: tuple[int, ...]) -> np.ndarray:
    """[N] int64: for each length the first bucket that holds it; cut ones are in the last."""
    found = np.searchsorted(np.asarray(bucket_lengths), lengths_N)
    return np.minimum(found, len(bucket_lengths) - 1)


def _choose(
    lengths_N: np.ndarray, weights_N: np.ndarray, limit: int, buckets: Buckets
) -> tuple[int, ...]:
    """The lengths with the fewest positions in all, by dynamic programming over the last one."""
    longest = max(_SHORTEST, -(-int(lengths_N.max()) // _MULTIPLE) * _MULTIPLE)
    offered = [*range(_SHORTEST, min(limit, longest), _MULTIPLE), min(limit, longest)]
    lengths_C = np.asarray(offered)
    rows_C = np.bincount(
        bucket_of(lengths_N, tuple(offered)), weights=weights_N, minlength=len(offered)
    ).cumsum()
    each_C = lengths_C + buckets.beside
    # cost_C[c]: of all rows up to length c, in buckets of which c is the last.
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
