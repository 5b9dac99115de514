"""Prompt tuning: a trained prompt at the model's input (Lester et al. 2021)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import MultitaskPrompts, PromptTuning
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.prompt_combine import among_prompt, attention_mask, combine
from prompt_tuning_jax.methods.prompt_init import init_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections, ModelInput
from prompt_tuning_jax.models.layers import dropout
from prompt_tuning_jax.typing import Array, HostArray


class Prompt(TuningModule[PromptTuning]):
    """Inserts ``prompt_PD``, or one prompt per example ``[B, P, D]``, into the model's input.

    ``decoder_prompt_PD`` comes before the decoder's start token.  Either may be missing.
    """

    def __init__(
        self,
        config: PromptTuning,
        prompt_PD: Array | HostArray | None,
        decoder_prompt_PD: Array | HostArray | None = None,
    ):
        super().__init__(config)
        for name, value in (("prompt_PD", prompt_PD), ("decoder_prompt_PD", decoder_prompt_PD)):
            if value is not None:
                array = jnp.asarray(value, jnp.float32)
                setattr(self, name, nnx.Param(array, logical_axes=("prompt", "prompt_embed")))

    @classmethod
    def attach(
        cls, config: PromptTuning, model: Model, *, key: Array, context: Context
    ) -> TunedModel:
        require_decoder_prompts(config.decoder_length, model)

        def initial(key: Array, length: int) -> Array | None:
            if not length:
                return None
            return init_prompt(
                config, model, key=key, length=length, context=context, labels=config.init_labels
            )

        decoder_key = jax.random.fold_in(key, 0xDEC0)
        prompts = initial(key, config.length), initial(decoder_key, config.decoder_length)
        return TunedModel(model, cls(config, *prompts))

    def for_inference(self, model: Model) -> TunedModel:
        # The initialization no longer matters, and it would require a vocabulary.
        return TunedModel(model, Prompt(self.config.as_trained(), *self._prompts()))

    def _prompts(self) -> tuple[Array | None, Array | None]:
        """Returns the prompts of the input and of the decoder."""
        params = (getattr(self, name, None) for name in ("prompt_PD", "decoder_prompt_PD"))
        first, second = (None if param is None else param.get_value() for param in params)
        return first, second

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        config, batch = self.config, len(tokens_BT)
        prompt, decoder_prompt = self._prompts()
        source = model.embed(tokens_BT)
        if prompt is not None:
            prompt = dropped(prompt, config.dropout, batch=batch, key=key)
            source = joined_input(config, model, tokens_BT, prompt)
        if decoder_prompt is not None:
            own_key = None if key is None else jax.random.fold_in(key, 0xDEC0)
            decoder_prompt = dropped(decoder_prompt, config.dropout, batch=batch, key=own_key)
        return Injections(model_input=source, decoder_prompt=decoder_prompt)


def require_decoder_prompts(length: int, model: Model) -> None:
    """Raises UserError for a prompt of this length in the decoder of a model without them."""
    if length and not model.has_decoder_prompts:
        raise UserError(
            f"method.decoder_length is {length}, and only a T5 has prompts in its decoder; set it "
            "to 0"
        )


def joined_input(
    config: PromptTuning | MultitaskPrompts,
    model: Model,
    tokens_BT: Array | HostArray,
    prompt: Array,
) -> ModelInput:
    """Joins a prompt ``[P, D]`` or ``[B, P, D]`` to the embedded input as ``config`` says."""
    if model.config.reads_images:
        return model.embed(tokens_BT, prompt)
    # In a decoder-only model, no position sees a later one in any case.
    alone = config.input_to_prompt and (model.causal or not config.prompt_to_input)
    if config.placement == "prefix" and alone and prompt.shape[-2]:
        source = model.embed(tokens_BT, prompt)
        if model.causal and config.prompt_to_prompt != "none":
            return source
        length = prompt.shape[-2]
        seen_PP = among_prompt(config.prompt_to_prompt, jnp.arange(length))
        return replace(source, prompt_mask_PP=jnp.broadcast_to(seen_PP, (length, length)))
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
