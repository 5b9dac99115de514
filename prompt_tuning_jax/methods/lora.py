"""LoRA: a trained product of two thin matrices beside any linear map (Hu et al. 2022)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.methods.base import Context, Method, TunedModel, TuningModule, shallow_copy
from prompt_tuning_jax.methods.linear_adapter import (
    AnyLinear,
    chosen_maps,
    complaints_of,
    linear_adapters,
    wrap_linears,
)
from prompt_tuning_jax.models.layers import dropout
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.typing import Array

_LARGEST_ALPHA = 1e30  # in float32 its product with anything stays finite


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """``rank * (in + out)`` parameters per chosen map: ``.../adapter/lora_a_DR``, ``_b_RF``.

    With the defaults ``2 * rank * (D + H * K) * (encoder layers + 2 * decoder layers)``.

    ``targets`` are RE2 expressions on whole paths (``encoder/layers_0/attention/query``).
    The product is scaled by ``alpha / rank``, with ``rank_stabilized`` by ``alpha / sqrt(rank)``
    (Kalajdzievski 2023).  ``dropout`` is on what goes into the product.  Frozen weights may be
    quantised.
    """

    identity_at_init: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    default_optimizer: ClassVar[Mapping[str, Any]] = {"learning_rate": 0.01, "weight_decay": 0.0}

    rank: int = 8
    alpha: float = 16.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = (".*/(query|value)",)

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def attach(self, model: T5, *, key: Array, context: Context) -> TunedModel:
        numbers = {name: n for n, name in enumerate(chosen_maps(model, self.targets))}

        def pair(name: str, linear: AnyLinear) -> LowRankPair | None:
            if name not in numbers:
                return None
            return LowRankPair(self, linear, key=jax.random.fold_in(key, numbers[name]))

        return TunedModel(wrap_linears(model, pair), LoRAModule())

    def uses_rng(self) -> bool:
        return self.dropout > 0

    def config_errors(self) -> Iterator[str]:
        if self.rank < 1:
            yield f"method.rank is {self.rank}; must be at least 1"
        if not abs(self.alpha) < _LARGEST_ALPHA:
            yield f"method.alpha is {self.alpha}; must be below {_LARGEST_ALPHA:g}"
        if not 0 <= self.dropout < 1:
            yield f"method.dropout is {self.dropout}; must be at least 0 and below 1"
        if not self.targets:
            yield "method.targets is empty; give at least one regular expression"
        yield from complaints_of(self.targets, field="method.targets")


class LowRankPair(nnx.Module):
    """``linear(x) + scale * (dropout(x) @ a) @ b``; a is drawn as PEFT does, b is zero."""

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

    def merged(self, kernel_DF: Array) -> Array:
        """The kernel ``[D, F]`` in float32 that does the same alone."""
        return kernel_DF + self._product_DF()

    def unmerged(self, kernel_DF: Array) -> Array:
        """The inverse of ``merged``, up to rounding."""
        return kernel_DF - self._product_DF()

    def _product_DF(self) -> Array:
        a_DR, b_RF = self.lora_a_DR.get_value(), self.lora_b_RF.get_value()
        return self.scale * jnp.matmul(a_DR, b_RF, precision=jax.lax.Precision.HIGHEST)


class LoRAModule(TuningModule):
    """The pairs stand in the model; here their dropout gets its keys."""

    def with_dropout(self, model: T5, *, key: Array) -> T5:
        pairs = linear_adapters(model, LowRankPair)
        if not any(pair.dropout_rate for pair in pairs.values()):
            return model
        copy = shallow_copy(model)
        # Not a key of the model's own dropout: those are split from the same key.
        keys = jax.random.split(jax.random.fold_in(key, 0x10BA), len(pairs))
        for own, pair in zip(keys, linear_adapters(copy, LowRankPair).values(), strict=True):
            pair.key = own
        return copy
