"""How much of a step is computed at once: how many members, and how much of each one's batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from prompt_tuning_jax.models.t5.config import T5Config

# Of the largest activation.  On two cores with 2 MB each and 32 MB shared a step of the small size
# took 1.09 s with 20 MB, 1.03 with 10, 0.93 with 5 and 0.95 with 2.5 in bfloat16, and in float32
# 1.60 with 20 and 1.35 with 5: beyond the cache all that is computed goes through memory.
_CACHED_BYTES = 6_000_000
_FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Microbatching:
    """What is computed one after another, for the same result.

    ``parts`` is asked for by number.  With a ``config`` it is left to the size of a cache that
    should hold the largest activation, to whose rows a method adds ``prompt_positions`` positions.
    With neither all is computed at once.
    """

    parts: int = 1
    config: T5Config | None = None
    prompt_positions: int = 0

    def num_microbatches(self, rows: int, length: int) -> int:
        """The equal parts of a member's batch; the fewest that fit, where that is the question.

        They depend on nothing but the member's own batch: each part has its own dropout.
        """
        if self.config is None:
            return self.parts
        most = self._rows_in_cache(length)
        fitting = (parts for parts in range(1, rows) if rows % parts == 0 and rows // parts <= most)
        return next(fitting, rows)

    def members_at_once(self, members: int, rows: int, length: int) -> int:
        """How many members together; they divide ``members``."""
        if self.config is None:
            return members
        most = self._rows_in_cache(length) // rows
        return max(n for n in range(1, members + 1) if members % n == 0 and (n == 1 or n <= most))

    def rounds(self, members: int, rows: int, length: int) -> int:
        """How often the program's loops are gone through in a step."""
        groups = members // self.members_at_once(members, rows, length)
        return groups * self.num_microbatches(rows, length)

    def _rows_in_cache(self, length: int) -> int:
        assert self.config is not None
        length += self.prompt_positions
        config = self.config
        widest = max(config.mlp_dim, config.embed_dim, config.num_heads * length)
        return _CACHED_BYTES // (length * widest * _FLOAT32_BYTES)


NO_MICROBATCHING = Microbatching()


def map_members(function: Callable[..., Any], at_once: int, *arrays: Any, members: int) -> Any:
    """``function`` of each member's share of the arrays, which have a leading axis E.

    ``at_once`` members together and the groups one after another.
    """
    if at_once >= members:
        return jax.vmap(function, axis_size=members)(*arrays)
    batch_size = at_once if at_once > 1 else None
    return jax.lax.map(lambda own: function(*own), arrays, batch_size=batch_size)
