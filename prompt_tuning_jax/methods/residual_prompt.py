"""Residual prompt tuning: an MLP with a skip connection (Razdaibiedina et al. 2023)."""

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import PromptTuning, ResidualPrompt
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import small_param, within
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.methods.prompt_init import init_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.layers import dropout
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array, HostArray

_EPSILON = 1e-5


class SkippedPrompt(TuningModule[ResidualPrompt]):
    """Inserts ``prompt_PD + mlp(prompt_PD)`` before the input."""

    def __init__(self, config: ResidualPrompt, prompt_PD: Array, *, key: Array):
        super().__init__(config)
        self.prompt_PD = small_param(prompt_PD, "prompt", "prompt_embed")
        self.mlp = Bottleneck(config, prompt_PD.shape[1], key=key)

    @classmethod
    def attach(
        cls, config: ResidualPrompt, model: Model, *, key: Array, context: Context
    ) -> TunedModel:
        keys = jax.random.split(key)
        prompt_PD = init_prompt(config, model, key=keys[0], length=config.length, context=context)
        return TunedModel(model, cls(config, prompt_PD, key=keys[1]))

    def for_inference(self, model: Model) -> TunedModel:
        config = PromptTuning(length=self.config.length).as_trained()
        return with_prompt(model, self.prompt(), config)

    def prompt(self, *, key: Array | None = None) -> Array:
        """Computes the prompt ``[P, D]`` that the model reads; a ``key`` enables dropout."""
        prompt_PD: Array = self.prompt_PD.get_value()
        return prompt_PD + self.mlp(prompt_PD, key=key)

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        if key is not None:
            # The fold keeps this key distinct from the model's dropout keys, split from the same.
            key = jax.random.fold_in(key, 0x4E5)
        return Injections(model_input=model.embed(tokens_BT, self.prompt(key=key)))


class Bottleneck(nnx.Module):
    """Two affine maps with relu in between, then layer norm: one network, or N = P of them.

    Parameters and their initialization follow torch.nn.Linear and torch.nn.LayerNorm.
    """

    def __init__(self, config: ResidualPrompt, width: int, *, key: Array):
        number = config.length if config.network == "separate" else 1
        hidden = config.hidden
        keys = jax.random.split(key, 4)
        self.in_NDM = small_param(within(keys[0], (number, width, hidden), width**-0.5))
        self.in_bias_NM = small_param(within(keys[1], (number, hidden), width**-0.5))
        self.out_NMD = small_param(within(keys[2], (number, hidden, width), hidden**-0.5))
        self.out_bias_ND = small_param(within(keys[3], (number, width), hidden**-0.5))
        if config.layer_norm:
            self.norm_scale_ND = small_param(jnp.ones((number, width)))
            self.norm_bias_ND = small_param(jnp.zeros((number, width)))
        self.layer_norm = config.layer_norm
        self.dropout_rate = config.dropout

    def __call__(self, prompt_PD: Array, *, key: Array | None = None) -> Array:
        hidden_PM = jax.nn.relu(
            _affine(prompt_PD, self.in_NDM.get_value(), self.in_bias_NM.get_value())
        )
        y_PD = _affine(hidden_PM, self.out_NMD.get_value(), self.out_bias_ND.get_value())
        y_PD = dropout(y_PD, self.dropout_rate, key=key)
        if not self.layer_norm:
            return y_PD
        mean_P1 = jnp.mean(y_PD, axis=-1, keepdims=True)
        variance_P1 = jnp.var(y_PD, axis=-1, keepdims=True)
        normal_PD = (y_PD - mean_P1) * jax.lax.rsqrt(variance_P1 + _EPSILON)
        return normal_PD * self.norm_scale_ND.get_value() + self.norm_bias_ND.get_value()


def _affine(x_PI: Array, kernel_NIO: Array, bias_NO: Array) -> Array:
    """Applies the one map to all positions, or to each position its own."""
    if len(kernel_NIO) == 1:
        return matmul.dot(x_PI, kernel_NIO[0], dtype=jnp.float32) + bias_NO
    return matmul.einsum("pi,pio->po", x_PI, kernel_NIO, dtype=jnp.float32) + bias_NO
