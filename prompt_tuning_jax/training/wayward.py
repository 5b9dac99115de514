"""Holds a prompt near the embeddings of a text (Khashabi et al. 2021, arXiv 2112.08348)."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from prompt_tuning_jax import param_tree
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.data.vocabularies.class_vocabulary import ClassVocabulary
from prompt_tuning_jax.data.vocabularies.vocab import AnyVocabulary
from prompt_tuning_jax.errors import UserError
from prompt_tuning_jax.methods import PROMPT, TunedModel
from prompt_tuning_jax.methods.prompt_init import string
from prompt_tuning_jax.typing import Array, FlatParams

# (trainable, frozen) of one member -> what is added to its loss, after the normalization.
Regularizer = Callable[[FlatParams, FlatParams], Array]


def wayward_regularizer(
    experiment: Experiment, graphdef: nnx.GraphDef[TunedModel], vocabulary: AnyVocabulary | None
) -> Regularizer | None:
    """Returns ``training.wayward_weight`` times the distance; None without a text.

    Raises UserError if the text has another number of tokens than the prompt has positions.
    """
    training, length = experiment.training, experiment.method.prompt_positions()
    text, words = training.wayward_text, vocabulary
    if not text:
        return None
    if isinstance(words, ClassVocabulary):
        raise UserError("training.wayward_text: this model reads images; leave it out")
    if words is None:
        raise UserError("training.wayward_text needs the model's vocabulary; set model.vocabulary")
    if (pieces := len(words.encode(text))) != length:
        raise UserError(
            f"training.wayward_text has {pieces} tokens, and the prompt {length} positions; set "
            f"method.length={max(pieces, 1)}, or change the text"
        )

    def regularizer(trainable: FlatParams, frozen: FlatParams) -> Array:
        model = param_tree.merge(graphdef, {**frozen, **trainable}).model
        text_PD = string(model.embedding_table(), words, text)
        return training.wayward_weight * squared_distance(trainable[PROMPT], text_PD)

    return regularizer


def squared_distance(one_PD: Array, other_PD: Array) -> Array:
    """Returns the squared Euclidean distance of two prompts' vectors, averaged over positions."""
    squares_PD = jnp.square(one_PD.astype(jnp.float32) - other_PD.astype(jnp.float32))
    return jnp.sum(squares_PD) / len(one_PD)
