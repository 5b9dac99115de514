"""In how many parts a batch is computed, one after another, for the same gradient."""

from collections.abc import Callable
from typing import TypeAlias

from prompt_tuning_jax.models.config import T5Config

# (rows, positions of the encoder in each) -> parts, which divide the rows.
PartsOf: TypeAlias = Callable[[int, int], int]

# Of the largest activation.  On two cores with 2 MB each and 32 MB shared a step of the small size
# took 1.09 s with 20 MB, 1.03 with 10, 0.93 with 5 and 0.95 with 2.5 in bfloat16, and in float32
# 1.60 with 20 and 1.35 with 5: beyond the cache all that is computed goes through memory.
_CACHED_BYTES = 6_000_000
_FLOAT32_BYTES = 4


def undivided(rows: int, length: int) -> int:
    """One part."""
    return 1


def parts_in_cache(config: T5Config, rows: int, length: int) -> int:
    """The fewest equal parts of which a CPU holds the largest activation in its cache."""
    widest = max(config.mlp_dim, config.embed_dim, config.num_heads * length)
    row_bytes = length * widest * _FLOAT32_BYTES
    for parts in range(1, rows):
        if rows % parts == 0 and rows // parts * row_bytes <= _CACHED_BYTES:
            return parts
    return rows
