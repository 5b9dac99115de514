"""Products with kernels of 8 or 4 bits, which are dequantized for the product alone."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from prompt_tuning_jax.distributed.sharding import on_a_mesh
from prompt_tuning_jax.models.ops import cpu
from prompt_tuning_jax.typing import Array, DType

# The most numbers of a kernel that are dequantized at once; those of a head are many more.
_MOST_DEQUANTIZED = 2**24


def quantized_dot(
    x: Array,
    kernel: Array,
    scale: Array,
    minimum: Array | None = None,
    *,
    dtype: DType,
    inputs_last: bool = False,
) -> Array:
    """Computes ``[..., D] @ [D, F]`` with operands in ``dtype`` and a float32 result.

    Otherwise it works like ``matmul.dot``.  The kernel is dequantized for this product and again
    for the derivative with respect to x; keeping it would hold the full kernels of all layers in
    memory at once.  There is no derivative with respect to the kernel.  With ``inputs_last``, the
    kernel is ``[F, D]``, and scales and minimums are ``[F, groups]``.
    """
    flat_ND = x.reshape(-1, x.shape[-1]).astype(dtype)
    out_NF = _dot(inputs_last, flat_ND, _Blocks(whole=kernel, scale=scale, minimum=minimum))
    return out_NF.reshape(*x.shape[:-1], out_NF.shape[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """A quantized kernel: integers, and the scale and the minimum of each group of inputs."""

    whole: Array
    scale: Array
    minimum: Array | None

    def per_channel(self, inputs: int) -> bool:
        """Returns whether a scale belongs to an output, and is applied to the product (int8).

        The kernel's integers are then exact in bfloat16.
        """
        return self.scale.shape[inputs] == 1 and self.scale.dtype != jnp.float16

    def outputs(self, start: Array, size: int, *, axis: int) -> "_Blocks":
        """Returns the kernel of some of its outputs."""
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=axis)
        parts: _Blocks = jax.tree.map(take, self)
        return parts

    def full(self, *, beside: Array, inputs: int) -> Array:
        """Dequantizes in the dtype of ``beside``, the operand that the kernel is multiplied with.

        ``inputs`` is the axis of the inputs.
        """
        dtype = beside.dtype
        whole = _not_before(self.whole, beside)
        if self.per_channel(inputs):
            return whole.astype(dtype)
        # A float16 scale is not rounded to bfloat16: the result is the rounded full number.
        work = jnp.promote_types(dtype, self.scale.dtype)
        split = list(whole.shape)
        split[inputs : inputs + 1] = [self.scale.shape[inputs], -1]

        def of_group(x: Array) -> Array:
            return jnp.expand_dims(_not_before(x, beside).astype(work), inputs + 1)

        full = whole.astype(work).reshape(split) * of_group(self.scale)
        if self.minimum is not None:
            full = full + of_group(self.minimum)
        return full.reshape(whole.shape).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(inputs_last: bool, x_ND: Array, blocks: _Blocks) -> Array:
    inputs = 1 if inputs_last else 0
    outputs = blocks.whole.shape[1 - inputs]

    def of(part: _Blocks) -> Array:
        out_NF = cpu.product(x_ND, part.full(beside=x_ND, inputs=inputs), (1, inputs))
        return out_NF * part.scale.reshape(-1) if part.per_channel(inputs) else out_NF

    size = _part_size(blocks, inputs)
    if size == outputs:
        return of(blocks)

    def write(i: Array, out_NF: Array) -> Array:
        start = jnp.minimum(i * size, outputs - size)
        part_NF = of(blocks.outputs(start, size, axis=1 - inputs))
        return jax.lax.dynamic_update_slice_in_dim(out_NF, part_NF, start, axis=1)

    empty_NF = jnp.zeros((len(x_ND), outputs), jnp.float32)
    filled_NF: Array = jax.lax.fori_loop(0, -(-outputs // size), write, empty_NF)
    return filled_NF


def _part_size(blocks: _Blocks, inputs: int) -> int:
    """Returns how many outputs to dequantize at once; on a mesh, all that a device has."""
    outputs = blocks.whole.shape[1 - inputs]
    if on_a_mesh():
        return outputs
    parts = -(-blocks.whole.size // _MOST_DEQUANTIZED)
    return -(-outputs // parts)


def _dot_forward(
    inputs_last: bool, x_ND: Array, blocks: _Blocks
) -> tuple[Array, tuple[_Blocks, Array]]:
    empty_0 = jnp.zeros((0,), x_ND.dtype)  # for its dtype
    return _dot(inputs_last, x_ND, blocks), (blocks, empty_0)


def _dot_backward(
    inputs_last: bool, saved: tuple[_Blocks, Array], cotangent_NF: Array
) -> tuple[Array, None]:
    blocks, empty_0 = saved
    inputs = 1 if inputs_last else 0
    outputs = blocks.whole.shape[1 - inputs]

    def of(part: _Blocks, cotangent_NF: Array) -> Array:
        if part.per_channel(inputs):
            cotangent_NF = cotangent_NF * part.scale.reshape(-1)
        cotangent_NF = cpu.apart(cotangent_NF.astype(empty_0.dtype))
        full = part.full(beside=cotangent_NF, inputs=inputs)
        return cpu.product(cotangent_NF, full, (1, 1 - inputs))

    size = _part_size(blocks, inputs)
    if size == outputs:
        return of(blocks, cotangent_NF).astype(empty_0.dtype), None

    def add(i: Array, dx_ND: Array) -> Array:
        start = jnp.minimum(i * size, outputs - size)
        own_NF = jax.lax.dynamic_slice_in_dim(cotangent_NF, start, size, axis=1)
        # The last part repeats outputs of the one before it.
        own_NF = jnp.where(start + jnp.arange(size) >= i * size, own_NF, 0.0)
        return dx_ND + of(blocks.outputs(start, size, axis=1 - inputs), own_NF)

    empty_ND = jnp.zeros((len(cotangent_NF), blocks.whole.shape[inputs]), jnp.float32)
    dx_ND: Array = jax.lax.fori_loop(0, -(-outputs // size), add, empty_ND)
    return dx_ND.astype(empty_0.dtype), None


_dot.defvjp(_dot_forward, _dot_backward)


@jax.custom_batching.custom_vmap
def _not_before(kernel_DF: Array, x_ND: Array) -> Array:
    """Returns the kernel with a dependency on x, so that it is dequantized only after x exists.

    Without the dependency, a compiler may dequantize the kernels of all layers at the start of a
    step, reuse the full kernel of the forward product in the backward product, or hoist it out of a
    loop.  An optimization barrier prevents this, except on CPU, where the compiler removes barriers
    before it eliminates common subexpressions.  On CPU the values depend on x instead: the result
    is zero if the first element of x is infinite.
    """

    def by_numbers(kernel_DF: Array, x_ND: Array) -> Array:
        return jnp.where(x_ND[0, 0] == jnp.inf, jnp.zeros_like(kernel_DF), kernel_DF)

    def by_barrier(kernel_DF: Array, x_ND: Array) -> Array:
        kept_DF: Array = jax.lax.optimization_barrier((kernel_DF, x_ND))[0]
        return kept_DF

    tied_DF: Array = jax.lax.platform_dependent(kernel_DF, x_ND, cpu=by_numbers, default=by_barrier)
    return tied_DF


@_not_before.def_vmap
def _not_before_any(
    axis_size: int, in_batched: list[bool], kernel_DF: Array, x_ND: Array
) -> tuple[Array, bool]:
    # One x of the batch is enough; a dependency on each would give the kernel a batch dimension.
    return _not_before(kernel_DF, x_ND[0] if in_batched[1] else x_ND), in_batched[0]
