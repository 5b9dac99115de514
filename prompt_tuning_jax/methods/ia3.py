"""IA3: trained scales on keys, values and hidden mlp activations (Liu et al. 2022)."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import IA3
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.linear_adapter import AnyLinear, find_linears, wrap_linears
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.typing import Array


class IA3Module(TuningModule[IA3]):
    """Wraps the linear maps that ``outputs`` and ``inputs`` select; the model holds the scales."""

    @classmethod
    def attach(cls, config: IA3, model: Model, *, key: Array, context: Context) -> TunedModel:
        outputs = find_linears(model, config.outputs, field="method.outputs")
        inputs = find_linears(model, config.inputs, field="method.inputs")
        for name in outputs.keys() & inputs.keys():
            raise UserError(
                f"method.outputs and method.inputs both match {name}; remove it from one of them"
            )

        def scale(name: str, linear: AnyLinear) -> Scale | None:
            if name in outputs:
                return Scale(linear, of="output")
            return Scale(linear, of="input") if name in inputs else None

        return TunedModel(wrap_linears(model, scale), cls(config))


class Scale(nnx.Module):
    """Computes ``scale_F * linear(x)`` or ``linear(scale_D * x)``; scales start at one."""

    def __init__(self, linear: AnyLinear, *, of: Literal["output", "input"]):
        (inputs, outputs), axes = linear.kernel.shape, linear.kernel.get_metadata()["logical_axes"]
        self.of = of
        if of == "output":
            self.scale_F = nnx.Param(jnp.ones(outputs, jnp.float32), logical_axes=(axes[1],))
        else:
            self.scale_D = nnx.Param(jnp.ones(inputs, jnp.float32), logical_axes=(axes[0],))

    def __call__(self, x: Array, linear: Callable[[Array], Array]) -> Array:
        if self.of == "input":
            return linear((self.scale_D.get_value() * x).astype(x.dtype))
        y = linear(x)
        return (self.scale_F.get_value() * y).astype(y.dtype)

    def merged(self, kernel_DF: Array, bias_F: Array | None) -> tuple[Array, Array | None]:
        """Returns the equivalent kernel and bias in float32, with the scale folded in."""
        if bias_F is not None and self.of == "output":
            bias_F = bias_F * self.scale_F.get_value()
        return kernel_DF * self._factor(), bias_F

    def _factor(self) -> Array:
        """Returns the factors of the kernel's rows ``[D, 1]`` or columns ``[1, F]``."""
        if self.of == "input":
            return self.scale_D.get_value()[:, None]
        return self.scale_F.get_value()[None]
