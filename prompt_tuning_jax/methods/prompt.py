"""Prompt tuning: a trained prompt at the encoder's input (Lester et al. 2021)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import MultitaskPrompts, PromptTuning
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.prompt_combine import attention_mask, combine
from prompt_tuning_jax.methods.prompt_init import init_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections, ModelInput
from prompt_tuning_jax.models.layers import dropout
from prompt_tuning_jax.typing import Array, HostArray


class Prompt(TuningModule[PromptTuning]):
    """Inserts ``prompt_PD``, or one prompt per example ``[B, P, D]``, into the encoder input."""

    def __init__(self, config: PromptTuning, prompt_PD: Array | HostArray):
        super().__init__(config)
        value = jnp.asarray(prompt_PD, jnp.float32)
        self.prompt_PD = nnx.Param(value, logical_axes=("prompt", "prompt_embed"))

    @classmethod
    def attach(
        cls, config: PromptTuning, model: Model, *, key: Array, context: Context
    ) -> TunedModel:
        prompt_PD = init_prompt(
            config, model, key=key, length=config.length, context=context, labels=config.init_labels
        )
        return TunedModel(model, cls(config, prompt_PD))

    def for_inference(self, model: Model) -> TunedModel:
        # The initialization no longer matters, and it would require a vocabulary.
        return with_prompt(model, self.prompt_PD.get_value(), self.config.as_trained())

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        config, prompt = self.config, self.prompt_PD.get_value()
        prompt = dropped(prompt, config.dropout, batch=len(tokens_BT), key=key)
        return Injections(model_input=joined_input(config, model, tokens_BT, prompt))


def joined_input(
    config: PromptTuning | MultitaskPrompts,
    model: Model,
    tokens_BT: Array | HostArray,
    prompt: Array,
) -> ModelInput:
    """Joins a prompt ``[P, D]`` or ``[B, P, D]`` to the embedded input as ``config`` says."""
    if model.config.reads_images:
        return model.embed(tokens_BT, prompt)
    source, is_prompt_BU = combine(
        prompt,
        model.embed(tokens_BT),
        tokens_BT,
        placement=config.placement,
        eos_id=model.input_eos,
    )
    seen_BUU = attention_mask(
        is_prompt_BU,
        prompt_to_input=config.prompt_to_input,
        prompt_to_prompt=config.prompt_to_prompt,
        input_to_prompt=config.input_to_prompt,
    )
    return replace(source, attention_mask_BUU=seen_BUU)


def dropped(prompt: Array, rate: float, *, batch: int, key: Array | None) -> Array:
    """Drops values of a prompt, different ones in each example: ``[P, D] -> [B, P, D]``.

    Returns the prompt itself if ``key`` is None.
    """
    if key is None or rate == 0.0:
        return prompt
    # The fold keeps this key distinct from the model's dropout keys, split from the same key.
    key = jax.random.fold_in(key, 0xD209)
    each_BPD = jnp.broadcast_to(prompt, (batch, *prompt.shape[-2:]))
    return dropout(each_BPD, rate, key=key)


def with_prompt(
    model: Model, prompt_PD: Array | HostArray, config: PromptTuning | None = None
) -> TunedModel:
    """Attaches a prompt ``[P, D]``, or one per example ``[B, P, D]``, to the model."""
    return TunedModel(model, Prompt(config or PromptTuning(), prompt_PD))
