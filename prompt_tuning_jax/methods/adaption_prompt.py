"""Adaption prompts: gated prompts in the attention of the top layers (LLaMA-Adapter).

See Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init
Attention", equations 2 to 5, and peft 0.21, tuners/adaption_prompt/layer.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.methods import AdaptionPrompt
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule, shallow_copy
from prompt_tuning_jax.methods.dense import small_param
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.causal_lm.attention import Attention
from prompt_tuning_jax.typing import Array


class AdaptionPrompts(TuningModule[AdaptionPrompt]):
    """Adds a gated prompt to the self-attention of the top layers; the model holds them."""

    @classmethod
    def attach(
        cls, config: AdaptionPrompt, model: Model, *, key: Array, context: Context
    ) -> TunedModel:
        copy = shallow_copy(model)
        attentions = self_attentions(copy)
        if config.layers > len(attentions):
            raise UserError(
                f"method.layers is {config.layers}, and the {model.reading_stack} has "
                f"{len(attentions)} layers"
            )
        width, joined = model.config.embed_dim, attentions[0].num_heads * attentions[0].head_dim
        if not config.project and joined != width:
            raise UserError(
                f"method.project=false needs heads that together are as wide as the model, "
                f"{width}; here they are {joined} wide: set it to true"
            )
        top = attentions[-config.layers :]
        for attention, layer_key in zip(top, jax.random.split(key, len(top)), strict=True):
            attention.adapter = GatedPrompt(config, width, key=layer_key)
        return TunedModel(copy, cls(config))


class GatedPrompt(nnx.Module):
    """Adds ``gate * attention(queries, prompt)`` to what an attention computes.

    The keys and values are those that the attention computes for the prompt's vectors, at no
    position.  Vectors are initialized from a normal distribution and the gate to zero.
    """

    def __init__(self, config: AdaptionPrompt, width: int, *, key: Array):
        prompt_PD = jax.random.normal(key, (config.length, width))
        self.prompt_PD = small_param(prompt_PD, "prompt", "prompt_embed")
        self.gate = small_param(jnp.zeros(1))
        self.projects = config.project

    def __call__(self, query_BTHK: Array, mixed_BTHK: Array, attention: Attention) -> Array:
        prompt_1PD = self.prompt_PD.get_value()[None]
        prompt = attention.keys_values(prompt_1PD, None)
        added_BTHK = self.gate.get_value() * attention.mix(query_BTHK, [prompt], [None])
        if self.projects:
            return attention.project(mixed_BTHK + added_BTHK)
        y_BTD = attention.project(mixed_BTHK)
        return (y_BTD + added_BTHK.reshape(y_BTD.shape)).astype(y_BTD.dtype)


def self_attentions(model: Model) -> list[Attention]:
    """Returns the self-attention of each layer that reads; UserError for other kinds of models."""
    modules = {param_tree.path_name(path): module for path, module in nnx.iter_modules(model)}
    layers = range(model.config.num_reading_layers)
    chosen = [modules.get(f"{model.reading_stack}/layers_{i}/self_attention") for i in layers]
    attentions = [each for each in chosen if isinstance(each, Attention)]
    if not attentions:
        raise UserError(
            "method=adaption_prompt is for decoder-only models and T5Gemma, and this is a "
            f"{type(model).__name__}; use prefix_tuning or deep_prompts"
        )
    return attentions
