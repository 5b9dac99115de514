"""The programs of the attention kernel: one block of queries of one head and row, forward and back.

Each runs on references into fast memory.  A dictionary names them, and lacks those that the
attention does not have: a bias, positions, or dropout factors.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from prompt_tuning_jax.models.ops.attention import MASK_VALUE
from prompt_tuning_jax.models.ops.fused_tiles import Tiling
from prompt_tuning_jax.typing import Array

Refs: TypeAlias = Mapping[str, Any]

# The axes of the grid: groups of heads, rows, heads of a group, blocks of queries.
_ROW, _HEAD, _BLOCK = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is known of an attention when it is traced.

    Attributes:
      tiling: the division of the scores of a head.
      softcap: caps scores at ``c * tanh(scores / c)``; 0 does not.
      strided_rolls: whether the chips can roll each row by another number: v4 cannot.
    """

    tiling: Tiling
    softcap: float
    strided_rolls: bool


def scratch_shapes(
    spec: Spec, inputs: Container[str], *, heads: int, width: int, backward: bool
) -> dict[str, Any]:
    """Returns the memory that the programs share from one block to the next, by name.

    ``inputs`` names those of the program; ``heads``, of ``width`` numbers each, share keys.
    """
    tiling = spec.tiling
    tile = (tiling.tiles, tiling.block, tiling.tile)
    column, of_keys = (tiling.block, 1), (tiling.padded_keys, width)
    shapes: dict[str, tuple[int, ...]] = {"scores": tile, "largest": column, "total": column}
    if "bias" in inputs:
        shapes["biases"] = (heads * tiling.blocks, tiling.block, tiling.padded_keys)
    if "query_position" in inputs:
        shapes["query_position_column"] = column
    shapes["mixed"] = (tiling.block, width)  # the result, or the gradient of the queries
    if backward:
        shapes.update(dweights=tile, share=column, key_sum=of_keys, value_sum=of_keys)
        if spec.softcap:
            shapes["slopes"] = tile
    return {name: pltpu.VMEM(shape, jnp.float32) for name, shape in shapes.items()}


def attend(spec: Spec, refs: Refs) -> None:
    """Computes the attention of a block of queries."""
    block = pl.program_id(_BLOCK)
    _compute_scores(spec, refs, slopes=False)
    refs["total"][...] = jnp.zeros_like(refs["total"])
    refs["mixed"][...] = jnp.zeros_like(refs["mixed"])

    def mix(j: int) -> None:
        value_UK = refs["value"][0, 0, _keys(spec, j)]
        exponentials_TU = jnp.exp(refs["scores"][j] - refs["largest"][...])
        refs["total"][...] += jnp.sum(exponentials_TU, axis=1, keepdims=True)
        kept_TU = _kept(spec, refs, exponentials_TU, block, j).astype(value_UK.dtype)
        refs["mixed"][...] += _dot(kept_TU, value_UK, (1, 0))

    _for_needed_tiles(spec, refs, mix)
    refs["out"][0, 0] = (refs["mixed"][...] / refs["total"][...]).astype(refs["out"].dtype)


def differentiate(spec: Spec, refs: Refs) -> None:
    """Computes the weights of a block of queries again, and its part of all gradients."""
    tiling = spec.tiling
    head, block = pl.program_id(_HEAD), pl.program_id(_BLOCK)

    @pl.when((head == 0) & (block == 0))
    def _() -> None:
        refs["key_sum"][...] = jnp.zeros_like(refs["key_sum"])
        refs["value_sum"][...] = jnp.zeros_like(refs["value_sum"])

    _compute_scores(spec, refs, slopes=bool(spec.softcap))
    for name in ("total", "share", "mixed"):
        refs[name][...] = jnp.zeros_like(refs[name])

    def weigh(j: int) -> None:
        exponentials_TU = jnp.exp(refs["scores"][j] - refs["largest"][...])
        refs["scores"][j] = exponentials_TU
        refs["total"][...] += jnp.sum(exponentials_TU, axis=1, keepdims=True)
        dkept_TU = _dot(refs["cotangent"][0, 0], refs["value"][0, 0, _keys(spec, j)], (1, 1))
        dweights_TU = _kept(spec, refs, dkept_TU, block, j)
        refs["dweights"][j] = dweights_TU
        refs["share"][...] += jnp.sum(exponentials_TU * dweights_TU, axis=1, keepdims=True)

    def add(j: int) -> None:
        cotangent_TK, keys = refs["cotangent"][0, 0], _keys(spec, j)
        weights_TU = refs["scores"][j] / refs["total"][...]
        kept_TU = _kept(spec, refs, weights_TU, block, j).astype(cotangent_TK.dtype)
        refs["value_sum"][keys] += _dot(kept_TU, cotangent_TK, (0, 0))
        share_T1 = refs["share"][...] / refs["total"][...]
        dscores_TU = weights_TU * (refs["dweights"][j] - share_T1)
        if spec.softcap:
            dscores_TU *= refs["slopes"][j]
        dscores_TU = dscores_TU.astype(cotangent_TK.dtype)
        refs["mixed"][...] += _dot(dscores_TU, refs["key"][0, 0, keys], (1, 0))
        refs["key_sum"][keys] += _dot(dscores_TU, refs["query"][0, 0], (0, 0))

    _for_needed_tiles(spec, refs, weigh)
    _for_needed_tiles(spec, refs, add)
    refs["dquery"][0, 0] = refs["mixed"][...].astype(refs["dquery"].dtype)

    @pl.when((head == pl.num_programs(_HEAD) - 1) & (block == tiling.blocks - 1))
    def _() -> None:
        refs["dkey"][0, 0] = refs["key_sum"][...].astype(refs["dkey"].dtype)
        refs["dvalue"][0, 0] = refs["value_sum"][...].astype(refs["dvalue"].dtype)


