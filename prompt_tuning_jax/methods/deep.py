"""Deep prompts: one prompt per layer that reads (P-tuning v2, Liu et al. 2022; VPT-deep)."""

from dataclasses import replace
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax.config.methods import DeepPrompts
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import Dense, small_param
from prompt_tuning_jax.methods.prompt import dropped
from prompt_tuning_jax.methods.prompt_init import init_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections, LayerPrompt
from prompt_tuning_jax.models.layers import split_key
from prompt_tuning_jax.typing import Array, HostArray


class PlainVectors(nnx.Module):
    """Stores the vectors of all layers directly, concatenated in layer order."""

    def __init__(self, prompts_PD: Array):
        self.prompts_PD = small_param(prompts_PD, "prompt", "prompt_embed")

    def layers(self, lengths: tuple[int, ...]) -> list[Array]:
        prompts_PD: Array = self.prompts_PD.get_value()
        return jnp.split(prompts_PD, list(accumulate(lengths))[:-1])


class MlpVectors(nnx.Module):
    """Computes the vectors of all layers with an MLP from one vector per position."""

    def __init__(self, config: DeepPrompts, model: Model, *, key: Array):
        keys = jax.random.split(key, 3)
        width, layers = model.config.embed_dim, model.config.num_reading_layers
        self.embedding_PD = small_param(
            jax.random.normal(keys[0], (config.prompt_positions(), width))
        )
        self.inner = Dense(width, config.hidden, key=keys[1])
        self.outer = Dense(config.hidden, layers * width, key=keys[2])

    def layers(self, lengths: tuple[int, ...]) -> list[Array]:
        embedding_PD = self.embedding_PD.get_value()
        made_PJ = self.outer(jnp.tanh(self.inner(embedding_PD)))
        made_PLD = made_PJ.reshape(len(embedding_PD), len(lengths), -1)
        return [made_PLD[:length, i] for i, length in enumerate(lengths)]


class LayerPrompts(TuningModule[DeepPrompts]):
    """Prepends the first layer's prompt to the input and injects the others into their layers."""

    def __init__(
        self, config: DeepPrompts, vectors: PlainVectors | MlpVectors, lengths: tuple[int, ...]
    ):
        super().__init__(config)
        self.vectors = vectors
        self.lengths = lengths

    @classmethod
    def attach(
        cls, config: DeepPrompts, model: Model, *, key: Array, context: Context
    ) -> TunedModel:
        layers = model.config.num_reading_layers
        if config.lengths and len(config.lengths) != layers:
            raise UserError(
                f"method.lengths has {len(config.lengths)} entries and the {model.reading_stack} "
                f"{layers} layers; give one entry per layer, or none"
            )
        lengths = config.lengths or (config.length,) * layers
        if config.hidden:
            return TunedModel(model, cls(config, MlpVectors(config, model, key=key), lengths))
        prompts = []
        for i, (length, layer_key) in enumerate(
            zip(lengths, jax.random.split(key, len(lengths)), strict=True)
        ):
            if not length or (i and config.mode == "add"):
                prompts.append(jnp.zeros((length, model.config.embed_dim), jnp.float32))
                continue
            prompts.append(
                init_prompt(config, model, key=layer_key, length=length, context=context)
            )
        return TunedModel(model, cls(config, PlainVectors(jnp.concatenate(prompts)), lengths))

    def for_inference(self, model: Model) -> TunedModel:
        config = replace(self.config.as_trained(), hidden=0)
        vectors = PlainVectors(jnp.concatenate(self.layers()))
        return TunedModel(model, LayerPrompts(config, vectors, self.lengths))

    def layers(self) -> list[Array]:
        """Returns the vectors ``[P_i, D]`` of each layer."""
        return self.vectors.layers(self.lengths)

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        layers = self.layers()
        keys = split_key(key, len(layers))
        rate, batch = self.config.dropout, len(tokens_BT)
        first, *others = [
            dropped(prompt_PD, rate, batch=batch, key=layer_key)
            for prompt_PD, layer_key in zip(layers, keys, strict=True)
        ]
        add = self.config.mode == "add"
        later = [
            LayerPrompt(vectors_BPD=prompt if prompt.ndim == 3 else prompt[None], add=add)
            if prompt.shape[-2]
            else None
            for prompt in others
        ]
        return Injections(model_input=model.embed(tokens_BT, first), layer_prompts=(None, *later))
