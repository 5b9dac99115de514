"""Logits processors: minimum length, repetition penalty, no repeated n-grams.

They match the logits processors of the same names in transformers, where an encoder-decoder's start
token also counts as generated.  The input of a decoder-only model does not count here.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from prompt_tuning_jax.config.field_syntax import logits_processor_errors
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LogitsProcessors:
    """Changes the scores of the next token.

    Each field is one number for all rows, or one per row ``[N]``.  The fields are traced, so
    different values share one compiled program.

    Attributes:
      min_length: the minimum number of tokens, including the end.
      repetition_penalty: divides the positive scores and multiplies the negative scores of tokens
        that have been generated (Keskar et al. 2019); 1 applies no penalty.
      no_repeat_ngram_size: if n > 0, no sequence of n tokens is generated twice.
    """

    min_length: Any = 0
    repetition_penalty: Any = 1.0
    no_repeat_ngram_size: Any = 0

    def __call__(
        self, scores_NV: Array, ids_NS: Array, position: Array, *, token_ids: TokenIds
    ) -> Array:
        """Returns the scores for the token at ``position`` (a number, or ``[N]``) of ``ids_NS``.

        Scores are logits or log-probabilities; tokens that are not allowed get -inf.
        """
        used = (
            jnp.any(jnp.asarray(self.repetition_penalty) != 1)
            | jnp.any(jnp.asarray(self.no_repeat_ngram_size) > 0)
            | jnp.any(jnp.asarray(self.min_length) > 0)
        )

        def processed(scores_NV: Array) -> Array:
            return self._processed(scores_NV, ids_NS, position, token_ids=token_ids)

        # Skips the work if no row uses a processor, as in most batches of a server.
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
        # The start token, then the generated tokens: the first ``position + 1`` of L = S + 1.
        history_NL = jnp.pad(ids_NS, ((0, 0), (1, 0)), constant_values=token_ids.start)
        written_NL = jnp.arange(history_NL.shape[1])[None, :] <= position_N[:, None]

        def marked(of_token_NL: Array) -> Array:
            """Returns ``[N, V]``: whether each vocabulary token is marked in the history."""
            # A model without a start token has a -1 there.
            of_token_NL &= history_NL >= 0
            history = jnp.clip(history_NL, 0, vocabulary - 1)
            of_row = jnp.arange(rows)[:, None]
            return jnp.zeros((rows, vocabulary), bool).at[of_row, history].max(of_token_NL)

        def penalized(scores_NV: Array) -> Array:
            changed_NV = jnp.where(scores_NV < 0, scores_NV * penalty_N1, scores_NV / penalty_N1)
            return jnp.where(marked(written_NL), changed_NV, scores_NV)

        def without_repeats(scores_NV: Array) -> Array:
            repeats_NL = _completes_ngram(history_NL, position_N, ngram_N) & written_NL
            return jnp.where(marked(repeats_NL), -jnp.inf, scores_NV)

        scores_NV = without_repeats(penalized(scores_NV))
        too_short_N = position_N + 1 < shortest_N
        eos = jnp.asarray(token_ids.all_eos)
        at_end_NE = jnp.where(too_short_N[:, None], -jnp.inf, scores_NV[:, eos])
        return scores_NV.at[:, eos].set(at_end_NE)

    def repeated(self, times: int) -> "LogitsProcessors":
        """Repeats the fields for ``times`` as many rows, with the copies of a row adjacent."""
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
    """Returns the processors, or None if no option is set.

    Raises UserError for an invalid option; ``prefix`` precedes option names in the message.
    """
    for complaint in logits_processor_errors(
        min_length=min_length,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        max_length=max_length,
    ):
        raise UserError(prefix + complaint)
    if not min_length and repetition_penalty == 1 and not no_repeat_ngram_size:
        return None
    # Arrays, because each new Python number would trigger a compilation.
    return LogitsProcessors(
        min_length=jnp.int32(min_length),
        repetition_penalty=jnp.float32(repetition_penalty),
        no_repeat_ngram_size=jnp.int32(no_repeat_ngram_size),
    )


def _per_row(value: Any, rows: int, dtype: Any) -> Array:
    return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))


def _completes_ngram(history_NL: Array, position_N: Array, ngram_N: Array) -> Array:
    """Returns ``[N, L]``: whether the token at each place, if next, would repeat an n-gram.

    It would if the n - 1 tokens before that place equal the last n - 1 tokens of the history.
    """
    length = history_NL.shape[1]

    def of_row(history_L: Array, last: Array, ngram: Array) -> Array:
        places_L = jnp.arange(length)
        ngram = jnp.where(ngram > length, 0, ngram)  # none is that long, and each step takes time

        def longer(back: Array, equal_L: Array) -> Array:
            """Extends the comparison by one token further back."""
            here_L = jnp.roll(history_L, back)  # at place i, the token ``back`` places earlier
            same_L = (places_L >= back) & (here_L == history_L[last + 1 - back])
            return equal_L & same_L

        # The end of the history is not an earlier occurrence, because no token follows it.
        return lax.fori_loop(1, ngram, longer, (ngram > 0) & (places_L <= last))

    return jax.vmap(of_row)(history_NL, position_N, ngram_N)