def _compute_scores(spec: Spec, refs: Refs, *, slopes: bool) -> None:
    """Stores the masked scores of the needed tiles, and the largest score of each query.

    ``slopes`` stores the derivative of the softcap, too.
    """
    block, at = spec.tiling.block, pl.program_id(_BLOCK)
    heads_block = pl.program_id(_HEAD) * spec.tiling.blocks + at
    if "bias" in refs:
        # All rows share the bias.
        pl.when(pl.program_id(_ROW) == 0)(lambda: _build_bias(spec, refs, heads_block, at * block))
    if "query_position" in refs:
        refs["query_position_column"][...] = _column(refs["query_position"][0])
    refs["largest"][...] = jnp.full_like(refs["largest"], 4 * MASK_VALUE)

    def score(j: int) -> None:
        keys = _keys(spec, j)
        scores_TU = _dot(refs["query"][0, 0], refs["key"][0, 0, keys], (1, 1))
        if spec.softcap:
            tanh_TU = jnp.tanh(scores_TU / spec.softcap)
            scores_TU = spec.softcap * tanh_TU
            if slopes:
                refs["slopes"][j] = 1 - tanh_TU * tanh_TU
        if "bias" in refs:
            scores_TU += refs["biases"][heads_block, :, keys]
        scores_TU += _mask(spec, refs, keys)
        refs["scores"][j] = scores_TU
        largest_T1 = jnp.max(scores_TU, axis=1, keepdims=True)
        refs["largest"][...] = jnp.maximum(refs["largest"][...], largest_T1)

    _for_needed_tiles(spec, refs, score)


def _mask(spec: Spec, refs: Refs, keys: slice) -> Array:
    """Returns what is added to the scores of some keys, ``[T or 1, U]``."""
    mask_1U: Array = refs["mask"][0, :, keys]
    if "query_position" not in refs:
        return mask_1U
    tiling = spec.tiling
    distance_TU = refs["query_position_column"][...] - refs["key_position"][0, :, keys]
    seen_TU = None
    if tiling.ahead is not None:
        seen_TU = distance_TU >= -tiling.ahead
    if tiling.window:
        near_TU = distance_TU < tiling.window
        seen_TU = near_TU if seen_TU is None else seen_TU & near_TU
    if seen_TU is None:
        return mask_1U
    return jnp.where(seen_TU, mask_1U, jnp.minimum(mask_1U, MASK_VALUE))


def _for_needed_tiles(spec: Spec, refs: Refs, do: Callable[[int], None]) -> None:
    """Does something for each tile in which some query of the block sees a key."""
    if spec.tiling.tiles == 1:
        do(0)
        return
    bits = refs["tiles"][0, 0, pl.program_id(_BLOCK)]
    for j in range(spec.tiling.tiles):
        pl.when(jnp.bitwise_and(bits, 1 << j) != 0)(partial(do, j))


def _keys(spec: Spec, j: int) -> slice:
    return slice(j * spec.tiling.tile, (j + 1) * spec.tiling.tile)


def _kept(spec: Spec, refs: Refs, x_TU: Array, at: Any, j: int) -> Array:
    """Multiplies by the dropout factors of tile j of block ``at``, if there are any."""
    if "keep" not in refs:
        return x_TU
    block = spec.tiling.block
    first = pl.multiple_of(at * block, block)
    return x_TU * refs["keep"][pl.ds(first, block), _keys(spec, j)]


def _build_bias(spec: Spec, refs: Refs, at: Any, first: Any) -> None:
    """Stores the bias of a block, whose first query is number ``first``."""
    length, keys = refs["biases"].shape[1:]
    # Row t, rolled by t, has under key u the bias of distance u - t.
    repeated_TN = jnp.broadcast_to(refs["bias"][0], (length, refs["bias"].shape[2]))
    refs["biases"][at] = rolled(repeated_TN, first, strided=spec.strided_rolls)[:, :keys]


def rolled(x_TN: Array, first: Any, *, strided: bool) -> Array:
    """Rolls row t by ``first + t``."""
    if strided:
        return pltpu.roll(x_TN, first, 1, stride=1, stride_axis=0)
    x_TN = pltpu.roll(x_TN, first, 1)
    row_T1 = jax.lax.broadcasted_iota(jnp.int32, x_TN.shape, 0)
    for bit in range((x_TN.shape[0] - 1).bit_length()):
        x_TN = jnp.where(row_T1 & (1 << bit), pltpu.roll(x_TN, 1 << bit, 1), x_TN)
    return x_TN


def _column(x_1T: Array) -> Array:
    """Turns a row into a column."""
    shape = (x_1T.shape[1], x_1T.shape[1])
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return jnp.sum(jnp.where(row == column, x_1T, 0.0), axis=1, keepdims=True)


def _dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
