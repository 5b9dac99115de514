"""Attention to all segments of keys in one kernel, instead of scores and softmax apart.

Keys that all rows share, such as a prompt's, are computed once.  They are copied for each row here,
because a kernel reads keys in another layout in any case.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax.numpy as jnp

from prompt_tuning_jax.models.causal_lm.config import CausalLMConfig, Window
from prompt_tuning_jax.models.causal_lm.past_keys import PastKeys
from prompt_tuning_jax.models.injections import KeyValues
from prompt_tuning_jax.models.layers import split_key
from prompt_tuning_jax.models.ops import fused_tiles
from prompt_tuning_jax.models.ops.attention import dropout_factors
from prompt_tuning_jax.models.ops.attention_choice import AttentionTraits, Implementation
from prompt_tuning_jax.models.ops.cudnn_attention import CausalLengths, cudnn_attention
from prompt_tuning_jax.models.ops.fused_attention import fused_attention
from prompt_tuning_jax.models.ops.fused_tiles import Visibility, fits, visible_positions
from prompt_tuning_jax.typing import Array, DType

# Which keys queries see, as one of the kernels reads it.
Whole: TypeAlias = Visibility | CausalLengths


def stack_traits(
    config: CausalLMConfig, name: str, *, dtype: DType, causal: bool
) -> AttentionTraits:
    """Returns what decides how the self-attention of a stack is computed."""
    return AttentionTraits(
        name=name,
        head_dim=config.head_dim,
        dtype=jnp.dtype(dtype).name,
        causal=causal,
        bias="alibi" if config.positions == "alibi" else "none",
        softcap=config.attention_softcap,
    )


def seen_keys(
    implementation: Implementation,
    positions_BT: Array,
    past: Sequence[PastKeys],
    *,
    mask_BT: Array | None,
    window: Window,
    rows: int,
    head_dim: int,
    dtype: DType,
    dropout: bool,
) -> Whole | None:
    """Returns what queries see of ``past`` and of their own positions; None if no kernel fits.

    Few queries, such as those of targets, and keys without positions have no kernel.
    """
    positions, masks = [], []
    for segment in past:
        if segment.positions_BU is None:
            return None
        positions.append(segment.positions_BU)
        masks.append(segment.mask_BU)
    length = positions_BT.shape[1]
    if implementation == "cudnn":
        causal = window.ahead == 0 and all(mask is None for mask in masks)
        if length < fused_tiles.FEWEST_QUERIES or not causal or dropout:
            return None
        own_B, order_BT = jnp.full((rows,), length), None
        if mask_BT is not None:
            own_B, order_BT = jnp.sum(mask_BT, axis=1), jnp.argsort(~mask_BT, axis=1)
        before = sum(each.shape[1] for each in positions)
        return CausalLengths(length_B=before + own_B, order_BT=order_BT, window=window.back)

    def of_rows(x_BU: Array) -> Array:
        return jnp.broadcast_to(x_BU, (rows, x_BU.shape[1]))

    positions.append(positions_BT)
    masks.append(mask_BT)
    key_position_BU = jnp.concatenate([of_rows(each) for each in positions], axis=1)
    keys = key_position_BU.shape[1]
    if not fits(length, keys, width=head_dim, dtype=dtype, maps=dropout):
        return None
    seen = [
        of_rows(jnp.ones((1, each.shape[1]), bool) if mask is None else mask)
        for each, mask in zip(positions, masks, strict=True)
    ]
    return visible_positions(
        positions_BT,
        key_position_BU,
        mask_BU=jnp.concatenate(seen, axis=1),
        window=window.back,
        ahead=window.ahead,
    )


def attend_at_once(
    query_BTHK: Array,
    segments: Sequence[KeyValues],
    seen: Whole,
    *,
    softcap: float,
    dropout_rate: float,
    key: Array | None,
) -> Array:
    """Attends to the keys of all segments in one kernel; returns ``[B, T, H, K]``.

    Queries have the dtype of the products; dropout is that of attention to each segment apart.
    """
    rows, length = query_BTHK.shape[:2]

    def joined(parts: Sequence[Array]) -> Array:
        whole = [jnp.broadcast_to(x, (rows, *x.shape[1:])).astype(query_BTHK.dtype) for x in parts]
        return jnp.concatenate(whole, axis=1)

    key_BUGK = joined([segment.key_BPGK for segment in segments])
    value_BUGK = joined([segment.value_BPGK for segment in segments])
    if isinstance(seen, CausalLengths):
        return cudnn_attention(query_BTHK, key_BUGK, value_BUGK, seen=seen)
    keep = [
        dropout_factors((length, segment.key_BPGK.shape[1]), dropout_rate, key=segment_key)
        for segment, segment_key in zip(segments, split_key(key, len(segments)), strict=True)
    ]
    return fused_attention(
        query_BTHK,
        key_BUGK,
        value_BUGK,
        seen=seen,
        keep_TU=jnp.concatenate([each for each in keep if each is not None], axis=1)
        if keep[0] is not None
        else None,
        softcap=softcap,
    )
