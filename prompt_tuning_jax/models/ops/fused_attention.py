"""Attention for TPUs in one kernel, forward and backward, with the position bias of T5.

The scores of all pairs of positions stay on the chip: neither they nor the position bias, which the
kernel builds from its values at each distance, are written to memory.  The bias gets no gradient,
because the model that it is part of is frozen.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from prompt_tuning_jax.distributed.sharding import for_cpu, traced_partitioner
from prompt_tuning_jax.models.ops.attention import MASK_VALUE
from prompt_tuning_jax.typing import Array

# Shorter rows gain nothing, and all keys of a longer one do not fit a chip's fast memory at once.
FEWEST_KEYS, MOST_KEYS = 64, 1024

_LANES = 128
_VMEM_BYTES = 2**24
_MOST_SCORES = 640 * 640  # of a block, in float32: a kernel holds a few arrays of this size


class _Operands(NamedTuple):
    """What the kernels read, padded to whole blocks; dimensions as in ``fused_attention``."""

    query_BHTK: Array
    key_BGUK: Array
    value_BGUK: Array
    bias_H1N: Array
    mask_B1U: Array
    keep_TU: Array


def fused_attention(
    query_BTHK: Array,
    key_BUGK: Array,
    value_BUGK: Array,
    *,
    bias_HN: Array,
    mask_BU: Array,
    keep_TU: Array | None = None,
) -> Array:
    """Attends to all keys of a row that ``mask_BU`` shows; returns ``[B, T, H, K]``.

    Args:
      query_BTHK: queries, in the dtype of the products.
      key_BUGK: keys; G divides H, and heads share keys in the order of H.
      value_BUGK: values.
      bias_HN: added to the score of query t and key u, ``bias_HN[:, u - t + T - 1]``; there are
        ``T + U - 1`` distances.
      mask_BU: the keys that are real.
      keep_TU: factors on the weights of all rows and heads, for dropout.

    Scores and softmax are in float32.  Raises NotImplementedError where ``bias_HN`` is to be
    differentiated.
    """
    length, keys = query_BTHK.shape[1], key_BUGK.shape[1]
    padded, padded_keys = _padded(length), _padded(keys)

    def heads_first(x: Array, to: int) -> Array:
        x = jnp.swapaxes(x, 1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, to - x.shape[2]), (0, 0)))

    mask = jnp.where(mask_BU, 0.0, MASK_VALUE).astype(jnp.float32)
    # Keys that do not exist weigh nothing, even in a row that sees no key at all.
    mask = jnp.pad(mask, ((0, 0), (0, padded_keys - keys)), constant_values=2 * MASK_VALUE)
    # Distance d is at d mod N, so that rolling row t by t puts it under every key.
    distances = padded + padded_keys
    before, after = bias_HN[:, : length - 1], bias_HN[:, length - 1 :]
    between = ((0, 0), (0, distances - bias_HN.shape[1]))
    circular_HN = jnp.concatenate([jnp.pad(after, between), before], axis=1)
    if keep_TU is None:
        keep_TU = jnp.ones((1, 1), jnp.float32)
    else:
        edges = ((0, padded - length), (0, padded_keys - keys))
        keep_TU = jnp.pad(keep_TU.astype(jnp.float32), edges)
    operands = _Operands(
        query_BHTK=heads_first(query_BTHK, padded),
        key_BGUK=heads_first(key_BUGK, padded_keys),
        value_BGUK=heads_first(value_BUGK, padded_keys),
        bias_H1N=circular_HN.astype(jnp.float32)[:, None],
        mask_B1U=mask[:, None],
        keep_TU=keep_TU,
    )
    mixed_BHTK = _sharded(_attention, operands)
    return jnp.swapaxes(mixed_BHTK[:, :, :length], 1, 2)


def _padded(length: int) -> int:
    return -(-length // _LANES) * _LANES


def _rows(length: int, keys: int) -> int:
    """Returns the number of queries in a block."""
    blocks = length // _LANES
    fitting = [
        n for n in range(1, blocks + 1) if blocks % n == 0 and n * _LANES * keys <= _MOST_SCORES
    ]
    return max(fitting, default=1) * _LANES


def _sharded(function: Callable[[_Operands], Array], operands: _Operands) -> Array:
    """Applies a kernel on each device to its rows and heads, which XLA cannot divide by itself."""
    partitioner = traced_partitioner()
    if partitioner is None:
        return function(operands)
    # Heads that share keys stay together.
    rows, heads = operands.key_BGUK.shape[:2]
    spec = partitioner.sharding(("batch", "heads"), (rows, heads)).spec
    rest = (PartitionSpec(spec[1]), PartitionSpec(spec[0]), PartitionSpec())
    specs: Any = _Operands(*(spec, spec, spec, *rest))  # type: ignore[arg-type]
    divided: Callable[[_Operands], Array] = jax.shard_map(
        function, mesh=partitioner.mesh, in_specs=(specs,), out_specs=spec, check_vma=False
    )
    return divided(operands)


@jax.custom_vjp
def _attention(operands: _Operands) -> Array:
    return _forward_kernel(operands)


def _forward(operands: Any) -> tuple[Array, _Operands]:
    for name in ("bias_H1N", "mask_B1U", "keep_TU"):
        if getattr(operands, name).perturbed:
            raise NotImplementedError(f"fused attention has no derivative with respect to {name}")
    values = _Operands(*(primal.value for primal in operands))
    return _forward_kernel(values), values


def _backward(operands: _Operands, cotangent_BHTK: Any) -> tuple[_Operands]:
    if isinstance(cotangent_BHTK, SymbolicZero):
        return (_Operands(*map(jnp.zeros_like, operands)),)
    query, key, value = _backward_kernel(operands, cotangent_BHTK)
    rest = map(jnp.zeros_like, operands[3:])
    return (_Operands(query, key, value, *rest),)


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


def _forward_kernel(operands: _Operands) -> Array:
    query_BHTK = operands.query_BHTK
    rows, heads, length, width = query_BHTK.shape
    keys = operands.key_BGUK.shape[2]
    block = _rows(length, keys)
    products = 2 * rows * heads * length * keys * width
    return _call(
        _attend,
        operands,
        block,
        outputs=[
            (jax.ShapeDtypeStruct(query_BHTK.shape, query_BHTK.dtype), _queries(block, width))
        ],
        flops=2 * products,
        exponentials=rows * heads * length * keys,
    )[0]


def _backward_kernel(operands: _Operands, cotangent_BHTK: Array) -> tuple[Array, Array, Array]:
    query_BHTK, key_BGUK = operands.query_BHTK, operands.key_BGUK
    rows, heads, length, width = query_BHTK.shape
    groups, keys = key_BGUK.shape[1:3]
    block = _rows(length, keys)
    blocks = length // block
    # Each block of queries and each head has its share of the gradients of keys and values.
    dtype = jnp.float32 if blocks > 1 or heads > groups else key_BGUK.dtype
    share = jax.ShapeDtypeStruct((blocks, rows, heads, keys, width), dtype)
    of_share = pl.BlockSpec((1, 1, 1, keys, width), lambda h, i, b: (i, b, h, 0, 0))
    products = 2 * rows * heads * length * keys * width
    dquery, *shares = _call(
        _differentiate,
        operands,
        block,
        cotangent_BHTK.astype(query_BHTK.dtype),
        outputs=[
            (jax.ShapeDtypeStruct(query_BHTK.shape, query_BHTK.dtype), _queries(block, width)),
            (share, of_share),
            (share, of_share),
        ],
        flops=5 * products,
        exponentials=rows * heads * length * keys,
    )
    dkey, dvalue = (
        jnp.sum(each.reshape(blocks, rows, groups, -1, keys, width), axis=(0, 3)).astype(
            key_BGUK.dtype
        )
        for each in shares
    )
    return dquery, dkey, dvalue


def _queries(block: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, block, width), lambda h, i, b: (b, h, i, 0))


def _call(
    kernel: Callable[..., None],
    operands: _Operands,
    block: int,
    *more_BHTK: Array,
    outputs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    flops: int,
    exponentials: int,
) -> list[Array]:
    """Runs a kernel for each head, block of queries and row, rows last: they share the bias."""
    rows, heads, length, width = operands.query_BHTK.shape
    groups, keys = operands.key_BGUK.shape[1:3]
    shared = heads // groups
    of_keys = pl.BlockSpec((1, 1, keys, width), lambda h, i, b: (b, jax.lax.div(h, shared), 0, 0))
    drops = operands.keep_TU.shape[0] > 1
    in_specs = [
        _queries(block, width),
        of_keys,
        of_keys,
        pl.BlockSpec((1, 1, operands.bias_H1N.shape[2]), lambda h, i, b: (h, 0, 0)),
        pl.BlockSpec((1, 1, keys), lambda h, i, b: (b, 0, 0)),
        pl.BlockSpec((block, keys) if drops else (1, 1), lambda h, i, b: (i if drops else 0, 0)),
        *(_queries(block, width) for _ in more_BHTK),
    ]
    # Each step reads its keys and values again, and each head the factors.
    again = (1, shared * length // block, shared * length // block, 1, 1, heads)
    read = sum(n * x.nbytes for n, x in zip(again, operands, strict=True))
    read += sum(x.nbytes for x in more_BHTK)
    written = sum(math.prod(shape.shape) * shape.dtype.itemsize for shape, _ in outputs)
    results: list[Array] = pl.pallas_call(
        kernel,
        grid=(heads, length // block, rows),
        in_specs=in_specs,
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=[pltpu.VMEM((block, keys), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=exponentials, bytes_accessed=read + written
        ),
        interpret=for_cpu(),
    )(*operands, *more_BHTK)
    return results


def _attend(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, keep: Any, out: Any, bias_TU: Any
) -> None:
    """The forward kernel: all keys of one row for one block of queries of one head."""
    weights_TU = _weights(query, key, bias, mask, bias_TU)
    value_UK = value[0, 0]
    kept_TU = (weights_TU * keep[...]).astype(value_UK.dtype)
    out[0, 0] = _dot(kept_TU, value_UK, (1, 0)).astype(out.dtype)


def _differentiate(
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    mask: Any,
    keep: Any,
    cotangent: Any,
    dquery: Any,
    dkey: Any,
    dvalue: Any,
    bias_TU: Any,
) -> None:
    """The backward kernel, which computes the weights again."""
    weights_TU = _weights(query, key, bias, mask, bias_TU)
    cotangent_TK = cotangent[0, 0]
    kept_TU = (weights_TU * keep[...]).astype(cotangent_TK.dtype)
    dvalue[0, 0, 0] = _dot(kept_TU, cotangent_TK, (0, 0)).astype(dvalue.dtype)
    dweights_TU = _dot(cotangent_TK, value[0, 0], (1, 1)) * keep[...]
    share_T1 = jnp.sum(weights_TU * dweights_TU, axis=1, keepdims=True)
    dscores_TU = (weights_TU * (dweights_TU - share_T1)).astype(cotangent_TK.dtype)
    dquery[0, 0] = _dot(dscores_TU, key[0, 0], (1, 0)).astype(dquery.dtype)
    dkey[0, 0, 0] = _dot(dscores_TU, query[0, 0], (0, 0)).astype(dkey.dtype)


def _weights(query: Any, key: Any, bias: Any, mask: Any, bias_TU: Any) -> Array:
    """Computes the softmax of the scores of a block, ``[T, U]`` in float32."""
    length, keys = bias_TU.shape
    first = pl.program_id(1) * length

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        # Row t, rolled by t, has under key u the bias of distance u - t.
        repeated = jnp.broadcast_to(bias[0], (length, bias.shape[2]))
        bias_TU[...] = _rolled(repeated, first)[:, :keys]

    scores_TU = _dot(query[0, 0], key[0, 0], (1, 1)) + bias_TU[...] + mask[0]
    largest_T1 = jnp.max(scores_TU, axis=1, keepdims=True)
    exponentials_TU = jnp.exp(scores_TU - largest_T1)
    return exponentials_TU / jnp.sum(exponentials_TU, axis=1, keepdims=True)


def _rolled(x_TN: Array, first: Any) -> Array:
    """Rolls row t by ``first + t``."""
    if not has_strided_rolls():
        x_TN = pltpu.roll(x_TN, first, 1)
        row_T1 = jax.lax.broadcasted_iota(jnp.int32, x_TN.shape, 0)
        for bit in range((x_TN.shape[0] - 1).bit_length()):
            x_TN = jnp.where(row_T1 & (1 << bit), pltpu.roll(x_TN, 1 << bit, 1), x_TN)
        return x_TN
    return pltpu.roll(x_TN, first, 1, stride=1, stride_axis=0)


def has_strided_rolls() -> bool:
    """Whether the traced function's chips can roll each row by another number: v4 cannot."""
    partitioner = traced_partitioner()
    device = jax.devices()[0] if partitioner is None else partitioner.mesh.devices.flat[0]
    return "v4" not in device.device_kind


def _dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
