"""Matrix products with low-precision operands and float32 accumulation, forward and backward.

``jax.lax.dot_general`` with bfloat16 operands and ``preferred_element_type=float32`` uses the fast
kernel on both CPU and TPU.  Its derivative does not, because it multiplies a float32 cotangent by a
bfloat16 operand.  This module casts the cotangent down first, so that all three products use the
fast kernel.
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp

from prompt_tuning_jax.distributed.sharding import on_a_mesh
from prompt_tuning_jax.typing import Array, DType


def dot(x: Array, kernel_DF: Array, *, dtype: DType, out_dtype: DType | None = None) -> Array:
    """Computes ``x @ kernel``: ``[..., D], [D, F] -> [..., F]`` in ``out_dtype``.

    In float32 this is the plain product.  In a narrower dtype the operands are cast to it, and
    products are summed in float32; the same holds for the derivatives.  ``out_dtype`` defaults to
    ``dtype``.
    """
    out_dtype = dtype if out_dtype is None else out_dtype
    if jnp.dtype(dtype) == jnp.float32:
        return (x.astype(dtype) @ kernel_DF.astype(dtype)).astype(out_dtype)
    flat_ND = x.reshape(-1, x.shape[-1]).astype(dtype)
    out_NF = _dot(flat_ND, kernel_DF.astype(dtype))
    return out_NF.astype(out_dtype).reshape(*x.shape[:-1], kernel_DF.shape[-1])


def einsum(equation: str, left: Array, right: Array, *, dtype: DType) -> Array:
    """Computes an einsum of two operands, cast to ``dtype``, with a float32 result.

    Every letter of an operand must occur in the other operand or in the result.  The result stays
    in float32 because it is a sum or the input of a softmax.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jnp.einsum(equation, left.astype(dtype), right.astype(dtype))
    return _einsum(equation, left.astype(dtype), right.astype(dtype))


def inner(left: Array, right: Array) -> Array:
    """Sums products over the last axis, in float32: ``[..., D], [..., D] -> [...]``."""
    return jnp.einsum("...d,...d->...", left, right, precision=jax.lax.Precision.HIGHEST)


def softmax(x: Array) -> Array:
    """Computes the softmax over the last axis in float32, with a backward pass fast on CPU."""
    return _softmax(x.astype(jnp.float32))


@jax.custom_vjp
def _softmax(x: Array) -> Array:
    return jax.nn.softmax(x, axis=-1)


def _softmax_forward(x: Array) -> tuple[Array, Array]:
    weights = _softmax(x)
    return weights, weights


def _softmax_backward(weights: Array, cotangent: Array) -> tuple[Array]:
    # The barrier prevents fusion of the sum into the product that computed the cotangent; fused,
    # they would take five times as long as both separately.
    cotangent = jax.lax.optimization_barrier(cotangent)
    return (weights * (cotangent - inner(weights, cotangent)[..., None]),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def joint_softmax(parts: tuple[Array, ...]) -> tuple[Array, ...]:
    """Computes one softmax over the last axes of several arrays ``[..., U_i]``, in float32.

    The results are the parts of the softmax of their concatenation, which is never formed: arrays
    of attention scores are large, and copying them takes longer than the softmax.
    """
    if len(parts) == 1:
        return (softmax(parts[0]),)
    return _joint_softmax(tuple(part.astype(jnp.float32) for part in parts))


@jax.custom_vjp
def _joint_softmax(parts: tuple[Array, ...]) -> tuple[Array, ...]:
    largest = reduce(jnp.maximum, [jnp.max(part, axis=-1, keepdims=True) for part in parts])
    exponentials = [jnp.exp(part - largest) for part in parts]
    total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in exponentials)
    return tuple(part / total for part in exponentials)


