"""Small layers that compute a prompt during training; saved runs keep only their result."""

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array

# Replicated on every device: these arrays are small, and their result is a prompt.
WHOLE = "prompt_embed"


def small_param(value: Array, *axes: str | None) -> nnx.Param[Array]:
    """Makes a trainable float32 array with logical axes; it is replicated if none are given."""
    return nnx.Param(jnp.asarray(value, jnp.float32), logical_axes=axes or (WHOLE,) * value.ndim)


def within(key: Array, shape: tuple[int, ...], bound: float) -> Array:
    """Draws float32 values uniformly from [-bound, bound)."""
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


class Dense(nnx.Module):
    """``x @ kernel_IO + bias_O`` in float32: ``(I + 1) * O`` parameters.

    Kernel and bias are initialized as in torch.nn.Linear: uniformly within 1/sqrt(I).
    """

    def __init__(self, inputs: int, outputs: int, *, key: Array):
        kernel_key, bias_key = jax.random.split(key)
        self.kernel_IO = small_param(within(kernel_key, (inputs, outputs), inputs**-0.5))
        self.bias_O = small_param(within(bias_key, (outputs,), inputs**-0.5))

    def __call__(self, x: Array) -> Array:
        y = matmul.dot(x, self.kernel_IO.get_value(), dtype=jnp.float32)
        return y + self.bias_O.get_value()
