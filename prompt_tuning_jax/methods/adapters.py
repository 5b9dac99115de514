"""Adapters: bottlenecks after the sublayers (Houlsby et al. 2019, Pfeiffer et al. 2021)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import Adapters
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.linear_adapter import AnyLinear, find_linears, wrap_linears
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.layers import ACTIVATIONS
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array

# The linear maps whose outputs the adapters transform before the residual addition.
_TARGETS = {"houlsby": (".*/out", ".*/mlp/wo"), "pfeiffer": (".*/mlp/wo",)}


class AdaptersModule(TuningModule[Adapters]):
    """Inserts adapters into the model, after the linear maps that ``kind`` selects."""

    @classmethod
    def attach(cls, config: Adapters, model: Model, *, key: Array, context: Context) -> TunedModel:
        targets = find_linears(model, _TARGETS[config.kind], field="method.kind")
        numbers = {name: number for number, name in enumerate(targets)}

        def bottleneck(name: str, linear: AnyLinear) -> Bottleneck | None:
            if name not in numbers:
                return None
            return Bottleneck(config, linear, key=jax.random.fold_in(key, numbers[name]))

        return TunedModel(wrap_linears(model, bottleneck), cls(config))


class Bottleneck(nnx.Module):
    """Computes ``y + up(activation(down(y)))`` with ``y = linear(x)``; R is the width."""

    def __init__(self, config: Adapters, linear: AnyLinear, *, key: Array):
        features, width = linear.kernel.shape[1], config.width
        axis = linear.kernel.get_metadata()["logical_axes"][1]
        limit = features**-0.5
        down_DR = jax.random.uniform(key, (features, width), minval=-limit, maxval=limit)
        self.down_DR = nnx.Param(down_DR, logical_axes=(axis, None))
        self.up_RD = nnx.Param(jnp.zeros((width, features)), logical_axes=(None, axis))
        self.biases = config.biases
        if config.biases:
            self.down_bias_R = nnx.Param(jnp.zeros(width), logical_axes=(None,))
            self.up_bias_D = nnx.Param(jnp.zeros(features), logical_axes=(axis,))
        self.activation = config.activation
        self.dtype = linear.dtype

    def __call__(self, x: Array, linear: Callable[[Array], Array]) -> Array:
        y = linear(x)
        low = self._product(y, self.down_DR.get_value())
        if self.biases:
            low = low + self.down_bias_R.get_value()
        added = self._product(ACTIVATIONS[self.activation](low), self.up_RD.get_value())
        if self.biases:
            added = added + self.up_bias_D.get_value()
        return (y + added).astype(y.dtype)

    def _product(self, x: Array, matrix: Array) -> Array:
        return matmul.dot(x, matrix, dtype=self.dtype, out_dtype=jnp.float32)
