"""Sampling with temperature, top-k and top-p (nucleus) filtering."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.inference.decoding.greedy import T5_IDS, Cache, Decoded, StepFn, decode_loop
from prompt_tuning_jax.inference.decoding.logits_processors import LogitsProcessors
from prompt_tuning_jax.models.config import TokenIds
from prompt_tuning_jax.typing import Array


def sample(
    step: StepFn,
    cache: Cache,
    *,
    key: Array,
    num_rows: int,
    max_length: int,
    temperature: float | Array = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    token_ids: TokenIds = T5_IDS,
    processors: LogitsProcessors | None = None,
) -> Decoded:
    """Samples every token from the model's distribution, after temperature, top-k and top-p.

    ``key`` is a single key, which is folded with each row number, or an array of ``num_rows`` keys
    (typed, or raw uint32 pairs).  A row's text depends only on its key and logits, so rows with
    separate keys may be batched in any way.  ``temperature`` is one number or one per row; rows at
    0 are greedy.  ``top_k`` (0 keeps all tokens) is applied before ``top_p``, which keeps the
    smallest set of tokens whose probabilities reach it (Holtzman et al. 2020).  Both are static and
    are applied after the temperature.  Scores are the model's unchanged log-probabilities.
    """
    if isinstance(temperature, int | float) and not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}: it must be 0 (greedy) or more")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}: it must be 0 (no cut) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: it must be above 0 and at most 1 (no cut)")
    keys_N = row_keys(key, num_rows)
    temperature_N = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (num_rows,))

    def draw(logits_V: Array, key: Array, temperature: Array) -> Array:
        values, tokens = _candidates(
            logits_V / jnp.where(temperature > 0, temperature, 1.0), top_k=top_k, top_p=top_p
        )
        drawn = tokens[jax.random.categorical(key, values)]
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)

    def choose(logits_NV: Array, position: Array) -> Array:
        keys_now_N = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_N, position)
        return jax.vmap(draw)(logits_NV, keys_now_N, temperature_N)

    return decode_loop(
        step,
        cache,
        choose=choose,
        num_rows=num_rows,
        max_length=max_length,
        token_ids=token_ids,
        processors=processors,
    )


def row_keys(key: Array, num_rows: int) -> Array:
    """Returns one key per row: the given keys, or a single key folded with each row number.

    Folding rather than splitting gives row i the same key in batches of any size.
    """
    rank_of_one_key = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1
    if key.ndim == rank_of_one_key:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_rows))
    if key.ndim != rank_of_one_key + 1 or key.shape[0] != num_rows:
        raise ValueError(f"key has shape {key.shape}: expected one key or {num_rows} of them")
    return key


def _candidates(logits_V: Array, *, top_k: int, top_p: float) -> tuple[Array, Array]:
    """Returns the logits that may be sampled and their token ids.

    Exactly ``top_k`` tokens are kept, even among ties.
    """
    vocab_size = logits_V.shape[0]
    if not top_k and top_p == 1:
        return logits_V, jnp.arange(vocab_size)
    values, tokens = lax.top_k(logits_V, min(top_k or vocab_size, vocab_size))
    if top_p < 1:
        probs = jax.nn.softmax(values)
        # A token is kept if those before it have not reached top_p, so the first is always kept.
        reached_before = jnp.cumsum(probs) - probs
        values = jnp.where(reached_before < top_p, values, -jnp.inf)
    return values, tokens
