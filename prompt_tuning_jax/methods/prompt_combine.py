"""Where the prompt stands among the embedded input, and who sees it."""

from typing import Literal

import jax.numpy as jnp

from prompt_tuning_jax.models.injections import EncoderInput
from prompt_tuning_jax.models.t5.model import prepend
from prompt_tuning_jax.typing import Array, HostArray

Placement = Literal["prefix", "after_first", "before_eos"]


def combine(
    prompt: Array,
    source: EncoderInput,
    tokens_BT: Array | HostArray,
    *,
    placement: Placement,
    eos_id: int = 1,
) -> tuple[EncoderInput, Array]:
    """The prompt ``[P, D]`` or ``[B, P, D]`` put into the input, and where it is ``[B, U]``.

    ``prefix`` puts it before everything, ``after_first`` behind the first token, ``before_eos``
    behind the last real token but before the end-of-sequence token (where truncation has taken
    that, behind the last).  Padding stays at the end.
    """
    batch, length = tokens_BT.shape
    joined = prepend(prompt, source)
    prompt_length = joined.mask_BU.shape[1] - length
    if placement == "prefix":
        start_B = jnp.zeros(batch, jnp.int32)
    elif placement == "after_first":
        start_B = jnp.ones(batch, jnp.int32)
    else:
        real_B = jnp.sum(source.mask_BU, axis=1)
        at_B1 = jnp.maximum(real_B - 1, 0)[:, None]
        last_B = jnp.take_along_axis(jnp.asarray(tokens_BT), at_B1, axis=1)[:, 0]
        start_B = real_B - (last_B == eos_id)
    positions_U = jnp.arange(prompt_length + length)
    offset_BU = positions_U[None, :] - start_B[:, None]
    is_prompt_BU = (offset_BU >= 0) & (offset_BU < prompt_length)
    if placement == "prefix":
        return joined, is_prompt_BU
    # joined holds the prompt first, then the input: say for each position where it comes from.
    from_BU = jnp.where(
        is_prompt_BU,
        offset_BU,
        jnp.where(offset_BU < 0, prompt_length + positions_U, positions_U),
    )
    moved = EncoderInput(
        embeddings_BUD=jnp.take_along_axis(joined.embeddings_BUD, from_BU[:, :, None], axis=1),
        mask_BU=jnp.take_along_axis(joined.mask_BU, from_BU, axis=1),
    )
    return moved, is_prompt_BU


def attention_mask(
    is_prompt_BU: Array,
    *,
    prompt_to_input: bool,
    prompt_to_prompt: Literal["all", "causal", "none"],
    input_to_prompt: bool,
) -> Array | None:
    """Who may look at whom, ``[B, U, U]`` (query, key); None where all may.

    A prompt position always sees itself.
    """
    if prompt_to_input and prompt_to_prompt == "all" and input_to_prompt:
        return None
    query_BU1, key_B1U = is_prompt_BU[:, :, None], is_prompt_BU[:, None, :]
    positions_U = jnp.arange(is_prompt_BU.shape[1])
    if prompt_to_prompt == "all":
        among_prompt = jnp.ones((1, 1), bool)
    elif prompt_to_prompt == "causal":
        among_prompt = positions_U[None, :] <= positions_U[:, None]
    else:
        among_prompt = positions_U[None, :] == positions_U[:, None]
    from_prompt_BUU = jnp.where(key_B1U, among_prompt[None], prompt_to_input)
    from_input_BUU = ~key_B1U | input_to_prompt
    return jnp.where(query_BU1, from_prompt_BUU, from_input_BUU)
