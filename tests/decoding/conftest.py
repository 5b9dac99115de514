"""A toy model whose every sequence can be listed."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EOS = 1
VOCAB = 5


@dataclasses.dataclass(frozen=True)
class Toy:
    """``log_probs[example, position, token before last, last token]`` is a distribution.

    The token before last lives in the cache, so a cache that does not follow its row shows.
    """

    log_probs: np.ndarray
    steps: list[int] = dataclasses.field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return self.log_probs.shape[0]

    @property
    def max_length(self) -> int:
        return self.log_probs.shape[1]

    def cache(self, rows: Any = None) -> dict[str, jax.Array]:
        rows = jnp.arange(self.num_rows) if rows is None else jnp.asarray(rows)
        return {
            "example": rows,
            "before": jnp.zeros((len(rows), 1), jnp.int32),
            "all": jnp.ones(()),
        }

    def step(self, tokens_N: jax.Array, position: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        jax.debug.callback(lambda at: self.steps.append(int(at)), position)
        table = jnp.asarray(self.log_probs)
        logits_NV = table[cache["example"], position, cache["before"][:, 0], tokens_N]
        # Step functions return logits, not log-probabilities: shift them.
        return logits_NV + 3.0, {**cache, "before": tokens_N[:, None]}

    def next_log_probs(self, example: int, prefix: tuple[int, ...]) -> np.ndarray:
        before, last = (0, 0, *prefix)[-2:]
        return self.log_probs[example, len(prefix), before, last]

    def log_prob(self, example: int, ids: tuple[int, ...]) -> float:
        return sum(float(self.next_log_probs(example, ids[:i])[t]) for i, t in enumerate(ids))

    def sequences(self) -> Iterator[tuple[int, ...]]:
        """All that can be written: ended by EOS, or cut off at the maximum length."""
        others = [t for t in range(VOCAB) if t != EOS]
        for length in range(self.max_length):
            for prefix in itertools.product(others, repeat=length):
                yield (*prefix, EOS)
        yield from itertools.product(others, repeat=self.max_length)

    def steps_taken(self) -> int:
        jax.effects_barrier()
        return len(self.steps)


@pytest.fixture
def make_toy() -> Callable[..., Toy]:
    def make(
        seed: int = 0,
        *,
        num_rows: int = 3,
        max_length: int = 3,
        eos: float | list[float] = 0.0,
        padding: float = 0.0,
    ) -> Toy:
        """``eos`` (of each row, if a list) and ``padding`` are added to those tokens' logits."""
        shape = (num_rows, max_length, VOCAB, VOCAB, VOCAB)
        logits = 1.5 * np.random.default_rng(seed).normal(size=shape)
        logits[..., EOS] += np.reshape(eos, (-1, 1, 1, 1))
        logits[..., 0] += padding
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return Toy(logits.astype(np.float32))

    return make
