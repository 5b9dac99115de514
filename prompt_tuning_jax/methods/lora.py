"""LoRA: a trained product of two low-rank matrices added to linear maps (Hu et al. 2022)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import LoRA
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule, shallow_copy
from prompt_tuning_jax.methods.linear_adapter import (
    AnyLinear,
    find_linears,
    linear_adapters,
    wrap_linears,
)
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.layers import dropout
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array


class LowRankPair(nnx.Module):
    """Computes ``linear(x) + scale * (dropout(x) @ a) @ b``.

    ``a`` is initialized randomly as in PEFT, and ``b`` is initialized to zero.
    """

    def __init__(self, config: LoRA, linear: AnyLinear, *, key: Array):
        inputs, outputs = linear.kernel.shape
        in_axis, out_axis = linear.kernel.get_metadata()["logical_axes"]
        limit = inputs**-0.5
        a_DR = jax.random.uniform(key, (inputs, config.rank), minval=-limit, maxval=limit)
        b_RF = jnp.zeros((config.rank, outputs), jnp.float32)
        self.lora_a_DR = nnx.Param(a_DR, logical_axes=(in_axis, None))
        self.lora_b_RF = nnx.Param(b_RF, logical_axes=(None, out_axis))
        self.scale = config.scale
        self.dropout_rate = config.dropout
        self.dtype = linear.dtype
        self.key: Array | None = nnx.data(None)

    def __call__(self, x: Array, linear: Callable[[Array], Array]) -> Array:
        y = linear(x)
        x = dropout(x, self.dropout_rate, key=self.key)
        low = matmul.dot(x, self.lora_a_DR.get_value(), dtype=self.dtype)
        added = matmul.dot(low, self.lora_b_RF.get_value(), dtype=self.dtype, out_dtype=jnp.float32)
        return (y + self.scale * added).astype(y.dtype)

    def merged(self, kernel_DF: Array, bias_F: Array | None) -> tuple[Array, Array | None]:
        """Returns the equivalent kernel in float32, with the product added, and the bias."""
        return kernel_DF + self._product_DF(), bias_F

    def unmerged(self, kernel_DF: Array, bias_F: Array | None) -> tuple[Array, Array | None]:
        """Inverts ``merged`` up to rounding."""
        return kernel_DF - self._product_DF(), bias_F

    def _product_DF(self) -> Array:
        a_DR, b_RF = self.lora_a_DR.get_value(), self.lora_b_RF.get_value()
        return self.scale * jnp.matmul(a_DR, b_RF, precision=jax.lax.Precision.HIGHEST)


class LoRAModule(TuningModule[LoRA]):
    """Wraps the linear maps that ``targets`` selects; the model holds the matrix pairs."""

    @classmethod
    def attach(cls, config: LoRA, model: Model, *, key: Array, context: Context) -> TunedModel:
        numbers = {name: n for n, name in enumerate(find_linears(model, config.targets))}

        def pair(name: str, linear: AnyLinear) -> LowRankPair | None:
            if name not in numbers:
                return None
            return LowRankPair(config, linear, key=jax.random.fold_in(key, numbers[name]))

        return TunedModel(wrap_linears(model, pair), cls(config))

    def with_dropout(self, model: Model, *, key: Array) -> Model:
        pairs = linear_adapters(model, LowRankPair)
        if not any(pair.dropout_rate for pair in pairs.values()):
            return model
        copy = shallow_copy(model)
        # The fold keeps these keys distinct from the model's dropout keys, split from the same key.
        keys = jax.random.split(jax.random.fold_in(key, 0x10BA), len(pairs))
        for own, pair in zip(keys, linear_adapters(copy, LowRankPair).values(), strict=True):
            pair.key = own
        return copy
