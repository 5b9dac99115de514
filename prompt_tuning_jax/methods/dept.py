"""DePT: a short prompt, and low-rank offsets of the input by position (Shi and Lipani 2024)."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from prompt_tuning_jax.config.methods import DePT
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import small_param, within
from prompt_tuning_jax.methods.prompt_init import init_prompt
from prompt_tuning_jax.models.base import Model, with_prompt
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array, HostArray


class PositionOffsets(TuningModule[DePT]):
    """Adds ``scale * offset_a_TR @ offset_b_RD`` to the input, and puts a prompt before it.

    ``offset_a_TR`` is initialized as in the published code, uniformly within 1/sqrt(R), and
    ``offset_b_RD`` to zeros.
    """

    def __init__(self, config: DePT, prompt_PD: Array, *, key: Array):
        super().__init__(config)
        self.prompt_PD = small_param(prompt_PD, "prompt", "prompt_embed")
        shape = (config.max_length, config.rank)
        self.offset_a_TR = small_param(within(key, shape, config.rank**-0.5))
        self.offset_b_RD = small_param(jnp.zeros((config.rank, prompt_PD.shape[1])))

    @classmethod
    def attach(cls, config: DePT, model: Model, *, key: Array, context: Context) -> TunedModel:
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
        embeddings_BTD = source.embeddings_BUD
        # Inputs may be padded to more or fewer positions than have an offset.
        a_TR = self.offset_a_TR.get_value()[: tokens_BT.shape[1]]
        offset_TD = self.config.scale * matmul.dot(
            a_TR, self.offset_b_RD.get_value(), dtype=jnp.float32
        )
        behind = tokens_BT.shape[1] - len(offset_TD)
        offset_TD = jnp.pad(offset_TD, ((0, behind), (0, 0)))
        moved_BTD = (embeddings_BTD + offset_TD).astype(embeddings_BTD.dtype)
        moved = replace(source, embeddings_BUD=moved_BTD)
        return Injections(model_input=with_prompt(moved, self.prompt_PD.get_value()))
