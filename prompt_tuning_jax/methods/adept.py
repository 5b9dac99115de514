"""ADePT: a short prompt, and offsets of the input by a network of tokens (Tang et al. 2025)."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from prompt_tuning_jax.config.methods import ADePT
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import small_param, within
from prompt_tuning_jax.methods.prompt_init import init_prompt
from prompt_tuning_jax.models.base import Model, with_prompt
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array, HostArray


class TokenOffsets(TuningModule[ADePT]):
    """Adds ``relu(x @ offset_in_DM + bias) @ offset_out_MD + bias`` to each token's embedding x.

    A prompt comes before the result.  ``offset_in_DM`` is initialized as in the published code,
    uniformly within 1/sqrt(M), and the rest of the network to zeros.
    """

    def __init__(self, config: ADePT, prompt_PD: Array, *, key: Array):
        super().__init__(config)
        width, hidden = prompt_PD.shape[1], config.hidden
        self.prompt_PD = small_param(prompt_PD, "prompt", "prompt_embed")
        self.offset_in_DM = small_param(within(key, (width, hidden), hidden**-0.5))
        self.offset_in_bias_M = small_param(jnp.zeros(hidden))
        self.offset_out_MD = small_param(jnp.zeros((hidden, width)))
        self.offset_out_bias_D = small_param(jnp.zeros(width))

    @classmethod
    def attach(cls, config: ADePT, model: Model, *, key: Array, context: Context) -> TunedModel:
        keys = jax.random.split(key)
        prompt_PD = init_prompt(config, model, key=keys[0], length=config.length, context=context)
        return TunedModel(model, cls(config, prompt_PD, key=keys[1]))

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        source = model.embed(tokens_BT)
        x_BTD = source.embeddings_BUD
        moved = replace(source, embeddings_BUD=(x_BTD + self.offsets(x_BTD)).astype(x_BTD.dtype))
        return Injections(model_input=with_prompt(moved, self.prompt_PD.get_value()))

    def offsets(self, x_BTD: Array) -> Array:
        """Computes the offsets ``[B, T, D]`` of embeddings, in float32."""
        hidden_BTM = matmul.dot(x_BTD, self.offset_in_DM.get_value(), dtype=jnp.float32)
        hidden_BTM = jax.nn.relu(hidden_BTM + self.offset_in_bias_M.get_value())
        offsets_BTD = matmul.dot(hidden_BTM, self.offset_out_MD.get_value(), dtype=jnp.float32)
        return offsets_BTD + self.offset_out_bias_D.get_value()
