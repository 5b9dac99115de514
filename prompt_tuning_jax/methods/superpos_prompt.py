"""SuperPos-Prompt: superpositions of token embeddings (SadraeiJavaheri et al. 2024)."""

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.config.methods import PromptTuning, SuperPosPrompt
from prompt_tuning_jax.methods.base import Context, TunedModel, TuningModule
from prompt_tuning_jax.methods.dense import small_param
from prompt_tuning_jax.methods.prompt import with_prompt
from prompt_tuning_jax.models.base import Model
from prompt_tuning_jax.models.injections import Injections
from prompt_tuning_jax.models.ops import matmul
from prompt_tuning_jax.typing import Array, HostArray


class Superposition(TuningModule[SuperPosPrompt]):
    """Inserts ``weights_PM @ embeddings_MD`` before the input.

    Unless they train, the embeddings are those of the model, which holds them already.
    """

    def __init__(
        self,
        config: SuperPosPrompt,
        weights_PM: Array,
        tokens: tuple[int, ...],
        embeddings_MD: Array | None,
    ):
        super().__init__(config)
        self.tokens = tokens
        self.weights_PM = small_param(weights_PM)
        if embeddings_MD is not None:
            self.embeddings_MD = small_param(embeddings_MD, None, "prompt_embed")

    @classmethod
    def attach(
        cls, config: SuperPosPrompt, model: Model, *, key: Array, context: Context
    ) -> TunedModel:
        tokens = sampled_tokens(config, model.config.vocab_size)
        shape = (config.length, len(tokens))
        weights_PM = jax.random.normal(key, shape) * len(tokens) ** -0.5
        embeddings_MD = _embeddings(model, tokens) if config.trains_embeddings else None
        return TunedModel(model, cls(config, weights_PM, tokens, embeddings_MD))

    def for_inference(self, model: Model) -> TunedModel:
        config = PromptTuning(length=self.config.length).as_trained()
        return with_prompt(model, self.prompt(model), config)

    def prompt(self, model: Model) -> Array:
        """Computes the prompt ``[P, D]`` that the model reads."""
        if self.config.trains_embeddings:
            embeddings_MD: Array = self.embeddings_MD.get_value()
        else:
            embeddings_MD = _embeddings(model, self.tokens)
        return matmul.dot(self.weights_PM.get_value(), embeddings_MD, dtype=jnp.float32)

    def injections(
        self,
        model: Model,
        tokens_BT: Array | HostArray,
        *,
        task_B: Array | HostArray | None = None,
        key: Array | None = None,
    ) -> Injections:
        return Injections(model_input=model.embed(tokens_BT, self.prompt(model)))


def sampled_tokens(config: SuperPosPrompt, vocab_size: int) -> tuple[int, ...]:
    """Samples ``num_tokens`` different tokens; all of the population if it has no more."""
    population = min(config.init_population or vocab_size, vocab_size)
    number = min(config.num_tokens, population)
    chosen = np.random.default_rng(config.sample_seed).choice(population, number, replace=False)
    return tuple(chosen.tolist())


def _embeddings(model: Model, tokens: tuple[int, ...]) -> Array:
    return model.embedding_table()[jnp.asarray(tokens, jnp.int32)].astype(jnp.float32)
