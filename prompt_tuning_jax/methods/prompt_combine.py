"""Placement of the prompt in the embedded input, and its attention mask."""

from typing import Literal

import jax.numpy as jnp

from prompt_tuning_jax.config.methods import PLACEMENTS, Placement
from prompt_tuning_jax.models import base
from prompt_tuning_jax.models.injections import ModelInput
from prompt_tuning_jax.typing import Array, HostArray


def combine(
    prompt: Array,
    source: ModelInput,
    tokens_BT: Array | HostArray,
    *,
    placement: Placement,
    eos_id: int = 1,
) -> tuple[ModelInput, Array]:
    """Inserts a prompt ``[P, D]`` or ``[B, P, D]`` into the input.

    ``prefix`` places it before everything, ``after_first`` after the first token, and
    ``before_eos`` before the end-of-sequence token, or after the last real token if truncation has
    removed that token.  Padding stays at the end.

    Returns the combined input and a boolean ``[B, U]`` that is true at prompt positions.
    """
    batch, length = tokens_BT.shape
    prompt_length = prompt.shape[-2]
    before = base.with_prompt(source, prompt)
    if placement == "prefix":
        return before, jnp.broadcast_to(
            jnp.arange(prompt_length + length) < prompt_length, (batch, prompt_length + length)
        )
    joined = base.joined(before)
    start_B = prompt_starts(source, tokens_BT, eos_id=eos_id)[placement]
    return _moved(joined, start_B, jnp.full(batch, prompt_length), max_length=prompt_length)


def combine_rows(
    prompt_BPD: Array,
    source: ModelInput,
    tokens_BT: Array | HostArray,
    *,
    length_B: Array,
    placement_B: Array,
    eos_id: int = 1,
) -> ModelInput:
    """Inserts prompts like ``combine``, with a separate prompt length and placement per row.

    Each prompt occupies the last ``length_B`` of its P positions (0: no prompt), and
    ``placement_B`` indexes ``PLACEMENTS``.  The unused ``P - length`` positions come first in the
    result and are masked.  Positions are relative, or count real positions alone, so each row gives
    the same result as it would alone.
    """
    starts = prompt_starts(source, tokens_BT, eos_id=eos_id)
    start_B = jnp.select(
        [placement_B == number for number in range(len(PLACEMENTS))],
        [starts[placement] for placement in PLACEMENTS],
    )
    joined = base.joined(base.with_prompt(source, prompt_BPD))
    return _moved(joined, start_B, length_B, max_length=prompt_BPD.shape[1])[0]


def prompt_starts(
    source: ModelInput, tokens_BT: Array | HostArray, *, eos_id: int
) -> dict[Placement, Array]:
    """Returns the position ``[B]`` of each row's first prompt vector, by placement."""
    before_eos_B = num_before_eos(source, tokens_BT, eos_id=eos_id)
    return {
        "prefix": jnp.zeros_like(before_eos_B),
        "after_first": jnp.ones_like(before_eos_B),
        "before_eos": before_eos_B,
    }


def num_before_eos(source: ModelInput, tokens_BT: Array | HostArray, *, eos_id: int) -> Array:
    """Returns the number ``[B]`` of each row's real tokens, its end of sequence not counted."""
    real_B = jnp.sum(source.mask_BU, axis=1)
    at_B1 = jnp.maximum(real_B - 1, 0)[:, None]
    last_B = jnp.take_along_axis(jnp.asarray(tokens_BT), at_B1, axis=1)[:, 0]
    return real_B - ((last_B == eos_id) & (real_B > 0))


def _moved(
    joined: ModelInput, start_B: Array, length_B: Array, *, max_length: int
) -> tuple[ModelInput, Array]:
    """Moves the prompts from the front of ``joined`` to ``start_B``.

    Returns the result and a boolean ``[B, U]`` that is true at prompt positions.
    """
    # Position 0 of a row comes after the unused positions of its prompt.
    unused_B1 = (max_length - length_B)[:, None]
    start_B1, length_B1 = start_B[:, None], length_B[:, None]
    position_BU = jnp.arange(joined.mask_BU.shape[1])[None, :] - unused_B1
    is_prompt_BU = (position_BU >= start_B1) & (position_BU < start_B1 + length_B1)
    from_prompt_BU = unused_B1 + position_BU - start_B1
    from_input_BU = max_length + position_BU - jnp.where(position_BU < start_B1, 0, length_B1)
    from_BU = jnp.where(is_prompt_BU, from_prompt_BU, from_input_BU)
    from_BU = jnp.clip(from_BU, 0, joined.mask_BU.shape[1] - 1)
    moved = ModelInput(
        embeddings_BUD=jnp.take_along_axis(joined.embeddings_BUD, from_BU[:, :, None], axis=1),
        mask_BU=jnp.take_along_axis(joined.mask_BU, from_BU, axis=1) & (position_BU >= 0),
    )
    return moved, is_prompt_BU


def attention_mask(
    is_prompt_BU: Array,
    *,
    prompt_to_input: bool,
    prompt_to_prompt: Literal["all", "causal", "none"],
    input_to_prompt: bool,
) -> Array | None:
    """Builds the attention mask ``[B, U, U]`` (query, key), or None if nothing is masked.

    A prompt position always sees itself.
    """
    if prompt_to_input and prompt_to_prompt == "all" and input_to_prompt:
        return None
    query_BU1, key_B1U = is_prompt_BU[:, :, None], is_prompt_BU[:, None, :]
    among = among_prompt(prompt_to_prompt, jnp.arange(is_prompt_BU.shape[1]))
    from_prompt_BUU = jnp.where(key_B1U, among[None], prompt_to_input)
    from_input_BUU = ~key_B1U | input_to_prompt
    return jnp.where(query_BU1, from_prompt_BUU, from_input_BUU)


def among_prompt(allowed: Literal["all", "causal", "none"], positions_P: Array) -> Array:
    """Returns which positions (query, key) of a prompt see each other, ``[P, P]`` or ``[1, 1]``."""
    if allowed == "all":
        return jnp.ones((1, 1), bool)
    if allowed == "causal":
        return positions_P[None, :] <= positions_P[:, None]
    return positions_P[None, :] == positions_P[:, None]
