"""IA3: a trained scale on keys, values and what the mlp holds (Liu et al. 2022)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule
from prompt_tuning_jax.methods.linear_adapter import (
    AnyLinear,
    chosen_maps,
    complaints_of,
    wrap_linears,
)
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """``out`` parameters for each map that is scaled behind, ``in`` for each that is before.

    With the defaults ``2 * H * K * (encoder layers + 2 * decoder layers)`` on keys and values, and
    ``F * (encoder layers + decoder layers)`` on the input of the mlp's ``wo``, all ones at the
    start: ``.../adapter/scale_F`` and ``.../adapter/scale_D``.

    ``outputs`` and ``inputs`` are RE2 expressions on whole paths
    (``encoder/layers_0/attention/key``).  Frozen weights may be quantised.
    """

    identity_at_init: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.3, "weight_decay": 0.0}

    outputs: tuple[str, ...] = (".*/(key|value)",)
    inputs: tuple[str, ...] = (".*/mlp/wo",)

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        behind = chosen_maps(model, self.outputs, field="method.outputs")
        before = chosen_maps(model, self.inputs, field="method.inputs")
        for name in behind.keys() & before.keys():
            raise UserError(
                f"method.outputs and method.inputs both choose {name}; take it from one"
            )

        def scale(name: str, linear: AnyLinear) -> Scale | None:
            if name in behind:
                return Scale(linear, of="output")
            return Scale(linear, of="input") if name in before else None

        return TunedModel(wrap_linears(model, scale), TuningModule())

    def config_errors(self) -> Iterator[str]:
        if not (self.outputs or self.inputs):
            yield "method.outputs and method.inputs are empty; give at least one regular expression"
        yield from complaints_of(self.outputs, field="method.outputs")
        yield from complaints_of(self.inputs, field="method.inputs")


class Scale(nnx.Module):
    """``scale_F * linear(x)``, or ``linear(scale_D * x)``; ones at the start."""

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

    def merged(self, kernel_DF: Array) -> Array:
        """The kernel ``[D, F]`` in float32 that does the same alone."""
        return kernel_DF * self._factor()

    def unmerged(self, kernel_DF: Array) -> Array:
        """The inverse of ``merged``, up to rounding; UserError where a scale is zero."""
        factor = self._factor()
        if not bool(jnp.all(factor)):
            raise UserError(
                "an IA3 scale is zero, and what it was merged into cannot be had back; "
                "keep the model from before"
            )
        return kernel_DF / factor

    def _factor(self) -> Array:
        """What the kernel's rows or columns are multiplied with."""
        if self.of == "input":
            return self.scale_D.get_value()[:, None]
        return self.scale_F.get_value()[None]
