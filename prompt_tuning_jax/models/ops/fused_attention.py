"""Attention for TPUs in one kernel, forward and backward.

The scores of all pairs of positions stay on the chip: neither they nor T5's position bias, which
the kernel builds from its values at each distance, are written to memory.  The bias gets no
gradient, because the model that it is part of is frozen.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from prompt_tuning_jax.distributed.sharding import for_cpu, traced_partitioner
from prompt_tuning_jax.models.ops.fused_kernels import Spec, attend, differentiate, scratch_shapes
from prompt_tuning_jax.models.ops.fused_tiles import Visibility
from prompt_tuning_jax.typing import Array

_VMEM_BYTES = 2**24

# Queries, keys and values, ``[B, H or G, T or U, K]``, padded to whole blocks and tiles.
_Tensors: TypeAlias = tuple[Array, Array, Array]
_Arrays: TypeAlias = Mapping[str, Array]


def fused_attention(
    query_BTHK: Array,
    key_BUGK: Array,
    value_BUGK: Array,
    *,
    seen: Visibility,
    bias_HN: Array | None = None,
    keep_TU: Array | None = None,
    softcap: float = 0.0,
) -> Array:
    """Attends to the keys that each query sees; returns ``[B, T, H, K]``.

    Args:
      query_BTHK: queries, in the dtype of the products.
      key_BUGK: keys; G divides H, and heads share keys in the order of H.
      value_BUGK: values.
      seen: which keys each query sees; the mean of all values is the result of a query that sees
        none.
      bias_HN: added to the score of query t and key u, ``bias_HN[:, u - t + T - 1]``; there are
        ``T + U - 1`` distances.
      keep_TU: factors on the weights of all rows and heads, for dropout.
      softcap: caps scores at ``c * tanh(scores / c)``, before bias and mask; 0 does not.

    Scores and softmax are in float32.  Raises NotImplementedError where ``bias_HN`` is to be
    differentiated.
    """
    tiling = seen.tiling
    length, keys = query_BTHK.shape[1], key_BUGK.shape[1]
    assert (length, keys) == (tiling.length, tiling.keys)
    key_BUGK, value_BUGK = _divisible(query_BTHK, key_BUGK, value_BUGK)

    def heads_first(x: Array, to: int) -> Array:
        x = jnp.swapaxes(x, 1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, to - x.shape[2]), (0, 0)))

    rest = {"mask": seen.mask_B1U, "tiles": seen.tiles_B1I}
    if seen.query_position_B1T is not None and seen.key_position_B1U is not None:
        rest["query_position"] = seen.query_position_B1T
        rest["key_position"] = seen.key_position_B1U
    if bias_HN is not None:
        # Distance d is at d mod N, so that rolling row t by t puts it under every key.
        distances = tiling.padded_length + tiling.padded_keys
        before, after = bias_HN[:, : length - 1], bias_HN[:, length - 1 :]
        between = ((0, 0), (0, distances - bias_HN.shape[1]))
        circular_HN = jnp.concatenate([jnp.pad(after, between), before], axis=1)
        rest["bias"] = circular_HN.astype(jnp.float32)[:, None]
    if keep_TU is not None:
        edges = ((0, tiling.padded_length - length), (0, tiling.padded_keys - keys))
        rest["keep"] = jnp.pad(keep_TU.astype(jnp.float32), edges)
    tensors = (
        heads_first(query_BTHK, tiling.padded_length),
        heads_first(key_BUGK, tiling.padded_keys),
        heads_first(value_BUGK, tiling.padded_keys),
    )
    spec = Spec(tiling=tiling, softcap=softcap, strided_rolls=has_strided_rolls())
    mixed_BHTK = _sharded(partial(_attention, spec), tensors, rest)
    return jnp.swapaxes(mixed_BHTK[:, :, :length], 1, 2)


def has_strided_rolls() -> bool:
    """Returns whether the traced function's chips can roll each row by another number.

    TPU v4 cannot.
    """
    partitioner = traced_partitioner()
    device = jax.devices()[0] if partitioner is None else partitioner.mesh.devices.flat[0]
    return "v4" not in device.device_kind


def _divisible(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Repeats keys and values for each head if the mesh divides heads, but not heads of keys."""
    partitioner = traced_partitioner()
    heads, groups = query.shape[2], key.shape[2]
    if partitioner is None or heads == groups:
        return key, value
    divides = [partitioner.sharding(("heads",), (n,)).spec[0] is not None for n in (heads, groups)]
    if divides != [True, False]:
        return key, value
    return jnp.repeat(key, heads // groups, axis=2), jnp.repeat(value, heads // groups, axis=2)


def _sharded(function: Callable[..., Array], tensors: _Tensors, rest: _Arrays) -> Array:
    """Applies a kernel on each device to its rows and heads, which XLA cannot divide by itself."""
    partitioner = traced_partitioner()
    if partitioner is None:
        return function(tensors, rest)
    # Heads that share keys stay together.
    rows, heads = tensors[1].shape[:2]
    spec = partitioner.sharding(("batch", "heads"), (rows, heads)).spec
    others = {"bias": PartitionSpec(spec[1]), "keep": PartitionSpec()}
    of_rows = PartitionSpec(spec[0])
    specs = ((spec, spec, spec), {name: others.get(name, of_rows) for name in rest})
    divided: Callable[..., Array] = jax.shard_map(
        function, mesh=partitioner.mesh, in_specs=specs, out_specs=spec, check_vma=False
    )
    return divided(tensors, rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: Spec, tensors: _Tensors, rest: _Arrays) -> Array:
    return _forward_kernel(spec, tensors, rest)


def _forward(spec: Spec, tensors: Any, rest: Any) -> tuple[Array, tuple[_Tensors, _Arrays]]:
    for name, each in rest.items():
        if each.perturbed:
            raise NotImplementedError(f"fused attention has no derivative with respect to {name}")
    values = (
        tuple(each.value for each in tensors),
        {name: each.value for name, each in rest.items()},
    )
    return _forward_kernel(spec, *values), values


def _backward(
    spec: Spec, values: tuple[_Tensors, _Arrays], cotangent_BHTK: Any
) -> tuple[_Tensors | None, None]:
    if isinstance(cotangent_BHTK, SymbolicZero):
        return None, None
    return _backward_kernel(spec, *values, cotangent_BHTK), None


_attention.defvjp(_forward, _backward, symbolic_zeros=True)


def _forward_kernel(spec: Spec, tensors: _Tensors, rest: _Arrays) -> Array:
    query_BHTK, key_BGUK, value_BGUK = tensors
    inputs = {"query": query_BHTK, "key": key_BGUK, "value": value_BGUK, **rest}
    return _call(attend, spec, inputs, {"out": query_BHTK}, products=2)["out"]


def _backward_kernel(
    spec: Spec, tensors: _Tensors, rest: _Arrays, cotangent_BHTK: Array
) -> _Tensors:
    query_BHTK, key_BGUK, value_BGUK = tensors
    inputs = {
        "query": query_BHTK,
        "key": key_BGUK,
        "value": value_BGUK,
        "cotangent": cotangent_BHTK.astype(query_BHTK.dtype),
        **rest,
    }
    like = {"dquery": query_BHTK, "dkey": key_BGUK, "dvalue": value_BGUK}
    made = _call(differentiate, spec, inputs, like, products=5)
    return made["dquery"], made["dkey"], made["dvalue"]


def _call(
    kernel: Callable[[Spec, Any], None],
    spec: Spec,
    inputs: _Arrays,
    outputs_like: _Arrays,
    *,
    products: int,
) -> dict[str, Array]:
    """Runs a kernel for each group of heads, row, head of the group and block of queries.

    Keys and values, and the sums that are their gradients, stay for all blocks of a group's heads.
    """
    tiling = spec.tiling
    rows, heads, _, width = inputs["query"].shape
    groups = inputs["key"].shape[1]
    shared = heads // groups
    backward = kernel is differentiate
    scratch = scratch_shapes(spec, inputs, heads=shared, width=width, backward=backward)

    def block_spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        if name in ("query", "cotangent", "out", "dquery"):
            return pl.BlockSpec(
                (1, 1, tiling.block, width), lambda g, b, r, i: (b, g * shared + r, i, 0)
            )
        if name in ("key", "value", "dkey", "dvalue"):
            return pl.BlockSpec((1, 1, *shape[2:]), lambda g, b, r, i: (b, g, 0, 0))
        if name == "bias":
            return pl.BlockSpec((1, *shape[1:]), lambda g, b, r, i: (g * shared + r, 0, 0))
        if name == "keep":
            return pl.BlockSpec(shape, lambda g, b, r, i: (0, 0))
        if name == "query_position":
            return pl.BlockSpec((1, 1, tiling.block), lambda g, b, r, i: (b, 0, i))
        memory = pltpu.SMEM if name == "tiles" else pltpu.VMEM
        return pl.BlockSpec((1, *shape[1:]), lambda g, b, r, i: (b, 0, 0), memory_space=memory)

    def program(*refs: Any) -> None:
        kernel(spec, dict(zip((*inputs, *outputs_like, *scratch), refs, strict=True)))

    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs_like.values()]
    # A core builds the bias at its first row.
    rows_axis: Literal["arbitrary", "parallel"] = "arbitrary" if "bias" in inputs else "parallel"
    made = pl.pallas_call(
        program,
        grid=(groups, rows, shared, tiling.blocks),
        in_specs=[block_spec(name, x.shape) for name, x in inputs.items()],
        out_specs=[block_spec(name, x.shape) for name, x in outputs_like.items()],
        out_shape=out_shape,
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", rows_axis, "arbitrary", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        cost_estimate=cost_estimate(spec, inputs, out_shape, products=products),
        interpret=for_cpu(),
    )(*inputs.values())
    return dict(zip(outputs_like, made, strict=True))


def cost_estimate(
    spec: Spec, inputs: Mapping[str, Any], outputs: Any, *, products: int
) -> pl.CostEstimate:
    """Returns what the tiles cost of rows without padding.

    ``products`` is the number of matrix products of a tile.  The kernel reads its queries, keys and
    values once, for each head its bias and the positions of its queries, and for each group of
    heads the masks and positions of all keys.
    """
    tiling = spec.tiling
    rows, heads, _, width = inputs["query"].shape
    groups = inputs["key"].shape[1]
    times = {"mask": groups, "key_position": groups, "tiles": groups, "query_position": heads}
    read = sum(
        times.get(name, 1) * math.prod(x.shape) * x.dtype.itemsize for name, x in inputs.items()
    )
    written = sum(math.prod(x.shape) * x.dtype.itemsize for x in outputs)
    scores = rows * heads * tiling.visited() * tiling.block * tiling.tile
    return pl.CostEstimate(
        flops=products * 2 * scores * width,
        transcendentals=scores * (2 if spec.softcap else 1),
        bytes_accessed=read + written,
    )