def _joint_softmax_forward(
    parts: tuple[Array, ...],
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    weights = _joint_softmax(parts)
    return weights, weights


def _joint_softmax_backward(
    weights: tuple[Array, ...], cotangents: tuple[Array, ...]
) -> tuple[tuple[Array, ...]]:
    cotangents = jax.lax.optimization_barrier(cotangents)  # for the same reason as above
    shares = sum(inner(w, c)[..., None] for w, c in zip(weights, cotangents, strict=True))
    return (tuple(w * (c - shares) for w, c in zip(weights, cotangents, strict=True)),)


_joint_softmax.defvjp(_joint_softmax_forward, _joint_softmax_backward)


def product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Multiplies two matrices in float32, contracting dimension ``contract[i]`` of operand i.

    This function has no custom derivative.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _dot(x_ND: Array, kernel_DF: Array) -> Array:
    return product(x_ND, kernel_DF, (1, 0))


def _dot_forward(x_ND: Array, kernel_DF: Array) -> tuple[Array, tuple[Array, Array]]:
    return _dot(x_ND, kernel_DF), (x_ND, kernel_DF)


def _dot_backward(saved: tuple[Array, Array], cotangent_NF: Array) -> tuple[Array, Array]:
    x_ND, kernel_DF = saved
    # The barrier prevents fusion of the cast into the products, which would make the CPU backend
    # use its slow kernel.
    cotangent_NF = jax.lax.optimization_barrier(cotangent_NF.astype(x_ND.dtype))
    dx_ND = product(cotangent_NF, kernel_DF, (1, 1))
    dkernel_DF = product(_transposed_copy(x_ND), cotangent_NF, (1, 0))
    return dx_ND.astype(x_ND.dtype), dkernel_DF.astype(kernel_DF.dtype)


_dot.defvjp(_dot_forward, _dot_backward)


def _transposed_copy(x_ND: Array) -> Array:
    """Copies ``x_ND.T`` into layout [D, N], which the CPU backend's narrow kernel requires.

    A plain transpose only changes the operand's layout, even with a barrier after it, and the
    product then runs in float32.  Transposing two halves separately forces a copy.
    """
    rows, width = x_ND.shape
    if rows % 2:
        return jax.lax.optimization_barrier(x_ND.T)
    halves = jax.lax.optimization_barrier(jnp.swapaxes(x_ND.reshape(2, rows // 2, width), 1, 2))
    return halves.transpose(1, 0, 2).reshape(width, rows)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, left: Array, right: Array) -> Array:
    operands, out_axes = equation.split("->")
    left_axes, right_axes = operands.split(",")
    return _ordered_einsum(left_axes, right_axes, out_axes, left, right)


def _einsum_forward(equation: str, left: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, left, right), (left, right)


def _einsum_backward(
    equation: str, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    left, right = saved
    operands, out = equation.split("->")
    left_axes, right_axes = operands.split(",")
    cotangent = cotangent.astype(left.dtype)
    dleft = _ordered_einsum(out, right_axes, left_axes, cotangent, right)
    dright = _ordered_einsum(left_axes, out, right_axes, left, cotangent)
    return dleft.astype(left.dtype), dright.astype(right.dtype)


def _ordered_einsum(
    left_axes: str, right_axes: str, out_axes: str, left: Array, right: Array
) -> Array:
    """Computes an einsum with operands laid out as [batch, rows, sum] and [batch, sum, columns].

    The CPU backend's kernel for narrow operands supports only this order and few batch dimensions.
    With another order it fails at run time ("BF16 x BF16 = F32 unsupported"), and with more batch
    dimensions it computes the product in float32.  The batch dimensions are therefore merged,
    except on a mesh: examples and heads are sharded over different mesh axes, and merging them
    would require gathering them first.
    """
    shared = [a for a in left_axes if a in right_axes]
    batch = "".join(a for a in shared if a in out_axes)
    summed = "".join(a for a in shared if a not in out_axes)
    rows = "".join(a for a in left_axes if a not in shared)
    columns = "".join(a for a in right_axes if a not in shared)
    size = dict(zip(left_axes + right_axes, left.shape + right.shape, strict=True))

    def lay_out(x: Array, axes: str, *groups: str) -> Array:
        x = x.transpose([axes.index(a) for a in "".join(groups)])
        return x.reshape([math.prod(size[a] for a in group) for group in groups])

    batches = tuple(batch) if on_a_mesh() else (batch,)
    # The barrier keeps the compiler from moving the transposes.
    left, right = jax.lax.optimization_barrier(
        (
            lay_out(left, left_axes, *batches, rows, summed),
            lay_out(right, right_axes, *batches, summed, columns),
        )
    )
    n = len(batches)
    dims = (((n + 1,), (n,)), (tuple(range(n)), tuple(range(n))))
    made = jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)
    made = made.reshape([size[a] for a in batch + rows + columns])
    return made.transpose([(batch + rows + columns).index(a) for a in out_axes])


_einsum.defvjp(_einsum_forward, _einsum_backward)
