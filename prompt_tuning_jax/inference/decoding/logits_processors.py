"""Changes the next token's scores: minimum length, repetition penalty, no repeated n-grams.

As the logits processors of transformers of the same names; what has been written counts from the
start token on, as there.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prompt_tuning_jax.config.field_syntax import logits_processor_errors
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.t5.config import TokenIds
from prompt_tuning_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LogitsProcessors:
    """One number each for all rows, or one per row ``[N]``; traced, so that values share a program.

    ``min_length`` is in tokens, the end included; ``repetition_penalty`` divides the positive and
    multiplies the negative scores of tokens that have been written (1: none; Keskar et al. 2019);
    with ``no_repeat_ngram_size`` n > 0 no n tokens in a row are written twice.
    """

    min_length: Any = 0
    repetition_penalty: Any = 1.0
    no_repeat_ngram_size: Any = 0

    def __call__(
        self, scores_NV: Array, ids_NS: Array, position: Array, *, token_ids: TokenIds
    ) -> Array:
        """The scores for the token that goes to ``position`` (a number, or ``[N]``) of ``ids``.

        Scores are logits or log-probabilities; what may not be written is at -inf.
        """
        used = (
            jnp.any(jnp.asarray(self.repetition_penalty) != 1)
            | jnp.any(jnp.asarray(self.no_repeat_ngram_size) > 0)
            | jnp.any(jnp.asarray(self.min_length) > 0)
        )

        def processed(scores_NV: Array) -> Array:
            return self._processed(scores_NV, ids_NS, position, token_ids=token_ids)

        # Rows that ask for nothing, as most of a server's, cost nothing.
        changed_NV: Array = lax.cond(used, processed, lambda scores_NV: scores_NV, scores_NV)
        return changed_NV

    def _processed(
        self, scores_NV: Array, ids_NS: Array, position: Array, *, token_ids: TokenIds
    ) -> Array:
        rows, vocabulary = scores_NV.shape
        position_N = jnp.broadcast_to(jnp.asarray(position, jnp.int32), (rows,))
        penalty_N1 = _per_row(self.repetition_penalty, rows, jnp.float32)[:, None]
        ngram_N = _per_row(self.no_repeat_ngram_size, rows, jnp.int32)
        shortest_N = _per_row(self.min_length, rows, jnp.int32)
        # The start token, then what has been written: the first ``position + 1`` of L = S + 1.
        history_NL = jnp.pad(ids_NS, ((0, 0), (1, 0)), constant_values=token_ids.start)
        written_NL = jnp.arange(history_NL.shape[1])[None, :] <= position_N[:, None]

        def marked(of_token_NL: Array) -> Array:
            """``[N, V]``: which tokens of the history are marked."""
            history = jnp.clip(history_NL, 0, vocabulary - 1)
            of_row = jnp.arange(rows)[:, None]
            return jnp.zeros((rows, vocabulary), bool).at[of_row, history].max(of_token_NL)

        def penalised(scores_NV: Array) -> Array:
            changed_NV = jnp.where(scores_NV < 0, scores_NV * penalty_N1, scores_NV / penalty_N1)
            return jnp.where(marked(written_NL), changed_NV, scores_NV)

        def without_repeats(scores_NV: Array) -> Array:
            repeats_NL = _completes_ngram(history_NL, position_N, ngram_N) & written_NL
            return jnp.where(marked(repeats_NL), -jnp.inf, scores_NV)

        scores_NV = without_repeats(penalised(scores_NV))
        too_short_N = position_N + 1 < shortest_N
        at_end_N = jnp.where(too_short_N, -jnp.inf, scores_NV[:, token_ids.eos])
        return scores_NV.at[:, token_ids.eos].set(at_end_N)

    def repeated(self, times: int) -> "LogitsProcessors":
        """For so many times the rows, those of one standing side by side."""
        return jax.tree.map(
            lambda x: jnp.repeat(jnp.asarray(x), times, axis=0) if jnp.ndim(x) else x, self
        )


def logits_processors(
    *,
    min_length: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    max_length: int,
    prefix: str = "",
) -> LogitsProcessors | None:
    """The processors asked for, None where none is; ``prefix`` goes before names in UserErrors."""
    for complaint in logits_processor_errors(
        min_length=min_length,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        max_length=max_length,
    ):
        raise UserError(prefix + complaint)
    if not min_length and repetition_penalty == 1 and not no_repeat_ngram_size:
        return None
    # Arrays, or every new value would be compiled anew.
    return LogitsProcessors(
        min_length=jnp.int32(min_length),
        repetition_penalty=jnp.float32(repetition_penalty),
        no_repeat_ngram_size=jnp.int32(no_repeat_ngram_size),
    )


def _per_row(value: Any, rows: int, dtype: Any) -> Array:
    return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))


def _completes_ngram(history_NL: Array, position_N: Array, ngram_N: Array) -> Array:
    """``[N, L]``: whether the token at this place would complete an n-gram a second time.

    It would where the n - 1 tokens before it are the last n - 1 of the history.
    """
    length = history_NL.shape[1]

    def of_row(history_L: Array, last: Array, ngram: Array) -> Array:
        places_L = jnp.arange(length)

        def longer(back: Array, equal_L: Array) -> Array:
            """Equal so far, and so at one token further back."""
            here_L = jnp.roll(history_L, back)  # at place i, what is ``back`` before it
            same_L = (places_L >= back) & (here_L == history_L[last + 1 - back])
            return equal_L & same_L

        # The history's end itself is no earlier occurrence, since nothing follows it.
        return lax.fori_loop(1, ngram, longer, (ngram > 0) & (places_L <= last))

    return jax.vmap(of_row)(history_NL, position_N, ngram_N)
