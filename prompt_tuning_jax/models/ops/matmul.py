"""Matrix products with low-precision operands and float32 accumulation, forward and backward.

``jax.lax.dot_general`` with bfloat16 operands and ``preferred_element_type=float32`` uses the fast
kernel on every platform.  Its derivative does not, because it multiplies a float32 cotangent by a
bfloat16 operand.  This module casts the cotangent down first, so that all three products use the
fast kernel.  The CPU backend needs more than that (models/ops/cpu.py); other platforms get the
plain operations, which their compilers lay out and fuse.
"""

from functools import partial, reduce
from string import ascii_lowercase

import jax
import jax.numpy as jnp

from prompt_tuning_jax.distributed.sharding import for_cpu
from prompt_tuning_jax.models.ops import cpu
from prompt_tuning_jax.typing import Array, DType


def dot(x: Array, kernel_DF: Array, *, dtype: DType, out_dtype: DType | None = None) -> Array:
    """Computes ``x @ kernel``: ``[..., D], [D, F] -> [..., F]`` in ``out_dtype``.

    In float32 this is the plain product.  In a narrower dtype the operands are cast to it, and
    products are summed in float32; the same holds for the derivatives.  ``out_dtype`` defaults to
    ``dtype``.
    """
    out_dtype = dtype if out_dtype is None else out_dtype
    x, kernel_DF = x.astype(dtype), kernel_DF.astype(dtype)
    if jnp.dtype(dtype) == jnp.float32:
        out = x @ kernel_DF
    elif for_cpu():
        out = cpu.dot(x.reshape(-1, x.shape[-1]), kernel_DF)
        out = out.reshape(*x.shape[:-1], kernel_DF.shape[-1])
    else:
        # Rows stay apart: to flatten them moves data where a tile of the memory has several.
        rows = ascii_lowercase[: x.ndim - 1]
        out = _einsum(f"{rows}D,DF->{rows}F", jnp.dtype(out_dtype).name, x, kernel_DF)
    return out.astype(out_dtype)


def einsum(equation: str, left: Array, right: Array, *, dtype: DType) -> Array:
    """Computes an einsum of two operands, cast to ``dtype``, with a float32 result.

    Every letter of an operand must occur in the other operand or in the result.  The result stays
    in float32 because it is a sum or the input of a softmax.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jnp.einsum(equation, left.astype(dtype), right.astype(dtype))
    return _einsum(equation, "float32", left.astype(dtype), right.astype(dtype))


def inner(left: Array, right: Array) -> Array:
    """Sums products over the last axis, in float32: ``[..., D], [..., D] -> [...]``."""
    if not for_cpu():
        return jnp.sum(left * right, axis=-1)
    # As matrix products: plain sums are thirty times slower on CPU.
    return jnp.einsum("...d,...d->...", left, right, precision=jax.lax.Precision.HIGHEST)


def softmax(x: Array) -> Array:
    """Computes the softmax over the last axis in float32."""
    return _softmax(x.astype(jnp.float32))


@jax.custom_vjp
def _softmax(x: Array) -> Array:
    return jax.nn.softmax(x, axis=-1)


def _softmax_forward(x: Array) -> tuple[Array, Array]:
    weights = _softmax(x)
    return weights, weights


def _softmax_backward(weights: Array, cotangent: Array) -> tuple[Array]:
    cotangent = cpu.apart(cotangent)
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
    cotangents = cpu.apart(cotangents)
    shares = sum(inner(w, c)[..., None] for w, c in zip(weights, cotangents, strict=True))
    return (tuple(w * (c - shares) for w, c in zip(weights, cotangents, strict=True)),)


_joint_softmax.defvjp(_joint_softmax_forward, _joint_softmax_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(equation: str, out_dtype: str, left: Array, right: Array) -> Array:
    """Sums products in float32; the CPU's result is in float32 whatever ``out_dtype`` is."""
    if for_cpu():
        return cpu.einsum(equation, left, right)
    # A result that is rounded where it is computed is written, and sent to other chips, once.
    return jnp.einsum(equation, left, right, preferred_element_type=out_dtype)


def _einsum_forward(
    equation: str, out_dtype: str, left: Array, right: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, out_dtype, left, right), (left, right)


def _einsum_backward(
    equation: str, _: str, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    left, right = saved
    operands, out_axes = equation.split("->")
    left_axes, right_axes = operands.split(",")
    cotangent, dtype = cotangent.astype(left.dtype), left.dtype.name
    dleft = _einsum(f"{out_axes},{right_axes}->{left_axes}", dtype, cotangent, right)
    dright = _einsum(f"{left_axes},{out_axes}->{right_axes}", dtype, left, cotangent)
    return dleft.astype(left.dtype), dright.astype(right.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)
