"""Greedy decoding, and the decoding loop that it shares with sampling."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.typing import Array

# A pytree whose leaves have one entry per decoded row on axis 0; scalars are not changed.
Cache: TypeAlias = Any
# (tokens_N int32, position int32 scalar, cache) -> (logits_NV, cache).  The tokens are at
# ``position`` (the start token is at 0), and the logits predict the next token.
StepFn: TypeAlias = Callable[[Array, Array, Cache], tuple[Array, Cache]]
# (logits_NV float32, position) -> tokens_N int32
Choice: TypeAlias = Callable[[Array, Array], Array]

T5_IDS = TokenIds()


class Decoded(NamedTuple):
    """Decoded sequences, one per row.

    ``ids_NS`` (int32) is padded after the end-of-sequence token.  ``scores_N`` (float32) sums the
    model's log-probabilities over the ``lengths_N`` generated tokens, including the end.
    """

    ids_NS: Array
    scores_N: Array
    lengths_N: Array


def greedy(
    step: StepFn,
    cache: Cache,
    *,
    num_rows: int,
    max_length: int,
    token_ids: TokenIds = T5_IDS,
    processors: LogitsProcessors | None = None,
) -> Decoded:
    """Generates the most probable token at every step; the lowest id wins ties.

    Generates at most ``max_length`` tokens per row.  Stops when every row has ended.
    """

    def most_probable(logits_NV: Array, position: Array) -> Array:
        return jnp.argmax(logits_NV, axis=-1).astype(jnp.int32)

    return decode_loop(
        step,
        cache,
        choose=most_probable,
        num_rows=num_rows,
        max_length=max_length,
        token_ids=token_ids,
        processors=processors,
    )


class _Loop(NamedTuple):
    position: Array
    tokens_N: Array
    done_N: Array
    decoded: Decoded
    cache: Cache


def decode_loop(
    step: StepFn,
    cache: Cache,
    *,
    choose: Choice,
    num_rows: int,
    max_length: int,
    token_ids: TokenIds,
    processors: LogitsProcessors | None = None,
) -> Decoded:
    """Runs the step function on the tokens that ``choose`` picks until every row has ended.

    ``processors`` change the logits that ``choose`` sees.  Scores use the model's unchanged logits.
    """
    check_max_length(max_length)

    def unfinished(loop: _Loop) -> Array:
        return (loop.position < max_length) & ~jnp.all(loop.done_N)

    def write_one(loop: _Loop) -> _Loop:
        logits_NV, cache = step(loop.tokens_N, loop.position, loop.cache)
        logits_NV = logits_NV.astype(jnp.float32)
        ids_NS, scores_N, lengths_N = loop.decoded
        offered_NV = logits_NV
        if processors is not None:
            offered_NV = processors(logits_NV, ids_NS, loop.position, token_ids=token_ids)
        chosen_N = choose(offered_NV, loop.position)
        log_probs_N = jnp.take_along_axis(logits_NV, chosen_N[:, None], axis=-1)[:, 0]
        log_probs_N -= jax.nn.logsumexp(logits_NV, axis=-1)

        tokens_N = jnp.where(loop.done_N, token_ids.pad, chosen_N)
        decoded = Decoded(
            ids_NS=lax.dynamic_update_index_in_dim(ids_NS, tokens_N, loop.position, axis=1),
            scores_N=jnp.where(loop.done_N, scores_N, scores_N + log_probs_N),
            lengths_N=jnp.where(loop.done_N, lengths_N, lengths_N + 1),
        )
        done_N = loop.done_N | ends(chosen_N, token_ids)
        return _Loop(loop.position + 1, tokens_N, done_N, decoded, cache)

    start = _Loop(
        position=jnp.int32(0),
        tokens_N=jnp.full((num_rows,), token_ids.start, jnp.int32),
        done_N=jnp.zeros((num_rows,), bool),
        decoded=Decoded(
            ids_NS=jnp.full((num_rows, max_length), token_ids.pad, jnp.int32),
            scores_N=jnp.zeros((num_rows,), jnp.float32),
            lengths_N=jnp.zeros((num_rows,), jnp.int32),
        ),
        cache=cache,
    )
    return lax.while_loop(unfinished, write_one, start).decoded


def ends(tokens: Array, token_ids: TokenIds) -> Array:
    """Returns whether each token ends a sequence."""
    return jnp.isin(tokens, jnp.asarray(token_ids.all_eos))


def check_max_length(max_length: int) -> None:
    """Raises UserError unless at least one token may be generated."""
    if max_length < 1:
        raise UserError(f"max_length is {max_length}: it must be 1 or more tokens")
