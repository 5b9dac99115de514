"""Matrix products for the CPU backend, whose fast kernel for narrow operands is particular.

It takes few layouts, and the compiler must not fuse a cast into a product or move a transpose.
"""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp

from prompt_tuning_jax.distributed.sharding import for_cpu, on_a_mesh
from prompt_tuning_jax.typing import Array

T = TypeVar("T")


def apart(arrays: T) -> T:
    """Keeps the CPU compiler from fusing what computes the arrays with what reads them.

    A sum fused into the product that computes its operand takes five times as long as both, and a
    cast fused into a product makes it use a slow kernel.  On other platforms this does nothing.
    """
    return jax.lax.optimization_barrier(arrays) if for_cpu() else arrays


def product(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Multiplies two matrices in float32, contracting dimension ``contract[i]`` of operand i.

    This function has no custom derivative.
    """
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


@jax.custom_vjp
def dot(x_ND: Array, kernel_DF: Array) -> Array:
    """Multiplies matrices of a narrow dtype; the result is in float32."""
    return product(x_ND, kernel_DF, (1, 0))


def _dot_forward(x_ND: Array, kernel_DF: Array) -> tuple[Array, tuple[Array, Array]]:
    return dot(x_ND, kernel_DF), (x_ND, kernel_DF)


def _dot_backward(saved: tuple[Array, Array], cotangent_NF: Array) -> tuple[Array, Array]:
    x_ND, kernel_DF = saved
    cotangent_NF = apart(cotangent_NF.astype(x_ND.dtype))
    dx_ND = product(cotangent_NF, kernel_DF, (1, 1))
    dkernel_DF = product(_transposed_copy(x_ND), cotangent_NF, (1, 0))
    return dx_ND.astype(x_ND.dtype), dkernel_DF.astype(kernel_DF.dtype)


dot.defvjp(_dot_forward, _dot_backward)


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


def einsum(equation: str, left: Array, right: Array) -> Array:
    """Computes an einsum of narrow operands in float32.

    The operands are laid out as [batch, rows, sum] and [batch, sum, columns], the only order that
    the CPU backend's kernel supports, with few batch dimensions.  With another order it fails at
    run time ("BF16 x BF16 = F32 unsupported"), and with more batch dimensions it computes the
    product in float32.  The batch dimensions are therefore merged, except on a mesh: examples and
    heads are sharded over different mesh axes, and merging them would require gathering them first.
    """
    operands, out_axes = equation.split("->")
    left_axes, right_axes = operands.split(",")
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
